"""The key-value cache: slot s of a row holds its token at position s."""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, PyTree

from persona_jax.models.config import DecoderConfig

BLOCK = 64  # slots of a block; XLA's CPU products are fastest on such


@struct.dataclass
class Cache:
  """Keys and values of S slots a row.

  A token is written at the slot of its position, and sees the slots up to its
  own: rows of any length lie side by side without holes, padding (position
  -1) is written nowhere, and a row is begun anew by counting from 0 again.
  What lies beyond a row's last token is never seen.

  Values are `[B H S E]`, keys too or, blocked, `[B H S/64 E 64]`; by layer a
  tuple, or `[L ...]`, to match unstacked or stacked parameters.
  """

  keys: PyTree
  values: PyTree

  @property
  def size(self) -> int:
    """The number of slots."""
    return jax.tree.leaves(self.values)[0].shape[-2]


def empty(
  config: DecoderConfig,
  batch: int,
  size: int,
  *,
  dtype=jnp.float32,
  blocked: bool | None = None,
) -> Cache:
  """A cache of `size` slots or a few more, for unstacked parameters.

  `blocked` keys halve the time of attention on a CPU, where they are the
  default.
  """
  if blocked is None:
    blocked = jax.default_backend() == 'cpu'
  slots = math.ceil(size / BLOCK) * BLOCK if blocked else size
  shape = (batch, config.kv_heads, slots, config.head_dim)
  apart = (*shape[:2], slots // BLOCK, config.head_dim, BLOCK)

  def zeros(shape):
    return tuple(jnp.zeros(shape, dtype) for _ in range(config.layers))

  return Cache(keys=zeros(apart if blocked else shape), values=zeros(shape))


def empty_stacked(config: DecoderConfig, batch: int, size: int, **of) -> Cache:
  """A cache of `size` slots or a few more, for stacked parameters."""
  cache = empty(config, batch, size, **of)
  return Cache(keys=jnp.stack(cache.keys), values=jnp.stack(cache.values))


def write(
  keys: Float[Array, 'B H *R'],
  values: Float[Array, 'B H S E'],
  new_keys: Float[Array, 'B T H E'],
  new_values: Float[Array, 'B T H E'],
  positions: Int[Array, 'B T'],
) -> tuple[Float[Array, 'B H *R'], Float[Array, 'B H S E']]:
  """One layer's memory with T more tokens; position -1 is dropped."""
  slots = jnp.where(positions < 0, values.shape[2], positions)
  rows = jnp.broadcast_to(jnp.arange(slots.shape[0])[:, None], slots.shape)
  new_keys = new_keys.astype(keys.dtype)
  if keys.ndim == values.ndim:
    keys = keys.at[rows, :, slots].set(new_keys, mode='drop')
  else:
    block, within = slots // BLOCK, slots % BLOCK
    keys = keys.at[rows, :, block, :, within].set(new_keys, mode='drop')
  new_values = new_values.astype(values.dtype)
  return keys, values.at[rows, :, slots].set(new_values, mode='drop')
