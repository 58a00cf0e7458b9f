"""Log-probabilities of given tokens without the logits of all of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_logprobs(
  unembed,
  variables,
  hidden: Float[Array, 'B S D'],
  before: Int[Array, 'B M'],
  tokens: Int[Array, 'B M'],
  *,
  temperature: float = 1.0,
  chunk: int = 256,
) -> Float[Array, 'B M']:
  """log softmax(logits / temperature) of `tokens`, predicted at `before`.

  Holds the logits of about `chunk` tokens at a time, as many of each row, so
  that every device works on its own rows; in the backward pass too: they are
  computed again there.
  """
  batch, count = tokens.shape
  size = min(max(chunk // batch, 1), count)
  at = jnp.take_along_axis(hidden, before[..., None], axis=1)

  @jax.checkpoint
  def some(rows, chosen):
    logits = unembed(variables, rows) / temperature
    picked = jnp.take_along_axis(logits, chosen[..., None], axis=2)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=2)

  parts = _parts(at, size), _parts(tokens, size)
  logprobs = jax.lax.map(lambda x: some(*x), parts)  # [C B size]
  return jnp.moveaxis(logprobs, 0, 1).reshape(batch, -1)[:, :count]


def _parts(x, size):
  """`[B M ...]` as `[C B size ...]`, filled up with zeros."""
  pad = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
  x = jnp.pad(x, pad)
  return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)
