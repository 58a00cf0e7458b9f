"""A judge that compares how likely a line is in two contexts."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from persona_jax import dialogue as dialogues
from persona_jax import masked
from persona_jax.dialogue import POLICY, Dialogue, Frame, View
from persona_jax.rewards import tokens as texts
from persona_jax.rewards.consistency import earlier_pairs
from persona_jax.shapes import Array, Int, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Likelihood:
  """A chat model as a judge, with the contexts that it compares."""

  variables: PyTree
  frame: Frame
  neutral: Int[Array, ' P']  # the prompt of somebody without a persona
  cue: Int[Array, ' Q']  # a user's line that any line may answer
  apply: Callable = dataclasses.field(metadata={'static': True})
  unembed: Callable = dataclasses.field(metadata={'static': True})
  who: int = dataclasses.field(default=POLICY, metadata={'static': True})
  slots: int | None = dataclasses.field(  # that hold any dialogue
    default=None, metadata={'static': True}
  )


def likelihood(judge: Likelihood) -> Partial:
  """`Dialogue -> Float[B N]`: log p(line | persona) - log p(line | neutral).

  Both with the dialogue so far in context, as means over the tokens of the
  line. Two passes score every line; the other speaker's lines score zero.
  """
  return Partial(_likelihood, judge)


def pair_likelihood(judge: Likelihood) -> Partial:
  """`Dialogue -> Float[B N N]`: log p(line n | line i said) - log p(line n).

  Zero where n and i are not both the speaker's, or i is not before n.
  """
  return Partial(_pair_likelihood, judge)


def _likelihood(judge, dialogue):
  batch = dialogue.tokens.shape[0]
  neutral = jnp.broadcast_to(judge.neutral, (batch, judge.neutral.size))
  length = jnp.full(batch, judge.neutral.size, jnp.int32)
  view = functools.partial(
    dialogues.view, dialogue, judge.who, judge.frame, size=judge.slots
  )
  told, untold = view(), view(neutral, length)
  gain = _own_logprobs(judge, dialogue, told)
  gain -= _own_logprobs(judge, dialogue, untold)
  scores = jnp.zeros(dialogue.length.shape, gain.dtype)
  scores = scores.at[:, judge.who :: 2].set(gain)
  return jnp.where(dialogue.spoken(judge.who), scores, 0.0)


def _own_logprobs(judge, dialogue: Dialogue, view: View):
  """Mean log-probability of each own line, one line's logits at a time."""
  hidden, _ = judge.apply(judge.variables, view.tokens, view.positions)

  def line(carry, inputs):
    before, tokens, mask = inputs
    at = jnp.take_along_axis(hidden, before[..., None], axis=1)
    logprobs = texts.logprobs(judge.unembed(judge.variables, at), tokens)
    return carry, masked.mean(logprobs, mask, axis=1)

  own = jax.tree.map(
    lambda x: jnp.moveaxis(x[:, judge.who :: 2], 1, 0),
    (view.before, dialogue.tokens, dialogue.body_mask),
  )
  return jax.lax.scan(line, None, own)[1].T


def _pair_likelihood(judge, dialogue):
  lines = dialogue.tokens.shape[1]
  scores = jnp.zeros((dialogue.tokens.shape[0], lines, lines), jnp.float32)
  own = range(judge.who, lines, 2)
  line = {n: (dialogue.tokens[:, n], dialogue.body[:, n]) for n in own}
  for n in own[1:]:
    alone = _said_after(judge, line[n])
    for i in range(judge.who, n, 2):
      gain = _said_after(judge, line[n], line[i]) - alone
      scores = scores.at[:, n, i].set(gain)
  return jnp.where(earlier_pairs(dialogue, judge.who), scores, 0.0)


def _said_after(judge, line, *earlier):
  """Mean log-probability of `line` where `earlier` lines were said."""
  tokens, length = line
  size = tokens.shape[1]
  pieces = [judge.neutral, judge.cue, judge.frame.heard_to_own]
  for said in earlier:
    pieces += [said, judge.frame.own_to_heard, judge.cue]
    pieces.append(judge.frame.heard_to_own)
  text = texts.joined(*pieces, line, batch=tokens.shape[0])
  hidden, _ = judge.apply(judge.variables, text.tokens, text.positions)
  own = hidden[:, -size:-1]  # the line fills the last slots
  before = jnp.take_along_axis(
    hidden, text.last(skip=size)[:, None, None], axis=1
  )
  logits = judge.unembed(
    judge.variables, jnp.concatenate([before, own], axis=1)
  )
  mask = jnp.arange(size)[None] < length[:, None]
  return masked.mean(texts.logprobs(logits, tokens), mask, axis=1)
