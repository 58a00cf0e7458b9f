"""Dialogues with labels of the speaker's lines, to measure judges on."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from persona_jax.text import jsonl, judged, wording

SUPPORTS, NEUTRAL, CONTRADICTS = judged.RELATIONS
CONSISTENT = 'consistent'  # supports or neutral: it is not known which
LABELS = (*judged.RELATIONS, CONSISTENT)
ROLES = PARTNER, SPEAKER = 'user', 'assistant'
ALONE = ('history', 'line', 'label', 'kind')  # fields that messages replace
FIELDS = ('persona', 'messages', *ALONE, 'task', 'group')
FORM = (
  'persona (it may be empty), line, label, and history, kind, task and group '
  'if there are any; or messages in place of history, line, label and kind'
)


class Labelled(NamedTuple):
  """A dialogue, the partner first, and labels of some of the speaker's lines.

  Of the speaker's lines there is one label and one kind each.
  """

  persona: str  # '': none is told, and a line is judged by those before it
  task: str
  lines: tuple[str, ...]  # the speaker's are the second, the fourth, ...
  labels: tuple[str, ...]  # of LABELS; '': this line has none
  kinds: tuple[str, ...]  # how it fits or fails: 'implies', 'role_break'
  group: str  # rows of a group are no independent evidence
  where: str  # it stands, for errors

  @property
  def system(self) -> str:
    """What a judge is told of the speaker."""
    return self.persona or wording.NEUTRAL


def written() -> tuple[Labelled, ...]:
  """The test set that was written by hand: `judged.written`."""
  return tuple(
    Labelled(
      persona=row.persona,
      task=row.task,
      lines=row.lines,
      labels=(*[''] * (len(row.lines) // 2 - 1), _label(row)),
      kinds=(*[''] * (len(row.lines) // 2 - 1), row.kind),
      group=str(row.pair),
      where=f'the test set, pair {row.pair}',
    )
    for row in judged.written()
  )


def calibration(count: int, *, seed: int = 0) -> tuple[Labelled, ...]:
  """`count` dialogues of kinds of fact that nothing else is about."""
  rows = (judged.made(i, split='calibration', seed=seed) for i in range(count))
  return tuple(
    Labelled(
      persona=row.persona,
      task=row.task,
      lines=row.lines,
      labels=row.relations,
      kinds=row.kinds,
      group=str(i),
      where=f'the calibration set, dialogue {i}',
    )
    for i, row in enumerate(rows)
  )


def read(path: str | Path, *, strip: bool = False) -> tuple[Labelled, ...]:
  """The rows of a user's own file of JSON lines, in order.

  A row labels one line, or lines of a dialogue:

    {"persona": "You are Ada.", "line": "I am Bob.", "label": "contradicts"}
    {"persona": "You are Ada.", "messages": [
      {"role": "user", "content": "Who is there?"},
      {"role": "assistant", "content": "Ada.", "label": true}]}

  A label is one of `LABELS`, or true for `consistent` and false for
  `contradicts`; an assistant's message has one or none. A label may have a
  `kind` beside it. A line answers the last of its `history`, messages without
  labels, or `wording.ANY_LINE`; an assistant who opens answers `wording.CUE`.
  A row may name its `task` (else chat) and its `group` (else the persona, or
  where there is none the row itself).

  Args:
    path: of the file, in UTF-8.
    strip: takes blanks off the ends of every text; otherwise they are an error,
      as some templates keep them and others do not.

  Raises:
    ValueError: the first row that breaks a rule.
  """
  return tuple(
    _row(
      jsonl.check(row, FIELDS, where=where, form=FORM),
      jsonl.Text(where, strip),
    )
    for where, row in jsonl.objects(path, FORM)
  )


class _Said(NamedTuple):
  """A message of a row, and what it is called there."""

  name: str
  role: str
  content: str
  label: str
  kind: str


def _row(row, text) -> Labelled:
  said = _said(row, text)
  for one, other in itertools.pairwise(said):
    if one.role == other.role:
      raise ValueError(
        f"{text.where}: {other.name} is the {other.role}'s, as is {one.name} "
        'before it, but the two take turns; join them or take one out.'
      )
  own = [x for x in said if x.role == SPEAKER]
  if not any(x.label for x in own):
    raise ValueError(
      f"{text.where}: messages hold no label; give one to an assistant's "
      'message or take the row out.'
    )
  lines = tuple(x.content for x in said)
  persona = text(row['persona'], 'persona', empty=True)
  return Labelled(
    persona=persona,
    task=text(row.get('task', 'chat'), 'task'),
    lines=lines if said[0].role == PARTNER else (wording.CUE, *lines),
    labels=tuple(x.label for x in own),
    kinds=tuple(x.kind for x in own),
    group=text(row.get('group', persona or text.where), 'group'),
    where=text.where,
  )


def _said(row, text) -> list[_Said]:
  """The messages of a row, the labelled line the last if there is one."""
  talk = 'messages' in row
  for name in ('persona',) if talk else ('persona', 'line', 'label'):
    if name not in row:
      raise ValueError(
        f'{text.where}: the field {name!r} is missing; a row has {FORM}.'
      )
  beside = [name for name in ALONE if name in row]
  if talk and beside:
    raise ValueError(
      f'{text.where}: the field {beside[0]!r} stands beside messages, which '
      'hold all of the conversation; take one of them out.'
    )
  if talk:
    return _messages(row['messages'], 'messages', text)
  any_line = [{'role': PARTNER, 'content': wording.ANY_LINE}]
  before = _messages(row.get('history', any_line), 'history', text)
  line = text(row['line'], 'line', empty=True)
  return [*before, _Said('line', SPEAKER, line, *_told(row, '', text))]


def _messages(value, name, text) -> list[_Said]:
  if not isinstance(value, list) or not value:
    raise ValueError(
      f'{text.where}: {name} is {jsonl.shown(value)}; give a list of one '
      'message or more, each with role and content.'
    )
  return [_message(x, f'{name}[{i}]', text) for i, x in enumerate(value)]


def _message(value, here, text) -> _Said:
  if not isinstance(value, Mapping) or not {'role', 'content'} <= set(value):
    raise ValueError(
      f'{text.where}: {here} is {jsonl.shown(value)}; a message has role and '
      'content.'
    )
  role = value['role']
  if role not in ROLES:
    raise ValueError(
      f'{text.where}: {here} has the role {jsonl.shown(role)}; give user or '
      'assistant, and what a system is told as the persona.'
    )
  labels = role == SPEAKER and here.startswith('messages')
  for name in value:
    if name not in ('role', 'content', *(('label', 'kind') if labels else ())):
      raise ValueError(
        f'{text.where}: {here} has the field {name!r}; it has role and content'
        + (', and may have label and kind' if labels else ', and nothing else')
        + '. Take the field out.'
      )
  content = text(value['content'], f'{here}.content', empty='label' in value)
  return _Said(here, role, content, *_told(value, f'{here}.', text))


def _told(value, before, text) -> tuple[str, str]:
  """Label and kind of a line, each '' where none is given."""
  if 'label' not in value:
    if 'kind' in value:
      raise ValueError(
        f'{text.where}: {before}kind is {jsonl.shown(value["kind"])}, but '
        'there is no label for it to be of; give one or take it out.'
      )
    return '', ''
  label = value['label']
  if isinstance(label, bool):
    label = CONSISTENT if label else CONTRADICTS
  if label not in LABELS:
    raise ValueError(
      f'{text.where}: {before}label is {jsonl.shown(label)}; give one of '
      f'{", ".join(LABELS)}, or true (consistent) or false (contradicts).'
    )
  return label, text(value['kind'], f'{before}kind') if 'kind' in value else ''


def _label(row: judged.Written) -> str:
  if not row.fits:
    return CONTRADICTS
  return {'neutral': NEUTRAL, 'states': SUPPORTS, 'implies': SUPPORTS}.get(
    row.kind, CONSISTENT
  )
