"""Masked sums and means: hand sums, and that nothing outside leaks in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import masked

X = jnp.array([[1.0, 2.0, jnp.nan], [5.0, jnp.inf, jnp.nan]])
MASK = jnp.array([[True, True, False], [True, False, False]])


def test_total_by_hand():
  assert masked.total(X, MASK) == 8
  np.testing.assert_array_equal(masked.total(X, MASK, axis=1), [3, 5])


def test_mean_by_hand():
  np.testing.assert_allclose(masked.mean(X, MASK), 8 / 3, rtol=1e-6)
  np.testing.assert_array_equal(masked.mean(X, MASK, axis=1), [1.5, 5])
  np.testing.assert_array_equal(masked.mean(X, MASK, axis=0), [3, 2, 0])


def test_std_by_hand():
  # 1, 2 and 5: mean 8/3, squares apart 25/9 + 4/9 + 49/9, over 3: 26/9.
  np.testing.assert_allclose(masked.std(X, MASK), (26 / 9) ** 0.5, rtol=1e-6)
  np.testing.assert_allclose(masked.std(X, MASK, axis=1), [0.5, 0])
  np.testing.assert_allclose(masked.std(X, MASK, axis=0), [2, 0, 0])


def test_log_mean_exp_by_hand():
  x, mask = jnp.log(X), MASK
  np.testing.assert_allclose(
    masked.log_mean_exp(x, mask), np.log(8 / 3), rtol=1e-6
  )
  np.testing.assert_allclose(
    masked.log_mean_exp(x, mask, axis=1), np.log([1.5, 5]), rtol=1e-6
  )
  large = masked.log_mean_exp(jnp.array([1000.0, 1000.0]), jnp.ones(2, bool))
  np.testing.assert_allclose(large, 1000)


@pytest.mark.parametrize(
  'fn, empty',
  [
    (masked.total, 0),
    (masked.mean, 0),
    (masked.std, 0),
    (masked.log_mean_exp, -np.inf),
  ],
)
def test_of_nothing(fn, empty):
  assert fn(X, jnp.zeros_like(MASK)) == empty


def test_gradients_do_not_see_what_is_masked():
  grad = jax.grad(lambda x: masked.mean(x * x, MASK))(X)
  np.testing.assert_allclose(grad[MASK], 2 * X[MASK] / 3, rtol=1e-6)
  grad = jax.grad(lambda x: masked.mean(x, MASK))(X)
  np.testing.assert_allclose(grad, MASK / 3, rtol=1e-6)
  grad = jax.grad(lambda x: masked.std(x, MASK))(X)
  # (x - mean) / (3 std): 1 - 8/3 over 3 sqrt(26/9), and so on.
  want = (X - 8 / 3) / (26**0.5)
  np.testing.assert_allclose(grad, jnp.where(MASK, want, 0), rtol=1e-5)
