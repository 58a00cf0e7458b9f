"""The floors of the package: who may import whom, and with what installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import persona_jax

ROOT = Path(persona_jax.__file__).parent
GROUND = {'masked', 'trees', 'taps', 'cache', 'dialogue', 'shapes', 'remote'}
SIBLINGS = {
  'models',
  'text',
  'activations',
  'rollout',
  'rewards',
  'learn',
  'agents',
  'analysis',
}
FILES = sorted(ROOT.rglob('*.py'))


def home(path):
  """The room of a file: 'rewards' of 'rewards/verdict.py', 'train'."""
  return path.relative_to(ROOT).parts[0].removesuffix('.py')


def rooms(source, package=()):
  """The rooms of persona_jax that a file imports, in functions too."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {_room(alias.name.split('.')) for alias in node.names}
    if isinstance(node, ast.ImportFrom):
      base = ['persona_jax', *package][: len(package) + 2 - node.level]
      start = base if node.level else []
      start = start + (node.module.split('.') if node.module else [])
      found |= {_room([*start, alias.name]) for alias in node.names}
  return found - {None}


def _room(parts):
  if parts[0] != 'persona_jax':
    return None
  return parts[1] if len(parts) > 1 else 'persona_jax'


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
  room = home(path)
  if room not in GROUND | SIBLINGS:  # a program, or the package itself
    return
  package = path.relative_to(ROOT).parts[:-1]
  allowed = GROUND if room in GROUND else GROUND | {room}
  wrong = rooms(path.read_text(), package) - allowed
  assert not wrong, f'{path.name} imports {wrong}; pass it in as an argument.'


def test_every_folder_is_a_known_room():
  folders = {home(path) for path in FILES if path.parent != ROOT}
  assert folders <= SIBLINGS, f'{folders - SIBLINGS} has no floor.'
  assert {path.stem for path in FILES} >= GROUND


@pytest.mark.parametrize(
  ('source', 'found'),
  [
    ('import jax, persona_jax.train', {'train'}),
    ('from persona_jax import trees, models as m', {'trees', 'models'}),
    ('from persona_jax.learn.losses import k3', {'learn'}),
    ('def f():\n  if x:\n    from persona_jax import chat', {'chat'}),
    ('from . import tokens', {'rewards'}),
    ('from .tokens import joined', {'rewards'}),
    ('from ..models import load', {'models'}),
    ('from .. import plan', {'plan'}),
    ('from persona_jax import *', {'*'}),
    ('import persona_jax', {'persona_jax'}),
    ('from jax import numpy\nimport flax.linen', set()),
  ],
)
def test_the_walk_sees_all_ways_to_import(source, found):
  assert rooms(source, package=('rewards',)) == found


JAX_ALONE = """
import sys

ALLOWED = {
  *sys.stdlib_module_names, 'persona_jax',
  'jax', 'jaxlib', 'jax_plugins', 'numpy', 'scipy', 'ml_dtypes', 'opt_einsum',
}

class Without:
  def __init__(self, finder):
    self.finder = finder

  def find_spec(self, name, path=None, target=None):
    top = name.split('.')[0]
    if top in ALLOWED or top.startswith('_sysconfigdata'):
      return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
try:
  import jaxtyping
except ImportError:
  pass
else:
  raise SystemExit('jaxtyping is not hidden')

import jax, jax.numpy as jnp
from persona_jax import rewards
from persona_jax.dialogue import Dialogue

ones = jnp.ones((2, 3, 4))
dialogue = Dialogue(
  tokens=ones.astype(int), length=jnp.full((2, 3), 4),
  stopped=jnp.zeros((2, 3), bool), logprobs=ones, raw_logprobs=ones,
  who=jnp.arange(3) % 2, prompts=jnp.ones((2, 2, 5), int),
  prompt_length=jnp.full((2, 2), 5), scenario=jnp.arange(2),
  sample=jnp.zeros(2, int), live=jnp.ones(2, bool),
)
judge = lambda dialogue: jnp.zeros(dialogue.length.shape)
reward = rewards.weighted({
  'prompt': (1.0, rewards.prompt_to_line(jax.tree_util.Partial(judge)))
})
value = jax.jit(lambda reward, d: reward(d))(reward, dialogue)
assert value.tolist() == [[0.0, 0.5, 0.0]] * 2, value
known = sys.stdlib_module_names
print(sorted({name.split('.')[0] for name in sys.modules} - {*known}))
"""


def test_rewards_import_with_jax_alone():
  done = subprocess.run(
    [sys.executable, '-c', JAX_ALONE],
    capture_output=True,
    text=True,
    cwd=ROOT.parent,
  )
  assert done.returncode == 0, done.stderr
  assert not {'flax', 'jaxtyping'} & set(ast.literal_eval(done.stdout))
