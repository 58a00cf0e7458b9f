"""Names of leaves, layers stacked and unstacked, shardings by rule."""

import fakes
import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from persona_jax import trees

MESH = AbstractMesh((4, 3), ('fsdp', 'tensor'))


@pytest.fixture
def variables():
  return fakes.with_edits(fakes.tiny().stacked, fakes.caps())


def shapes(**leaves):
  return {
    k: jax.ShapeDtypeStruct(shape, np.float32) for k, shape in leaves.items()
  }


def same(x, y):
  assert jax.tree.structure(x) == jax.tree.structure(y)
  jax.tree.map(np.testing.assert_array_equal, x, y)


def test_stack_inverts_unstack(variables):
  apart = trees.unstack_layers(variables)
  assert 'layers' not in apart['params'] and 'layers_1' in apart['edits']
  same(trees.stack_layers(apart), variables)
  assert trees.name(jax.tree.leaves_with_path(apart)[0][0]).startswith('edits')


def test_layers_keep_their_order():
  # 'layers_10' sorts before 'layers_2' as text.
  variables = {'params': {'layers': {'x': np.arange(12)}}}
  apart = trees.unstack_layers(variables)
  assert apart['params']['layers_10'] == {'x': 10}
  same(trees.stack_layers(apart), variables)


def test_collections_without_layers_pass(variables):
  loose = {'params': {'embed': np.ones(3)}}
  same(trees.unstack_layers(loose), loose)
  same(trees.stack_layers(loose), loose)


def test_leaves_are_picked_by_name(variables):
  found = trees.pick(variables, r'attn/[qk]/kernel$')
  assert list(found) == [
    'params/layers/attn/k/kernel',
    'params/layers/attn/q/kernel',
  ]
  assert set(found) < set(trees.flatten(variables))


def test_the_first_rule_wins():
  rules = ((r'a/x', P('fsdp')), (r'x', P(None, ('fsdp', 'tensor'))), (r'', P()))
  tree = {'a': shapes(x=(8, 1)), 'b': shapes(x=(5, 24)), 'c': shapes(y=())}
  got = trees.shardings(tree, MESH, rules)
  assert got['a']['x'] == NamedSharding(MESH, P('fsdp'))
  assert got['b']['x'] == NamedSharding(MESH, P(None, ('fsdp', 'tensor')))
  assert got['c']['y'] == NamedSharding(MESH, P())


@pytest.mark.parametrize(
  'shape, spec, message',
  [
    ((6, 8), P('fsdp'), r'w/kernel: shape \(6, 8\) does not divide'),
    ((8, 16), P(None, ('fsdp', 'tensor')), 'does not divide'),
    ((8, 18), P(None, ('fsdp', 'tensor')), 'does not divide'),
    ((8,), P(None, 'fsdp'), 'more axes than shape'),
  ],
)
def test_a_rule_that_does_not_fit_is_named(shape, spec, message):
  with pytest.raises(ValueError, match=message):
    trees.shardings({'w': shapes(kernel=shape)}, MESH, ((r'w', spec),))


def test_a_leaf_without_a_rule_is_named():
  with pytest.raises(ValueError, match='w/kernel: no sharding rule'):
    trees.shardings({'w': shapes(kernel=(1,))}, MESH, ((r'bias', P()),))
