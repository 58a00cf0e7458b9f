"""What checkpoints cost a run: seconds a step with one after each, and none.

  python launch/bench/checkpoint.py --steps 5 --rounds 2
  python launch/bench/checkpoint.py --config=study:full --config.rl.steps=9

GRPO of all parameters (or what the config says) with a reward that costs
nothing; both ways take turns in one process. `in save` is what the main thread
spends there, while the devices have the next rollout to do.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from persona_jax import lab, main, train
from persona_jax.checkpoint import Checkpoints
from persona_jax.learner import Learner

FLAGS = {'config': 'study', 'steps': 5, 'rounds': 2}


def run(words):
  _, options, fields = main.read_words(words, FLAGS, free='config.')
  config = main.load_config(options['config'])
  fields = [('rl.steps', str(options['steps'])), *fields]
  for field, value in fields:
    main.override(config, field, value)
  opened = lab.open_lab(config)
  states = jax.eval_shape(Learner(opened, config).init)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states))
  print(f'{size / 2**30:.2f} GiB a checkpoint, {jax.devices()[0].device_kind}')
  inside = []
  _timed(Checkpoints, 'save', inside)
  found = {'none': [], 'each step': []}
  _steps(opened, config, 1 << 30)  # compiles
  for _ in range(options['rounds']):
    found['none'] += _steps(opened, config, 1 << 30)
    inside.clear()
    found['each step'] += _steps(opened, config, 1)
  print('| checkpoints | median s a step | min | max |')
  print('|---|---|---|---|')
  for name, x in found.items():
    median = statistics.median(x)
    print(f'| {name} | {median:.2f} | {min(x):.2f} | {max(x):.2f} |')
  none, each = map(statistics.median, found.values())
  print(f'a checkpoint costs {each / none - 1:.1%} of a step')
  print(f'in save: {statistics.median(inside):.2f} s')


def _steps(opened, config, save_every):
  """Seconds of the steps of a run, but of the first."""
  main.override(config, 'rl.save_every', str(save_every))
  taste = lambda dialogue: jnp.mean(dialogue.tokens % 7, axis=2)
  terms = {'taste': (1.0, jax.tree_util.Partial(taste))}
  silent = lambda count=1: None
  with tempfile.TemporaryDirectory() as folder:
    found = train.run(opened, config, terms, Path(folder), advance=silent)
  return [x['pace/seconds'] for x in found.log[1:]]


def _timed(owner, name, times):
  """Notes the seconds of every call of a method."""
  real = getattr(owner, name)

  def fn(*args, **kwargs):
    began = time.monotonic()
    real(*args, **kwargs)
    times.append(time.monotonic() - began)

  setattr(owner, name, fn)


if __name__ == '__main__':
  run(sys.argv[1:])
