"""Drawing tokens, against a reference that sorts."""

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax.rollout import sampling
from persona_jax.rollout.sampling import Sampling
from persona_jax.rollout.stops import stop_strings

DRAWS, VOCAB = 3000, 40
NAMES = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition')
SETTINGS = (
  (1.0, 0, 1.0, 0.0, 1.0),
  (0.7, 5, 1.0, 0.0, 1.0),
  (1.3, 0, 0.8, 0.0, 1.0),
  (1.0, 10, 0.6, 0.0, 1.0),
  (0.5, 30, 0.9, 0.0, 1.0),
  (2.0, 1, 1.0, 0.0, 1.0),
  (1.0, 0, 0.01, 0.0, 1.0),
  (1.0, 0, 1.0, 0.1, 1.0),
  (2.0, 8, 0.9, 0.35, 1.0),
  (1.0, 0, 1.0, 0.0, 3.0),
  (0.7, 10, 0.8, 0.05, 0.4),
  (0.0, 0, 1.0, 0.0, 1.0),
  (0.0, 5, 0.5, 0.9, 5.0),
)
RNG = np.random.default_rng(0)
LOGITS = 1.5 * RNG.standard_normal((len(SETTINGS), VOCAB)).astype(np.float32)
LOGITS[RNG.random(LOGITS.shape) < 0.1] = -np.inf
LOGITS[:, :2] = 2.5, 2.4  # likely everywhere
SEEN = RNG.random(LOGITS.shape) < 0.4
SEEN[-1, :2] = True  # what the last row would say
STOP = [[i % 2, i % 2 + VOCAB // 2][: 1 + i % 3] for i in range(len(SETTINGS))]
sample = jax.jit(sampling.sample)


def softmax(x):
  x = np.exp(x - x.max())
  return x / x.sum()


def reference(logits, seen, setting, barred=()):
  """Log-probabilities of one row, in float64; -inf where it was cut."""
  temperature, top_k, top_p, min_p, repetition = setting
  logits = logits.astype(np.float64)
  for i in np.flatnonzero(seen):
    logits[i] *= 1 / repetition if logits[i] > 0 else repetition
  logits[list(barred)] = -np.inf
  if temperature == 0:
    return np.where(np.arange(logits.size) == logits.argmax(), 0, -np.inf)
  scaled = logits / temperature
  order = np.argsort(-scaled, kind='stable')[: np.isfinite(scaled).sum()]
  kept = order[: top_k or None]
  mass = np.cumsum(softmax(scaled[kept]))
  kept = kept[: np.sum(mass < top_p) + 1 if top_p < 1 else None]
  p = softmax(scaled[kept])
  kept = kept[p >= min_p * p.max()]
  out = np.full(logits.shape, -np.inf)
  out[kept] = np.log(softmax(scaled[kept]))
  return out


def settings(rows=SETTINGS, stop=STOP, **changes):
  columns = dict(zip(NAMES, zip(*rows, strict=True), strict=True))
  return Sampling.of(len(rows), stop, **columns | changes)


def many(key, first):
  """`DRAWS` draws of every setting, all of them in one batch."""
  each = np.repeat(np.arange(len(SETTINGS)), DRAWS)
  drawn = sample(
    jax.random.split(key, each.size),
    jnp.asarray(LOGITS[each]),
    settings().rows(each),
    first=jnp.asarray(first[each]),
    seen=jnp.asarray(SEEN[each]),
  )
  return [np.asarray(x).reshape(-1, DRAWS) for x in drawn]


def some(logits, sampling, rows=200, first=False):
  """Draws of one row of logits."""
  return sample(
    jax.random.split(jax.random.key(0), rows),
    jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, len(logits))),
    sampling,
    first=jnp.full(rows, first),
  )


@pytest.mark.parametrize('odd', [False, True])
def test_draws_are_those_of_the_reference(key, odd):
  first = np.arange(len(SETTINGS)) % 2 == odd
  tokens, logprobs, raw = many(key, first)
  for i, setting in enumerate(SETTINGS):
    barred = STOP[i] if first[i] else ()
    want = reference(LOGITS[i], SEEN[i], setting, barred)
    got = np.isin(np.arange(VOCAB), tokens[i])
    # Of 3000 draws, less than one in 1e5 misses what has 0.4 %.
    np.testing.assert_array_equal(got[want > np.log(0.004)], True)
    assert not got[want == -np.inf].any()
    np.testing.assert_allclose(logprobs[i], want[tokens[i]], atol=1e-5)
    with np.errstate(divide='ignore'):
      untouched = np.log(softmax(LOGITS[i].astype(np.float64)))
    np.testing.assert_allclose(raw[i], untouched[tokens[i]], atol=1e-5)
  said = [np.isin(x, ids).any() for x, ids in zip(tokens, STOP, strict=True)]
  assert not np.any(said & first) and np.sum(said & ~first) >= 4


@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_draws_follow_the_distribution(temperature):
  # Over three blocks of the sum; 30000 draws at once.
  rows, vocab = 30000, 300
  logits = np.random.default_rng(1).standard_normal(vocab, np.float32)
  setting = Sampling.of(rows, [0], temperature=temperature)
  tokens, _, _ = some(logits, setting, rows)
  want = rows * softmax(logits.astype(np.float64) / temperature)
  counts = np.bincount(tokens, minlength=vocab)
  often = want > 5
  square = np.sum((counts - want)[often] ** 2 / want[often])
  free = often.sum() - 1
  assert abs(square - free) < 5 * np.sqrt(2 * free)


def test_what_has_no_probability_is_never_drawn():
  # Points within eight rounding errors of the steps of a cumulative sum that
  # is flat for most tokens: a carelessly rounded point falls on those.
  draw, rng, vocab = jax.jit(sampling.draw), np.random.default_rng(0), 1000
  for _ in range(100):
    p = rng.random(vocab) * (rng.random(vocab) < 0.05)
    p = (p / p.sum()).astype(np.float32)
    steps = np.round(np.cumsum(p, dtype=np.float64) * 2**23)
    steps = rng.choice(np.unique(steps), 40)
    points = np.add.outer(steps, np.arange(-8, 9)).ravel() / 2**23
    points = np.clip(points, 0, 1 - 2**-23).astype(np.float32)
    tokens = draw(points, np.broadcast_to(p, (points.size, vocab)))
    assert p[tokens].all()


@pytest.mark.parametrize('vocab', [1, 128, 400])
def test_draw_inverts_the_cumulative_distribution(vocab):
  # Points in the middle of every token's stretch.
  p = np.random.default_rng(vocab).random(vocab) + 0.1
  p /= p.sum()
  points = np.cumsum(p) - p / 2
  rows = np.broadcast_to(p, (vocab, vocab))
  tokens = sampling.draw(
    jnp.asarray(points, jnp.float32), jnp.asarray(rows, jnp.float32)
  )
  np.testing.assert_array_equal(tokens, np.arange(vocab))


def test_equal_logits_are_cut_together():
  setting = Sampling.of(200, [4], top_k=1)
  tokens, logprobs, _ = some([3.0, 3.0, 3.0, 0.0, -1.0], setting)
  assert set(np.asarray(tokens).tolist()) == {0, 1, 2}
  np.testing.assert_allclose(logprobs, np.log(1 / 3), atol=1e-5)


@pytest.mark.parametrize('least', [-1e9, np.finfo(np.float32).min, -np.inf])
@pytest.mark.parametrize(
  ('cut', 'kept'),
  [
    ({}, {0, 1, 2}),
    ({'top_k': 1}, {1}),
    ({'top_k': 2}, {0, 1}),
    ({'top_p': 0.3}, {1}),
    ({'top_p': 0.6}, {0, 1}),
    ({'top_p': 0.99}, {0, 1, 2}),
    ({'min_p': 0.999}, {0, 1, 2}),
  ],
  ids=str,
)
def test_cuts_are_exact_however_far_the_logits_reach(least, cut, kept):
  # Three tokens a third each, float by float, and two that were masked.
  logits = 1 + np.finfo(np.float32).eps * np.array([1, 2, 0, 0, 0])
  logits[3:] = least
  tokens, _, _ = some(logits, Sampling.of(200, [], **cut))
  assert set(np.asarray(tokens).tolist()) == kept


@pytest.mark.parametrize(
  ('cut', 'kept'),
  [({'top_k': 2}, 2), ({'top_p': 0.7}, 2), ({'min_p': 0.2}, 3)],
  ids=str,
)
def test_a_cut_without_others(cut, kept):
  p = np.array([0.5, 0.3, 0.15, 0.05])  # 0.3 / 0.5 and 0.15 / 0.5 pass 0.2
  tokens, logprobs, _ = some(np.log(p), Sampling.of(200, [], **cut))
  assert set(np.asarray(tokens).tolist()) == set(range(kept))
  want = np.log(p / p[:kept].sum())[np.asarray(tokens)]
  np.testing.assert_allclose(logprobs, want, atol=1e-5)


def test_the_most_likely_token_is_never_cut():
  setting = Sampling.of(200, [], top_p=1e-9, min_p=0.99, top_k=1)
  tokens, logprobs, _ = some([-5.0, -1.0, -np.inf], setting)
  np.testing.assert_array_equal(tokens, 1)
  np.testing.assert_array_equal(logprobs, 0)
  nothing = setting.replace(top_p=jnp.zeros(200, jnp.float32))
  np.testing.assert_array_equal(some([0.0, 1.0], nothing)[0], 1)


def test_the_coldest_temperature_is_greedy():
  tokens, logprobs, _ = some(
    [300.0, 200.0, -300.0], Sampling.of(200, [], temperature=1e-37)
  )
  np.testing.assert_array_equal(tokens, 0)
  np.testing.assert_array_equal(logprobs, 0)


@pytest.mark.parametrize('odd', [False, True])
def test_no_first_token_holds_a_stop_string(key, odd):
  pieces = [b'a', b'b', b'ba', b'cab', b'']  # and one that has no piece
  kinds = [['ab'], ['a', 'ba'], []]  # each at the first token and at others
  strings = stop_strings([row for row in kinds for _ in range(200)], pieces)
  first = np.arange(600) % 2 == odd
  tokens, _, _ = sample(
    jax.random.split(key, 600),
    jnp.zeros((600, 6), jnp.float32),
    Sampling.of(600, [1], strings=strings),
    first=jnp.asarray(first),
  )
  tokens = np.asarray(tokens).reshape(3, 200)
  first = first.reshape(3, 200)
  assert [set(x[f].tolist()) for x, f in zip(tokens, first, strict=True)] == [
    {0, 2, 4, 5},
    {4, 5},
    {0, 2, 3, 4, 5},
  ]
  for x, f in zip(tokens, first, strict=True):
    assert set(x[~f].tolist()) == set(range(6))


def test_no_penalty_needs_no_table(key):
  logits, first = jnp.asarray(LOGITS), jnp.zeros(len(SETTINGS), bool)
  keys = jax.random.split(key, len(SETTINGS))
  off, ones = settings(repetition=None), settings(repetition=1.0)
  got = sample(jax.random.clone(keys), logits, off, first=first)
  want = sample(
    jax.random.clone(keys), logits, ones, first=first, seen=jnp.asarray(SEEN)
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(ValueError, match='pass `seen`, or set repetition to No'):
    sampling.sample(keys, logits, ones, first=first)


def test_new_settings_are_not_traced_again(key):
  counted, batch = fakes.Counted(sampling.sample), len(SETTINGS)
  draw = jax.jit(counted)
  for i in range(batch):
    keys = jax.random.split(jax.random.fold_in(key, i), batch)
    setting = settings(
      SETTINGS[i:] + SETTINGS[:i], [i, i + 1], limit=i + 1 if i else None
    )
    first, seen = np.arange(batch) < i, np.roll(SEEN, i)
    tokens, _, _ = draw(
      keys,
      jnp.asarray(LOGITS),
      setting,
      first=jnp.asarray(first),
      seen=jnp.asarray(seen),
    )
    assert not np.isin(tokens[:i], [i, i + 1]).any()
  assert counted.traces == 1


# Settings.


def test_settings_of_all_rows_and_of_each():
  got = Sampling.of(
    3,
    [[7], [], [8, 9]],
    temperature=[0.5, 0, 2],
    top_k=np.array([1, 0, 10**12]),
    top_p=jnp.array([0.5, 1.0, 0.25]),
    min_p=0.5,
    limit=(1, 2, 2**40),
  )
  np.testing.assert_array_equal(got.temperature, [0.5, 0, 2])
  np.testing.assert_array_equal(got.top_k, [1, 0, 2**31 - 1])
  np.testing.assert_array_equal(got.top_p, [0.5, 1, 0.25])
  np.testing.assert_array_equal(got.min_p, [0.5, 0.5, 0.5])
  np.testing.assert_array_equal(got.limit, [1, 2, 2**31 - 1])
  np.testing.assert_array_equal(got.stop, [[7, -1], [-1, -1], [8, 9]])
  assert got.repetition is None and got.strings is None
  alike = Sampling.of(2, [3, 4], repetition=1.5)
  np.testing.assert_array_equal(alike.stop, [[3, 4], [3, 4]])
  np.testing.assert_array_equal(alike.repetition, [1.5, 1.5])
  np.testing.assert_array_equal(alike.temperature, [1, 1])
  np.testing.assert_array_equal(alike.limit, [2**31 - 1] * 2)
  for leaf, other in zip(
    jax.tree.leaves(alike),
    jax.tree.leaves(settings(SETTINGS[:2], [5])),
    strict=True,
  ):
    assert leaf.dtype == other.dtype and not leaf.weak_type


def test_stop_tokens_of_each_row():
  stops = jax.jit(Sampling.stops)
  setting = Sampling.of(4, [[7], [], [8, 9], [9]])
  for tokens, want in (
    ([7, 7, 7, 7], [True, False, False, False]),
    ([9, 9, 9, 9], [False, False, True, True]),
    ([8, 0, 8, 8], [False, False, True, False]),
  ):
    np.testing.assert_array_equal(stops(setting, jnp.array(tokens)), want)
  none = Sampling.of(2, [])
  np.testing.assert_array_equal(stops(none, jnp.array([0, 5])), False)


@pytest.mark.parametrize('wrap', [jax.jit, lambda f: f], ids=['jit', 'plain'])
def test_settings_of_some_rows(wrap):
  strings = stop_strings([['a'], [], ['b']], [b'a', b'b'])
  setting = settings(SETTINGS[:3], STOP[:3], limit=[4, 5, 6], strings=strings)
  got = wrap(Sampling.rows)(setting, jnp.array([2, 0]))
  for name in (*NAMES, 'limit', 'stop'):
    whole, part = getattr(setting, name), getattr(got, name)
    np.testing.assert_array_equal(part, np.asarray(whole)[[2, 0]])
  np.testing.assert_array_equal(got.strings.table, strings.table)
  start = np.asarray(strings.start)
  np.testing.assert_array_equal(got.strings.start, start[[2, 0]])
  assert settings(SETTINGS[:3], [1]).rows(jnp.array([1])).strings is None


@pytest.mark.parametrize(
  ('setting', 'said'),
  [
    ({'temperature': -0.5}, 'temperature is -0.5, and must be a number of at'),
    ({'temperature': [1, 1, np.nan]}, 'temperature is nan, and'),
    ({'temperature': np.inf}, 'temperature is inf, and'),
    ({'top_k': [0, -1, 5]}, 'top_k is -1, and must be a whole number of at l'),
    ({'top_k': 2.5}, 'top_k is 2.5, and'),
    ({'top_p': 0}, r'top_p is 0, and must be in \(0, 1\] \(1 is off\)'),
    ({'top_p': [0.5, 1.1, 1]}, 'top_p is 1.1, and'),
    ({'top_p': np.nan}, 'top_p is nan, and'),
    ({'min_p': 1}, r'min_p is 1, and must be in \[0, 1\) \(0 is off\)'),
    ({'min_p': jnp.array([0.0, 0.5, -0.5])}, 'min_p is -0.5, and'),
    ({'repetition': 0}, r'repetition is 0, and must be above 0 \(1 is off\)'),
    ({'repetition': np.inf}, 'repetition is inf, and'),
    ({'limit': 0}, 'limit is 0, and must be a whole number of at least 1'),
    ({'limit': np.nan}, 'limit is nan, and'),
    ({'limit': [5, 5]}, r'limit has 2 values of shape \(2,\) for 3 rows; give'),
    ({'top_p': [[0.5, 0.5, 0.5]]}, r'3 values of shape \(1, 3\) for 3 rows'),
    ({'stop': [[1], [2]]}, 'stop has 2 lists of ids for 3 rows; give one'),
    (
      {'strings': stop_strings([['a'], []], [b'a'])},
      'strings are for 2 rows, the batch has 3; give `stop_strings` one list',
    ),
  ],
  ids=str,
)
def test_settings_that_are_refused(setting, said):
  with pytest.raises(ValueError, match=said):
    Sampling.of(3, **{'stop': [0]} | setting)
