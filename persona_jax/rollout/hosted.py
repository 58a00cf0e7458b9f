"""Dialogues with seats that the host speaks for: in Python, or by a server.

The compiled loop runs until every lane waits; the host then gives a line to
each of those that wait for a seat of its own, in words.
"""

import collections
import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key

from persona_jax import remote
from persona_jax.dialogue import Dialogue, Frame
from persona_jax.remote import Answer
from persona_jax.rollout import lanes as lanes_
from persona_jax.rollout.converse import (
  PLAN,
  Stage,
  begin,
  finish,
  go,
  stage,
  supply,
)
from persona_jax.rollout.lanes import WAITING, Line
from persona_jax.rollout.loop import Talk
from persona_jax.rollout.speaker import Scenario, Speaker


class Turn(NamedTuple):
  """A dialogue that waits for a line, in words."""

  row: int  # its place in the scenario
  scenario: int  # ids, which name it
  sample: int
  seat: int  # who is to speak
  said: tuple[tuple[int, str], ...]  # who said what so far


# Gives a line to each turn, in their order, or None where it has none.
Voice = Callable[[list[Turn]], Sequence[str | None | Answer]]


@dataclasses.dataclass(frozen=True)
class Report:
  """What the host did."""

  calls: int  # of a voice
  lines: int  # that it gave
  cut: int  # of them, at the most tokens of a line
  failed: Mapping[int, str]  # why a row ended, by its place in the scenario
  host: float  # seconds
  device: float
  usage: remote.Usage  # of the answers that came from servers


def hold(
  key: Key[Array, ''],
  speakers: tuple[Speaker | None, ...],
  frames: tuple[Frame | None, ...],
  scenario: Scenario,
  voices: Mapping[int, Voice],
  *,
  encode: Callable[[str], Sequence[int]],
  decode: Callable[[Sequence[int]], str],
  lines: int,
  tokens: int,
  environment: Any = None,
  clock: Callable[[], float] = time.perf_counter,
  **plan,
) -> tuple[Dialogue, Report]:
  """`converse` where `voices` speak for some seats, and what they did.

  A row that a voice has no line for ends there, truncated; the others do not
  notice. What a voice raises ends all. Lines of the host have no log-probs.

  What is not named here is as in `converse`.

  Args:
    speakers: None for the seats of `voices`.
    voices: who speaks for a seat.
    encode: the tokens of a line, none of them a control token
      (`Chat.encode`).
    decode: the words of a line's tokens (`Chat.decode`).
    tokens: a longer line of the host is cut.
    clock: the time in seconds.
    **plan: the names of `converse.PLAN`.

  Raises:
    ValueError: as `stage`; a voice for a seat that is taken or is none, or
      one that gives too few lines.
  """
  _check(speakers, len(frames), voices)
  start, away = clock(), 0.0
  on = _staged(
    key,
    speakers,
    frames,
    scenario,
    lines=lines,
    tokens=tokens,
    environment=environment,
    hosted=tuple(sorted(voices)),
    **plan,
  )
  host = _Host(on, voices, encode, decode)
  talk = _go(on, _begin(on))
  while True:
    seen = jax.device_get(_seen(talk))
    if not seen.waiting.any():
      break
    left = clock()
    said, length = host.answer(seen)
    away += clock() - left
    given, failed = length > 0, seen.waiting & (length == 0)
    if given.any():
      said, length, given = jax.device_put((said, length, given))
      talk = _supply(on, talk, Line(said, length), given)
    if failed.any():
      talk = _drop(on, talk, jax.device_put(failed))
    talk = _go(on, talk)
  held = jax.block_until_ready(_finish(on, talk))
  return held, Report(
    calls=host.calls,
    lines=host.lines,
    cut=host.cut,
    failed=host.failed,
    host=away,
    device=clock() - start - away,
    usage=remote.summary(host.answers),
  )


def remote_voice(
  server: remote.Server,
  prompt: Callable[[Turn], remote.Conversation],
  *,
  complete: Callable[..., list[Answer]] = remote.complete,
) -> Voice:
  """A voice that asks `server`; its model may have any tokenizer.

  `prompt` gives the messages before the first line: a system message, and for
  who opens the cue that it answers. With a seed among the server's fields,
  each line has its own, by scenario, sample and line.

  Raises:
    ValueError: no API key.
  """
  server.secret()

  def voice(turns):
    seeds = None
    if 'seed' in server.fields:
      seeds = [_seed(server.fields['seed'], turn) for turn in turns]
    talks = [messages(turn, prompt(turn)) for turn in turns]
    return [
      dataclasses.replace(answer, text=answer.text and answer.text.strip())
      for answer in complete(server, talks, seeds=seeds)
    ]

  return voice


def messages(
  turn: Turn, prompt: remote.Conversation = ()
) -> list[dict[str, str]]:
  """A dialogue as messages to who is to speak: its own are the assistant's.

  Lines of others in a row are one message, as many templates want it.
  """
  out = [dict(message) for message in prompt]
  for who, words in turn.said:
    role = 'assistant' if who == turn.seat else 'user'
    if out and out[-1]['role'] == role:
      words = f'{out.pop()["content"]}\n\n{words}'
    out.append({'role': role, 'content': words})
  return out


def drop(on: Stage, talk: Talk, failed: Bool[Array, 'R L']) -> Talk:
  """`talk` without the dialogues of some lanes that wait: cut short."""
  end = jax.vmap(functools.partial(lanes_.end, on.rules))
  failed &= talk.lanes.phase == WAITING
  at_end = jnp.zeros_like(failed)
  said, lanes = end(on.given, talk.said, talk.lanes, failed, at_end)
  return talk.replace(said=said, lanes=lanes)


class _Seen(NamedTuple):
  """What the host sees of the lanes `[R L]`, and of what is said there."""

  waiting: Any
  row: Any
  line: Any
  tokens: Any  # [R L N T]
  body: Any  # [R L N]


class _Host:
  """Tokens to words, words to tokens, and the counts of both."""

  def __init__(self, on, voices, encode, decode):
    self.voices, self.encode, self.decode = voices, encode, decode
    self.rules, self.queue = on.rules, on.given.order.shape[1]
    names = (on.scenario.ids, on.scenario.samples)
    self.names = [x.tolist() for x in jax.device_get(names)]
    self.words = collections.defaultdict(list)  # of each row, line by line
    self.calls = self.lines = self.cut = 0
    self.failed, self.answers = {}, []

  def answer(self, seen):
    """A line for each lane that waits; of no length where there is none."""
    by_seat = collections.defaultdict(list)
    for place in zip(*np.nonzero(seen.waiting), strict=True):
      turn = self._turn(seen, place)
      by_seat[turn.seat].append((place, turn))
    length = np.zeros(seen.waiting.shape, np.int32)
    tokens = np.zeros((*length.shape, self.rules.tokens), np.int32)
    for seat, waiting in by_seat.items():
      answers = self._ask(seat, [turn for _, turn in waiting])
      for (place, turn), answer in zip(waiting, answers, strict=True):
        try:
          said = self._tokens(answer)
        except _NoLine as why:
          self.failed[turn.row] = str(why)
          continue
        tokens[(*place, slice(len(said)))] = said
        length[place] = len(said)
        self.lines += 1
    return tokens, length

  def _turn(self, seen, place):
    """The dialogue in a lane; only its new lines are decoded."""
    row = int(place[0] * self.queue + seen.row[place])
    line, words = int(seen.line[place]), self.words[row]
    for i in range(len(words), line):
      body = seen.tokens[(*place, i)][: seen.body[(*place, i)]]
      words.append(self.decode(body.tolist()) if body.size else '')
    spoken = np.flatnonzero(seen.body[place][:line]).tolist()
    said = tuple((self.rules.seat(i), words[i]) for i in spoken)
    ids, samples = self.names
    seat = self.rules.seat(line)
    return Turn(row, ids[row], samples[row], seat, said)

  def _ask(self, seat, turns):
    self.calls += 1
    answers = list(self.voices[seat](turns))
    if len(answers) != len(turns):
      raise ValueError(
        f'the voice of seat {seat} gave {len(answers)} lines to {len(turns)} '
        'dialogues; give one to each, None where there is none.'
      )
    self.answers += [x for x in answers if isinstance(x, Answer)]
    return answers

  def _tokens(self, answer):
    """The tokens of a line, if it is one."""
    if isinstance(answer, Answer):
      if answer.text is None:
        raise _NoLine(answer.error)
      answer = answer.text
    if not isinstance(answer, str):
      kind = 'no line' if answer is None else f'a {type(answer).__name__}'
      raise _NoLine(f'the voice gave {kind}')
    try:
      answer.encode()
    except UnicodeEncodeError:
      raise _NoLine(f'the line is no Unicode text: {answer!r}') from None
    said = self.encode(answer)
    if not len(said):
      raise _NoLine(f'the line is empty: {answer!r}')
    self.cut += len(said) > self.rules.tokens
    return said[: self.rules.tokens]


class _NoLine(Exception):
  """Why a row got no line."""


def _seen_of(talk: Talk) -> _Seen:
  lanes, said = talk.lanes, talk.said
  pick = jax.vmap(lambda x, row: x[row])
  return _Seen(
    waiting=lanes.phase == WAITING,
    row=lanes.row,
    line=lanes.line,
    tokens=pick(said.tokens, lanes.row),
    body=pick(said.length - said.stopped, lanes.row),
  )


_stage = jax.jit(stage, static_argnames=('lines', 'tokens', 'hosted', *PLAN))
_begin = jax.jit(begin)
_go = jax.jit(go, donate_argnums=1)
_seen = jax.jit(_seen_of)
_supply = jax.jit(supply, donate_argnums=1)
_drop = jax.jit(drop, donate_argnums=1)
_finish = jax.jit(finish)


def _staged(key, speakers, *args, **kwargs) -> Stage:
  """`stage`, jitted: around the weights, or jit would copy them."""
  bare = tuple(x and x.replace(variables=None, own=None) for x in speakers)
  on = _stage(key, bare, *args, **kwargs)
  given = [x for x in speakers if x is not None]
  whole = tuple(
    x.replace(variables=its.variables, own=its.own)
    for x, its in zip(on.speakers, given, strict=True)
  )
  return on.replace(speakers=whole)


def _check(speakers, seats, voices):
  placed = enumerate(speakers)
  taken = {k for i, x in placed if x is not None for k in x.who or (i,)}
  for seat in voices:
    if seat in taken or not 0 <= seat < seats:
      raise ValueError(
        f'there is a voice for seat {seat}, which has a speaker or is none of '
        f'{seats}; give None as the speaker of that seat.'
      )


def _seed(seed, turn):
  """A seed for a line, of 31 bits."""
  name = f'{seed} {turn.scenario} {turn.sample} {len(turn.said)}'
  return zlib.crc32(name.encode()) >> 1
