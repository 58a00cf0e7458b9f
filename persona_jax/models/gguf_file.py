"""GGUF files: metadata, and tensors dequantised to float32 row by row."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from persona_jax.models import (
  checkpoint,
  gguf_fields,
  gguf_header,
  names,
  vocabulary,
)

# What llama.cpp's converter does to weights, by general.architecture.
PERMUTED = ('llama', 'granite', 'smollm3')  # rows of q and k
SHIFTED = ('gemma2', 'gemma3')  # norms hold 1 + w

KINDS = (
  *('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1'),
  *('Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K'),
)
_QUERY_OR_KEY = re.compile(r'attn_(q|k)\.(weight|bias)$')


@dataclasses.dataclass(frozen=True)
class Rows:
  """A tensor of which a slice dequantises only the rows that it takes."""

  tensor: gguf_header.Tensor
  order: np.ndarray | None = None  # our rows, as the file counts them
  shift: float = 0.0

  @property
  def shape(self) -> tuple[int, ...]:
    return self.tensor.shape

  def __getitem__(self, index) -> np.ndarray:
    import gguf

    index = index if isinstance(index, tuple) else (index,)
    index += (slice(None),) * (len(self.shape) - len(index))
    *outer, columns = index
    data = self.tensor.data
    if self.order is not None and outer:
      outer[0] = self.order[outer[0]]
    elif self.order is not None:  # a bias: one row, whose numbers move
      columns = self.order[columns]
    data = np.array(data[tuple(outer)])  # from the disk, still packed
    array = gguf.quants.dequantize(data, self.tensor.kind)
    array = array.astype(np.float32, copy=False)[..., columns]
    return array + np.float32(self.shift) if self.shift else array


def read(path: str | Path) -> checkpoint.Checkpoint:
  """Opens a GGUF file; tensors are dequantised when they are asked for."""
  path = Path(path)
  metadata, tensors = gguf_header.read(path)
  _whole(path, metadata, tensors)
  config = gguf_fields.from_gguf(
    metadata,
    tensors,
    lambda name: rows(name, tensors[name], None, metadata)[:],
  )
  return checkpoint.Checkpoint(
    where=path.name,
    files=(path,),
    config=config,
    names=names.table(config, names.GGUF),
    shapes={name: tensor.shape for name, tensor in tensors.items()},
    read=lambda name: rows(name, tensors[name], config, metadata),
    tokenizer=vocabulary.from_gguf(metadata),
    template=_template(metadata),
    special=vocabulary.special_of_gguf(metadata),
  )


def unpaired(rows: int, heads: int) -> np.ndarray:
  """For each row of ours, the row of llama.cpp that holds it.

  llama.cpp keeps the two halves of a head, which rotate together, side by
  side: its rows 2 i and 2 i + 1 are our rows i and i + half.
  """
  pairs = np.arange(rows).reshape(heads, -1, 2)
  return pairs.swapaxes(1, 2).reshape(rows)


def rows(name, tensor, config, metadata) -> Rows:
  """A tensor as Hugging Face lays it out, whatever the converter did."""
  kind = metadata['general.architecture']
  found = _QUERY_OR_KEY.search(name)
  if found and kind in PERMUTED:
    heads = config.heads if found[1] == 'q' else config.kv_heads
    if tensor.shape[0] % (2 * heads):
      raise checkpoint.CheckpointError(
        f'{name} has {tensor.shape[0]} rows, which do not halve over {heads} '
        'heads; fetch the file again.'
      )
    return Rows(tensor, order=unpaired(tensor.shape[0], heads))
  shifted = kind in SHIFTED and name.endswith('norm.weight')
  return Rows(tensor, shift=-1.0 if shifted else 0.0)


def _whole(path, metadata, tensors):
  """Raises on parts of a model and on packings that we do not read."""
  parts = metadata.get('split.count', 1)
  if parts not in (0, 1):
    raise checkpoint.CheckpointError(
      f'{path} is one of {parts!r} parts; join them with llama-gguf-split '
      '--merge and give the whole file.'
    )
  foreign = {t.kind.name for t in tensors.values()} - set(KINDS)
  if foreign:
    raise checkpoint.CheckpointError(
      f'{path} has tensors of {", ".join(sorted(foreign))}; read are '
      f'{", ".join(KINDS)}. Fetch another quantisation.'
    )


def _template(metadata) -> str | None:
  template = metadata.get('tokenizer.chat_template')
  if template is not None and not isinstance(template, str):
    raise checkpoint.CheckpointError(
      f'tokenizer.chat_template is {template!r:.40}, not a text; fetch the '
      'file again.'
    )
  return template
