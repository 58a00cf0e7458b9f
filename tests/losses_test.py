"""The policy's and the critic's losses: hand sums and slow references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax.learn import ALGORITHMS, losses
from persona_jax.learn.losses import Batch

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def batch(mask, **arrays):
  """A batch whose loss is called by hand: only the [B M] arrays count."""
  mask = jnp.asarray(mask, bool)
  zeros = jnp.zeros(mask.shape, jnp.float32)
  whole = jnp.zeros(mask.shape, jnp.int32)
  arrays = {'advantages': zeros, 'old_logprobs': zeros} | arrays
  arrays = {'reference_logprobs': zeros} | arrays
  return Batch(
    tokens=whole,
    positions=whole,
    before=whole,
    actions=whole,
    mask=mask,
    **arrays,
  )


def rows(rng, lines=False):
  """Ragged tokens of three lines a row, random everywhere, NaN outside."""
  line = np.repeat(np.arange(3), 4)[None].repeat(5, 0)
  length = rng.integers(0, 5, (5, 3))
  mask = (np.arange(4)[None, None] < length[..., None]).reshape(5, 12)
  normal = lambda: jnp.where(mask, rng.normal(size=mask.shape), jnp.nan)
  found = batch(
    mask,
    advantages=normal(),
    old_logprobs=normal(),
    reference_logprobs=normal(),
    line=jnp.asarray(line),
  )
  return found, normal()


@pytest.mark.parametrize(
  ('advantage', 'ratio', 'gain'),
  [
    (1.0, 1.5, 1.28),  # good: up to 1 + clip_high
    (1.0, 1.25, 1.25),
    (1.0, 0.1, 0.1),
    (-1.0, 0.1, -0.8),  # bad: from 1 - clip on
    (-1.0, 2.0, -2.0),
    (-1.0, 9.0, -3.0),  # and no more than the dual bound
    (-2.0, 9.0, -6.0),
  ],
)
def test_bounds_by_hand(advantage, ratio, gain):
  one = batch([[True]], advantages=jnp.full((1, 1), advantage))
  loss, _ = losses.clipped_loss(
    jnp.log(jnp.full((1, 1), ratio)),
    one,
    jnp.ones((1, 1)),
    clip_high=0.28,
    dual=3.0,
    kl=0.0,
  )
  close(loss, -gain)


def test_one_ratio_a_line_by_hand():
  # a line of two tokens, shifts 0.3 and -0.1, and one of one token, 0.2
  one = batch(
    [[True, True, True, False]],
    advantages=jnp.array([[2.0, 2.0, -1.0, 7.0]]),
    line=jnp.array([[0, 0, 2, 3]]),
  )
  logprobs = jnp.array([[0.3, -0.1, 0.2, jnp.nan]])
  loss, metrics = losses.clipped_loss(
    logprobs,
    one,
    losses.per_token(one),
    clip=0.15,
    lines=True,
    kl=0.0,
  )
  # ratios e^0.1 twice, e^0.2: gains 2 e^0.1 (within), -e^0.2 (worse than 1.15)
  close(loss, -(2 * 2 * np.exp(0.1) - np.exp(0.2)) / 3)
  close(metrics['policy/clipped'], 0.0)
  grads = jax.grad(
    lambda x: losses.clipped_loss(
      x, one, losses.per_token(one), clip=0.15, lines=True, kl=0.0
    )[0]
  )(jnp.nan_to_num(logprobs))
  # each token of the first line moves the ratio of both by half
  close(grads, [[-2 * np.exp(0.1) / 3] * 2 + [np.exp(0.2) / 3, 0]])


def test_line_means_are_those_of_each_line():
  found, x = rows(np.random.default_rng(0))
  means = losses.line_means(jnp.nan_to_num(x), found)
  for row in range(5):
    for line in range(3):
      own = np.asarray(found.mask[row]) & (np.asarray(found.line[row]) == line)
      if own.any():
        close(means[row][own], np.asarray(x[row])[own].mean())
  assert not np.any(means[~found.mask])
  whole = losses.line_means(jnp.nan_to_num(x), found.replace(line=None))
  for row in range(5):
    own = np.asarray(found.mask[row])
    if own.any():
      close(whole[row][own], np.asarray(x[row])[own].mean())


def test_cispo_weighs_and_never_cuts():
  one = batch(
    [[True, True]],
    advantages=jnp.array([[1.0, 1.0]]),
    old_logprobs=jnp.array([[-3.0, -1.0]]),
  )
  logprobs = jnp.array([[-1.0, -1.5]])  # ratios e^2 = 7.389 and e^-0.5
  value = jax.value_and_grad(
    lambda x: losses.weighted_loss(x, one, losses.per_token(one), most=5.0)[0]
  )
  loss, grads = value(logprobs)
  close(loss, -(5 * -1.0 + np.exp(-0.5) * -1.5) / 2)
  close(grads, [[-5 / 2, -np.exp(-0.5) / 2]])


def test_reinforce_by_hand():
  one = batch([[True, True]], advantages=jnp.array([[2.0, -1.0]]))
  value = jax.value_and_grad(
    lambda x: losses.reinforce_loss(x, one, losses.per_token(one))[0]
  )
  loss, grads = value(jnp.array([[-1.0, -3.0]]))
  close(loss, -(2 * -1.0 + -1 * -3.0) / 2)
  close(grads, [[-1.0, 0.5]])


def test_rloo_takes_a_reply_as_one_action():
  mask = [[True, False, False], [True, True, True]]
  pair = batch(mask, advantages=jnp.array([[2.0] * 3, [-1.0] * 3]))
  _, loss, weigh, *_ = ALGORITHMS['rloo']
  logprobs = jnp.array([[-1.0, jnp.nan, jnp.nan], [-1.0, -3.0, -2.0]])
  value = jax.value_and_grad(lambda x: loss(x, pair, weigh(pair))[0])
  found, grads = value(logprobs)
  # log p -1 and -1 - 3 - 2: -(2 x -1 + -1 x -6) over the 6 slots; no token of
  # the longer reply weighs less
  close(found, -(2 * -1 + -1 * -6) / 6)
  close(grads, np.array([[-2, 0, 0], [1, 1, 1]]) / 6)


def test_imitation_is_the_mean_surprise():
  one = batch([[True, True, False]])
  logprobs = jnp.array([[-1.0, -3.0, jnp.nan]])
  close(losses.imitation_loss(logprobs, one, losses.per_token(one))[0], 2.0)


def test_value_loss_by_hand():
  one = batch(
    [[True, True, False]],
    old_values=jnp.array([[1.0, 0.0, 5.0]]),
    returns=jnp.array([[2.0, 1.0, jnp.nan]]),
  )
  values = jnp.array([[1.5, 0.1, jnp.nan]])
  # (1.5 - 2)^2 = 0.25, clipped to 1.2: 0.64; (0.1 - 1)^2 = 0.81
  loss, metrics = losses.value_loss(values, one, losses.per_token(one))
  close(loss, 0.5 * (0.64 + 0.81) / 2)
  # errors of the old values -1, -1: no variance left but all of the bias
  told = losses.summary(metrics)
  close(told['value/explained'], 1.0)
  free, _ = losses.value_loss(values, one, losses.per_token(one), clip=None)
  close(free, 0.5 * (0.25 + 0.81) / 2)


def test_explained_variance_is_its_definition():
  rng = np.random.default_rng(3)
  mask = rng.random((4, 9)) < 0.6
  old, returns = rng.normal(size=(2, 4, 9)).astype(np.float32)
  found = batch(mask, old_values=jnp.asarray(old), returns=jnp.asarray(returns))
  weights = losses.per_token(found)
  _, metrics = losses.value_loss(jnp.asarray(old), found, weights)
  want = 1 - np.var((returns - old)[mask]) / np.var(returns[mask])
  close(losses.summary(metrics)['value/explained'], want, rtol=1e-4)


def test_truncated_weights_by_hand():
  old = jnp.array([[-1.0, -1.0, -2.0, jnp.nan]])
  sampled = jnp.array([[-1.0, -3.0, -1.5, jnp.nan]])
  mask = jnp.array([[True, True, True, False]])
  found = losses.truncated(old, sampled, mask, 2.0)
  close(found, [[1.0, 2.0, np.exp(-0.5), 1.0]])


def test_a_correction_weighs_the_gain_and_not_the_distance():
  found, logprobs = rows(np.random.default_rng(1))
  weights = losses.per_token(found)
  twice = found.replace(correction=2 * jnp.ones(found.mask.shape))
  _, plain = losses.clipped_loss(logprobs, found, weights)
  _, double = losses.clipped_loss(logprobs, twice, weights)
  close(double['loss/policy'], 2 * plain['loss/policy'])
  close(double['loss/kl'], plain['loss/kl'])


POLICY = pytest.mark.parametrize(
  'loss',
  [
    losses.clipped_loss,
    functools.partial(losses.clipped_loss, lines=True),
    functools.partial(losses.clipped_loss, kl_kind='k2'),
    losses.weighted_loss,
    losses.reinforce_loss,
    losses.imitation_loss,
  ],
)


@POLICY
def test_padding_never_enters(loss):
  found, logprobs = rows(np.random.default_rng(2))
  weights = losses.per_sequence(found)
  value = jax.value_and_grad(loss, has_aux=True)
  (got, _), grads = value(logprobs, found, weights)
  assert np.isfinite(got) and np.all(np.isfinite(grads))
  assert not np.any(grads[~found.mask]) and np.any(grads[found.mask])


@POLICY
def test_parts_of_a_batch_add_up(loss):
  found, logprobs = rows(np.random.default_rng(4))
  weights = losses.per_token(found)
  whole, metrics = loss(logprobs, found, weights)
  parts = [
    loss(
      logprobs[part], jax.tree.map(lambda x, p=part: x[p], found), weights[part]
    )
    for part in (slice(0, 2), slice(2, 5))
  ]
  close(whole, sum(x[0] for x in parts))
  for name in metrics:
    close(metrics[name], sum(x[1][name] for x in parts))


@POLICY
def test_an_empty_mask_is_nothing(loss):
  found, logprobs = rows(np.random.default_rng(5))
  empty = found.replace(mask=jnp.zeros_like(found.mask))
  for weigh in (losses.per_token, losses.per_sequence, losses.per_slot):
    value, grads = jax.value_and_grad(
      lambda x, w=weigh: loss(x, empty, w(empty))[0]
    )(logprobs)
    assert value == 0 and not np.any(grads)


@pytest.mark.parametrize('loss', [losses.clipped_loss, losses.reinforce_loss])
def test_what_is_told_is_a_mean_whatever_the_weights(loss):
  one = batch([[True, True, False, False]])
  logprobs = jnp.log(jnp.array([[0.5, 2.0, jnp.nan, jnp.nan]]))
  for weigh in (losses.per_token, losses.per_slot):  # 1/2 each, or 1/4
    metrics = loss(logprobs, one, weigh(one))[1] | {'policy/culprit': 3}
    told = losses.summary(metrics)
    # ratios 1/2 and 2: mean 1.25, of squares 2.125
    close(told['policy/ratio'], 1.25)
    close(told['policy/effective'], 1.25**2 / 2.125)
    assert told['policy/culprit'] == 3 and 'policy/weight' not in told


def test_room_weighs_long_and_short_alike():
  found, _ = rows(np.random.default_rng(6))
  weights = losses.per_slot(found)
  close(weights, np.asarray(found.mask) / 60)


@pytest.mark.parametrize(('kind', 'value'), [('k1', 0.5), ('k2', 0.125)])
def test_distances_by_hand(kind, value):
  one = jnp.ones((1, 1))
  close(losses.DISTANCES[kind](-0.5 * one, -one, one == 1), [[value]])


def test_the_gradient_of_k2_is_that_of_the_distance():
  # E over the policy of grad k2 = grad KL(policy, reference), a table of 5
  logits = jnp.array([0.3, -1.0, 0.5, 0.0, 2.0])
  reference = jax.nn.log_softmax(jnp.array([1.0, 0.0, -0.5, 0.2, 0.1]))

  def distance(logits):
    policy = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(policy) * (policy - reference))

  def surrogate(logits):
    policy = jax.nn.log_softmax(logits)
    weight = jax.lax.stop_gradient(jnp.exp(policy))
    mask = jnp.ones((1, 5), bool)
    return jnp.sum(weight * losses.k2(policy[None], reference[None], mask)[0])

  close(jax.grad(surrogate)(logits), jax.grad(distance)(logits))
