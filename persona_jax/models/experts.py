"""Mixtures of experts: each token through the few that it was sent to."""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

Kernels = Mapping[str, Float[Array, 'E O I']]  # 'gate', 'up', 'down'


def grouped(
  x: Float[Array, 'N D'],
  weights: Float[Array, 'N K'],
  ids: Int[Array, 'N K'],
  kernels: Kernels,
  act: Callable,
) -> Float[Array, 'N D']:
  """Sum over a token's K experts of weight * down(act(gate(x)) * up(x)).

  Tokens are sorted by expert, so that each expert is one dense product over
  just its own tokens; none is ever dropped.
  """
  return _grouped(x, weights, ids, kernels, act)


def sharded(mesh: Mesh, axis: str) -> Callable:
  """`grouped`, with the experts spread over `axis` of the mesh.

  Tokens lie over the other axes, as a batch does, where they divide. Each
  device computes its own experts for its tokens, and sums go over `axis`.
  """
  others = tuple(name for name in mesh.axis_names if name != axis)
  ways = math.prod(mesh.shape[name] for name in others)

  def mix(x, weights, ids, kernels, act):
    local = kernels['gate'].shape[0] // mesh.shape[axis]
    by_row = P(others) if x.shape[0] % ways == 0 else P()

    @functools.partial(
      jax.shard_map,
      mesh=mesh,
      in_specs=(by_row, by_row, by_row, P(axis)),
      out_specs=by_row,
    )
    def run(x, weights, ids, kernels):
      # By hand: left to itself, a gather's gradient is not summed over axis.
      x, weights = jax.lax.pcast((x, weights), (axis,), to='varying')
      ids = ids - jax.lax.axis_index(axis) * local
      return jax.lax.psum(_grouped(x, weights, ids, kernels, act), axis)

    return run(x, weights, ids, dict(kernels))

  return mix


def placed(place: NamedSharding | None) -> Callable:
  """How to compute where the kernels [L E O I] lie: spread over E or not."""
  axis = None if place is None else (*place.spec, None, None)[1]
  if isinstance(axis, tuple):
    raise ValueError(
      f'experts are spread over {axis}, but one axis of the mesh is what can '
      'be computed; change the rule of layers/mlp/experts.'
    )
  return grouped if axis is None else sharded(place.mesh, axis)


def _grouped(x, weights, ids, kernels, act):
  """As `grouped`; ids outside of the kernels' range add nothing."""
  count, active = kernels['gate'].shape[0], ids.shape[1]
  flat = ids.reshape(-1)
  here = (flat >= 0) & (flat < count)
  flat = jnp.where(here, flat, count)  # others go to the end, in no group
  order = jnp.argsort(flat)
  sizes = jnp.bincount(flat, length=count + 1)[:count].astype(jnp.int32)
  inputs = x[order // active]
  gate = _by_group(inputs, kernels['gate'], sizes)
  up = _by_group(inputs, kernels['up'], sizes)
  outputs = _by_group(act(gate) * up, kernels['down'], sizes)
  share = jnp.where(here, weights.reshape(-1), 0)[order]
  outputs = jnp.einsum('nd,n->nd', outputs, share.astype(outputs.dtype))
  return jnp.zeros_like(x).at[order // active].add(outputs)


def _by_group(rows, kernels, sizes):
  """rows[n] @ kernels[group of n].T; rows beyond the groups give zero."""
  return jax.lax.ragged_dot(rows, jnp.swapaxes(kernels, 1, 2), sizes)
