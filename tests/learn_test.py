"""Advantages, losses and the step: hand sums, laws, and a toy that learns."""

import functools

import chex
import fakes
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from persona_jax import learn, models
from persona_jax.learn import advantages, losses, step
from persona_jax.learn.logprobs import token_logprobs
from persona_jax.models import decoder
from persona_jax.models.config import Kind, Rope

CONFIG = models.DecoderConfig(
  vocab=40,
  features=32,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  hidden=48,
  kinds=(Kind(Rope(1e4)),),
  norm_eps=1e-6,
)
APPLY, UNEMBED = decoder.functions(CONFIG)
B, S, M = 8, 12, 6

quickly = functools.partial(  # most of the time goes into compiling
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)


@pytest.fixture(scope='module')
def variables():
  return fakes.variables(CONFIG)


@pytest.fixture(scope='module')
def batch(variables):
  """Ragged views of B rows; row 1 has no token of the policy."""
  rng = np.random.default_rng(0)
  size = rng.integers(7, S + 1, (B, 1))
  positions = np.where(np.arange(S) < size, np.arange(S), -1)
  mask = np.arange(M) < rng.integers(1, M + 1, (B, 1))
  mask[1] = False
  normal = lambda: jnp.asarray(rng.normal(size=(B, M)), jnp.float32)
  batch = learn.Batch(
    tokens=jnp.asarray(rng.integers(0, CONFIG.vocab, (B, S))),
    positions=jnp.asarray(positions),
    before=jnp.asarray(rng.integers(0, 7, (B, M))),
    actions=jnp.asarray(rng.integers(0, CONFIG.vocab, (B, M))),
    mask=jnp.asarray(mask),
    advantages=normal(),
    old_logprobs=normal(),
    reference_logprobs=normal(),
  )
  logprobs = naive_logprobs(variables, batch, 0.8)
  return batch.replace(
    old_logprobs=logprobs + 0.2 * batch.old_logprobs,
    reference_logprobs=logprobs + 0.2 * batch.reference_logprobs,
  )


@jax.jit
def naive_logprobs(variables, batch, temperature):
  """With the logits of every slot, and python's own indexing."""
  hidden, _ = APPLY(variables, batch.tokens, batch.positions)
  logprobs = jax.nn.log_softmax(UNEMBED(variables, hidden) / temperature)
  return logprobs[jnp.arange(B)[:, None], batch.before, batch.actions]


def flat_batch(**arrays):
  """A batch whose loss is called by hand: only the [B M] arrays count."""
  first = jnp.asarray(next(iter(arrays.values())), jnp.float32)
  zeros = jnp.zeros(first.shape, jnp.float32)
  arrays = {'advantages': zeros, 'mask': zeros == 0} | arrays
  arrays = {'old_logprobs': zeros, 'reference_logprobs': zeros} | arrays
  whole = jnp.zeros(first.shape, jnp.int32)
  return learn.Batch(
    tokens=whole, positions=whole, before=whole, actions=whole, **arrays
  )


# Losses.


def clipped(logprobs, batch, **numbers):
  return learn.clipped_loss(logprobs, batch, losses.per_token(batch), **numbers)


def test_clipped_loss_by_hand():
  batch = flat_batch(
    advantages=jnp.array([[1.0, 1.0], [-1.0, -1.0]]),
    old_logprobs=jnp.full((2, 2), -1.0),
    reference_logprobs=jnp.full((2, 2), -2.0),
  )
  ratio = jnp.array([[1.5, 0.5], [1.5, 0.5]])
  logprobs = jnp.log(ratio) - 1.0
  loss, metrics = clipped(logprobs, batch, clip=0.2, kl=0.1)
  # gains: min(1.5, 1.2), min(0.5, 0.8), min(-1.5, -1.2), min(-0.5, -0.8)
  #      = 1.2 + 0.5 - 1.5 - 0.8 = -0.6, mean -0.15
  # d = -2 - logprobs = -1.405465, -0.306853; exp(d) - d - 1: 0.650718, 0.042612
  # mean of the two pairs: 0.346665
  np.testing.assert_allclose(metrics['loss/policy'], 0.15, rtol=1e-5)
  np.testing.assert_allclose(metrics['loss/kl'], 0.346665, rtol=1e-4)
  np.testing.assert_allclose(loss, 0.15 + 0.0346665, rtol=1e-4)
  np.testing.assert_allclose(metrics['policy/clipped'], 0.5)
  # 2 of 4: the good one that is likelier, the bad one that is less likely
  # ratios 1.5, 0.5: their squares 2.25, 0.25, mean 1.25
  effective = losses.summary(metrics)['policy/effective']
  np.testing.assert_allclose(effective, 1 / 1.25, rtol=1e-6)
  np.testing.assert_allclose(metrics['policy/ratio'], 1.0, rtol=1e-6)


def test_gradient_raises_what_was_good():
  batch = flat_batch(advantages=jnp.array([[2.0, -1.0, 0.0]]))
  grads = jax.grad(lambda x: clipped(x, batch, kl=0.0)[0])(jnp.zeros((1, 3)))
  # at ratio 1: -advantage / 3
  np.testing.assert_allclose(grads, [[-2 / 3, 1 / 3, 0.0]], rtol=1e-6)


@pytest.mark.parametrize(
  ('advantage', 'ratio', 'flows'),
  [
    (1.0, 1.5, False),  # good, and already likelier
    (1.0, 0.5, True),  # good, and less likely than before
    (-1.0, 0.5, False),  # bad, and already less likely
    (-1.0, 1.5, True),  # bad, and likelier than before
    (1.0, 1.1, True),
    (-1.0, 0.9, True),
  ],
)
def test_clipping_stops_only_what_goes_too_far(advantage, ratio, flows):
  batch = flat_batch(advantages=jnp.full((1, 1), advantage))
  logprobs = jnp.log(jnp.full((1, 1), ratio))
  grads = jax.grad(lambda x: clipped(x, batch, kl=0.0)[0])(logprobs)
  # d(-ratio A)/dlogp = -ratio A
  np.testing.assert_allclose(grads[0, 0], -ratio * advantage * flows, rtol=1e-5)


def test_k3_is_a_distance(key):
  first, second = jax.random.normal(key, (2, 50, 4))
  mask = jnp.ones((50, 4), bool)
  apart = losses.k3(first, second, mask)
  assert jnp.all(apart > 0)
  np.testing.assert_array_equal(losses.k3(first, first, mask), 0 * first)
  # d = log 2: 2 - log 2 - 1
  one = jnp.ones((1, 1))
  hand = losses.k3(-jnp.log(2 * one), 0 * one, one == 1)
  np.testing.assert_allclose(hand, [[0.306853]], rtol=1e-5)
  pull = jax.grad(lambda x: jnp.sum(losses.k3(x, second, mask)))(first)
  np.testing.assert_array_equal(jnp.sign(pull), jnp.sign(first - second))


def test_weights_make_means(batch):
  x, mask = np.asarray(batch.advantages), np.asarray(batch.mask)
  token, sequence = losses.per_token(batch), losses.per_sequence(batch)
  np.testing.assert_allclose(jnp.sum(token), 1, rtol=1e-6)
  np.testing.assert_allclose(jnp.sum(sequence), 1, rtol=1e-6)
  rows = [
    np.mean(row[own]) for row, own in zip(x, mask, strict=True) if own.any()
  ]
  assert len(rows) == B - 1
  np.testing.assert_allclose(np.sum(token * x), x[mask].mean(), rtol=1e-5)
  np.testing.assert_allclose(np.sum(sequence * x), np.mean(rows), rtol=1e-5)
  assert not np.any(token[~mask]) and not np.any(sequence[~mask])
  empty = batch.replace(mask=jnp.zeros((B, M), bool))
  assert not jnp.any(losses.per_token(empty))
  assert not jnp.any(losses.per_sequence(empty))


# Log-probabilities.


@pytest.mark.parametrize(
  ('held', 'temperature'),
  [(1, 1.0), (3 * B * M, 0.7), (17 * B * M, 1.0), (1 << 20, 0.7)],
)
def test_token_logprobs_are_the_naive_ones(variables, batch, held, temperature):
  @jax.jit
  def logprobs(variables, batch):
    hidden, _ = APPLY(variables, batch.tokens, batch.positions)
    return token_logprobs(
      UNEMBED,
      variables,
      hidden,
      batch.before,
      batch.actions,
      temperature=temperature,
      held=held,
    )

  np.testing.assert_allclose(
    logprobs(variables, batch),
    naive_logprobs(variables, batch, temperature),
    atol=1e-5,
  )


@pytest.mark.parametrize('held', [1, 5 * B * M, 1 << 20])
def test_entropy_and_its_gradient_are_the_naive_ones(variables, batch, held):
  def naive(variables):
    hidden, _ = APPLY(variables, batch.tokens, batch.positions)
    at = jnp.take_along_axis(hidden, batch.before[..., None], axis=1)
    logprobs = jax.nn.log_softmax(UNEMBED(variables, at) / 0.7)
    return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=2)

  def blocks(variables):
    return step.scores(
      APPLY, UNEMBED, variables, batch, temperature=0.7, held=held
    ).entropy

  def both(entropy):
    def total(variables):
      found = entropy(variables)
      return jnp.sum(jnp.sin(found)), found

    return quickly(jax.value_and_grad(total, has_aux=True))(variables)

  chex.assert_trees_all_close(both(blocks), both(naive), atol=2e-5)


def test_token_logprobs_never_hold_all_logits(variables, batch):
  hidden, _ = APPLY(variables, batch.tokens, batch.positions)

  def total(variables, hidden, held):
    return jnp.sum(
      token_logprobs(
        UNEMBED, variables, hidden, batch.before, batch.actions, held=held
      )
    )

  def logits(blocks):
    graph = jax.make_jaxpr(jax.grad(total, (0, 1)), static_argnums=2)
    held = B * M * CONFIG.vocab // blocks
    program = graph(variables, hidden, held).jaxpr
    return max(_sizes(program, CONFIG.vocab // blocks))

  assert logits(8) == B * M * CONFIG.vocab // 8  # forward and backward
  assert logits(1) == B * M * CONFIG.vocab


def test_a_model_without_a_table_is_refused(variables, batch):
  params = {'other': variables['params']['embed']}
  with pytest.raises(ValueError, match="'other'.*embed/embedding"):
    token_logprobs(
      UNEMBED,
      {'params': params},
      jnp.zeros((B, S, 32)),
      batch.before,
      batch.actions,
    )


def _sizes(jaxpr, vocab):
  """Sizes of all arrays of logits in a program, inner ones with them."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      if variable.aval.shape in ((B, M, vocab), (B * M, vocab)):
        yield variable.aval.size
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from _sizes(inner, vocab)


# The step.

OPTIMIZER = optax.sgd(1.0)  # the update is minus the gradient
LOSS = functools.partial(learn.clipped_loss, kl=0.1)


@pytest.fixture(scope='module')
def update(variables):
  """One jitted step; it counts as new what is static."""
  loss_fn = step.policy_loss(
    APPLY, UNEMBED, LOSS, {}, temperature=0.8, held=4096
  )
  return quickly(
    functools.partial(learn.train_step, loss_fn=loss_fn, optimizer=OPTIMIZER),
    static_argnames='microbatches',
  )


def test_the_step_goes_down_the_gradient_of_the_loss(variables, batch, update):
  weights = losses.per_sequence(batch)

  def naive(params):
    logprobs = naive_logprobs({'params': params}, batch, 0.8)
    return LOSS(logprobs, batch, weights)[0]

  loss, grads = quickly(jax.value_and_grad(naive))(variables['params'])
  state = learn.init_state(variables['params'], OPTIMIZER)
  after, metrics = update(state, batch, weights)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  np.testing.assert_allclose(
    metrics['norm/grads'], optax.tree.norm(grads), rtol=1e-4
  )
  assert after.step == 1 and metrics['norm/grads'] > 0.1
  want = jax.tree.map(jnp.subtract, variables['params'], grads)
  chex.assert_trees_all_close(after.params, want, atol=2e-6)


@pytest.mark.parametrize('where', ['loss', 'gradient', 'update', 'nowhere'])
def test_what_is_not_finite_changes_nothing_and_is_named(
  variables, batch, where
):
  def loss_fn(params, batch, weights):
    kernel = params['layers']['mlp']['down']['kernel']
    loss = jnp.sum(kernel**2) * (jnp.nan if where == 'loss' else 1.0)
    if where == 'gradient':  # of sqrt at zero, times zero
      loss += jnp.sum(jnp.sqrt(0.0 * kernel))
    return loss, {}

  optimizer = optax.adam(jnp.inf if where == 'update' else 0.1)
  state = learn.init_state(variables['params'], optimizer)
  after, metrics = learn.train_step(
    state, batch, losses.per_token(batch), loss_fn=loss_fn, optimizer=optimizer
  )
  told = step.culprit(int(metrics['step/culprit']), state)
  if where == 'nowhere':
    assert told is None and after.step == 1
    return
  names = {'loss': 'the loss', 'update': 'the update'}
  names['gradient'] = 'the gradient of layers/mlp/down/kernel'
  assert told == names[where]
  chex.assert_trees_all_equal(after, state)


@pytest.mark.parametrize('most', [0.1, 100.0])
def test_gradients_are_clipped_as_optax_clips_them(key, most):
  grads = {'a': jax.random.normal(key, (3, 4)), 'b': jnp.ones(5)}
  ours, theirs = step.clip(most), optax.clip_by_global_norm(most)
  found, state = ours.update(grads, ours.init(grads))
  want, other = theirs.update(grads, theirs.init(grads))
  close = (
    chex.assert_trees_all_close if most < 1 else chex.assert_trees_all_equal
  )
  close(found, want)
  assert jax.tree.structure(state) == jax.tree.structure(other)


def test_an_update_copies_no_moments(batch):
  params = {'a': jnp.zeros((1500, 1000)), 'b': jnp.zeros((1000, 1500))}
  optimizer = optax.chain(step.clip(1.0), optax.adamw(1e-3))

  def loss_fn(params, batch, weights):
    x = jnp.broadcast_to(weights[:, :1], (len(weights), 1500))
    return jnp.sum((x @ params['a'] @ params['b']) ** 2), {}

  def update(state):
    return learn.train_step(
      state, batch, batch.advantages, loss_fn=loss_fn, optimizer=optimizer
    )

  state = learn.init_state(params, optimizer)
  program = jax.jit(update, donate_argnums=0).lower(state).compile()
  held = program.memory_analysis().temp_size_in_bytes
  # The gradient, the update, and its square on the way to its norm.
  assert held < 3.1 * sum(x.nbytes for x in jax.tree.leaves(params))


@pytest.mark.parametrize('weigh', [losses.per_token, losses.per_sequence])
def test_microbatches_add_up_to_the_batch(variables, batch, update, weigh):
  state = learn.init_state(variables['params'], OPTIMIZER)
  once, whole = update(state, batch, weigh(batch), microbatches=1)
  for count in (2, 4):
    parts, metrics = update(state, batch, weigh(batch), microbatches=count)
    chex.assert_trees_all_close(parts.params, once.params, atol=1e-5)
    assert metrics.keys() == whole.keys()
    chex.assert_trees_all_close(metrics, whole, atol=1e-6, rtol=1e-5)


def test_microbatches_must_divide_the_batch(variables, batch, update):
  state = learn.init_state(variables['params'], OPTIMIZER)
  with pytest.raises(ValueError, match='8 does not divide into 3'):
    update(state, batch, losses.per_token(batch), microbatches=3)


def test_padding_never_enters(variables, batch, update):
  clean = batch
  junk = lambda x: jnp.where(clean.mask, x, jnp.nan)
  dirty = clean.replace(
    tokens=jnp.where(clean.positions < 0, 39, clean.tokens),
    actions=jnp.where(clean.mask, clean.actions, 39),
    advantages=junk(clean.advantages),
    old_logprobs=junk(clean.old_logprobs),
    reference_logprobs=junk(clean.reference_logprobs),
  )
  state = learn.init_state(variables['params'], OPTIMIZER)
  weights = losses.per_sequence(clean)
  want, metrics = update(state, clean, weights)
  got, same = update(state, dirty, weights)
  chex.assert_tree_all_finite((got, same))
  chex.assert_trees_all_close(got.params, want.params, atol=1e-6)
  chex.assert_trees_all_close(same, metrics, rtol=1e-5)


def test_nan_logprobs_outside_the_mask_do_no_harm(batch):
  logprobs = jnp.where(batch.mask, -3.5, jnp.nan)
  value = jax.value_and_grad(lambda x: clipped(x, batch)[0])
  loss, grads = value(logprobs)
  assert jnp.isfinite(loss)
  assert jnp.all(jnp.isfinite(grads)) and not jnp.any(grads[~batch.mask])


def test_the_learner_applies_the_edits_of_the_rollout(variables, batch):
  from persona_jax import taps
  from persona_jax.activations import edits

  apply = taps.edited(APPLY, edits.stored)
  vector = 2 * jax.random.normal(jax.random.key(3), (2, 32))
  loss_fn = functools.partial(
    step.policy_loss, apply, UNEMBED, LOSS, temperature=1.0, held=4096
  )
  weights = losses.per_token(batch)

  @jax.jit
  def loss(more):
    return loss_fn(more)(variables['params'], batch, weights)[0]

  free = loss({})
  still = loss({'edits': edits.steers(0 * vector)})
  pushed = loss({'edits': edits.steers(vector)})
  np.testing.assert_allclose(still, free, rtol=1e-5)
  assert abs(pushed - free) > 1e-2


def test_what_is_not_trained_stays_under_what_is(variables, batch):
  # The MLPs alone, the rest of the parameters frozen in `variables`.
  params, weights = variables['params'], losses.per_token(batch)
  mlp = {'layers': {'mlp': params['layers']['mlp']}}
  rest = {**params, 'layers': {**params['layers'], 'mlp': {}}}
  loss_fn = functools.partial(
    step.policy_loss, APPLY, UNEMBED, LOSS, temperature=1.0, held=4096
  )
  gradient = lambda more: jax.grad(loss_fn(more), has_aux=True)
  part, aux = quickly(gradient({'params': rest}))(mlp, batch, weights)
  whole, same = quickly(gradient({}))(params, batch, weights)
  assert jax.tree.structure(part) == jax.tree.structure(mlp)
  chex.assert_trees_all_close(
    part['layers']['mlp'], whole['layers']['mlp'], atol=1e-6
  )
  chex.assert_trees_all_close(aux, same, rtol=1e-5)


def bandit(name):
  """A step of a toy: after token 1, token 7 is worth one."""
  algorithm = learn.ALGORITHMS[name]
  optimizer = optax.adam(3e-2)
  ones = jnp.ones((32, 1), jnp.int32)
  loss_fn = step.policy_loss(
    APPLY, UNEMBED, algorithm.loss, {}, temperature=1.0, held=4096
  )

  def logprobs(params):
    hidden, _ = APPLY({'params': params}, ones[:1], 0 * ones[:1])
    return jax.nn.log_softmax(UNEMBED({'params': params}, hidden)[0, 0])

  @quickly
  def train(state, start, key):
    table = logprobs(state.params)
    actions = jax.random.categorical(key, table, shape=ones.shape)
    mask = ones == 1
    reference = logprobs(start)[actions]
    earned = advantages.Earned(
      rewards=jnp.float32(actions == 7),
      mask=mask[..., None],
      group=8,
      values=0.5 * mask[..., None],
      shift=(table[actions] - reference)[..., None],
      process=0.5 * jnp.float32(actions == 7)[..., None],
    )
    batch = learn.Batch(
      tokens=ones,
      positions=0 * ones,
      before=0 * ones,
      actions=actions,
      mask=mask,
      advantages=algorithm.advantage(earned).policy[..., 0],
      old_logprobs=table[actions],
      reference_logprobs=reference,
    )
    state, _ = learn.train_step(
      state,
      batch,
      algorithm.weights(batch),
      loss_fn=loss_fn,
      optimizer=optimizer,
    )
    return state, jnp.exp(table[7])

  return optimizer, train


@pytest.mark.parametrize('name', learn.ALGORITHMS)
def test_a_policy_learns_to_prefer_what_is_rewarded(variables, name):
  optimizer, train = bandit(name)
  start = jax.tree.map(lambda x: x / 2, variables['params'])
  state, chances = learn.init_state(start, optimizer), []
  for key in jax.random.split(jax.random.key(5), 40):
    state, chance = train(state, start, key)
    chances.append(chance)
  assert chances[0] < 0.1 and chances[-1] > 0.9, chances
