"""GGUF files: metadata, and tensors dequantised to float32."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from persona_jax.models import checkpoint, families, names, vocabulary

_PERMUTED = re.compile(r'attn_(q|k)\.(weight|bias)$')
_DAMAGE = (ValueError, IndexError, KeyError, OverflowError, MemoryError)


def read(path: str | Path) -> checkpoint.Checkpoint:
  """Opens a GGUF file; tensors are dequantised when they are asked for."""
  path = Path(path)
  reader = _open(path)
  metadata = _metadata(path, reader)
  tensors = {t.name: t for t in reader.tensors}
  config = families.from_gguf(metadata, tied='output.weight' not in tensors)
  special = vocabulary.special_of_gguf(metadata)
  return checkpoint.Checkpoint(
    where=path.name,
    files=(path,),
    config=config,
    names=names.GGUF,
    shapes={k: tuple(t.shape[::-1].tolist()) for k, t in tensors.items()},
    read=lambda name: _tensor(tensors[name], config, metadata),
    tokenizer=vocabulary.from_gguf(metadata),
    template=metadata.get('tokenizer.chat_template'),
    special=special,
  )


def _open(path: Path):
  import gguf

  with open(path, 'rb') as file:
    magic = file.read(4)
  if magic != b'GGUF':
    raise ValueError(
      f"{path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'. "
      'Give a .gguf file or a Hugging Face folder.'
    )
  try:
    return gguf.GGUFReader(path)
  except _DAMAGE as error:
    raise ValueError(
      f'{path} ends early or is damaged: its {path.stat().st_size:,} bytes '
      'do not hold the tensors that it announces. Delete it and fetch it '
      'again.'
    ) from error


def _metadata(path: Path, reader) -> dict[str, Any]:
  try:
    return {name: field.contents() for name, field in reader.fields.items()}
  except _DAMAGE as error:  # UnicodeDecodeError is a ValueError
    raise ValueError(
      f'{path} has damaged metadata. Delete it and fetch it again.'
    ) from error


def _tensor(tensor, config, metadata) -> np.ndarray:
  import gguf

  array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  array = array.astype(np.float32, copy=False)
  permuted = _PERMUTED.search(tensor.name)
  if permuted and metadata['general.architecture'] == 'llama':
    heads = config.heads if permuted[1] == 'q' else config.kv_heads
    return unpermute(array, heads)
  return array


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
  """Rows from llama's GGUF order (pairs side by side) to halves of a head."""
  rest = array.shape[1:]
  pairs = array.reshape(heads, -1, 2, *rest)
  return pairs.swapaxes(1, 2).reshape(array.shape)
