"""Edits of activations: hand sums, laws, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import taps
from persona_jax.activations import edits

AXIS = jnp.array([0.6, 0.8])
floor = functools.partial(edits.cap, axis=AXIS, low=1.0, high=jnp.inf)


@pytest.fixture
def x(key):
  return 2 * jax.random.normal(key, (4, 7, 16))


@pytest.fixture
def axis(key):
  return edits.unit(jax.random.normal(jax.random.fold_in(key, 1), (16,)))


@pytest.mark.parametrize(
  'x, want',
  [
    ((1.0, 0.0), (1.24, 0.32)),  # 0.6 along: 0.4 (0.6, 0.8) is added
    ((2.0, 1.0), (2.0, 1.0)),  # 2.0 along
    ((-1.0, 2.0), (-1.0, 2.0)),  # 1.0 along, on the floor
    ((0.0, 0.0), (0.6, 0.8)),
    ((-3.0, 1.0), (-1.8, 2.6)),  # -1.0 along: 2 (0.6, 0.8) is added
  ],
)
def test_floor_by_hand(x, want):
  np.testing.assert_allclose(floor(jnp.array(x)), want, rtol=1e-6, atol=1e-6)


def test_ceiling_by_hand():
  # (2, 1) lies 2.0 along, 0.5 too much: 0.5 (0.6, 0.8) is taken.
  capped = edits.cap(jnp.array([2.0, 1.0]), AXIS, -jnp.inf, 1.5)
  np.testing.assert_allclose(capped, [1.7, 0.6], rtol=1e-6)


def test_projection_lies_within_the_bounds(x, axis):
  along = edits.projection(x, axis)
  capped = edits.projection(edits.cap(x, axis, -0.5, 0.7), axis)
  np.testing.assert_allclose(capped, np.clip(along, -0.5, 0.7), atol=1e-5)
  assert (along < -0.5).any() and (along > 0.7).any()


def test_cap_is_idempotent(x, axis):
  once = edits.cap(x, axis, -0.5, 0.7)
  twice = edits.cap(once, axis, -0.5, 0.7)
  np.testing.assert_allclose(twice, once, atol=1e-6)
  assert np.abs(once - x).max() > 0.5


def test_what_is_orthogonal_stays(x, axis):
  across = lambda x: x - np.einsum('...d,d,e->...e', x, axis, axis)
  capped = edits.cap(x, axis, -0.5, 0.7)
  np.testing.assert_allclose(across(capped), across(x), atol=1e-5)


def test_floor_is_the_negated_ceiling(x, axis):
  ceiling = edits.cap(x, -axis, -jnp.inf, -0.3)
  np.testing.assert_array_equal(edits.cap(x, axis, 0.3, jnp.inf), ceiling)


@pytest.mark.parametrize(
  'x, acts', [((1.0, 0.5), False), ((0.4, 0.2), True), ((-1.0, 3.0), False)]
)
def test_gradient_is_that_of_finite_differences(x, acts):
  # Of a curved function of the capped x; 0.9 along is where the floor ends.
  def value(x):
    capped = edits.cap(x, AXIS, 0.9, jnp.inf)
    return jnp.sin(capped[0]) * capped[1]

  x, step = jnp.array(x), 1e-2
  want = [
    (value(x + step * unit) - value(x - step * unit)) / (2 * step)
    for unit in jnp.eye(2)
  ]
  grad = jax.grad(value)(x)
  np.testing.assert_allclose(grad, want, atol=2e-4)
  along = abs(float(grad @ AXIS))
  assert along < 1e-6 if acts else along > 0.1


def test_steer_by_hand():
  steered = edits.steer(jnp.ones((3, 2)), jnp.array([0.5, -2.0]))
  np.testing.assert_array_equal(steered, [[1.5, -1.0]] * 3)


def test_ablate_removes_the_axis_alone(x, axis):
  left = edits.ablate(x, axis)
  want = x - np.einsum('...d,d,e->...e', x, axis, axis)
  np.testing.assert_allclose(left, want, atol=1e-5)


def test_bfloat16_is_projected_in_float32(key):
  # In bfloat16 the sum of 512 products would be off by about 0.1.
  key_x, key_axis = jax.random.split(key)
  x = (3 * jax.random.normal(key_x, (32, 512))).astype(jnp.bfloat16)
  axis = edits.unit(jax.random.normal(key_axis, (512,)))
  along = edits.projection(x, axis)
  want = np.asarray(x, np.float64) @ np.asarray(axis, np.float64)
  assert along.dtype == jnp.float32
  np.testing.assert_allclose(along, want, atol=2e-5)
  rough = jnp.einsum('bd,d->b', x, axis.astype(jnp.bfloat16))
  assert np.abs(rough.astype(jnp.float32) - want).max() > 5e-3


@pytest.mark.parametrize(
  'edit',
  [
    lambda x, v: edits.cap(x, v, jnp.float32(0.1), jnp.float32(0.2)),
    edits.steer,
    edits.ablate,
  ],
)
def test_bfloat16_stays_bfloat16(edit):
  x = jnp.ones((2, 2), jnp.bfloat16)
  assert edit(x, AXIS).dtype == jnp.bfloat16


def test_unit_of_zero_is_zero():
  rows = edits.unit(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
  np.testing.assert_allclose(rows, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)


def test_collections_hold_no_weak_types():
  # A weakly typed leaf would be traced again when it is replaced.
  made = (
    edits.caps(jnp.ones((2, 3)), jnp.full(2, 0.5), jnp.full(2, jnp.inf)),
    edits.no_caps(2, 3),
    edits.steers(jnp.full((2, 3), 1.0)),
  )
  for leaf in jax.tree.leaves(made):
    assert leaf.dtype in (jnp.float32, jnp.int32) and not leaf.weak_type
  form = jax.tree.map(jnp.shape, made[0])
  assert form == jax.tree.map(jnp.shape, made[1])


def test_merged_holds_every_kind():
  axis = jnp.ones((2, 3))
  both = edits.merged(edits.no_caps(2, 3), edits.probes(axis))
  assert set(both['layers'][edits.SITE]) == {'cap', 'probe'}


def test_a_cap_spares_what_comes_before_its_first_position():
  axis, none = jnp.array([[0.6, 0.8]]), jnp.full(1, -jnp.inf)
  x = jnp.array([[[3.0, 4.0], [3.0, 4.0], [-3.0, -4.0]]])  # along 5, 5, -5
  for first, moved in ((0, [1, 1, 0]), (1, [0, 1, 0]), (3, [0, 0, 0])):
    collection = edits.caps(axis, none, jnp.ones(1), first=first)
    site = jax.tree.map(lambda a: a[0], collection['layers'][edits.SITE])
    tap = taps.Tap(jnp.arange(3)[None]).bind({'edits': site})
    np.testing.assert_array_equal(edits.cap_acts(tap, x)[0], moved)
    along = edits.projection(edits.stored(tap, x), axis[0])[0]
    np.testing.assert_allclose(
      along, jnp.where(jnp.array(moved), 1, jnp.array([5, 5, -5])), rtol=1e-6
    )
