"""Dialogues as arrays, and a dialogue as one speaker's model sees it.

B dialogues of N lines of at most T tokens. Everything downstream of a rollout
(rewards, the learner, the analysis) reads a `Dialogue` and nothing else.
"""

import dataclasses

import jax
import jax.numpy as jnp

from persona_jax.shapes import Array, Bool, Float, Int, PyTree

_frozen = dataclasses.dataclass(frozen=True)


def _record(cls):
  """A frozen dataclass that jax maps over; jax alone can import it."""
  return jax.tree_util.register_dataclass(_frozen(cls))


PARTNER, POLICY = range(2)  # values of `Dialogue.who`


@_record
class Played:
  """What the environment made of B dialogues."""

  reward: Float[Array, 'B N']
  terminated: Bool[Array, ' B']  # came to its end
  truncated: Bool[Array, ' B']  # was cut short
  state: PyTree  # of the environment, at the end


@_record
class Dialogue:
  """B conversations side by side; `who[n]` spoke line n of each.

  The speakers take turns, and PARTNER opens. Lines that a dialogue did not
  come to have no tokens.
  """

  tokens: Int[Array, 'B N T']
  length: Int[Array, 'B N']  # tokens of a line, with the stop token
  stopped: Bool[Array, 'B N']  # whether the last of them is a stop token
  logprobs: Float[Array, 'B N T']  # as sampled: after temperature and cuts
  raw_logprobs: Float[Array, 'B N T']  # of the untempered softmax
  who: Int[Array, ' N']
  prompts: Int[Array, 'B K P']  # by seat: all before the first line
  prompt_length: Int[Array, 'B K']
  scenario: Int[Array, ' B']  # ids, which name the random keys
  sample: Int[Array, ' B']
  live: Bool[Array, ' B']  # False for rows that only fill up a batch
  played: Played | None = None
  # What the speaker's model kept of each token as it was said, by layer; zero
  # for the last token of a line, which is read with the next. [T L ...], or
  # [L ...] where it was summed.
  kept: Float[Array, 'B N ...'] | None = None

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
  heard_to_heard: Int[Array, ' H'] | None = None  # where a third voice speaks


@_record
class Pieces:
  """Frames as rows of one size: between heard and own, own and heard, heard."""

  tokens: Int[Array, '*K 3 F']
  length: Int[Array, '*K 3']


def pieces(*frames: Frame | None) -> Pieces:
  """One frame a row; None, which nobody reads, is empty."""
  none = jnp.zeros(0, jnp.int32)
  rows = [
    (none, none, none)
    if frame is None
    else (frame.heard_to_own, frame.own_to_heard, frame.heard_to_heard)
    for frame in frames
  ]
  rows = [[none if x is None else x for x in row] for row in rows]
  room = max(x.size for row in rows for x in row)
  padded = [[jnp.pad(x, (0, room - x.size)) for x in row] for row in rows]
  return Pieces(
    tokens=jnp.stack([jnp.stack(row) for row in padded]),
    length=jnp.array([[x.size for x in row] for row in rows], jnp.int32),
  )


@_record
class Text:
  """A dialogue as the one text that a speaker's model reads.

  Token t of line n stands at slot `start[n] + t`; of a line that is still to
  come, only the frame before it is there.
  """

  tokens: Int[Array, '*B S']
  length: Int[Array, '*B']
  start: Int[Array, '*B N']


def text(
  prompt: Int[Array, ' P'],
  prompt_length: Int[Array, ''],
  lines: Int[Array, 'N T'],
  body: Int[Array, ' N'],
  own: Bool[Array, ' N'],
  frame: Pieces,
  until: Int[Array, ''],
  size: int,
) -> Text:
  """The first `until` lines as their `own` speaker reads them, and the cue.

  `vmap` it over a batch. `size` must hold it: what is beyond is dropped.
  """
  count, room = lines.shape
  index = jnp.arange(count)
  before = jnp.pad(own, (1, 0))[:-1]
  kind = jnp.where(own, 0, jnp.where(before, 1, 2))
  # The prompt ends where a line that is heard first begins.
  framed = (index < until) & ((index > 0) | own) | (index == until) & own
  framed_length = jnp.where(framed, frame.length[kind], 0)
  said = jnp.where(index < until, body, 0)
  end = prompt_length + jnp.cumsum(framed_length + said)
  start = end - said
  tokens = jnp.zeros(size, jnp.int32)
  for content, first, length in (
    (prompt[None], jnp.zeros(1, jnp.int32), prompt_length[None]),
    (frame.tokens[kind], start - framed_length, framed_length),
    (lines, start, said),
  ):
    slot = jnp.arange(content.shape[1])[None]
    place = jnp.where(slot < length[:, None], first[:, None] + slot, size)
    tokens = tokens.at[place].set(content, mode='drop')
  return Text(tokens, end[-1], start)


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
  size: int | None = None,
) -> View:
  """`dialogue` as the speaker `who` reads it, padding at the end.

  `prompts` replaces the speaker's own prompt: the same lines under another
  persona or none, as a likelihood judge wants them. Of `size` slots, where the
  caller knows that they hold every dialogue; what is beyond is lost.
  """
  if prompts is None:
    prompts = dialogue.prompts[:, who]
    prompt_length = dialogue.prompt_length[:, who]
  batch, lines, room = dialogue.tokens.shape
  between = jax.tree.map(lambda x: x[0], pieces(frame))
  most = slots(prompts.shape[1], between, lines, room)
  size = min(size or most, most)

  def read(prompt, length, tokens, body, said):
    own = dialogue.who == who
    return text(prompt, length, tokens, body, own, between, said, size)

  # Nothing frames the lines that a dialogue did not come to.
  index = jnp.arange(1, lines + 1, dtype=jnp.int32)
  said = jnp.max(jnp.where(dialogue.length > 0, index[None], 0), axis=1)
  seen = jax.vmap(read)(
    prompts, prompt_length, dialogue.tokens, dialogue.body, said
  )
  slot = jnp.arange(size)[None]
  before = seen.start[..., None] - 1 + jnp.arange(room)[None, None]
  return View(
    tokens=seen.tokens,
    positions=jnp.where(slot < seen.length[:, None], slot, -1),
    before=jnp.clip(before, 0, size - 1),
  )


def slots(prompt: int, frame: Pieces, lines: int, tokens: int) -> int:
  """Room for a prompt and all that a speaker may read of a dialogue."""
  return prompt + lines * (frame.tokens.shape[-1] + tokens)


def _within(tokens, length):
  slot = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, tokens.ndim - 1)
  return slot < jnp.expand_dims(length, -1)


def rows(dialogue: Dialogue, choose) -> Dialogue:
  """`choose(x)` of every array that has a row a dialogue."""
  names = {field.name for field in dataclasses.fields(dialogue)} - {'who'}
  chosen = {n: jax.tree.map(choose, getattr(dialogue, n)) for n in names}
  return dataclasses.replace(dialogue, **chosen)
