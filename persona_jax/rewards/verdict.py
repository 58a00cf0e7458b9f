"""A judge that is asked whether a line fits, and answers yes or no."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from persona_jax.dialogue import POLICY
from persona_jax.rewards import tokens as texts
from persona_jax.rewards.consistency import earlier_pairs
from persona_jax.shapes import Array, Int, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Question:
  """One way to ask: the tokens at the end, and what the answers mean."""

  tail: Int[Array, ' C']
  good: Int[Array, ' Y']  # first tokens of answers that mean it fits
  bad: Int[Array, ' Z']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verdict:
  """A chat model as a judge, and its wording as tokens (`text.wording`).

  The score is log P(it fits) - log P(it does not), averaged over questions
  that swap what the answers mean and which is named first: a taste for a word
  or a place cancels. `memory`
  gives an empty cache, `(batch, size) -> cache`: what is asked of one text is
  read after it, and the text itself once.
  """

  variables: PyTree
  head: Int[Array, ' A']  # all before the first text
  middle: Int[Array, ' M']  # between the two texts
  questions: tuple[Question, ...]
  strip: tuple[int, int] = dataclasses.field(metadata={'static': True})
  memory: Callable = dataclasses.field(metadata={'static': True})
  apply: Callable = dataclasses.field(metadata={'static': True})
  unembed: Callable = dataclasses.field(metadata={'static': True})
  who: int = dataclasses.field(default=POLICY, metadata={'static': True})


def verdict(judge: Verdict) -> Partial:
  """`Dialogue -> Float[B N]`: log-odds that a line fits the persona.

  The line is shown alone, as in https://arxiv.org/abs/2511.00222. `strip` of
  the judge says how many tokens of a prompt stand around the persona's text.
  """
  return Partial(_verdict, judge)


def pair_verdict(judge: Verdict) -> Partial:
  """`Dialogue -> Float[B N N]`: log-odds that line n agrees with line i.

  Zero where n and i are not both the speaker's, or i is not before n.
  """
  return Partial(_pair_verdict, judge)


def ask(judge: Verdict, first, second):
  """Log-odds `[B]` that `second` fits `first`: pairs of tokens and lengths."""
  room = _room(judge, second)
  return _answer(judge, _begin(judge, first, room), second)


def _begin(judge, first, room):
  """A reading of all that comes before `second`, with `room` slots more."""
  batch = first[1].shape[0]
  text = texts.joined(judge.head, first, judge.middle, batch=batch)
  memory = judge.memory(batch, text.tokens.shape[1] + room)
  _, memory = judge.apply(judge.variables, text.tokens, text.positions, memory)
  return memory, text.length


def _answer(judge, begun, second):
  """Log-odds of the answers; each part of the text is read once."""
  memory, start = begun
  _, memory, start = _read(judge, memory, start, second)
  scores = []
  for question in judge.questions:
    hidden, _, _ = _read(judge, memory, start, question.tail)
    logits = judge.unembed(judge.variables, hidden[:, -1])
    scores.append(
      jax.nn.logsumexp(logits[:, question.good], axis=1)
      - jax.nn.logsumexp(logits[:, question.bad], axis=1)
    )
  return sum(scores) / len(scores)


def _read(judge, memory, start, piece):
  text = texts.joined(piece, batch=start.shape[0])
  shifted = text.positions + start[:, None]
  positions = jnp.where(text.positions < 0, -1, shifted)
  hidden, memory = judge.apply(judge.variables, text.tokens, positions, memory)
  return hidden, memory, start + text.length


def _room(judge, second):
  tails = [question.tail.size for question in judge.questions]
  return second[0].shape[1] + max(tails)


def _verdict(judge, dialogue):
  before, after = judge.strip
  persona = dialogue.prompts[:, judge.who, before:]
  length = dialogue.prompt_length[:, judge.who] - before - after
  line = _lines(dialogue)
  begun = _begin(judge, (persona, length), _room(judge, line[0]))
  scores = jnp.zeros(dialogue.length.shape, jnp.float32)
  for n in range(judge.who, len(line), 2):
    scores = scores.at[:, n].set(_answer(judge, begun, line[n]))
  return jnp.where(dialogue.spoken(judge.who), scores, 0.0)


def _pair_verdict(judge, dialogue):
  line = _lines(dialogue)
  batch, lines = dialogue.length.shape
  scores = jnp.zeros((batch, lines, lines), jnp.float32)
  for i in range(judge.who, lines - 2, 2):
    begun = _begin(judge, line[i], _room(judge, line[i]))
    for n in range(i + 2, lines, 2):
      scores = scores.at[:, n, i].set(_answer(judge, begun, line[n]))
  return jnp.where(earlier_pairs(dialogue, judge.who), scores, 0.0)


def _lines(dialogue):
  lines = range(dialogue.tokens.shape[1])
  return [(dialogue.tokens[:, n], dialogue.body[:, n]) for n in lines]
