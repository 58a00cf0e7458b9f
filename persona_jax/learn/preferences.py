"""Preference losses: `loss(logprobs, batch, weights, ...)` on pairs of replies.

The arrays of a batch of pairs are `[B 2 ...]`, the chosen reply first; weights
are `losses.per_row`. KTO takes single replies, `[B ...]`, with labels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from persona_jax import masked
from persona_jax.learn.losses import Batch


class Pair(NamedTuple):
  """Log-probabilities of the chosen and the rejected reply."""

  chosen: Float[Array, ' B']
  rejected: Float[Array, ' B']

  @property
  def margin(self) -> Float[Array, ' B']:
    """How much likelier the chosen one is."""
    return self.chosen - self.rejected


def pair(
  logprobs: Float[Array, 'B 2 M'], batch: Batch, *, mean: bool = False
) -> Pair:
  """Sums, or means, over the tokens of each reply."""
  reduce = masked.mean if mean else masked.total
  found = reduce(logprobs, batch.mask, axis=2)
  return Pair(found[:, 0], found[:, 1])


def dpo_loss(
  logprobs: Float[Array, 'B 2 M'],
  batch: Batch,
  weights: Float[Array, ' B'],
  *,
  beta: float = 0.1,
  smoothing: float = 0.0,
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """-log sigmoid(beta (margin - reference margin)).

  (https://arxiv.org/abs/2305.18290, equation 7.) A share `smoothing` of the
  labels is taken to be wrong (https://arxiv.org/abs/2305.18290v3, appendix).
  """
  policy, reference = pair(logprobs, batch), _reference(batch)
  reward = beta * (policy.margin - reference.margin)
  loss = -(1 - smoothing) * jax.nn.log_sigmoid(reward)
  loss -= smoothing * jax.nn.log_sigmoid(-reward)
  return _told(loss, reward, policy, weights)


def ipo_loss(
  logprobs: Float[Array, 'B 2 M'],
  batch: Batch,
  weights: Float[Array, ' B'],
  *,
  beta: float = 0.1,
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """(margin - reference margin - 1 / (2 beta))^2, of means over tokens.

  (https://arxiv.org/abs/2310.12036, equation 17; means, as its authors advise
  for replies of different lengths.)
  """
  policy = pair(logprobs, batch, mean=True)
  reference = _reference(batch, mean=True)
  apart = policy.margin - reference.margin
  loss = jnp.square(apart - 1 / (2 * beta))
  return _told(loss, beta * apart, policy, weights)


def simpo_loss(
  logprobs: Float[Array, 'B 2 M'],
  batch: Batch,
  weights: Float[Array, ' B'],
  *,
  beta: float = 2.0,
  margin: float = 1.0,
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """-log sigmoid(beta (mean margin) - margin), without a reference.

  (https://arxiv.org/abs/2405.14734, equation 6; `margin` is its gamma.)
  """
  policy = pair(logprobs, batch, mean=True)
  reward = beta * policy.margin
  loss = -jax.nn.log_sigmoid(reward - margin)
  return _told(loss, reward, policy, weights)


def orpo_loss(
  logprobs: Float[Array, 'B 2 M'],
  batch: Batch,
  weights: Float[Array, ' B'],
  *,
  beta: float = 0.1,
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """-(mean chosen) - beta log sigmoid(log odds ratio), without a reference.

  odds = p / (1 - p) of a reply's mean log-probability
  (https://arxiv.org/abs/2403.07691, equations 4 to 7; `beta` is its lambda).
  """
  policy = pair(logprobs, batch, mean=True)
  # A reply of probability one would have infinite odds.
  near = lambda x: jnp.minimum(x, -_SURE)
  rest = lambda x: jnp.log(-jnp.expm1(near(x)))
  odds = policy.margin - (rest(policy.chosen) - rest(policy.rejected))
  loss = -policy.chosen - beta * jax.nn.log_sigmoid(odds)
  return _told(loss, beta * odds, policy, weights)


def kto_loss(
  logprobs: Float[Array, 'B M'],
  batch: Batch,
  weights: Float[Array, ' B'],
  *,
  beta: float = 0.1,
  desirable: float = 1.0,
  undesirable: float = 1.0,
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """lambda (1 - sigmoid(beta (r - z))), for undesirable replies z - r.

  r is log policy - log reference of the reply, z (`Batch.anchor`, see `anchor`)
  the distance between the two on replies to other prompts, at least zero
  (https://arxiv.org/abs/2402.01306, equation 8).
  """
  apart = jnp.where(batch.mask, logprobs - batch.reference_logprobs, 0.0)
  reward = jnp.sum(apart, axis=1)
  good = batch.label > 0.5
  gain = jnp.where(good, reward - batch.anchor, batch.anchor - reward)
  scale = jnp.where(good, desirable, undesirable)
  loss = scale * (1 - jax.nn.sigmoid(beta * gain))
  total = lambda x: jnp.sum(weights * x)
  share = jnp.maximum(total(good.astype(jnp.float32)), _TINY)
  metrics = {
    'loss/preference': total(loss),
    'preference/right': total((gain > 0).astype(jnp.float32)),
    'preference/desirable': total(jnp.where(good, beta * reward, 0)) / share,
    'preference/anchor': total(batch.anchor),
  }
  return metrics['loss/preference'], metrics


def anchor(
  logprobs: Float[Array, 'B M'],
  reference: Float[Array, 'B M'],
  mask: Bool[Array, 'B M'],
) -> Float[Array, '']:
  """KTO's z: the mean of log policy - log reference, at least zero.

  Of replies to other prompts than their own, under the policy as it is now; a
  constant of the loss.
  """
  apart = masked.total(logprobs - reference, mask, axis=1)
  some = jnp.any(mask, axis=1)
  mean = jnp.maximum(masked.mean(apart, some), 0)
  return jax.lax.stop_gradient(mean)


def _reference(batch, mean=False):
  return pair(batch.reference_logprobs, batch, mean=mean)


def _told(loss, reward, policy, weights):
  """The mean of a loss of pairs, and what is told of it."""
  total = lambda x: jnp.sum(weights * x)
  metrics = {
    'loss/preference': total(loss),
    'preference/right': total((reward > 0).astype(jnp.float32)),
    'preference/margin': total(reward),
    'preference/chosen': total(policy.chosen),
    'preference/rejected': total(policy.rejected),
  }
  return metrics['loss/preference'], metrics


_SURE = 1e-6
_TINY = 1e-12
