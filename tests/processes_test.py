"""Two processes on one mesh say and learn what one device does."""

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from study_test import config, folder  # noqa: F401 (fixtures)

from persona_jax import learn, processes, rollout, trees
from persona_jax.learn import losses, sharding
from persona_jax.models import cache

CONFIG = dataclasses.replace(fakes.CONFIG, vocab=304)  # two halves
ROWS = 16
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
FIELDS = ('tokens', 'length', 'logprobs')
JOIN = """
import sys
import jax

_, rank, address, what, out = sys.argv
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(address, 2, int(rank))
import processes_test  # which makes arrays: not before

getattr(processes_test, what)(out)
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


def examples():
  """A batch of the host, every number of which matters."""
  rng = np.random.default_rng(0)
  size, floats = (ROWS, 12), lambda: rng.normal(size=(ROWS, 6)) - 5
  batch = {
    'tokens': rng.integers(0, CONFIG.vocab, size),
    'positions': np.broadcast_to(np.arange(12), size),
    'before': rng.integers(0, 12, (ROWS, 6)),
    'actions': rng.integers(0, CONFIG.vocab, (ROWS, 6)),
    'mask': rng.random((ROWS, 6)) < 0.7,
    'advantages': floats(),
    'old_logprobs': floats(),
    'reference_logprobs': floats(),
  }
  narrow = {np.dtype('int64'): np.int32, np.dtype('float64'): np.float32}
  return {k: x.astype(narrow.get(x.dtype, x.dtype)) for k, x in batch.items()}


def update(apply, unembed, state, arrays):
  """Two microbatches, the vocabulary in two blocks."""
  batch = learn.Batch(**arrays)
  return learn.train_step(
    state,
    batch,
    losses.per_sequence(batch),
    loss_fn=learn.policy_loss(
      apply, unembed, learn.clipped_loss, {}, held=8192
    ),
    optimizer=OPTIMIZER,
    microbatches=2,
  )


def learned(out):
  """In one of two processes, with four devices each."""
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  model = fakes.tiny(CONFIG)
  params = jax.tree.map(np.asarray, model.stacked['params'])
  start = lambda x: learn.init_state(jax.tree.map(jnp.copy, x), OPTIMIZER)
  state = sharding.init_sharded(start, mesh, params)
  arrays = jax.device_put(examples(), sharding.batch_sharding(mesh))
  apply = sharding.by_rows(model.apply, mesh)
  run = jax.jit(functools.partial(update, apply, model.unembed))
  state, metrics = run(state, arrays)
  found = {**trees.flatten(state.params), **metrics}
  np.savez(out, **multihost_utils.process_allgather(found, tiled=True))


def by_two(tmp_path, what, alone):
  """What each of two processes left, and what `alone()` gives meanwhile."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
    'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), *sys.path]),
  }
  places = [tmp_path / str(rank) for rank in range(2)]
  pair = [
    subprocess.Popen(
      [sys.executable, '-c', JOIN, str(rank), address, what, places[rank]],
      env=env,
      stderr=subprocess.PIPE,
    )
    for rank in range(2)
  ]
  try:
    want = alone()
    for process in pair:
      _, said = process.communicate(timeout=300)
      assert process.returncode == 0, said.decode()
  finally:
    for process in pair:
      process.kill()
      process.communicate()
  return [np.load(f'{place}.npz') for place in places], want


@pytest.mark.devices
def test_two_processes_say_what_one_device_says(tmp_path):
  def alone():
    model = fakes.tiny(CONFIG)
    run = jax.jit(functools.partial(talk, model.apply, model.unembed))
    return run(model.unstacked, fakes.scenario(ROWS))

  found, want = by_two(tmp_path, 'speak', alone)
  for got in found:
    np.testing.assert_array_equal(got['tokens'], want['tokens'])
    np.testing.assert_array_equal(got['length'], want['length'])
    np.testing.assert_allclose(got['logprobs'], want['logprobs'], atol=1e-5)


@pytest.mark.devices
def test_two_processes_learn_what_one_device_learns(tmp_path):
  def alone():
    model = fakes.tiny(CONFIG)
    state = learn.init_state(model.stacked['params'], OPTIMIZER)
    run = jax.jit(functools.partial(update, model.apply, model.unembed))
    state, metrics = run(state, jax.tree.map(jnp.asarray, examples()))
    return {**trees.flatten(state.params), **metrics}

  found, want = by_two(tmp_path, 'learned', alone)
  assert want['norm/updates'] > 0.1
  for got in found:
    assert set(got) == set(want)
    for name, leaf in want.items():
      np.testing.assert_allclose(
        got[name], leaf, atol=1e-5, rtol=1e-4, err_msg=name
      )


def test_half_of_the_variables_is_an_error(monkeypatch):
  monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
  with pytest.raises(
    ValueError, match='JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID'
  ):
    processes.join()


def test_alone_there_is_nothing_to_join():
  command = [sys.executable, '-m', 'persona_jax.main', 'train', '--distributed']
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 1
  assert 'nothing says which processes there are' in done.stderr
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
  ('owners', 'want'),
  [
    ([[0], [0]], [(0, 1)]),
    ([[0], [0], [1], [1]], [(0, 2), (1, 2)]),
    ([[0], [1], [0], [1]], [(0, 2), (1, 2)]),  # rows need no order
    ([[0, 1], [0, 1]], [(0, 1), (0, 1)]),  # tensor over processes: same rows
    ([[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ([[0], [0], [1]], [(0, 1), (0, 1)]),  # no equal parts
    ([[0, 1], [1, 2], [2, 0]], [(0, 1)] * 3),  # that overlap
  ],
)
def test_processes_share_the_rows_of_a_batch(owners, want):
  owners = np.array(owners)
  assert [sharding.part(owners, p) for p in range(len(want))] == want


def train(place, model, count, *words, programs=None):
  """The processes of one `persona-jax train`, four devices together."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  several = {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={4 // count}',
    'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
    'JAX_NUM_PROCESSES': str(count),
  }
  words = [
    *('train', '--quiet', '--config=study:tiny', f'--config.model={model}'),
    *(f'--workdir={place}', '--distributed', *words),
  ]
  programs = programs or [('-m', 'persona_jax.main')] * count
  return [
    subprocess.Popen(
      [sys.executable, *programs[rank], *words],
      env=os.environ | several | {'JAX_PROCESS_ID': str(rank)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank in range(count)
  ]


@pytest.mark.devices
@pytest.mark.parametrize('algorithm', ['grpo', 'dpo'])
def test_two_processes_train_as_one_does(config, tmp_path, algorithm):  # noqa: F811
  words = [f'--config.rl.algorithm={algorithm}', '--config.rl.adapter.rank=2']
  logs = []
  for count in (1, 2):
    place = tmp_path / str(count)
    said = []
    for process in train(place, config.model, count, *words):
      out, errors = process.communicate(timeout=600)
      assert process.returncode == 0, errors[-2000:]
      said.append(out)
    assert ['loss' in x for x in said] == [True, False][:count]
    assert (place / 'policies' / 'rl' / 'adapter').is_dir()
    lines = (place / 'policies' / 'rl' / 'metrics.jsonl').read_text()
    logs.append([json.loads(line) for line in lines.splitlines()])
  for one, two in zip(*logs, strict=True):
    assert set(one) == set(two)
    for name in fakes.timeless(one):
      assert two[name] == pytest.approx(one[name], rel=1e-2, abs=1e-4), name


FULL = """
from persona_jax import main, metrics

def full(self, *args):
  raise OSError(28, 'no space left')

metrics.Scribe.write = full
main.run()
"""


@pytest.mark.devices
@pytest.mark.parametrize('which', [0, 1])
def test_an_error_in_one_process_ends_all(config, tmp_path, which):  # noqa: F811
  # One of them alone cannot write; the other waits for it.
  programs = [('-m', 'persona_jax.main')] * 2
  programs[which] = ('-c', FULL)
  children = train(tmp_path, config.model, 2, programs=programs)
  try:
    said = [child.communicate(timeout=120)[1] for child in children]
  finally:
    for child in children:
      child.kill()
  assert [child.returncode for child in children] == [1, 1]
  assert 'persona-jax: [Errno 28] no space left' in said[which]
