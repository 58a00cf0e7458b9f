"""Where arrays lie: a mesh, and rules over the names of parameters."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from persona_jax import trees

AXES = ('data', 'fsdp', 'tensor')

RULES = (  # first match wins; the first axis of a layer's array is the layer
  (r'embed/(embedding|kernel)', P('tensor', 'fsdp')),  # and unembed/kernel
  (r'layers/(attn/[qkv]|mlp/(gate|up))/kernel', P(None, 'tensor', 'fsdp')),
  (r'layers/(attn/o|mlp/down)/kernel', P(None, 'fsdp', 'tensor')),
  (r'layers/mlp/experts/(gate|up)/kernel', P(None, 'tensor', None, 'fsdp')),
  (r'layers/mlp/experts/down/kernel', P(None, 'tensor', 'fsdp')),
  (r'layers/attn/[qkv]/bias', P(None, 'tensor')),
  # Adapters: a [L r in] and b [L out r] lie as their kernel's in and out do.
  (r'layers/(attn/[qkv]|mlp/(gate|up))/a$', P(None, None, 'fsdp')),
  (r'layers/(attn/[qkv]|mlp/(gate|up))/b$', P(None, 'tensor')),
  (r'layers/(attn/o|mlp/down)/a$', P(None, None, 'tensor')),
  (r'layers/(attn/o|mlp/down)/b$', P(None, 'fsdp')),
  (r'', P()),
)


def make_mesh(shape: dict[str, int] | None = None) -> Mesh:
  """A mesh of Auto axes; by default all devices on `fsdp`.

  Raises:
    ValueError: an unknown axis, or sizes that do not multiply to the devices.
  """
  devices = jax.devices()
  shape = {'fsdp': len(devices)} if shape is None else dict(shape)
  unknown = set(shape) - set(AXES)
  sizes = [shape.get(axis, 1) for axis in AXES]
  if unknown or np.prod(sizes) != len(devices):
    raise ValueError(
      f'the mesh {shape} does not fit {len(devices)} devices; give sizes of '
      f'{AXES} whose product is {len(devices)}.'
    )
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def state_shardings(state, mesh: Mesh, rules=RULES):
  """Shardings of a train state; moments lie where their parameters lie."""
  return trees.shardings(state, mesh, rules)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over both the data and the fsdp axis."""
  return NamedSharding(mesh, P(('data', 'fsdp')))


def by_rows(apply: Callable, mesh: Mesh) -> Callable:
  """`apply` whose tokens, cache and hidden states lie as the batch does.

  Left alone, XLA may follow the weights instead and spread the features: then
  every device holds all rows, and activations are summed over the mesh. The
  heads of a cache lie over tensor where they divide.

  Raises:
    ValueError: when called, if the rows do not divide over the mesh.
  """
  place = functools.partial(
    jax.lax.with_sharding_constraint, shardings=batch_sharding(mesh)
  )
  ways = mesh.shape['data'] * mesh.shape['fsdp']

  def by_heads(x):  # [B H ...], the layers apart
    heads = 'tensor' if x.shape[1] % mesh.shape['tensor'] == 0 else None
    where = NamedSharding(mesh, P(('data', 'fsdp'), heads))
    return jax.lax.with_sharding_constraint(x, where)

  def placed(cache):
    if cache is None:
      return None
    keys, values = jax.tree.map(by_heads, (cache.keys, cache.values))
    return cache.replace(keys=keys, values=values)

  def apply_by_rows(variables, tokens, positions, cache=None, **keywords):
    if tokens.shape[0] % ways:
      raise ValueError(
        f'{tokens.shape[0]} rows do not divide over the {ways} ways of data '
        'and fsdp; change the batch, the microbatches or the mesh.'
      )
    cache = placed(cache)
    hidden, cache = apply(
      variables, place(tokens), place(positions), cache, **keywords
    )
    return place(hidden), placed(cache)

  return apply_by_rows


def gathered(rules, axis: str = 'fsdp'):
  """`rules` that spread nothing over `axis`: decoding reads all weights.

  It would otherwise gather them anew for each token.
  """

  def without(part):
    if isinstance(part, tuple):
      return tuple(x for x in part if x != axis) or None
    return None if part == axis else part

  return tuple((pattern, P(*map(without, spec))) for pattern, spec in rules)


def init_sharded(init, mesh: Mesh, *args, rules=RULES):
  """`init(*args)`: shapes, then shardings, then arrays in their places."""
  shardings = trees.shardings(jax.eval_shape(init, *args), mesh, rules)
  return jax.jit(init, out_shardings=shardings)(*args)
