"""Progress on the screen, and numbers on disk."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from persona_jax import processes


@contextlib.contextmanager
def progress(title: str, total: int, *, quiet: bool = False):
  """A bar; yields `advance(count=1)`. The first process has it."""
  if quiet or not processes.first():
    yield lambda count=1: None
    return
  from rich import progress as bars

  columns = (
    bars.TextColumn('[bold]{task.description:<14}'),
    bars.BarColumn(),
    bars.MofNCompleteColumn(),
    bars.TimeElapsedColumn(),
    bars.TimeRemainingColumn(),
  )
  with bars.Progress(*columns) as bar:
    task = bar.add_task(title, total=total)
    yield lambda count=1: bar.advance(task, count)


class Scribe:
  """Writes the metrics of each step: `metrics.jsonl`, and TensorBoard events.

  The steps of `log` are in them from the start; what an earlier start wrote
  after those is dropped, as it is taken again. With `wandb` in the environment
  variable `PERSONA_JAX_METRICS`, Weights & Biases is told too. Of several
  processes the first writes.
  """

  def __init__(self, folder: Path, log: Sequence[dict] = ()):
    self._path, self._folder = folder / 'metrics.jsonl', folder
    self._writes = processes.first()
    if not self._writes:
      return
    there = 0
    if self._path.exists():  # a line that was cut short has no end
      there = self._path.read_bytes().count(b'\n')
    self._told, self._missing = log[:there], log[there:]
    text = ''.join(_line(record) for record in self._told)
    replace(self._path, lambda fresh: fresh.write_text(text, encoding='utf-8'))

  def __enter__(self):
    if not self._writes:
      return self
    from tensorboardX import SummaryWriter

    self._board = SummaryWriter(
      str(self._folder / 'events'), purge_step=len(self._told) + 1
    )
    self._wandb = _wandb(self._folder)
    for record in self._missing:
      self.write(record)
    return self

  def __exit__(self, *_):
    if not self._writes:
      return
    self._board.close()
    if self._wandb is not None:
      self._wandb.finish()

  def write(self, record: dict, texts: list[list[str]] = ()):
    """One step: its numbers, and some of its dialogues in words."""
    if not self._writes:
      return
    record = plain(record)
    step = record['step']
    with self._path.open('a', encoding='utf-8') as file:
      file.write(_line(record))
    numbers = {k: x for k, x in record.items() if x is not None and k != 'step'}
    for name, value in numbers.items():
      self._board.add_scalar(name, value, step)
    for i, lines in enumerate(texts[:_TOLD]):
      said = '\n\n'.join(f'**{n}** {line}' for n, line in enumerate(lines))
      self._board.add_text(f'dialogue/{i}', said, step)
    self._board.flush()
    if self._wandb is not None:
      self._wandb.log(numbers, step=step)


def _line(record):
  return json.dumps(plain(record), allow_nan=False) + '\n'


def _wandb(folder):
  """A run of Weights & Biases, where it is asked for.

  Raises:
    ImportError: it is asked for and not installed.
  """
  if os.environ.get(_METRICS) != 'wandb':
    return None
  try:
    import wandb
  except ImportError:
    raise ImportError(
      f'{_METRICS}=wandb needs wandb; run pip install wandb, or unset it.'
    ) from None
  return wandb.init(project='persona_jax', dir=str(folder), name=folder.name)


_METRICS = 'PERSONA_JAX_METRICS'
_TOLD = 2  # dialogues of a step


def write_json(path: Path, record: Any):
  """Writes `record` whole or not at all; non-finite numbers become null."""
  text = json.dumps(plain(record), indent=1, allow_nan=False)
  replace(path, lambda fresh: fresh.write_text(text, encoding='utf-8'))


def read_json(path: Path) -> Any:
  """What `write_json` wrote."""
  return json.loads(path.read_text(encoding='utf-8'))


def write_arrays(path: Path, arrays: dict[str, np.ndarray]):
  """Writes arrays to one .npz, whole or not at all."""

  def save(fresh):
    with fresh.open('wb') as file:
      np.savez(file, **arrays)

  replace(path, save)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
  """What `write_arrays` wrote."""
  with np.load(path, allow_pickle=False) as file:
    return dict(file)


def replace(path: Path, write):
  """Calls `write(temporary path)`, then renames it to `path`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  fresh = path.with_name(path.name + '.partial')
  write(fresh)
  os.replace(fresh, path)


def plain(x: Any) -> Any:
  """Records, arrays and numpy numbers as what JSON knows."""
  if hasattr(x, '_asdict'):
    return plain(x._asdict())
  if isinstance(x, dict):
    return {str(k): plain(v) for k, v in x.items()}
  if isinstance(x, (list, tuple)):
    return [plain(v) for v in x]
  if isinstance(x, np.ndarray):
    return plain(x.tolist())
  if isinstance(x, (bool, np.bool_)):
    return bool(x)
  if isinstance(x, (float, np.floating)):
    return float(x) if np.isfinite(x) else None
  if isinstance(x, np.integer):
    return int(x)
  return x
