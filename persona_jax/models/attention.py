"""Attention as functions of arrays: who sees whom, and what is heard."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from persona_jax.models.cache import Cache


def softcap(x, cap: float | None):
  """cap tanh(x / cap): x within (-cap, cap); None leaves it alone."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def mask(
  positions: Int[Array, 'B T'], cache: Cache | None, window: int | None = None
) -> Bool[Array, 'B T S']:
  """A token sees the slots before it and itself, never padding.

  With a window it sees the last `window` positions, its own included.
  """
  slots = positions if cache is None else cache.positions
  start = 0 if cache is None else cache.end - positions.shape[1]
  query = start + jnp.arange(positions.shape[1])
  causal = jnp.arange(slots.shape[1])[None] <= query[:, None]
  mask = causal[None] & (slots >= 0)[:, None]
  if window is not None:
    mask &= positions[:, :, None] - slots[:, None] < window
  return mask


def weights(
  queries: Float[Array, 'B T H E'],
  keys: Float[Array, 'B K S E'],
  mask: Bool[Array, 'B T S'],
  *,
  scale: float,
  cap: float | None = None,
) -> Float[Array, 'B K G T S']:
  """Softmax in float32; a row that sees nothing attends evenly.

  The G queries of a key head and the T tokens are one axis of the product:
  XLA's CPU backend is five times slower when they are two.
  """
  batch, length, heads, size = queries.shape
  kv_heads, slots = keys.shape[1:3]
  grouped = queries.reshape(batch, length, kv_heads, heads // kv_heads, size)
  grouped = jnp.transpose(grouped, (0, 2, 3, 1, 4)) * scale
  scores = jnp.einsum(
    'bkne,bkse->bkns',
    grouped.reshape(batch, kv_heads, -1, size),
    keys.astype(queries.dtype),
    preferred_element_type=jnp.float32,
  ).reshape(batch, kv_heads, -1, length, slots)
  scores = jnp.where(mask[:, None, None], softcap(scores, cap), _NEVER)
  return jax.nn.softmax(scores, axis=-1).astype(queries.dtype)


def mix(
  weights: Float[Array, 'B K G T S'], values: Float[Array, 'B K S E']
) -> Float[Array, 'B T HE']:
  """The weighted values of all heads, side by side."""
  batch, kv_heads, group, length, slots = weights.shape
  flat = weights.reshape(batch, kv_heads, group * length, slots)
  mixed = jnp.einsum('bkns,bkse->bkne', flat, values)
  mixed = mixed.reshape(batch, kv_heads, group, length, -1)
  return jnp.transpose(mixed, (0, 3, 1, 2, 4)).reshape(batch, length, -1)


def write(
  memory: Float[Array, 'B H S E'], new: Float[Array, 'B H T E'], start
) -> Float[Array, 'B H S E']:
  """`memory` with `new` in its slots from `start` on."""
  zero = jnp.zeros((), start.dtype)
  return jax.lax.dynamic_update_slice(
    memory, new.astype(memory.dtype), (zero, zero, start, zero)
  )


_NEVER = -1e30  # finite, so that a row of padding stays finite
