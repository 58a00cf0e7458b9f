"""A folder that holds one run, and belongs to one config."""

from importlib import metadata
from pathlib import Path

from ml_collections import ConfigDict

from persona_jax import main, metrics, processes

HOW = frozenset(  # fields that change roundings at most
  ('mesh', 'attend', 'rl.remat', 'rl.share', 'rl.held', 'rl.microbatches')
)
_VERSION = 'persona_jax'  # in the config's file, the version that wrote it


def claim(workdir: Path, config):
  """Writes the config into an empty workdir, or compares it with the one there.

  Fields that the version which wrote it did not have may be as they ship, and
  those of `HOW` may differ: a run goes on on another mesh.

  Raises:
    ValueError: the workdir belongs to another config; names the fields.
  """
  here = metadata.version('persona_jax')
  mine = metrics.plain(config.to_dict())
  kept = {_VERSION: here, **mine}
  theirs = processes.told(lambda: _kept(_file(workdir), kept))
  wrote = theirs.pop(_VERSION, 'of an unknown version')
  theirs, mine, shipped = _flat(theirs), _flat(mine), _flat(_shipped())
  as_shipped = {k for k, x in mine.items() if (k, x) in shipped.items()}
  differ = [
    f'{name} ({theirs.get(name, _NONE)} there, {mine.get(name, _NONE)} here)'
    for name in sorted((set(theirs) | (set(mine) - as_shipped)) - HOW)
    if theirs.get(name, _NONE) != mine.get(name, _NONE)
  ]
  if differ:
    raise ValueError(
      f'{workdir} belongs to another config, of persona_jax {wrote} (this is '
      f'{here}): {"; ".join(differ)}. Name another --workdir, or give the same '
      'config to the same version.'
    )


def read(workdir: Path) -> ConfigDict:
  """The config that a workdir belongs to; what it lacks is as it ships.

  Raises:
    ValueError: it is no workdir.
  """
  if not _file(workdir).exists():
    raise ValueError(
      f'{workdir} is no workdir: it has no {_file(workdir).name}; give the '
      '--workdir of a study or a training.'
    )
  theirs = metrics.read_json(_file(workdir))
  theirs.pop(_VERSION, None)
  config = main.load_config('study')
  with config.unlocked():
    config.update(theirs)
  return config


_NONE = 'absent'


def _kept(path, mine):
  """The config that is kept at `path`, by now at least."""
  if not path.exists():
    metrics.write_json(path, mine)
  return metrics.read_json(path)


def _file(workdir):
  return workdir / 'config.json'


def _shipped():
  return metrics.plain(main.load_config('study').to_dict())


def _flat(record, prefix=''):
  if not isinstance(record, dict):
    return {prefix: record}
  return {
    name: value
    for key, part in record.items()
    for name, value in _flat(part, f'{prefix}.{key}' if prefix else key).items()
  }
