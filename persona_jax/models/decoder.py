"""One decoder-only transformer, with a tap at every place worth reading.

The families (`models.families`) differ in `DecoderConfig` alone. With stacked
parameters (`layers: [L, ...]`) the layers are scanned, for training; with
unstacked ones (`trees.unstack_layers`) they are unrolled, for decoding.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from persona_jax import cache as caches
from persona_jax.cache import Cache
from persona_jax.models import attention, rope
from persona_jax.models import experts as mixtures
from persona_jax.models import remat as remats
from persona_jax.models.attention import Kernels
from persona_jax.models.config import DecoderConfig
from persona_jax.models.linear import Kernel, Linear, product
from persona_jax.taps import Tap


class Functions(NamedTuple):
  """A model as two pure functions."""

  apply: Callable  # (variables, tokens, positions, cache) -> hidden, cache
  unembed: Callable  # (variables, hidden) -> float32 logits


def functions(
  config: DecoderConfig,
  *,
  dtype=jnp.float32,
  remat: str = 'none',
  mix: Callable = mixtures.grouped,
  attend: str | None = None,
) -> Functions:
  """The pure functions of a decoder; build them once, they are static.

  `apply(variables, tokens, positions, cache=None)` returns the normed hidden
  states and the cache. Position -1 marks padding; without a cache a row may
  hold several texts, each with positions from 0. Keywords go to Flax's own
  `Module.apply` (`mutable=...`).

  Args:
    config: the model.
    dtype: of the computation.
    remat: what a layer keeps for its gradient: all it needs ('none'), its input
      alone ('full'), products of activations and weights too ('dots'), or what
      passes some taps, in the device's memory ('save:attn_out,mlp_out') or the
      host's ('offload:attn_out').
    mix: computes a mixture of experts, if the model has one
      (`experts.grouped`, `experts.sharded(mesh, axis)`).
    attend: how attention is computed (`attention.KERNELS`), by default as is
      best on this backend.
  """
  kernels = attention.kernels(attend)
  how = dict(remat=remat, mix=mix, kernels=kernels)
  scanned = Decoder(config, dtype, scan=True, **how)
  unrolled = Decoder(config, dtype, scan=False, **how)

  def apply(variables, tokens, positions, cache=None, **keywords):
    module = scanned if 'layers' in variables['params'] else unrolled
    return module.apply(variables, tokens, positions, cache, **keywords)

  def unembed(variables, hidden):
    params = variables['params']
    table = params['embed']['embedding']
    kernel = table if config.tied else params['unembed']['kernel']
    logits = product(
      hidden,
      kernel.astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )
    logits /= config.logit_divisor
    return attention.softcap(logits, config.logit_softcap)

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
  remat: str = 'none'
  mix: Callable = mixtures.grouped
  kernels: Kernels = attention.kernels('xla')

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
      Kernel((config.vocab, config.features), name='unembed')()
    _check_length(config, tokens.shape[1] if cache is None else cache.size)
    contexts = tuple(
      _context(config, k, positions, cache) for k in config.kinds
    )
    layers = self._scanned if self.scan else self._unrolled
    x = x.astype(self.dtype)
    if config.embed_scale != 1:
      x *= jnp.asarray(config.embed_scale, self.dtype)
    x, keys, values = layers(x, cache, contexts)
    if cache is not None:
      cache = cache.replace(keys=keys, values=values)
    return norm(config, 'norm')(x), cache

  def _block(self):
    return remats.rematerialised(Block, self.remat)

  def _scanned(self, x, cache, contexts):
    layers = nn.scan(
      self._block(),
      variable_axes={'params': 0, 'lora': 0, 'edits': 0, 'acts': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast),
      length=self.config.layers,
    )(self.config, self.dtype, self.mix, self.kernels, name='layers')
    memory = None if cache is None else (cache.keys, cache.values)
    kind, context = None, contexts[0]
    if len(contexts) > 1:
      kind = jnp.asarray(self.config.kind_of, jnp.int32)
      context = jax.tree.map(lambda *x: jnp.stack(x), *contexts)
    x, memory = layers(x, (memory, kind), context)
    return x, *(memory or (None, None))

  def _unrolled(self, x, cache, contexts):
    keys, values = [], []
    for i, kind in enumerate(self.config.kind_of):
      memory = None if cache is None else (cache.keys[i], cache.values[i])
      layer = self._block()(
        self.config, self.dtype, self.mix, self.kernels, name=f'layers_{i}'
      )
      x, memory = layer(x, (memory, None), contexts[kind])
      if memory is not None:
        keys.append(memory[0])
        values.append(memory[1])
    return x, tuple(keys), tuple(values)


class Context(NamedTuple):
  """What every layer of a kind shares in one pass."""

  positions: Int[Array, 'B T']
  rope: tuple[Float[Array, 'B T E'], Float[Array, 'B T E']]  # cosine, sine
  mask: Bool[Array, 'B T S']
  window: Int[Array, ''] | None  # positions that a token sees
  rows: Int[Array, 'R W'] | None  # of the cache


def _context(config, kind, positions, cache) -> Context:
  return Context(
    positions=positions,
    rope=rope.angles(positions, kind.rope, config.head_dim),
    mask=attention.mask(positions, cache, kind.window),
    window=_window(config, kind),
    rows=None if cache is None else cache.rows,
  )


def _window(config, kind):
  """An array, since layers that are scanned may differ in it."""
  if all(x.window is None for x in config.kinds):
    return None
  return jnp.asarray(kind.window or config.max_positions, jnp.int32)


def _check_length(config, slots):
  limits = [rope.limit(kind.rope) for kind in config.kinds]
  limit = min((x for x in limits if x is not None), default=slots)
  if slots > limit:
    raise ValueError(
      f'{slots} slots are more than the {limit} positions of the short '
      f'LongRoPE frequencies; load the model with context={slots} or more.'
    )


class Block(nn.Module):
  """Attention and a gated MLP, each added to the residual stream."""

  config: DecoderConfig
  dtype: Any
  mix: Callable
  kernels: Kernels

  @nn.compact
  def __call__(self, x, each, context: Context):
    config = self.config
    memory, kind = each
    if kind is not None:  # the contexts of all kinds, stacked
      context = jax.tree.map(lambda x: x[kind], context)
    tap = functools.partial(Tap, context.positions)
    heard, memory = Attention(config, self.dtype, self.kernels, name='attn')(
      self._before('attn_norm', x), memory, context
    )
    x = x + tap(name='attn_out')(self._after('attn_post_norm', heard))
    thought = self._mlp()(self._before('mlp_norm', x))
    x = x + tap(name='mlp_out')(self._after('mlp_post_norm', thought))
    return tap(name='resid')(x), memory

  def _mlp(self):
    if self.config.experts is None:
      return MLP(self.config, self.dtype, name='mlp')
    return Mixture(self.config, self.dtype, self.mix, name='mlp')

  def _before(self, name, x):
    return norm(self.config, name)(x) if self.config.norm_before else x

  def _after(self, name, x):
    config = self.config
    x = norm(config, name)(x) if config.norm_after else x
    return x if config.residual_scale == 1 else x * config.residual_scale


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  config: DecoderConfig
  dtype: Any
  kernels: Kernels

  @nn.compact
  def __call__(self, x, memory, context: Context):
    config = self.config
    queries = self._heads('q', config.heads, x)
    keys = self._heads('k', config.kv_heads, x)
    values = self._heads('v', config.kv_heads, x)
    queries = rope.rotate(queries, *context.rope)
    keys = rope.rotate(keys, *context.rope)
    if memory is None:
      kernel = self.kernels.sequence
      keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
    else:
      kernel = self.kernels.step if x.shape[1] == 1 else self.kernels.chunk
      memory = caches.write(
        *memory, keys, values, context.positions, context.rows
      )
      keys, values = memory
    of = {
      'scale': config.attn_scale or config.head_dim**-0.5,
      'cap': config.attn_softcap,
    }
    if kernel is None:
      keys, values = caches.pick((keys, values), context.rows)
      weights = Tap(context.positions, name='attn_weights')(
        attention.weights(queries, keys, context.mask, **of)
      )
      mixed = attention.mix(weights, values.astype(self.dtype))
    else:
      mixed = kernel(
        queries,
        keys,
        values,
        context.positions,
        context.rows,
        window=context.window,
        **of,
      )
    out = Linear(config.features, dtype=self.dtype, name='o')(mixed)
    return out, memory

  def _heads(self, name, heads, x):
    config = self.config
    normed = config.qk_norm if name in ('q', 'k') else None
    y = Linear(
      heads * config.head_dim,
      bias=config.qkv_bias,
      dtype=self.dtype,
      name=name,
    )(x)
    if normed == 'whole':
      y = norm(config, f'{name}_norm')(y)
    y = y.reshape(*x.shape[:2], heads, config.head_dim)
    return norm(config, f'{name}_norm')(y) if normed == 'head' else y


class MLP(nn.Module):
  """down(activation(gate(x)) * up(x))."""

  config: DecoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x):
    linear = functools.partial(Linear, dtype=self.dtype)
    act = ACTIVATIONS[self.config.activation]
    gate = linear(self.config.hidden, name='gate')(x)
    up = linear(self.config.hidden, name='up')(x)
    return linear(self.config.features, name='down')(act(gate) * up)


class Mixture(nn.Module):
  """Experts, each a gated MLP; a router sends every token to a few of them."""

  config: DecoderConfig
  dtype: Any
  mix: Callable

  @nn.compact
  def __call__(self, x):
    config, experts = self.config, self.config.experts
    router = Linear(experts.count, dtype=self.dtype, name='router')
    scores = jax.nn.softmax(router(x).astype(jnp.float32))
    weights, ids = jax.lax.top_k(scores, experts.active)
    if experts.normalised:
      weights /= jnp.sum(weights, axis=-1, keepdims=True)
    kernels = Experts(config, name='experts')()
    flat = lambda y: y.reshape(-1, y.shape[-1])
    out = self.mix(
      flat(x),
      flat(weights.astype(self.dtype)),
      flat(ids),
      {k: v.astype(self.dtype) for k, v in kernels.items()},
      ACTIVATIONS[config.activation],
    )
    return out.reshape(x.shape)


class Experts(nn.Module):
  """Declares the kernels of all experts, [E, out, in] each."""

  config: DecoderConfig

  @nn.compact
  def __call__(self):
    config, count = self.config, self.config.experts.count
    wide = (count, config.hidden, config.features)
    narrow = (count, config.features, config.hidden)
    shapes = {'gate': wide, 'up': wide, 'down': narrow}
    return {k: Kernel(shape, name=k)() for k, shape in shapes.items()}


def norm(config: DecoderConfig, name: str) -> 'RMSNorm':
  """A norm of the model's kind."""
  return RMSNorm(config.norm_eps, config.norm_offset, name=name)


class RMSNorm(nn.Module):
  """x / rms(x) * (scale + offset), in float32."""

  eps: float
  offset: float = 0.0

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    wide = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(square + self.eps)
    scale = scale.astype(jnp.float32)
    if self.offset:
      scale += self.offset
    return (wide * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


ACTIVATIONS = {
  'silu': nn.silu,
  'gelu': functools.partial(nn.gelu, approximate=False),
  'gelu_tanh': nn.gelu,
}
