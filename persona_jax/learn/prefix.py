"""Texts that begin alike, the beginning read once for all of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def shared(
  apply: Callable, memory: Callable, *, group: int, room: int
) -> Callable:
  """`apply(variables, tokens, positions)` that reads a group's start once.

  Each `group` rows, one after the other, are one group; what their tokens have
  in common at the start, at most `room` tokens, is read for one of them, and
  the rest after it, from its keys and values. Hidden states and gradients are
  those of `apply`, rounding apart. One text a row, from slot 0 on.

  A row with more than S - `room` tokens after that start does not fit: all its
  hidden states are NaN.

  Args:
    apply: of a model with stacked layers.
    memory: `(rows, size) -> Cache`, empty, its keys not blocked.
    group: rows that begin alike.
    room: slots of the start.
  """

  def apply_shared(variables, tokens, positions, cache=None, **keywords):
    if cache is not None or keywords:
      raise ValueError('a shared start is read without a cache or keywords.')
    size = tokens.shape[1]
    length = jnp.max(positions, axis=1) + 1
    start = jnp.repeat(_alike(tokens, positions, group, room), group)
    first = jnp.where(
      jnp.arange(room)[None] < start[::group, None],
      positions[::group, :room],
      -1,
    )
    before, read = apply(
      variables, tokens[::group, :room], first, memory(first.shape[0], room)
    )
    slot = start[:, None] + jnp.arange(size - room)[None]
    take = lambda x: jnp.take_along_axis(x, jnp.minimum(slot, size - 1), axis=1)
    after, _ = apply(
      variables,
      take(tokens),
      jnp.where(slot < length[:, None], take(positions), -1),
      jax.tree.map(lambda x: _spread(x, group, size), read),
    )
    slot = jnp.arange(size)[None]
    own = slot < start[:, None]
    pick = jnp.where(own, slot, room + slot - start[:, None])
    both = jnp.concatenate([jnp.repeat(before, group, axis=0), after], axis=1)
    hidden = jnp.take_along_axis(
      both, jnp.minimum(pick, size - 1)[..., None], axis=1
    )
    fits = length - start <= size - room
    return jnp.where(fits[:, None, None], hidden, jnp.nan), None

  return apply_shared


def _alike(
  tokens: Int[Array, 'B S'], positions: Int[Array, 'B S'], group: int, room: int
) -> Int[Array, ' G']:
  """How many tokens the rows of each group have in common at the start."""
  apart = lambda x: x[:, :room].reshape(-1, group, room)
  tokens, positions = apart(tokens), apart(positions)
  same = (tokens == tokens[:, :1]) & (positions == positions[:, :1])
  same = jnp.all(same & (positions >= 0), axis=1)
  return jnp.sum(jnp.cumprod(same, axis=1, dtype=jnp.int32), axis=1)


def _spread(x, group, size):
  """Keys or values `[L B H S E]` for every row of a group, with more slots."""
  more = [(0, 0)] * x.ndim
  more[-2] = (0, max(size - x.shape[-2], 0))
  return jnp.pad(jnp.repeat(x, group, axis=1), more)
