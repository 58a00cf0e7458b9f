"""Drawing tokens, against a reference that sorts."""

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax.rollout import Sampling, sampling

DRAWS, VOCAB = 3000, 40
SETTINGS = (  # temperature, top_k, top_p
  (1.0, 0, 1.0),
  (0.7, 5, 1.0),
  (1.3, 0, 0.8),
  (1.0, 10, 0.6),
  (0.5, 30, 0.9),
  (2.0, 1, 1.0),
  (1.0, 0, 0.01),
  (0.0, 0, 1.0),
  (0.0, 5, 0.5),
)
LOGITS = 1.5 * np.random.default_rng(0).standard_normal((len(SETTINGS), VOCAB))
LOGITS = LOGITS.astype(np.float32)
LIKELY = LOGITS[-2:].argmax(1)  # as stop ids: what the greedy rows would say
sample = jax.jit(sampling.sample)


def softmax(x):
  x = np.exp(x - x.max())
  return x / x.sum()


def reference(logits, temperature, top_k, top_p, barred=()):
  """Log-probabilities of one row, in float64; -inf where it was cut."""
  logits = logits.astype(np.float64)
  logits[list(barred)] = -np.inf
  if temperature == 0:
    return np.where(np.arange(logits.size) == logits.argmax(), 0, -np.inf)
  scaled = logits / temperature
  order = np.argsort(-scaled)[: np.isfinite(scaled).sum()]
  kept = order[: top_k or None]
  mass = np.cumsum(softmax(scaled[kept]))
  kept = kept[: np.sum(mass < top_p) + 1 if top_p < 1 else None]
  out = np.full(logits.shape, -np.inf)
  out[kept] = np.log(softmax(scaled[kept]))
  return out


def many(key, settings, stop, first):
  """`DRAWS` draws of every setting, all of them in one batch."""
  temperature, top_k, top_p = (
    np.repeat(column, DRAWS) for column in zip(*settings, strict=True)
  )
  rows = len(settings) * DRAWS
  drawn = sample(
    jax.random.split(key, rows),
    jnp.repeat(LOGITS, DRAWS, axis=0),
    Sampling(
      temperature=jnp.asarray(temperature, jnp.float32),
      top_k=jnp.asarray(top_k, jnp.int32),
      top_p=jnp.asarray(top_p, jnp.float32),
      stop=jnp.asarray(stop, jnp.int32),
    ),
    first=jnp.asarray(first),
  )
  return [np.asarray(x).reshape(-1, DRAWS) for x in drawn]


@pytest.mark.parametrize('first', [False, True])
def test_draws_are_those_of_the_reference(key, first):
  tokens, logprobs, raw = many(key, SETTINGS, LIKELY, first)
  for i, setting in enumerate(SETTINGS):
    want = reference(LOGITS[i], *setting, barred=LIKELY if first else ())
    got = np.isin(np.arange(VOCAB), tokens[i])
    # Of 3000 draws, less than one in 1e5 misses what has 0.4 %.
    np.testing.assert_array_equal(got[want > np.log(0.004)], True)
    assert not got[want == -np.inf].any()
    np.testing.assert_allclose(logprobs[i], want[tokens[i]], atol=1e-5)
    untempered = np.log(softmax(LOGITS[i].astype(np.float64)))
    np.testing.assert_allclose(raw[i], untempered[tokens[i]], atol=1e-5)
  assert np.isin(tokens, LIKELY).any() != first


@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_draws_follow_the_distribution(key, temperature):
  # Over three blocks of the sum; 30000 draws at once.
  rows, vocab = 30000, 300
  logits = np.random.default_rng(1).standard_normal(vocab, np.float32)
  tokens, _, _ = sample(
    jax.random.split(key, rows),
    jnp.broadcast_to(logits, (rows, vocab)),
    Sampling.of(rows, [0], temperature=temperature),
    first=jnp.asarray(False),
  )
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


def test_equal_logits_are_cut_together(key):
  logits = jnp.array([[3.0, 3.0, 3.0, 0.0, -1.0]])
  rows = 200
  tokens, logprobs, _ = sample(
    jax.random.split(key, rows),
    jnp.broadcast_to(logits, (rows, 5)),
    Sampling.of(rows, [4], top_k=1),
    first=jnp.asarray(False),
  )
  assert set(np.asarray(tokens).tolist()) == {0, 1, 2}
  np.testing.assert_allclose(logprobs, np.log(1 / 3), atol=1e-5)


def test_new_settings_are_not_traced_again(key):
  counted = fakes.Counted(sampling.sample)
  draw = jax.jit(counted)
  logits = jnp.asarray(LOGITS)
  for i, setting in enumerate(SETTINGS):
    temperature, top_k, top_p = setting
    keys = jax.random.split(jax.random.fold_in(key, i), len(SETTINGS))
    of = {'temperature': temperature, 'top_k': top_k, 'top_p': top_p}
    sampled = Sampling.of(len(SETTINGS), [i, i + 1], **of)
    tokens, _, _ = draw(keys, logits, sampled, first=jnp.asarray(i < 4))
    if i < 4:
      assert not np.isin(tokens, [i, i + 1]).any()
  assert counted.traces == 1
