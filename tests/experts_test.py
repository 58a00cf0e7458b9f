"""Mixtures of experts against a loop over tokens, on one device and on many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from persona_jax.models import experts

TOKENS, FEATURES, HIDDEN, COUNT, ACTIVE = 24, 6, 5, 8, 3


def problem(seed=0, ids=None):
  """Tokens, weights, ids and kernels; some experts get no token at all."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  if ids is None:
    ids = [rng.permutation(COUNT - 2)[:ACTIVE] for _ in range(TOKENS)]
  kernels = {
    'gate': normal(COUNT, HIDDEN, FEATURES),
    'up': normal(COUNT, HIDDEN, FEATURES),
    'down': normal(COUNT, FEATURES, HIDDEN),
  }
  ids = jnp.asarray(np.array(ids), jnp.int32)
  return normal(TOKENS, FEATURES), jnp.abs(normal(*ids.shape)), ids, kernels


def by_hand(x, weights, ids, kernels):
  x, weights, ids = map(np.asarray, (x, weights, ids))
  out = np.zeros_like(x)
  for n in range(len(x)):
    for weight, i in zip(weights[n], ids[n], strict=True):
      gate, up, down = (
        np.asarray(kernels[k])[i] for k in ('gate', 'up', 'down')
      )
      out[n] += weight * (down @ (np.tanh(gate @ x[n]) * (up @ x[n])))
  return out


@pytest.mark.parametrize('seed', range(3))
def test_grouped_is_the_loop_over_tokens(seed):
  args = problem(seed)
  got = jax.jit(functools.partial(experts.grouped, act=jnp.tanh))(*args)
  np.testing.assert_allclose(got, by_hand(*args), atol=1e-5)


def test_all_tokens_may_choose_one_expert():
  args = problem(ids=[[5, 0, 1]] * TOKENS)
  got = experts.grouped(*args, jnp.tanh)
  np.testing.assert_allclose(got, by_hand(*args), atol=1e-5)


@pytest.mark.devices
@pytest.mark.parametrize(
  'shape', [(1, 8), (2, 4), (4, 2)], ids=lambda shape: f'{shape}'
)
def test_spread_experts_give_the_same_and_the_same_gradients(shape):
  mesh = jax.make_mesh(shape, ('data', 'tensor'), (AxisType.Auto,) * 2)
  args = problem()
  rows, held = P('data'), P('tensor')
  places = (rows, rows, rows, {k: held for k in args[3]})
  put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
  spread = jax.tree.map(put, args, places)
  mix = experts.sharded(mesh, 'tensor')

  def loss(mix, x, weights, ids, kernels):
    return jnp.sum(jnp.sin(mix(x, weights, ids, kernels, jnp.tanh)))

  value = lambda mix: jax.jit(
    jax.value_and_grad(functools.partial(loss, mix), argnums=(0, 1, 3))
  )
  want, grads = value(experts.grouped)(*args)
  got, again = value(mix)(*spread)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  close = functools.partial(np.testing.assert_allclose, atol=1e-4)
  jax.tree.map(close, again, grads)
  assert again[2]['gate'].sharding.spec[0] == 'tensor'


@pytest.mark.devices
def test_each_device_computes_with_its_own_experts_alone():
  mesh = jax.make_mesh((1, 8), ('data', 'tensor'), (AxisType.Auto,) * 2)
  mix = jax.jit(
    functools.partial(experts.sharded(mesh, 'tensor'), act=jnp.tanh)
  )
  x, weights, ids, kernels = problem()
  place = NamedSharding(mesh, P('tensor'))
  kernels = {k: jax.device_put(v, place) for k, v in kernels.items()}
  text = mix.lower(x, weights, ids, kernels).compile().as_text()
  assert 'all-reduce' in text
  assert 'all-gather' not in text
  assert f'f32[{COUNT},{HIDDEN},{FEATURES}]' not in text


def test_experts_over_two_axes_are_refused():
  mesh = jax.make_mesh((1, 1), ('fsdp', 'tensor'), (AxisType.Auto,) * 2)
  place = NamedSharding(mesh, P(None, ('fsdp', 'tensor')))
  with pytest.raises(ValueError, match="over .'fsdp', 'tensor'.*one axis"):
    experts.placed(place)
