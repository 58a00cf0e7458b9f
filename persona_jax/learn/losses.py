"""Losses on log-probabilities: `loss(logprobs, batch, ...) -> scalar, metrics`.

A masked sum and its denominator are kept apart until the end, so that
microbatches add up to what one batch gives.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from persona_jax import masked


@struct.dataclass
class Batch:
  """What an update reads: B views, M tokens of the policy in each."""

  tokens: Int[Array, 'B S']
  positions: Int[Array, 'B S']
  before: Int[Array, 'B M']  # the slot that predicts token m
  actions: Int[Array, 'B M']
  mask: Bool[Array, 'B M']
  advantages: Float[Array, 'B M']  # a line's, at each of its tokens
  old_logprobs: Float[Array, 'B M']  # when sampled
  reference_logprobs: Float[Array, 'B M']  # of the start


def per_token(batch: Batch) -> Float[Array, 'B M']:
  """Weights that make a sum over the batch a mean over its tokens."""
  count = jnp.sum(batch.mask, dtype=jnp.float32)
  return batch.mask / jnp.maximum(count, 1)


def per_sequence(batch: Batch) -> Float[Array, 'B M']:
  """Weights of a mean over sequences of the means over their tokens."""
  count = jnp.sum(batch.mask, axis=1, keepdims=True, dtype=jnp.float32)
  rows = jnp.sum(jnp.any(batch.mask, axis=1), dtype=jnp.float32)
  weights = batch.mask / jnp.maximum(count, 1)
  return weights / jnp.maximum(rows, 1)


def clipped_loss(
  logprobs: Float[Array, 'B M'],
  batch: Batch,
  weights: Float[Array, 'B M'],
  *,
  clip: float = 0.2,
  kl: float = 0.01,
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """-sum w min(ratio A, clip(ratio) A) + kl sum w k3(reference, policy).

  `weights` sum to one over the whole batch (`per_token`, `per_sequence`), so
  that the losses of microbatches add up
  (https://arxiv.org/abs/1707.06347, equation 7; k3:
  http://joschu.net/blog/kl-approx.html).
  """
  shift = jnp.where(batch.mask, logprobs - batch.old_logprobs, 0.0)
  ratio = jnp.exp(shift)
  clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
  gain = jnp.minimum(ratio * batch.advantages, clipped * batch.advantages)
  apart = k3(logprobs, batch.reference_logprobs, batch.mask)
  total = lambda x: masked.total(weights * x, batch.mask)
  metrics = {
    'loss/policy': -total(gain),
    'loss/kl': total(apart),
    'policy/clipped': total((jnp.abs(ratio - 1) > clip).astype(ratio.dtype)),
    'policy/ratio': total(ratio),
  }
  return metrics['loss/policy'] + kl * metrics['loss/kl'], metrics


def k3(
  logprobs: Float[Array, 'B M'],
  reference: Float[Array, 'B M'],
  mask: Bool[Array, 'B M'],
) -> Float[Array, 'B M']:
  """exp(d) - d - 1 with d = log reference - log policy; at least zero."""
  apart = jnp.where(mask, reference - logprobs, 0.0)
  return jnp.exp(apart) - apart - 1
