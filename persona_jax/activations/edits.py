"""Edits of the residual stream: cap, steer, ablate.

Each is a function of activations. `stored` finds its arrays, one slice a layer,
in the variable collection `edits` that `caps` makes, so that new values and
switching off never recompile.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

SITE = 'resid'  # the output of a decoder block


def cap(
  x: Float[Array, '*B D'], axis: Float[Array, ' D'], low, high
) -> Float[Array, '*B D']:
  """Clips the projection of `x` on the unit vector `axis` to [low, high].

  A floor is `high = inf`, a ceiling `low = -inf`; both infinite leave `x` as it
  is. Where a bound acts, the gradient along `axis` is zero
  (https://arxiv.org/abs/2601.10387, section 5).
  """
  along = projection(x, axis)
  move = jnp.clip(along, low, high) - along
  return (x + jnp.einsum('...,d->...d', move, axis)).astype(x.dtype)


def steer(
  x: Float[Array, '*B D'], vector: Float[Array, ' D']
) -> Float[Array, '*B D']:
  """Pushes `x` by `vector`."""
  return (x + jnp.broadcast_to(vector, x.shape)).astype(x.dtype)


def ablate(
  x: Float[Array, '*B D'], axis: Float[Array, ' D']
) -> Float[Array, '*B D']:
  """Removes the unit vector `axis` from `x`: a cap at zero from both sides."""
  return cap(x, axis, 0.0, 0.0)


def projection(
  x: Float[Array, '*B D'], axis: Float[Array, ' D']
) -> Float[Array, '*B']:
  """<x, axis> in float32; `axis` has unit length."""
  return jnp.einsum(
    '...d,d->...', x.astype(jnp.float32), axis.astype(jnp.float32)
  )


def stored(tap, x: Float[Array, 'B T D']):
  """The edit of `taps.edited` whose arrays lie in the collection `edits`.

  Caps first, then steers, each where the collection has it. The arrays are one
  layer's, for all rows or, from `by_seat`, one for each.
  """
  if tap.has_variable('edits', 'cap'):
    bound = tap.get_variable('edits', 'cap')
    capped = _rows(cap, x, bound['axis'], bound['low'], bound['high'])
    inside = jnp.broadcast_to(_reached(tap, bound, x)[..., None], x.shape)
    x = jnp.where(inside, capped, x)
  if tap.has_variable('edits', 'steer'):
    x = _rows(steer, x, tap.get_variable('edits', 'steer')['vector'])
  return x


def cap_acts(tap, x: Float[Array, 'B T D']) -> Bool[Array, 'B T']:
  """Where the stored cap would move `x`; nowhere without one."""
  if not tap.has_variable('edits', 'cap'):
    return jnp.zeros(x.shape[:-1], bool)
  bound = tap.get_variable('edits', 'cap')

  def beyond(x, axis, low, high):
    along = projection(x, axis)
    return (along < low) | (along > high)

  acts = _rows(beyond, x, bound['axis'], bound['low'], bound['high'])
  return acts & _reached(tap, bound, x)


def caps(
  axis: Float[Array, 'L D'],
  low: Float[Array, ' L'],
  high: Float[Array, ' L'],
  *,
  first: int = 0,
) -> PyTree:
  """The collection `edits` with one cap a layer; `axis` is normalised here.

  Caps act from position `first` of the text on. The paper's is 0, every
  token; 1 spares the attention sink, whose norm is a hundred times that of
  other tokens in small models, and which a bound for those would destroy.
  """
  bounds = {'low': _wide(low), 'high': _wide(high)}
  start = jnp.full(axis.shape[0], first, jnp.int32)
  return _at_site('cap', axis=unit(axis), first=start, **bounds)


def no_caps(layers: int, features: int) -> PyTree:
  """Caps that never act: swap others in without compiling again."""
  infinite = jnp.full(layers, jnp.inf, jnp.float32)
  return caps(jnp.zeros((layers, features)), -infinite, infinite)


def steers(vector: Float[Array, 'L D']) -> PyTree:
  """The collection `edits` with one added vector a layer."""
  return _at_site('steer', vector=_wide(vector))


def probes(axis: Float[Array, 'L D']) -> PyTree:
  """The collection `edits` with one direction a layer to project on."""
  return _at_site('probe', axis=unit(axis))


def merged(*collections: PyTree) -> PyTree:
  """Collections of different kinds of edits as one."""
  site = {}
  for collection in collections:
    site |= collection['layers'][SITE]
  return {'layers': {SITE: site}}


def by_seat(*collections: PyTree) -> PyTree:
  """One collection `edits` a seat, for `Speaker.own`.

  They are unstacked, as the speaker's variables are, and of one kind.
  """
  return {'edits': jax.tree.map(lambda *x: jnp.stack(x), *collections)}


def unit(vector: Float[Array, '*B D']) -> Float[Array, '*B D']:
  """`vector` at length one; a zero vector stays zero."""
  length = jnp.linalg.norm(vector, axis=-1, keepdims=True)
  return _wide(vector / jnp.where(length > 0, length, 1))


def _at_site(kind, **arrays):
  return {'layers': {SITE: {kind: arrays}}}


def _wide(x):
  # A weakly typed leaf would trace a second time.
  return jnp.asarray(x, jnp.float32)


def _rows(edit, x, axis, *bounds):
  """`edit` with arrays for all rows of `x`, or with some for each row."""
  edit = edit if axis.ndim == 1 else jax.vmap(edit)
  return edit(x, axis, *bounds)


def _reached(tap, bound, x):
  if tap.positions is None:
    return jnp.ones(x.shape[:-1], bool)
  first = bound['first']
  return tap.positions >= (first[:, None] if first.ndim else first)
