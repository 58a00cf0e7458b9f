"""Pytrees by path: names, picking by pattern, layers stacked and unstacked."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from persona_jax.shapes import PyTree

_LAYER = re.compile(r'layers_(\d+)')


def name(path) -> str:
  """A leaf's path as 'params/layers/attn/q/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def flatten(tree: PyTree) -> dict[str, Any]:
  """The leaves of `tree` by name."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {name(path): leaf for path, leaf in leaves}


def pick(tree: PyTree, pattern: str) -> dict[str, Any]:
  """The leaves whose name `pattern` finds (`re.search`), by name."""
  return {k: v for k, v in flatten(tree).items() if re.search(pattern, k)}


def unstack_layers(variables: PyTree) -> PyTree:
  """`layers: [L, ...]` as `layers_0, layers_1, ...` in every collection.

  Decoding reads a layer's weights where they lie; slicing a stacked array
  inside a loop copies it at each step.
  """
  return {
    collection: _unstack(tree) if 'layers' in tree else tree
    for collection, tree in variables.items()
  }


def stack_layers(variables: PyTree) -> PyTree:
  """The inverse of `unstack_layers`."""
  return {
    collection: _stack(tree) if 'layers_0' in tree else tree
    for collection, tree in variables.items()
  }


def shardings(tree: PyTree, mesh, rules) -> PyTree:
  """A `NamedSharding` for every leaf, by the first rule that finds its name.

  Args:
    tree: arrays or `jax.eval_shape` results.
    mesh: a `jax.sharding.Mesh` with Auto axes.
    rules: pairs (pattern, PartitionSpec), first match wins.

  Raises:
    ValueError: no rule matches, or an axis does not divide over the mesh.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: _sharding(name(path), leaf, mesh, rules), tree
  )


def _sharding(key, leaf, mesh, rules):
  for pattern, spec in rules:
    if re.search(pattern, key):
      _check_divides(key, leaf, mesh, spec)
      return NamedSharding(mesh, spec)
  raise ValueError(f'{key}: no sharding rule matches; add a row to the rules.')


def _check_divides(key, leaf, mesh, spec: PartitionSpec):
  rank = len(leaf.shape)
  parts = tuple(spec)
  if len(parts) > rank:
    raise ValueError(f'{key}: {spec} has more axes than shape {leaf.shape}.')
  for size, axes in zip(leaf.shape, parts, strict=False):
    names = (axes,) if isinstance(axes, str) else (axes or ())
    ways = 1
    for axis in names:
      ways *= mesh.shape[axis]
    if size % ways:
      raise ValueError(
        f'{key}: shape {leaf.shape} does not divide over {spec} on the mesh '
        f'{dict(mesh.shape)}; change its rule or the mesh.'
      )


def _unstack(tree):
  layers = tree['layers']
  count = jax.tree.leaves(layers)[0].shape[0]
  rest = {k: v for k, v in tree.items() if k != 'layers'}
  return rest | {
    f'layers_{i}': jax.tree.map(lambda x, i=i: x[i], layers)
    for i in range(count)
  }


def _stack(tree):
  numbered = {int(m[1]): v for k, v in tree.items() if (m := _LAYER.match(k))}
  rest = {k: v for k, v in tree.items() if not _LAYER.match(k)}
  layers = [numbered[i] for i in range(len(numbered))]
  return rest | {'layers': jax.tree.map(lambda *x: jnp.stack(x), *layers)}
