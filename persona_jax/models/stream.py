"""Weights from files to their places, a block of rows at a time.

A place is allocated once, on its device, and each block is copied into it and
forgotten: the host never holds more than a block beside what is its own.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax import trees
from persona_jax.models import names
from persona_jax.models.checkpoint import Checkpoint, CheckpointError, listed

BLOCK = 8 * 2**20  # bytes read at a time, as float32


def shardings(config, dtype, mesh, rules):
  """The tree of shardings, or None without a mesh."""
  if mesh is None:
    return None
  tree = names.nested(
    {
      name: jax.ShapeDtypeStruct(shape, dtype)
      for name, shape in names.shapes(config).items()
    }
  )
  return trees.shardings({'params': tree}, mesh, rules)['params']


def parameters(opened: Checkpoint, dtype: Any, places=None) -> dict[str, Any]:
  """The nested parameters, layers stacked.

  Args:
    opened: a checkpoint; all its tensors are checked before any is read.
    dtype: of the parameters.
    places: a tree of shardings, or None: all on the default device.

  Raises:
    CheckpointError: tensors that do not fit, or that hold NaN or infinity.
  """
  config = opened.config
  names.check(opened.shapes, config, opened.names, opened.where)
  _check_copy(opened)
  by_leaf = {}
  for piece in names.pieces(config, opened.names):
    by_leaf.setdefault(piece.ours, []).append(piece)
  leaves, bad = {}, []
  for name, shape in names.shapes(config).items():
    place = None if places is None else names.leaf(places, name)
    leaves[name], worst = _leaf(opened, by_leaf[name], shape, dtype, place)
    bad += worst
  if bad:
    raise CheckpointError(
      f'{opened.where}: {len(bad)} tensor(s) hold NaN or infinity: '
      f'{listed(bad, ", ")}. Fetch the weights again.'
    )
  return names.nested(leaves)


def _check_copy(opened):
  """A tied model may carry its embedding twice, but not two matrices."""
  if not opened.config.tied or names.UNEMBED not in opened.shapes:
    return
  embed = opened.read(opened.names['embed/embedding'])
  copy = opened.read(names.UNEMBED)
  rows, width = names.shapes(opened.config)['embed/embedding']
  step = max(1, BLOCK // (4 * width))
  same = opened.shapes[names.UNEMBED] == (rows, width) and all(
    np.array_equal(embed[i : i + step], copy[i : i + step])
    for i in range(0, rows, step)
  )
  if not same:
    raise CheckpointError(
      f'{opened.where}: tie_word_embeddings is true, but {names.UNEMBED} is '
      'another matrix than the embedding; set it to false in config.json.'
    )


def _leaf(opened, pieces, shape, dtype, place):
  """One parameter in its place, and the names of tensors not finite."""
  if place is None:  # on the default device, and free to go elsewhere
    whole = tuple((0, size) for size in shape)
    (leaf,), bad = _filled(opened, pieces, whole, dtype, [None])
    return leaf, bad
  by_index = {}
  for device, index in place.addressable_devices_indices_map(shape).items():
    by_index.setdefault(_bounds(index, shape), []).append(device)
  parts, bad = [], []
  for bounds, devices in by_index.items():
    some, worse = _filled(opened, pieces, bounds, dtype, devices)
    parts += some
    bad += worse
  leaf = jax.make_array_from_single_device_arrays(shape, place, parts)
  return leaf, list(dict.fromkeys(bad))


def _filled(opened, pieces, bounds, dtype, devices):
  """A shard on each device, and the names of tensors not finite."""
  size = tuple(stop - start for start, stop in bounds)
  buffers = [jnp.zeros(size, dtype, device=device) for device in devices]
  flags = []
  for piece in pieces:
    for start, read in _blocks(opened, piece, bounds):
      block = np.asarray(read())
      jax.block_until_ready(buffers)  # or blocks queue up on the host
      for i, device in enumerate(devices):
        here = block if device is None else jax.device_put(block, device)
        buffers[i], finite = _copy(buffers[i], here, start)
        flags.append((piece.theirs, finite))
  bad = dict.fromkeys(name for name, finite in flags if not finite)
  return buffers, list(bad)


def _bounds(index, shape):
  return tuple(
    slice_.indices(size)[:2] for slice_, size in zip(index, shape, strict=True)
  )


def _blocks(opened, piece, bounds):
  """(start in the shard, function that reads) of a piece's part of a shard."""
  outer, inner = bounds[: len(piece.index)], bounds[len(piece.index) :]
  if not all(
    lo <= i < hi for i, (lo, hi) in zip(piece.index, outer, strict=True)
  ):
    return
  at = tuple(i - lo for i, (lo, _) in zip(piece.index, outer, strict=True))
  (first, last), rest = inner[0], inner[1:]
  columns = tuple(slice(lo, hi) for lo, hi in rest)
  width = 4 * math.prod(hi - lo for lo, hi in rest)
  step = max(1, BLOCK // max(1, width))
  tensor = opened.read(piece.theirs)
  for row in range(first, last, step):
    rows = slice(
      piece.rows.start + row, piece.rows.start + min(row + step, last)
    )
    start = (*at, row - first, *(0 for _ in rest))
    yield start, lambda rows=rows: tensor[(rows, *columns)]


@functools.partial(jax.jit, donate_argnums=0)
def _copy(buffer, block, start):
  """`buffer` with `block` at `start`, and whether all of it is finite."""
  finite = jnp.all(jnp.isfinite(block))
  lead = buffer.ndim - block.ndim
  block = block.astype(buffer.dtype).reshape((1,) * lead + block.shape)
  return jax.lax.dynamic_update_slice(buffer, block, start), finite
