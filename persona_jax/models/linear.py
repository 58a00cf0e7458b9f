"""Products with a kernel."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


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
    y = product(x, kernel.astype(self.dtype))
    if self.bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,))
      y += jnp.broadcast_to(bias.astype(self.dtype), y.shape)
    return y


def product(x, kernel, **of):
  """`x` `[... I]` times `kernel` `[O I]`.

  For few rows the kernel stands on the left, where XLA's CPU backend reads it
  twice as fast.
  """
  if math.prod(x.shape[:-1]) > _FEW:
    return jnp.einsum('...i,oi->...o', x, kernel, **of)
  rows = x.reshape(-1, x.shape[-1])
  y = jnp.einsum('oi,mi->om', kernel, rows, **of)
  y = jax.lax.optimization_barrier(y)
  return y.T.reshape(*x.shape[:-1], kernel.shape[0])


class Kernel(nn.Module):
  """Declares a kernel and returns it."""

  shape: tuple[int, ...]

  @nn.compact
  def __call__(self):
    return self.param('kernel', _kernel_init, self.shape, jnp.float32)


_FEW = 64
_kernel_init = nn.initializers.normal(0.02)
