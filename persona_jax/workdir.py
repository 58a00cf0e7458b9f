"""A folder that holds one run, and belongs to one config."""

from pathlib import Path

from persona_jax import metrics, processes


def claim(workdir: Path, config):
  """Writes the config into an empty workdir, or compares it with the one there.

  Raises:
    ValueError: the workdir belongs to another config; names the fields.
  """
  mine = metrics.plain(config.to_dict())
  theirs = processes.told(lambda: _kept(workdir / 'config.json', mine))
  theirs, mine = _flat(theirs), _flat(mine)
  differ = [
    f'{name} ({theirs.get(name)} there, {mine.get(name)} here)'
    for name in sorted(set(theirs) | set(mine))
    if theirs.get(name) != mine.get(name)
  ]
  if differ:
    raise ValueError(
      f'{workdir} belongs to another config: {"; ".join(differ)}. Name '
      'another --workdir, or give the same config.'
    )


def _kept(path, mine):
  """The config that is kept at `path`, by now at least."""
  if not path.exists():
    metrics.write_json(path, mine)
  return metrics.read_json(path)


def _flat(record, prefix=''):
  if not isinstance(record, dict):
    return {prefix: record}
  return {
    name: value
    for key, part in record.items()
    for name, value in _flat(part, f'{prefix}.{key}' if prefix else key).items()
  }
