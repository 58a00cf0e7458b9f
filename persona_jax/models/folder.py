"""Hugging Face folders: config.json, safetensors, tokenizer and template."""

import collections
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from persona_jax.models import checkpoint, families, names, shards, vocabulary

CheckpointError = checkpoint.CheckpointError

TEMPLATE = 'chat_template.jinja'
TEXTS = (  # what a model says of itself beside its weights
  'config.json',
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  TEMPLATE,
  shards.INDEX,
)
_SPECIAL = ('bos', 'eos', 'unk', 'pad')
_OPEN = 0o755  # a temporary folder is private otherwise


def read(
  path: str | Path, *, inert: tuple[str, ...] = ()
) -> checkpoint.Checkpoint:
  """Opens a folder; only headers are read until a tensor is asked for.

  Args:
    path: the folder.
    inert: names of unknown fields of config.json that change nothing.

  Raises:
    CheckpointError: a file is missing or damaged, or not what we compute.
  """
  path = Path(path)
  settings = shards.read_json(_present(path / 'config.json'))
  part, prefix = families.text_part(settings)
  config = families.from_hf(part, inert=inert)
  tensors = shards.places(path)
  stored = {
    name.removeprefix(prefix): name
    for name in tensors
    if not (prefix and name.startswith(families.UNSEEN))
  }
  read_stored = shards.reader(tensors)
  about = _maybe(path / 'tokenizer_config.json')
  return checkpoint.Checkpoint(
    where=str(path),
    files=tuple(sorted({place.file for place in tensors.values()})),
    config=config,
    names=names.table(config, names.HUGGING_FACE),
    shapes={name: tensors[its].shape for name, its in stored.items()},
    read=lambda name: read_stored(stored[name]),
    tokenizer=vocabulary.from_file(_present(path / 'tokenizer.json')),
    template=_template(path, about),
    special=_special(path, about),
    ends=_ends(settings, _maybe(path / 'generation_config.json')),
  )


def write(model, path: str | Path, *, shard_bytes: int = shards.SHARD_BYTES):
  """Writes `model` where transformers and `load` read it, all or nothing.

  Tensors come from the devices one by one. On a mesh of several processes all
  of them call this, and the first one writes.
  """
  path = Path(path)
  if _first_says(path.exists()):
    raise ValueError(
      f'{path} exists and is not overwritten; choose another folder or '
      'delete it.'
    )
  params, config = model.variables['params'], model.config
  table = names.table(config, names.HUGGING_FACE)
  tensors = list(names.tensors(params, config, table, gather=_host))
  with jax.transfer_guard('allow'):
    if jax.process_index() == 0:
      _write(model, tensors, path, shard_bytes)
    else:
      collections.deque((t.fetch() for t in tensors), maxlen=0)  # gather along
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'{path} is written')


def _write(model, tensors, path, shard_bytes):
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
    partial = Path(temporary, path.name)
    partial.mkdir(_OPEN)
    shards.write(partial, tensors, shard_bytes)
    model.tokenizer.save(str(partial / 'tokenizer.json'))
    for name, record in _records(model, tensors[0].dtype).items():
      text = json.dumps(record, indent=2, ensure_ascii=False) + '\n'
      (partial / name).write_text(text, encoding='utf-8')
    if model.template is not None:  # here it is read from, since 2025
      (partial / TEMPLATE).write_bytes(model.template.encode())
    partial.rename(path)


def _records(model, dtype) -> dict[str, dict[str, Any]]:
  special = {f'{k}_token': v for k, v in model.special.items()}
  ids = {
    f'{k}_token_id': model.tokenizer.token_to_id(model.special.get(k, ''))
    for k in _SPECIAL
    if k != 'unk'
  }
  about = special | {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'model_max_length': model.config.max_positions,
  }
  if model.template is not None:
    about['chat_template'] = model.template  # for older readers
  ends = {'eos_token_id': list(model.stop_ids) or None}
  # None in config.json, too: left out, transformers fills in its own ids.
  config = families.to_hf(model.config) | ids | {'torch_dtype': str(dtype)}
  known = {k: v for k, v in (ids | ends).items() if v is not None}
  return {
    'config.json': config,
    'generation_config.json': known,
    'tokenizer_config.json': about,
  }


# Parameters, one tensor at a time.


def _host(array) -> np.ndarray:
  if isinstance(array, jax.Array) and not array.is_fully_addressable:
    return multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)


def _first_says(value: bool) -> bool:
  """What the first process says, so that all go on or none."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


# What a tokenizer's records say.


def _template(path: Path, about) -> str | None:
  """The chat template; of several named ones, the default."""
  file = path / TEMPLATE
  if file.exists():  # wins over tokenizer_config.json, as in transformers
    return _text(file)
  template = about.get('chat_template')
  if template is None or isinstance(template, str):
    return template
  try:
    named = {row['name']: row['template'] for row in template}
    ''.join([*named, *named.values()])  # a TypeError, if not all are texts
  except (TypeError, KeyError) as error:
    raise CheckpointError(
      f'{path / "tokenizer_config.json"}: chat_template is neither a text nor '
      f'a list of names and templates; write the template into {file}.'
    ) from error
  if len(named) == 1:
    return next(iter(named.values()))
  if named and 'default' not in named:
    raise CheckpointError(
      f'{path} has the chat templates {", ".join(named)}, none of them '
      f'called default; copy the one to use into {file}.'
    )
  return named.get('default')


def _special(path: Path, about) -> dict[str, str]:
  """Special tokens' texts, which may be records with a `content`."""
  mapped = _maybe(path / 'special_tokens_map.json')
  found = {}
  for kind in _SPECIAL:
    field = f'{kind}_token'
    value = about.get(field) or mapped.get(field)
    text = value.get('content') if isinstance(value, dict) else value
    if value and not isinstance(text, str):
      raise CheckpointError(
        f'{path}: {field}={value!r} is neither a text nor a record with a '
        'content; fix tokenizer_config.json.'
      )
    if text:
      found[kind] = text
  return found


def _ends(*settings) -> tuple[int, ...]:
  """The ids under eos_token_id, which may be one or several."""
  ends = set()
  for record in settings:
    ids = record.get('eos_token_id')
    ids = ids if isinstance(ids, list) else [ids]
    if wrong := [i for i in ids if not isinstance(i, int | None)]:
      raise CheckpointError(
        f'eos_token_id {wrong[0]!r} is no token id; give a number or a list '
        'of numbers in config.json and generation_config.json.'
      )
    ends |= set(ids)
  return tuple(sorted(ends - {None}))


def _text(file: Path) -> str:
  try:
    return file.read_bytes().decode()  # as it stands, line ends included
  except UnicodeDecodeError as error:
    raise CheckpointError(
      f'{file} is not UTF-8 ({error}); fetch it again.'
    ) from error


def _maybe(file: Path) -> dict[str, Any]:
  return shards.read_json(file) if file.exists() else {}


def _present(file: Path) -> Path:
  if not file.exists():
    present = (path.name for path in file.parent.iterdir())
    raise shards.missing(file.parent, file.name, present)
  return file
