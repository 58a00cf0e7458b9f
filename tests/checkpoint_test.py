"""Checkpoints: whole or passed over, and a run that goes on where it was."""

import gc
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax.checkpoint import TERMINATED, Checkpoints, Guard
from persona_jax.learn import sharding

# Of what it was reading when a file broke, orbax leaves tasks that end unheard.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


@pytest.fixture(autouse=True)
def nothing_is_left():
  yield
  gc.collect()  # here, and not in another test


def state(seed):
  """Arrays of several kinds."""
  keys = jax.random.split(jax.random.key(seed), 2)
  return {
    'params': {'kernel': jax.random.normal(keys[0], (64, 48))},
    'narrow': jax.random.normal(keys[1], (33,)).astype(jnp.bfloat16),
    'step': jnp.asarray(seed, jnp.int32),
    'flags': jnp.arange(5) % 2 == 0,
    'none': None,
  }


@pytest.fixture
def written(tmp_path):
  """Two checkpoints on disk."""
  saved = Checkpoints(tmp_path)
  for step in (1, 2):
    saved.save(step, state(step), {'log': [{'loss': step / 3}] * step})
  saved.close()
  return tmp_path


def test_the_newest_comes_back_as_it_was(written):
  found = Checkpoints(written).restore(state(0))
  assert found.step == 2 and found.record == {'log': [{'loss': 2 / 3}] * 2}
  chex.assert_trees_all_equal(found.state, state(2))
  assert found.state['narrow'].dtype == jnp.bfloat16


def test_nothing_is_there_at_first(tmp_path):
  assert Checkpoints(tmp_path).restore(state(0)) is None


def test_older_ones_go(tmp_path):
  saved = Checkpoints(tmp_path, keep=2)
  for step in (1, 2, 3):
    saved.save(step, state(step), {})
  saved.close()
  assert Checkpoints(tmp_path).steps == [3, 2]


def test_what_is_given_away_while_it_is_written_is_whole(tmp_path):
  # An update reuses the memory of the state that is still being written.
  update = jax.jit(lambda x: jax.tree.map(lambda x: x + 1, x), donate_argnums=0)
  start = {'x': jnp.arange(1 << 22, dtype=jnp.float32)}
  saved = Checkpoints(tmp_path)
  now = jax.tree.map(jnp.copy, start)
  saved.save(1, now, {})
  for _ in range(5):
    now = update(now)
  jax.block_until_ready(now)
  saved.close()
  found = Checkpoints(tmp_path).restore(start)
  chex.assert_trees_all_equal(found.state, start)


def files(folder):
  """The files with arrays, the largest first."""
  found = [x for x in folder.rglob('*') if x.is_file() and '/d/' in str(x)]
  return sorted(found, key=lambda x: -x.stat().st_size)


def spoil(folder, how):
  if how == 'cut':
    for file in files(folder):
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  elif how == 'flipped':
    [file, *_] = files(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)
  elif how == 'record':
    [file] = [x for x in folder.rglob('*') if x.parent.name == 'record'][:1]
    file.write_text('{"log": [')
  else:
    for file in files(folder):
      file.unlink()


@pytest.mark.parametrize('how', ['cut', 'flipped', 'record', 'gone'])
def test_a_broken_one_is_passed_over_with_its_name(written, how):
  spoil(written / '2', how)
  with pytest.warns(UserWarning, match=f'{written}/2 cannot be read'):
    found = Checkpoints(written).restore(state(0))
  assert found.step == 1
  chex.assert_trees_all_equal(found.state, state(1))


def test_where_all_are_broken_nothing_begins_anew(written):
  for step in '12':
    spoil(written / step, 'gone')
  with pytest.warns(UserWarning), pytest.raises(ValueError, match='of the st'):
    Checkpoints(written).restore(state(0))


def test_changed_bits_are_seen_where_the_file_is_sound(written, monkeypatch):
  # As if the disk had given back something else without an error.
  other = Checkpoints(written)
  read = other._manager.restore

  def changed(step, args):
    found = read(step, args=args)
    if step == 2:
      kernel = found.state['params']['kernel']
      found.state['params']['kernel'] = kernel.at[3, 4].add(1e-3)
    return found

  monkeypatch.setattr(other._manager, 'restore', changed)
  with pytest.warns(UserWarning, match='bits of params/kernel'):
    assert other.restore(state(0)).step == 1


def test_one_that_was_not_finished_is_none(written):
  half = written / '3.orbax-checkpoint-tmp'
  half.mkdir()
  (half / 'state').mkdir()
  assert Checkpoints(written).restore(state(0)).step == 2


def test_a_guard_saves_what_is_offered_once(tmp_path):
  saved = Checkpoints(tmp_path)
  with Guard(saved) as guard:
    guard.save()
    assert saved.steps == []
    guard.offer(state(4), lambda: (4, {'log': []}))
    guard.save()
    guard.save()
  saved.close()
  assert Checkpoints(tmp_path).steps == [4]


def test_the_handler_of_before_is_put_back(tmp_path):
  before = signal.getsignal(signal.SIGTERM)
  with Guard(Checkpoints(tmp_path)):
    assert signal.getsignal(signal.SIGTERM) is not before
  assert signal.getsignal(signal.SIGTERM) is before


SLEEPS = """
import sys, time, jax, jax.numpy as jnp
from pathlib import Path
from persona_jax.checkpoint import Checkpoints, Guard
slow = jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, lambda i, x: x + i, x))
with Guard(Checkpoints(Path(sys.argv[1]))) as guard:
  guard.offer({'x': jnp.arange(3.0)}, lambda: (7, {'log': []}))
  print('ready', flush=True)
  slow(jnp.zeros(2000)).block_until_ready()  # Python runs no handler here
"""


def test_sigterm_saves_while_a_device_is_busy(tmp_path):
  command = [sys.executable, '-c', SLEEPS, tmp_path]
  with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
    assert child.stdout.readline() == b'ready\n'
    time.sleep(0.5)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=30) == TERMINATED
  found = Checkpoints(tmp_path).restore({'x': jnp.zeros(3)})
  assert found.step == 7
  np.testing.assert_array_equal(found.state['x'], [0, 1, 2])


def test_what_is_of_no_step_is_not_saved(tmp_path):
  saved = Checkpoints(tmp_path)
  with Guard(saved) as guard:
    guard.offer(state(3), lambda: None)
    guard.save()
  assert Checkpoints(tmp_path).steps == []


@pytest.mark.parametrize('soon', [False, True])
def test_what_is_saved_soon_is_whole(tmp_path, soon):
  saved = Checkpoints(tmp_path)
  with Guard(saved) as guard:
    guard.offer(state(3), lambda: (3, {}), soon=soon)
    guard.save()
  chex.assert_trees_all_equal(
    Checkpoints(tmp_path).restore(state(0)).state, state(3)
  )


def test_a_broken_one_is_written_again(written):
  spoil(written / '2', 'cut')
  saved = Checkpoints(written)
  with pytest.warns(UserWarning, match='cannot be read'):
    assert saved.restore(state(0)).step == 1
  saved.save(2, state(5), {'log': []})
  saved.close()
  found = Checkpoints(written).restore(state(0))
  assert found.step == 2
  chex.assert_trees_all_equal(found.state, state(5))


def test_what_is_not_finite_leaves_the_state_of_before(tmp_path):
  saved = Checkpoints(tmp_path)
  with pytest.raises(FloatingPointError), Guard(saved) as guard:
    guard.offer(state(3), lambda: (3, {}))
    raise FloatingPointError
  assert Checkpoints(tmp_path).steps == [3]


def test_while_it_changes_nothing_is_saved(tmp_path):
  saved = Checkpoints(tmp_path)
  with pytest.raises(FloatingPointError), Guard(saved) as guard:
    guard.offer(state(3), lambda: (3, {}))
    with guard.changing():  # its memory may be used again
      raise FloatingPointError
  assert Checkpoints(tmp_path).steps == []


@pytest.mark.devices
def test_a_checkpoint_comes_back_on_another_mesh(tmp_path):
  def spread(seed, shape):
    mesh = sharding.make_mesh(shape)
    leaves = state(seed)
    kernel = jnp.stack([leaves['params']['kernel']] * 2)
    params = {'layers': {'attn': {'o': {'kernel': kernel}}}}
    params['narrow'] = leaves['narrow']
    return sharding.init_sharded(lambda x: x, mesh, params)

  saved = Checkpoints(tmp_path)
  saved.save(1, spread(1, {'fsdp': 8}), {})
  saved.close()
  like = spread(0, {'data': 2, 'fsdp': 2, 'tensor': 2})
  found = Checkpoints(tmp_path).restore(like)
  chex.assert_trees_all_equal(found.state, spread(1, {'fsdp': 8}))
  place = lambda x: x.sharding
  assert jax.tree.map(place, found.state) == jax.tree.map(place, like)
