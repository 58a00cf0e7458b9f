"""Rows of a user's JSON lines, and what is said of those that break a rule."""

import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple


def objects(path: str | Path, form: str) -> Iterator[tuple[str, Any]]:
  """The JSON value of each line of a file, after where it stands, for errors.

  `form` says what a row has.

  Raises:
    ValueError: there is no such file or no row, or a line is no JSON in UTF-8.
  """
  path, where = Path(path), ''
  if not path.is_file():
    raise ValueError(f'{path} does not exist; give a file of JSON lines.')
  with path.open('rb') as file:
    for number, line in enumerate(file, 1):
      where = f'{path}, line {number}'
      if number == 1:
        line = line.removeprefix(b'\xef\xbb\xbf')  # some editors' first bytes
      yield where, _value(line, where)
  if not where:
    raise ValueError(f'{path} is empty; give a row a line: {form}.')


def check(
  row: Any, known: Collection[str], *, where: str, form: str
) -> Mapping[str, Any]:
  """The row, if it is an object whose fields are all known.

  Raises:
    ValueError: it is not.
  """
  if not isinstance(row, Mapping):
    raise ValueError(
      f'{where}: {shown(row)} is no JSON object; a row has {form}.'
    )
  for name in row:
    if name not in known:
      near = difflib.get_close_matches(name, sorted(known), 1)
      hint = f' (is it {near[0]!r}?)' if near else ''
      raise ValueError(
        f'{where}: the field {name!r}{hint} is unknown; a row has {form}. '
        'Rename it or take it out.'
      )
  return row


class Text(NamedTuple):
  """Checks a text of a row: `text(value, name)`."""

  where: str
  strip: bool = False

  def __call__(self, value: Any, name: str, *, empty: bool = False) -> str:
    """The text; `empty` lets it be.

    Raises:
      ValueError: it is no text, or one that cannot be taken as it is.
    """
    if not isinstance(value, str):
      raise ValueError(
        f'{self.where}: {name} is {shown(value)}, which is no text; give a '
        'string.'
      )
    if not value.strip() and not empty:
      raise ValueError(
        f'{self.where}: {name} is empty ({shown(value)}); give a text or '
        'take it out.'
      )
    if self.strip:
      value = value.strip()
    if value != value.strip():
      raise ValueError(
        f'{self.where}: {name} begins or ends with a blank '
        f'({shown(value)}), which chat templates keep or cut as they like; '
        'take it off, or read with strip=True.'
      )
    try:
      value.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f'{self.where}: {name} holds {value[error.start]!a}, half of a '
        'character; write the character itself.'
      ) from error
    return value


def shown(value: Any) -> str:
  """A value as JSON, its beginning."""
  said = json.dumps(value, ensure_ascii=False, default=repr)
  return said if len(said) <= _LONGEST else f'{said[:_LONGEST]}...'


_LONGEST = 60


def _value(line: bytes, where: str) -> Any:
  """The JSON value of a line; a name that comes twice is an error."""
  try:
    text = line.decode().strip()
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{where}: byte {error.start} ({line[error.start : error.end]!r}) is no '
      'UTF-8; save the file in that encoding.'
    ) from error
  if not text:
    raise ValueError(f'{where} is empty; take it out.')
  twice = []

  def once(pairs):
    names = [name for name, _ in pairs]
    twice.extend(name for name in names if names.count(name) > 1)
    return dict(pairs)

  try:
    value = json.loads(text, object_pairs_hook=once)
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{where}: {shown(text)} is no JSON ({error}); a line is one object, '
      'from { to }.'
    ) from error
  if twice:
    raise ValueError(
      f'{where}: the field {twice[0]!r} comes twice; keep one of them.'
    )
  return value
