"""Packed rows are the rows they hold: losses, gradients, metrics."""

import functools

import chex
import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import learn
from persona_jax.learn import losses, packing, step
from persona_jax.learn.losses import Batch
from persona_jax.models import decoder

B, S, M = 7, 24, 12


@pytest.fixture(scope='module')
def batch():
  """Ragged texts; slots without a token stand amid them too."""
  rng = np.random.default_rng(0)
  size = rng.integers(6, S + 1, (B, 1))
  real = (np.arange(S) < size) & (rng.random((B, S)) < 0.9)
  real[:, 0] = True
  positions = np.asarray(fakes.ragged(real))
  places = [rng.choice(np.flatnonzero(row), M) for row in real]
  normal = lambda: rng.normal(size=(B, M)).astype(np.float32)
  arrays = dict(
    tokens=rng.integers(0, 300, (B, S)),
    positions=positions,
    before=np.stack(places),
    actions=rng.integers(0, 300, (B, M)),
    mask=rng.random((B, M)) < 0.7,
    advantages=normal(),
    old_logprobs=normal() - 5,
    reference_logprobs=normal() - 5,
    line=np.repeat(np.arange(3), M // 3)[None].repeat(B, 0),
  )
  return Batch(**{name: jnp.asarray(x) for name, x in arrays.items()})


def assert_same(batch, attend, loss):
  """The loss, metrics and gradient of a batch, whole and packed."""
  weights = losses.per_sequence(batch)
  packed = packing.pack(batch, weights, slots=48)
  assert len(packed.rows) < B and packed.used > 0.7
  apply, unembed = decoder.functions(fakes.CONFIG, attend=attend)
  loss_fn = step.policy_loss(apply, unembed, loss, {})
  value = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  params = fakes.variables(fakes.CONFIG)['params']
  want = value(params, batch, weights)
  got = value(params, packed.batch, packed.weights)
  chex.assert_trees_all_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('lines', [False, True])
def test_packed_is_unpacked(batch, lines):
  loss = functools.partial(learn.clipped_loss, lines=lines, kl=0.1)
  assert_same(batch, 'xla', loss)


def test_packed_is_unpacked_by_pallas(batch):
  assert_same(batch, 'pallas', learn.clipped_loss)


def test_a_text_does_not_see_the_one_before(batch):
  # That the tests above can fail: the same rows with positions counted on.
  apply, _ = decoder.functions(fakes.CONFIG)
  variables = fakes.variables(fakes.CONFIG)
  tokens, _ = fakes.text(batch=1, length=10)
  apart = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
  hidden, _ = apply(variables, tokens, apart)
  alone, _ = apply(variables, tokens[:, 4:], apart[:, 4:])
  np.testing.assert_allclose(hidden[:, 4:], alone, atol=1e-5)
  joined, _ = apply(variables, tokens, jnp.arange(10)[None])
  assert np.abs(joined[:, 4:] - alone).max() > 1e-2


def test_the_longest_go_first_where_they_fit_best():
  assert packing.dealt([3, 9, 5, 2, 5], 10) == [[1], [2, 4], [0, 3]]
  assert packing.dealt([10, 10], 10) == [[0], [1]]


def test_rows_are_added_so_that_batches_share_a_program(batch):
  weights = jnp.ones((B, M))
  packed = packing.pack(batch, weights, slots=48, rows=6)
  assert packed.batch.tokens.shape == (6, 48)
  assert packed.batch.actions.shape[1] % 64 == 0
  assert not packed.weights[len(packed.rows) :].any()
  assert (packed.batch.positions[len(packed.rows) :] == -1).all()


def test_what_cannot_be_packed_is_refused(batch):
  weights = jnp.ones((B, M))
  with pytest.raises(ValueError, match='more than the 8 slots of a row'):
    packing.pack(batch, weights, slots=8)
  with pytest.raises(ValueError, match='and there are 1; give more rows'):
    packing.pack(batch, weights, slots=48, rows=1)
  labelled = batch.replace(label=jnp.ones(B))
  with pytest.raises(ValueError, match='one weight a row'):
    packing.pack(labelled, weights, slots=48)
