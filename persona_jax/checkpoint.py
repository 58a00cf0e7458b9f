"""Train states on disk, through orbax; the newest whole one is restored."""

import contextlib
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from persona_jax import metrics, processes, trees

TERMINATED = 128 + signal.SIGTERM  # the exit status of who was told to end


class Found(NamedTuple):
  """What a checkpoint held."""

  step: int
  state: Any
  record: dict


class Checkpoints:
  """The checkpoints of one run: arrays, and a record that JSON can hold.

  They are written while training goes on, each whole or not at all, with a sum
  of the bits of every array: one that cannot be read, or whose bits have
  changed, is passed over for the one before.
  """

  def __init__(self, folder: Path, *, keep: int = 2, background: bool = True):
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, enable_async_checkpointing=background
    )
    self.folder = folder.absolute()
    self.last = None  # the step that was saved or restored last
    # Compressed, numbers that are noise take 8 times the CPU and no less room.
    handlers = {
      'state': ocp.PyTreeCheckpointHandler(use_compression=False),
      'record': ocp.JsonCheckpointHandler(),
    }
    self._manager = ocp.CheckpointManager(
      self.folder, options=options, item_handlers=handlers
    )

  @property
  def steps(self) -> list[int]:
    """The steps that are on disk, the newest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def save(self, step: int, state: Any, record: dict, sums: Any = None):
    """Writes `state` and `record`; returns when they may change.

    `sums` are `bit_sums` of the state, where they were asked for before.
    """
    sums = bit_sums(state) if sums is None else sums
    sums = {k: int(x) for k, x in jax.device_get(sums).items()}
    if step in self.steps:  # one that could not be read
      self._manager.delete(step)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(state),
        record=ocp.args.JsonSave(metrics.plain({**record, 'sums': sums})),
      ),
      force=True,
    )
    self.last = step

  def restore(self, like: Any) -> Found | None:
    """The newest that can be read, in the shapes and places of `like`.

    None where there is none.

    Raises:
      ValueError: nothing that is there can be read.
    """
    self._manager.wait_until_finished()
    for step in self.steps:
      found, said = None, 'another process cannot read its part'
      try:
        found = self._read(step, like)
      except Exception as error:  # whatever orbax says of a broken file
        said = _said(error)
      if not processes.any_of(found is None):
        self.last = step
        return found
      warnings.warn(
        f'the checkpoint {self.folder / str(step)} cannot be read ({said}); '
        'the one before it is taken.',
        stacklevel=2,
      )
    if not self.steps:
      return None
    raise ValueError(
      f'no checkpoint in {self.folder} can be read, of the steps {self.steps}; '
      'give another --workdir to begin anew.'
    )

  def part(self, step: int, like: Any) -> Any:
    """Those arrays of a step that `like` has, on the host, nothing else read.

    Raises:
      ValueError: they cannot be read, or are not of the shapes of `like`.
    """
    on_host = lambda x: ocp.RestoreArgs(restore_type=np.ndarray)
    args = ocp.args.PyTreeRestore(
      item=like,
      restore_args=jax.tree.map(on_host, like),
      partial_restore=True,
    )
    try:
      return self._checked(step, args).state
    except Exception as error:  # whatever orbax says of a broken file
      others = [x for x in self.steps if x != step]
      raise ValueError(
        f'the checkpoint {self.folder / str(step)} cannot be read '
        f'({_said(error)}); the other steps there are {others}.'
      ) from error

  def close(self):
    """Waits for what is being written."""
    self._manager.wait_until_finished()
    self._manager.close()

  def _read(self, step, like):
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    where = ocp.checkpoint_utils.construct_restore_args(abstract)
    args = ocp.args.PyTreeRestore(item=abstract, restore_args=where)
    return self._checked(step, args)

  def _checked(self, step, args):
    """What `args` ask for of a step, the bits as they were saved."""
    found = self._manager.restore(
      step,
      args=ocp.args.Composite(state=args, record=ocp.args.JsonRestore()),
    )
    record = dict(found.record)
    sums = record.pop('sums')
    _same_shapes(found.state, args.item)
    now = {k: int(x) for k, x in jax.device_get(bit_sums(found.state)).items()}
    differ = [name for name, x in now.items() if sums.get(name) != x]
    if differ:
      raise ValueError(f'the bits of {differ[0]} are not those that were saved')
    return Found(step, found.state, record)


class Guard:
  """Saves the newest state when SIGTERM comes, or a number is not finite.

  The signal may come while the main thread waits for a device, when Python
  runs no handler: a thread of its own waits for it, and ends the process.
  `offer` what may be saved; while it is `changing()` nothing is. Of several
  processes each has a part of the state, so that they save together, where
  they next `heed` that one of them was told to end.
  """

  def __init__(self, saved: Checkpoints):
    self._saved, self._offered = saved, None
    self._lock, self._told = threading.Lock(), False

  def offer(self, state: Any, kept: Callable, *, soon: bool = False):
    """What to save from now on, which may still be on its way.

    `kept()` gives its step and its record, or None where it is of no step; it
    may wait for the devices. `soon` it will be saved, so that they may begin.
    """
    self._offered = state, kept, bit_sums(state) if soon else None

  @contextlib.contextmanager
  def changing(self):
    """While an update may reuse the memory of what was offered."""
    with self._lock:
      self._offered = None
      yield

  def heed(self):
    """Between the parts of a step: the end, if one of several was told to."""
    if jax.process_count() > 1 and processes.any_of(self._told):
      self.save()
      raise SystemExit(TERMINATED)

  def save(self):
    """Writes what was offered, unless it is there."""
    with self._lock:
      self._write()

  def __enter__(self):
    if threading.current_thread() is not threading.main_thread():
      return self  # Python gives signals to the main thread alone
    self._reads, self._writes = os.pipe()
    os.set_blocking(self._writes, False)
    self._before = (
      signal.signal(signal.SIGTERM, lambda *_: None),
      signal.set_wakeup_fd(self._writes),
    )
    threading.Thread(target=self._wait, daemon=True).start()
    return self

  def __exit__(self, kind, *_):
    if kind is not None and issubclass(kind, FloatingPointError):
      self.save()
    with self._lock:
      self._saved.close()
    if not hasattr(self, '_before'):
      return
    handler, wakeup = self._before
    signal.signal(signal.SIGTERM, handler)
    signal.set_wakeup_fd(wakeup)
    os.write(self._writes, _OVER)

  def _wait(self):
    while (told := os.read(self._reads, 1)) != _OVER:
      if told and told[0] == signal.SIGTERM:
        self._told = True
        if jax.process_count() > 1:
          continue
        with self._lock:
          try:
            self._write()
            self._saved.close()
          except BaseException as error:  # nobody else would tell of it
            traceback.print_exception(error)
          finally:
            os._exit(TERMINATED)
    os.close(self._reads)
    os.close(self._writes)

  def _write(self):
    if self._offered is None:
      return
    state, kept, sums = self._offered
    found = kept()
    if found is not None and found[0] != self._saved.last:
      self._saved.save(found[0], state, found[1], sums)


def _said(error):
  return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


def _same_shapes(state, like):
  """Raises a ValueError where orbax left something out or took it as it was."""
  wanted = trees.flatten(like)
  for name, x in trees.flatten(state).items():
    if isinstance(x, jax.ShapeDtypeStruct) or x.shape != wanted[name].shape:
      raise ValueError(f'{name} {wanted[name].shape} is not in it')


@jax.jit
def bit_sums(tree: Any) -> dict[str, jax.Array]:
  """The sum of the bits of each array, modulo 2^32, by name."""
  return {name: _sum(x) for name, x in trees.flatten(tree).items()}


def _sum(x):
  kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  if x.dtype == jnp.bool:
    bits = x.astype(kind)
  else:
    bits = jax.lax.bitcast_convert_type(x, kind)
  return jnp.sum(bits, dtype=jnp.uint32)


_OVER = b'\0'
