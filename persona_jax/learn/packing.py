"""Several texts in a row, so that little of a batch is padding.

A text's positions begin at 0, which is how attention knows it from the one
before (`models.attention.segments`). All here is on the host, in numpy.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from persona_jax.learn.losses import Batch


class Packed(NamedTuple):
  """Fewer rows, each with some texts; weights and rows that were given."""

  batch: Batch
  weights: Float[Array, 'P M']
  rows: list[list[int]]

  @property
  def used(self) -> float:
    """The share of slots that hold a token."""
    return float(np.mean(np.asarray(self.batch.positions) >= 0))


def pack(
  batch: Batch,
  weights: Float[Array, 'B M'],
  *,
  slots: int,
  rows: int | None = None,
) -> Packed:
  """The texts of `batch` in rows of `slots`, the longest dealt first.

  Losses, gradients and metrics are those of `batch`, whose `weights` are given
  because they are a mean over all of it. Lines keep apart: those of the texts
  of a row are counted on.

  Args:
    batch: one text a row; what is of a row (`label`, `anchor`) cannot be kept.
    weights: of its tokens.
    slots: of a row; M is the most tokens that a row then holds, rounded up to a
      multiple of 64.
    rows: pads to as many, so that batches share a program.

  Raises:
    ValueError: a text is longer than `slots`, there are more than `rows`, or
      the loss is one of whole rows.
  """
  if batch.label is not None or weights.shape != batch.mask.shape:
    raise ValueError(
      'a loss of whole replies (preferences, PRIME) has one weight a row, and '
      'rows are packed here; give such a batch as it is.'
    )
  given = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
  given = {k: np.asarray(x) for k, x in given.items() if x is not None}
  given['weights'] = np.asarray(weights)
  length = np.sum(given['positions'] >= 0, axis=1)
  count = np.sum(given['mask'], axis=1)
  placed = dealt(length, slots)
  if rows is not None and len(placed) > rows:
    raise ValueError(
      f'{len(length)} texts take {len(placed)} rows of {slots} slots, and '
      f'there are {rows}; give more rows or longer ones.'
    )
  most = max(sum(count[i] for i in row) for row in placed)
  filler = _Filler(rows or len(placed), slots, -(-int(most) // 64) * 64)
  for row, texts in enumerate(placed):
    for i in texts:
      filler.add(row, {name: x[i] for name, x in given.items()})
  arrays = {name: jnp.asarray(x) for name, x in filler.arrays.items()}
  weights = arrays.pop('weights')
  return Packed(Batch(**arrays), weights, placed)


def dealt(lengths, slots: int) -> list[list[int]]:
  """Which texts share a row: each goes, longest first, where it fits best.

  Raises:
    ValueError: a text is longer than `slots`.
  """
  found, room = [], []
  for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    size = int(lengths[i])
    if size > slots:
      raise ValueError(
        f'text {i} has {size} tokens, more than the {slots} slots of a row; '
        'give longer rows.'
      )
    fits = [r for r in range(len(found)) if room[r] >= size]
    if not fits:
      found.append([])
      room.append(slots)
      fits = [len(found) - 1]
    best = min(fits, key=lambda r: room[r])
    found[best].append(i)
    room[best] -= size
  return found


class _Filler:
  """Rows that are being filled from the left."""

  def __init__(self, rows, slots, tokens):
    self.arrays = {
      'tokens': np.zeros((rows, slots), np.int32),
      'positions': np.full((rows, slots), -1, np.int32),
      'weights': np.zeros((rows, tokens), np.float32),
    }
    self._shape = rows, tokens
    self._slot, self._token, self._line = np.zeros((3, rows), np.int32)

  def add(self, row, text):
    """A text behind what `row` holds: its arrays by name."""
    kept, counts = text['positions'] >= 0, text['mask']
    first, size = self._slot[row], np.sum(kept)
    here = slice(first, first + size)
    for name in ('tokens', 'positions'):
      self.arrays[name][row, here] = text.pop(name)[kept]
    # Slots without a token are left out: `before` counts those that are left.
    text['before'] = first + (np.cumsum(kept) - 1)[text['before']]
    line = text.pop('line', np.zeros(counts.size, np.int32))[counts]
    _, line = np.unique(line, return_inverse=True)
    added = {name: x[counts] for name, x in text.items()}
    added['line'] = self._line[row] + line
    number = np.sum(counts)
    there = slice(self._token[row], self._token[row] + number)
    for name, x in added.items():
      if name not in self.arrays:
        self.arrays[name] = np.zeros(self._shape, x.dtype)
      self.arrays[name][row, there] = x
    self._slot[row] += size
    self._token[row] += number
    self._line[row] += line.max(initial=-1) + 1
