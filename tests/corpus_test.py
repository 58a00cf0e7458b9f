"""The words that ship with the package, and what is said of bad files."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from persona_jax.text import corpus

ALL = [p for split in corpus.SPLITS for p in corpus.personas(split)]
READERS = {
  'archetypes': lambda: corpus.archetypes().roles,
  'default': lambda: corpus.archetypes().default,
  'questions': corpus.questions,
  'personas': lambda: ALL,
  'partners': corpus.partners,
  'lines': corpus.labelled_lines,
  'pairs': corpus.labelled_pairs,
  'choices': corpus.choices,
}


@pytest.mark.parametrize(
  ('name', 'least'),
  [
    ('archetypes', 60),
    ('default', 4),
    ('questions', 20),
    ('personas', 40),
    ('lines', 60),
    ('pairs', 40),
    ('choices', 60),
  ],
)
def test_there_is_enough(name, least):
  assert len(READERS[name]()) >= least


@pytest.mark.parametrize('name', READERS)
def test_no_row_comes_twice(name):
  rows = [json.dumps(row) for row in READERS[name]()]
  assert len(set(rows)) == len(rows)


def texts():
  """Every text of the corpus, and where it stands."""
  for role in corpus.archetypes().roles:
    yield from ((role.name, prompt) for prompt in role.prompts)
  for person in ALL:
    yield person.name, person.prompt
  for partner in corpus.partners():
    yield from ((partner.kind, line) for line in partner.openings)
    yield partner.kind, partner.prompt
  yield from (('question', question) for question in corpus.questions())


def test_no_text_comes_twice():
  counts = Counter(text for _, text in texts())
  assert not [text for text, count in counts.items() if count > 1]


def test_texts_are_clean_lines():
  for where, text in texts():
    assert text == text.strip() and '\n' not in text, where
    assert text[-1] in '.?!', where
    assert '  ' not in text and '\ufffd' not in text, where


def test_names_are_names_of_one():
  for rows in (corpus.archetypes().roles, ALL):
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)


def test_archetypes_come_in_groups_and_several_prompts():
  roles = corpus.archetypes().roles
  groups = Counter(role.group for role in roles)
  assert len(groups) >= 4 and min(groups.values()) >= 3
  assert all(len(role.prompts) >= 2 for role in roles)


def test_the_default_has_no_role():
  default = corpus.archetypes().default
  assert '' in default  # the template's own system prompt
  roles = {role.name for role in corpus.archetypes().roles}
  for prompt in default:
    assert not [role for role in roles if re.search(rf'\b{role}\b', prompt)]


@pytest.mark.parametrize('person', ALL, ids=lambda p: p.name)
def test_facts_stand_in_the_prompt(person):
  assert person.name in person.prompt
  assert len(person.facts) >= 5
  for kind, fact in person.facts.items():
    assert fact and fact.lower() in person.prompt.lower(), kind


def test_heldout_personas_are_other_people():
  train, heldout = map(corpus.personas, corpus.SPLITS)
  assert len(train) >= 20 and len(heldout) >= 8
  jobs = lambda people: {person.facts['work'].lower() for person in people}
  assert not jobs(train) & jobs(heldout)
  words = lambda people: {w for p in people for w in p.name.split()}
  assert not words(train) & words(heldout)


def test_partners_are_four_and_each_opens_in_many_ways():
  partners = corpus.partners()
  kinds = [partner.kind for partner in partners]
  assert kinds == ['small talk', 'task', 'emotional', 'meta-reflective']
  assert all(len(partner.openings) >= 8 for partner in partners)


def test_labelled_lines_are_balanced():
  lines = corpus.labelled_lines()
  labels = Counter(line.label for line in lines)
  assert labels.keys() == {'consistent', 'contradicts'}
  assert max(labels.values()) <= 1.5 * min(labels.values())
  fits = [line for line in lines if line.label == 'consistent']
  wrong = [line for line in lines if line.label == 'contradicts']
  # length must not give the answer away
  mean = lambda rows: sum(len(row.line) for row in rows) / len(rows)
  assert abs(mean(fits) / mean(wrong) - 1) < 0.1
  # each persona has lines of both kinds, so that it says nothing by itself
  assert {row.persona for row in fits} == {row.persona for row in wrong}
  assert len(Counter(row.error for row in wrong)) >= 2


def test_no_persona_is_both_trained_on_and_used_to_calibrate():
  labelled = {line.persona for line in corpus.labelled_lines()}
  assert not labelled & {person.prompt for person in ALL}


def test_labelled_pairs_are_balanced():
  pairs = corpus.labelled_pairs()
  labels = Counter(pair.label for pair in pairs)
  assert labels['consistent'] == labels['contradicts'] == len(pairs) / 2
  by_first = Counter((pair.first, pair.label) for pair in pairs)
  assert len({first for first, _ in by_first}) == len(by_first) / 2


def test_choices_have_one_right_option_anywhere():
  choices = corpus.choices()
  for choice in choices:
    assert len(set(choice.options)) == len(choice.options) == 4
    assert choice.answer in range(4)
  places = Counter(choice.answer for choice in choices)
  assert max(places.values()) <= 0.4 * len(choices)


def test_neutral_text_is_prose():
  text = corpus.neutral_text()
  assert len(text.split()) > 500
  assert not re.search(r'\b(I|you|persona)\b', text)


# Somebody's own personas.

GOOD = {
  'name': 'Ada',
  'split': 'train',
  'prompt': 'You are Ada.',
  'facts': {'work': 'clerk'},
}


@pytest.fixture
def write(tmp_path):
  def write(text, name='mine.json'):
    path = tmp_path / name
    path.write_text(text, encoding='utf-8')
    return path

  return write


def file(*rows):
  return json.dumps({'personas': rows})


def test_a_users_personas_are_read(write):
  path = write(file(GOOD, GOOD | {'name': 'Béa', 'split': 'heldout'}))
  assert corpus.personas('train', path) == (corpus.Persona(**GOOD),)
  assert corpus.personas('heldout', str(path))[0].name == 'Béa'
  write(file(GOOD | {'name': 'Cleo'}))  # the same file, changed since
  assert corpus.personas('train', path)[0].name == 'Cleo'


def test_a_relative_path_is_the_users(write, monkeypatch):
  path = write(file(GOOD))
  monkeypatch.chdir(path.parent)
  assert corpus.personas('train', 'mine.json')[0].name == 'Ada'
  write(file(GOOD | {'name': 'Eve'}), name='personas.json')  # not ours
  assert [p.name for p in corpus.personas('train', 'personas.json')] == ['Eve']


def without(field):
  return {k: v for k, v in GOOD.items() if k != field}


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    *[
      (file(GOOD, without(field)), f"row 1: the field '{field}' is missing")
      for field in GOOD
    ],
    (file(GOOD | {'prompt': ''}), "row 0: the field 'prompt' is missing or"),
    (file(GOOD | {'name': None}), "row 0: the field 'name' is missing or"),
    (file(GOOD, 'Ada'), "row 1: 'Ada' is no row"),
    (file(GOOD, GOOD | {'split': 'test'}), "row 1: split 'test' is none of"),
    (file(GOOD | {'split': 'heldout'}), "no persona with split 'train'"),
    (file(), "no persona with split 'train'"),
    ('', 'is no JSON: .* empty or cut short'),
    (file(GOOD)[:-9], 'is no JSON: .* empty or cut short'),
    ('[]', "has no list 'personas'"),
    ('{"personas": {}}', "has no list 'personas'"),
    ('{"people": []}', "has no list 'personas'"),
  ],
)
def test_a_bad_file_is_told_in_one_sentence(write, text, said):
  path = write(text)
  with pytest.raises(ValueError, match=said) as caught:
    corpus.personas('train', path)
  assert str(caught.value).startswith(str(path))
  assert str(caught.value).endswith('.') and '\n' not in str(caught.value)


def test_missing_file_and_unknown_split():
  with pytest.raises(ValueError, match='nowhere.json does not exist'):
    corpus.personas('train', Path('nowhere.json'))
  with pytest.raises(ValueError, match="personas.json has no .* 'valid'"):
    corpus.personas('valid')
