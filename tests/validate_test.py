"""`evaluate --config=judges`, from labelled lines to a page."""

import json

import numpy as np
import pytest
from study_test import folder  # noqa: F401 (a fixture)

from persona_jax import jury, main, metrics, validate
from persona_jax.text import labelled

CALIBRATION = 24


@pytest.fixture(scope='module')
def flags(folder):  # noqa: F811
  return [
    '--quiet',
    f'--config.model={folder}',
    f'--config.jury.calibration={CALIBRATION}',
    '--config.jury.names=shortness,verdict',
  ]


@pytest.fixture(scope='module')
def mine(tmp_path_factory):
  """Twelve labelled lines, half of which contradict, in a user's file."""
  file = tmp_path_factory.mktemp('mine') / 'labels.jsonl'
  rows = [
    {
      'persona': f'You are person {i // 2} and you live in a town.',
      'line': ['I live in a town.', 'My home is in the wide open sea.'][i % 2],
      'label': i % 2 == 0,
      'kind': ['states', 'denies'][i % 2],
    }
    for i in range(12)
  ]
  file.write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
  return file


def _run(words):
  with pytest.raises(SystemExit) as stop:
    main.run(['evaluate', *words])
  return stop.value.code


def test_a_users_lines_are_measured(flags, mine, tmp_path, capsys):
  words = [*flags, f'--config.jury.labels={mine}', f'--workdir={tmp_path}']
  main.run(['evaluate', *words])
  said = capsys.readouterr().out
  assert 'shortness' in said and 'denies (6)' in said
  found = metrics.read_json(tmp_path / 'judges.json')
  assert list(found['judges']) == ['shortness', 'verdict', 'ensemble']
  short = found['judges']['shortness']
  assert short['auc']['mean'] in (0.5, 1.0)  # by what calibration says of it
  assert short['lines'] == 12 and short['none'] == 0
  assert found['about']['source'] == str(mine)
  assert found['agreement']['verdict']['verdict'] in (1.0, None)
  page = (tmp_path / 'judges.html').read_text('utf-8')
  for word in ('<svg', 'shortness', 'verdict', 'denies', str(mine)):
    assert word in page


def test_scores_that_are_there_are_not_made_again(
  flags, mine, tmp_path, monkeypatch, capsys
):
  words = [*flags, f'--config.jury.labels={mine}', f'--workdir={tmp_path}']
  main.run(['evaluate', *words])
  first = metrics.read_json(tmp_path / 'judges.json')

  def none(*args):
    raise AssertionError('a judge was asked again')

  monkeypatch.setattr(jury, '_slots', none)
  main.run(['evaluate', *words])
  assert metrics.read_json(tmp_path / 'judges.json') == first
  assert _run([*words, '--config.jury.alarms=0.2']) == 1  # another's workdir
  assert 'jury.alarms' in capsys.readouterr().err


def test_calibration_and_measure_are_of_different_lines():
  known = validate.described(labelled.calibration(40))
  test = validate.described(labelled.written())
  assert len(test.fits) == 1120 and test.fits.sum() == 560
  assert test.neutral.sum() == 146
  assert set(known.scope) == set(test.scope) == {'persona', 'between'}
  assert len(np.unique(test.group)) == 560  # pairs


def test_each_judge_is_judged_by_what_it_knows():
  rows = labelled.written()
  known = labelled.calibration(60)
  before, lines = validate.described(known), validate.described(rows)
  rng = np.random.default_rng(0)
  score = lambda fits, sharp: rng.normal(sharp * fits)
  scores = {
    name: {
      part: validate.Kept(score(some.fits, sharp), 7.0)
      for part, some in (('calibration', before), ('labelled', lines))
    }
    for name, sharp in (('good', 3.0), ('poor', 0.0), ('other', 3.0))
  }
  scores['same'] = {
    'calibration': validate.Kept(np.zeros(len(before.fits)), 7.0),
    'labelled': validate.Kept(np.zeros(len(lines.fits)), 7.0),
  }
  found = validate.measured(scores, known, rows, alarms=0.05)
  cards = found['judges']
  assert [n for n, x in cards.items() if x['informative']] == [
    'good',
    'other',
    'ensemble',
  ]
  assert cards['ensemble']['auc'].mean > cards['good']['auc'].mean
  assert cards['same']['auc'].mean == 0.5
  assert found['gains']['poor'].low > 0.3
  assert abs(found['gains']['other'].mean) < 0.05
  assert found['agreement']['good']['good'] == 1
  assert 0.4 < found['agreement']['good']['other'] < 0.95
  assert cards['good']['per_second'] == 7.0
  assert set(cards['good']['errors']) >= {'role_break', 'third_person'}
  assert cards['good']['threshold'] <= 0.5


def test_a_judge_that_is_silent_on_a_line_leaves_the_ensemble_silent():
  rows = labelled.written()
  known = labelled.calibration(60)
  before, lines = validate.described(known), validate.described(rows)
  rng = np.random.default_rng(0)
  kept = lambda some: validate.Kept(rng.normal(some.fits), 1.0)
  scores = {
    name: {'calibration': kept(before), 'labelled': kept(lines)}
    for name in 'ab'
  }
  scores['a']['labelled'].values[7] = np.nan
  found = validate.measured(scores, known, rows, alarms=0.05)['judges']
  assert found['a']['none'] == found['ensemble']['none'] == 1
  assert found['b']['none'] == 0


@pytest.mark.parametrize(
  ('flag', 'why'),
  [
    ('--config=study', 'no group jury'),
    ('--config.jury.calibration=3', 'jury.calibration=3 is too small'),
    ('--config.jury.alarms=1.0', 'jury.alarms=1.0 is no share'),
    ('--config.jury.labels=nowhere.jsonl', 'nowhere.jsonl does not exist'),
    ('--config.jury.names=verdict,length', "'length' is no judge"),
  ],
)
def test_what_cannot_be_measured_is_named(flags, flag, why, tmp_path, capsys):
  place = f'--workdir={tmp_path / "new"}'
  words = [flag, place] if flag == '--config=study' else [*flags, flag, place]
  assert _run(words) == 1
  said = capsys.readouterr().err
  assert why in said and said.count('\n') == 1
