"""`evaluate --config=judges`, from labelled lines to a page."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from study_test import folder  # noqa: F401 (a fixture)

from persona_jax import judge, jury, lab, main, metrics, validate
from persona_jax.models import adapter_file, lora
from persona_jax.text import labelled

CALIBRATION = 24


@pytest.fixture(scope='module', autouse=True)
def few_shapes():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jury, 'ROUND', 256)  # compiling takes most of the time
    yield


@pytest.fixture(scope='module')
def flags(folder, tmp_path_factory):  # noqa: F811
  config = main.load_config('judges')
  main.override(config, 'model', str(folder))
  opened = lab.open_lab(config)
  made = lora.init(opened.model.config, jax.random.key(0), rank=2, alpha=4.0)
  place = tmp_path_factory.mktemp('adapter') / 'judge'
  adapter_file.save(made, opened.model, place)
  judge.sign(place, opened.chat)
  return [
    '--quiet',
    f'--config.model={folder}',
    f'--config.jury.adapter={place}',
    f'--config.jury.calibration={CALIBRATION}',
    '--config.jury.names=shortness,trained',
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


@pytest.fixture(scope='module')
def words(flags, mine, tmp_path_factory):
  place = tmp_path_factory.mktemp('judges')
  return [*flags, f'--config.jury.labels={mine}', f'--workdir={place}']


def test_a_users_lines_are_measured(words, mine, capsys, monkeypatch):
  main.run(['evaluate', *words])
  said = capsys.readouterr().out
  assert 'shortness' in said and 'denies (6)' in said
  place = Path(words[-1].partition('=')[2])
  found = metrics.read_json(place / 'judges.json')
  assert list(found['judges']) == ['shortness', 'trained', 'ensemble']
  short = found['judges']['shortness']
  assert short['auc']['mean'] in (0.5, 1.0)  # by what calibration says of it
  assert short['lines'] == 12 and short['none'] == 0
  assert found['about']['source'] == str(mine)
  assert found['agreement']['trained']['trained'] in (1.0, None)
  page = (place / 'judges.html').read_text('utf-8')
  for word in ('<svg', 'shortness', 'trained', 'denies', str(mine)):
    assert word in page

  def none(*args):
    raise AssertionError('a judge was asked again')

  monkeypatch.setattr(jury, '_slots', none)
  main.run(['evaluate', *words])  # its scores are there
  assert metrics.read_json(place / 'judges.json') == found
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
    ('--config.jury.names=trained,length', "'length' is no judge"),
  ],
)
def test_what_cannot_be_measured_is_named(flags, flag, why, tmp_path, capsys):
  place = f'--workdir={tmp_path / "new"}'
  words = [flag, place] if flag == '--config=study' else [*flags, flag, place]
  assert _run(words) == 1
  said = capsys.readouterr().err
  assert why in said and said.count('\n') == 1
