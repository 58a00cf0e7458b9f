"""One decoder-only transformer, with a tap at every place worth reading.

The families (Llama, Qwen 2, 2.5 and 3) differ in `DecoderConfig` alone. With
stacked parameters (`layers: [L, ...]`) the layers are scanned, for training;
with unstacked ones (`trees.unstack_layers`) they are unrolled, for decoding.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from persona_jax.models import cache as caches
from persona_jax.models.cache import Cache
from persona_jax.models.config import DecoderConfig
from persona_jax.taps import Tap


class Functions(NamedTuple):
  """A model as two pure functions."""

  apply: Callable  # (variables, tokens, positions, cache) -> hidden, cache
  unembed: Callable  # (variables, hidden) -> float32 logits


def functions(
  config: DecoderConfig, *, dtype=jnp.float32, remat: bool = False
) -> Functions:
  """The pure functions of a decoder; build them once, they are static.

  `apply(variables, tokens, positions, cache=None)` returns the normed hidden
  states and the cache. Position -1 marks padding. Keywords go to Flax's own
  `Module.apply` (`mutable=...`).
  """
  scanned = Decoder(config, dtype, scan=True, remat=remat)
  unrolled = Decoder(config, dtype, scan=False, remat=remat)

  def apply(variables, tokens, positions, cache=None, **keywords):
    module = scanned if 'layers' in variables['params'] else unrolled
    return module.apply(variables, tokens, positions, cache, **keywords)

  def unembed(variables, hidden):
    params = variables['params']
    table = params['embed']['embedding']
    kernel = table if config.tied else params['unembed']['kernel']
    return jnp.einsum(
      '...d,vd->...v',
      hidden,
      kernel.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )

  return Functions(apply, unembed)


def init(
  config: DecoderConfig, key: Array, *, dtype=jnp.float32
) -> dict[str, PyTree]:
  """Random variables with stacked layers."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  return Decoder(config, dtype, scan=True).init(key, tokens, tokens)


class Decoder(nn.Module):
  """Embedding, layers, final norm."""

  config: DecoderConfig
  dtype: Any = jnp.float32
  scan: bool = True
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    positions: Int[Array, 'B T'],
    cache: Cache | None = None,
  ) -> tuple[Float[Array, 'B T D'], Cache | None]:
    config = self.config
    x = nn.Embed(config.vocab, config.features, name='embed')(tokens)
    if not config.tied:  # declared here, read by `unembed`
      Unembed(config.vocab, name='unembed')(x)
    if cache is not None:
      cache = caches.claim(cache, positions)
    context = Context(
      positions=positions,
      rope=rope_angles(positions, config),
      mask=attention_mask(positions, cache),
      start=None if cache is None else cache.end - tokens.shape[1],
    )
    layers = self._scanned if self.scan else self._unrolled
    x, keys, values = layers(x.astype(self.dtype), cache, context)
    if cache is not None:
      cache = cache.replace(keys=keys, values=values)
    return RMSNorm(config.norm_eps, name='norm')(x), cache

  def _block(self):
    return nn.remat(Block, prevent_cse=False) if self.remat else Block

  def _scanned(self, x, cache, context):
    layers = nn.scan(
      self._block(),
      variable_axes={'params': 0, 'lora': 0, 'edits': 0, 'acts': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast),
      length=self.config.layers,
    )(self.config, self.dtype, name='layers')
    memory = None if cache is None else (cache.keys, cache.values)
    x, memory = layers(x, memory, context)
    return x, *(memory or (None, None))

  def _unrolled(self, x, cache, context):
    keys, values = [], []
    for i in range(self.config.layers):
      layer = self._block()(self.config, self.dtype, name=f'layers_{i}')
      memory = None if cache is None else (cache.keys[i], cache.values[i])
      x, memory = layer(x, memory, context)
      if memory is not None:
        keys.append(memory[0])
        values.append(memory[1])
    return x, tuple(keys), tuple(values)


class Context(NamedTuple):
  """What every layer of one pass shares."""

  positions: Int[Array, 'B T']
  rope: tuple[Float[Array, 'B T E'], Float[Array, 'B T E']]  # cosine, sine
  mask: Bool[Array, 'B T S']
  start: Int[Array, ''] | None  # the slot of the first token


class Block(nn.Module):
  """Attention and a gated MLP, each before a residual sum."""

  config: DecoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x, memory, context: Context):
    norm = functools.partial(RMSNorm, self.config.norm_eps)
    tap = functools.partial(Tap, context.positions)
    attn, memory = Attention(self.config, self.dtype, name='attn')(
      norm(name='attn_norm')(x), memory, context
    )
    x = x + tap(name='attn_out')(attn)
    mlp = MLP(self.config, self.dtype, name='mlp')(norm(name='mlp_norm')(x))
    return tap(name='resid')(x + tap(name='mlp_out')(mlp)), memory


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  config: DecoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x, memory, context: Context):
    config = self.config
    queries = self._heads('q', config.heads, x)
    keys = self._heads('k', config.kv_heads, x)
    values = self._heads('v', config.kv_heads, x)
    if config.qk_norm:
      queries = RMSNorm(config.norm_eps, name='q_norm')(queries)
      keys = RMSNorm(config.norm_eps, name='k_norm')(keys)
    queries = rotate(queries, *context.rope)
    keys = jnp.swapaxes(rotate(keys, *context.rope), 1, 2)  # [B H T E]
    values = jnp.swapaxes(values, 1, 2)
    if memory is not None:
      keys = write(memory[0], keys, context.start)
      values = write(memory[1], values, context.start)
      memory = (keys, values)
    weights = Tap(context.positions, name='attn_weights')(
      attention_weights(queries, keys, context.mask)
    )
    mixed = attention_mix(weights, values.astype(self.dtype))
    out = Linear(config.features, dtype=self.dtype, name='o')(mixed)
    return out, memory

  def _heads(self, name, heads, x):
    y = Linear(
      heads * self.config.head_dim,
      bias=self.config.qkv_bias,
      dtype=self.dtype,
      name=name,
    )(x)
    return y.reshape(*x.shape[:2], heads, self.config.head_dim)


class MLP(nn.Module):
  """down(silu(gate(x)) * up(x))."""

  config: DecoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x):
    linear = functools.partial(Linear, dtype=self.dtype)
    gate = linear(self.config.hidden, name='gate')(x)
    up = linear(self.config.hidden, name='up')(x)
    return linear(self.config.features, name='down')(nn.silu(gate) * up)


class Linear(nn.Module):
  """A product with a kernel kept as (out, in), as checkpoints do."""

  features: int
  bias: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    kernel = self.param(
      'kernel', _kernel_init, (self.features, x.shape[-1]), jnp.float32
    )
    y = jnp.einsum('...i,oi->...o', x, kernel.astype(self.dtype))
    if self.bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,))
      y += jnp.broadcast_to(bias.astype(self.dtype), y.shape)
    return y


class Unembed(nn.Module):
  """Declares the kernel of an untied model; `Functions.unembed` reads it."""

  vocab: int

  @nn.compact
  def __call__(self, x):
    self.param('kernel', _kernel_init, (self.vocab, x.shape[-1]), jnp.float32)


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32."""

  eps: float

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    wide = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(square + self.eps)
    return (wide * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


def rope_angles(
  positions: Int[Array, 'B T'], config: DecoderConfig
) -> tuple[Float[Array, 'B T E'], Float[Array, 'B T E']]:
  """Cosine and sine of position / theta^(2i/E), both halves alike."""
  half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32)
  frequency = config.rope_theta ** (-half / config.head_dim)
  where = jnp.maximum(positions, 0).astype(jnp.float32)
  angle = jnp.einsum('bt,e->bte', where, jnp.tile(frequency, 2))
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, 'B T H E'], cos, sin) -> Float[Array, 'B T H E']:
  """Rotary embedding, pairing feature i with i + E/2."""
  first, second = jnp.split(x, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  return (x * cos + turned * sin).astype(x.dtype)


def attention_mask(
  positions: Int[Array, 'B T'], cache: Cache | None
) -> Bool[Array, 'B T S']:
  """A token sees the slots before it and itself, never padding."""
  slots = positions if cache is None else cache.positions
  start = 0 if cache is None else cache.end - positions.shape[1]
  query = start + jnp.arange(positions.shape[1])
  causal = jnp.arange(slots.shape[1])[None] <= query[:, None]
  return causal[None] & (slots >= 0)[:, None]


def attention_weights(
  queries: Float[Array, 'B T H E'],
  keys: Float[Array, 'B K S E'],
  mask: Bool[Array, 'B T S'],
) -> Float[Array, 'B K G T S']:
  """Softmax in float32; a row that sees nothing attends evenly.

  The G queries of a key head and the T tokens are one axis of the product:
  XLA's CPU backend is five times slower when they are two.
  """
  batch, length, heads, size = queries.shape
  kv_heads, slots = keys.shape[1:3]
  grouped = queries.reshape(batch, length, kv_heads, heads // kv_heads, size)
  grouped = jnp.transpose(grouped, (0, 2, 3, 1, 4)) * size**-0.5
  scores = jnp.einsum(
    'bkne,bkse->bkns',
    grouped.reshape(batch, kv_heads, -1, size),
    keys.astype(queries.dtype),
    preferred_element_type=jnp.float32,
  ).reshape(batch, kv_heads, -1, length, slots)
  scores = jnp.where(mask[:, None, None], scores, _NEVER)
  return jax.nn.softmax(scores, axis=-1).astype(queries.dtype)


def attention_mix(
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
_kernel_init = nn.initializers.normal(0.02)
