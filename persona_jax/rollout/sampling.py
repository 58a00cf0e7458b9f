"""Drawing one token per row; every setting is data, none recompiles."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

_BISECTIONS = 40  # leaves 1e-12 of the range of the logits
_BLOCK = 128  # entries summed before the cumulative sum; fast on every backend


@struct.dataclass
class Sampling:
  """How each row draws its tokens."""

  temperature: Float[Array, ' B']  # 0 is greedy
  top_k: Int[Array, ' B']  # 0 is off
  top_p: Float[Array, ' B']  # 1 is off
  stop: Int[Array, ' K']  # any of these ends a line

  @classmethod
  def of(cls, batch: int, stop, *, temperature=1.0, top_k=0, top_p=1.0):
    """The same setting for every row."""
    return cls(
      temperature=jnp.full(batch, temperature, jnp.float32),
      top_k=jnp.full(batch, top_k, jnp.int32),
      top_p=jnp.full(batch, top_p, jnp.float32),
      stop=jnp.asarray(stop, jnp.int32),
    )

  def stops(self, tokens: Int[Array, ' B']) -> Bool[Array, ' B']:
    """Which tokens end a line."""
    return jnp.any(tokens[:, None] == self.stop[None], axis=1)


def sample(
  keys: Key[Array, ' B'],
  logits: Float[Array, 'B V'],
  sampling: Sampling,
  *,
  first: Bool[Array, ''],
) -> tuple[Int[Array, ' B'], Float[Array, ' B'], Float[Array, ' B']]:
  """Tokens, their log-probs as sampled, and under the untempered softmax.

  The first token of a line is never a stop token, so no line is empty.
  """
  barred = logits.at[:, sampling.stop].set(
    jnp.where(first, -jnp.inf, logits[:, sampling.stop])
  )
  greedy = sampling.temperature == 0
  temperature = jnp.where(greedy, 1, sampling.temperature)
  scaled = barred / temperature[:, None]
  cuts = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1))
  scaled = jax.lax.cond(cuts, _cut, lambda x, _: x, scaled, sampling)
  logprobs = jax.nn.log_softmax(scaled)
  drawn = draw(jax.vmap(jax.random.uniform)(keys), jnp.exp(logprobs))
  tokens = jnp.where(greedy, jnp.argmax(barred, axis=-1), drawn)
  tokens = tokens.astype(jnp.int32)
  as_sampled = jnp.where(greedy, 0, _at(logprobs, tokens))
  raw = _at(logits, tokens) - jax.nn.logsumexp(logits, axis=-1)
  return tokens, as_sampled, raw


def draw(
  uniform: Float[Array, ' B'], probabilities: Float[Array, 'B V']
) -> Int[Array, ' B']:
  """The inverse of the cumulative distribution, block by block.

  One random number per row, where Gumbel noise takes V.
  """
  pad = -probabilities.shape[1] % _BLOCK
  blocks = jnp.pad(probabilities, ((0, 0), (0, pad)))
  blocks = blocks.reshape(blocks.shape[0], -1, _BLOCK)
  sums = jnp.sum(blocks, axis=-1)
  ends = jnp.cumsum(sums, axis=-1)
  point = uniform * ends[:, -1]
  block = _first_beyond(sums, ends, point)
  before = _at(jnp.pad(ends, ((0, 0), (1, 0))), block)
  within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  inside = jnp.cumsum(within, axis=-1)
  return block * _BLOCK + _first_beyond(within, inside, point - before)


def _first_beyond(sizes, ends, point):
  """The first entry with a size whose end lies beyond the point.

  Rounding may place a point beyond the last end, or in an entry of size zero:
  a token that was cut must not be drawn once in 1e7.
  """
  point = jnp.minimum(point, ends[:, -1] * (1 - 1e-6))
  return jnp.argmax((sizes > 0) & (ends > point[:, None]), axis=-1)


def _cut(logits, sampling):
  """-inf below the row's top-k and, of what is left, below its top-p."""
  k = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[1])
  logits = _keep_until(logits, lambda kept: jnp.sum(kept, axis=-1) >= k)
  probabilities = jax.nn.softmax(logits)
  p = jnp.where(sampling.top_p < 1, sampling.top_p, 2.0)  # 2: keep all

  def mass_reached(kept):
    return jnp.sum(probabilities, axis=-1, where=kept) >= p

  return _keep_until(logits, mass_reached)


def _keep_until(logits, enough):
  """Keeps the largest logits of each row, no more than make it `enough`.

  Bisects the threshold, since sorting a vocabulary costs more; equal logits
  stay or go together.
  """
  finite = jnp.where(jnp.isfinite(logits), logits, jnp.nan)
  low, high = jnp.nanmin(finite, axis=-1), jnp.nanmax(finite, axis=-1)

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) / 2
    done = enough(logits >= middle[:, None])
    return jnp.where(done, middle, low), jnp.where(done, high, middle)

  low, _ = jax.lax.fori_loop(0, _BISECTIONS, halve, (low, high))
  return jnp.where(logits >= low[:, None], logits, -jnp.inf)


def _at(x, index):
  return jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]
