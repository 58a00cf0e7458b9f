"""PRIME: a reward model that is a policy, trained on outcomes alone.

The reward of a token is beta (log model - log reference); their sum over a
reply is trained to tell good outcomes from bad ones, as the policy goes on
(https://arxiv.org/abs/2502.01456).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from persona_jax import masked
from persona_jax.learn.losses import Batch


def implicit(
  logprobs: Float[Array, '*B M'],
  reference: Float[Array, '*B M'],
  mask: Bool[Array, '*B M'],
  *,
  beta: float = 0.05,
) -> Float[Array, '*B M']:
  """beta (log model - log reference) of each token (equation 3)."""
  return beta * jnp.where(mask, logprobs - reference, 0.0)


def outcome_loss(
  logprobs: Float[Array, 'B M'],
  batch: Batch,
  weights: Float[Array, ' B'],
  *,
  beta: float = 0.05,
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """Cross-entropy of sigmoid(sum of implicit rewards) and the outcome.

  `Batch.label` is the outcome, between 0 and 1 (equation 4).
  """
  rewards = implicit(logprobs, batch.reference_logprobs, batch.mask, beta=beta)
  total = jnp.sum(rewards, axis=1)
  loss = -batch.label * jax.nn.log_sigmoid(total)
  loss -= (1 - batch.label) * jax.nn.log_sigmoid(-total)
  right = (total > 0) == (batch.label > 0.5)
  metrics = {
    'loss/process': jnp.sum(weights * loss),
    'process/right': jnp.sum(weights * right),
    'process/reward': jnp.sum(weights * total),
  }
  return metrics['loss/process'], metrics


def outcomes(
  rewards: Float[Array, 'B N'], spoken: Bool[Array, 'B N'], group: int
) -> Float[Array, ' B']:
  """1 where a dialogue earned more than the mean of its group, else 0.

  For rewards without a natural "right"; a half where all earned the same.
  """
  total = masked.total(rewards, spoken, axis=1).reshape(-1, group)
  mean = jnp.mean(total, axis=1, keepdims=True)
  return (0.5 * (1 + jnp.sign(total - mean))).reshape(-1)
