"""Drawing one token per row; every setting is data, none recompiles."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from persona_jax.rollout.stops import StopStrings

_NO_LIMIT = np.iinfo(np.int32).max
_COLDEST = 1e-30  # a temperature below would take logits to infinity
_BITS = 32  # of a float32
_BLOCK = 128  # entries summed before the cumulative sum; fast on every backend


@struct.dataclass
class Sampling:
  """How each row draws its tokens, and what ends its lines."""

  temperature: Float[Array, '*B']  # 0 is greedy
  top_k: Int[Array, '*B']  # 0 is off
  top_p: Float[Array, '*B']  # 1 is off
  min_p: Float[Array, '*B']  # 0 is off
  repetition: Float[Array, '*B'] | None  # 1 is off; None: for no row, ever
  limit: Int[Array, '*B']  # most tokens of a line, its stop token included
  stop: Int[Array, '*B K']  # any of these ends a line; -1 is no token
  strings: StopStrings | None

  @classmethod
  def of(
    cls,
    batch: int,
    stop,
    *,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition=None,
    limit=None,
    strings: StopStrings | None = None,
  ):
    """Settings given as one number for all rows, or as one for each row.

    `stop` is a list of ids for all rows, or a list of such lists.

    Raises:
      ValueError: a setting is out of range, or not one for each row.
    """
    if strings is not None and strings.start.shape != (batch,):
      raise ValueError(
        f'strings are for {strings.start.size} rows, the batch has {batch}; '
        'give `stop_strings` one list of strings for each row.'
      )

    def floats(name, value, allowed, rule):
      value = _rows(batch, name, value, allowed, rule)
      return jnp.asarray(value, jnp.float32)

    def ints(name, value, least):
      def allowed(x):
        return (x >= least) & (x == np.floor(x))

      rule = f'a whole number of at least {least}'
      value = _rows(batch, name, value, allowed, rule)
      return jnp.asarray(np.minimum(value, _NO_LIMIT).astype(np.int32))

    if repetition is not None:
      repetition = floats(
        'repetition',
        repetition,
        lambda x: (x > 0) & (x < np.inf),
        'above 0 (1 is off)',
      )
    return cls(
      temperature=floats(
        'temperature',
        temperature,
        lambda x: (x >= 0) & (x < np.inf),
        'a number of at least 0 (0 is greedy)',
      ),
      top_k=ints('top_k', top_k, 0),
      top_p=floats(
        'top_p', top_p, lambda x: (x > 0) & (x <= 1), 'in (0, 1] (1 is off)'
      ),
      min_p=floats(
        'min_p', min_p, lambda x: (x >= 0) & (x < 1), 'in [0, 1) (0 is off)'
      ),
      repetition=repetition,
      limit=ints('limit', _NO_LIMIT if limit is None else limit, 1),
      stop=jnp.asarray(_stops(batch, stop)),
      strings=strings,
    )

  def rows(self, index):
    """The settings of some rows."""
    strings = None if self.strings is None else self.strings.rows(index)
    plain = jax.tree.map(lambda x: x[index], self.replace(strings=None))
    return plain.replace(strings=strings)

  def stops(self, tokens: Int[Array, ' B']) -> Bool[Array, ' B']:
    """Which tokens end a line by themselves, strings apart."""
    return jnp.any(tokens[:, None] == self.stop, axis=1)


def sample(
  keys: Key[Array, ' B'],
  logits: Float[Array, 'B V'],
  sampling: Sampling,
  *,
  first: Bool[Array, ' B'],
  seen: Bool[Array, 'B V'] | None = None,
) -> tuple[Int[Array, ' B'], Float[Array, ' B'], Float[Array, ' B']]:
  """Tokens, their log-probs as sampled, and under the untouched softmax.

  Settings act in the order of transformers: the penalty on tokens `seen`,
  temperature, top-k, top-p, min-p. The `first` token of a line is never a stop
  token, nor does it complete a stop string, so no line is empty.
  """
  greedy = sampling.temperature == 0
  barred = _bar(_penalised(logits, sampling.repetition, seen), sampling, first)
  temperature = jnp.maximum(sampling.temperature, _COLDEST)
  best = _largest(barred)

  def some_drawn():
    scaled = barred / jnp.where(greedy, 1, temperature)[:, None]
    logprobs = jax.nn.log_softmax(_cut(scaled, sampling, ~greedy))
    drawn = draw(jax.vmap(jax.random.uniform)(keys), jnp.exp(logprobs))
    tokens = jnp.where(greedy, best, drawn)
    return tokens, jnp.where(greedy, 0, _at(logprobs, tokens))

  tokens, as_sampled = jax.lax.cond(
    jnp.all(greedy), lambda: (best, jnp.zeros_like(temperature)), some_drawn
  )
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


def _penalised(logits, repetition, seen):
  """Smaller logits for the tokens `seen` (Keskar et al., 2019)."""
  if repetition is None:
    return logits
  if seen is None:
    raise ValueError(
      'sampling.repetition needs the tokens seen so far; pass `seen`, or set '
      'repetition to None.'
    )
  repetition = repetition[:, None]
  less = jnp.where(logits > 0, logits / repetition, logits * repetition)
  return jnp.where(seen, less, logits)


def _bar(logits, sampling, first):
  """-inf where a token would end a line that has not begun."""
  batch, vocab = logits.shape
  ends = first[:, None] & (sampling.stop >= 0)
  ids = jnp.where(ends, sampling.stop, vocab)  # beyond the last: dropped
  rows = jnp.arange(batch)[:, None]
  logits = logits.at[rows, ids].set(-jnp.inf, mode='drop')
  if sampling.strings is None:
    return logits

  def complete(logits):
    ends = first[:, None] & sampling.strings.completing(vocab)
    return jnp.where(ends, -jnp.inf, logits)

  return jax.lax.cond(jnp.any(first), complete, lambda x: x, logits)


def _cut(logits, sampling, drawn):
  """-inf for what each setting cuts; nothing is computed that none asks for."""
  for asked, cut, setting in (
    (sampling.top_k > 0, _top_k, sampling.top_k),
    (sampling.top_p < 1, _top_p, sampling.top_p),
    (sampling.min_p > 0, _min_p, sampling.min_p),
  ):
    logits = jax.lax.cond(
      jnp.any(asked & drawn), cut, lambda x, _: x, logits, setting
    )
  return logits


def _top_k(logits, k):
  k = jnp.where(k > 0, k, logits.shape[1])
  return _keep_until(logits, lambda kept: jnp.sum(kept, axis=-1) >= k)


def _top_p(logits, p):
  probabilities = jax.nn.softmax(logits)
  p = jnp.where(p < 1, p, 2.0)  # 2: keep all

  def mass_reached(kept):
    return jnp.sum(probabilities, axis=-1, where=kept) >= p

  return _keep_until(logits, mass_reached)


def _min_p(logits, p):
  least = jnp.max(logits, axis=-1) + jnp.log(p)
  return jnp.where(logits >= least[:, None], logits, -jnp.inf)


def _keep_until(logits, enough):
  """Keeps the largest logits of each row, no more than make it `enough`.

  Finds the threshold bit by bit, since sorting a vocabulary costs more; equal
  logits stay or go together, and the largest always stay.
  """
  bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
  sign = jnp.uint32(1 << (_BITS - 1))
  order = jnp.where(bits < sign, bits | sign, ~bits)  # as the floats are

  def settle(i, least):
    trial = least | (sign >> i.astype(jnp.uint32))
    return jnp.where(enough(order >= trial[:, None]), trial, least)

  least = jnp.zeros(logits.shape[0], jnp.uint32)
  least = jax.lax.fori_loop(0, _BITS, settle, least)
  least = jnp.minimum(least, jnp.max(order, axis=-1))
  return jnp.where(order >= least[:, None], logits, -jnp.inf)


def _largest(logits):
  """`jnp.argmax` of each row, in loops that XLA vectorises on a CPU too."""
  vocab = logits.shape[-1]
  top = jnp.max(logits, axis=-1, keepdims=True)
  place = jnp.where(logits == top, jnp.arange(vocab)[None], vocab - 1)
  return jnp.min(place, axis=-1).astype(jnp.int32)


def _at(x, index):
  return jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]


def _rows(batch, name, value, allowed, rule):
  """A setting as one number a row, in float64."""
  values = np.asarray(jax.device_get(value), np.float64)
  if values.shape not in ((), (batch,)):
    raise ValueError(
      f'{name} has {values.size} values of shape {values.shape} for {batch} '
      'rows; give one number, or one for each row.'
    )
  wrong = values[~allowed(values)]
  if wrong.size:
    raise ValueError(f'{name} is {wrong[0]:g}, and must be {rule}.')
  return np.broadcast_to(values, batch)


def _stops(batch, stop):
  """The ids as an array `[B K]`, padded with -1."""
  rows = list(jax.device_get(stop))
  if not any(np.ndim(row) for row in rows):
    rows = [rows] * batch
  if len(rows) != batch:
    raise ValueError(
      f'stop has {len(rows)} lists of ids for {batch} rows; give one list of '
      'ids for all rows, or one for each.'
    )
  out = np.full((batch, max(map(len, rows), default=0)), -1, np.int32)
  for i, row in enumerate(rows):
    out[i, : len(row)] = row
  return out
