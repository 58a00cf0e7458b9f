"""Persona space: role vectors, the Assistant axis, principal components."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from persona_jax import taps
from persona_jax.activations import edits


def pooled(
  apply, variables: PyTree, tokens, positions, mask: Bool[Array, 'B S']
) -> Float[Array, 'L B D']:
  """Mean activation of each row's masked tokens after every block.

  Pooled inside the forward pass: `[L, B, S, D]` never exists. A row without
  such tokens gives zeros.
  """
  weight = mask / jnp.maximum(jnp.sum(mask, 1, keepdims=True), 1)

  def read(tap, x):
    del tap
    return jnp.einsum('bsd,bs->bd', x.astype(jnp.float32), weight)

  _, means = taps.keep(apply, read)(variables, tokens, positions)
  return means


class Reading(NamedTuple):
  """What a pass tells about an axis at each token."""

  projection: Float[Array, 'L B S']  # after the edits
  moved: Bool[Array, 'L B S']  # where a cap acted


def read_axis(apply, variables: PyTree, tokens, positions) -> Reading:
  """Projections on the probe in `variables['edits']`, and where caps act.

  `apply` is the unedited function: the stored edits are applied here. Make
  the collection with `edits.merged(caps, edits.probes(axis))`.
  """

  def read(tap, x):  # inside `edited`, so x is not edited yet
    axis = tap.get_variable('edits', 'probe')['axis']
    return Reading(
      projection=edits.projection(edits.stored(tap, x), axis),
      moved=edits.cap_acts(tap, x),
    )

  reading = taps.edited(taps.keep(apply, read), edits.stored)
  return reading(variables, tokens, positions)[1]


class Space(NamedTuple):
  """Role vectors and what is drawn from them, at every layer."""

  names: tuple[str, ...]
  roles: Float[np.ndarray, 'R L D']
  default: Float[np.ndarray, 'L D']
  axis: Float[np.ndarray, 'L D']  # toward the Assistant, not normalised

  def components(self, layer: int) -> 'Components':
    """Principal components of the role vectors at one layer."""
    return principal(self.roles[:, layer])

  def along(self, layer: int) -> Float[np.ndarray, ' R']:
    """Projections of the roles on the axis; zero is the mean of roles."""
    axis = self.axis[layer] / np.linalg.norm(self.axis[layer])
    return (self.roles[:, layer] - self.roles[:, layer].mean(0)) @ axis

  def cosine_with_first_component(self, layer: int) -> float:
    """|cos| of the axis with PC1, whose sign is free."""
    first = self.components(layer).vectors[0]
    axis = self.axis[layer]
    return float(abs(first @ axis) / np.linalg.norm(axis))


class Components(NamedTuple):
  """A plain PCA: centred across roles, nothing else."""

  mean: Float[np.ndarray, ' D']
  vectors: Float[np.ndarray, 'K D']  # unit rows, largest variance first
  explained: Float[np.ndarray, ' K']  # shares of the variance

  def coordinates(
    self, x: Float[np.ndarray, '*R D'], count: int = 2
  ) -> Float[np.ndarray, '*R K']:
    """`x` along the first components."""
    return (x - self.mean) @ self.vectors[:count].T


def space(
  names, pooled_roles: Float[np.ndarray, 'N L D'], role: Int[np.ndarray, ' N']
) -> Space:
  """Means by role, and axis = default - mean of roles, in float32.

  `role[i]` indexes `names` for response i; -1 is the default Assistant. Each
  role weighs one (https://arxiv.org/abs/2601.10387, section 3).

  Raises:
    ValueError: a role, or the default, has no response.
  """
  x = np.asarray(pooled_roles, np.float32)
  for index, name in [(-1, 'the default'), *enumerate(names)]:
    if not np.any(role == index):
      raise ValueError(
        f'{name} has no response to pool; raise the number of questions.'
      )
  roles = np.stack([x[role == i].mean(0) for i in range(len(names))])
  default = x[role == -1].mean(0)
  return Space(tuple(names), roles, default, default - roles.mean(0))


def principal(x: Float[np.ndarray, 'R D']) -> Components:
  """Principal components of the rows of `x`."""
  mean = x.mean(0)
  _, scale, vectors = np.linalg.svd(x - mean, full_matrices=False)
  variance = scale**2
  return Components(mean, vectors, variance / variance.sum())
