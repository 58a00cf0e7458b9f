"""Advantages: what each line or token of a batch of dialogues was worth.

Rewards, and most advantages, are a line's. `Earned` holds all that any
algorithm may ask of a batch; what none asks for is None.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from persona_jax import masked


@struct.dataclass
class Earned:
  """What the policy's N lines in B dialogues earned.

  Group r is rows [r G, (r + 1) G): the dialogues of one scenario.
  """

  rewards: Float[Array, 'B N']
  mask: Bool[Array, 'B N T']  # the tokens that the policy said
  group: int = struct.field(pytree_node=False)  # G
  values: Float[Array, 'B N T'] | None = None  # the critic's, before a token
  shift: Float[Array, 'B N T'] | None = None  # log policy - log reference
  process: Float[Array, 'B N T'] | None = None  # implicit rewards (PRIME)

  @property
  def spoken(self) -> Bool[Array, 'B N']:
    """The lines with tokens."""
    return jnp.any(self.mask, axis=2)

  def by_group(self, x: Array) -> Array:
    """`[B ...]` as `[R G ...]`."""
    return x.reshape(-1, self.group, *x.shape[1:])


@struct.dataclass
class Advantages:
  """Of each token; and what a critic should have said."""

  policy: Float[Array, 'B N T']
  returns: Float[Array, 'B N T'] | None = None


def group_relative(
  earned: Earned,
  *,
  deviation: bool = True,
  ended: bool = False,
  whole: bool = False,
  eps: float = 1e-4,
) -> Advantages:
  """(r - mean of the group) / (its deviation + eps), line by line.

  Line n is compared with line n of the other dialogues of its group; where
  only one is there, the advantage is zero. The deviation divides by G - 1, as
  in all known code (https://arxiv.org/abs/2402.03300, section 4.1.2).

  Args:
    earned: rewards of lines.
    deviation: whether to divide; not in Dr. GRPO, which it biases towards easy
      and hard scenarios (https://arxiv.org/abs/2503.20783).
    ended: whether a dialogue that has ended counts at later lines, with a
      reward of zero, as in the code of https://arxiv.org/abs/2602.12342.
    whole: whether to compare the sums of whole dialogues.
    eps: added to the deviation.
  """
  rewards, counts = _compared(earned, whole)
  if ended:
    rewards, counts = jnp.where(counts, rewards, 0), jnp.ones_like(counts)
  mean = masked.mean(rewards, counts, axis=1)[:, None]
  away = jnp.where(counts, rewards - mean, 0)
  number = jnp.sum(counts, axis=1, dtype=away.dtype)[:, None]
  if deviation:
    square = jnp.sum(away * away, axis=1)[:, None] / jnp.maximum(number - 1, 1)
    away /= jnp.sqrt(square) + eps
  return Advantages(_spread(earned, jnp.where(number > 1, away, 0)))


def leave_one_out(earned: Earned, *, whole: bool = False) -> Advantages:
  """r - mean of the others of the group, line by line.

  (https://arxiv.org/abs/2402.14740, equation 6.)
  """
  return Advantages(_spread(earned, _others(*_compared(earned, whole))))


def gae(
  earned: Earned,
  *,
  discount: float = 1.0,
  decay: float = 0.95,
  kl: float = 0.0,
  turns: bool = False,
  whiten: bool = True,
) -> Advantages:
  """Generalised advantages over the policy's own tokens, and the returns.

  A[t] = d[t] + discount decay A[t+1], d[t] = r[t] + discount V[t+1] - V[t]
  (https://arxiv.org/abs/1506.02438, equations 11 and 16), t counting the
  tokens of the dialogue in order; a line's reward is at its last token, and
  `kl` times log policy - log reference comes off at each
  (https://arxiv.org/abs/2203.02155, equation 2).

  With `turns`, t counts lines: V[n] is the value before a line's first token
  and all its tokens share its advantage. With `whiten` the advantages of the
  batch have mean zero and deviation one.
  """
  values, mask = _needed(earned, 'values'), earned.mask
  if turns:
    rewards, mask = _line_rewards(earned, kl), earned.spoken
    values = values[..., 0]
  else:
    rewards = _token_rewards(earned, kl)
  flat = lambda x: x.reshape(x.shape[0], -1).T  # [M B]

  def back(later, now):
    reward, value, counts = now
    advantage, following = later
    error = reward + discount * following - value
    new = error + discount * decay * advantage
    state = (
      jnp.where(counts, new, advantage),
      jnp.where(counts, value, following),
    )
    return state, jnp.where(counts, new, 0)

  zero = jnp.zeros(mask.shape[0], jnp.float32)
  inputs = (flat(rewards), flat(values), flat(mask))
  _, found = jax.lax.scan(back, (zero, zero), inputs, reverse=True)
  found = found.T.reshape(mask.shape)
  returns = jnp.where(mask, found + values, 0)
  if turns:
    found, returns = _at_tokens(earned, found), _at_tokens(earned, returns)
  policy = whitened(found, earned.mask) if whiten else found
  return Advantages(policy, returns)


def returns_to_go(
  earned: Earned,
  *,
  discount: float = 1.0,
  kl: float = 0.0,
  baseline: bool = False,
) -> Advantages:
  """The rewards from each token on, normalised over the batch (REINFORCE++).

  `kl` times log policy - log reference comes off at each token. With
  `baseline`, the mean of the group comes off the reward first, line by line
  (https://arxiv.org/abs/2501.03262, sections 3.1 and 3.2).
  """
  if baseline:
    rewards, counts = _compared(earned, False)
    mean = masked.mean(rewards, counts, axis=1)[:, None]
    away = jnp.where(counts, rewards - mean, 0)
    earned = earned.replace(rewards=away.reshape(earned.rewards.shape))
  found = _to_go(_token_rewards(earned, kl), earned.mask, discount)
  return Advantages(whitened(found, earned.mask))


def prime(
  earned: Earned, *, discount: float = 1.0, outcome: float = 1.0
) -> Advantages:
  """Implicit rewards to go plus the outcome, each against the other dialogues.

  A[t] = sum over s >= t of discount^(s-t) (q[s] - mean q of the others) +
  `outcome` (r - mean r of the others); q are `Earned.process`, of another
  dialogue their mean over its tokens, and r is the sum of its rewards
  (https://arxiv.org/abs/2502.01456, equation 5).
  """
  process, mask = _needed(earned, 'process'), earned.mask
  grouped = earned.by_group
  mean = masked.mean(process, mask, axis=(1, 2))
  there = jnp.any(mask, axis=(1, 2))
  rest = grouped(mean) - _others(grouped(mean), grouped(there))
  rest = rest.reshape(-1, 1, 1)
  steps = jnp.where(mask, process - rest, 0)
  alone = jnp.sum(grouped(there), axis=1)[:, None] < 2
  alone = jnp.repeat(alone, earned.group).reshape(-1, 1, 1)
  steps = jnp.where(alone, 0, steps)
  whole = leave_one_out(earned, whole=True).policy
  found = _to_go(steps, mask, discount) + outcome * whole
  return Advantages(jnp.where(mask, found, 0))


def given(earned: Earned) -> Advantages:
  """The rewards themselves, at each token of their line."""
  return Advantages(_at_tokens(earned, earned.rewards))


def whitened(
  x: Float[Array, '*B'], mask: Bool[Array, '*B'], eps: float = 1e-8
) -> Float[Array, '*B']:
  """(x - mean) / sqrt(variance + eps) over the whole batch; zero elsewhere."""
  mean = masked.mean(x, mask)
  away = jnp.where(mask, x - mean, 0)
  variance = masked.mean(away * away, mask)
  return away * jax.lax.rsqrt(variance + eps)


def idle_groups(earned: Earned) -> Float[Array, '']:
  """The share of groups whose rewards are all equal: they teach nothing."""
  rewards, counts = _compared(earned, False)
  least = jnp.min(jnp.where(counts, rewards, jnp.inf), axis=1)
  most = jnp.max(jnp.where(counts, rewards, -jnp.inf), axis=1)
  there = jnp.any(counts, axis=1)
  differ = jnp.any(there & (most > least), axis=1)
  some = jnp.any(there, axis=1)
  return masked.mean(1.0 - differ, some)


def _compared(earned, whole):
  """Rewards and what of them counts, `[R G N]`, or `[R G 1]` of dialogues."""
  spoken = earned.spoken
  rewards = jnp.where(spoken, earned.rewards, 0)
  if whole:
    rewards = jnp.sum(rewards, axis=1, keepdims=True)
    spoken = jnp.any(spoken, axis=1, keepdims=True)
  return earned.by_group(rewards), earned.by_group(spoken)


def _others(x, counts):
  """x - mean of the others of its group; zero for one alone."""
  number = jnp.sum(counts, axis=1, dtype=x.dtype)[:, None]
  rest = masked.total(x, counts, axis=1)[:, None] - x
  away = x - rest / jnp.maximum(number - 1, 1)
  return jnp.where(counts & (number > 1), away, 0)


def _spread(earned, advantages):
  """`[R G N]` or `[R G 1]` at each token of its lines."""
  flat = advantages.reshape(-1, advantages.shape[2])
  return _at_tokens(earned, jnp.broadcast_to(flat, earned.rewards.shape))


def _at_tokens(earned, lines):
  return jnp.where(
    earned.mask, jnp.broadcast_to(lines[..., None], earned.mask.shape), 0
  )


def _token_rewards(earned, kl):
  """Each line's reward at its last token, less `kl` times the shift."""
  mask, size = earned.mask, earned.mask.shape[2]
  slot = jnp.arange(size)[None, None]
  last = jnp.max(jnp.where(mask, slot, -1), axis=2)
  at_end = slot == last[..., None]
  rewards = jnp.where(at_end, earned.rewards[..., None], 0)
  if kl:
    rewards -= kl * jnp.where(mask, _needed(earned, 'shift'), 0)
  return rewards


def _line_rewards(earned, kl):
  return jnp.sum(_token_rewards(earned, kl), axis=2)


def _to_go(rewards, mask, discount):
  """Sums from each of the policy's tokens to the end of the dialogue."""
  flat = lambda x: x.reshape(x.shape[0], -1).T

  def back(later, now):
    reward, counts = now
    total = jnp.where(counts, reward + discount * later, later)
    return total, total

  zero = jnp.zeros(rewards.shape[0], jnp.float32)
  _, found = jax.lax.scan(back, zero, (flat(rewards), flat(mask)), reverse=True)
  return found.T.reshape(rewards.shape)


def _needed(earned, name):
  found = getattr(earned, name)
  if found is None:
    raise ValueError(
      f'the advantage needs `Earned.{name}` and has none; give it, or take an '
      'algorithm that does not.'
    )
  return found
