"""An algorithm is a row: an advantage, a loss, what its mean is over."""

from collections.abc import Callable
from typing import NamedTuple

from persona_jax.learn import advantages, losses


class Algorithm(NamedTuple):
  """What tells one policy-gradient algorithm from another."""

  advantage: Callable  # (rewards [G N], mask [G N]) -> [G N]
  loss: Callable  # (logprobs, batch, weights, *, kl) -> scalar, metrics
  weights: Callable  # batch -> [B M], summing to one


ALGORITHMS = {
  'grpo': Algorithm(
    advantages.group_relative, losses.clipped_loss, losses.per_sequence
  ),
  'rloo': Algorithm(
    advantages.leave_one_out, losses.clipped_loss, losses.per_sequence
  ),
}
