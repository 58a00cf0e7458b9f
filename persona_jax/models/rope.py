"""Rotary positions: the frequencies of every way to stretch them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from persona_jax.models.config import Rope


class Table(NamedTuple):
  """Angles turned at each position, and what scales their cosine and sine."""

  frequencies: np.ndarray  # [R / 2], radians a position
  factor: float = 1.0


def table(rope: Rope, head_dim: int) -> Table:
  """The frequencies of `rope`, for R = fraction x head_dim features."""
  rotary = int(head_dim * rope.fraction + 1e-6)  # a share, as a float
  half = np.arange(0, rotary, 2, dtype=np.float32) / np.float32(rotary)
  plain = np.float32(1) / np.float32(rope.theta) ** half
  return FREQUENCIES[rope.kind](plain, rope, **dict(rope.scaling))


def angles(
  positions: Int[Array, 'B T'], rope: Rope | None, head_dim: int
) -> tuple[Float[Array, 'B T R'], Float[Array, 'B T R']]:
  """Cosine and sine at each position, both halves alike; None never turns."""
  if rope is None:
    shape = (*positions.shape, head_dim)
    return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
  frequencies, factor = table(rope, head_dim)
  where = jnp.maximum(positions, 0).astype(jnp.float32)
  angle = jnp.einsum('bt,r->btr', where, jnp.tile(frequencies, 2))
  return _once(jnp.cos(angle) * factor), _once(jnp.sin(angle) * factor)


def rotate(x: Float[Array, 'B T H E'], cos, sin) -> Float[Array, 'B T H E']:
  """Turns the first R features of each head, pairing i with i + R/2."""
  rotary = cos.shape[-1]
  turning, rest = x[..., :rotary], x[..., rotary:]
  first, second = jnp.split(turning, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  turning = (turning * cos + turned * sin).astype(x.dtype)
  return (
    turning
    if rotary == x.shape[-1]
    else jnp.concatenate([turning, rest], axis=-1)
  )


def limit(rope: Rope | None) -> int | None:
  """The positions beyond which `rope` would need its other frequencies."""
  if rope is None or rope.kind != 'longrope' or rope.long:
    return None
  return dict(rope.scaling)['original_max_position_embeddings']


def _once(x):
  """`x`, times one: XLA's CPU backend would compute it again in each layer.

  A product is never fused into what reads it. Decoding is a tenth faster.
  """
  if jax.default_backend() != 'cpu':
    return x
  one = jnp.eye(x.shape[-1], dtype=x.dtype)
  return jnp.einsum('btr,rs->bts', x, one, precision='highest')


def _default(plain, rope):
  return Table(plain)


def _linear(plain, rope, *, factor):
  return Table(plain / np.float32(factor))


def _llama3(
  plain,
  rope,
  *,
  factor,
  low_freq_factor,
  high_freq_factor,
  original_max_position_embeddings,
):
  """Slow frequencies divided by `factor`, fast ones kept, a ramp between."""
  turns = original_max_position_embeddings * plain / (2 * np.pi)
  ramp = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
  ramp = np.clip(ramp, 0, 1)
  return Table(((1 - ramp) * plain / factor + ramp * plain).astype(np.float32))


def _yarn(
  plain,
  rope,
  *,
  factor,
  original_max_position_embeddings,
  attention_factor=None,
  beta_fast=None,
  beta_slow=None,
  mscale=None,
  mscale_all_dim=None,
  truncate=True,
):
  """YaRN (Peng et al., 2023, https://arxiv.org/abs/2309.00071, section 3)."""
  rotary = 2 * len(plain)

  def feature(turns):  # the one that turns so often over the original length
    turn = original_max_position_embeddings / (turns * 2 * math.pi)
    return rotary * math.log(turn) / (2 * math.log(rope.theta))

  low, high = feature(beta_fast or 32), feature(beta_slow or 1)
  if truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, rotary - 1)
  high += 0.001 if low == high else 0
  ramp = (np.arange(len(plain), dtype=np.float32) - low) / (high - low)
  slow = np.clip(ramp, 0, 1).astype(np.float32)
  frequencies = plain / np.float32(factor) * slow + plain * (1 - slow)
  if attention_factor is None:
    grow = lambda by: 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1
    both = mscale and mscale_all_dim
    attention_factor = grow(mscale) / grow(mscale_all_dim) if both else grow(1)
  return Table(frequencies.astype(np.float32), attention_factor)


def _longrope(
  plain,
  rope,
  *,
  short_factor,
  long_factor,
  factor,
  original_max_position_embeddings,
  attention_factor=None,
):
  """LongRoPE (Ding et al., 2024, https://arxiv.org/abs/2402.13753)."""
  stretch = np.asarray(long_factor if rope.long else short_factor, np.float32)
  if attention_factor is None:
    original = math.log(original_max_position_embeddings)
    growth = max(1.0, factor)
    attention_factor = math.sqrt(1 + math.log(growth) / original)
  return Table(plain / stretch, attention_factor)


# The keywords of a function are the numbers that its kind has.
FREQUENCIES = {
  'default': _default,
  'linear': _linear,
  'llama3': _llama3,
  'yarn': _yarn,
  'longrope': _longrope,
}
