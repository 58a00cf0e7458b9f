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

  Holds the logits of `chunk` tokens at a time, in the backward pass too: they
  are computed again there.
  """
  at = jnp.take_along_axis(hidden, before[..., None], axis=1)
  rows = at.reshape(-1, at.shape[-1])
  flat = tokens.reshape(-1)
  pad = -rows.shape[0] % chunk
  rows = jnp.pad(rows, ((0, pad), (0, 0))).reshape(-1, chunk, rows.shape[1])
  flat = jnp.pad(flat, (0, pad)).reshape(-1, chunk)

  @jax.checkpoint
  def some(rows, chosen):
    logits = unembed(variables, rows) / temperature
    picked = jnp.take_along_axis(logits, chosen[:, None], axis=1)[:, 0]
    return picked - jax.nn.logsumexp(logits, axis=1)

  logprobs = jax.lax.map(lambda x: some(*x), (rows, flat)).reshape(-1)
  return logprobs[: tokens.size].reshape(tokens.shape)
