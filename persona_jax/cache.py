"""The key-value cache: slot s of a row holds its token at position s."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, PyTree

BLOCK = 64  # slots of a block; XLA's CPU products are fastest on such


@struct.dataclass
class Cache:
  """Keys and values of S slots a row.

  A token is written at the slot of its position, and sees the slots up to its
  own: rows of any length lie side by side without holes, padding (position
  -1) is written nowhere, and a row is begun anew by counting from 0 again.
  What lies beyond a row's last token is never seen.

  Values are `[B H S E]`, keys too or, blocked, `[B H S/64 E 64]`; by layer a
  tuple, or `[L ...]`, to match unstacked or stacked parameters.

  With `rows` a model reads on some rows alone: W of each of R equal groups of
  rows, counted in their group. What one beyond the last reads is written
  nowhere.
  """

  keys: PyTree
  values: PyTree
  rows: Int[Array, 'R W'] | None = None

  @property
  def size(self) -> int:
    """The number of slots."""
    return jax.tree.leaves(self.values)[0].shape[-2]


def write(
  keys: Float[Array, 'B H *R'],
  values: Float[Array, 'B H S E'],
  new_keys: Float[Array, 'C T H E'],
  new_values: Float[Array, 'C T H E'],
  positions: Int[Array, 'C T'],
  rows: Int[Array, 'R W'] | None = None,
) -> tuple[Float[Array, 'B H *R'], Float[Array, 'B H S E']]:
  """One layer's memory with T more tokens a row; position -1 is dropped."""
  slots = jnp.where(positions < 0, values.shape[2], positions)
  if rows is None:
    return _write(keys, values, new_keys, new_values, slots)
  apart = lambda x: grouped(x, rows.shape[0])
  written = jax.vmap(_write)(
    *map(apart, (keys, values, new_keys, new_values, slots)), rows
  )
  return written[0].reshape(keys.shape), written[1].reshape(values.shape)


def _write(keys, values, new_keys, new_values, slots, rows=None):
  if rows is None:
    rows = jnp.arange(slots.shape[0])
  rows = jnp.broadcast_to(rows[:, None], slots.shape)
  new_keys = _cast(new_keys, keys.dtype)
  if keys.ndim == values.ndim:
    keys = keys.at[rows, :, slots].set(new_keys, mode='drop')
  else:
    block, within = slots // BLOCK, slots % BLOCK
    keys = keys.at[rows, :, block, :, within].set(new_keys, mode='drop')
  new_values = _cast(new_values, values.dtype)
  return keys, values.at[rows, :, slots].set(new_values, mode='drop')


def _cast(x, dtype):
  """`x` as `dtype`; a float8 ends at its largest number, not with NaN."""
  if jnp.finfo(dtype).bits == 8:
    limit = float(jnp.finfo(dtype).max)
    x = jnp.clip(x, -limit, limit)
  return x.astype(dtype)


def pick(tree: PyTree, rows: Int[Array, 'R W'] | None, *at) -> PyTree:
  """The rows of each group, `[R x W ...]`, or a part; all of them for None."""
  if rows is None:
    return tree

  def pick(x):
    take = jax.vmap(lambda x, rows: x.at[rows, *at].get(mode='clip'))
    picked = take(grouped(x, rows.shape[0]), rows)
    return picked.reshape(rows.size, *picked.shape[2:])

  return jax.tree.map(pick, tree)


def put(tree: PyTree, rows: Int[Array, 'R W'], new: PyTree, *at) -> PyTree:
  """`tree` with some rows of each group replaced; beyond the last: dropped."""
  place = jax.vmap(lambda x, rows, new: x.at[rows, *at].set(new, mode='drop'))

  def put(x, new):
    new = grouped(new.astype(x.dtype), rows.shape[0])
    return place(grouped(x, rows.shape[0]), rows, new).reshape(x.shape)

  return jax.tree.map(put, tree, new)


class Move(NamedTuple):
  """What rows of a cache become: rows of any of some caches."""

  rows: Int[Array, 'R W']  # those that change; beyond the last: none
  cache: Int[Array, 'R W']  # the number of the cache to copy from
  source: Int[Array, 'R W']  # and its row


def move(
  caches: Sequence[Cache], moves: Sequence[Move], used: Int[Array, '']
) -> list[Cache]:
  """`caches`, each after its own move of the slots before `used`.

  All moves begin at once: rows may change places. A block is picked after the
  one before was put, or XLA would keep a copy of whole caches to pick from.
  """
  trees = [in_blocks((x.keys, x.values)) for x in caches]
  rows = jax.tree.leaves(trees)[0].shape[0]
  some = [jnp.any(x.rows < rows // x.rows.shape[0]) for x in moves]
  used = jnp.where(jnp.any(jnp.stack(some)), used, 0)

  def pick_block(trees, block):
    def chosen(move, *arrays):
      *others, new = [pick(x, move.source, slice(None), block) for x in arrays]
      for i, other in enumerate(others):
        where = (move.cache == i).reshape(-1, 1, 1, 1)
        new = jnp.where(where, other, new)
      return new

    return [
      jax.tree.map(functools.partial(chosen, move), *trees) for move in moves
    ]

  def body(state):
    block, picked, trees = state
    trees = [
      put(tree, move.rows, new, slice(None), block)
      for tree, move, new in zip(trees, moves, picked, strict=True)
    ]
    return block + 1, pick_block(trees, block + 1), trees

  state = (jnp.zeros((), jnp.int32), pick_block(trees, 0), trees)
  _, _, trees = jax.lax.while_loop(lambda x: x[0] * BLOCK < used, body, state)
  moved = []
  for cache, tree in zip(caches, trees, strict=True):
    keys, values = jax.tree.map(
      lambda old, new: new.reshape(old.shape), (cache.keys, cache.values), tree
    )
    moved.append(cache.replace(keys=keys, values=values))
  return moved


def in_blocks(tree: PyTree) -> PyTree:
  """`[B H S/64 E 64]` as it is, `[B H S E]` as `[B H S/64 64 E]`."""

  def split(x):
    if x.ndim == 5:
      return x
    return x.reshape(*x.shape[:2], -1, BLOCK, x.shape[3])

  return jax.tree.map(split, tree)


def grouped(x: Array, groups: int) -> Array:
  """`[B ...]` as `[R B/R ...]`."""
  return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])
