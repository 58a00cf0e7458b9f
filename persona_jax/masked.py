"""Sums, means and deviations of the entries that a mask counts."""

import jax
import jax.numpy as jnp

from persona_jax.shapes import Array, Bool, Float


def total(
  x: Float[Array, '...'], mask: Bool[Array, '...'], axis=None
) -> Float[Array, '...']:
  """Sum of `x` where `mask`; what lies outside may be NaN."""
  return jnp.sum(x, axis, where=mask)


def mean(
  x: Float[Array, '...'], mask: Bool[Array, '...'], axis=None
) -> Float[Array, '...']:
  """Mean of `x` where `mask`; zero where the mask is empty."""
  count = jnp.sum(mask, axis, dtype=x.dtype)
  return total(x, mask, axis) / jnp.maximum(count, 1)


def std(
  x: Float[Array, '...'], mask: Bool[Array, '...'], axis=None
) -> Float[Array, '...']:
  """Population deviation of `x` where `mask`; zero where the mask is empty."""
  centre = mean(x, mask, axis)
  if axis is not None:
    centre = jnp.expand_dims(centre, axis)
  away = jnp.where(mask, x - centre, 0)
  return jnp.sqrt(mean(away * away, mask, axis))


def log_mean_exp(
  x: Float[Array, '...'], mask: Bool[Array, '...'], axis=None
) -> Float[Array, '...']:
  """log of the mean of exp(x) where `mask`; -inf where the mask is empty."""
  count = jnp.sum(mask, axis, dtype=x.dtype)
  log_sum = jax.nn.logsumexp(jnp.where(mask, x, -jnp.inf), axis)
  return log_sum - jnp.log(jnp.maximum(count, 1))
