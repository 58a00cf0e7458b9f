"""Attention as functions of arrays: who sees whom, and what is heard."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from persona_jax import cache as caches
from persona_jax.cache import Cache


def softcap(x, cap: float | None):
  """cap tanh(x / cap): x within (-cap, cap); None leaves it alone."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def mask(
  positions: Int[Array, 'B T'], cache: Cache | None, window: int | None = None
) -> Bool[Array, 'B T S']:
  """A token sees the slots before it and itself, never padding.

  Without a cache a row may hold several texts (`segments`), none of which sees
  another. With a window a token sees the last `window` positions, its own
  included.
  """
  if cache is None:
    slots, text = positions[:, None], segments(positions)
    mask = jnp.tri(positions.shape[1], dtype=bool)[None] & (slots >= 0)
    mask &= text[:, :, None] == text[:, None]
  else:
    slots = jnp.arange(cache.size)[None, None]
    mask = slots <= positions[:, :, None]
  if window is not None:
    mask &= positions[:, :, None] - slots < window
  return mask


def segments(positions: Int[Array, 'B T']) -> Int[Array, 'B T']:
  """Which text of its row a token belongs to: a position of 0 begins one."""
  return jnp.cumsum(positions == 0, axis=1, dtype=jnp.int32)


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


def blocks(
  queries: Float[Array, 'C T H E'],
  keys: Float[Array, 'B K *R'],
  values: Float[Array, 'B K S E'],
  positions: Int[Array, 'C T'],
  rows: Int[Array, 'R W'] | None = None,
  *,
  scale: float,
  cap: float | None = None,
  window: Int[Array, ''] | None = None,
) -> Float[Array, 'C T HE']:
  """As `weights` and `mix`, one block of slots at a time, those in use alone.

  The softmax is summed up on the way (Milakov and Gimelshein, 2018): no weights
  are left to tap, and the time goes with the slots in use, not with all.
  """
  count, length, heads, size = queries.shape
  kv_heads = keys.shape[1]
  group = heads // kv_heads
  if rows is None:
    rows = jnp.arange(count)[None]
  grouped = queries.reshape(count, length, kv_heads, group, size)
  grouped = jnp.transpose(grouped, (0, 2, 3, 1, 4)) * scale
  grouped = grouped.reshape(count, kv_heads, group * length, size)
  place = jnp.tile(positions, (1, group))[:, None, :, None]
  sums = 'bkne,bkes->bkns' if keys.ndim == 5 else 'bkne,bkse->bkns'
  memory = caches.in_blocks((keys, values))

  def add(block, state):
    most, total, heard = state
    keys, values = caches.pick(memory, rows, slice(None), block)
    scores = jnp.einsum(
      sums, grouped, keys.astype(queries.dtype), preferred_element_type=_WIDE
    )
    slots = block * caches.BLOCK + jnp.arange(caches.BLOCK)[None, None, None]
    seen = slots <= place
    if window is not None:
      seen &= place - slots < window
    scores = jnp.where(seen, softcap(scores, cap), _NEVER)
    top = jnp.maximum(most, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - top[..., None])
    fade = jnp.exp(most - top)
    mixed = jnp.einsum(
      'bkns,bkse->bkne',
      weights.astype(queries.dtype),
      values.astype(queries.dtype),
      preferred_element_type=_WIDE,
    )
    total = total * fade + jnp.sum(weights, axis=-1)
    return top, total, heard * fade[..., None] + mixed

  def turn(state, block):
    # A loop of as many turns as are needed would have no gradient.
    skip = lambda block, state: state
    return jax.lax.cond(block < used, add, skip, block, state), None

  used = jnp.max(positions) // caches.BLOCK + 1
  none = jnp.zeros(grouped.shape[:3], _WIDE)
  state = (none + _NEVER, none, jnp.zeros(grouped.shape, _WIDE))
  turns = jnp.arange(-(-values.shape[2] // caches.BLOCK))
  (_, total, heard), _ = jax.lax.scan(turn, state, turns)
  mixed = heard / jnp.where(total > 0, total, 1)[..., None]
  mixed = mixed.reshape(count, kv_heads, group, length, size)
  mixed = jnp.transpose(mixed, (0, 3, 1, 2, 4)).astype(queries.dtype)
  return mixed.reshape(count, length, -1)


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


class Kernels(NamedTuple):
  """How attention is computed; None: by `weights` and `mix`.

  A kernel takes `(queries, keys, values, positions, rows, *, scale, cap,
  window)` as `blocks` does, and leaves no weights to tap.
  """

  sequence: Callable | None = None  # without a cache
  chunk: Callable | None = None  # some tokens, with a cache
  step: Callable | None = None  # one token, with a cache


def _cudnn() -> Kernels:
  from persona_jax.models import kernels

  return Kernels(sequence=kernels.cudnn)


def _pallas() -> Kernels:
  from persona_jax.models import kernels

  return Kernels(sequence=kernels.splash, step=kernels.step)


KERNELS = {  # functions: Pallas is imported where it is asked for
  'xla': Kernels,
  'blocks': lambda: Kernels(chunk=blocks),
  'cudnn': _cudnn,  # for NVIDIA GPUs
  'pallas': _pallas,  # for TPUs
}


def kernels(name: str | None) -> Kernels:
  """The kernels called `name`, by default the best for this backend.

  Raises:
    ValueError: there are none of this name.
  """
  if name is None:
    name = 'blocks' if jax.default_backend() == 'cpu' else 'xla'
  if name not in KERNELS:
    raise ValueError(
      f'attention is not computed by {name!r}; choose one of {list(KERNELS)}.'
    )
  return KERNELS[name]()


_WIDE = jnp.float32
_NEVER = -1e30  # finite, so that a row of padding stays finite
