"""Hugging Face folders: config.json, safetensors, tokenizer and template."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from persona_jax import trees
from persona_jax.models import checkpoint, families, names, vocabulary

_INDEX = 'model.safetensors.index.json'
_SPECIAL = ('bos', 'eos', 'unk', 'pad')
_OPEN, _READABLE = 0o755, 0o644  # temporary files are private otherwise


def read(path: str | Path) -> checkpoint.Checkpoint:
  """Opens a folder; only headers are read until a tensor is asked for."""
  path = Path(path)
  settings = _json(path / 'config.json')
  config = families.from_hf(settings)
  where = _places(path)
  tokenizer = vocabulary.from_file(_present(path / 'tokenizer.json'))
  about = _maybe(path / 'tokenizer_config.json')
  return checkpoint.Checkpoint(
    where=str(path),
    files=tuple(sorted({file for file, _ in where.values()})),
    config=config,
    names=names.HUGGING_FACE,
    shapes={name: shape for name, (_, shape) in where.items()},
    read=_reader({name: file for name, (file, _) in where.items()}),
    tokenizer=tokenizer,
    template=_template(path, about),
    special=_special(path, about),
    ends=_ends(settings, _maybe(path / 'generation_config.json')),
  )


def write(model, path: str | Path):
  """Writes `model` where transformers and `load` read it, all or nothing."""
  from safetensors import numpy as safetensors_numpy

  path = Path(path)
  if path.exists():
    raise ValueError(
      f'{path} exists and is not overwritten; choose another folder or '
      'delete it.'
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  stacked = trees.stack_layers({'params': model.variables['params']})['params']
  tensors = names.split(stacked, model.config, names.HUGGING_FACE)
  tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
  with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
    partial = Path(temporary, path.name)
    partial.mkdir(_OPEN)
    weights = partial / 'model.safetensors'
    safetensors_numpy.save_file(tensors, weights, metadata={'format': 'pt'})
    weights.chmod(_READABLE)
    model.tokenizer.save(str(partial / 'tokenizer.json'))
    for name, record in _records(model, tensors).items():
      text = json.dumps(record, indent=2, ensure_ascii=False)
      (partial / name).write_text(text + '\n', encoding='utf-8')
    partial.rename(path)


def _records(model, tensors) -> dict[str, dict[str, Any]]:
  dtype = str(next(iter(tensors.values())).dtype)
  special = {f'{k}_token': v for k, v in model.special.items()}
  ids = {
    f'{k}_id': model.tokenizer.token_to_id(v)
    for k, v in special.items()
    if k != 'unk_token'
  }
  about = special | {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'model_max_length': model.config.max_positions,
  }
  if model.template is not None:
    about['chat_template'] = model.template
  config = families.to_hf(model.config) | ids | {'torch_dtype': dtype}
  return {
    'config.json': config,
    'generation_config.json': ids | {'eos_token_id': list(model.stop_ids)},
    'tokenizer_config.json': about,
  }


def _places(path: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
  """Every tensor's file and shape, from the headers."""
  index = _maybe(path / _INDEX)
  if not index:
    files = [_present(path / 'model.safetensors')]
  else:
    shards = sorted(set(index['weight_map'].values()))
    files = [_present(path / shard) for shard in shards]
  places = {}
  for file in files:
    with _open(file) as tensors:
      for name in tensors.keys():  # noqa: SIM118, a handle is no dictionary
        shape = tuple(tensors.get_slice(name).get_shape())
        places[name] = (file, shape)
  return places


def _reader(files: dict[str, Path]):
  """`read(name)`: a handle whose slices are read from disk when taken."""
  handles = {}

  def read(name):
    file = files[name]
    if file not in handles:
      handles[file] = _open(file)
    return handles[file].get_slice(name)

  return read


def _open(file: Path):
  import safetensors

  try:
    return safetensors.safe_open(file, 'numpy')
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{file} ends early or is damaged ({error}). Delete it and fetch it '
      'again.'
    ) from error


def _template(path: Path, about) -> str | None:
  """The chat template; of several named ones, the default."""
  file = path / 'chat_template.jinja'
  if file.exists():
    return file.read_text(encoding='utf-8')
  template = about.get('chat_template')
  if isinstance(template, list):
    named = {row['name']: row['template'] for row in template}
    return named.get('default')
  return template


def _special(path: Path, about) -> dict[str, str]:
  """Special tokens' texts, which may be records with a `content`."""
  table = _maybe(path / 'special_tokens_map.json') | about
  found = {k: table.get(f'{k}_token') for k in _SPECIAL}
  return {
    k: v['content'] if isinstance(v, dict) else v
    for k, v in found.items()
    if v is not None
  }


def _ends(*settings) -> tuple[int, ...]:
  """The ids under eos_token_id, which may be one or several."""
  ends = set()
  for record in settings:
    ids = record.get('eos_token_id')
    ends |= set(ids) if isinstance(ids, list) else {ids}
  return tuple(sorted(ends - {None}))


def _maybe(file: Path) -> dict[str, Any]:
  return _json(file) if file.exists() else {}


def _json(file: Path) -> dict[str, Any]:
  try:
    return json.loads(_present(file).read_text(encoding='utf-8'))
  except json.JSONDecodeError as error:
    raise ValueError(
      f'{file} is not JSON ({error}); fetch it again.'
    ) from error


def _present(file: Path) -> Path:
  if not file.exists():
    raise ValueError(
      f'{file.parent} has no {file.name}; a Hugging Face folder needs '
      'config.json, tokenizer.json and safetensors weights.'
    )
  return file
