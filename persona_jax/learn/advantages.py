"""Advantages within a group: the G dialogues of one scenario."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from persona_jax import masked

_EPS = 1e-4  # of rewards whose deviation is of order 0.1


def group_relative(
  rewards: Float[Array, 'G N'], mask: Bool[Array, 'G N']
) -> Float[Array, 'G N']:
  """(r - mean of the group) / (its deviation + 1e-4), line by line.

  Line n is compared with line n of the other dialogues of the group; where
  only one is there the advantage is zero. `jax.vmap` it over groups
  (https://arxiv.org/abs/2402.03300, equation 3).
  """
  mean = masked.mean(rewards, mask, axis=0)[None]
  deviation = masked.std(rewards, mask, axis=0)[None]
  return _where_compared((rewards - mean) / (deviation + _EPS), mask)


def leave_one_out(
  rewards: Float[Array, 'G N'], mask: Bool[Array, 'G N']
) -> Float[Array, 'G N']:
  """r - mean of the others of the group, line by line.

  (https://arxiv.org/abs/2402.14740, equation 6.)
  """
  others = jnp.sum(mask, axis=0, dtype=rewards.dtype)[None] - 1
  rest = masked.total(rewards, mask, axis=0)[None] - rewards
  return _where_compared(rewards - rest / jnp.maximum(others, 1), mask)


def _where_compared(advantages, mask):
  compared = mask & (jnp.sum(mask, axis=0)[None] > 1)
  return jnp.where(compared, advantages, 0.0)
