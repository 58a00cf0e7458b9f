"""Losses on log-probabilities: `loss(logprobs, batch, weights, ...)`.

Each is a sum over tokens or rows with weights that sum to one over the whole
batch (`per_token` and its kind; `per_slot` to the share of slots in use), so
that the losses, gradients and metrics of microbatches add up to what one batch
gives.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from persona_jax import masked


@struct.dataclass
class Batch:
  """What an update reads: texts, and M tokens to learn from in each.

  B is one axis of dialogues, or two: pairs of a chosen and a rejected one.
  """

  tokens: Int[Array, '*B S']
  positions: Int[Array, '*B S']
  before: Int[Array, '*B M']  # the slot that predicts token m
  actions: Int[Array, '*B M']
  mask: Bool[Array, '*B M']
  advantages: Float[Array, '*B M']  # a line's, at each of its tokens
  old_logprobs: Float[Array, '*B M']  # before the first update
  reference_logprobs: Float[Array, '*B M']  # of the start
  line: Int[Array, '*B M'] | None = None  # of the row, from 0 to M - 1
  correction: Float[Array, '*B M'] | None = None  # `truncated`
  returns: Float[Array, '*B M'] | None = None
  old_values: Float[Array, '*B M'] | None = None
  label: Float[Array, '*B'] | None = None  # 1: desirable, 0: not
  anchor: Float[Array, '*B'] | None = None  # KTO's reference point


def per_token(batch: Batch) -> Float[Array, '*B M']:
  """Weights that make a sum over the batch a mean over its tokens."""
  count = jnp.sum(batch.mask, dtype=jnp.float32)
  return batch.mask / jnp.maximum(count, 1)


def per_sequence(batch: Batch) -> Float[Array, '*B M']:
  """Weights of a mean over sequences of the means over their tokens."""
  count = jnp.sum(batch.mask, axis=-1, keepdims=True, dtype=jnp.float32)
  rows = jnp.sum(jnp.any(batch.mask, axis=-1), dtype=jnp.float32)
  weights = batch.mask / jnp.maximum(count, 1)
  return weights / jnp.maximum(rows, 1)


def per_slot(batch: Batch) -> Float[Array, '*B M']:
  """Weights of a sum over tokens divided by the room for them.

  Long replies weigh no less a token than short ones (Dr. GRPO,
  https://arxiv.org/abs/2503.20783).
  """
  return batch.mask / jnp.float32(batch.mask.size)


def per_row(batch: Batch) -> Float[Array, ' B']:
  """Weights of a mean over rows, or pairs, that hold tokens in every part."""
  some = jnp.any(batch.mask, axis=-1)
  whole = jnp.all(some.reshape(some.shape[0], -1), axis=1)
  return whole / jnp.maximum(jnp.sum(whole, dtype=jnp.float32), 1)


def clipped_loss(
  logprobs: Float[Array, 'B M'],
  batch: Batch,
  weights: Float[Array, 'B M'],
  *,
  clip: float = 0.2,
  clip_high: float | None = None,
  dual: float | None = None,
  lines: bool = False,
  kl: float = 0.01,
  kl_kind: str = 'k3',
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """-sum w min(ratio A, clip(ratio) A) + kl sum w k(reference, policy).

  (https://arxiv.org/abs/1707.06347, equation 7.)

  Args:
    logprobs: of the policy that is trained.
    batch: with advantages and old log-probabilities.
    weights: sum to one over the whole batch.
    clip: the ratio counts from 1 - clip on.
    clip_high: and up to 1 + clip_high, by default the same; DAPO lets it go
      higher (https://arxiv.org/abs/2503.14476, equation 10).
    dual: the most that a ratio may weigh where the advantage is negative
      (https://arxiv.org/abs/1912.09729, equation 5).
    lines: one ratio for all tokens of a line, the geometric mean of theirs
      (GSPO, https://arxiv.org/abs/2507.18071, equation 7).
    kl: weight of the distance to the reference.
    kl_kind: its estimator, one of `DISTANCES`.
  """
  shift = jnp.where(batch.mask, logprobs - batch.old_logprobs, 0.0)
  if lines:
    shift = line_means(shift, batch)
  ratio = jnp.exp(shift)
  high = clip if clip_high is None else clip_high
  bounded = jnp.clip(ratio, 1 - clip, 1 + high)
  gain = jnp.minimum(ratio * batch.advantages, bounded * batch.advantages)
  if dual is not None:
    least = dual * batch.advantages
    gain = jnp.where(batch.advantages < 0, jnp.maximum(gain, least), gain)
  beyond = jnp.where(batch.advantages > 0, ratio > 1 + high, ratio < 1 - clip)
  beyond &= batch.advantages != 0
  return _regularised(
    gain, ratio, beyond, logprobs, batch, weights, kl, kl_kind
  )


def weighted_loss(
  logprobs: Float[Array, 'B M'],
  batch: Batch,
  weights: Float[Array, 'B M'],
  *,
  most: float = 5.0,
  least: float = 0.0,
  kl: float = 0.0,
  kl_kind: str = 'k3',
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """-sum w constant(clip(ratio, least, most)) A logprob (CISPO).

  No token loses its gradient: its weight alone is bounded
  (https://arxiv.org/abs/2506.13585, equation 4).
  """
  shift = jnp.where(batch.mask, logprobs - batch.old_logprobs, 0.0)
  ratio = jax.lax.stop_gradient(jnp.exp(shift))
  own = jnp.where(batch.mask, logprobs, 0.0)
  gain = jnp.clip(ratio, least, most) * batch.advantages * own
  beyond = (ratio > most) | (ratio < least)
  return _regularised(
    gain, ratio, beyond, logprobs, batch, weights, kl, kl_kind
  )


def reinforce_loss(
  logprobs: Float[Array, 'B M'],
  batch: Batch,
  weights: Float[Array, 'B M'],
  *,
  kl: float = 0.0,
  kl_kind: str = 'k3',
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """-sum w A logprob: the policy gradient, for one update a rollout."""
  shift = jnp.where(batch.mask, logprobs - batch.old_logprobs, 0.0)
  ratio = jax.lax.stop_gradient(jnp.exp(shift))
  gain = batch.advantages * jnp.where(batch.mask, logprobs, 0.0)
  never = jnp.zeros_like(batch.mask)
  return _regularised(gain, ratio, never, logprobs, batch, weights, kl, kl_kind)


def imitation_loss(
  logprobs: Float[Array, 'B M'],
  batch: Batch,
  weights: Float[Array, 'B M'],
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """-sum w logprob: supervised fine-tuning."""
  loss = -masked.total(weights * logprobs, batch.mask)
  return loss, {'loss/imitation': loss}


def value_loss(
  values: Float[Array, 'B M'],
  batch: Batch,
  weights: Float[Array, 'B M'],
  *,
  clip: float | None = 0.2,
) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
  """sum w max((v - R)^2, (clipped v - R)^2) / 2, v near its old value.

  (The clipping is of the reference code of https://arxiv.org/abs/1707.06347.)
  Its metrics give the explained variance (`summary`).
  """
  returns = jnp.where(batch.mask, batch.returns, 0.0)
  old = jnp.where(batch.mask, batch.old_values, 0.0)
  values = jnp.where(batch.mask, values, 0.0)
  square = jnp.square(values - returns)
  if clip is not None:
    near = old + jnp.clip(values - old, -clip, clip)
    square = jnp.maximum(square, jnp.square(near - returns))
  total = lambda x: masked.total(weights * x, batch.mask)
  loss = 0.5 * total(square)
  return loss, {
    'loss/value': loss,
    'value/error': total(jnp.square(old - returns)),
    'value/bias': total(old - returns),
    'value/return': total(returns),
    'value/return_squared': total(jnp.square(returns)),
  }


def truncated(
  old: Float[Array, '*B M'],
  sampled: Float[Array, '*B M'],
  mask: Bool[Array, '*B M'],
  most: float = 2.0,
) -> Float[Array, '*B M']:
  """min(policy / sampler, most): importance weights for what another sampled.

  The sampler may be older than the policy, or compute in other numbers
  (truncated importance sampling, as in https://fengyao.notion.site/off-policy-rl).
  """
  shift = jnp.where(mask, old - sampled, 0.0)
  return jnp.minimum(jnp.exp(shift), most)


def summary(metrics: dict[str, Float[Array, '']]) -> dict:
  """`metrics` of a whole batch, with what is no sum over it.

  What is told of the policy becomes a mean, whatever the weights sum to.
  `policy/effective` is (sum w ratio)^2 / sum w ratio^2, one where all ratios
  are; `value/explained` 1 - var(return - value) / var(return).
  """
  metrics = dict(metrics)
  if 'policy/weight' in metrics:
    weight = jnp.maximum(metrics.pop('policy/weight'), _TINY)
    metrics |= {k: metrics[k] / weight for k in _MEANS & set(metrics)}
  if 'policy/ratio_squared' in metrics:
    square = metrics.pop('policy/ratio_squared')
    ratio = metrics['policy/ratio']
    metrics['policy/effective'] = ratio**2 / jnp.maximum(square, _TINY)
  if 'value/return_squared' in metrics:
    error, bias = metrics.pop('value/error'), metrics.pop('value/bias')
    square = metrics.pop('value/return_squared')
    variance = square - metrics['value/return'] ** 2
    left = error - bias**2
    metrics['value/explained'] = 1 - left / jnp.maximum(variance, _TINY)
  return metrics


def line_means(x: Float[Array, 'B M'], batch: Batch) -> Float[Array, 'B M']:
  """The mean over its line at each token; the row is the line without any."""
  if batch.line is None:
    mean = masked.mean(x, batch.mask, axis=1)[:, None]
    return jnp.where(batch.mask, jnp.broadcast_to(mean, x.shape), 0)
  size = x.shape[1]

  def means(x, mask, line):
    place = jnp.where(mask, line, size)
    add = lambda x: jnp.zeros(size).at[place].add(x, mode='drop')
    mean = add(x) / jnp.maximum(add(mask.astype(x.dtype)), 1)
    return jnp.where(mask, mean[line], 0)

  return jax.vmap(means)(x, batch.mask, batch.line)


def k1(logprobs, reference, mask) -> Float[Array, '*B M']:
  """log policy - log reference: its mean is the distance, its gradient none."""
  return jnp.where(mask, logprobs - reference, 0.0)


def k2(logprobs, reference, mask) -> Float[Array, '*B M']:
  """(log policy - log reference)^2 / 2: its gradient is the distance's."""
  return 0.5 * jnp.square(k1(logprobs, reference, mask))


def k3(logprobs, reference, mask) -> Float[Array, '*B M']:
  """exp(d) - d - 1 with d = log reference - log policy; at least zero."""
  apart = jnp.where(mask, reference - logprobs, 0.0)
  return jnp.exp(apart) - apart - 1


# http://joschu.net/blog/kl-approx.html
DISTANCES = {'k1': k1, 'k2': k2, 'k3': k3}


def _regularised(gain, ratio, beyond, logprobs, batch, weights, kl, kl_kind):
  """The loss of a `gain` at each token, and what is told of it."""
  if batch.correction is not None:
    gain *= batch.correction
  apart = DISTANCES[kl_kind](logprobs, batch.reference_logprobs, batch.mask)
  total = lambda x: masked.total(weights * x, batch.mask)
  metrics = {
    'loss/policy': -total(gain),
    'loss/kl': total(apart),
    'policy/weight': total(jnp.ones_like(ratio)),
    'policy/clipped': total(beyond.astype(jnp.float32)),
    'policy/ratio': total(ratio),
    'policy/ratio_squared': total(jnp.square(ratio)),
  }
  return metrics['loss/policy'] + kl * metrics['loss/kl'], metrics


_MEANS = {
  'policy/clipped',
  'policy/entropy',
  'policy/ratio',
  'policy/ratio_squared',
}
_TINY = 1e-12
