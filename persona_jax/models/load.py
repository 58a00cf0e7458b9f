"""A checkpoint as a language model: functions, variables and tokenizer."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax import trees
from persona_jax.models import checkpoint as checkpoint_lib
from persona_jax.models import config as config_lib
from persona_jax.models import decoder, folder, gguf_file, names
from persona_jax.models import source as source_lib


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
  """A model that speaks: pure functions, their variables, its tokenizer."""

  name: str
  sha256: str  # of the weights' file
  config: config_lib.DecoderConfig
  variables: Mapping[str, Any]  # {'params': ...}
  apply: Callable  # (variables, tokens, positions, cache) -> hidden, cache
  unembed: Callable  # (variables, hidden) -> logits
  tokenizer: Any  # tokenizers.Tokenizer
  template: str | None  # jinja source of the chat format
  special: Mapping[str, str]  # 'bos', 'eos', ... -> the token's text
  stop_ids: tuple[int, ...]  # any of them ends an assistant's line


def load(
  source: str | Path,
  *,
  dtype: Any = jnp.float32,
  mesh: jax.sharding.Mesh | None = None,
  rules=None,
  progress: Callable[[str], None] | None = None,
) -> LanguageModel:
  """Loads 'smollm2-135m', 'hf:org/name@rev', a folder or a .gguf file.

  With a mesh, every process reads from a folder only the slices that its own
  devices hold, laid out by `rules`: pairs (pattern, PartitionSpec).
  """
  if (mesh is None) != (rules is None):
    raise ValueError('mesh and rules go together; give both or neither.')
  path = source_lib.resolve(source, progress=progress)
  opened = (folder if path.is_dir() else gguf_file).read(path)
  apply, unembed = decoder.functions(opened.config, dtype=dtype)
  return LanguageModel(
    name=_name(source, path),
    sha256=opened.sha256,
    config=opened.config,
    variables={'params': _params(opened, dtype, mesh, rules)},
    apply=apply,
    unembed=unembed,
    tokenizer=opened.tokenizer,
    template=opened.template,
    special=opened.special,
    stop_ids=opened.stop_ids,
  )


def save(model: LanguageModel, path: str | Path):
  """Writes `model` as a new Hugging Face folder."""
  folder.write(model, path)


def _params(opened: checkpoint_lib.Checkpoint, dtype, mesh, rules):
  places = _places(opened.config, dtype, mesh, rules)

  def put(name, shape, fetch):
    cast = lambda index: np.asarray(fetch(index), dtype)
    if places is None:
      return jnp.asarray(cast((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, names.leaf(places, name), cast)

  return names.build(
    opened.read,
    opened.shapes,
    opened.config,
    opened.names,
    put=put,
    where=opened.where,
  )


def _places(config, dtype, mesh, rules):
  """The tree of shardings, or None without a mesh."""
  if mesh is None:
    return None
  tree = names.nested(
    {
      name: jax.ShapeDtypeStruct(shape, dtype)
      for name, shape in names.shapes(config).items()
    }
  )
  return trees.shardings({'params': tree}, mesh, rules)['params']


def _name(source, path: Path) -> str:
  named = source in source_lib.WHEELS or str(source).startswith('hf:')
  return str(source) if named else path.stem if path.is_file() else path.name
