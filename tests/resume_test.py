"""A run that is killed goes on with the same numbers, bit for bit."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from study_test import config, folder  # noqa: F401 (fixtures)

from persona_jax.checkpoint import TERMINATED

STEPS = 4
PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from persona_jax import lab, main, train, trees
from persona_jax.models.source import cache_folder

jax.config.update('jax_compilation_cache_dir', str(cache_folder() / 'xla'))
model, algorithm, folder = sys.argv[1:]
config = main.load_config('study:tiny')
for field, value in {
  'model': model, 'rl.algorithm': algorithm, 'rl.steps': 'STEPS',
  'rl.epochs': '2', 'rl.minibatches': '2',
}.items():
  main.override(config, field, value)
taste = lambda dialogue: jnp.mean(dialogue.tokens % 7, axis=2)
terms = {'taste': (1.0, jax.tree_util.Partial(taste))}
opened, silent = lab.open_lab(config), lambda count=1: None
result = train.run(opened, config, terms, Path(folder), advance=silent)
np.savez(folder + '.npz', **trees.flatten(result.policy['params']))
""".replace('STEPS', str(STEPS))


def start(model, algorithm, place):
  command = [sys.executable, '-c', PROGRAM, model, algorithm, place]
  return subprocess.Popen(
    list(map(str, command)), stderr=subprocess.PIPE, text=True
  )


def whole(model, algorithm, place):
  """A run to its end: its log without times, and the parameters."""
  with start(model, algorithm, place) as child:
    errors = child.communicate()[1]
  assert child.returncode == 0, errors[-2000:]
  lines = (place / 'metrics.jsonl').read_text().splitlines()
  log = [json.loads(line) for line in lines]
  for record in log:
    del record['seconds']
  with np.load(f'{place}.npz') as arrays:
    return log, dict(arrays)


def assert_same(got, want):
  assert got[0] == want[0] and len(got[0]) == STEPS
  for name, leaf in want[1].items():
    np.testing.assert_array_equal(got[1][name], leaf, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize('algorithm', ['ppo', 'prime'])
def test_killed_at_any_moment_it_ends_the_same(config, tmp_path, algorithm):  # noqa: F811
  want = whole(config.model, algorithm, tmp_path / 'whole')
  began = time.monotonic()
  whole(config.model, algorithm, tmp_path / 'timed')  # compiled by now
  length = time.monotonic() - began
  rng = np.random.default_rng(0)
  kills = 0
  for i in range(5):
    place = tmp_path / f'killed{i}'
    for _ in range(2):
      with start(config.model, algorithm, place) as child:
        try:
          child.wait(timeout=rng.uniform(0.2, 1) * length)
        except subprocess.TimeoutExpired:
          child.kill()
          kills += 1
    assert_same(whole(config.model, algorithm, place), want)
  assert kills > 5


@pytest.mark.slow
def test_told_to_end_it_saves_and_ends_the_same(config, tmp_path):  # noqa: F811
  want = whole(config.model, 'grpo', tmp_path / 'whole')
  place = tmp_path / 'told'
  with start(config.model, 'grpo', place) as child:
    while not (place / 'metrics.jsonl').exists() or (
      not (place / 'metrics.jsonl').read_text()
    ):
      time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    errors = child.communicate(timeout=30)[1]
  assert child.returncode in (TERMINATED, 0), errors[-2000:]
  assert_same(whole(config.model, 'grpo', place), want)
