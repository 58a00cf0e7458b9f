"""Batches of rows for each process, shuffled, and resumable to the row."""

from collections.abc import Mapping, Sequence
from typing import Any


class Feed:
  """An iterator over lists of rows, the same in every run.

  All processes shuffle the same way, anew in every epoch, and each loads its
  own rows of every batch: process p of n those p, p + n, ... of it. Rows go on
  from epoch to epoch; only the last batch of all may be short, or empty for
  some process, so that all processes see as many batches.
  """

  def __init__(
    self,
    rows: Any,
    *,
    batch: int,
    seed: int | None,
    epochs: int | None = None,
    process: int = 0,
    processes: int = 1,
    threads: int = 0,
  ):
    """Batches of `rows`.

    Args:
      rows: anything with a length and an index: a list, `datasets.Rows`, a
        data source of tfds or grain.
      batch: rows of a batch, over all processes.
      seed: of the order; None leaves the rows as they are.
      epochs: times that every row comes; None never ends.
      process: `jax.process_index()`.
      processes: `jax.process_count()`.
      threads: that load rows ahead, for rows that are slow to load.

    Raises:
      ValueError: a number is out of range, or there are no rows.
      ImportError: grain is not installed.
    """
    if not len(rows):
      raise ValueError('there are no rows to make batches of; give some.')
    if batch < 1 or processes < 1 or batch % processes:
      raise ValueError(
        f'a batch of {batch} rows does not divide over {processes} processes; '
        'give a multiple.'
      )
    if not 0 <= process < processes:
      raise ValueError(
        f'process {process} is none of {processes}; give '
        'jax.process_index() and jax.process_count().'
      )
    if epochs is not None and epochs < 1:
      raise ValueError(f'epochs={epochs} gives nothing; give at least 1.')
    self.size = batch // processes  # rows of this process
    self._kept = {
      'rows': len(rows),
      'batch': batch,
      'seed': seed,
      'epochs': epochs,
    }
    self._grain = _grain()
    ahead = 2 * self.size * bool(threads)
    self._options = self._grain.ReadOptions(threads, ahead)
    self._rows = self._own(rows, process, processes)
    self._begin(0)

  @property
  def batches(self) -> int | None:
    """How many there are in all; None where they do not end."""
    kept = self._kept
    if kept['epochs'] is None:
      return None
    return -(-kept['rows'] * kept['epochs'] // kept['batch'])

  def __iter__(self):
    return self

  def __next__(self) -> list:
    rows = next(self._iterator)
    self._batch += 1
    return rows

  def get_state(self) -> dict[str, Any]:
    """Where the feed is, as JSON can hold it."""
    return {'next': self._batch, **self._kept}

  def set_state(self, state: Mapping[str, Any]):
    """Goes on from `state`; the number of processes may be another.

    Raises:
      ValueError: it is of a feed of other rows, batches, order or epochs.
    """
    for name, here in self._kept.items():
      there = state.get(name)
      if there != here:
        raise ValueError(
          f'the state is of a feed with {name}={there}, and here {name}='
          f'{here}; what follows would be other batches. Give the same '
          'number, or begin anew.'
        )
    self._begin(state['next'])

  def _own(self, rows, process, processes):
    """The rows of this process, in order, filled up to whole batches."""
    data, kept = self._grain.MapDataset, self._kept
    stream = data.source(rows)
    if kept['seed'] is not None:
      stream = stream.shuffle(kept['seed'])
    stream = stream.repeat(kept['epochs'])
    if kept['epochs'] is not None:
      missing = -len(stream) % kept['batch']
      if missing:
        stream = data.concatenate([stream, data.source([_NO_ROW] * missing)])
    return stream[process::processes]

  def _begin(self, batch: int):
    rows = self._rows[batch * self.size :] if batch else self._rows
    stream = rows.to_iter_dataset(self._options).batch(
      self.size, batch_fn=_present
    )
    self._iterator, self._batch = iter(stream), batch


def _present(rows: Sequence) -> list:
  return [row for row in rows if row is not _NO_ROW]


def _grain():
  try:
    import grain
  except ImportError as error:
    raise ImportError(
      'Batches of data need grain: pip install "persona_jax[data]".'
    ) from error
  return grain


_NO_ROW = object()
