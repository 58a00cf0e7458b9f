"""The words that ship with the package: personas, partners, labelled lines.

Every row is checked when it is read; a missing field names file and row.
"""

import json
from importlib import resources
from pathlib import Path
from typing import NamedTuple

SPLITS = ('train', 'heldout')


class Archetype(NamedTuple):
  """A role, with several prompts that call it up."""

  name: str
  group: str
  prompts: tuple[str, ...]


class Persona(NamedTuple):
  """Somebody to be: a prompt, and the facts in it."""

  name: str
  split: str  # one of SPLITS
  prompt: str
  facts: dict[str, str]


class Partner(NamedTuple):
  """A kind of conversation partner, and its first lines."""

  kind: str
  prompt: str
  openings: tuple[str, ...]


class LabelledLine(NamedTuple):
  """A line that fits a persona or does not, for the calibration of judges."""

  persona: str
  question: str
  line: str
  label: str  # 'consistent' or 'contradicts'
  error: str


class LabelledPair(NamedTuple):
  """Two lines of one speaker that agree or do not."""

  first: str
  second: str
  label: str


class Choice(NamedTuple):
  """A multiple-choice question; `options[answer]` is right."""

  question: str
  options: tuple[str, ...]
  answer: int


class Archetypes(NamedTuple):
  """Role prompts, and the prompts of the default Assistant."""

  roles: tuple[Archetype, ...]
  default: tuple[str, ...]


def archetypes() -> Archetypes:
  """Roles from near the Assistant to far from it."""
  data = _read('archetypes.json', 'archetypes', Archetype)
  return Archetypes(data, tuple(_load('archetypes.json')['default']))


def questions() -> tuple[str, ...]:
  """Questions that let a role show itself."""
  return tuple(_load('questions.json')['questions'])


def personas(split: str, path: str | Path | None = None) -> tuple[Persona, ...]:
  """The personas of a split, 'train' or 'heldout'; `path` may be a user's.

  Raises:
    ValueError: the file has no persona of that split, or a bad row.
  """
  path = Path(path) if path else 'personas.json'
  rows = _read(path, 'personas', Persona)
  for index, row in enumerate(rows):
    if row.split not in SPLITS:
      raise ValueError(
        f'{path}, row {index}: split {row.split!r} is none of {SPLITS}.'
      )
  found = tuple(row for row in rows if row.split == split)
  if not found:
    raise ValueError(
      f'{path} has no persona with split {split!r}; each row needs name, '
      f'split (one of {SPLITS}), prompt and facts.'
    )
  return found


def partners() -> tuple[Partner, ...]:
  """The kinds of partner, calm and under pressure."""
  return _read('partners.json', 'partners', Partner)


def labelled_lines() -> tuple[LabelledLine, ...]:
  """Lines with known relation to a persona."""
  return _read('labelled_lines.json', 'lines', LabelledLine)


def labelled_pairs() -> tuple[LabelledPair, ...]:
  """Pairs of lines with known relation."""
  return _read('line_pairs.json', 'pairs', LabelledPair)


def choices() -> tuple[Choice, ...]:
  """Easy questions of common knowledge."""
  return _read('choices.json', 'items', Choice)


def neutral_text() -> str:
  """Plain prose, to measure perplexity on."""
  return _open('neutral_text.txt')


def _read(path, key, kind):
  data = _load(path)
  rows = data.get(key) if isinstance(data, dict) else None
  if not isinstance(rows, list):
    raise ValueError(f'{path} has no list {key!r}.')
  return tuple(_row(path, i, row, kind) for i, row in enumerate(rows))


def _row(path, index, row, kind):
  if not isinstance(row, dict):
    raise ValueError(
      f'{path}, row {index}: {row!r} is no row; it has '
      f'{", ".join(kind._fields)}.'
    )
  missing = [field for field in kind._fields if row.get(field) in (None, '')]
  if missing:
    raise ValueError(
      f'{path}, row {index}: the field {missing[0]!r} is missing or empty; '
      f'a row has {", ".join(kind._fields)}.'
    )
  values = (row[field] for field in kind._fields)
  return kind(*(tuple(v) if isinstance(v, list) else v for v in values))


def _load(path):
  text = _open(path)
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(
      f'{path} is no JSON: {error}; it may be empty or cut short.'
    ) from error


def _open(path):
  if isinstance(path, Path):  # a user's; a string names one of ours
    if not path.is_file():
      raise ValueError(f'{path} does not exist.')
    return path.read_text(encoding='utf-8')
  home = resources.files('persona_jax.text') / 'data' / path
  return home.read_text(encoding='utf-8')
