"""Narrow weights for decoding: int8 or float8, with one scale an output row.

W = diag(scale) Q, so W x = scale * (Q x) (Dettmers et al., 2022,
https://arxiv.org/abs/2208.07339, without its outliers):

  variables = quantised.quantise(model.variables)
  apply = quantised.quantised(model.apply)
  unembed = quantised.unembed(model.config)

A kernel is quantised where it lies, as `Narrow`: names, stacking, adapters and
edits are those of the plain model. Norms, biases, routers and the kernels of
experts stay as they are.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, PyTree

from persona_jax import trees
from persona_jax.models import attention, decoder
from persona_jax.models.config import DecoderConfig
from persona_jax.models.linear import Linear, product

_LIMITS = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
_KERNEL = re.compile(
  r'(layers(_\d+)?/)?'
  r'(?P<name>attn/[qkvo]|mlp/(gate|up|down)|embed|unembed)'
  r'/(kernel|embedding)$'
)


@struct.dataclass
class Narrow:
  """A kernel `[... O I]` as narrow `values`, row by row times `scale`."""

  values: Any  # [... O I] int8 or float8
  scale: Any  # [... O] float32

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the kernel."""
    return self.values.shape

  def wide(self) -> Float[Array, '*L O I']:
    """The kernel in float32."""
    return self.values.astype(jnp.float32) * self.scale[..., None]

  def astype(self, dtype):
    """Refuses: a program that asks for plain kernels does not know these."""
    del dtype
    raise ValueError(
      'the kernels are quantised, and this program wants plain ones; run '
      'quantised.quantised(apply) and quantised.unembed(config), or give '
      'quantised.dequantise(variables).'
    )

  def __jax_array__(self):
    return self.astype(None)


def quantise(
  variables: Mapping[str, PyTree], dtype: Any = jnp.int8, *, targets: str = ''
) -> dict[str, PyTree]:
  """`variables` with `Narrow` kernels, rounded to the nearest value.

  The largest number of a row is the largest of the dtype: int8 is off by at
  most scale / 2, float8_e4m3fn by 1/16 of each number (by scale / 1024 where
  that is more). Merge adapters before, not after.

  Args:
    variables: plain ones, stacked or unstacked.
    dtype: int8 or float8_e4m3fn.
    targets: a pattern (`re.search`) over `attn/q`, `mlp/down`, `embed`,
      `unembed` and so on; a tied table is `embed`.

  Raises:
    ValueError: the dtype is another, a kernel is quantised already, or no
      kernel fits `targets`.
  """
  dtype = jnp.dtype(dtype)
  if dtype not in _LIMITS:
    known = ' or '.join(x.name for x in _LIMITS)
    raise ValueError(f'{dtype.name} weights are not known; choose {known}.')
  if _is_quantised(variables):
    raise ValueError(
      'the variables are quantised already; dequantise them first, or begin '
      'with the plain ones.'
    )
  found = set()

  def one(path, leaf):
    match = _KERNEL.match(trees.name(path))
    if match is None or not re.search(targets, match['name']):
      return leaf
    found.add(match['name'])
    return _narrow(leaf, dtype)

  params = jax.tree_util.tree_map_with_path(one, variables['params'])
  if not found:
    raise ValueError(f'{targets!r} finds no kernel; try mlp/down or embed.')
  return {**variables, 'params': params}


def dequantise(variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """`variables` with plain float32 kernels, each scale * Q."""
  widen = lambda x: x.wide() if isinstance(x, Narrow) else x
  params = jax.tree.map(widen, variables['params'], is_leaf=_is_narrow)
  return {**variables, 'params': params}


def quantised(apply: Callable, *, activations: bool = False) -> Callable:
  """`apply`, which multiplies by quantised kernels where there are any.

  Without them the program is the plain one. Adapters and edits of taps may come
  before or after.

  Args:
    apply: of a decoder, perhaps adapted or edited.
    activations: whether the inputs of products are rounded to int8 too, with a
      scale a token: then the products are those of integers, which is faster
      on a CPU, at ten times the KL on SmolLM2-135M, where one feature is 16
      times the rest. Otherwise the kernels are widened as they are read: for
      accelerators, and for gradients, which rounded inputs do not have.

  Raises:
    ValueError: `apply` is jitted, so that this might not reach its program;
      when called, activations are to be rounded for kernels that are not int8.
  """
  if hasattr(apply, 'lower'):
    raise ValueError(
      f'{apply} is jitted; transform it first and jit the result.'
    )
  read = functools.partial(_read, activations)

  def enter(next_fun, args, kwargs, context):
    if not isinstance(context.module, decoder.Decoder):
      return next_fun(*args, **kwargs)
    if context.method_name != '__call__':
      return next_fun(*args, **kwargs)
    # In here `read` is the innermost: it calls nobody, others call it.
    with nn.intercept_methods(read):
      return next_fun(*args, **kwargs)

  def apply_quantised(*args, **kwargs):
    with nn.intercept_methods(enter):
      return apply(*args, **kwargs)

  return apply_quantised


def unembed(config: DecoderConfig, *, activations: bool = False) -> Callable:
  """The `unembed` of a decoder for variables that may be quantised."""
  plain = decoder.functions(config).unembed

  def unembed_quantised(variables, hidden):
    params = variables['params']
    table = params['embed']['embedding']
    kernel = table if config.tied else params['unembed']['kernel']
    if not isinstance(kernel, Narrow):
      return plain(variables, hidden)
    logits = times(hidden, kernel, activations=activations)
    logits /= config.logit_divisor
    return attention.softcap(logits, config.logit_softcap)

  return unembed_quantised


def times(
  x: Float[Array, '*B I'], kernel: Narrow, *, activations: bool = False
) -> Float[Array, '*B O']:
  """`x` times a kernel, in float32; `activations` as in `quantised`."""
  if activations:
    y = _integer_product(x, kernel.values)
  else:
    # Widened kernels do not change from step to step: XLA could keep them.
    x, values = jax.lax.optimization_barrier((x, kernel.values))
    y = product(x, values.astype(x.dtype), preferred_element_type=jnp.float32)
  return y * jnp.broadcast_to(kernel.scale, y.shape)


def _integer_product(x, values):
  if values.dtype != jnp.int8:
    raise ValueError(
      f'activations=True multiplies int8 by int8, and the kernels are '
      f'{values.dtype.name}; quantise to int8, or leave activations alone.'
    )
  rounded = _narrow(x, values.dtype)
  y = product(rounded.values, values, preferred_element_type=jnp.int32)
  return y.astype(jnp.float32) * rounded.scale[..., None]


@functools.partial(jax.jit, static_argnums=1)  # else float32 copies are made
def _narrow(x, dtype):
  wide = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(wide), axis=-1) / _LIMITS[dtype]
  values = wide / jnp.where(scale > 0, scale, 1)[..., None]
  if dtype == jnp.int8:
    values = jnp.round(values)
  return Narrow(values.astype(dtype), scale)


def _read(activations, next_fun, args, kwargs, context):
  module = context.module
  if context.method_name != '__call__':
    return next_fun(*args, **kwargs)
  if isinstance(module, Linear):
    kernel = module.get_variable('params', 'kernel')
    if isinstance(kernel, Narrow):
      return _linear(module, times(*args, kernel, activations=activations))
  if isinstance(module, nn.Embed):
    table = module.get_variable('params', 'embedding')
    if isinstance(table, Narrow):
      return _rows(table, *args)
  return next_fun(*args, **kwargs)


def _linear(module, y):
  if module.bias:
    bias = module.get_variable('params', 'bias').astype(jnp.float32)
    y += jnp.broadcast_to(bias, y.shape)
  return y.astype(module.dtype)


def _rows(table, tokens):
  take = lambda x: jnp.take(x, tokens, axis=0)
  return jax.tree.map(take, table).wide()


def _is_narrow(x):
  return isinstance(x, Narrow)


def _is_quantised(variables):
  leaves = jax.tree.leaves(variables['params'], is_leaf=_is_narrow)
  return any(map(_is_narrow, leaves))
