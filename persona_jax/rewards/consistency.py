"""Persona consistency: each line against the prompt, and against earlier lines.

A judge gives a score, higher for consistent; a slope and an offset that were
fitted to labelled lines (`analysis.calibration`) turn it into the chance of
consistency. A judge that pointed the wrong way there has slope 0: its reward is
constant and trains nothing. A small slope does not make a judge valid. Where a
judge has no verdict, NaN, the reward is NaN too (`settled` gives it a number).
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from persona_jax.dialogue import POLICY
from persona_jax.shapes import Array, Bool, Float, Int


def worst(
  scores: Float[Array, 'B N N'], pairs: Bool[Array, 'B N N']
) -> Float[Array, 'B N']:
  """The least over earlier lines; one where there is none."""
  return jnp.min(scores, axis=2, where=pairs, initial=1.0)


def average(
  scores: Float[Array, 'B N N'], pairs: Bool[Array, 'B N N']
) -> Float[Array, 'B N']:
  """The mean over earlier lines; one where there is none."""
  count = jnp.sum(pairs, axis=2)
  mean = jnp.sum(scores, axis=2, where=pairs) / jnp.maximum(count, 1)
  return jnp.where(count > 0, mean, 1.0)


def prompt_to_line(judge, *, slope=1.0, offset=0.0, who: int = POLICY):
  """P(line n is consistent with the persona), zero on the other's lines.

  `judge(dialogue) -> Float[B N]` (https://arxiv.org/abs/2511.00222, section
  3: global consistency).
  """
  fit = (_f(slope), _f(offset))
  return Partial(_prompt_to_line, jnp.int32(who), judge, fit)


def line_to_line(
  judge, *, reduce=worst, slope=1.0, offset=0.0, who: int = POLICY
):
  """P(line n is consistent with the speaker's earlier lines).

  `judge(dialogue) -> Float[B N N]` scores line n (second axis) against line i
  (third). `reduce` is `worst` (the paper's minimum over the history) or
  `average` (the pair fraction of its released code). The first line of a
  speaker has no history and counts as consistent.
  """
  fit = (_f(slope), _f(offset))
  return Partial(_line_to_line, Partial(reduce), jnp.int32(who), judge, fit)


def earlier_pairs(dialogue, who: int | Int[Array, '']) -> Bool[Array, 'B N N']:
  """`[b, n, i]`: lines n and i are the speaker's, and i came first."""
  spoken = dialogue.spoken(who)
  before = jnp.tril(jnp.ones((spoken.shape[1],) * 2, bool), -1)
  return spoken[:, :, None] & spoken[:, None, :] & before[None]


def _prompt_to_line(who, judge, fit, dialogue):
  return jnp.where(dialogue.spoken(who), _chance(judge(dialogue), fit), 0.0)


def _line_to_line(reduce, who, judge, fit, dialogue):
  chance = _chance(judge(dialogue), fit)
  kept = reduce(chance, earlier_pairs(dialogue, who))
  return jnp.where(dialogue.spoken(who), kept, 0.0)


def _chance(score, fit):
  slope, offset = fit
  return jax.nn.sigmoid(slope * score + offset)


def _f(x):
  return jnp.asarray(x, jnp.float32)
