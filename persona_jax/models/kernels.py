"""Attention fused for one kind of accelerator.

`attention.kernels` imports this file where a name asks for it: it needs Pallas.
Those by Pallas are for one TPU: JAX refuses to spread them over a mesh. None of
it was timed on the hardware that it is for.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splashes,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)
from jaxtyping import Array, Float, Int

from persona_jax.models import attention


def cudnn(
  queries: Float[Array, 'B T H E'],
  keys: Float[Array, 'B K T E'],
  values: Float[Array, 'B K T E'],
  positions: Int[Array, 'B T'],
  rows: None = None,
  *,
  scale: float,
  cap: float | None = None,
  window: Int[Array, ''] | None = None,
  implementation: str = 'cudnn',
) -> Float[Array, 'B T HE']:
  """A sequence on an NVIDIA GPU, by `jax.nn.dot_product_attention`.

  No token sees what comes later, so padding is moved behind the tokens, and
  back. A window counts positions, not places: it becomes a mask [B T T], as do
  the borders of texts where a row holds several.

  Raises:
    ValueError: the scores are capped, or not in 16 bits.
  """
  del rows
  if cap is not None:
    raise ValueError(
      f'cuDNN does not cap the scores of attention, and this model caps them '
      f"at {cap}; choose attend='xla'."
    )
  if implementation == 'cudnn' and queries.dtype not in _NARROW:
    raise ValueError(
      f'cuDNN computes attention in bfloat16 or float16, not in '
      f"{queries.dtype}; choose dtype='bfloat16' or attend='xla'."
    )
  attend = functools.partial(
    jax.nn.dot_product_attention, scale=scale, implementation=implementation
  )
  length = queries.shape[1]
  # cuDNN's gradient under a mask takes an even number of tokens.
  arrays, positions = _padded(2, queries, keys, values, positions)
  masked = lambda: attend(*arrays, mask=_mask(positions, window)[:, None])

  def causal():
    order = jnp.argsort(positions < 0, axis=1, stable=True)
    heard = attend(*(_take(x, order) for x in arrays), is_causal=True)
    return _take(heard, jnp.argsort(order, axis=1))

  if window is not None:
    heard = masked()
  else:
    several = jnp.any(attention.segments(positions) > 1)
    heard = jax.lax.cond(several, masked, causal)
  return _flat(heard)[:, :length]


def splash(
  queries: Float[Array, 'B T H E'],
  keys: Float[Array, 'B K T E'],
  values: Float[Array, 'B K T E'],
  positions: Int[Array, 'B T'],
  rows: None = None,
  *,
  scale: float,
  cap: float | None = None,
  window: Int[Array, ''] | None = None,
  interpret: bool | None = None,
) -> Float[Array, 'B T HE']:
  """A sequence on a TPU, by the splash attention that comes with JAX.

  Without a window the blocks after a token are skipped and nothing of size
  T x T is in memory. A window counts positions, not places: it becomes a mask
  [B T T], and the rows are computed one after the other.
  """
  del rows
  length, heads = queries.shape[1:3]
  arrays, positions = _padded(128, queries * scale, keys, values, positions)
  arrays = [jnp.swapaxes(x, 1, 2) for x in arrays]
  places = positions.shape[1]
  block = next(x for x in (512, 256, 128) if places % x == 0)
  make = functools.partial(
    splashes.make_splash_mha_single_device,
    block_sizes=splashes.BlockSizes(*[block] * 8),
    attn_logits_soft_cap=cap,
    interpret=_interpreted(interpret),
  )
  if window is None:
    causal = masks.CausalMask((places, places))
    attend = make(masks.MultiHeadMask([causal] * heads))
    text = jnp.where(positions < 0, -1, attention.segments(positions))
    heard = jax.vmap(attend)(*arrays, splashes.SegmentIds(text, text))
  else:
    seen = _mask(positions, window)[:, None]
    heard = jax.vmap(lambda seen, *x: _dynamic(make(seen))(*x))(seen, *arrays)
  return _flat(jnp.swapaxes(heard, 1, 2))[:, :length]


def step(
  queries: Float[Array, 'C 1 H E'],
  keys: Float[Array, 'B K *R'],
  values: Float[Array, 'B K S E'],
  positions: Int[Array, 'C 1'],
  rows: Int[Array, 'R W'] | None = None,
  *,
  scale: float,
  cap: float | None = None,
  window: Int[Array, ''] | None = None,
  block: int = 512,
  interpret: bool | None = None,
) -> Float[Array, 'C 1 HE']:
  """One token a row on a TPU: of each row the blocks that it sees, no more.

  A block of slots beyond a row's token or before its window is not fetched: its
  turn asks for a block that is there already. The softmax is summed up from
  block to block (Milakov and Gimelshein, 2018).

  Raises:
    ValueError: the keys are blocked as for a CPU.
  """
  if keys.ndim != values.ndim:
    raise ValueError(
      f'keys of shape {keys.shape} are blocked, and this kernel reads them '
      'slot by slot; make the cache with blocked=False.'
    )
  count, _, heads, size = queries.shape
  batch, kv_heads, slots, _ = values.shape
  group, block = heads // kv_heads, min(block, slots)
  if window is None:
    window = jnp.asarray(slots, jnp.int32)

  def one(row, head, turn, *data):
    return row, head, 0, 0

  def held(row, head, turn, rows, lengths, window):
    first, last = _needed(lengths[row], window[0], block)
    return rows[row], head, jnp.clip(turn, first, last), 0

  memory = pl.BlockSpec((None, None, block, size), held)
  token = pl.BlockSpec((None, None, group, size), one)
  heard = pl.pallas_call(
    functools.partial(_step, cap=cap),
    out_shape=jax.ShapeDtypeStruct(
      (count, kv_heads, group, size), queries.dtype
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(count, kv_heads, pl.cdiv(slots, block)),
      in_specs=[token, memory, memory],
      out_specs=token,
      scratch_shapes=[
        pltpu.VMEM((group, 1), jnp.float32),
        pltpu.VMEM((group, 1), jnp.float32),
        pltpu.VMEM((group, size), jnp.float32),
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    interpret=_interpreted(interpret),
    name='attention_step',
  )(
    _places(rows, count, batch),
    positions[:, 0] + 1,
    window[None],
    (queries * scale).reshape(count, kv_heads, group, size),
    keys,
    values,
  )
  return heard.reshape(count, 1, -1)


def _step(
  rows,
  lengths,
  window,
  queries,  # [G E], as what is heard
  keys,  # [S E], one block, as the values
  values,
  heard,
  most,  # [G 1]
  total,
  sums,  # [G E]
  *,
  cap,
):
  turn, size = pl.program_id(2), keys.shape[0]
  length = lengths[pl.program_id(0)]
  first, last = _needed(length, window[0], size)

  @pl.when(turn == 0)
  def begin():
    most[...] = jnp.full(most.shape, _NEVER, most.dtype)
    total[...] = jnp.zeros(total.shape, total.dtype)
    sums[...] = jnp.zeros(sums.shape, sums.dtype)

  @pl.when((turn >= first) & (turn <= last))
  def add():
    asked = queries[...]
    scores = jax.lax.dot_general(
      asked,
      keys[...].astype(asked.dtype),
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    slots = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) + turn * size
    seen = (slots < length) & (slots >= length - window[0])
    scores = jnp.where(seen, attention.softcap(scores, cap), _NEVER)
    top = jnp.maximum(most[...], jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - top)
    fade = jnp.exp(most[...] - top)
    # A weight of zero does not save what is there from being NaN.
    slots = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) + turn * size
    said = jnp.where(slots < length, values[...], 0).astype(asked.dtype)
    mixed = jnp.dot(
      weights.astype(asked.dtype), said, preferred_element_type=jnp.float32
    )
    most[...] = top
    total[...] = total[...] * fade + jnp.sum(weights, axis=1, keepdims=True)
    sums[...] = sums[...] * fade + mixed

  @pl.when(turn == pl.num_programs(2) - 1)
  def end():
    heard[...] = (sums[...] / total[...]).astype(heard.dtype)


def _needed(length, window, size):
  """The first and the last block of slots that a row of this length sees."""
  first = jax.lax.div(jnp.maximum(length - window, 0), size)
  return first, jax.lax.div(jnp.maximum(length - 1, 0), size)


def _places(rows, count, batch):
  """`rows`, counted in their groups, as rows of the whole cache."""
  if rows is None:
    return jnp.arange(count, dtype=jnp.int32)
  each = batch // rows.shape[0]
  start = jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None] * each
  return (jnp.clip(rows, 0, each - 1) + start).reshape(-1)


def _padded(multiple, queries, keys, values, positions):
  """`[B T heads E]` of one type, and positions, of T a multiple."""
  arrays = [
    queries,
    *(jnp.swapaxes(x, 1, 2).astype(queries.dtype) for x in (keys, values)),
  ]
  more = -positions.shape[1] % multiple
  positions = jnp.pad(positions, ((0, 0), (0, more)), constant_values=-1)
  wide = ((0, 0), (0, more), (0, 0), (0, 0))
  return [jnp.pad(x, wide) for x in arrays], positions


def _mask(positions, window):
  """`attention.mask`, but that padding sees itself: no softmax of nothing."""
  seen = attention.mask(positions, None)
  if window is not None:
    seen &= positions[:, :, None] - positions[:, None] < window
  return seen | jnp.eye(positions.shape[1], dtype=bool)[None]


def _dynamic(kernel):
  """JAX would trace a flag of a kernel under a traced mask, and then ask it."""
  kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
  return kernel


def _take(x, order):
  """The tokens of `[B T heads E]` in this order."""
  return jnp.take_along_axis(x, order[:, :, None, None], axis=1)


def _flat(x):
  """The heads side by side."""
  return x.reshape(*x.shape[:2], -1)


def _interpreted(interpret):
  return jax.default_backend() != 'tpu' if interpret is None else interpret


_NARROW = (jnp.bfloat16, jnp.float16)
_NEVER = -1e30  # finite, so that a difference of two is never NaN
