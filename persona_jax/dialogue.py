"""Dialogues as arrays, and a dialogue as one speaker's model sees it.

B dialogues of N lines of at most T tokens. Everything downstream of a rollout
(rewards, the learner, the analysis) reads a `Dialogue` and nothing else.
"""

import dataclasses

import jax
import jax.numpy as jnp

from persona_jax.shapes import Array, Bool, Float, Int

_frozen = dataclasses.dataclass(frozen=True)


def _record(cls):
  """A frozen dataclass that jax maps over; jax alone can import it."""
  return jax.tree_util.register_dataclass(_frozen(cls))


PARTNER, POLICY = range(2)  # values of `Dialogue.who`


@_record
class Dialogue:
  """B conversations side by side; `who[n]` spoke line n of each.

  The speakers alternate, and PARTNER opens.
  """

  tokens: Int[Array, 'B N T']
  length: Int[Array, 'B N']  # tokens of a line, with the stop token
  stopped: Bool[Array, 'B N']  # whether the last of them is a stop token
  logprobs: Float[Array, 'B N T']  # as sampled: after temperature and cuts
  raw_logprobs: Float[Array, 'B N T']  # of the untempered softmax
  who: Int[Array, ' N']
  prompts: Int[Array, 'B 2 P']  # by speaker: all before the first line
  prompt_length: Int[Array, 'B 2']
  scenario: Int[Array, ' B']  # ids, which name the random keys
  sample: Int[Array, ' B']
  live: Bool[Array, ' B']  # False for rows that only fill up a batch

  @property
  def body(self) -> Int[Array, 'B N']:
    """The number of tokens of each line without the stop token."""
    return self.length - self.stopped

  @property
  def mask(self) -> Bool[Array, 'B N T']:
    """The sampled tokens, stop tokens with them."""
    return _within(self.tokens, self.length) & self.live[:, None, None]

  @property
  def body_mask(self) -> Bool[Array, 'B N T']:
    """The tokens of the text: no stop tokens."""
    return _within(self.tokens, self.body) & self.live[:, None, None]

  def spoken(self, who: int | Int[Array, '']) -> Bool[Array, 'B N']:
    """The lines of one speaker that hold at least one token."""
    own = jnp.broadcast_to(self.who[None] == who, self.length.shape)
    return own & (self.body > 0) & self.live[:, None]


@_record
class Frame:
  """The tokens that a chat template puts between two lines."""

  heard_to_own: Int[Array, ' C']  # ends the other's line, begins one's own
  own_to_heard: Int[Array, ' E']


@_record
class View:
  """A dialogue as the text that one speaker's model reads.

  Slot s holds `tokens[:, s]` at `positions[:, s]` (-1: padding). Token t of
  line n is predicted at slot `before[:, n, t]`; of the other's lines too,
  where the prediction has no meaning for a chat model.
  """

  tokens: Int[Array, 'B S']
  positions: Int[Array, 'B S']
  before: Int[Array, 'B N T']

  def trimmed(self, size: int) -> 'View':
    """The first `size` slots; the caller knows that the rest is padding."""
    return dataclasses.replace(
      self,
      tokens=self.tokens[:, :size],
      positions=self.positions[:, :size],
    )


def view(
  dialogue: Dialogue,
  who: int,
  frame: Frame,
  prompts: Int[Array, 'B P'] | None = None,
  prompt_length: Int[Array, ' B'] | None = None,
) -> View:
  """`dialogue` as the speaker `who` reads it, padding moved to the end.

  `prompts` replaces the speaker's own prompt: the same lines under another
  persona or none, as a likelihood judge wants them.
  """
  if prompts is None:
    prompts = dialogue.prompts[:, who]
    prompt_length = dialogue.prompt_length[:, who]
  batch, lines, size = dialogue.tokens.shape
  tokens, valid, before = [prompts], [_within(prompts, prompt_length)], []
  slot = prompts.shape[1]
  for n in range(lines):
    piece = frame.heard_to_own if n % 2 == who else frame.own_to_heard
    if n or n % 2 == who:  # a heard opening follows the prompt at once
      tokens.append(jnp.broadcast_to(piece, (batch, piece.size)))
      valid.append(jnp.ones((batch, piece.size), bool))
      slot += piece.size
    tokens.append(dialogue.tokens[:, n])
    valid.append(_within(dialogue.tokens[:, n], dialogue.body[:, n]))
    before.append(slot - 1 + jnp.arange(size))
    slot += size
  return _compact(
    jnp.concatenate(tokens, 1),
    jnp.concatenate(valid, 1),
    jnp.broadcast_to(jnp.stack(before), (batch, lines, size)),
  )


def _compact(tokens, valid, before):
  order = jnp.argsort(~valid, axis=1, stable=True)
  rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1  # position if valid
  ordered = jnp.take_along_axis(valid, order, axis=1)
  # A slot before a token may be padding between pieces: the last valid one
  # up to there is the token that the model reads before it.
  flat = before.reshape(before.shape[0], -1)
  before = jnp.take_along_axis(rank, flat, axis=1).reshape(before.shape)
  return View(
    tokens=jnp.take_along_axis(tokens, order, axis=1),
    positions=jnp.where(ordered, jnp.arange(tokens.shape[1])[None], -1),
    before=jnp.maximum(before, 0),
  )


def _within(tokens, length):
  slot = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, tokens.ndim - 1)
  return slot < jnp.expand_dims(length, -1)


def rows(dialogue: Dialogue, choose) -> Dialogue:
  """`choose(x)` of every array that has a row a dialogue."""
  names = {field.name for field in dataclasses.fields(dialogue)} - {'who'}
  chosen = {name: choose(getattr(dialogue, name)) for name in names}
  return dataclasses.replace(dialogue, **chosen)
