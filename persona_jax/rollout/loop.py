"""The loop of a rollout: lanes read what was said, then all speak a token.

One compiled program holds it all. A step decodes a token in every lane that
speaks, whatever its line and dialogue; between steps lanes whose turn it is
read what they have not read yet, a chunk at a time, some lanes of each group.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from persona_jax import cache as caches
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
  reads: Int[Array, '']  # passes over a chunk, some lanes of each group
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
  kept: Float[Array, 'B L ...'] | None  # of the last token that was said


@struct.dataclass
class Talk:
  """A rollout on its way."""

  said: Said
  lanes: Lanes
  voices: tuple[Voice, ...]
  seen: Bool[Array, 'B V'] | None  # tokens in the text of who speaks
  waited: Int[Array, '']  # steps since a lane may read
  usage: Usage


def go(
  speakers: tuple[Speaker, ...],
  rules: Rules,
  given: Given,
  talk: Talk,
  *,
  chunk: int,
  width: int,
  patience: int,
) -> Talk:
  """Runs until every lane is idle or waits for the host.

  `width` lanes of each group read together. A read begins when as many wait,
  or as large a share of those that are not done; when one waits and nothing
  was read for `patience` steps; and when nobody speaks.
  """
  lanes = talk.lanes.phase.size
  together = talk.lanes.phase.shape[0] * width

  def busy(talk):
    return jnp.any(talk.lanes.speaking | talk.lanes.reading)

  def wants(talk):
    speaking = jnp.sum(talk.lanes.speaking)
    count = jnp.sum(_each(lanes_.ready, rules)(given, talk.lanes))
    held = speaking + jnp.sum(talk.lanes.reading)
    enough = (count * lanes >= held * together) | (talk.waited >= patience)
    return (enough | (speaking == 0)) & (count > 0)

  def body(talk):
    talk = jax.lax.while_loop(
      wants,
      lambda talk: _read(speakers, rules, given, talk, chunk, width),
      talk,
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
      hidden, cache, kept = speaker.read(
        voice.caches[0], token[:, None], place[:, None], seat.reshape(-1)
      )
      hidden = jnp.where(mine[:, None], hidden[:, 0], voice.hidden)
      return voice.replace(
        hidden=hidden,
        caches=(cache, *voice.caches[1:]),
        kept=None if kept is None else jnp.moveaxis(kept[:, :, 0], 0, 1),
      )

    old = talk.voices[i]
    voices.append(
      feed(old) if len(speakers) == 1 else _when(jnp.any(mine), feed, old)
    )
    if speaker.captures:
      here = fed & (voice == i)
      kept = voices[i].kept
      said = jax.vmap(lanes_.add if speaker.sums else lanes_.note)(
        said, lanes, kept.reshape(*fed.shape, *kept.shape[1:]), here
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
    waited=jnp.where(jnp.any(lanes.reading), talk.waited + 1, 0),
    usage=usage.replace(
      steps=usage.steps + 1,
      row_steps=usage.row_steps + batch,
      sampled=usage.sampled + jnp.sum(speaking, dtype=jnp.int32),
    ),
  )


def _read(speakers, rules, given, talk, chunk, width):
  """The next chunk of unread text of some lanes in each group."""
  lanes = talk.lanes
  groups = lanes.phase.shape[0]
  ready = _each(lanes_.ready, rules)(given, lanes)
  lane = jnp.argsort(~ready, axis=1, stable=True)[:, :width]  # [R W]
  wants = jnp.take_along_axis(ready, lane, axis=1).reshape(-1)
  unread = jax.vmap(lanes_.unread, in_axes=(None, None, None, None, 0))
  text, seat, start, source = jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:]),
    _each(unread, rules)(given, talk.said, lanes, lane),
  )
  slot = start[:, None] + jnp.arange(chunk)[None]
  inside = (slot < text.length[:, None]) & wants[:, None]
  tokens = jnp.take_along_axis(
    text.tokens, jnp.minimum(slot, text.tokens.shape[1] - 1), axis=1
  )
  done = wants & (start + chunk >= text.length)
  chunks = _Chunks(
    lane=jnp.where(wants, lane.reshape(-1), lanes.phase.shape[1]),
    source=source,
    seat=seat,
    tokens=tokens,
    positions=jnp.where(inside, slot, -1),
    last=jnp.clip(text.length - 1 - start, 0, chunk - 1),
    done=done,
    used=jnp.max(lanes.read),
    groups=groups,
  )
  voice = jnp.array(rules.voices)[seat]
  voices = []
  for i, speaker in enumerate(speakers):
    old, mine = talk.voices[i], wants & (voice == i)
    hear = functools.partial(_hear, speaker, chunks, mine)
    voices.append(
      hear(old) if len(speakers) == 1 else _when(jnp.any(mine), hear, old)
    )
  seen = talk.seen
  if seen is not None:
    seen = _mark(seen, chunks, text)
  end = jnp.minimum(start + chunk, text.length).reshape(groups, -1)
  at = (jnp.arange(groups)[:, None], chunks.lane.reshape(groups, -1))
  speaks = jnp.where(done, lanes_.SPEAKING, lanes_.READING)
  usage = talk.usage
  return talk.replace(
    lanes=lanes.replace(
      read=lanes.read.at[*at, seat.reshape(groups, -1)].set(end, mode='drop'),
      phase=lanes.phase.at[at].set(
        speaks.reshape(groups, -1).astype(jnp.int32), mode='drop'
      ),
    ),
    voices=tuple(voices),
    seen=seen,
    waited=jnp.zeros_like(talk.waited),
    usage=usage.replace(
      reads=usage.reads + 1,
      read_slots=usage.read_slots + tokens.size,
      read=usage.read + jnp.sum(inside, dtype=jnp.int32),
    ),
  )


@struct.dataclass
class _Chunks:
  """What some lanes of each group are to read; C = R x W of them."""

  lane: Int[Array, ' C']  # in its group; beyond the last: nothing to read
  source: Int[Array, ' C']  # the lane whose cache is read on
  seat: Int[Array, ' C']
  tokens: Int[Array, 'C T']
  positions: Int[Array, 'C T']
  last: Int[Array, ' C']  # the slot of the last token
  done: Bool[Array, ' C']  # nothing is unread then
  used: Int[Array, '']  # slots that some cache holds
  groups: int = struct.field(pytree_node=False)


def _hear(speaker, chunks, mine, voice):
  """The chunks that are `mine`, read into their lanes; their turn is next."""
  beyond = voice.hidden.shape[0]
  rows = jnp.where(mine, chunks.lane, beyond).reshape(chunks.groups, -1)
  cache, *others = _turned(chunks, rows, voice)
  positions = jnp.where(mine[:, None], chunks.positions, -1)
  hidden, cache, _ = speaker.read(
    cache.replace(rows=rows), chunks.tokens, positions, chunks.seat
  )
  last = chunks.last[:, None, None]
  hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
  done = jnp.where(chunks.done.reshape(rows.shape), rows, beyond)
  return Voice(
    caches=(cache.replace(rows=None), *others),
    front=caches.put(voice.front, rows, chunks.seat),
    hidden=caches.put(voice.hidden, done, hidden),
    kept=voice.kept,
  )


def _turned(chunks, rows, voice):
  """The caches, what is read on in front."""
  seat, source = (x.reshape(rows.shape) for x in (chunks.seat, chunks.source))
  where = lambda x: jnp.where(x, rows, voice.hidden.shape[0])
  front = lambda rows: caches.pick(voice.front, rows).reshape(rows.shape)
  behind = front(source) != seat
  moves = [
    caches.Move(
      rows=where(behind | (source != rows)),
      cache=behind.astype(jnp.int32),
      source=source,
    )
  ]
  if len(voice.caches) == 2:
    moves.append(
      caches.Move(
        rows=where(front(rows) != seat),
        cache=jnp.zeros_like(rows),
        source=rows,
      )
    )
  return caches.move(voice.caches, moves, chunks.used)


def _mark(seen, chunks, text):
  """Marks the tokens of the texts that were read to their end."""
  slot = jnp.arange(text.tokens.shape[1])[None]
  count, vocab = chunks.lane.shape[0], seen.shape[1]
  tokens = jnp.where(slot < text.length[:, None], text.tokens, vocab)
  fresh = jnp.zeros((count, vocab), bool)
  fresh = fresh.at[jnp.arange(count)[:, None], tokens].set(True, mode='drop')
  lane = jnp.where(chunks.done, chunks.lane, seen.shape[0])
  return caches.put(seen, lane.reshape(chunks.groups, -1), fresh)


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


def _when(condition, fn, state):
  """`fn(state)` where the condition holds: a loop of at most one round."""
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
