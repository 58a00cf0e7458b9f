"""Words of the command line: flags, and fields of a config."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def read_words(
  words: Iterable[str], defaults: Mapping[str, Any], free: str | None = None
) -> tuple[list[str], dict[str, Any], list[tuple[str, str]]]:
  """`(plain words, options, fields)` of `name --flag=value --quiet ...`.

  Args:
    words: what follows the program's name.
    defaults: of every flag; it is read as the type of its default, and one
      that is False takes no value.
    free: flags that start with this are fields of some record: pairs.

  Raises:
    ValueError: names what is unknown and the nearest that exists.
  """
  plain, options, fields = [], dict(defaults), []
  words = iter(words)
  for word in words:
    if not word.startswith('--'):
      plain.append(word)
      continue
    name, given, value = word.removeprefix('--').partition('=')
    is_field = free is not None and name.startswith(free)
    if name not in defaults and not is_field:
      raise ValueError(f'unknown flag --{name}{near(name, defaults)}.')
    if not given and defaults.get(name) is False:
      options[name] = True
      continue
    if not given and (value := next(words, None)) is None:
      raise ValueError(f'{word} needs a value: {word}=...')
    if is_field:
      fields.append((name.removeprefix(free), value))
    else:
      options[name] = _read(f'--{name}', value, defaults[name])
  return plain, options, fields


def override(config, field: str, value: str):
  """Sets `a.b.c` of a config to `value`, read as the type that stands there.

  Raises:
    ValueError: no such field, with the nearest one; or an unreadable value.
  """
  from ml_collections import ConfigDict

  fields = _fields(config)
  if field not in fields and field.rpartition('.')[0] in FREE:
    with config.unlocked():
      config.update_from_flattened_dict({field: _number(field, value)})
    return
  if field not in fields:
    raise ValueError(f'unknown field config.{field}{near(field, fields)}.')
  now = fields[field]
  if isinstance(now, ConfigDict):
    raise ValueError(f'config.{field} is a group; set one of its fields.')
  with config.unlocked():
    value = _read(f'config.{field}', value, now)
    config.update_from_flattened_dict({field: value})


FREE = ('rl.advantage', 'rl.loss')  # groups of numbers that an algorithm knows


def _number(field, value):
  for read in (int, float, {'true': True, 'false': False}.__getitem__):
    try:
      return read(value)
    except (ValueError, KeyError):
      continue
  raise ValueError(
    f'config.{field}={value!r} is no number; give one, or true or false.'
  )


def _fields(config, prefix=''):
  from ml_collections import ConfigDict

  found = {}
  for key in config:
    value, name = config[key], f'{prefix}{key}'
    found[name] = value
    if isinstance(value, ConfigDict):
      found |= _fields(value, f'{name}.')
  return found


def _read(label, value, now):
  kind = type(now)
  try:
    if kind is bool:
      return {'true': True, 'false': False}[value.lower()]
    return kind(value)
  except (ValueError, KeyError):
    raise ValueError(
      f'{label}={value!r} is no {kind.__name__}; it is {now!r} now.'
    ) from None


def near(name: str, names: Iterable[str]) -> str:
  """'; the nearest is ...', for errors."""
  nearest = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
  return f'; the nearest is {nearest[0]!r}' if nearest else ''
