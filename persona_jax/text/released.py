"""The dialogues that consistent-LLMs released, and their judge's verdicts.

They are read from a user's own clone of github.com/abdulhaim/consistent-LLMs
(Abdulhai et al., 2025, https://arxiv.org/abs/2511.00222): it has no licence, so
nothing of it is here. Its judge, a model of 70B, is not always right either.
"""

import collections
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from persona_jax.text import jsonl, wording
from persona_jax.text.labelled import CONSISTENT, CONTRADICTS, Labelled

TASKS = {'Chatting': 'chat', 'Education': 'education', 'Therapy': 'therapy'}


class Counts(NamedTuple):
  """What was found; the last five are of verdicts by the persona."""

  files: int  # with dialogues of the task
  others: int  # JSON files of the folder that hold no dialogues
  dialogues: int
  unfinished: int  # dialogues with lines that were not judged, or none at all
  labelled: int  # lines
  missing: int  # replies of the judge without a verdict, or without a list
  strays: int  # entries of its lists that are no earlier line of the speaker
  inverted: int  # judged dialogues whose score says that YES is consistent
  untold: (
    int  # judged dialogues with no score, or one that fits both or neither
  )
  outvoted: int  # judged dialogues whose score says other than their file's
  inverted_files: int
  untold_files: int  # in which YES was taken to be a contradiction


class Released(NamedTuple):
  """A row for each speaker of a dialogue who has a label, and the counts."""

  rows: tuple[Labelled, ...]
  counts: Counts


def read(
  path: str | Path, task: str | None = None, *, between: bool = False
) -> Released:
  """The dialogues of a file or a folder, with labels from its judge's replies.

  A reply with the word YES or NO is a verdict; with both or neither it is
  none. What YES says differs: that the line contradicts where the stored score
  is the share of the other replies, that it is consistent where the score is
  the share of YES. Most dialogues of a file decide for all of them; where they
  are even, YES is a contradiction.

  Args:
    path: of one of their files, or a folder with some, at any depth.
    task: 'chat', 'education' or 'therapy'; else all three.
    between: labels lines by whether they conflict with an earlier line of the
      speaker, in rows without a persona; else by the persona.

  Raises:
    ValueError: there are no dialogues, or they are not as the released ones.
  """
  path = Path(path)
  if task is not None and task not in TASKS.values():
    raise ValueError(
      f'the task {task!r} is unknown; give one of {", ".join(TASKS.values())}, '
      'or None for all.'
    )
  if not path.exists():
    raise ValueError(f'{path} does not exist; give a file or a folder.')
  rows, counts = [], collections.Counter()
  for file in sorted(path.rglob('*.json')) if path.is_dir() else [path]:
    records = _records(file)
    counts['others'] += not records
    wanted = [x for x in records if task in (None, _task(*x))]
    counts['files'] += bool(wanted)
    dialogues = [_dialogue(*x, between) for x in wanted]
    means = None if between else _meaning(dialogues, counts)
    for dialogue in dialogues:
      rows += _rows(dialogue, means, counts)
  if not counts['files']:
    raise ValueError(
      f'{path} holds no dialogues'
      + (f' of the task {task}' if task else '')
      + '; give a clone of consistent-LLMs, or one of its files of dialogues.'
    )
  return Released(tuple(rows), Counts(*(counts[x] for x in Counts._fields)))


class _Dialogue(NamedTuple):
  where: str
  task: str
  personas: tuple[str, str]
  lines: tuple[str, ...]
  replies: dict[int, str]  # of the judge, by line
  first: int  # line that it judges: 2 where it compares lines
  score: float | int | None  # of agent 2, by the persona


def _records(file) -> list[tuple[Any, str]]:
  """The records of a file and where each stands; none if it has no dialogue."""
  try:
    found = json.loads(file.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{file} is no JSON ({error}); fetch it again or take it out.'
    ) from error
  if not isinstance(found, list):
    return []
  if not any(isinstance(x, dict) and 'conversation' in x for x in found):
    return []
  return [(x, f'{file}, record {i}') for i, x in enumerate(found)]


def _task(record, where) -> str:
  if not isinstance(record, dict):
    raise ValueError(
      f'{where} is {jsonl.shown(record)}, which is no object; take it out.'
    )
  name = record.get('task_name')
  if name not in tuple(TASKS):
    raise _unknown(where, 'task_name', name, f'one of {", ".join(TASKS)}')
  return TASKS[name]


def _dialogue(record, where, between) -> _Dialogue:
  text, task = jsonl.Text(where, strip=True), _task(record, where)
  personas = tuple(text(record.get(x), x, empty=True) for x in ('P1', 'P2'))
  lines = _lines(record, text)
  if lines and record.get('pturn', 1) != 1:
    raise _unknown(where, 'pturn', record['pturn'], '1, as agent 1 opens')
  score = record.get('P2_prompt_consistency_score')
  if not isinstance(score, float | int | None):
    raise _unknown(where, 'P2_prompt_consistency_score', score, 'a number')
  field = f'eval_{"index" if between else "prompt"}_consistency'
  first, replies = 2 if between else 0, {}
  for k, reply in enumerate(_list(record.get(field, []), field, where)):
    match reply:
      case [int(i), str(said)] if first <= i < len(lines) and i not in replies:
        replies[i] = said
      case _:
        due = f'[line, text], of a line from {first} to {len(lines) - 1}, once'
        raise _unknown(where, f'{field}[{k}]', reply, due)
    if not between and not personas[i % 2]:
      due = f'about a speaker with a persona, and P{i % 2 + 1} is empty'
      raise _unknown(where, f'{field}[{k}]', reply, due)
  return _Dialogue(where, task, personas, lines, replies, first, score)


def _lines(record, text) -> tuple[str, ...]:
  """What was said, without the speaker's name before it."""
  said, lines, names = record.get('conversation'), [], {}
  for i, line in enumerate(_list(said, 'conversation', text.where)):
    here, name = f'conversation[{i}]', None
    match line:
      case [int(k), str(words)] if k == i:
        name = names.setdefault(i % 2, words.partition(':')[0])
    if name is None or not words.startswith(f'{name}:'):
      due = f'[{i}, "{names.get(i % 2, "Name")}: text"]'
      raise _unknown(text.where, here, line, due)
    words = re.sub(rf'^({re.escape(name)}:\s*)+', '', words)
    lines.append(text(words, here, empty=True))
  return tuple(lines)


def _list(value, field, where) -> list:
  if not isinstance(value, list):
    raise _unknown(where, field, value, 'a list')
  return value


def _unknown(where, field, value, due) -> ValueError:
  return ValueError(
    f'{where}: {field} is {jsonl.shown(value)}, where it is {due} in the files '
    'of consistent-LLMs; take the record out or give it that form.'
  )


def _meaning(dialogues, counts) -> dict[str, str]:
  """The labels that YES and NO are in a file."""
  votes = [_vote(x) for x in dialogues if x.replies]
  inverted = sum(votes) > 0
  counts['inverted'] += votes.count(1)
  counts['untold'] += votes.count(0)
  counts['outvoted'] += votes.count(-1 if inverted else 1)
  counts['inverted_files'] += inverted
  counts['untold_files'] += bool(votes) and not sum(votes)
  yes, no = CONTRADICTS, CONSISTENT
  return {'YES': no, 'NO': yes} if inverted else {'YES': yes, 'NO': no}


def _vote(dialogue) -> int:
  """1: the score says that YES is consistent; -1: that it contradicts; 0."""
  said = ['YES' in x for i, x in dialogue.replies.items() if i % 2]
  if dialogue.score is None or not said:
    return 0
  share = sum(said) / len(said)  # as the score was counted, garbage and all
  near = lambda x: math.isclose(dialogue.score, x, abs_tol=1e-6)
  return near(share) - near(1 - share)


def _rows(dialogue, means, counts) -> list[Labelled]:
  """A row for each who has a label; `means` says what YES and NO are."""
  labels = {}
  for i, reply in dialogue.replies.items():
    if means:
      labels[i] = means.get(_verdict(reply), '')
    else:
      labels[i], strays = _conflict(i, reply)
      counts['strays'] += strays
  judged = {i % 2 for i in labels}
  due = range(dialogue.first, len(dialogue.lines))
  missed = [i for i in due if i % 2 in judged and i not in labels]
  counts['dialogues'] += 1
  counts['unfinished'] += bool(missed) or not labels
  counts['labelled'] += sum(x != '' for x in labels.values())
  counts['missing'] += sum(x == '' for x in labels.values())
  who = {i % 2 for i, label in labels.items() if label}
  return [_row(dialogue, x, labels, bool(means)) for x in sorted(who)]


def _row(dialogue, who, labels, with_persona) -> Labelled:
  """The dialogue of one of the two, with its persona or not."""
  own = range(who, len(dialogue.lines), 2)
  persona, where = dialogue.personas[who], f'{dialogue.where}, agent {who + 1}'
  return Labelled(
    persona=persona if with_persona else '',
    task=dialogue.task,
    lines=dialogue.lines if who else (wording.CUE, *dialogue.lines),
    labels=tuple(labels.get(i, '') for i in own),
    kinds=('',) * len(own),
    group=persona or where,
    where=where,
  )


def _verdict(reply) -> str:
  """YES or NO, if the reply has one of the words and not both."""
  said = set(re.findall(r'\b(?:YES|NO)\b', reply))
  return said.pop() if len(said) == 1 else ''


def _conflict(line, reply) -> tuple[str, int]:
  """The label of a line, and how many entries are no earlier line of its own.

  The last list of a reply counts, of those that are empty or name a line.
  """
  for found in reversed(re.findall(r'\[([^][]*)\]', reply)):
    entries = {x.strip(' \n\'"') for x in found.split(',')} - {''}
    lines = {int(x) for x in entries if re.fullmatch(r'\d{1,9}', x)}
    if lines or not entries:
      own = {i for i in lines if i < line and i % 2 == line % 2}
      return CONTRADICTS if own else CONSISTENT, len(entries) - len(own)
  return '', 0
