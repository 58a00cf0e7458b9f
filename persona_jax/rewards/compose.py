"""Rewards add up as transformations chain."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from persona_jax.dialogue import PARTNER, POLICY, Dialogue
from persona_jax.shapes import Array, Float, Int, Key

Reward = Callable[[Dialogue], Float[Array, 'B N']]


def weighted(terms: dict[str, tuple[float, Reward]]) -> Reward:
  """Adds rewards: `weighted({'line': (1.0, line_to_line), ...})`.

  Raises:
    ValueError: there is no term.
  """
  if not terms:
    raise ValueError('weighted({}) has no term; give at least one reward.')
  weights = {name: jnp.float32(weight) for name, (weight, _) in terms.items()}
  rewards = {name: _as_leaves(fn) for name, (_, fn) in terms.items()}
  return Partial(_add, weights, rewards)


def alone(judge: Reward, cue: Int[Array, ' Q']) -> Partial:
  """A judge that is shown each line of the policy as the answer to `cue`.

  Nothing else that was said is shown.
  """
  return Partial(_alone, judge, cue)


def shuffled(
  rewards: Float[Array, 'B N'], key: Key[Array, '']
) -> Float[Array, 'B N']:
  """A control: the same rewards, each line's dealt out to other dialogues."""
  lines = jnp.arange(rewards.shape[1])
  keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(lines)
  return jax.vmap(jax.random.permutation, in_axes=(0, 1), out_axes=1)(
    keys, rewards
  )


def settled(judge: Reward, score: float) -> Reward:
  """A judge or reward in which no verdict, NaN, counts as `score`.

  Raises:
    ValueError: `score` is not finite.
  """
  if not math.isfinite(score):
    raise ValueError(
      f'settled: score={score} is not finite; give what no verdict counts as.'
    )
  return Partial(_settle, jnp.float32(score), _as_leaves(judge))


def _alone(judge, cue, dialogue):
  batch, lines, room = dialogue.tokens.shape
  size = max(room, cue.size)
  pad = lambda x: jnp.pad(x, [(0, 0), (0, size - x.shape[-1])])
  asked = jnp.broadcast_to(pad(cue[None]), (batch, size))
  length = jnp.full(batch, cue.size, jnp.int32)

  def line(n):
    """Dialogues of two lines: the cue, and line n."""
    pair = lambda x: jnp.stack([jnp.zeros_like(x[:, n]), x[:, n]], 1)
    blank = jnp.zeros((batch, 2, size), jnp.float32)
    return dataclasses.replace(
      dialogue,
      tokens=jnp.stack([asked, pad(dialogue.tokens[:, n])], 1),
      length=jnp.stack([length, dialogue.length[:, n]], 1),
      stopped=pair(dialogue.stopped),
      logprobs=blank,
      raw_logprobs=blank,
      who=jnp.array([PARTNER, POLICY]),
      played=None,
      kept=None,
    )

  scores = jnp.zeros((batch, lines), jnp.float32)
  for n in range(POLICY, lines, 2):
    scores = scores.at[:, n].set(judge(line(n))[:, 1])
  return scores


def _as_leaves(reward):
  # A plain function is no argument of a jitted program; a Partial is.
  return reward if isinstance(reward, Partial) else Partial(reward)


def _add(weights, rewards, dialogue):
  return sum(weights[name] * rewards[name](dialogue) for name in rewards)


def _settle(score, judge, dialogue):
  scores = judge(dialogue)
  return jnp.where(jnp.isnan(scores), score, scores)
