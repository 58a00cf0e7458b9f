"""Where arrays lie: a mesh, and rules over the names of parameters."""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from persona_jax import trees

AXES = ('data', 'fsdp', 'sequence', 'expert', 'tensor')
ROWS = ('data', 'fsdp', 'expert')  # those that the rows of a batch lie over

RULES = (  # first match wins; the first axis of a layer's array is the layer
  (r'embed/(embedding|kernel)', P('tensor', 'fsdp')),  # and unembed/kernel
  (r'layers/(attn/[qkv]|mlp/(gate|up))/kernel', P(None, 'tensor', 'fsdp')),
  (r'layers/(attn/o|mlp/down)/kernel', P(None, 'fsdp', 'tensor')),
  (r'experts/(gate|up)/kernel', P(None, 'expert', 'tensor', 'fsdp')),
  (r'experts/down/kernel', P(None, 'expert', 'fsdp', 'tensor')),
  (r'layers/attn/[qkv]/bias', P(None, 'tensor')),
  # Adapters: a [L r in] and b [L out r] lie as their kernel's in and out do.
  (r'layers/(attn/[qkv]|mlp/(gate|up))/a$', P(None, None, 'fsdp')),
  (r'layers/(attn/[qkv]|mlp/(gate|up))/b$', P(None, 'tensor')),
  (r'layers/(attn/o|mlp/down)/a$', P(None, None, 'tensor')),
  (r'layers/(attn/o|mlp/down)/b$', P(None, 'fsdp')),
  (r'', P()),
)


def mesh_shape(text: str) -> dict[str, int]:
  """'fsdp=8,tensor=2' as the size of every axis.

  Raises:
    ValueError: a part of it is no axis and its size.
  """
  sizes = dict.fromkeys(AXES, 1)
  for part in filter(None, text.split(',')):
    axis, _, size = part.partition('=')
    if axis not in sizes or not size.isdecimal() or int(size) < 1:
      raise ValueError(
        f'mesh={text}: {part!r} is no axis and its size; give sizes of '
        f'{", ".join(AXES)}, as in mesh=fsdp=8,tensor=2.'
      )
    sizes[axis] = int(size)
  return sizes


def make_mesh(shape: dict[str, int] | None = None, devices=None) -> Mesh:
  """A mesh of Auto axes; by default all devices on `fsdp`.

  Neighbours of a torus stay neighbours where the sizes allow; an axis of the
  mesh may be a part of one of the torus.

  Raises:
    ValueError: an unknown axis, or sizes that do not multiply to the devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = {'fsdp': len(devices)} if shape is None else dict(shape)
  unknown = set(shape) - set(AXES)
  sizes = [shape.get(axis, 1) for axis in AXES]
  if unknown or np.prod(sizes) != len(devices):
    raise ValueError(
      f'the mesh {shape} does not fit {len(devices)} devices; give sizes of '
      f'{AXES} whose product is {len(devices)}.'
    )
  placed = mesh_utils.create_device_mesh(
    sizes, devices, allow_split_physical_axes=True
  )
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def state_shardings(state, mesh: Mesh, rules=RULES):
  """Shardings of a train state; moments lie where their parameters lie."""
  return trees.shardings(state, mesh, rules)


def row_ways(mesh: Mesh) -> int:
  """Parts that the rows of a batch lie in."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over all of `ROWS`."""
  return NamedSharding(mesh, P(ROWS))


def share(mesh: Mesh) -> tuple[int, int]:
  """`(part, parts)`: which of how many equal parts of a batch are here."""
  order = [*ROWS, *(axis for axis in AXES if axis not in ROWS)]
  devices = mesh.devices.transpose([AXES.index(axis) for axis in order])
  owners = np.vectorize(lambda device: device.process_index)(devices)
  return part(owners.reshape(row_ways(mesh), -1), jax.process_index())


def part(owners: np.ndarray, process: int) -> tuple[int, int]:
  """`share`, where copy c of row block w lies on the process `owners[w, c]`.

  Processes that hold the same rows have the same part. Where the rows do not
  fall into equal parts, all of them are one.
  """
  held = {
    p: tuple(np.flatnonzero((owners == p).any(1))) for p in set(owners.flat)
  }
  parts = sorted(set(held.values()))
  if len({len(x) for x in parts}) > 1 or len(sum(parts, ())) > len(owners):
    return 0, 1
  return parts.index(held[process]), len(parts)


def by_rows(apply: Callable, mesh: Mesh) -> Callable:
  """`apply` whose tokens, cache and hidden states lie as the batch does.

  Left alone, XLA may follow the weights instead and spread the features: then
  every device holds all rows, and activations are summed over the mesh. Tokens
  of a row lie over sequence, and the heads of a cache over tensor, where they
  divide. On one device it is `apply` itself; one row alone is read by all.

  Raises:
    ValueError: when called, if the rows do not divide over the mesh.
  """
  if mesh.size == 1:
    return apply
  ways = row_ways(mesh)

  def where(x, axis):
    divides = x.shape[1] % mesh.shape[axis] == 0
    return NamedSharding(mesh, P(ROWS, axis if divides else None))

  def place(x):  # [B S ...]
    return jax.lax.with_sharding_constraint(x, where(x, 'sequence'))

  def by_heads(x):  # [B H ...], the layers apart
    return jax.lax.with_sharding_constraint(x, where(x, 'tensor'))

  def placed(cache):
    if cache is None:
      return None
    apart = isinstance(cache.keys, tuple)
    by_layers = by_heads if apart else jax.vmap(by_heads)
    keys, values = jax.tree.map(by_layers, (cache.keys, cache.values))
    return cache.replace(keys=keys, values=values)

  def apply_by_rows(variables, tokens, positions, cache=None, **keywords):
    if tokens.shape[0] == 1:
      return apply(variables, tokens, positions, cache, **keywords)
    if tokens.shape[0] % ways:
      raise ValueError(
        f'{tokens.shape[0]} rows do not divide over the {ways} ways of '
        f'{", ".join(ROWS)}; change the batch, the microbatches or the mesh.'
      )
    cache = placed(cache)
    found = apply(variables, place(tokens), place(positions), cache, **keywords)
    if keywords.get('mutable'):
      (hidden, cache), kept = found
      return (place(hidden), placed(cache)), kept
    hidden, cache = found
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
