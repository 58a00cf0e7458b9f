"""Preference losses and PRIME's reward model: hand sums and laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax.learn import losses, preferences, process
from persona_jax.learn.losses import Batch

close = functools.partial(np.testing.assert_allclose, rtol=1e-5)


def batch(mask, reference=0.0, **more):
  """A batch whose loss is called by hand."""
  mask = jnp.asarray(mask, bool)
  zeros = jnp.zeros(mask.shape, jnp.float32)
  whole = jnp.zeros(mask.shape, jnp.int32)
  return Batch(
    tokens=whole,
    positions=whole,
    before=whole,
    actions=whole,
    mask=mask,
    advantages=zeros,
    old_logprobs=zeros,
    reference_logprobs=zeros + reference,
    **more,
  )


# One pair: the chosen reply -1 - 2 = -3 of two tokens, the rejected -4 of one.
MASK = [[[True, True], [True, False]]]
LOGPROBS = jnp.array([[[-1.0, -2.0], [-4.0, jnp.nan]]])
REFERENCE = jnp.array([[[-2.0, -2.0], [-2.5, jnp.nan]]])  # -4, -2.5
ONE = jnp.ones(1)


def test_dpo_by_hand():
  pairs = batch(MASK, REFERENCE)
  # margin 1, of the reference -1.5: beta 0.5 x 2.5 = 1.25
  loss, metrics = preferences.dpo_loss(LOGPROBS, pairs, ONE, beta=0.5)
  close(loss, np.log1p(np.exp(-1.25)))
  close(metrics['preference/margin'], 1.25)
  close(metrics['preference/right'], 1.0)
  # 0.9 x log(1 + e^-1.25) + 0.1 x log(1 + e^1.25)
  loss, _ = preferences.dpo_loss(LOGPROBS, pairs, ONE, beta=0.5, smoothing=0.1)
  close(loss, 0.9 * np.log1p(np.exp(-1.25)) + 0.1 * np.log1p(np.exp(1.25)))


def test_ipo_by_hand():
  # means -1.5, -4 and -2, -2.5: 2.5 - 0.5 - 1 / (2 x 0.5) = 1
  loss, _ = preferences.ipo_loss(
    LOGPROBS, batch(MASK, REFERENCE), ONE, beta=0.5
  )
  close(loss, 1.0)


def test_simpo_by_hand():
  # 2 x (-1.5 + 4) - 1 = 4
  loss, _ = preferences.simpo_loss(LOGPROBS, batch(MASK), ONE)
  close(loss, np.log1p(np.exp(-4.0)))


def test_orpo_by_hand():
  # odds p / (1 - p): chosen e^-1.5, rejected e^-4
  odds = lambda x: np.exp(x) / (1 - np.exp(x))
  ratio = np.log(odds(-1.5) / odds(-4.0))
  loss, _ = preferences.orpo_loss(LOGPROBS, batch(MASK), ONE, beta=0.1)
  close(loss, 1.5 + 0.1 * np.log1p(np.exp(-ratio)))


def test_orpo_of_a_certain_reply_is_finite():
  sure = jnp.zeros((1, 2, 2))
  value = jax.value_and_grad(
    lambda x: preferences.orpo_loss(x, batch(MASK), ONE)[0]
  )
  loss, grads = value(sure)
  assert np.isfinite(loss) and np.all(np.isfinite(grads))


def test_kto_by_hand():
  mask = [[True, True], [True, False]]
  logprobs = jnp.array([[-1.0, -2.0], [-4.0, jnp.nan]])
  single = batch(
    mask,
    jnp.array([[-2.0, -2.0], [-2.5, jnp.nan]]),
    label=jnp.array([1.0, 0.0]),
    anchor=jnp.array([0.5, 0.5]),
  )
  # rewards 1, -1.5; gains 0.5 and 2: the mean of 1 - sigmoid(0.1 gain),
  # the undesirable one weighted by 2
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  loss, metrics = preferences.kto_loss(
    logprobs, single, jnp.full(2, 0.5), undesirable=2.0
  )
  close(loss, 0.5 * (1 - sigmoid(0.05)) + 0.5 * 2 * (1 - sigmoid(0.2)))
  close(metrics['preference/right'], 1.0)
  close(metrics['preference/desirable'], 0.1)


def test_the_anchor_is_never_below_zero_and_has_no_gradient():
  mask = jnp.array([[True, True], [True, False], [False, False]])
  logprobs = jnp.array([[-1.0, -2.0], [-4.0, jnp.nan], [jnp.nan, jnp.nan]])
  # (-3 + 4) and (-4 + 2): mean -0.5
  reference = jnp.array([[-2.0, -2.0], [-2.0, 0.0], [0.0, 0.0]])
  assert preferences.anchor(logprobs, reference, mask) == 0
  # (-3 + 4) and (-4 + 6): mean 1.5
  reference = jnp.array([[-2.0, -2.0], [-6.0, 0.0], [0.0, 0.0]])
  close(preferences.anchor(logprobs, reference, mask), 1.5)
  clean = jnp.nan_to_num(logprobs)
  grads = jax.grad(lambda x: preferences.anchor(x, reference, mask))(clean)
  assert not np.any(grads)


PAIRED = pytest.mark.parametrize(
  'loss',
  [
    preferences.dpo_loss,
    preferences.ipo_loss,
    preferences.simpo_loss,
    preferences.orpo_loss,
  ],
)


@PAIRED
def test_the_chosen_is_raised_and_the_rejected_lowered(loss):
  logprobs = jnp.full((1, 2, 2), -1.0)
  grads = jax.grad(lambda x: loss(x, batch(MASK), ONE)[0])(logprobs)
  assert np.all(grads[0, 0] < 0) and grads[0, 1, 0] > 0
  assert grads[0, 1, 1] == 0  # padding


@PAIRED
def test_equal_replies_push_nothing_apart(loss):
  # Of DPO, IPO and SimPO the two gradients cancel on equal tokens.
  logprobs = jnp.full((1, 2, 2), -1.0)
  pairs = batch(np.ones((1, 2, 2), bool))
  grads = jax.grad(lambda x: loss(x, pairs, ONE)[0])(logprobs)
  if loss is not preferences.orpo_loss:  # which also imitates the chosen one
    close(grads[0, 0] + grads[0, 1], 0, atol=1e-6)


@PAIRED
def test_pairs_weigh_as_told(loss, key):
  mask = np.ones((3, 2, 4), bool)
  logprobs = -jnp.abs(jax.random.normal(key, (3, 2, 4)))
  weights = jnp.array([0.2, 0.3, 0.5])
  whole, metrics = loss(logprobs, batch(mask), weights)
  apart = [
    loss(logprobs[i : i + 1], batch(mask[:1]), weights[i : i + 1])
    for i in range(3)
  ]
  close(whole, sum(x[0] for x in apart))
  for name, value in metrics.items():
    close(value, sum(x[1][name] for x in apart), atol=1e-6)


def test_rows_without_tokens_do_not_weigh():
  mask = np.ones((3, 2, 4), bool)
  mask[1, 1] = False  # no rejected reply
  close(losses.per_row(batch(mask)), [0.5, 0, 0.5])
  close(losses.per_row(batch(mask[:, 0])), np.full(3, 1 / 3))
  assert not np.any(losses.per_row(batch(0 * mask)))


# PRIME.


def test_outcome_loss_by_hand():
  mask = [[True, True], [True, False]]
  logprobs = jnp.array([[-1.0, -2.0], [-4.0, jnp.nan]])
  single = batch(
    mask,
    jnp.array([[-2.0, -2.0], [-2.5, jnp.nan]]),
    label=jnp.array([1.0, 0.0]),
  )
  # 0.5 x 1 and 0.5 x -1.5
  loss, metrics = process.outcome_loss(
    logprobs, single, jnp.full(2, 0.5), beta=0.5
  )
  want = 0.5 * np.log1p(np.exp(-0.5)) + 0.5 * np.log1p(np.exp(-0.75))
  close(loss, want)
  close(metrics['process/right'], 1.0)
  tokens = process.implicit(
    logprobs, single.reference_logprobs, single.mask, beta=0.5
  )
  close(tokens, [[0.5, 0.0], [-0.75, 0.0]])


def test_outcomes_are_told_within_the_group():
  rewards = jnp.array([[1.0, 9.0], [2.0, 9.0], [5.0, 0.0], [5.0, 0.0]])
  spoken = jnp.array([[True, False]] * 2 + [[True, True]] * 2)
  close(process.outcomes(rewards, spoken, 2), [0, 1, 0.5, 0.5])
