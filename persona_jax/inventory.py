"""What can be loaded, what is cached, and what fits on a mesh.

Only headers are read, and no device is touched: a login node can answer for a
pod.
"""

import functools
import json as json_lib
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from persona_jax import trees
from persona_jax.learn import sharding
from persona_jax.models import (
  DecoderConfig,
  cache,
  families,
  folder,
  gguf_fields,
  gguf_file,
  hub,
  lora,
  names,
  source,
  vocabulary,
)

DTYPES = ('bfloat16', 'float16', 'float32')
_TRAINED = 4 * 4  # bytes: a float32 master, two moments of Adam, the gradient


def run(
  sources: list[str],
  *,
  mesh: str = '',
  dtype: str = 'bfloat16',
  batch: int = 0,
  tokens: int = 4096,
  rank: int = 16,
  check: bool = False,
  json: bool = False,
):
  """Prints what is known and cached, or what each source is and needs.

  Args:
    sources: as `models.load` takes them; none for what is known and cached.
    mesh: sizes of its axes, 'fsdp=8,tensor=2'; one device by default.
    dtype: of weights and cache.
    batch: rows of the cache; 0 for one on each way of `sharding.ROWS`.
    tokens: slots of each row.
    rank: of an adapter that is trained.
    check: whether to hash the files whose SHA-256 is known.
    json: for machines.
  """
  shape = sharding.mesh_shape(mesh)
  if dtype not in DTYPES:
    raise ValueError(f'--dtype={dtype} is none of {", ".join(DTYPES)}.')
  needs = functools.partial(
    memory, mesh=shape, dtype=dtype, batch=batch, tokens=tokens, rank=rank
  )
  found = [describe(place, needs) for place in sources]
  if json:
    record = found if sources else overview(check)
    print(json_lib.dumps(record, indent=2, ensure_ascii=False))
    return
  from rich.console import Console

  from persona_jax import inventory_tables as tables

  console = Console()
  for row in found:
    console.print(tables.of_source(row))
  if not sources:
    console.print(tables.of_overview(overview(check)))


# What is known and cached.


def overview(check: bool = False) -> dict[str, Any]:
  """Named sources, families, and what lies in the caches."""
  return {
    'names': [_named(name, check) for name in source.WHEELS],
    'families': [_family(kind) for kind in families.FAMILIES],
    'forms': source.FORMS,
    'cache': {'path': str(source.cache_folder()), 'files': _own_cache()},
    'hub': _hub_cache(),
  }


def _named(name, check) -> dict[str, Any]:
  wheel = source.WHEELS[name]
  path = source.cache_folder() / wheel.file
  here = path.exists()
  return {
    'name': name,
    'package': wheel.requirement,
    'bytes': path.stat().st_size if here else None,
    'intact': source.intact(name) if here and check else None,
  }


def _family(kind) -> dict[str, Any]:
  ggufs = [k for k, v in gguf_fields.ARCHITECTURES.items() if v == kind]
  architecture = families.FAMILIES[kind].architecture
  return {'family': kind, 'architecture': architecture, 'gguf': ggufs}


def _own_cache() -> list[dict[str, Any]]:
  root = source.cache_folder()
  paths = sorted(root.iterdir()) if root.is_dir() else []
  return [{'name': p.name, 'bytes': _bytes(p)} for p in paths]


def _hub_cache() -> dict[str, Any]:
  """Models in the hub's cache, as sources that can be given."""
  try:
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir
  except ImportError:
    return {'path': None, 'models': []}
  try:
    repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
  except CacheNotFound:
    repos = ()
  models = [
    {
      'name': f'{hub.PREFIX}{repo.repo_id}',
      'bytes': repo.size_on_disk,
      'revisions': {r.commit_hash: sorted(r.refs) for r in repo.revisions},
    }
    for repo in repos
    if repo.repo_type == 'model'
  ]
  models.sort(key=lambda model: model['name'])
  return {'path': constants.HF_HUB_CACHE, 'models': models}


def _bytes(path: Path) -> int:
  files = path.rglob('*') if path.is_dir() else [path]
  return sum(file.stat().st_size for file in files if file.is_file())


# What a source is and needs.


def describe(place: str, needs=None) -> dict[str, Any]:
  """Everything that the headers of a source tell; `needs(config)` is added."""
  path = source.find(place)
  opened = (folder if path.is_dir() else gguf_file).read(path)
  config = opened.config
  names.check(opened.shapes, config, opened.names, opened.where)
  vocabulary.fitting(opened.tokenizer, config.vocab, opened.where)
  spell = opened.tokenizer.id_to_token
  return {
    'source': place,
    'path': str(path),
    'commit': hub.commit(path),
    'format': 'safetensors' if path.is_dir() else 'GGUF',
    'files': len(opened.files),
    'bytes': sum(file.stat().st_size for file in opened.files),
    'family': config.family,
    'parameters': names.parameters(config),
    'layers': config.layers,
    'features': config.features,
    'heads': config.heads,
    'kv_heads': config.kv_heads,
    'head_dim': config.head_dim,
    'hidden': config.hidden,
    'vocabulary': config.vocab,
    'context': config.max_positions,
    'tied': config.tied,
    'stop_tokens': {spell(i): i for i in opened.stop_ids},
    'template': opened.template is not None,
    'memory': needs and needs(config),
  }


def memory(
  config: DecoderConfig,
  *,
  mesh: dict[str, int],
  dtype: str,
  batch: int,
  tokens: int,
  rank: int,
) -> dict[str, Any]:
  """Bytes on each device of a mesh, from shapes and `sharding.RULES` alone.

  Raises:
    ValueError: an axis or the rows do not divide over the mesh.
  """
  ways = math.prod(mesh[axis] for axis in sharding.ROWS)
  batch = batch or ways
  if batch < 1 or batch % ways or tokens < 1:
    raise ValueError(
      f'{batch} rows of {tokens} tokens do not divide over the {ways} ways of '
      'rows; change --batch, --tokens or --mesh.'
    )
  where = AbstractMesh(
    tuple(mesh.values()), tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh)
  )
  adapter = jax.eval_shape(
    lambda: lora.init(config, jax.random.key(0), rank=rank, alpha=1.0)
  )
  count = functools.partial(_per_device, mesh=where)
  weights = count(_params(config))
  frozen = weights * jnp.dtype(dtype).itemsize
  kept = _cache_bytes(config, mesh, batch, tokens, dtype)
  return {
    'mesh': mesh,
    'devices': where.size,
    'dtype': dtype,
    'batch': batch,
    'tokens': tokens,
    'rank': rank,
    'weights': frozen,
    'cache': kept,
    'inference': frozen + kept,
    'adapter_training': frozen + _TRAINED * count(adapter),
    'full_training': _TRAINED * weights,
  }


def _params(config):
  return names.nested(
    {
      name: jax.ShapeDtypeStruct(shape, jnp.float32)
      for name, shape in names.shapes(config).items()
    }
  )


def _per_device(tree, *, mesh) -> int:
  """Numbers on one device, by the rules that the programs use."""
  places = jax.tree.leaves(trees.shardings(tree, mesh, sharding.RULES))
  leaves = jax.tree.leaves(tree)
  return sum(
    math.prod(place.shard_shape(leaf.shape))
    for leaf, place in zip(leaves, places, strict=True)
  )


def _cache_bytes(config, mesh, batch, tokens, dtype) -> int:
  """Rows lie over `ROWS`, heads over tensor where they divide."""

  def slots():
    made = cache.empty(
      config, batch, tokens, dtype=jnp.dtype(dtype), blocked=False
    )
    return made.keys, made.values

  leaves = jax.tree.leaves(jax.eval_shape(slots))
  total = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
  heads = mesh['tensor'] if config.kv_heads % mesh['tensor'] == 0 else 1
  rows = math.prod(mesh[axis] for axis in sharding.ROWS)
  return total // (rows * heads)
