"""The loop of a rollout: lanes read what was said, then all speak a token.

One compiled program holds it all. A step decodes a token in every lane that
speaks, whatever its line and dialogue; between steps lanes whose turn it is
read what they have not read yet, a chunk at a time, one lane of each group.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from persona_jax.rollout import lanes as lanes_
from persona_jax.rollout.lanes import Given, Lanes, Rules, Said
from persona_jax.rollout.sampling import sample
from persona_jax.rollout.speaker import Speaker
from persona_jax.rollout.stops import StopStrings


@struct.dataclass
class Usage:
  """Counts of a rollout."""

  steps: Int[Array, '']
  row_steps: Int[Array, '']  # lanes x steps
  sampled: Int[Array, '']  # tokens, in all lanes
  reads: Int[Array, '']  # chunks read, one lane of each group
  read_slots: Int[Array, '']  # their tokens, padding included
  read: Int[Array, '']  # without padding

  @classmethod
  def none(cls):
    """All zero."""
    return cls(*[jnp.zeros((), jnp.int32)] * 6)

  @property
  def utilisation(self) -> Float[Array, '']:
    """Sampled tokens of each row's step: 1 where no row ever idled."""
    return self.sampled / jnp.maximum(self.row_steps, 1)


@struct.dataclass
class Voice:
  """What the loop keeps of a speaker: its caches and last hidden states.

  A cache has a row for each lane. With two seats `caches` is a pair: the one
  whose turn it is, and the other; they change places when a turn begins, so
  that a step reads one row for each lane.
  """

  caches: tuple[Any, ...]
  front: Int[Array, ' B']  # the seat of the first cache
  hidden: Float[Array, 'B D']


@struct.dataclass
class Talk:
  """A rollout on its way."""

  said: Said
  lanes: Lanes
  voices: tuple[Voice, ...]
  seen: Bool[Array, 'B V'] | None  # tokens in the text of who speaks
  usage: Usage


def go(
  speakers: tuple[Speaker, ...],
  rules: Rules,
  given: Given,
  talk: Talk,
  *,
  chunk: int,
  patience: int,
) -> Talk:
  """Runs until every lane is idle or waits for the host.

  A read begins when `patience` groups have a lane that wants one, or all that
  are not done, or when nobody speaks.
  """

  def busy(talk):
    return jnp.any(talk.lanes.speaking | talk.lanes.reading)

  def wants(talk):
    lanes = talk.lanes
    count = jnp.sum(jnp.any(lanes.reading, axis=1))
    held = jnp.sum(jnp.any(lanes.reading | lanes.speaking, axis=1))
    silent = ~jnp.any(lanes.speaking)
    enough = (count >= jnp.minimum(patience, held)) | silent
    return enough & (count > 0)

  def body(talk):
    talk = jax.lax.while_loop(
      wants, lambda talk: _read(speakers, rules, given, talk, chunk), talk
    )
    return _step(speakers, rules, given, talk)

  return jax.lax.while_loop(busy, body, talk)


def move(rules: Rules, given: Given, said: Said, lanes: Lanes, ended):
  """`lanes.advance` for all groups, if any line `ended`."""

  def advance(state):
    return _each(lanes_.advance, rules)(given, *state, ended)

  return _when(jnp.any(ended), advance, (said, lanes))


def _step(speakers, rules, given, talk):
  """One token in every lane that speaks."""
  lanes, batch = talk.lanes, talk.lanes.phase.size
  speaking = lanes.speaking
  voice = jnp.array(rules.voices)[rules.seat(lanes.line)]
  logits = None
  for i, speaker in enumerate(speakers):
    own = speaker.logits(talk.voices[i].hidden)
    if logits is not None:
      logits, own = _same_width(logits, own)
      own = jnp.where((voice == i).reshape(-1, 1), own, logits)
    logits = own
  drawn = sample(
    _keys(given, lanes),
    logits,
    _settings(rules, given, lanes),
    first=(lanes.count == 0).reshape(-1),
    seen=talk.seen,
  )
  token = drawn[0]
  drawn = [x.reshape(speaking.shape) for x in drawn]
  said, lanes, ended = _each(lanes_.write, rules)(
    given, talk.said, lanes, drawn
  )
  seat = rules.seat(lanes.line)
  fed = speaking & ~ended
  position = jnp.take_along_axis(lanes.read, seat[..., None], 2)[..., 0]
  read = lanes.read + fed[..., None] * jax.nn.one_hot(
    seat, rules.seats, dtype=jnp.int32
  )
  voices = []
  for i, speaker in enumerate(speakers):
    mine = (fed & (voice == i)).reshape(-1)

    def feed(voice, speaker=speaker, mine=mine):
      place = jnp.where(mine, position.reshape(-1), -1)
      hidden, cache = speaker.read(
        voice.caches[0], token[:, None], place[:, None], seat.reshape(-1)
      )
      hidden = jnp.where(mine[:, None], hidden[:, 0], voice.hidden)
      return voice.replace(hidden=hidden, caches=(cache, *voice.caches[1:]))

    old = talk.voices[i]
    voices.append(
      feed(old) if len(speakers) == 1 else _when(jnp.any(mine), feed, old)
    )
  seen = talk.seen
  if seen is not None:
    rows = jnp.where(fed.reshape(-1), jnp.arange(batch), batch)
    seen = seen.at[rows, token].set(True, mode='drop')
  said, lanes = move(rules, given, said, lanes.replace(read=read), ended)
  usage = talk.usage
  return Talk(
    said=said,
    lanes=lanes,
    voices=tuple(voices),
    seen=seen,
    usage=usage.replace(
      steps=usage.steps + 1,
      row_steps=usage.row_steps + batch,
      sampled=usage.sampled + jnp.sum(speaking, dtype=jnp.int32),
    ),
  )


def _read(speakers, rules, given, talk, chunk):
  """The next chunk of unread text of one lane in each group."""
  lanes = talk.lanes
  groups = lanes.phase.shape[0]
  lane = jnp.argmax(lanes.reading, axis=1)  # the first
  wants = jnp.any(lanes.reading, axis=1)
  text, seat, start, source = _each(lanes_.unread, rules)(
    given, talk.said, lanes, lane
  )
  slot = start[:, None] + jnp.arange(chunk)[None]
  inside = (slot < text.length[:, None]) & wants[:, None]
  tokens = jnp.take_along_axis(
    text.tokens, jnp.minimum(slot, text.tokens.shape[1] - 1), axis=1
  )
  done = wants & (start + chunk >= text.length)
  last = jnp.clip(text.length - 1 - start, 0, chunk - 1)
  voice = jnp.array(rules.voices)[seat]
  voices = []
  for i, speaker in enumerate(speakers):
    mine = wants & (voice == i)

    def hear(old, speaker=speaker, mine=mine):
      return _hear(
        speaker,
        old,
        groups,
        lane,
        source,
        mine,
        done & mine,
        seat,
        tokens,
        jnp.where(inside & mine[:, None], slot, -1),
        last,
      )

    old = talk.voices[i]
    voices.append(
      hear(old) if len(speakers) == 1 else _when(jnp.any(mine), hear, old)
    )
  end = jnp.minimum(start + chunk, text.length)
  group = jnp.arange(groups)
  seen = talk.seen
  if seen is not None:
    seen = _note(seen, groups, lane, done, text)
  phase = jnp.where(done, lanes_.SPEAKING, lanes.phase[group, lane])
  usage = talk.usage
  return talk.replace(
    lanes=lanes.replace(
      read=lanes.read.at[group, lane, seat].set(
        jnp.where(wants, end, lanes.read[group, lane, seat])
      ),
      phase=lanes.phase.at[group, lane].set(phase),
    ),
    voices=tuple(voices),
    seen=seen,
    usage=usage.replace(
      reads=usage.reads + 1,
      read_slots=usage.read_slots + groups * chunk,
      read=usage.read + jnp.sum(inside, dtype=jnp.int32),
    ),
  )


def _hear(
  speaker,
  voice,
  groups,
  lane,
  source,
  mine,
  done,
  seat,
  tokens,
  positions,
  last,
):
  """A chunk read into one lane of each group, whose turn it is then."""
  source = jnp.where(mine, source, lane)
  front = _pick(voice.front, groups, lane)
  (cache, *other), own = _picked(
    voice.caches, groups, (source, lane), jnp.any(mine)
  )
  if other:
    there = mine & (_pick(voice.front, groups, source) != seat)
    cache = _choose(there, other[0], cache)
    other = [_choose(mine & (front != seat), *own)]
  hidden, cache = speaker.read(cache, tokens, positions, seat)
  hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
  before = _pick(voice.hidden, groups, lane)
  hidden = jnp.where(done[:, None], hidden, before)
  put = lambda x, new: _put(x, groups, lane, new)
  return Voice(
    caches=tuple(
      jax.tree.map(put, old, new)
      for old, new in zip(voice.caches, (cache, *other), strict=True)
    ),
    front=put(voice.front, jnp.where(mine, seat, front)),
    hidden=put(voice.hidden, hidden),
  )


def _note(seen, groups, lane, done, text):
  """Marks the tokens of the texts that were read to their end."""
  slot = jnp.arange(text.tokens.shape[1])[None]
  vocab = seen.shape[1]
  tokens = jnp.where(slot < text.length[:, None], text.tokens, vocab)
  group = jnp.arange(groups)[:, None]
  fresh = (
    jnp.zeros((groups, vocab), bool).at[group, tokens].set(True, mode='drop')
  )
  old = _pick(seen, groups, lane)
  return _put(seen, groups, lane, jnp.where(done[:, None], fresh, old))


def _pick(tree, groups, lane):
  """One row of each group, `[R ...]`."""

  def pick(x):
    return jax.vmap(lambda x, i: x[i])(_grouped(x, groups), lane)

  return jax.tree.map(pick, tree)


def _picked(tree, groups, lanes, wanted):
  """`_pick` of some lanes, in a step of its own.

  Otherwise XLA may pick again while it puts, and keeps a copy of the whole
  cache to pick from.
  """

  def pick(_):
    return tuple(_pick(tree, groups, lane) for lane in lanes)

  blank = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(pick, None)
  )
  return _when(wanted, pick, blank)


def _put(x, groups, lane, new):
  """`x` with one row of each group replaced."""
  new = new.astype(x.dtype)
  put = jax.vmap(lambda x, i, new: x.at[i].set(new))
  return put(_grouped(x, groups), lane, new).reshape(x.shape)


def _grouped(x, groups):
  return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def _each(fn, rules):
  """A function of one group for all of them."""
  return jax.vmap(functools.partial(fn, rules))


def _keys(given, lanes):
  return jax.vmap(lanes_.keys)(given, lanes).reshape(-1)


def _settings(rules, given, lanes):
  """How each row draws, `[B ...]`; the table of strings is for all."""
  flat = lambda x: x.reshape(lanes.phase.size, *x.shape[2:])
  bare = rules.replace(table=None)
  sampling = jax.tree.map(flat, _each(lanes_.settings, bare)(given, lanes))
  if rules.table is None:
    return sampling
  at = (lanes.row, rules.seat(lanes.line))
  start = jax.vmap(lambda x, *at: x[at])(given.strings, *at)
  return sampling.replace(strings=StopStrings(rules.table, flat(start)))


def _choose(mask, yes, no):
  return jax.tree.map(lambda x, y: jnp.where(_wide(mask, x), x, y), yes, no)


def _wide(mask, x):
  return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _when(condition, fn, state):
  """`fn(state)` where the condition holds: a loop, which copies no buffers."""
  _, state = jax.lax.while_loop(
    lambda carry: carry[0],
    lambda carry: (jnp.zeros((), bool), fn(carry[1])),
    (condition, state),
  )
  return state


def _same_width(left, right):
  """Logits of models whose vocabularies were padded differently."""
  width = max(left.shape[1], right.shape[1])
  pad = lambda x: jnp.pad(
    x, ((0, 0), (0, width - x.shape[1])), constant_values=-jnp.inf
  )
  return pad(left), pad(right)
