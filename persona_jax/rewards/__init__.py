"""Rewards: pure functions from a dialogue to a number a line.

`Reward = Dialogue -> Float[B N]`. They are `jax.tree_util.Partial`s: a judge's
weights are arguments of the compiled program, never constants in it. This
package imports with jax alone.
"""

from persona_jax.rewards.compose import (
  Reward,
  alone,
  settled,
  shuffled,
  weighted,
)
from persona_jax.rewards.consistency import (
  average,
  line_to_line,
  prompt_to_line,
  worst,
)
from persona_jax.rewards.hosted import Lines, hosted, plainly
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
  'Lines',
  'Question',
  'Reward',
  'Trained',
  'Verdict',
  'alone',
  'among_lines',
  'average',
  'hosted',
  'likelihood',
  'line_to_line',
  'pair_likelihood',
  'pair_verdict',
  'plainly',
  'prompt_to_line',
  'relations',
  'settled',
  'shuffled',
  'trained',
  'verdict',
  'weighted',
  'worst',
]
