"""Low-rank adapters (LoRA) as a transformation of `apply`.

y = W x + scale B A x, with A [r in] random and B [out r] zero at first, W as
it was (Hu et al., 2021, https://arxiv.org/abs/2106.09685). There is no dropout
on x: what a rollout samples is what the learner scores.

An adapter is the variable collection `lora`: `{'layers': {'attn': {'q': {'a':
[L r in], 'b': [L out r], 'scale': [L]}}}}`, stacked and unstacked as parameters
are. A layer whose scale is zero has no adapter.
"""

import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from persona_jax import trees
from persona_jax.models import checkpoint, names
from persona_jax.models.config import DecoderConfig

COLLECTION = 'lora'
_KERNEL = re.compile(r'layers/(?P<name>attn/[qkvo]|mlp/(gate|up|down))/kernel$')


def adapted(apply: Callable) -> Callable:
  """`apply`, with scale B A x added where the collection `lora` has entries.

  Without entries the program is the plain one. Caps and other edits of taps
  may come before or after: `adapted(edited(f))` is `edited(adapted(f))`.

  Raises:
    CheckpointError: when called, if the adapter belongs to another model.
    ValueError: `apply` is jitted, so that adapters might not reach its program.
  """
  if hasattr(apply, 'lower'):
    raise ValueError(f'{apply} is jitted; adapt it first and jit the result.')

  def apply_adapted(variables, *args, **kwargs):
    check(variables)
    with nn.intercept_methods(_add):  # inside, so that jit traces it
      return apply(variables, *args, **kwargs)

  return apply_adapted


def delta(
  x: Float[Array, '*B I'],
  a: Float[Array, 'R I'],
  b: Float[Array, 'O R'],
  scale: Float[Array, ''],
) -> Float[Array, '*B O']:
  """scale B A x in the dtype of x, summed in float32; scale is not trained."""
  low = jnp.einsum(
    '...i,ri->...r',
    x,
    a.astype(x.dtype),
    preferred_element_type=jnp.float32,
  )
  low = (low * jax.lax.stop_gradient(scale)).astype(x.dtype)
  return jnp.einsum('...r,or->...o', low, b.astype(x.dtype))


def init(
  config: DecoderConfig,
  key: Array,
  *,
  rank: int,
  alpha: float,
  targets: str = '',
  rank_stabilised: bool = False,
  dtype: Any = jnp.float32,
) -> PyTree:
  """An adapter that changes nothing yet, on every projection by default.

  A ~ U(-1/sqrt(in), 1/sqrt(in)) as PEFT draws it, B = 0, scale = alpha / rank,
  or alpha / sqrt(rank) (rsLoRA, Kalajdzievski, 2023,
  https://arxiv.org/abs/2312.03732).

  Args:
    config: of the model, with stacked layers.
    key: each projection's own key is derived from its name.
    rank: r of every projection.
    alpha: the strength, on a scale that does not depend on the rank.
    targets: a pattern (`re.search`) over `attn/q`, `mlp/down` and so on.
    rank_stabilised: whether scale falls with the root of the rank.
    dtype: of A and B; the scale is float32.

  Raises:
    ValueError: no projection fits `targets`, or the rank is below one.
  """
  if rank < 1:
    raise ValueError(f'rank={rank}: an adapter needs a rank of at least 1.')
  scale = alpha / (rank**0.5 if rank_stabilised else rank)
  known = projections(config)
  chosen = {k: v for k, v in known.items() if re.search(targets, k)}
  if not chosen:
    raise ValueError(f'{targets!r} finds none of {", ".join(known)}.')
  leaves = {}
  for name, (layers, out, size) in chosen.items():
    here = jax.random.fold_in(key, zlib.crc32(name.encode()))
    bound = size**-0.5
    leaves |= {
      f'layers/{name}/a': jax.random.uniform(
        here, (layers, rank, size), dtype, -bound, bound
      ),
      f'layers/{name}/b': jnp.zeros((layers, out, rank), dtype),
      f'layers/{name}/scale': jnp.full((layers,), scale, jnp.float32),
    }
  return names.nested(leaves)


def projections(config: DecoderConfig) -> dict[str, tuple[int, int, int]]:
  """The kernels that adapters know: 'attn/q' -> (L, out, in)."""
  found = {}
  for name, shape in names.shapes(config).items():
    if (match := _KERNEL.match(name)) and len(shape) == 3:
      found[match['name']] = shape
  return found


def split(adapter: PyTree) -> tuple[PyTree, PyTree]:
  """(A and B, scales): what an optimizer may touch, and what it may not.

  Weight decay would shrink a scale even where its gradient is zero.
  """
  leaves = trees.flatten(adapter)
  scales = {k: v for k, v in leaves.items() if k.endswith('/scale')}
  weights = {k: v for k, v in leaves.items() if k not in scales}
  return names.nested(weights), names.nested(scales)


def joined(weights: PyTree, scales: PyTree) -> PyTree:
  """The inverse of `split`."""
  return names.nested(trees.flatten(weights) | trees.flatten(scales))


def merge(variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """W + scale B A in place of W, and no adapter: the same model, plain.

  Summed in float32, one layer after the other, then cast to the dtype of W: in
  bfloat16 a small adapter rounds away. What lies on a mesh stays where it lies.
  """
  check(variables)
  found, params = entries(variables), trees.flatten(variables['params'])
  kernels = {name: params[f'{name}/kernel'] for name in found}
  places = {name: _place(kernel) for name, kernel in kernels.items()}
  merged = jax.jit(_merged, out_shardings=places)(kernels, found)
  params |= {f'{name}/kernel': kernel for name, kernel in merged.items()}
  rest = {k: v for k, v in variables.items() if k != COLLECTION}
  return rest | {'params': names.nested(params)}


def entries(variables: Mapping[str, PyTree]) -> dict[str, tuple]:
  """(A, B, scale) of every adapted kernel: 'layers/attn/q' -> arrays."""
  leaves = trees.flatten(variables.get(COLLECTION, {}))
  parents = dict.fromkeys(name.rpartition('/')[0] for name in leaves)
  return {
    name: tuple(leaves.get(f'{name}/{part}') for part in ('a', 'b', 'scale'))
    for name in parents
  }


def check(variables: Mapping[str, PyTree]):
  """Raises one CheckpointError if the adapter does not fit the parameters."""
  problems = []
  for name, entry in entries(variables).items():
    kernel = _kernel(variables['params'], name)
    if any(array is None for array in entry):
      problems.append(f'{name} needs a, b and scale')
    elif kernel is None:
      problems.append(f'the model has no {name}/kernel')
    else:
      problems += _misfit(name, kernel.shape, *entry)
  if problems:
    raise checkpoint.CheckpointError(
      'the adapter belongs to another model: '
      f'{checkpoint.listed(problems)}. Adapt the model that it was '
      'made for, with layers stacked alike.'
    )


def _kernel(params, name):
  """The kernel called `name`, or None: no other leaf is looked at."""
  try:
    return names.leaf(params, f'{name}/kernel')
  except (KeyError, TypeError):
    return None


def _misfit(name, kernel, a, b, scale):
  *layers, out, size = kernel
  rank = a.shape[-2] if a.ndim > 1 else 1
  want = ((*layers, rank, size), (*layers, out, rank), (*layers,))
  got = (a.shape, b.shape, scale.shape)
  if got != want:
    yield f'{name}: a, b, scale are {got}, its kernel {kernel} needs {want}'


def _add(next_fun, args, kwargs, context):
  y, module = next_fun(*args, **kwargs), context.module
  if context.method_name != '__call__':
    return y
  if not module.has_variable(COLLECTION, 'a'):
    return y
  parts = (module.get_variable(COLLECTION, k) for k in ('a', 'b', 'scale'))
  return y + delta(args[0], *parts).astype(y.dtype)


def _merged(kernels, found):
  return {k: _folded(kernel, *found[k]) for k, kernel in kernels.items()}


def _folded(kernel, a, b, scale):
  if kernel.ndim == 3:  # one layer at a time holds one float32 kernel
    return jax.lax.map(lambda row: _folded(*row), (kernel, a, b, scale))
  wide = lambda x: x.astype(jnp.float32)
  low = jnp.einsum(
    'or,ri->oi', wide(b), wide(a), precision=jax.lax.Precision.HIGHEST
  )
  return (wide(kernel) + scale * low).astype(kernel.dtype)


def _place(kernel):
  """Where a result should lie: with `kernel`, if that was put anywhere."""
  if isinstance(kernel, jax.core.Tracer) or not isinstance(kernel, jax.Array):
    return None
  return kernel.sharding if kernel.committed else None
