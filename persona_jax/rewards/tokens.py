"""Texts of judges, put together from tokens on the device."""

import dataclasses

import jax
import jax.numpy as jnp

from persona_jax.shapes import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Text:
  """Ragged texts: position -1 marks padding, wherever it is."""

  tokens: Int[Array, 'B S']
  positions: Int[Array, 'B S']

  @property
  def length(self) -> Int[Array, ' B']:
    """The number of tokens of each row."""
    return jnp.max(self.positions, axis=1) + 1

  def last(self, skip: int = 0) -> Int[Array, ' B']:
    """The slot of each row's last token, the last `skip` slots left out."""
    end = self.positions.shape[1] - skip
    return jnp.argmax(self.positions[:, :end], axis=1)


def joined(*pieces, batch: int) -> Text:
  """One text a row, from pieces that all rows share or that each has.

  A piece is `[C]`, or a pair of `[B T]` and the number of its tokens `[B]`.
  """
  tokens, valid = [], []
  for piece in pieces:
    if isinstance(piece, tuple):
      text, length = piece
      inside = jnp.arange(text.shape[1])[None] < length[:, None]
    else:
      text = jnp.broadcast_to(piece, (batch, piece.size))
      inside = jnp.ones((batch, piece.size), bool)
    tokens.append(text)
    valid.append(inside)
  valid = jnp.concatenate(valid, axis=1)
  count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
  positions = jnp.where(valid, count - 1, -1)
  return Text(jnp.concatenate(tokens, axis=1), positions)


def logprobs(
  logits: Float[Array, '*B V'], tokens: Int[Array, '*B']
) -> Float[Array, '*B']:
  """log softmax of the logits at `tokens`."""
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)
