"""Replies to learn from, and the JSON lines that hold a user's own.

A line of a file is one row. A row that breaks a rule is an error that names
file, line, value, rule and way out; none is left out or mended in silence.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from persona_jax.text import jsonl, wording

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
  return tuple(
    parse(row, kind, where=where, strip=strip)
    for where, row in jsonl.objects(path, FORMS[kind])
  )


def parse(
  row: Any, kind: type[Kind], *, where: str, strip: bool = False
) -> Kind:
  """One row as `read` takes it; `where` names it in errors."""
  own = TEXTS[kind] + (('label',) if kind is Rated else ())
  known = *BEFORE, *own, *(('messages',) if kind is Shown else ())
  row = jsonl.check(row, known, where=where, form=FORMS[kind])
  talk = kind is Shown and 'messages' in row
  text = jsonl.Text(where, strip)
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
      f'{where}: chosen and rejected are both {jsonl.shown(replies[0])}, and '
      'there is nothing to prefer; change one or take the row out.'
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


def _system(row, kind, text) -> str:
  given = [name for name in ('persona', 'system') if name in row]
  if not given:
    raise ValueError(
      f'{text.where}: the field persona or system is missing; a row has '
      f'{FORMS[kind]}. An empty system is the prompt of the template itself.'
    )
  if len(given) == 2:
    raise ValueError(
      f'{text.where}: persona is {jsonl.shown(row["persona"])} and system '
      f'is {jsonl.shown(row["system"])}, but both name the system prompt; give '
      'one.'
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
      f'{text.where}: {name} is {jsonl.shown(value)}, which is no list; '
      f'give {rule}.'
    )
  lines, roles = [], ('user', 'assistant')
  for i, message in enumerate(value):
    here = f'{name}[{i + first}]'
    content = _content(message, here, text)
    if message['role'] != roles[i % 2]:
      raise ValueError(
        f'{text.where}: {here} has the role {jsonl.shown(message["role"])} '
        f'where {roles[i % 2]!r} is due; {name} holds {rule}'
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
      f'{text.where}: {name} {ends} ({jsonl.shown(value[-1:])}); it holds '
      f'{rule}.'
    )
  return tuple(lines)


def _content(message, here, text):
  """The content of a message, which has a role and nothing else."""
  if not isinstance(message, Mapping) or set(message) != {'role', 'content'}:
    raise ValueError(
      f'{text.where}: {here} is {jsonl.shown(message)}; a message has role and '
      'content, and nothing else.'
    )
  return message['content']


def _is_system(message) -> bool:
  return isinstance(message, Mapping) and message.get('role') == 'system'


def _label(value, where) -> bool:
  if not isinstance(value, bool):
    raise ValueError(
      f'{where}: label is {jsonl.shown(value)}; it is true for a desirable '
      'reply, false for another.'
    )
  return value
