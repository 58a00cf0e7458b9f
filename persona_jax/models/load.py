"""A checkpoint as a language model: functions, variables and tokenizer."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from persona_jax.models import checkpoint as checkpoint_lib
from persona_jax.models import config as config_lib
from persona_jax.models import (
  decoder,
  experts,
  folder,
  gguf_file,
  names,
  stream,
  vocabulary,
)
from persona_jax.models import source as source_lib


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
  """A model that speaks: pure functions, their variables, its tokenizer."""

  name: str
  config: config_lib.DecoderConfig
  variables: Mapping[str, Any]  # {'params': ...}
  apply: Callable  # (variables, tokens, positions, cache) -> hidden, cache
  unembed: Callable  # (variables, hidden) -> logits
  tokenizer: Any  # tokenizers.Tokenizer
  template: str | None  # jinja source of the chat format
  special: Mapping[str, str]  # 'bos', 'eos', ... -> the token's text
  stop_ids: tuple[int, ...]  # any of them ends an assistant's line
  files: tuple[Path, ...] = ()  # that hold the weights
  mix: Callable = experts.grouped  # of experts, where their weights lie

  @functools.cached_property
  def sha256(self) -> str:
    """Of the weights' files; all their bytes are read when it is asked for."""
    return checkpoint_lib.sha256(self.files)


def load(
  source: str | Path,
  *,
  dtype: Any = jnp.float32,
  mesh: jax.sharding.Mesh | None = None,
  rules=None,
  context: int | None = None,
  attend: str | None = None,
  inert: tuple[str, ...] = (),
  progress: Callable[[str], None] | None = None,
) -> LanguageModel:
  """Loads 'smollm2-135m', 'hf:org/name@rev', a folder or a .gguf file.

  Args:
    source: what to load.
    dtype: of parameters and computation.
    mesh: where parameters lie; every process reads only its devices' slices.
    rules: how they lie: pairs (pattern, PartitionSpec), first match wins.
    context: slots of the longest conversation; LongRoPE models (Phi-3 128k)
      choose their frequencies by it, by default those of short ones.
    attend: how attention is computed (`attention.KERNELS`), by default as is
      best on this backend.
    inert: unknown fields of config.json that change nothing.
    progress: told what takes long.

  Raises:
    CheckpointError: the checkpoint is damaged, incomplete, contradictory, or
      of a kind that we do not compute.
  """
  if (mesh is None) != (rules is None):
    raise ValueError('mesh and rules go together; give both or neither.')
  path = source_lib.resolve(source, progress=progress)
  opened = (
    folder.read(path, inert=inert) if path.is_dir() else gguf_file.read(path)
  )
  config = _for_context(opened.config, context)
  tokenizer = vocabulary.fitting(opened.tokenizer, config.vocab, opened.where)
  shardings = stream.shardings(config, dtype, mesh, rules)
  place = None
  if shardings is not None and config.experts is not None:
    place = names.leaf(shardings, names.EXPERTS)
  mix = experts.placed(place)
  apply, unembed = decoder.functions(
    config, dtype=dtype, mix=mix, attend=attend
  )
  return LanguageModel(
    name=_name(source, path),
    config=config,
    variables={'params': stream.parameters(opened, dtype, shardings)},
    apply=apply,
    unembed=unembed,
    tokenizer=tokenizer,
    template=opened.template,
    special=opened.special,
    stop_ids=opened.stop_ids,
    files=opened.files,
    mix=mix,
  )


def save(model: LanguageModel, path: str | Path, **keywords):
  """Writes `model` as a new Hugging Face folder (see `folder.write`)."""
  folder.write(model, path, **keywords)


def _for_context(config, context) -> config_lib.DecoderConfig:
  """LongRoPE's frequencies are those of conversations of `context` slots."""

  def chosen(kind):
    if kind.rope is None or kind.rope.kind != 'longrope' or context is None:
      return kind
    original = dict(kind.rope.scaling)['original_max_position_embeddings']
    rope = dataclasses.replace(kind.rope, long=context > original)
    return dataclasses.replace(kind, rope=rope)

  if context is not None and context > config.max_positions:
    raise ValueError(
      f'context={context} is more than the {config.max_positions} positions '
      'that the model knows; ask for less.'
    )
  return dataclasses.replace(config, kinds=tuple(map(chosen, config.kinds)))


def _name(source, path: Path) -> str:
  named = source in source_lib.WHEELS or str(source).startswith('hf:')
  return str(source) if named else path.stem if path.is_file() else path.name
