"""Labelled dialogues: what the tables hold, what is made of them, the test."""

import collections
import itertools

import numpy as np
import pytest

from persona_jax.analysis import statistics
from persona_jax.text import facts, judged

SOME = [judged.made(i) for i in range(400)]
LISTS = ('states', 'implies', 'denies', 'against', 'near')


def _lines(kinds):
  values = itertools.chain(*(facts.facts()[kind] for kind in kinds))
  return {line for x in values for name in LISTS for line in getattr(x, name)}


def test_there_are_many_kinds_of_fact():
  tables = facts.facts()
  assert len(tables) == 126
  assert min(len(values) for values in tables.values()) >= 5
  assert set(facts.CALIBRATION) < set(tables)
  named = set(' '.join(facts.CLUSTERS).split())
  assert named <= set(tables)
  assert set().union(*map(facts.apart, tables)) <= set(tables)
  for one, other in ('sport', 'dancing'), ('dancing', 'sport'):
    assert one in facts.apart(other)  # as the row of dancing says


def test_no_line_has_two_meanings():
  found = collections.Counter(
    line
    for values in facts.facts().values()
    for value in values
    for name in LISTS
    for line in getattr(value, name)
  )
  assert max(found.values()) == 1


def test_an_example_is_the_same_for_ever():
  assert [judged.made(i) for i in range(9)] == SOME[:9]
  assert len({x.lines for x in SOME}) == len(SOME)
  assert judged.made(0, seed=1) != SOME[0]


def test_relations_are_those_of_the_kinds():
  for example in SOME:
    own = example.lines[1::2]
    assert len(own) == len(example.relations) == len(example.kinds)
    assert len(set(own)) == len(own)
    if example.persona:
      wanted = tuple(judged.KINDS[kind][0] for kind in example.kinds)
      assert example.relations == wanted
  found = collections.Counter(x for e in SOME for x in e.relations)
  assert min(found.values()) / sum(found.values()) > 0.2


def test_what_calibrates_is_not_trained_on():
  other = [judged.made(i, split='calibration') for i in range(100)]
  held = _lines(facts.CALIBRATION)
  assert not any(held & set(x.lines) for x in SOME)
  rest = _lines(set(facts.facts()) - set(facts.CALIBRATION))
  assert not any(rest & set(x.lines) for x in other)
  assert any(held & set(x.lines) for x in other)


def test_untold_lines_are_judged_by_those_before():
  values = list(itertools.chain(*facts.facts().values()))
  where = {
    line: (i, name)
    for i, x in enumerate(values)
    for name in LISTS
    for line in getattr(x, name)
  }
  untold = [x for x in SOME if not x.persona]
  assert len(untold) > 20
  seen = collections.Counter()
  for example in untold:
    said = set()
    for line, relation in zip(
      example.lines[1::2], example.relations, strict=True
    ):
      fact, name = where.get(line, (None, None))
      if relation != 'neutral':
        assert fact in said, (example, line)
      if relation == 'contradicts':
        assert name in ('denies', 'against')
        said.discard(fact)
      if name == 'states':
        said.add(fact)
      seen[relation] += 1
  assert set(seen) == set(judged.RELATIONS)


def test_what_is_neutral_is_told_of_nowhere():
  values = list(itertools.chain(*facts.facts().values()))
  kinds = {line: x.kind for x in values for line in (*x.states, *x.implies)}
  told = {sentence: x.kind for x in values for sentence in x.fact}
  short = {f': {x.short}': x.kind for x in values}
  elsewhere = 0
  for example in map(judged.made, range(1500)):
    if not example.persona or 'elsewhere' not in example.kinds:
      continue
    said = {
      kind
      for sentence, kind in {**told, **short}.items()
      if sentence in example.persona
      or judged.first_person(sentence) in example.persona
    }
    assert said
    for line, kind in zip(example.lines[1::2], example.kinds, strict=True):
      if kind == 'elsewhere':
        elsewhere += 1
        assert not facts.apart(kinds[line]) & said, example
  assert elsewhere > 100


def test_who_is_who_is_told_where_it_matters():
  for example in map(judged.made, range(800)):
    if not example.persona or example.task == 'chat':
      continue
    if {'other_party', 'intention', 'role_break'} & set(example.kinds):
      role = {'education': 'student', 'therapy': 'patient'}[example.task]
      assert role in example.persona, example


def test_a_persona_is_told_in_several_ways():
  told = [x.persona for x in SOME if x.persona]
  assert any(x.startswith('Name: ') for x in told)
  assert any(x.startswith('I am ') for x in told)
  words = [len(x.split()) for x in told]
  assert min(words) < 20 and max(words) > 150
  for text in told:
    if text.startswith('I am '):
      assert ' your ' not in text and ' you are ' not in text, text


@pytest.mark.parametrize(
  ('told', 'own'),
  [
    ("You are tired and you don't sleep.", "I am tired and I don't sleep."),
    ('Your cat wakes you at six.', 'My cat wakes me at six.'),
    ("You've hurt yourself.", "I've hurt myself."),
  ],
)
def test_a_persona_can_tell_of_itself(told, own):
  assert judged.first_person(told) == own


def test_a_missing_field_is_named(monkeypatch):
  row = {'kind': 'pets', 'exclusive': False, 'asks': ['Any?'], 'values': []}
  value = {name: ['a'] for name in (*LISTS, 'fact')} | {'short': 'x'}
  del value['against']
  broken = {'kinds': [row | {'values': [value]}]}
  monkeypatch.setattr(facts, 'load', lambda file: broken)
  for cached in (facts.facts, facts._kinds):
    cached.cache_clear()
  try:
    with pytest.raises(ValueError, match="facts_1.json, 'pets'.*'against'"):
      facts.facts()
  finally:
    for cached in (facts.facts, facts._kinds):
      cached.cache_clear()


# The test set.

WRITTEN = judged.written()
ERRORS = (
  'direct',
  'implied',
  'role_break',
  'other_party',
  'third_person',
  'intention',
)


def test_there_are_eight_hundred_examples_by_hand():
  about = [x for x in WRITTEN if x.task in judged.TASKS]
  assert len(about) >= 800
  found = collections.Counter(x.kind for x in about)
  assert all(found[error] >= 60 for error in ERRORS), found
  assert {x.kind for x in about if x.fits} == {'states', 'implies', 'neutral'}
  assert len([x for x in WRITTEN if x.task == 'between']) >= 100
  assert len([x for x in WRITTEN if x.task == 'answers']) >= 100


def test_training_sees_nothing_of_the_test():
  kinds = {x.about for x in WRITTEN}
  assert not kinds & set(facts.facts())
  trained = _lines(facts.facts()) | set(itertools.chain(*facts.bank().values()))
  assert not trained & {x.lines[-1] for x in WRITTEN}
  assert not {x.persona for x in SOME if x.persona} & {
    x.persona for x in WRITTEN
  }


def test_length_carries_no_signal():
  pairs = collections.defaultdict(dict)
  for row in WRITTEN:
    pairs[row.pair][row.fits] = row
  for pair in pairs.values():
    fits, fails = pair[True], pair[False]
    assert fits.lines[:-1] == fails.lines[:-1]
    assert fits.persona == fails.persona
    lengths = [len(x.lines[-1].split()) for x in (fits, fails)]
    assert abs(lengths[0] - lengths[1]) <= 3, pair
  about = [x for x in WRITTEN if x.task in judged.TASKS]
  words = np.array([len(x.lines[-1].split()) for x in about], float)
  fits = np.array([x.fits for x in about])
  assert abs(statistics.auc(words, fits) - 0.5) < 0.05
