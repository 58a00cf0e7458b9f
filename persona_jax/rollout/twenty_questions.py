"""20 Questions with a table for an oracle: exact answers, exact beliefs.

Questions are counted from 0: the A attributes, then a guess of each of the O
objects, Q = A + O in all. A guess is a question that one object answers with
yes, so what is known after any question is the set of objects that answer all
questions as the secret does.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from persona_jax.rollout.environment import Heard, Outcome
from persona_jax.rollout.phrases import Phrases, normalised

WORDS = {
  'yes': 'Yes',
  'no': 'No',
  'invalid': 'That is not a valid question.',
  'repeated': 'You have asked that before.',
  'finished': 'Correct!',
}
YES, NO, INVALID, REPEATED, FINISHED = range(5)  # rows of `words`
_SUBJECTS = (
  'it',
  'this',
  'the object',
  'this object',
  'your object',
  'the secret object',
  'the item',
  'the thing',
  'the secret',
  'the answer',
)
_NOUNS = ('{}', 'a {}', 'an {}', 'the {}', 'some {}', 'a pair of {}')
_GUESSES = (
  *(f'is {subject} {{}}' for subject in _SUBJECTS),
  *(f'{verb} it be {{}}' for verb in ('could', 'can', 'might', 'would')),
  'are you thinking of {}',
  'my guess is {}',
  'my final guess is {}',
  'my guess is that it is {}',
  'the answer is {}',
  'i guess {}',
  'i guess it is {}',
  'i think it is {}',
)


@dataclasses.dataclass(frozen=True)
class Table:
  """O objects, A attributes with the ways to ask for them, and who has which.

  The first way to ask is the canonical one.
  """

  objects: tuple[str, ...]
  articles: tuple[str, ...]
  attributes: tuple[str, ...]
  asks: tuple[tuple[str, ...], ...]
  answers: np.ndarray  # bool [O A]

  def ask(self, attribute: int) -> str:
    """The question for an attribute."""
    return f'{self.asks[attribute][0].capitalize()}?'

  def guess(self, thing: int) -> str:
    """The question whether it is this object."""
    noun = f'{self.articles[thing]} {self.objects[thing]}'
    return f'Is it {noun.strip()}?'

  def questions(self) -> list[str]:
    """All Q questions."""
    asked = [self.ask(i) for i in range(len(self.attributes))]
    return asked + [self.guess(i) for i in range(len(self.objects))]

  def replies(self) -> np.ndarray:
    """What each object answers to each question, bool `[O Q]`."""
    own = np.eye(len(self.objects), dtype=bool)
    return np.concatenate([self.answers, own], axis=1)

  def phrasings(self) -> dict[str, int]:
    """The letters of everything that is understood, and which question it is.

    Beside the ways to ask and guesses with the object's own article there are
    variants of them, except those of two meanings ('a corn' and 'acorn').

    Raises:
      ValueError: a way to ask has no letters, or two meanings.
    """
    known, variants = {}, {}
    for text, question in self._ways():
      letters = normalised(text)
      if not letters:
        raise ValueError(f'{text!r} has no letters to know it by; reword it.')
      if known.setdefault(letters, question) != question:
        names = [*self.attributes, *self.objects]
        raise ValueError(
          f'{text!r} asks for {names[question]!r} and for '
          f'{names[known[letters]]!r}; reword one of them.'
        )
    for text, question in self._variants():
      variants.setdefault(normalised(text), set()).add(question)
    clear = {text: min(own) for text, own in variants.items() if len(own) == 1}
    return clear | known

  def _ways(self) -> Iterator[tuple[str, int]]:
    for i, asks in enumerate(self.asks):
      yield from ((ask, i) for ask in asks)
    for i, name in enumerate(self.objects):
      noun = f'{self.articles[i]} {name}'
      yield from _guesses_of(noun, len(self.asks) + i)

  def _variants(self) -> Iterator[tuple[str, int]]:
    for i, asks in enumerate(self.asks):
      for ask in asks:
        for subject in _SUBJECTS:
          yield re.sub(r'\bit\b', subject, ask, count=1), i
    for i, name in enumerate(self.objects, len(self.asks)):
      for noun in _NOUNS:
        yield from _guesses_of(noun.format(name), i)


def table() -> Table:
  """The table that ships with the package."""
  home = resources.files('persona_jax.rollout') / 'data'
  data = json.loads((home / 'twenty_questions.json').read_text('utf-8'))
  objects, attributes = data['objects'], data['attributes']
  names = [row['name'] for row in attributes]
  column = {name: i for i, name in enumerate(names)}
  answers = np.zeros((len(objects), len(names)), bool)
  for i, row in enumerate(objects):
    answers[i, [column[name] for name in row['yes']]] = True
  return Table(
    objects=tuple(row['name'] for row in objects),
    articles=tuple(row['article'] for row in objects),
    attributes=tuple(names),
    asks=tuple(tuple(row['asks']) for row in attributes),
    answers=answers,
  )


@struct.dataclass
class Game:
  """Where a game stands."""

  secret: Int[Array, '*B']
  asked: Bool[Array, '*B Q']
  possible: Bool[Array, '*B O']  # candidates that answer as the secret did
  solved: Bool[Array, '*B']
  turns: Int[Array, '*B']
  invalid: Int[Array, '*B']
  repeated: Int[Array, '*B']
  history: Float[Array, '*B N']  # log b_t of the secret, the last one repeated

  @property
  def belief(self) -> Float[Array, '*B O']:
    """The log-posterior over the objects: uniform over the possible ones."""
    count = jnp.sum(self.possible, axis=-1, keepdims=True, dtype=jnp.float32)
    return jnp.where(self.possible, -jnp.log(count), -jnp.inf)


@struct.dataclass
class TwentyQuestions:
  """A game of 20 Questions; `task` is the index of the secret object.

  A line is understood as `Phrases` says, or invalid. The terms of the reward
  are those of Delta-Belief-RL, but a turn is told before the end is known, so
  the paper's `r_eog` (winning, and a cost a turn unless there was only one) is
  here the sum over the turns, where the paper adds it to every turn. With
  `belief_weight` (the paper's lambda is 0.1) a turn that does not win is worth
  the rise of log b_t too, of the exact belief and not of the model's own.
  """

  phrases: Phrases
  answers: Bool[Array, '*B O Q']
  words: Int[Array, '*B 5 T']
  length: Int[Array, '*B 5']
  candidates: Bool[Array, '*B O']
  win: Float[Array, '*B']
  turn_cost: Float[Array, '*B']
  invalid_cost: Float[Array, '*B']
  repeated_cost: Float[Array, '*B']
  belief_weight: Float[Array, '*B']
  turns: int = struct.field(pytree_node=False)

  @classmethod
  def of(
    cls,
    table: Table,
    pieces: Sequence[bytes],
    encode: Callable[[str], Sequence[int]],
    *,
    tokens: int,
    turns: int = 20,
    words: Mapping[str, str] = WORDS,
    candidates: Sequence[int] | None = None,
    win: float = 2.0,
    turn_cost: float = 0.05,
    invalid_cost: float = 5.0,
    repeated_cost: float = 1.0,
    belief_weight: float = 0.0,
  ):
    """The game for tokens that add `pieces` (`text.pieces.token_bytes`).

    Args:
      table: what there is to find, and to ask.
      pieces: the bytes of each token.
      encode: the token ids of a text, without control tokens.
      tokens: most tokens of a line, as of the rollout.
      turns: most questions of a game.
      words: what the oracle says, by the names of `WORDS`.
      candidates: the objects that a secret may be, by default all.
      win: for the turn that finds the secret.
      turn_cost: for every turn.
      invalid_cost: for a line that is not understood.
      repeated_cost: for a question that was asked before.
      belief_weight: for each nat that log b_t rises.

    Raises:
      ValueError: words do not fit a line, or a phrasing is not clear.
    """
    rows = [list(encode(words[name])) for name in WORDS]
    for name, row in zip(WORDS, rows, strict=True):
      if not 0 < len(row) <= tokens:
        raise ValueError(
          f'the words {words[name]!r} ({name}) take {len(row)} tokens, and a '
          f'line has 1 to {tokens}; allow more tokens, or say it otherwise.'
        )
    may = np.ones(len(table.objects), bool)
    if candidates is not None:
      may = np.isin(np.arange(may.size), candidates)
    number = lambda x: jnp.asarray(x, jnp.float32)
    return cls(
      phrases=Phrases.of(table.phrasings(), pieces),
      answers=jnp.asarray(table.replies()),
      words=jnp.asarray(
        [row + [0] * (tokens - len(row)) for row in rows], jnp.int32
      ),
      length=jnp.asarray([len(row) for row in rows], jnp.int32),
      candidates=jnp.asarray(may),
      win=number(win),
      turn_cost=number(turn_cost),
      invalid_cost=number(invalid_cost),
      repeated_cost=number(repeated_cost),
      belief_weight=number(belief_weight),
      turns=turns,
    )

  def reset(self, key: Any, task: Int[Array, '']) -> Game:
    """Nothing asked, and every candidate possible."""
    del key
    none = jnp.zeros((), jnp.int32)
    game = Game(
      secret=jnp.asarray(task, jnp.int32),
      asked=jnp.zeros(self.answers.shape[1], bool),
      possible=self.candidates,
      solved=jnp.zeros((), bool),
      turns=none,
      invalid=none,
      repeated=none,
      history=jnp.zeros(self.turns + 1, jnp.float32),
    )
    return self._noted(game)

  def step(self, key: Any, state: Game, heard: Heard) -> Outcome:
    """Answers a question."""
    del key
    question = self.phrases.find(heard.tokens, heard.length)
    objects, questions = self.answers.shape
    valid = question >= 0
    this = jnp.arange(questions) == question
    again = jnp.any(state.asked & this)
    fresh = valid & ~again
    answers = self.answers[:, question]
    yes = answers[state.secret]
    solved = fresh & yes & (question >= questions - objects)
    told = [~valid, again, solved, yes]
    reply = jnp.select(told, [INVALID, REPEATED, FINISHED, YES], NO)
    after = self._noted(
      state.replace(
        asked=state.asked | this,
        possible=state.possible & (~fresh | (answers == yes)),
        solved=state.solved | solved,
        turns=state.turns + 1,
        invalid=state.invalid + ~valid,
        repeated=state.repeated + again,
      )
    )
    truncated = ~after.solved & (after.turns >= self.turns)
    return Outcome(
      state=after,
      words=self.words[reply],
      length=self.length[reply],
      reward=self._reward(state, after, solved, solved | truncated),
      terminated=after.solved,
      truncated=truncated,
    )

  def _noted(self, game):
    """`game` with the belief in the secret, for this turn and later ones."""
    now = game.belief[game.secret]
    past = jnp.arange(self.turns + 1) < game.turns
    return game.replace(history=jnp.where(past, game.history, now))

  def _reward(self, before, after, solved, ended):
    was, now = before.belief[before.secret], after.belief[after.secret]
    # A secret that is no candidate is never believed in.
    rise = jnp.where(now > -jnp.inf, jnp.maximum(now - was, 0.0), 0.0)
    only = ended & (after.turns == 1)
    return (
      self.win * solved
      - self.turn_cost * ~only
      - self.invalid_cost * (after.invalid - before.invalid)
      - self.repeated_cost * (after.repeated - before.repeated)
      + self.belief_weight * jnp.where(solved, 0.0, rise)
    )


def greedy(
  answers: Bool[Array, 'O Q'], possible: Bool[Array, ' O']
) -> Int[Array, '']:
  """The question that tells most: the answer nearest to an even chance.

  Of those that tell the same, the guess of a possible object comes first.
  """
  yes, count = _split(answers, possible)
  told = jnp.minimum(yes, count - yes)
  return jnp.argmax(2 * told + _guesses(answers, possible))


def at_random(
  key: Key[Array, ''],
  answers: Bool[Array, 'O Q'],
  possible: Bool[Array, ' O'],
) -> Int[Array, '']:
  """Any attribute that tells the possible objects apart; a guess of the last.

  Without such an attribute it guesses any possible object.
  """
  yes, count = _split(answers, possible)
  attribute = jnp.arange(yes.size) < yes.size - possible.size
  telling = attribute & (yes > 0) & (yes < count)
  guesses = _guesses(answers, possible)
  choices = jnp.where(jnp.any(telling), telling, guesses)
  return jax.random.categorical(key, jnp.where(choices, 0.0, -jnp.inf))


def _guesses_of(noun: str, question: int) -> Iterator[tuple[str, int]]:
  return ((guess.format(noun), question) for guess in _GUESSES)


def _split(answers, possible):
  """How many of the possible objects say yes to each question, of how many."""
  possible = possible.astype(jnp.int32)
  return possible @ answers.astype(jnp.int32), jnp.sum(possible)


def _guesses(answers, possible):
  """Which questions guess a possible object."""
  return jnp.pad(possible, (answers.shape[1] - possible.size, 0))
