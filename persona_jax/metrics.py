"""Progress on the screen, and numbers on disk."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def progress(title: str, total: int, *, quiet: bool = False):
  """A bar; yields `advance(count=1)`."""
  if quiet:
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
