"""A run that is killed goes on with the same numbers, bit for bit."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import fakes
import numpy as np
import pytest
from study_test import config, folder  # noqa: F401 (fixtures)

from persona_jax.checkpoint import TERMINATED

STEPS = 4
PROGRAM = """
import os, sys
from pathlib import Path
from persona_jax import processes

if 'JAX_PROCESS_ID' in os.environ:
  processes.join()
import jax, jax.numpy as jnp, numpy as np
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
params = processes.here(trees.flatten(result.policy['params']))
if processes.first():
  np.savez(folder + '.npz', **params)
""".replace('STEPS', str(STEPS))


@contextlib.contextmanager
def started(count, model, algorithm, place):
  """`count` processes of one run; none of them outlives the block."""
  command = [sys.executable, '-c', PROGRAM, model, algorithm, place]
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  several = {
    'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
    'JAX_NUM_PROCESSES': str(count),
    'XLA_FLAGS': '',  # a device each
  }
  children = []
  for rank in range(count):
    own = several | {'JAX_PROCESS_ID': str(rank)} if count > 1 else {}
    child = subprocess.Popen(
      list(map(str, command)),
      env=os.environ | own,
      stderr=subprocess.PIPE,
      text=True,
    )
    children.append(child)
  try:
    yield children
  finally:
    for child in children:
      child.kill()
      child.communicate()


def whole(count, model, algorithm, place):
  """A run to its end: its log without times, and the parameters."""
  with started(count, model, algorithm, place) as children:
    for child in children:
      errors = child.communicate(timeout=600)[1]
      assert child.returncode == 0, errors[-2000:]
  lines = (place / 'metrics.jsonl').read_text().splitlines()
  log = [fakes.timeless(json.loads(line)) for line in lines]
  with np.load(f'{place}.npz') as arrays:
    return log, dict(arrays)


def assert_same(got, want):
  assert got[0] == want[0] and len(got[0]) == STEPS
  for name, leaf in want[1].items():
    np.testing.assert_array_equal(got[1][name], leaf, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('count', 'algorithm'), [(1, 'ppo'), (1, 'prime'), (2, 'grpo')]
)
def test_killed_at_any_moment_it_ends_the_same(
  config,  # noqa: F811
  tmp_path,
  count,
  algorithm,
):
  run = count, config.model, algorithm
  want = whole(*run, tmp_path / 'whole')
  began = time.monotonic()
  whole(*run, tmp_path / 'timed')  # compiled by now
  length = time.monotonic() - began
  rng, kills, runs = np.random.default_rng(0), 0, 0
  while kills < 7 and runs < 12:
    place = tmp_path / f'killed{runs}'
    for _ in range(2):
      with started(*run, place) as children:
        try:
          children[0].wait(timeout=rng.uniform(0.2, 1) * length)
        except subprocess.TimeoutExpired:
          kills += 1
        else:
          length *= 0.9  # the machine was busier when it was timed
    assert_same(whole(*run, place), want)
    runs += 1
  assert kills > 6


@pytest.mark.slow
@pytest.mark.parametrize('count', [1, 2])
def test_told_to_end_it_saves_and_ends_the_same(config, tmp_path, count):  # noqa: F811
  run = count, config.model, 'grpo'
  want = whole(*run, tmp_path / 'whole')
  place = tmp_path / 'told'
  with started(*run, place) as children:
    while not (place / 'metrics.jsonl').exists() or (
      not (place / 'metrics.jsonl').read_text()
    ):
      time.sleep(0.05)
    children[-1].send_signal(signal.SIGTERM)  # any one of them
    for child in children:
      errors = child.communicate(timeout=60)[1]
      assert child.returncode in (TERMINATED, 0), errors[-2000:]
  assert_same(whole(*run, place), want)
