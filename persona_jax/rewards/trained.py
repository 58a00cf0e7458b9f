"""A judge that was trained: an adapter of a chat model.

It reads a dialogue as its speaker does, once. After every line of the speaker
it says whether that line supports the persona, does neither, or contradicts.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from persona_jax import dialogue as dialogues
from persona_jax.dialogue import POLICY, Dialogue, Frame
from persona_jax.shapes import Array, Float, Int, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trained:
  """A model with the adapter of `configs/judge.py`.

  It says one of three answers after the first token of what ends a line.
  """

  variables: PyTree
  frame: Frame
  neutral: Int[Array, ' P']  # the prompt of somebody without a persona
  apply: Callable = dataclasses.field(metadata={'static': True})
  unembed: Callable = dataclasses.field(  # to supports, neutral, contradicts
    metadata={'static': True}
  )
  who: int = dataclasses.field(default=POLICY, metadata={'static': True})
  slots: int | None = dataclasses.field(  # that hold any dialogue
    default=None, metadata={'static': True}
  )


def trained(judge: Trained) -> Partial:
  """`Dialogue -> Float[B N]`: log-odds that a line does not contradict.

  With the dialogue so far in context; one pass scores all lines.
  """
  return Partial(_trained, judge)


def among_lines(judge: Trained) -> Partial:
  """`Dialogue -> Float[B N]`: log-odds that a line contradicts none before it.

  No persona is told. One pass scores each line against all of the speaker's
  own before it, as the minimum over the history does.
  """
  return Partial(_among_lines, judge)


def relations(judge: Trained, dialogue: Dialogue) -> Float[Array, 'B N 3']:
  """log P(supports, neutral, contradicts) of the speaker's lines.

  Of lines that hold no words it means nothing.
  """
  return _relations(judge, dialogue, None, None)


def _trained(judge, dialogue):
  return _odds(judge, dialogue, relations(judge, dialogue))


def _among_lines(judge, dialogue):
  batch = dialogue.tokens.shape[0]
  neutral = jnp.broadcast_to(judge.neutral, (batch, judge.neutral.size))
  length = jnp.full(batch, judge.neutral.size, jnp.int32)
  return _odds(judge, dialogue, _relations(judge, dialogue, neutral, length))


def _odds(judge, dialogue, found):
  supports, neutral, contradicts = (found[..., i] for i in range(3))
  odds = jnp.logaddexp(supports, neutral) - contradicts
  return jnp.where(dialogue.spoken(judge.who), odds, 0.0)


def _relations(judge, dialogue, prompts, length):
  dialogue = _heard(dialogue, judge.who)
  view = dialogues.view(
    dialogue, judge.who, judge.frame, prompts, length, judge.slots
  )
  hidden, _ = judge.apply(judge.variables, view.tokens, view.positions)
  ends = view.before[:, :-1, 0] + 1 + dialogue.body[:, :-1]
  ends = jnp.minimum(ends, view.tokens.shape[1] - 1)
  at = jnp.take_along_axis(hidden, ends[..., None], axis=1)
  return jax.nn.log_softmax(judge.unembed(judge.variables, at))


def _heard(dialogue, who):
  """The dialogue with one more line, so that something ends every own one.

  If the last line that was said is the speaker's, the other says one token; no
  verdict is read after that.
  """
  more = lambda x: jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))
  length = more(dialogue.length)
  others = jnp.append(dialogue.who, 1 - dialogue.who[-1])
  index = jnp.arange(others.size)[None]
  said = jnp.max(jnp.where(length > 0, index + 1, 0), axis=1, keepdims=True)
  empty = (index == said) & (others != who)[None]
  return dataclasses.replace(
    dialogue,
    tokens=more(dialogue.tokens),
    length=jnp.where(empty, 1, length),
    stopped=more(dialogue.stopped),
    logprobs=more(dialogue.logprobs),
    raw_logprobs=more(dialogue.raw_logprobs),
    who=others,
    played=None,
    kept=None,
  )
