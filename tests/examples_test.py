"""JSON lines of replies to learn from, and what is said of bad rows."""

import json
import re
from pathlib import Path

import pytest

import persona_jax
from persona_jax.text import examples, wording
from persona_jax.text.examples import Compared, Rated, Shown

USER, OWN = 'user', 'assistant'


def said(*lines, start=USER):
  roles = (USER, OWN) if start == USER else (OWN, USER)
  return [
    {'role': roles[i % 2], 'content': line} for i, line in enumerate(lines)
  ]


PAIR = {'persona': 'You are Ada.', 'chosen': 'I am Ada.', 'rejected': 'An AI.'}
RATED = {'persona': 'You are Ada.', 'reply': 'I am Ada.', 'label': True}
SHOWN = {'persona': 'You are Ada.', 'reply': 'I am Ada.'}
GOOD = {Compared: PAIR, Rated: RATED, Shown: SHOWN}
TALK = [{'role': 'system', 'content': 'You are Ada.'}, *said('Hi!', 'Hello.')]
ANY = (wording.ANY_LINE,)


@pytest.fixture
def write(tmp_path):
  def write(*rows, end='\n'):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = tmp_path / 'mine.jsonl'
    path.write_bytes('\n'.join(lines).encode() + end.encode())
    return path

  return write


def test_rows_of_every_kind_are_read(write):
  path = write(
    PAIR, {'system': '', **without('persona')}, PAIR | history('a', 'b', 'c')
  )
  assert examples.read(path, Compared) == (
    Compared('You are Ada.', ANY, 'I am Ada.', 'An AI.', f'{path}, line 1'),
    Compared('', ANY, 'I am Ada.', 'An AI.', f'{path}, line 2'),
    Compared(
      *('You are Ada.', ('a', 'b', 'c'), 'I am Ada.', 'An AI.'),
      where=f'{path}, line 3',
    ),
  )
  path = write(RATED, RATED | {'label': False})
  assert examples.read(str(path), Rated) == (
    Rated('You are Ada.', ANY, 'I am Ada.', True, f'{path}, line 1'),
    Rated('You are Ada.', ANY, 'I am Ada.', False, f'{path}, line 2'),
  )
  path = write(SHOWN, {'messages': TALK}, {'messages': TALK[1:] * 2})
  assert examples.read(path, Shown) == (
    Shown('You are Ada.', ANY, 'I am Ada.', f'{path}, line 1'),
    Shown('You are Ada.', ('Hi!',), 'Hello.', f'{path}, line 2'),
    Shown('', ('Hi!', 'Hello.', 'Hi!'), 'Hello.', f'{path}, line 3'),
  )


def history(*lines, **how):
  return {'history': said(*lines, **how)}


def without(name, row=None):
  return {k: v for k, v in (row or PAIR).items() if k != name}


def test_files_of_other_editors_are_read(write):
  row = PAIR | {'chosen': 'Ich heiße Ada\u2028re.'}  # no end of a line
  plain = json.dumps(row, ensure_ascii=False)
  path = write(f'\ufeff{plain}\r', f'{plain}\r', end='')
  first, second = examples.read(path, Compared)
  assert first.chosen == second.chosen == row['chosen']


def test_blanks_are_taken_off_when_asked_for(write):
  path = write(PAIR | {'chosen': ' Hi.\n'} | history('Who? '))
  (row,) = examples.read(path, Compared, strip=True)
  assert (row.history, row.chosen) == (('Who?',), 'Hi.')


HALF = '\\ud83d'
BAD = [
  # no object
  (Compared, '{"persona": "A', 'is no JSON .*one object, from { to }'),
  (Compared, "{'persona': 'A'}", 'is no JSON'),
  (Compared, '[' * 100_000, 'is no JSON'),
  (Compared, '1' * 5000, 'is no JSON'),
  (Compared, '["a"]', r'\["a"\] is no JSON object; a row has persona'),
  (Compared, 'null', 'null is no JSON object'),
  (Compared, '  ', 'is empty; take it out'),
  (
    Compared,
    '{"persona": "A", "chosen": "a", "chosen": "b", "rejected": "c"}',
    "'chosen' comes twice; keep one",
  ),
  # fields
  *[
    (Compared, without(name), f"'{name}' is missing; a row has persona or")
    for name in ('chosen', 'rejected')
  ],
  (Rated, without('label', RATED), "'label' is missing"),
  (Rated, without('reply', RATED), "'reply' is missing"),
  (Shown, without('reply', SHOWN), "'reply' is missing; .* messages alone"),
  *[
    (kind, without('persona', GOOD[kind]), 'persona or system is missing')
    for kind in GOOD
  ],
  (Compared, PAIR | {'system': 'You.'}, 'system is "You.", but both name'),
  (
    Compared,
    without('chosen') | {'choosen': 'a'},
    r"'choosen' \(is it 'chosen'\?\) is unknown; .* take it out",
  ),
  (Compared, PAIR | {'messages': TALK}, "'messages' is unknown"),
  (Shown, SHOWN | {'label': True}, "'label' is unknown"),
  (Shown, SHOWN | {'messages': TALK}, "'persona' stands beside messages"),
  # texts
  (Compared, PAIR | {'chosen': 5}, 'chosen is 5, which is no text; give'),
  (Compared, PAIR | {'rejected': None}, 'rejected is null, which is no'),
  (Compared, PAIR | {'chosen': ''}, r'chosen is empty \(""\); give a text'),
  (Compared, PAIR | {'chosen': ' \n'}, r'chosen is empty \(" \\n"\)'),
  (Compared, PAIR | {'persona': ''}, 'persona is empty'),
  (Compared, PAIR | {'chosen': 'a '}, r'blank \("a "\), .* strip=True'),
  (
    Compared,
    json.dumps(PAIR).replace('An AI', HALF),
    r"rejected holds '\\ud83d', half of a character",
  ),
  (
    Compared,
    PAIR | {'rejected': PAIR['chosen']},
    'chosen and rejected are both "I am Ada."',
  ),
  (Compared, PAIR | {'chosen': ['a' * 99]}, r'chosen is \["a{58}\.\.\., '),
  # labels
  (Rated, RATED | {'label': 1}, 'label is 1; it is true for a desirable'),
  (Rated, RATED | {'label': 'true'}, 'label is "true"; it is true for'),
  # histories
  (Compared, PAIR | {'history': 'Hi.'}, 'history is "Hi.", which is no list'),
  (Compared, PAIR | {'history': []}, r'history is empty \(\[\]\); it holds'),
  (Compared, PAIR | history('a', 'b'), 'history ends with the assistant'),
  (Compared, PAIR | history('a', start=OWN), r"history\[0\].* 'user' is due"),
  (
    Compared,
    PAIR | {'history': TALK[:2]},
    r'history\[0\] has the role "system" .* in the field system',
  ),
  (
    Compared,
    PAIR | {'history': [*said('a'), *said('b')]},
    r'history\[1\] has the role "user" where \'assistant\' is due',
  ),
  (Compared, PAIR | history(''), r'history\[0\]\.content is empty'),
  (Compared, PAIR | history(['a']), r'history\[0\]\.content is \["a"\]'),
  (Compared, PAIR | {'history': ['Hi.']}, r'history\[0\] is "Hi\."; a message'),
  (
    Compared,
    PAIR | {'history': [said('a')[0] | {'name': 'Bo'}]},
    'a message has role and content, and nothing else',
  ),
  # messages
  (Shown, {'messages': 'Hi.'}, 'messages is "Hi.", which is no list'),
  (Shown, {'messages': []}, r'messages is empty \(\[\]\); it holds'),
  (Shown, {'messages': TALK[:1]}, 'messages is empty'),
  (Shown, {'messages': TALK[:2]}, 'messages ends with the user'),
  (Shown, {'messages': TALK[:1] * 2}, r'messages\[1\] has the role "system"'),
  (
    Shown,
    {'messages': [TALK[0] | {'content': ''}, *TALK[1:]]},
    r'messages\[0\]\.content is empty',
  ),
  (
    Shown,
    {'messages': [*said('a'), {'role': 'tool', 'content': 'b'}]},
    r'messages\[1\] has the role "tool"',
  ),
]


@pytest.mark.parametrize(
  ('kind', 'row', 'rule'), BAD, ids=lambda x: str(x)[:40]
)
def test_a_bad_row_is_told_in_one_sentence(write, kind, row, rule):
  path = write(GOOD[kind], row, GOOD[kind])
  with pytest.raises(ValueError, match=rule) as caught:
    examples.read(path, kind)
  told = str(caught.value)
  assert re.match(rf'{re.escape(str(path))}, line 2\b', told)
  assert told.endswith('.') and '\n' not in told and len(told) < 500


def test_a_good_row_is_none_of_the_bad():
  for kind, row in GOOD.items():
    assert examples.parse(row, kind, where='here').where == 'here'


def test_other_encodings_are_told(tmp_path):
  path = tmp_path / 'mine.jsonl'
  path.write_bytes(json.dumps(SHOWN).encode() + b'\n{"reply": "caf\xe9"}\n')
  with pytest.raises(ValueError, match='line 2: byte 14 .* is no UTF-8; save'):
    examples.read(path, Shown)


def test_missing_and_empty_files(write, tmp_path):
  with pytest.raises(ValueError, match='none.jsonl does not exist'):
    examples.read(tmp_path / 'none.jsonl', Shown)
  with pytest.raises(ValueError, match='mine.jsonl is empty; give a row a'):
    examples.read(write(end=''), Shown)


def test_pairs_as_other_kinds():
  pair = Compared('You.', ANY, 'a', 'b', 'here')
  assert pair.replies == ('a', 'b')
  assert examples.rated([pair]) == (
    Rated('You.', ANY, 'a', True, 'here'),
    Rated('You.', ANY, 'b', False, 'here'),
  )
  assert examples.shown([pair]) == (Shown('You.', ANY, 'a', 'here'),)


def test_every_answer_as_an_example():
  talk = Shown('You.', ('a', 'b', 'c'), 'd', 'here')
  assert examples.unrolled([talk]) == (
    Shown('You.', ('a',), 'b', 'here'),
    Shown('You.', ('a', 'b', 'c'), 'd', 'here'),
  )


def test_the_rows_of_the_readme_are_rows():
  readme = Path(persona_jax.__file__).parents[1] / 'README.md'
  text = readme.read_text('utf-8').partition('## Your own replies')[2]
  block = re.search(r'```json\n(.*?)```', text, re.S)[1]
  for line, kind in zip(block.splitlines(), GOOD, strict=True):
    assert examples.parse(json.loads(line), kind, where='README.md')
