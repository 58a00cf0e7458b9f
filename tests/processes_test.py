"""Two processes on one mesh say what one device says."""

import dataclasses
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import fakes
import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from persona_jax import rollout, trees
from persona_jax.learn import sharding
from persona_jax.models import cache

CONFIG = dataclasses.replace(fakes.CONFIG, vocab=304)  # two halves
ROWS = 16
FIELDS = ('tokens', 'length', 'logprobs')
JOIN = """
import sys
import jax

_, rank, address, out = sys.argv
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(address, 2, int(rank))
import processes_test  # which makes arrays: not before

processes_test.speak(out)
"""


def talk(apply, unembed, variables, scenario):
  """Dialogues of one speaker on both seats."""
  speaker = rollout.Speaker(
    variables=variables,
    sampling=rollout.Sampling.of(ROWS, fakes.stops(range(60))),
    apply=apply,
    unembed=unembed,
    memory=functools.partial(cache.empty, CONFIG),
    who=(0, 1),
  )
  said = rollout.converse(
    jax.random.key(0),
    (speaker,),
    fakes.FRAMES,
    scenario,
    lines=4,
    tokens=6,
    lanes=8,
    groups=4,
  )
  return {name: getattr(said, name) for name in FIELDS}


def speak(out):
  """In one of two processes, with four devices each."""
  assert (jax.process_count(), jax.local_device_count()) == (2, 4)
  mesh = sharding.make_mesh({'data': 4, 'tensor': 2})
  model = fakes.tiny(CONFIG)
  host = functools.partial(jax.tree.map, np.asarray)
  stacked = host(model.stacked)
  places = trees.shardings(stacked, mesh, sharding.gathered(sharding.RULES))
  spread = jax.jit(trees.unstack_layers, in_shardings=(places,))(
    jax.device_put(stacked, places)
  )
  scenario = jax.device_put(
    host(fakes.scenario(ROWS)), sharding.batch_sharding(mesh)
  )
  apply = sharding.by_rows(model.apply, mesh)
  run = jax.jit(functools.partial(talk, apply, model.unembed))
  said = run(spread, scenario)
  assert not said['tokens'].is_fully_addressable
  said = multihost_utils.process_allgather(said, tiled=True)
  np.savez(out, **said)


@pytest.mark.devices
def test_two_processes_say_what_one_device_says(tmp_path):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
    'PYTHONPATH': str(Path(__file__).parent),
  }
  pair = [
    subprocess.Popen(
      [sys.executable, '-c', JOIN, str(rank), address, tmp_path / str(rank)],
      env=env,
      stderr=subprocess.PIPE,
    )
    for rank in range(2)
  ]
  try:
    model = fakes.tiny(CONFIG)
    alone = jax.jit(functools.partial(talk, model.apply, model.unembed))
    want = alone(model.unstacked, fakes.scenario(ROWS))
    for process in pair:
      _, said = process.communicate(timeout=300)
      assert process.returncode == 0, said.decode()
  finally:
    for process in pair:
      process.kill()
      process.communicate()
  for rank in range(2):
    got = np.load(tmp_path / f'{rank}.npz')
    np.testing.assert_array_equal(got['tokens'], want['tokens'])
    np.testing.assert_array_equal(got['length'], want['length'])
    np.testing.assert_allclose(got['logprobs'], want['logprobs'], atol=1e-5)
