"""Adapters in PEFT's layout: adapter_config.json and safetensors.

Every scale is written as lora_alpha = scale * r, so a rank-stabilised adapter
comes out as a plain one that says the same.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from persona_jax import trees
from persona_jax.models import lora, names, peft, shards
from persona_jax.models.checkpoint import CheckpointError, listed

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
_OPEN, _READABLE = 0o755, 0o644  # temporary files are private otherwise


class Module(NamedTuple):
  """A projection of one layer, which PEFT adapts on its own."""

  ours: str  # 'attn/q'
  layer: int
  shape: tuple[int, int]  # of the kernel: (out, in)


def save(adapter: PyTree, model, path: str | Path):
  """Writes an adapter of `model` where PEFT and `load` read it, all or nothing.

  Raises:
    CheckpointError: the adapter does not fit the model.
    ValueError: `path` exists.
  """
  from safetensors import numpy as safetensors_numpy

  path = Path(path)
  if path.exists():
    raise ValueError(
      f'{path} exists and is not overwritten; choose another folder or '
      'delete it.'
    )
  tensors, config = _exported(adapter, model)
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
    partial = Path(temporary, path.name)
    partial.mkdir(_OPEN)
    weights = partial / WEIGHTS
    safetensors_numpy.save_file(tensors, weights, metadata={'format': 'pt'})
    weights.chmod(_READABLE)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (partial / CONFIG).write_text(text + '\n', encoding='utf-8')
    partial.rename(path)


def load(path: str | Path, model, *, dtype: Any = jnp.float32) -> PyTree:
  """The adapter in a PEFT folder, layers stacked, for `lora.adapted`.

  A layer that the adapter leaves out has a scale of zero; a rank below that of
  other layers is filled up with zeros.

  Raises:
    CheckpointError: it is damaged, made for another model, or uses what we do
      not compute. All problems come at once.
  """
  path = Path(path)
  config, where = _json(path / CONFIG), str(path / CONFIG)
  peft.check(config, where)
  modules = _modules(model.config)
  chosen = peft.targeted(config, modules, where)
  tensors = _tensors(path / WEIGHTS)
  _fit(tensors, {name: modules[name] for name in chosen}, config, model)
  rows = {}
  for name in chosen:
    pair = tensors[_key(name, 'A')], tensors[_key(name, 'B')]
    ours, layer, _ = modules[name]
    rows.setdefault(ours, {})[layer] = (*pair, peft.scale(config, name))
  leaves = {}
  for ours, of_layers in rows.items():
    arrays = _stacked(of_layers, lora.projections(model.config)[ours], dtype)
    leaves |= {f'layers/{ours}/{k}': v for k, v in arrays.items()}
  return names.nested(leaves)


def fits(config) -> bool:
  """Whether PEFT's layout has a place for each projection, none fused."""
  kernels = [f'layers/{name}/kernel' for name in lora.projections(config)]
  return len({_foreign(config, name) for name in kernels}) == len(kernels)


def _modules(config) -> dict[str, Module]:
  """Every projection by PEFT's name: 'model.layers.0.self_attn.q_proj'."""
  out = {}
  for ours, (layers, *shape) in lora.projections(config).items():
    for i in range(layers):
      theirs = _foreign(config, f'layers/{ours}/kernel').format(layer=i)
      name = theirs.removesuffix('.weight')
      if name in out:
        raise CheckpointError(
          f'{name} is {out[name].ours} and {ours} in one; adapters of fused '
          "projections have no place in PEFT's layout here. Merge such an "
          'adapter into its model instead: with PEFT, or with `lora.merge`.'
        )
      out[name] = Module(ours, i, tuple(shape))
  return out


def _foreign(config, name) -> str:
  """Hugging Face's name of a kernel."""
  return names.table(config, names.HUGGING_FACE)[name]


def _exported(adapter, model):
  """Tensors by PEFT's names, and the configuration that goes with them."""
  modules = _modules(model.config)
  leaves = _checked(adapter, model)
  tensors, ranks, alphas = {}, {}, {}
  for name, (ours, layer, _) in modules.items():
    scale = leaves.get(f'layers/{ours}/scale')
    if scale is not None and scale[layer]:
      a, b = (leaves[f'layers/{ours}/{k}'][layer] for k in 'ab')
      tensors[_key(name, 'A')] = np.ascontiguousarray(a)
      tensors[_key(name, 'B')] = np.ascontiguousarray(b)
      ranks[name], alphas[name] = len(a), _alpha(scale[layer], len(a))
  if not tensors:
    raise CheckpointError('the adapter has no layer; nothing is to be saved.')
  return tensors, peft.record(ranks, alphas, modules, model.name)


def _checked(adapter, model) -> dict[str, np.ndarray]:
  """The stacked leaves by name, when they fit the model's shapes."""
  adapter = trees.stack_layers({lora.COLLECTION: adapter})
  shapes = lora.projections(model.config).items()
  blank = {
    f'layers/{k}/kernel': np.broadcast_to(np.float32(0), v) for k, v in shapes
  }
  lora.check({**adapter, 'params': names.nested(blank)})
  leaves = trees.flatten(adapter[lora.COLLECTION])
  return {k: np.asarray(v) for k, v in leaves.items()}


def _alpha(scale, rank):
  """The number that gives the same float32 when it is divided by the rank."""
  exact = float(scale) * rank
  short = round(exact, 4)
  alpha = short if np.float32(short / rank) == scale else exact
  return int(alpha) if alpha == int(alpha) else alpha


def _fit(tensors, modules: Mapping[str, Module], config, model):
  """Raises one CheckpointError that lists every tensor that does not fit."""
  wanted = {}
  for name, (_, _, (out, size)) in modules.items():
    r = peft.rank(config, name)
    wanted |= {_key(name, 'A'): (r, size), _key(name, 'B'): (out, r)}
  got = {k: v.shape for k, v in tensors.items()}
  problems = [f'missing {k} {v}' for k, v in wanted.items() if k not in got]
  problems += [f'unexpected {k} {v}' for k, v in got.items() if k not in wanted]
  problems += [
    f'{k} is {got[k]}, not {v}' for k, v in wanted.items() if got.get(k, v) != v
  ]
  if problems:
    raise CheckpointError(
      f'the adapter of {peft.base(config)} does not fit {model.name!r}; '
      f'{len(problems)} problem(s): {listed(problems)}. Use it with the '
      'model that it was made for.'
    )


def _stacked(rows, shape, dtype):
  """A, B and scales of all layers; zero where `rows` has none."""
  layers, out, size = shape
  rank = max(len(a) for a, _, _ in rows.values())
  arrays = {
    'a': np.zeros((layers, rank, size), dtype),
    'b': np.zeros((layers, out, rank), dtype),
    'scale': np.zeros(layers, np.float32),
  }
  for layer, (a, b, scale) in rows.items():
    arrays['a'][layer, : len(a)] = a
    arrays['b'][layer, :, : len(a)] = b
    arrays['scale'][layer] = scale
  return {k: jnp.asarray(v) for k, v in arrays.items()}


def _key(module, matrix):
  return f'base_model.model.{module}.lora_{matrix}.weight'


def _tensors(file: Path) -> dict[str, np.ndarray]:
  import safetensors
  from safetensors import numpy as safetensors_numpy

  _need(file)
  try:
    tensors = safetensors_numpy.load_file(file)
  except safetensors.SafetensorError as error:
    raise CheckpointError(
      f'{file} ends early or is damaged ({error}); fetch it again.'
    ) from error
  bad = [
    k
    for k, v in tensors.items()
    if not jnp.issubdtype(v.dtype, jnp.floating)
    or not np.isfinite(v.astype(np.float32)).all()
  ]
  if bad:
    raise CheckpointError(
      f'{file}: {listed(bad, ", ")} hold NaN, infinity or whole numbers; '
      'fetch it again.'
    )
  return tensors


def _json(file: Path) -> dict[str, Any]:
  _need(file)
  return shards.read_json(file)


def _need(file: Path):
  if not file.exists():
    raise CheckpointError(
      f'{file.parent} has no {file.name}; an adapter is a folder with '
      f'{CONFIG} and {WEIGHTS}.'
    )
