"""The header of a GGUF file: metadata and places, every length checked.

The layout is that of ggml's docs/gguf.md: magic, version, two counts, pairs of
a key and a typed value, records of tensors, and the tensors' bytes, aligned.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from persona_jax.models import checkpoint

_VERSIONS = (2, 3)
_MAX_AXES = 4
_STRING, _ARRAY = 8, 9
_BOOL = 7
_NUMBERS = {  # GGUF's type of a value -> numpy's
  0: '<u1',
  1: '<i1',
  2: '<u2',
  3: '<i2',
  4: '<u4',
  5: '<i4',
  6: '<f4',
  _BOOL: '?',
  10: '<u8',
  11: '<i8',
  12: '<f8',
}
_LEAST_PAIR = 8 + 4 + 1  # bytes: an empty key, a type and a value of one byte
_LEAST_TENSOR = 8 + 4 + 8 + 4 + 8  # bytes: no name, one axis
_LEAST_STRING = 8


class Tensor(NamedTuple):
  """Where a tensor lies in the file, and how its numbers are packed."""

  shape: tuple[int, ...]  # (..., out, in): the last axis is contiguous
  kind: Any  # gguf.GGMLQuantizationType
  data: np.ndarray  # bytes, (..., out, bytes of a row), mapped from the file


class Damage(ValueError):
  """A header that cannot be what its file holds; the text says why."""


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """The metadata by key and the tensors by name; nothing else is read."""
  path = Path(path)
  with open(path, 'rb') as file:
    magic = file.read(4)
  if magic != b'GGUF':
    raise checkpoint.CheckpointError(
      f"{path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'. "
      'Give a .gguf file or a Hugging Face folder.'
    )
  try:
    return _parse(np.memmap(path, mode='r'))
  except (Damage, UnicodeDecodeError) as error:
    raise checkpoint.CheckpointError(
      f'{path} ends early or is damaged: {error} (it has '
      f'{path.stat().st_size:,} bytes). Delete it and fetch it again.'
    ) from error


def _parse(file: np.ndarray):
  cursor = _Cursor(file)
  version = cursor.number('<u4')
  if version not in _VERSIONS:
    raise Damage(
      f'its version is {version}, and only little-endian '
      f'{" and ".join(map(str, _VERSIONS))} are read'
    )
  tensors, pairs = cursor.number('<u8'), cursor.number('<u8')
  cursor.enough(pairs, _LEAST_PAIR, 'pairs of metadata')
  metadata: dict[str, Any] = {}
  for _ in range(pairs):
    key = cursor.string()
    if key in metadata:
      raise Damage(f'the key {key!r} is there twice')
    metadata[key] = _value(cursor, cursor.number('<u4'), key)
  cursor.enough(tensors, _LEAST_TENSOR, 'tensors')
  records = [_record(cursor) for _ in range(tensors)]
  alignment = _alignment(metadata)
  start = math.ceil(cursor.at / alignment) * alignment
  places: dict[str, Tensor] = {}
  for name, shape, kind, offset in records:
    if name in places:
      raise Damage(f'the tensor {name!r} is there twice')
    if offset % alignment:
      raise Damage(f'{name!r} lies at {offset}, no multiple of {alignment}')
    places[name] = _place(file, name, shape, kind, start + offset)
  return metadata, places


def _alignment(metadata) -> int:
  alignment = metadata.get('general.alignment', 32)
  whole = isinstance(alignment, int) and alignment > 0
  if not whole or alignment & (alignment - 1):
    raise Damage(f'its alignment {alignment!r} is no power of two')
  return alignment


def _value(cursor, kind: int, key: str):
  if kind == _STRING:
    return cursor.string()
  if kind != _ARRAY:
    return cursor.number(_dtype(kind, key))
  inner, count = cursor.number('<u4'), cursor.number('<u8')
  if inner == _STRING:
    cursor.enough(count, _LEAST_STRING, f'strings of {key!r}')
    return [cursor.string() for _ in range(count)]
  return cursor.numbers(_dtype(inner, key), count).tolist()


def _dtype(kind: int, key: str) -> str:
  if kind not in _NUMBERS:  # also an array in an array, which nobody writes
    raise Damage(f'{key!r} has a value of the unknown type {kind}')
  return _NUMBERS[kind]


def _record(cursor):
  name, axes = cursor.string(), cursor.number('<u4')
  if not 1 <= axes <= _MAX_AXES:
    raise Damage(f'{name!r} has {axes} axes, not 1 to {_MAX_AXES}')
  shape = tuple(cursor.numbers('<u8', axes)[::-1].tolist())
  return name, shape, cursor.number('<u4'), cursor.number('<u8')


def _place(file, name: str, shape, number: int, start: int) -> Tensor:
  import gguf

  try:
    kind = gguf.GGMLQuantizationType(number)
  except ValueError as error:
    raise Damage(f'{name!r} is of the unknown type {number}') from error
  width, size = gguf.GGML_QUANT_SIZES[kind]
  if 0 in shape or shape[-1] % width:
    raise Damage(f'{name!r} is {shape}, no whole blocks of {width} ({kind!r})')
  rows = (*shape[:-1], shape[-1] // width * size)
  end = start + math.prod(rows)
  if end > file.size:
    raise Damage(f'{name!r} {shape} ends at byte {end:,}')
  return Tensor(shape, kind, file[start:end].reshape(rows))


class _Cursor:
  """Reads on from `at`, and never past the end of the file."""

  def __init__(self, file: np.ndarray):
    self.bytes = memoryview(file)
    self.at = 4  # after the magic

  def number(self, dtype: str):
    return self.numbers(dtype, 1)[0].item()

  def numbers(self, dtype: str, count: int) -> np.ndarray:
    return np.frombuffer(self._take(np.dtype(dtype).itemsize * count), dtype)

  def string(self) -> str:
    (length,) = struct.unpack('<Q', self._take(8))
    return str(self._take(length), 'utf-8')

  def enough(self, count: int, least: int, what: str):
    """Raises where so many records cannot fit into the rest of the file."""
    if count * least > len(self.bytes) - self.at:
      raise Damage(f'it announces {count:,} {what}')

  def _take(self, size: int) -> memoryview:
    if size > len(self.bytes) - self.at:
      raise Damage(f'it announces {size:,} bytes at byte {self.at:,}')
    self.at += size
    return self.bytes[self.at - size : self.at]
