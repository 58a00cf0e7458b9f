"""What the processes of one run share: arrays, words and decisions.

All of them run the same program in the same order; the first one writes.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from persona_jax.shapes import PyTree

_NAMES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def join():
  """Joins the other processes of the run; before anything else of JAX.

  Who they are is read from the environment (`JAX_COORDINATOR_ADDRESS`,
  `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`), or is what Slurm, Cloud TPU or
  Kubernetes say.

  Raises:
    ValueError: nothing says who they are, or some of the variables are unset.
  """
  given = {name: os.environ.get(name) for name in _NAMES}
  if any(given.values()) and not all(given.values()):
    unset = ', '.join(name for name, value in given.items() if not value)
    raise ValueError(f'--distributed: {unset} is unset; set all of {_NAMES}.')
  address, *numbers = given.values()
  count, index = (int(x) if x else None for x in numbers)
  # SIGTERM is ours: what waits for it (`checkpoint.Guard`) also saves.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(address, count, index)
  except ValueError as error:
    raise ValueError(
      f'--distributed: nothing says which processes there are ({error}) '
      f'Start it by one of launch/, or set {", ".join(_NAMES)}.'
    ) from error


@contextlib.contextmanager
def joined(tell: Callable[[Exception], None], *, when: bool = True):
  """While it lasts this process is one of several; see `join`.

  An error is told of and ends the process at once: at a usual exit JAX waits
  for the others, which may be waiting for this one. With `when` False nothing
  happens here.
  """
  if not when:
    yield
    return
  join()
  try:
    yield
  except Exception as error:
    tell(error)
    sys.stderr.flush()
    os._exit(1)


def first() -> bool:
  """Whether this is the process that writes what is written once."""
  return jax.process_index() == 0


def here(tree: PyTree) -> PyTree:
  """`tree`, whole in every process; what was lies as it lay."""

  def whole(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return jnp.asarray(multihost_utils.process_allgather(x, tiled=True))
    return x

  return jax.tree.map(whole, tree)


def told(make: Callable[[], Any]) -> Any:
  """`make()` of the first process, as JSON has it, in all of them.

  Raises:
    ValueError: `make` raised that or an OSError in the first process.
  """
  if jax.process_count() == 1:
    return make()
  said, failed = b'', False
  if first():
    try:
      said = json.dumps(make()).encode()
    except (ValueError, OSError) as error:
      said, failed = str(error).encode(), True
  size, failed = _from_first(np.array([len(said), failed]))
  text = np.zeros(size, np.uint8)
  text[: len(said)] = np.frombuffer(said, np.uint8)
  said = _from_first(text).tobytes().decode()
  if failed:
    raise ValueError(said)
  return json.loads(said)


def any_of(flag: bool) -> bool:
  """Whether `flag` holds in some process."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _from_first(x):
  return np.asarray(multihost_utils.broadcast_one_to_all(x))
