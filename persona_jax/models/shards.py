"""Safetensors, in one file or in shards with an index.

Read by slices; written one tensor at a time, so that the host never holds more
than that. The format is the length of a header in 8 bytes, the header as JSON,
and the bytes of all tensors in its order
(https://huggingface.co/docs/safetensors).
"""

import collections
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from persona_jax.models import names
from persona_jax.models.checkpoint import CheckpointError, listed

WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
SHARD_BYTES = 5 * 10**9  # as Hugging Face
DTYPES = dict(float32='F32', float16='F16', bfloat16='BF16', float64='F64')

Shape = names.Shape
Tensor = names.Tensor


class Place(NamedTuple):
  """Where a tensor lies, and what its header says of it."""

  file: Path
  shape: Shape
  dtype: str  # as the format writes it: 'F32'


def places(folder: Path) -> dict[str, Place]:
  """Every tensor of a folder by name, from the headers alone.

  Raises:
    CheckpointError: lists all that is missing, double, or of another type.
  """
  if (folder / WEIGHTS).exists():  # before an index, as transformers does
    found = _headers([folder / WEIGHTS])
    mapped = {name: WEIGHTS for name in found}
  else:
    mapped = weight_map(folder)
    files = [folder / shard for shard in sorted(set(mapped.values()))]
    if missing := [file.name for file in files if not file.exists()]:
      raise CheckpointError(
        f'{folder} lacks {len(missing)} of the {len(files)} shards that '
        f'{INDEX} names: {listed(missing, ", ")}. Fetch them again.'
      )
    found = _headers(files)
  _check_map(folder, mapped, found)
  _check_types(folder, found)
  return {name: rows[0] for name, rows in found.items()}


def weight_map(folder: Path) -> dict[str, str]:
  """The index of a folder: the shard of each tensor, as a bare file name."""
  file = folder / INDEX
  if not file.exists():
    raise missing(folder, WEIGHTS, (path.name for path in folder.iterdir()))
  mapped = read_json(file).get('weight_map')
  if not isinstance(mapped, dict) or not mapped:
    raise CheckpointError(
      f'{file}: weight_map is no table of tensor names and shards; fetch the '
      'index again.'
    )
  wrong = [shard for shard in mapped.values() if not _is_bare(shard)]
  if wrong:
    raise CheckpointError(
      f'{file}: {wrong[0]!r} is not the name of a file in this folder; shards '
      'stand beside their index and end in .safetensors.'
    )
  return mapped


def reader(found: dict[str, Place]) -> Callable[[str], Any]:
  """`read(name)`: a handle whose slices are read from disk when taken.

  A handle is a mapping into memory: it holds no file descriptor, so that
  hundreds of shards can be open.
  """
  handles = {}

  def read(name):
    file = found[name].file
    if file not in handles:
      handles[file] = _open(file)
    return handles[file].get_slice(name)

  return read


def read_json(file: Path) -> dict[str, Any]:
  """A JSON file that holds one record."""
  try:
    record = json.loads(file.read_bytes())
    json.dumps(record, ensure_ascii=False).encode()  # no halves of characters
  except (ValueError, RecursionError) as error:  # ValueError: or of UTF-8
    raise CheckpointError(
      f'{file} is not JSON ({error}); fetch it again.'
    ) from error
  if not isinstance(record, dict):
    raise CheckpointError(
      f'{file} holds a {type(record).__name__}, not a record of fields; fetch '
      'it again.'
    )
  return record


def missing(where, name: str, present: Iterable[str]) -> CheckpointError:
  """An error for a folder without the file `name`, by what is there instead."""
  present = sorted(present)
  ggufs = [file for file in present if file.endswith('.gguf')]
  pickles = [file for file in present if file.endswith(('.bin', '.pt', '.pth'))]
  if any(file.endswith('.safetensors') for file in present):
    ggufs, pickles = [], []  # then something else is wrong
  if ggufs:
    ggufs = [f'{where}/{file}' for file in ggufs]
    out = f'of its GGUF files give one: {listed(ggufs, ", ")}.'
  elif pickles and name == WEIGHTS:
    out = (
      f'{listed(pickles, ", ")} would run code when read, so pickles are never '
      'read: convert once, where you trust them, with transformers: '
      'AutoModelForCausalLM.from_pretrained(...).save_pretrained(...).'
    )
  elif name == 'tokenizer.json' and 'tokenizer.model' in present:
    out = (
      'its tokenizer.model is not read: convert once with transformers: '
      'AutoTokenizer.from_pretrained(...).save_pretrained(...).'
    )
  else:
    out = (
      'a Hugging Face folder needs config.json, tokenizer.json and '
      'safetensors weights.'
    )
  return CheckpointError(f'{where} has no {name}; {out}')


def _headers(files: Iterable[Path]) -> dict[str, list[Place]]:
  found = collections.defaultdict(list)
  for file in files:
    with _open(file) as tensors:
      for name in tensors.keys():  # noqa: SIM118, a handle is no dictionary
        part = tensors.get_slice(name)
        shape = tuple(part.get_shape())
        found[name].append(Place(file, shape, part.get_dtype()))
  return found


def _check_map(folder, mapped, found):
  problems = [
    f'{name} is not in {shard}'
    for name, shard in mapped.items()
    if shard not in {place.file.name for place in found.get(name, ())}
  ]
  for name, rows in found.items():
    files = [place.file.name for place in rows]
    if len(rows) > 1:
      problems.append(f'{name} is in {" and ".join(files)}')
    elif name not in mapped and not _is_buffer(name):
      problems.append(f'{name} of {files[0]} is not in the index')
  if problems:
    raise CheckpointError(
      f'{folder / INDEX} does not fit its shards; {len(problems)} problem(s): '
      f'{listed(problems)}. Fetch the folder again.'
    )


def _check_types(folder, found):
  wrong = [
    f'{name} is {rows[0].dtype}'
    for name, rows in found.items()
    if rows[0].dtype not in DTYPES.values() and not _is_buffer(name)
  ]
  if wrong:
    raise CheckpointError(
      f'{folder} holds {len(wrong)} tensor(s) that are no plain numbers: '
      f'{listed(wrong)}. Only {", ".join(DTYPES.values())} are read: '
      'quantised weights would need their scales; use the original '
      'checkpoint or a GGUF.'
    )


def _is_buffer(name: str) -> bool:
  return any(re.search(pattern, name) for pattern in names.IGNORED)


def _is_bare(shard) -> bool:
  return (
    isinstance(shard, str)
    and shard.endswith('.safetensors')
    and not {'/', '\\', '\0'} & set(shard)
  )


def _open(file: Path):
  import safetensors

  try:
    return safetensors.safe_open(file, 'numpy')
  except safetensors.SafetensorError as error:
    with open(file, 'rb') as start:
      pointer = start.read(20).startswith(b'version https://git')
    raise CheckpointError(
      f'{file} is a git-lfs pointer, not the weights; run "git lfs pull".'
      if pointer
      else f'{file} ends early or is damaged ({error}). Delete it and fetch '
      'it again.'
    ) from error


# Writing.


def write(folder: Path, tensors: Iterable[Tensor], shard_bytes: int):
  """Writes one file, or shards of about `shard_bytes` and their index."""
  shards = split(tensors, shard_bytes)
  count = len(shards)
  mapped = {}
  for i, shard in enumerate(shards, 1):
    name = WEIGHTS if count == 1 else f'model-{i:05}-of-{count:05}.safetensors'
    _write(folder / name, shard)
    mapped |= {tensor.name: name for tensor in shard}
  if count > 1:
    total = sum(_size(tensor) for shard in shards for tensor in shard)
    index = {'metadata': {'total_size': total}, 'weight_map': mapped}
    text = json.dumps(index, indent=2, sort_keys=True) + '\n'
    (folder / INDEX).write_text(text, encoding='utf-8')


def split(tensors: Iterable[Tensor], shard_bytes: int) -> list[list[Tensor]]:
  """Tensors in their order; a shard is full when the next would not fit."""
  shards, room = [], 0
  for tensor in tensors:
    if not shards or _size(tensor) > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append(tensor)
    room -= _size(tensor)
  return shards


def _write(file: Path, tensors: Sequence[Tensor]):
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for tensor in tensors:
    header[tensor.name] = {
      'dtype': _dtype(tensor),
      'shape': list(tensor.shape),
      'data_offsets': [end, end := end + _size(tensor)],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # the bytes that follow are aligned
  with open(file, 'wb') as out:
    out.write(struct.pack('<Q', len(text)) + text)
    for tensor in tensors:
      out.write(_bytes(tensor))  # which is gone before the next is fetched


def _bytes(tensor: Tensor) -> memoryview:
  array = np.ascontiguousarray(tensor.fetch())
  return array.reshape(-1).view(np.uint8).data


def _size(tensor: Tensor) -> int:
  return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _dtype(tensor: Tensor) -> str:
  dtype = str(np.dtype(tensor.dtype))
  if dtype not in DTYPES:
    raise ValueError(
      f'{tensor.name} is {dtype}; only {", ".join(DTYPES)} are exported. Cast '
      'the parameters first.'
    )
  return DTYPES[dtype]
