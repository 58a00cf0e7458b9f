"""Lanes: dialogues side by side, each at its own place in its own line.

A lane holds one dialogue at a time and takes the next when that one has ended,
so that neither short lines nor short dialogues leave a row idle. All here is
bookkeeping on small arrays of one group of lanes; `loop` maps it over groups.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from persona_jax.dialogue import Pieces, Text, text
from persona_jax.rollout.environment import Heard
from persona_jax.rollout.sampling import Sampling
from persona_jax.rollout.stops import StopStrings

READING, SPEAKING, WAITING, IDLE = range(4)  # values of `Lanes.phase`
WORLD, HOST = -1, -2  # seats without a speaker, in `Rules.voices`
_WORLD_KEY = 2**31 - 1  # no line and no token has this number


@struct.dataclass
class Rules:
  """What all dialogues of a rollout share."""

  environment: Any
  pieces: Pieces  # [K 3 F]
  table: Int[Array, 'A V'] | None  # of the stop strings
  voices: tuple[int, ...] = struct.field(pytree_node=False)  # speaker by seat
  lines: int = struct.field(pytree_node=False)
  tokens: int = struct.field(pytree_node=False)  # of a line, at most
  slots: int = struct.field(pytree_node=False)  # of a view
  first: int = struct.field(pytree_node=False)  # the line that is spoken first

  @property
  def seats(self) -> int:
    return len(self.voices)

  def seat(self, line):
    """Who says a line: the seats take turns."""
    return line % self.seats


@struct.dataclass
class Given:
  """What is given of each dialogue of a group; K seats, as all records here."""

  keys: Key[Array, '*R Q']
  prompts: Int[Array, '*R Q K P']
  prompt_length: Int[Array, '*R Q K']
  sampling: Sampling  # [Q K ...], without stop strings
  strings: Int[Array, '*R Q K']  # where their automaton starts
  state: PyTree  # of the environment
  order: Int[Array, '*R Q']  # those that are live first
  count: Int[Array, '*R']  # of them


@struct.dataclass
class Said:
  """What was said in each dialogue of a group."""

  tokens: Int[Array, '*R Q N T']
  length: Int[Array, '*R Q N']
  stopped: Bool[Array, '*R Q N']
  logprobs: Float[Array, '*R Q N T']
  raw_logprobs: Float[Array, '*R Q N T']
  reward: Float[Array, '*R Q N']
  terminated: Bool[Array, '*R Q']
  truncated: Bool[Array, '*R Q']
  state: PyTree
  kept: (
    Float[Array, '...'] | None
  )  # [*R Q N T L ...], or [*R Q N L ...] of sums


@struct.dataclass
class Lanes:
  """Where each lane of a group stands."""

  phase: Int[Array, '*R L']
  row: Int[Array, '*R L']  # its dialogue
  line: Int[Array, '*R L']
  count: Int[Array, '*R L']  # tokens of the line so far
  read: Int[Array, '*R L K']  # tokens in each seat's cache
  strings: Int[Array, '*R L']  # states of the stop strings
  state: PyTree  # of the environment
  begun: Int[Array, '*R']  # dialogues that left the queue

  @property
  def speaking(self) -> Bool[Array, '*R L']:
    return self.phase == SPEAKING

  @property
  def reading(self) -> Bool[Array, '*R L']:
    return self.phase == READING


@struct.dataclass
class Line:
  """A line for each lane, from the environment or the host."""

  tokens: Int[Array, '*R L T']
  length: Int[Array, '*R L']


def begin(rules: Rules, given: Given, lanes: int) -> Lanes:
  """Every lane with its first dialogue, or idle."""
  zeros = jnp.zeros(lanes, jnp.int32)
  blank = Lanes(
    phase=jnp.full(lanes, IDLE, jnp.int32),
    row=zeros,
    line=zeros,
    count=zeros,
    read=jnp.zeros((lanes, rules.seats), jnp.int32),
    strings=zeros,
    state=jax.tree.map(lambda x: x[zeros], given.state),
    begun=jnp.zeros((), jnp.int32),
  )
  return _take_next(rules, given, blank, jnp.ones(lanes, bool))


def settings(rules: Rules, given: Given, lanes: Lanes) -> Sampling:
  """How each lane's next speaker draws."""
  at = (lanes.row, rules.seat(lanes.line))
  strings = None
  if rules.table is not None:
    strings = StopStrings(rules.table, given.strings[at])
  sampling = jax.tree.map(lambda x: x[at], given.sampling)
  return sampling.replace(strings=strings)


def keys(given: Given, lanes: Lanes) -> Key[Array, ' L']:
  """The key of each lane's next token, by line and token."""
  fold = jax.vmap(jax.random.fold_in)
  return fold(fold(given.keys[lanes.row], lanes.line), lanes.count)


def write(rules: Rules, given: Given, said: Said, lanes: Lanes, drawn):
  """Puts the drawn token at the end of each line that is being said.

  Returns `(said, lanes, ended)`: `ended` lines stopped or are full.
  """
  token, logprob, raw = drawn
  sampling = settings(rules, given, lanes)
  stop = sampling.stops(token)
  state = lanes.strings
  if sampling.strings is not None:
    after = sampling.strings.step(state, token)
    state = jnp.where(lanes.speaking, after, state)
    stop |= sampling.strings.done(state)
  row = _rows(said, lanes, lanes.speaking)
  at = (row, lanes.line, lanes.count)
  count = lanes.count + lanes.speaking
  full = count >= jnp.minimum(sampling.limit, rules.tokens)
  put = lambda x, index, new: x.at[index].set(new, mode='drop')
  said = said.replace(
    tokens=put(said.tokens, at, token),
    logprobs=put(said.logprobs, at, logprob),
    raw_logprobs=put(said.raw_logprobs, at, raw),
    length=put(said.length, at[:2], count),
    stopped=put(said.stopped, at[:2], stop),
  )
  lanes = lanes.replace(count=count, strings=state)
  return said, lanes, lanes.speaking & (stop | full)


def note(said: Said, lanes: Lanes, kept, where) -> Said:
  """Puts down what was kept of each lane's last token."""
  at = (_rows(said, lanes, where), lanes.line, lanes.count - 1)
  return said.replace(kept=said.kept.at[at].set(kept, mode='drop'))


def add(said: Said, lanes: Lanes, kept, where) -> Said:
  """Adds what was kept of each lane's last token to its line's sum."""
  at = (_rows(said, lanes, where), lanes.line)
  return said.replace(kept=said.kept.at[at].add(kept, mode='drop'))


def write_line(said: Said, lanes: Lanes, line: Line, where) -> Said:
  """Puts a whole line where `where`, as one that was not sampled."""
  at = (_rows(said, lanes, where), lanes.line)
  room = line.tokens.shape[1]
  slot = jnp.arange(room)[None]
  tokens = jnp.where(slot < line.length[:, None], line.tokens, 0)
  return said.replace(
    tokens=said.tokens.at[at].set(tokens, mode='drop'),
    length=said.length.at[at].set(jnp.clip(line.length, 0, room), mode='drop'),
  )


def advance(rules: Rules, given: Given, said: Said, lanes: Lanes, ended):
  """Lets the environment hear the lines that `ended`, and moves on."""
  body = said.length - said.stopped
  heard = Heard(
    tokens=said.tokens[lanes.row, lanes.line],
    length=body[lanes.row, lanes.line],
    line=lanes.line,
    who=rules.seat(lanes.line),
  )
  fold = jax.vmap(jax.random.fold_in)
  key = world_key(fold(given.keys[lanes.row], lanes.line))
  outcome = jax.vmap(rules.environment.step)(key, lanes.state, heard)
  row = _rows(said, lanes, ended)
  keep = lambda new, old: jnp.where(like(ended, new), new, old)
  lanes = lanes.replace(
    state=jax.tree.map(keep, outcome.state, lanes.state),
    line=lanes.line + ended,
  )
  said = said.replace(
    reward=said.reward.at[row, lanes.line - 1].set(outcome.reward, mode='drop')
  )
  said, lanes = _answered(rules, said, lanes, outcome, ended)
  over = ended & (
    outcome.terminated | outcome.truncated | (lanes.line >= rules.lines)
  )
  lanes = _enter(rules, given, lanes, ended & ~over)
  return end(rules, given, said, lanes, over, outcome.terminated)


class Unread(NamedTuple):
  """What the next speaker of a lane has to read."""

  text: Text  # all that it reads, with what it has read
  seat: Int[Array, '']
  start: Int[Array, '']  # tokens that its cache holds
  source: Int[Array, '']  # the lane whose cache holds them


def world_key(keys: Key[Array, ' L']) -> Key[Array, ' L']:
  """The environment's own keys, told apart from those of lines and tokens."""
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, _WORLD_KEY)


def end(rules: Rules, given: Given, said: Said, lanes: Lanes, where, at_end):
  """Ends the dialogues of some lanes, `at_end` or cut short; takes the next."""
  row = _rows(said, lanes, where)
  last = lambda old, new: old.at[row].set(new, mode='drop')
  said = said.replace(
    terminated=last(said.terminated, at_end),
    truncated=last(said.truncated, ~at_end),
    state=jax.tree.map(last, said.state, lanes.state),
  )
  return said, _take_next(rules, given, lanes, where)


def ready(rules: Rules, given: Given, lanes: Lanes) -> Bool[Array, ' L']:
  """The lanes that may read: not those whose prompt an earlier one reads."""
  seat = rules.seat(lanes.line)
  own = jnp.take_along_axis(lanes.read, seat[:, None], axis=1)[:, 0]
  length = given.prompt_length[lanes.row, seat]
  under_way = lanes.reading & (own < length)
  alike = _alike(given, lanes.row, seat, lanes.row, seat)
  earlier = jnp.tri(lanes.row.shape[0], k=-1, dtype=bool)
  follows = jnp.any(alike & earlier & under_way[None], axis=1)
  return lanes.reading & ~(follows & (own == 0))


def unread(
  rules: Rules, given: Given, said: Said, lanes: Lanes, lane
) -> Unread:
  """The text of a lane's next speaker, and how much of it is in a cache.

  A prompt that another lane has read is not read again.
  """
  row, line = lanes.row[lane], lanes.line[lane]
  seat = rules.seat(line)
  length = given.prompt_length[row, seat]
  seats = jnp.full_like(lanes.row, seat)
  alike = _alike(given, row[None], seat[None], lanes.row, seats)[0]
  alike &= (lanes.read[:, seat] >= length) & (length > 0)
  shared = (lanes.read[lane, seat] == 0) & jnp.any(alike)
  seen = text(
    given.prompts[row, seat],
    length,
    said.tokens[row],
    (said.length - said.stopped)[row],
    rules.seat(jnp.arange(rules.lines)) == seat,
    jax.tree.map(lambda x: x[seat], rules.pieces),
    line,
    rules.slots,
  )
  start = jnp.where(shared, length, lanes.read[lane, seat])
  return Unread(
    text=seen,
    seat=seat,
    # One token at least is read: its hidden state says what comes next.
    start=jnp.clip(start, 0, seen.length - 1),
    source=jnp.where(shared, jnp.argmax(alike), lane),
  )


def _alike(given, rows, seats, others, their):
  """Which prompts are the same as which, `[X Y]`."""
  size = given.prompts.shape[2]
  inside = lambda length: jnp.arange(size)[None] < length[:, None]
  length = given.prompt_length[rows, seats]
  theirs = given.prompt_length[others, their]
  blank = lambda x, length: jnp.where(inside(length), x, -1)
  left = blank(given.prompts[rows, seats], length)
  right = blank(given.prompts[others, their], theirs)
  same = jnp.all(left[:, None] == right[None], axis=2)
  return same & (seats[:, None] == their[None])


def _answered(rules, said, lanes, outcome, ended):
  """The environment's words as a line, maybe empty, where its seat is next."""
  if WORLD not in rules.voices:
    return said, lanes
  voices = jnp.array(rules.voices)
  its = voices[rules.seat(lanes.line)] == WORLD
  its &= ended & (lanes.line < rules.lines)
  line = Line(tokens=outcome.words, length=outcome.length)
  said = write_line(said, lanes, line, its)
  return said, lanes.replace(line=lanes.line + its)


def _take_next(rules, given, lanes, free):
  """The next dialogues of the queue in the lanes that are `free`."""
  queue = given.order.shape[0]
  place = lanes.begun + jnp.cumsum(free, dtype=jnp.int32) - 1
  found = free & (place < given.count)
  row = given.order[jnp.minimum(place, queue - 1)]
  row = jnp.where(found, row, lanes.row)
  fresh = jax.tree.map(lambda x: x[row], given.state)
  keep = lambda new, old: jnp.where(like(found, new), new, old)
  lanes = lanes.replace(
    row=row,
    line=jnp.where(found, rules.first, lanes.line),
    read=jnp.where(like(found, lanes.read), 0, lanes.read),
    state=jax.tree.map(keep, fresh, lanes.state),
    phase=jnp.where(free, IDLE, lanes.phase),
    begun=jnp.minimum(lanes.begun + jnp.sum(free), given.count),
  )
  return _enter(rules, given, lanes, found)


def _enter(rules, given, lanes, where):
  """The beginning of a line."""
  seat = rules.seat(lanes.line)
  hosted = jnp.array(rules.voices)[seat] == HOST
  phase = jnp.where(hosted, WAITING, READING)
  begin = given.strings[lanes.row, seat]
  return lanes.replace(
    phase=jnp.where(where, phase, lanes.phase),
    count=jnp.where(where, 0, lanes.count),
    strings=jnp.where(where, begin, lanes.strings),
  )


def _rows(said, lanes, where):
  """The dialogues of the lanes `where`; beyond the last elsewhere: dropped."""
  return jnp.where(where, lanes.row, said.length.shape[0])


def like(mask, x):
  """`mask` with axes of one for all others of `x`."""
  return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
