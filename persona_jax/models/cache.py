"""The key-value cache: slots that are written once and masked by position."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int, PyTree

from persona_jax.models.config import DecoderConfig


@struct.dataclass
class Cache:
  """Keys and values of S slots; a slot with position -1 is never attended.

  Padding is written with position -1, so rows of different length share slots
  and nothing is ever realigned. `keys` and `values` are `[L B H S E]`, or a
  tuple of `[B H S E]` over layers, to match stacked or unstacked parameters.
  """

  keys: PyTree
  values: PyTree
  positions: Int[Array, 'B S']
  end: Int[Array, '']  # slots in use, the same for every row

  @property
  def size(self) -> int:
    """The number of slots."""
    return self.positions.shape[1]


def empty(
  config: DecoderConfig, batch: int, size: int, *, dtype=jnp.float32
) -> Cache:
  """A cache without content, for unstacked parameters."""
  shape = (batch, config.kv_heads, size, config.head_dim)

  def zeros():
    return tuple(jnp.zeros(shape, dtype) for _ in range(config.layers))

  return Cache(
    keys=zeros(),
    values=zeros(),
    positions=jnp.full((batch, size), -1, jnp.int32),
    end=jnp.zeros((), jnp.int32),
  )


def empty_stacked(
  config: DecoderConfig, batch: int, size: int, *, dtype=jnp.float32
) -> Cache:
  """A cache without content, for stacked parameters."""
  cache = empty(config, batch, size, dtype=dtype)
  return cache.replace(
    keys=jnp.stack(cache.keys), values=jnp.stack(cache.values)
  )


def claim(cache: Cache, positions: Int[Array, 'B T']) -> Cache:
  """The cache with T more slots in use, at the given positions."""
  start = (jnp.zeros((), jnp.int32), cache.end)
  return cache.replace(
    positions=jax.lax.dynamic_update_slice(cache.positions, positions, start),
    end=cache.end + positions.shape[1],
  )
