"""Log-probabilities of given tokens without the logits of all of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TABLES = (('unembed', 'kernel'), ('embed', 'embedding'))  # the first that is


class Scores(NamedTuple):
  """What the softmax says of tokens, in nats."""

  logprobs: Float[Array, 'B M']
  entropy: Float[Array, 'B M']  # of the whole distribution


def token_logprobs(*args, **how) -> Float[Array, 'B M']:
  """The log-probabilities of `token_scores`."""
  return token_scores(*args, **how).logprobs


def token_scores(
  unembed,
  variables,
  hidden: Float[Array, 'B S D'],
  before: Int[Array, 'B M'],
  tokens: Int[Array, 'B M'],
  *,
  temperature: float = 1.0,
  held: int = 1 << 24,
) -> Scores:
  """log softmax(logits / temperature) of `tokens`, predicted at `before`.

  Holds about `held` logits at a time, on all devices together: those of all
  tokens for a block of the vocabulary. In the backward pass too; they are
  computed again there. Block c is every C-th row of the table, so that a table
  that is spread by rows gives each device a part of every block.
  """
  at = jnp.take_along_axis(hidden, before[..., None], axis=1)
  path = _table(variables['params'])
  table = variables['params'][path[0]][path[1]]
  vocab = table.shape[0]
  count = _blocks(vocab, -(-tokens.size * vocab // held))
  rows = -(-vocab // count)

  def add(state, block):
    index, part = block
    most, total, mean, picked = state
    logits = unembed(_with(variables, path, part), at) / temperature
    ids = index + count * jnp.arange(rows, dtype=tokens.dtype)
    if rows * count > vocab:
      logits = jnp.where(ids[None, None] < vocab, logits, _NEVER)
    top = jnp.maximum(most, jax.lax.stop_gradient(jnp.max(logits, axis=2)))
    fade, weights = jnp.exp(most - top), jnp.exp(logits - top[..., None])
    own = jnp.take_along_axis(logits, tokens[..., None] // count, axis=2)
    return (
      top,
      total * fade + jnp.sum(weights, axis=2),
      mean * fade + jnp.sum(weights * logits, axis=2),
      picked + jnp.where(tokens % count == index, own[..., 0], 0.0),
    ), None

  zeros = jnp.zeros(tokens.shape, jnp.float32)
  state = (zeros + _NEVER, zeros, zeros, zeros)
  if count == 1:
    state, _ = add(state, (jnp.zeros((), tokens.dtype), table))
  else:
    parts = jnp.pad(table, ((0, rows * count - vocab), (0, 0)))
    parts = jnp.swapaxes(parts.reshape(rows, count, -1), 0, 1)
    index = jnp.arange(count, dtype=tokens.dtype)
    state, _ = jax.lax.scan(jax.checkpoint(add), state, (index, parts))
  most, total, mean, picked = state
  whole = most + jnp.log(total)
  return Scores(picked - whole, whole - mean / total)


def only(unembed, tokens: tuple[int, ...]):
  """An `unembed` of these tokens alone: `[B M D]` to logits `[B M K]`.

  What it predicts has number k of them as token k.
  """

  def unembed_only(variables, hidden):
    path = _table(variables['params'])
    table = variables['params'][path[0]][path[1]]
    rows = table[jnp.asarray(tokens, jnp.int32)]
    return unembed(_with(variables, path, rows), hidden)

  return unembed_only


def _table(params):
  """The path of the array with a row for each token of the vocabulary."""
  for room, name in TABLES:
    if name in params.get(room, {}):
      return room, name
  names = ['/'.join(path) for path in TABLES]
  raise ValueError(
    f'the parameters {sorted(params)} hold none of {names}, whose rows are the '
    'vocabulary; name the array of your model so.'
  )


def _with(variables, path, table):
  """`variables` with some rows of the table in its place."""
  room, name = path
  params = variables['params']
  return {
    **variables,
    'params': {**params, room: {**params[room], name: table}},
  }


def _blocks(vocab, least):
  """At least `least` blocks, some more where that makes them equal."""
  least = min(max(least, 1), vocab)
  equal = [c for c in range(least, min(2 * least, vocab) + 1) if vocab % c == 0]
  return equal[0] if equal else least


_NEVER = -1e30  # finite, so that its difference with itself is zero
