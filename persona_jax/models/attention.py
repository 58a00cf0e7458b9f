"""Attention as functions of arrays: who sees whom, and what is heard."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from persona_jax.cache import Cache


def softcap(x, cap: float | None):
  """cap tanh(x / cap): x within (-cap, cap); None leaves it alone."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def mask(
  positions: Int[Array, 'B T'], cache: Cache | None, window: int | None = None
) -> Bool[Array, 'B T S']:
  """A token sees the slots before it and itself, never padding.

  With a window it sees the last `window` positions, its own included.
  """
  if cache is None:
    slots = positions[:, None]
    mask = jnp.tri(positions.shape[1], dtype=bool)[None] & (slots >= 0)
  else:
    slots = jnp.arange(cache.size)[None, None]
    mask = slots <= positions[:, :, None]
  if window is not None:
    mask &= positions[:, :, None] - slots < window
  return mask


def weights(
  queries: Float[Array, 'B T H E'],
  keys: Float[Array, 'B K *R'],
  mask: Bool[Array, 'B T S'],
  *,
  scale: float,
  cap: float | None = None,
) -> Float[Array, 'B K G T S']:
  """Softmax in float32; a row that sees nothing attends evenly.

  Keys are `[B K S E]`, or blocked (`models.cache`). The G queries of a key
  head and the T tokens are one axis of the product: XLA's CPU backend is five
  times slower when they are two.
  """
  batch, length, heads, size = queries.shape
  kv_heads = keys.shape[1]
  grouped = queries.reshape(batch, length, kv_heads, heads // kv_heads, size)
  grouped = jnp.transpose(grouped, (0, 2, 3, 1, 4)) * scale
  scores = _products(
    grouped.reshape(batch, kv_heads, -1, size), keys.astype(queries.dtype)
  ).reshape(batch, kv_heads, -1, length, mask.shape[2])
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


def _products(queries, keys):
  """`[B K N S]` in float32."""
  if keys.ndim == 4:
    return jnp.einsum(
      'bkne,bkse->bkns', queries, keys, preferred_element_type=jnp.float32
    )
  batch, heads, blocks, size, slots = keys.shape
  count = queries.shape[2]
  # A product a block: with one product for all, it is five times slower.
  shape = (batch, heads, blocks, count, size)
  queries = jax.lax.optimization_barrier(queries)
  scores = jnp.einsum(
    'bkjne,bkjes->bkjns',
    jnp.broadcast_to(queries[:, :, None], shape),
    keys,
    preferred_element_type=jnp.float32,
  )
  scores = jnp.swapaxes(scores, 2, 3)
  return scores.reshape(batch, heads, count, blocks * slots)


_NEVER = -1e30  # finite, so that a row of padding stays finite
