"""Labelled dialogues: our own sets, users' files, what is said of bad rows."""

import json
import re
from pathlib import Path

import pytest

import persona_jax
from persona_jax.text import judged, labelled, wording
from persona_jax.text.labelled import Labelled

ADA = 'You are Ada, a baker.'
ROW = {'persona': ADA, 'line': 'I am a bot.', 'label': 'contradicts'}


def user(text):
  return {'role': 'user', 'content': text}


def own(text, **told):
  return {'role': 'assistant', 'content': text, **told}


README = Path(persona_jax.__file__).parents[1] / 'README.md'
TALK = [user('Hi!'), own('Hello.'), user('Who?'), own('Ada.', label=True)]


@pytest.fixture
def write(tmp_path):
  def write(*rows, end='\n'):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = tmp_path / 'mine.jsonl'
    path.write_bytes('\n'.join(lines).encode() + end.encode())
    return path

  return write


def without(name):
  return {key: value for key, value in ROW.items() if key != name}


def talk(*messages, **more):
  return {'persona': ADA, 'messages': list(messages), **more}


@pytest.mark.parametrize(
  'rows', [labelled.written(), labelled.calibration(20)], ids=['test', 'made']
)
def test_our_own_sets_have_a_label_and_a_kind_for_each_line(rows):
  for row in rows:
    assert len(row.labels) == len(row.kinds) == len(row.lines) // 2
    assert row.labels[-1] in labelled.LABELS
    assert row.system == (row.persona or wording.NEUTRAL)


def test_what_fits_in_the_test_set_contradicts_nothing():
  for row, source in zip(labelled.written(), judged.written(), strict=True):
    assert (row.labels[-1] == labelled.CONTRADICTS) == (not source.fits)


def test_a_line_is_read(write):
  history = [user('Hi!'), own('Hello.'), user('Who are you?')]
  more = {'kind': 'role_break', 'task': 'therapy', 'group': 'seven'}
  path = write(ROW, ROW | {'history': history} | more)
  assert labelled.read(path) == (
    Labelled(
      persona=ADA,
      task='chat',
      lines=(wording.ANY_LINE, 'I am a bot.'),
      labels=('contradicts',),
      kinds=('',),
      group=ADA,
      where=f'{path}, line 1',
    ),
    Labelled(
      persona=ADA,
      task='therapy',
      lines=('Hi!', 'Hello.', 'Who are you?', 'I am a bot.'),
      labels=('', 'contradicts'),
      kinds=('', 'role_break'),
      group='seven',
      where=f'{path}, line 2',
    ),
  )


def test_a_dialogue_is_read(write):
  last = own('I sell bread.', label='supports', kind='states')
  path = write(talk(*TALK, user('And?'), last, user('Bye!')))
  (row,) = labelled.read(str(path))
  assert row.lines == (
    *('Hi!', 'Hello.', 'Who?', 'Ada.', 'And?', 'I sell bread.', 'Bye!'),
  )
  assert row.labels == ('', 'consistent', 'supports')
  assert row.kinds == ('', '', 'states')
  assert row.group == ADA


def test_a_speaker_who_opens_answers_a_cue(write):
  path = write(
    talk(own('I am Ada.', label=True), user('Oh.')),
    ROW | {'history': [own('I am Ada.'), user('Oh.')]},
  )
  first, second = labelled.read(path)
  assert first.lines == (wording.CUE, 'I am Ada.', 'Oh.')
  assert first.labels == ('consistent',)
  assert second.lines == (wording.CUE, 'I am Ada.', 'Oh.', 'I am a bot.')
  assert second.labels == ('', 'contradicts')


def test_every_label_is_read(write):
  told = [*labelled.LABELS, True, False]
  rows = labelled.read(write(*[ROW | {'label': label} for label in told]))
  assert [row.labels for row in rows] == [
    (label,) for label in (*labelled.LABELS, 'consistent', 'contradicts')
  ]


def test_rows_without_a_persona_are_groups_of_their_own(write):
  path = write(*[ROW | {'persona': ''}] * 2, ROW, ROW)
  first, second, *others = labelled.read(path)
  assert (first.persona, first.system) == ('', wording.NEUTRAL)
  assert first.group != second.group
  assert [row.group for row in others] == [ADA] * 2


@pytest.mark.parametrize('line', ['', '🙂', 'Ich heiße Ada.', '我是面包师。'])
def test_a_labelled_line_may_be_anything(write, line):
  rows = write(ROW | {'line': line}, talk(user('Hi!'), own(line, label=False)))
  assert [row.lines[-1] for row in labelled.read(rows)] == [line] * 2


def test_blanks_are_taken_off_when_asked_for(write):
  path = write(ROW | {'persona': f'{ADA}\n', 'line': ' \n'})
  (row,) = labelled.read(path, strip=True)
  assert (row.persona, row.lines[-1], row.group) == (ADA, '', ADA)


GIVE = 'give one of supports, neutral, contradicts, consistent, or true'
BAD = [
  # no object
  ('{"persona": "A', 'is no JSON .*one object, from { to }'),
  ('["a"]', r'\["a"\] is no JSON object; a row has persona'),
  ('  ', 'is empty; take it out'),
  ('{"line": "a", "line": "b"}', "'line' comes twice; keep one"),
  # fields
  *[(without(name), f"'{name}' is missing; a row has persona") for name in ROW],
  ({'messages': TALK}, "'persona' is missing"),
  (ROW | {'lable': 'a'}, r"'lable' \(is it 'label'\?\) is unknown; .* it out"),
  (talk(*TALK, line='a'), "'line' stands beside messages"),
  (talk(*TALK, history=TALK), "'history' stands beside messages"),
  (talk(*TALK, label=True), "'label' stands beside messages"),
  (talk(*TALK, kind='a'), "'kind' stands beside messages"),
  # labels
  (ROW | {'label': 'Contradicts'}, f'label is "Contradicts"; {GIVE}'),
  (ROW | {'label': ''}, f'label is ""; {GIVE}'),
  (ROW | {'label': 1}, f'label is 1; {GIVE}'),
  (ROW | {'label': 'true'}, f'label is "true"; {GIVE}'),
  (ROW | {'label': None}, f'label is null; {GIVE}'),
  (ROW | {'label': ['supports']}, r'label is \["supports"\]; give'),
  (
    talk(user('Hi!'), own('Hi!', label='no')),
    rf'messages\[1\]\.label is "no"; {GIVE}',
  ),
  (talk(*TALK[:2]), "messages hold no label; give one to an assistant's"),
  (talk(user('Hi!')), 'messages hold no label'),
  (
    talk(own('Hi!', kind='a'), *TALK[2:]),
    r'messages\[0\]\.kind is "a", but there is no label',
  ),
  (
    talk(user('Hi!') | {'label': True}, TALK[-1]),
    r"messages\[0\] has the field 'label'; .* nothing else\. Take",
  ),
  (
    ROW | {'history': [own('a', label=True), user('b')]},
    r"history\[0\] has the field 'label'; .* nothing else",
  ),
  (
    talk(user('Hi!'), own('a', label=True, note='b')),
    r"messages\[1\] has the field 'note'; .* may have label and kind",
  ),
  # texts
  (ROW | {'line': None}, 'line is null, which is no text'),
  (ROW | {'line': ' '}, r'line begins or ends with a blank \(" "\)'),
  (ROW | {'line': 'a '}, 'line begins or ends with a blank .* strip=True'),
  (
    json.dumps(ROW).replace('a bot', '\\ud83d'),
    r"line holds '\\ud83d', half of a character",
  ),
  (ROW | {'persona': ' '}, 'persona begins or ends with a blank'),
  (ROW | {'persona': 5}, 'persona is 5, which is no text'),
  (ROW | {'kind': ''}, r'kind is empty \(""\); give a text or take it out'),
  (ROW | {'task': ''}, 'task is empty'),
  (ROW | {'group': ''}, 'group is empty'),
  (ROW | {'group': 7}, 'group is 7, which is no text'),
  (talk(user(''), TALK[-1]), r'messages\[0\]\.content is empty'),
  (talk(own(''), *TALK[2:]), r'messages\[0\]\.content is empty'),
  (ROW | {'history': [user('')]}, r'history\[0\]\.content is empty'),
  # turns
  (ROW | {'history': 'Hi!'}, 'history is "Hi!"; give a list of one message'),
  (ROW | {'history': []}, r'history is \[\]; give a list'),
  (talk(), r'messages is \[\]; give a list'),
  (talk('Hi!'), r'messages\[0\] is "Hi!"; a message has role and content'),
  (talk({'role': 'user'}), r'messages\[0\] is .*; a message has role and'),
  (
    talk({'role': 'system', 'content': 'a'}, *TALK),
    r'messages\[0\] has the role "system"; give user .* as the persona',
  ),
  (talk({'role': ['user'], 'content': 'a'}), r'has the role \["user"\]; give'),
  (
    talk(user('a'), user('b'), TALK[-1]),
    r"messages\[1\] is the user's, as is messages\[0\] before it, but",
  ),
  (
    talk(*TALK, own('b')),
    r"messages\[4\] is the assistant's, as is messages\[3\] .* join them",
  ),
  (
    ROW | {'history': [user('a'), own('b')]},
    r"line is the assistant's, as is history\[1\] before it",
  ),
]


@pytest.mark.parametrize(('row', 'rule'), BAD, ids=lambda x: str(x)[:40])
def test_a_bad_row_is_told_in_one_sentence(write, row, rule):
  path = write(ROW, row, ROW)
  with pytest.raises(ValueError, match=rule) as caught:
    labelled.read(path)
  told = str(caught.value)
  assert re.match(rf'{re.escape(str(path))}, line 2\b', told)
  assert told.endswith('.') and '\n' not in told and len(told) < 500


def test_files_that_hold_no_rows_are_told(write, tmp_path):
  with pytest.raises(ValueError, match='none.jsonl does not exist'):
    labelled.read(tmp_path / 'none.jsonl')
  with pytest.raises(ValueError, match='mine.jsonl is empty; give a row a'):
    labelled.read(write(end=''))
  path = write(ROW)
  path.write_bytes(path.read_bytes() + b'{"line": "caf\xe9"}\n')
  with pytest.raises(ValueError, match='line 2: byte 13 .* is no UTF-8; save'):
    labelled.read(path)


def test_the_rows_of_the_readme_are_rows(write):
  text = README.read_text('utf-8').partition('## Which judges can be')[2]
  block = re.search(r'```json\n(.*?)\n```', text, re.S)[1]
  rows = labelled.read(write(*block.splitlines()))
  assert [row.labels for row in rows] == [('contradicts',), ('consistent',)]
