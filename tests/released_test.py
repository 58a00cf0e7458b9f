"""Files in the form of consistent-LLMs', of our own words, and their traps."""

import json
import re

import pytest

from persona_jax.text import released, wording
from persona_jax.text.labelled import CONSISTENT, CONTRADICTS
from persona_jax.text.released import Counts

ADA, BEN = 'Ada bakes bread in Turin.', 'Ben drives a night bus.'
NAMES = {'Chatting': ('Ada', 'Ben'), 'Education': ('Teacher', 'Student')}
SAID = {
  'y': 'A bus driver would not say so. YES',
  'n': 'That may well be so.\n\nNO.',
  '?': 'It is hard to say.',
}
NONE = dict.fromkeys(Counts._fields, 0)
GOOD, BAD = CONSISTENT, CONTRADICTS


def record(replies='', task='Therapy', lines=None, field='prompt', **more):
  """A dialogue, with replies about agent 2's lines, or in a chat about all."""
  step = 1 if task == 'Chatting' else 2
  first = step - 1 + (2 if field == 'index' else 0)
  told = [[first + step * i, SAID.get(x, x)] for i, x in enumerate(replies)]
  if lines is None:
    lines = [f'This is line {i}.' for i in range(told[-1][0] + 1)]
  names = NAMES.get(task, ('Therapist', 'Patient'))
  return {
    'task_name': task,
    'P1': ADA if task == 'Chatting' else '',
    'P2': BEN,
    'conversation': [
      [i, f'{names[i % 2]}: {line}\n'] for i, line in enumerate(lines)
    ],
    'pturn': 1,
    'rounds': len(lines),
    f'eval_{field}_consistency': told,
  } | more


def scored(replies, score, **more):
  return record(replies, P2_prompt_consistency_score=score, **more)


def without(name):
  return {key: x for key, x in record('yn').items() if key != name}


@pytest.fixture
def write(tmp_path):
  def write(*records, name='model_0_7.json'):
    path = tmp_path / 'clone' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path

  return write


def test_a_patient_is_read(write):
  lines = 'Hi.', 'I drive a bus.', 'And?', 'I fly a plane.', 'Oh.', 'Yes.'
  path = write(record('ny?', lines=lines))
  (row,), counts = released.read(path)
  assert row._asdict() == {
    'persona': BEN,
    'task': 'therapy',
    'lines': lines,
    'labels': (GOOD, BAD, ''),
    'kinds': ('', '', ''),
    'group': BEN,
    'where': f'{path}, record 0, agent 2',
  }
  found = {'files': 1, 'dialogues': 1, 'labelled': 2, 'missing': 1}
  found |= {'untold': 1, 'untold_files': 1}
  assert counts._asdict() == NONE | found


def test_both_who_chat_are_read(write):
  path = write(record('nynn', task='Chatting'))
  (ada, ben), counts = released.read(path)
  assert (ada.persona, ben.persona) == (ada.group, ben.group) == (ADA, BEN)
  assert ada.lines == (wording.CUE, *ben.lines)
  assert ben.lines == tuple(f'This is line {i}.' for i in range(4))
  assert (ada.labels, ben.labels) == ((GOOD, GOOD), (BAD, GOOD))
  assert ada.where == f'{path}, record 0, agent 1'
  assert (counts.dialogues, counts.labelled) == (1, 4)


def test_names_are_taken_off_and_nothing_else(write):
  lines = 'Patient: hm?', 'Patient: Note: at 10:30.', 'So: so', ''
  (row,), _ = released.read(write(record('nn', lines=lines)))
  assert row.lines == ('Patient: hm?', 'Note: at 10:30.', 'So: so', '')


@pytest.mark.parametrize(
  ('reply', 'label'),
  [
    ('YES', BAD),
    ('It cannot be.\nYES.', BAD),
    ('**NO**', GOOD),
    ('NO, that is no conflict; yes, it fits.', GOOD),
    ('', ''),
    ('The line does NOT say.', ''),
    ('Yes, it does not fit.', ''),
    ('Is it so? YES. Or is it? NO.', ''),
    ('THEIR EYES', ''),
  ],
)
def test_verdicts(write, reply, label):
  (row,), counts = released.read(write(record([reply, 'n'])))
  assert row.labels == (label, GOOD)
  assert counts.missing == (label == '')


@pytest.mark.parametrize(
  ('replies', 'score', 'vote'),
  [
    ('yynnn', 0.6, -1),  # the share of the others
    ('yynnn', 0.4, 1),  # the share of YES
    ('yy?nn', 0.6, -1),  # garbage was counted as no YES
    ('yy??n', 0.4, 1),
    ('nnn', 1, -1),
    ('yyy', 1.0, 1),
    ('yyn', 2 / 3 + 1e-9, 1),
    ('yn', 0.5, 0),
    ('yynnn', 0.5, 0),  # of other verdicts
    ('yynnn', 3, 0),  # a count that was not divided yet
    ('yynnn', None, 0),
    ('yynnn', float('nan'), 0),
  ],
)
def test_the_score_says_what_yes_is(write, replies, score, vote):
  (row,), counts = released.read(write(scored(replies, score)))
  yes, no = (GOOD, BAD) if vote > 0 else (BAD, GOOD)
  assert row.labels == tuple({'y': yes, 'n': no, '?': ''}[x] for x in replies)
  assert counts.inverted == counts.inverted_files == (vote > 0)
  assert counts.untold == counts.untold_files == (vote == 0)


def test_only_agent_2_says_what_yes_is(write):
  told = record('yynn', task='Chatting', P2_prompt_consistency_score=0.5)
  assert released.read(write(told)).counts.untold == 1
  # of all lines a half is YES, of agent 2's none is
  told = scored('ynyn', 0.0, task='Chatting', P1_prompt_consistency_score=0)
  assert released.read(write(told)).counts.inverted == 1


def test_most_dialogues_of_a_file_decide(write):
  inverted, normal = scored('yyn', 2 / 3), scored('yyn', 1 / 3)
  path = write(inverted, record('yyn'), normal, inverted, scored('yn', 0.5))
  rows, counts = released.read(path)
  assert {row.labels for row in rows[:4]} == {(GOOD, GOOD, BAD)}
  assert (counts.inverted, counts.untold, counts.outvoted) == (2, 2, 1)
  assert (counts.inverted_files, counts.untold_files) == (1, 0)
  rows, counts = released.read(write(inverted, normal))
  assert {row.labels for row in rows} == {(BAD, BAD, GOOD)}
  assert (counts.outvoted, counts.untold_files) == (1, 1)


def test_each_file_decides_for_itself(write):
  write(scored('yyn', 2 / 3), name='a.json')
  path = write(scored('yyn', 1 / 3), name='exp/deep/b.json')
  (first, second), counts = released.read(path.parents[2])
  assert (first.labels, second.labels) == ((GOOD, GOOD, BAD), (BAD, BAD, GOOD))
  assert (counts.files, counts.inverted_files) == (2, 1)


def test_unfinished_records_are_counted(write):
  unjudged = record('n')
  del unjudged['eval_prompt_consistency']
  started = record(lines=[], pturn=0)
  part = record('yn', lines='abcdef')
  half = record('nn', task='Chatting')  # agent 2 was not judged
  half['eval_prompt_consistency'].pop()
  rows, counts = released.read(write(unjudged, started, part, half))
  assert [row.labels for row in rows] == [(BAD, GOOD, ''), (GOOD,)]
  assert (counts.dialogues, counts.unfinished, counts.untold) == (4, 3, 2)


def test_a_row_has_a_label(write):
  rows, counts = released.read(write(record('??')))
  assert (rows, counts.missing, counts.unfinished) == ((), 2, 0)


def test_a_folder_holds_other_files_too(write):
  write({'persona': ADA, 'name': 'Ada'}, name='config_personas.json')
  (write().parent / 'config.json').write_text('{"scenario": "A chat."}')
  write(record('n'), record('y', task='Education'), name='exp/b.json')
  write(record('n', task='Chatting'), name='chat.json')
  folder = write().parent  # an empty list
  rows, counts = released.read(folder)
  assert [row.task for row in rows] == ['chat', 'therapy', 'education']
  assert (counts.files, counts.others) == (2, 3)
  (row,), counts = released.read(str(folder), 'education')
  assert (row.task, counts.files, counts.dialogues) == ('education', 1, 1)
  with pytest.raises(ValueError, match='config.json holds no dialogues; give'):
    released.read(folder / 'config.json')
  with pytest.raises(ValueError, match='b.json holds .* of the task chat; '):
    released.read(folder / 'exp' / 'b.json', 'chat')


def test_lines_that_conflict_are_read(write):
  replies = 'None. []', 'It is. [1]', 'Hard to say.'
  path = write(record(replies, field='index'))
  (row,), counts = released.read(path, between=True)
  assert (row.persona, row.group, row.task) == ('', BEN, 'therapy')
  assert row.labels == ('', GOOD, BAD, '')
  assert len(row.lines) == 8 and row.kinds == ('',) * 4
  found = {'files': 1, 'dialogues': 1, 'labelled': 2, 'missing': 1}
  assert counts._asdict() == NONE | found


def test_conflicts_of_both_who_chat_are_read(write):
  told = record(['[0]', '[0]', '[2, 0]'], task='Chatting', field='index')
  (ada, ben), counts = released.read(write(told), between=True)
  assert ada.lines == (wording.CUE, *ben.lines)
  assert (ada.labels, ben.labels) == (('', BAD, BAD), ('', GOOD))
  assert (ada.group, ben.group, counts.strays) == (ADA, BEN, 1)
  assert counts.unfinished == 0


@pytest.mark.parametrize(
  ('reply', 'label', 'strays'),  # of line 5, by agent 2
  [
    ('[]', GOOD, 0),
    ('They agree: [ ].', GOOD, 0),
    ('[1]', BAD, 0),
    ('[\'1\', "3"]', BAD, 0),
    ('[1, 1, 3]', BAD, 0),
    ('[1, 3,\n 4]', BAD, 1),
    ('[2]', GOOD, 1),  # the partner's
    ('[5, 7, 99]', GOOD, 3),  # itself, and later ones
    ('[-1]', '', 0),
    ('[1, line 3, None]', BAD, 2),
    ('[line 3]', '', 0),
    ('[index1, index2]', '', 0),
    ('Line 3 conflicts.', '', 0),
    ('[1', '', 0),
    ('[2] is not at odds with it. []', GOOD, 0),
    ('[3]\n\nThe speaker [the patient] is at odds.', BAD, 0),
    ('[[1, 3]]', BAD, 0),
    ('', '', 0),
  ],
)
def test_lists_of_lines(write, reply, label, strays):
  told = record(['[]', reply], field='index')
  rows, counts = released.read(write(told), between=True)
  assert rows[0].labels == ('', GOOD, label)
  assert (counts.strays, counts.missing) == (strays, label == '')


def spoilt(field, *values, **more):
  """A record that holds `values` in the place of its lists' first entries."""
  broken = record('yn', **more)
  broken[field] = [*values, *broken[field][len(values) :]]
  return broken


PROMPT = 'eval_prompt_consistency'
WRONG = [
  (5, 'is 5, which is no object'),
  *[
    (without(name), f'{name} is null')
    for name in ('task_name', 'P1', 'P2', 'conversation')
  ],
  (record('n', task_name='Poker'), 'task_name is "Poker", where it is one of'),
  (record('n', task_name=['Therapy']), r'task_name is \["Therapy"\]'),
  (record('n', P2=[BEN]), 'P2 is .*, which is no text'),
  (record('n', pturn=2), 'pturn is 2, where it is 1, as agent 1 opens'),
  (record('n', conversation='Hi.'), 'conversation is "Hi.", where it is a l'),
  (spoilt('conversation', 'Hi.'), r'conversation\[0\] is "Hi\."'),
  (spoilt('conversation', [1, 'A: a']), r'conversation\[0\] is \[1, "A: a"\]'),
  (
    spoilt('conversation', [0, 'a']),
    r'\[0\] is \[0, "a"\], where it is \[0, "',
  ),
  (spoilt('conversation', [0, 7]), r'conversation\[0\] is \[0, 7\]'),
  (
    spoilt('conversation', [0, 'A: a'], [1, 'B: b'], [2, 'B: c']),
    r'conversation\[2\] is \[2, "B: c"\], where it is \[2, "A: text"\]',
  ),
  (
    spoilt('conversation', [0, 'A: \ud83d']),
    r'conversation\[0\] holds .* half',
  ),
  (record('n', P2_prompt_consistency_score='1'), 'score is "1", where it is a'),
  (record('n', **{PROMPT: None}), f'{PROMPT} is null, where it is a list'),
  (spoilt(PROMPT, 'NO'), rf'{PROMPT}\[0\] is "NO", where it is \[line, text'),
  (spoilt(PROMPT, [1]), rf'{PROMPT}\[0\] is \[1\]'),
  (spoilt(PROMPT, ['1', 'NO']), rf'{PROMPT}\[0\] is \["1", "NO"\]'),
  (spoilt(PROMPT, [1, None]), rf'{PROMPT}\[0\] is \[1, null\]'),
  (spoilt(PROMPT, [4, 'NO']), r'\[4, "NO"\], .* a line from 0 to 3, once'),
  (spoilt(PROMPT, [-1, 'NO']), r'\[-1, "NO"\], where'),
  (spoilt(PROMPT, [3, 'NO']), rf'{PROMPT}\[1\] is \[3, .* once'),
  (spoilt(PROMPT, [0, 'NO']), r'\[0, "NO"\], .* persona, and P1 is empty'),
]


@pytest.mark.parametrize(('broken', 'rule'), WRONG, ids=lambda x: str(x)[:40])
def test_another_form_is_told(write, broken, rule):
  path = write(record('n'), broken)
  with pytest.raises(ValueError, match=rule) as caught:
    released.read(path)
  told = str(caught.value)
  assert told.startswith(f'{path}, record 1') and told.endswith('.')
  assert '\n' not in told and len(told) < 500


def test_lines_with_none_before_them_have_no_conflicts(write):
  told = record(['[]'], field='index')
  told['eval_index_consistency'][0][0] = 1
  with pytest.raises(
    ValueError, match=r'eval_index.*\[1, "\[\]"\].* from 2 to'
  ):
    released.read(write(told), between=True)


def test_other_paths_and_tasks_are_told(write, tmp_path):
  with pytest.raises(ValueError, match='none does not exist; give a file or a'):
    released.read(tmp_path / 'none')
  with pytest.raises(ValueError, match='holds no dialogues; give a clone of'):
    released.read(tmp_path)
  with pytest.raises(
    ValueError, match="'Therapy' is unknown; give one of chat"
  ):
    released.read(write(record('n')), 'Therapy')
  path = write(record('n'))
  path.write_text(path.read_text()[:-9])
  with pytest.raises(ValueError, match=re.escape(f'{path} is no JSON (')):
    released.read(tmp_path)
