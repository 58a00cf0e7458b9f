"""Rewards: pure functions from a dialogue to a number a line.

`Reward = Dialogue -> Float[B N]`. They are `jax.tree_util.Partial`s: a judge's
weights are arguments of the compiled program, never constants in it. This
package imports with jax alone.
"""

from persona_jax.rewards.compose import Reward, alone, shuffled, weighted
from persona_jax.rewards.consistency import (
  average,
  line_to_line,
  prompt_to_line,
  worst,
)
from persona_jax.rewards.likelihood import (
  Likelihood,
  likelihood,
  pair_likelihood,
)
from persona_jax.rewards.trained import (
  Trained,
  among_lines,
  relations,
  trained,
)
from persona_jax.rewards.verdict import (
  Question,
  Verdict,
  pair_verdict,
  verdict,
)

__all__ = [
  'Likelihood',
  'Question',
  'Reward',
  'Trained',
  'Verdict',
  'alone',
  'among_lines',
  'average',
  'likelihood',
  'line_to_line',
  'pair_likelihood',
  'pair_verdict',
  'prompt_to_line',
  'relations',
  'shuffled',
  'trained',
  'verdict',
  'weighted',
  'worst',
]
