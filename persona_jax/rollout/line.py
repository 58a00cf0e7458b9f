"""One line of one speaker: read what was said, then decode."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from persona_jax.rollout.sampling import sample
from persona_jax.rollout.speaker import Speaker


@struct.dataclass
class Line:
  """What one speaker says, one line a row; `jax.lax.scan` stacks lines."""

  tokens: Int[Array, '*X B T']
  length: Int[Array, '*X B']
  stopped: Bool[Array, '*X B']
  logprobs: Float[Array, '*X B T']
  raw_logprobs: Float[Array, '*X B T']

  @property
  def body(self) -> Int[Array, '*X B']:
    """The number of tokens without the stop token."""
    return self.length - self.stopped


@struct.dataclass
class Memory:
  """A speaker's cache between its lines.

  The last token of a line that ran to its full length was sampled but not yet
  read; it is read with what comes next.
  """

  cache: Any
  position: Int[Array, ' B']  # of the next token
  pending: Int[Array, ' B']
  is_pending: Bool[Array, ' B']


@struct.dataclass
class _Decoding:
  step: Int[Array, '']
  hidden: Float[Array, 'B D']
  done: Bool[Array, ' B']
  line: Line
  cache: Any


def prefill(
  speaker: Speaker,
  tokens: Int[Array, 'B S'],
  valid: Bool[Array, 'B S'],
  size: int,
) -> tuple[Float[Array, 'B D'], Memory]:
  """Reads ragged text into a new cache of `size` slots.

  Returns the hidden states at each row's last token.
  """
  batch = tokens.shape[0]
  nothing = jnp.zeros(batch, jnp.int32)
  memory = Memory(
    cache=speaker.memory(batch, size),
    position=nothing,
    pending=nothing,
    is_pending=jnp.zeros(batch, bool),
  )
  return _read(speaker, memory, tokens, valid)


def listen(
  speaker: Speaker,
  memory: Memory,
  heard: Line,
  before: Int[Array, ' E'],
  after: Int[Array, ' C'],
  live: Bool[Array, ' B'],
  first: Bool[Array, ''],
) -> tuple[Float[Array, 'B D'], Memory]:
  """Reads the pending token, the other's line and the frame around it.

  Before the speaker's `first` line nothing is pending and no frame precedes.
  """
  batch, size = heard.tokens.shape

  def spread(piece):
    return jnp.broadcast_to(piece, (batch, piece.size))

  tokens = (
    memory.pending[:, None],
    spread(before),
    heard.tokens,
    spread(after),
  )
  valid = (
    memory.is_pending[:, None],
    jnp.broadcast_to(~first, (batch, before.size)),
    jnp.arange(size)[None] < heard.body[:, None],
    jnp.ones((batch, after.size), bool),
  )
  valid = jnp.concatenate(valid, axis=1) & live[:, None]
  return _read(speaker, memory, jnp.concatenate(tokens, axis=1), valid)


def speak(
  keys: Key[Array, ' B'],
  speaker: Speaker,
  memory: Memory,
  hidden: Float[Array, 'B D'],
  live: Bool[Array, ' B'],
  size: int,
) -> tuple[Line, Memory]:
  """Decodes a line of at most `size` tokens, until every live row stopped."""
  batch = hidden.shape[0]

  def draw(step, hidden, done, line):
    here = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    token, logprob, raw = sample(
      here, speaker.logits(hidden), speaker.sampling, first=step == 0
    )
    stop = speaker.sampling.stops(token) & ~done
    line = Line(
      tokens=line.tokens.at[:, step].set(jnp.where(done, 0, token)),
      length=line.length + ~done,
      stopped=line.stopped | stop,
      logprobs=line.logprobs.at[:, step].set(jnp.where(done, 0, logprob)),
      raw_logprobs=line.raw_logprobs.at[:, step].set(jnp.where(done, 0, raw)),
    )
    return done | stop, line

  def going(s: _Decoding):
    return (s.step < size) & ~jnp.all(s.done)

  def step(s: _Decoding) -> _Decoding:
    read = s.step - 1  # the token drawn last, now read
    position = jnp.where(s.done, -1, memory.position + read)
    hidden, cache = speaker.read(
      s.cache, s.line.tokens[:, read][:, None], position[:, None]
    )
    done, line = draw(s.step, hidden[:, 0], s.done, s.line)
    return _Decoding(s.step + 1, hidden[:, 0], done, line, cache)

  zeros = jnp.zeros((batch, size), jnp.float32)
  blank = Line(
    tokens=jnp.zeros((batch, size), jnp.int32),
    length=jnp.zeros(batch, jnp.int32),
    stopped=jnp.zeros(batch, bool),
    logprobs=zeros,
    raw_logprobs=zeros,
  )
  zero = jnp.zeros((), jnp.int32)
  done, line = draw(zero, hidden, ~live, blank)
  end = jax.lax.while_loop(
    going, step, _Decoding(zero + 1, hidden, done, line, memory.cache)
  )
  line = end.line
  unread = live & ~line.stopped
  return line, Memory(
    # The same slots in use however early the loop ended.
    cache=end.cache.replace(end=memory.cache.end + size - 1),
    position=memory.position + line.body - unread,
    pending=line.tokens[:, -1],
    is_pending=unread,
  )


def _read(speaker, memory, tokens, valid):
  count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
  positions = jnp.where(valid, memory.position[:, None] + count - 1, -1)
  hidden, cache = speaker.read(memory.cache, tokens, positions)
  last = jnp.argmax(count, axis=1)  # the first slot that holds the full count
  hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
  memory = memory.replace(
    cache=cache,
    position=memory.position + count[:, -1],
    is_pending=jnp.zeros_like(memory.is_pending),
  )
  return hidden, memory
