"""Replies to learn from, and the JSON lines that hold a user's own.

A line of a file is one row. A row that breaks a rule is an error that names
file, line, value, rule and way out; none is left out or mended in silence.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from persona_jax.text import wording

History = tuple[str, ...]  # the user's line, the answer, ..., the user's line


class Compared(NamedTuple):
  """Two replies to one conversation, for DPO and its kin."""

  system: str  # '': the template's own
  history: History
  chosen: str
  rejected: str
  where: str = ''  # it stands, for errors

  @property
  def replies(self) -> tuple[str, str]:
    """The chosen one first."""
    return self.chosen, self.rejected


class Rated(NamedTuple):
  """A reply that is desirable or not, for KTO."""

  system: str
  history: History
  reply: str
  label: bool
  where: str = ''

  @property
  def replies(self) -> tuple[str]:
    """The one."""
    return (self.reply,)


class Shown(NamedTuple):
  """A reply to imitate, for supervised fine-tuning."""

  system: str
  history: History
  reply: str
  where: str = ''

  @property
  def replies(self) -> tuple[str]:
    """The one."""
    return (self.reply,)


Example = Compared | Rated | Shown
Kind = TypeVar('Kind', Compared, Rated, Shown)

TEXTS = {  # fields of a row that are texts, by kind
  Compared: ('chosen', 'rejected'),
  Rated: ('reply',),
  Shown: ('reply',),
}
BEFORE = ('persona', 'system', 'history')
FORMS = {
  Compared: 'persona or system, chosen, rejected, and history if there is one',
  Rated: 'persona or system, reply, label, and history if there is one',
  Shown: (
    'persona or system, reply, and history if there is one; or messages alone'
  ),
}


def read(
  path: str | Path, kind: type[Kind], *, strip: bool = False
) -> tuple[Kind, ...]:
  """The rows of a file of JSON lines, in order.

  A row is an object of texts: `persona` or `system` (the system prompt; an
  empty `system` is the template's own), then by kind `chosen` and `rejected`,
  `reply` and `label` (true or false), or `reply`. `history` is a list of
  `{"role", "content"}` that begins and ends with the user's; without one the
  reply answers `wording.ANY_LINE`. A `Shown` may be `messages` instead, which
  end with the reply.

  Args:
    path: of the file, in UTF-8.
    kind: `Compared`, `Rated` or `Shown`.
    strip: takes blanks off the ends of every text; otherwise they are an error,
      as some templates keep them and others do not.

  Raises:
    ValueError: the first row that breaks a rule.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(f'{path} does not exist; give a file of JSON lines.')
  found = []
  with path.open('rb') as file:
    for number, line in enumerate(file, 1):
      where = f'{path}, line {number}'
      if number == 1:
        line = line.removeprefix(b'\xef\xbb\xbf')  # some editors' first bytes
      found.append(parse(_object(line, where), kind, where=where, strip=strip))
  if not found:
    raise ValueError(f'{path} is empty; give a row a line: {FORMS[kind]}.')
  return tuple(found)


def parse(
  row: Any, kind: type[Kind], *, where: str, strip: bool = False
) -> Kind:
  """One row as `read` takes it; `where` names it in errors."""
  if not isinstance(row, Mapping):
    raise ValueError(
      f'{where}: {_shown(row)} is no JSON object; a row has {FORMS[kind]}.'
    )
  own = TEXTS[kind] + (('label',) if kind is Rated else ())
  talk = kind is Shown and 'messages' in row
  _named(row, (*BEFORE, *own), kind, where)
  text = _Text(where, strip)
  if talk:
    beside = [name for name in row if name != 'messages']
    if beside:
      raise ValueError(
        f'{where}: the field {beside[0]!r} stands beside messages, which hold '
        'all of the conversation; take one of them out.'
      )
    system, lines = _messages(row['messages'], text)
    return kind(system, lines[:-1], lines[-1], where=where)
  for name in own:
    if name not in row:
      raise ValueError(
        f'{where}: the field {name!r} is missing; a row has {FORMS[kind]}.'
      )
  before = _system(row, kind, text), _history(row, text)
  replies = [text(row[name], name) for name in TEXTS[kind]]
  if kind is Rated:
    return kind(*before, *replies, _label(row['label'], where), where=where)
  if kind is Compared and replies[0] == replies[1]:
    raise ValueError(
      f'{where}: chosen and rejected are both {_shown(replies[0])}, and there '
      'is nothing to prefer; change one or take the row out.'
    )
  return kind(*before, *replies, where=where)


def rated(rows: Iterable[Compared]) -> tuple[Rated, ...]:
  """Each pair as two single replies, the chosen one desirable."""
  return tuple(
    Rated(row.system, row.history, reply, reply == row.chosen, row.where)
    for row in rows
    for reply in row.replies
  )


def shown(rows: Iterable[Compared]) -> tuple[Shown, ...]:
  """The chosen reply of each pair."""
  return tuple(
    Shown(row.system, row.history, row.chosen, row.where) for row in rows
  )


def unrolled(rows: Iterable[Shown]) -> tuple[Shown, ...]:
  """Every answer of each conversation as an example, not the last alone."""
  found = []
  for row in rows:
    lines = *row.history, row.reply
    for n in range(1, len(lines), 2):
      found.append(Shown(row.system, lines[:n], lines[n], row.where))
  return tuple(found)


def _object(line: bytes, where: str) -> Any:
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
      f'{where}: {_shown(text)} is no JSON ({error}); a line is one object, '
      'from { to }.'
    ) from error
  if twice:
    raise ValueError(
      f'{where}: the field {twice[0]!r} comes twice; keep one of them.'
    )
  return value


def _named(row, known, kind, where):
  """Raises where a row has a field that its kind has not."""
  known = {*known, 'messages'} if kind is Shown else set(known)
  for name in row:
    if name not in known:
      near = difflib.get_close_matches(name, sorted(known), 1)
      hint = f' (is it {near[0]!r}?)' if near else ''
      raise ValueError(
        f'{where}: the field {name!r}{hint} is unknown; a row has '
        f'{FORMS[kind]}. Rename it or take it out.'
      )


class _Text(NamedTuple):
  """Checks a text of a row: `text(value, name)`."""

  where: str
  strip: bool

  def __call__(self, value, name) -> str:
    if not isinstance(value, str):
      raise ValueError(
        f'{self.where}: {name} is {_shown(value)}, which is no text; give a '
        'string.'
      )
    if not value.strip():
      raise ValueError(
        f'{self.where}: {name} is empty ({_shown(value)}); give a text or '
        'take the row out.'
      )
    if self.strip:
      value = value.strip()
    if value != value.strip():
      raise ValueError(
        f'{self.where}: {name} begins or ends with a blank '
        f'({_shown(value)}), which chat templates keep or cut as they like; '
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


def _system(row, kind, text) -> str:
  given = [name for name in ('persona', 'system') if name in row]
  if not given:
    raise ValueError(
      f'{text.where}: the field persona or system is missing; a row has '
      f'{FORMS[kind]}. An empty system is the prompt of the template itself.'
    )
  if len(given) == 2:
    raise ValueError(
      f'{text.where}: persona is {_shown(row["persona"])} and system is '
      f'{_shown(row["system"])}, but both name the system prompt; give one.'
    )
  if row.get('system') == '':
    return ''
  return text(row[given[0]], given[0])


def _history(row, text) -> History:
  if 'history' not in row:
    return (wording.ANY_LINE,)
  return _turns(row['history'], 'history', 'user', text)


def _messages(value, text) -> tuple[str, History]:
  """The system prompt, and the lines up to the reply."""
  if isinstance(value, list) and value and _is_system(value[0]):
    first, *rest = value
    system = text(_content(first, 'messages[0]', text), 'messages[0].content')
    return system, _turns(rest, 'messages', 'assistant', text, 1)
  return '', _turns(value, 'messages', 'assistant', text)


def _turns(value, name, last, text, first=0) -> History:
  """The contents of messages in turns, the user's first."""
  rule = f'lines in turns, from the user to the {last}'
  if not isinstance(value, list):
    raise ValueError(
      f'{text.where}: {name} is {_shown(value)}, which is no list; give {rule}.'
    )
  lines, roles = [], ('user', 'assistant')
  for i, message in enumerate(value):
    here = f'{name}[{i + first}]'
    content = _content(message, here, text)
    if message['role'] != roles[i % 2]:
      raise ValueError(
        f'{text.where}: {here} has the role {_shown(message["role"])} where '
        f'{roles[i % 2]!r} is due; {name} holds {rule}'
        + (
          '. Give the system prompt in the field system.'
          if name == 'history' and message['role'] == 'system'
          else '.'
        )
      )
    lines.append(text(content, f'{here}.content'))
  least = 1 if last == 'user' else 2
  if len(lines) < least or len(lines) % 2 != least % 2:
    ends = f'ends with the {roles[1 - len(lines) % 2]}' if lines else 'is empty'
    raise ValueError(
      f'{text.where}: {name} {ends} ({_shown(value[-1:])}); it holds {rule}.'
    )
  return tuple(lines)


def _content(message, here, text):
  """The content of a message, which has a role and nothing else."""
  if not isinstance(message, Mapping) or set(message) != {'role', 'content'}:
    raise ValueError(
      f'{text.where}: {here} is {_shown(message)}; a message has role and '
      'content, and nothing else.'
    )
  return message['content']


def _is_system(message) -> bool:
  return isinstance(message, Mapping) and message.get('role') == 'system'


def _label(value, where) -> bool:
  if not isinstance(value, bool):
    raise ValueError(
      f'{where}: label is {_shown(value)}; it is true for a desirable reply, '
      'false for another.'
    )
  return value


def _shown(value) -> str:
  """A value as JSON, its beginning."""
  said = json.dumps(value, ensure_ascii=False, default=repr)
  return said if len(said) <= _LONGEST else f'{said[:_LONGEST]}...'


_LONGEST = 60
