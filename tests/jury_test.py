"""Judges on labelled dialogues: each line gets its own score, or none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from study_test import folder  # noqa: F401 (a fixture)

from persona_jax import data, judge, jury, lab, main, rewards
from persona_jax.analysis import scorecard
from persona_jax.models import lora
from persona_jax.text import labelled, wording

PERSONA = 'You are Ida, a baker. You never eat meat.'
ODD = ('', '🙂', 'Jeg spiser aldri kjøtt.', 'Word ' * 20)


def _row(*lines, persona=PERSONA, labels=None):
  own = lines[1::2]
  labels = labels or ('consistent',) * len(own)
  return labelled.Labelled(
    persona, 'chat', lines, labels, ('',) * len(own), 'a group', 'a test'
  )


ROWS = (
  _row('Hello?', 'I bake.', 'Meat?', 'Never.'),
  _row('Who are you?', 'Ida.'),
  *(_row('And?', line) for line in ODD),
  _row('Hi.', 'I eat no meat.', 'Dinner?', 'Steak.', persona=''),
  _row('Hi.', 'I eat no meat.', persona='', labels=('neutral',)),
  _row('Meat?', 'Yes.', 'Really?', 'No.', labels=('', 'consistent')),
)


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
  monkeypatch.setattr(jury, 'ROUND', 128)  # compiling takes most of the time


@pytest.fixture(scope='module')
def config(folder):  # noqa: F811
  config = main.load_config('judges')
  for field, value in {'model': folder, 'rollout.batch': 4}.items():
    main.override(config, field, str(value))
  return config


@pytest.fixture(scope='module')
def opened(config):
  return lab.open_lab(config)


def _silent(count=1):
  del count


def _alone(opened, row, score):
  """What a judge says of one dialogue by itself."""
  said = judge.dialogues(opened.chat, [row])
  return np.asarray(opened.score(score, said))[0]


def test_every_line_gets_its_own_score(opened, config):
  names = ('likelihood_alone', 'verdict')
  judges = jury.open_judges(opened, config.jury, names)
  plain = data.judges(opened.model, opened.chat)
  cue = jnp.asarray(opened.chat.encode(wording.ANY_LINE), jnp.int32)
  direct = {
    'likelihood_alone': rewards.alone(plain.likelihood, cue),
    'verdict': plain.verdict,
  }
  for name in names:
    found = judges[name](ROWS, _silent)
    assert len(found.values) == len(ROWS)
    for row, values in zip(ROWS, found.values, strict=True):
      words = np.array([bool(line) for line in row.lines[1::2]])
      if not row.persona:
        words[0] = False  # nothing was said before it
        assert np.isfinite(values).tolist() == words.tolist()
        continue
      assert np.isfinite(values).tolist() == words.tolist()
      want = _alone(opened, row, direct[name])[1::2]
      np.testing.assert_allclose(values[words], want[words], atol=2e-5)


def test_a_trained_judge_needs_no_persona(opened):
  adapter = lora.init(opened.model.config, jax.random.key(0), rank=2, alpha=4.0)
  learnt = judge.made(opened, adapter)
  score = jury.on_device(
    opened, lambda slots: rewards.trained(jury.within(learnt, slots))
  )
  for row, values in zip(ROWS, score(ROWS, _silent).values, strict=True):
    want = _alone(opened, row, rewards.trained(learnt))[1::2]
    words = np.array([bool(line) for line in row.lines[1::2]])
    assert np.isfinite(values).tolist() == words.tolist()
    np.testing.assert_allclose(values[words], want[words], atol=2e-5)


def test_others_are_the_mean_over_other_personas(opened, config):
  [judge_] = jury.open_judges(
    opened, config.jury, ['likelihood_others']
  ).values()
  [found] = judge_(ROWS[:1], _silent).values
  [likely] = data.judges(opened.model, opened.chat).likelihood.args
  each = [
    _alone(
      opened,
      ROWS[0],
      rewards.likelihood(
        jury.within(
          likely,
          None,
          neutral=jnp.asarray(opened.chat.prompt_ids(text), jnp.int32),
        )
      ),
    )
    for text in jury.OTHERS
  ]
  np.testing.assert_allclose(found, np.mean(each, 0)[1::2], atol=2e-5)


def test_a_pair_is_worth_its_worst(opened, config):
  [score] = jury.open_judges(opened, config.jury, ['verdict']).values()
  row = _row('a', 'Yes.', 'b', 'No.', 'c', 'I think so.', persona='')
  [found] = score([row], _silent).values
  said = judge.dialogues(opened.chat, [row])
  plain = data.judges(opened.model, opened.chat)
  pairs = np.asarray(opened.score(plain.pair_verdict, said))[0]
  want = [pairs[3, 1], min(pairs[5, 1], pairs[5, 3])]
  assert np.isnan(found[0])
  np.testing.assert_allclose(found[1:], want, atol=2e-5)


def test_the_host_is_asked_about_labelled_words_alone():
  asked = []

  def score(asks):
    asked.extend(asks)
    return [float(len(x.history)) for x in asks]

  found = jury.hosted(score)(ROWS, _silent)
  assert [x.line for x in asked if x.persona] == [
    'I bake.',
    'Never.',
    'Ida.',
    *ODD[1:],
    'No.',
  ]
  np.testing.assert_array_equal(found.values[0], [1, 3])
  assert np.isnan(found.values[2]).all()  # no words
  np.testing.assert_array_equal(found.values[-1], [np.nan, 3])
  kept = jury.of_labels(found.values, ROWS)
  assert kept.shape == (sum(len(row.labels) for row in ROWS) - 1,)


@pytest.mark.parametrize(
  ('names', 'why'),
  [
    (['verdct'], "'verdct' is no judge"),
    (['verdict', 'verdict'], 'twice'),
    (['entailment'], 'jury.entailment=hf:org/name'),
    (['remote'], 'jury.server='),
    (['trained'], 'no trained judge ships for'),
  ],
)
def test_a_judge_that_cannot_be_had_is_named(opened, config, names, why):
  with pytest.raises(ValueError, match=why):
    jury.open_judges(opened, config.jury, names)


def test_labelled_lines_are_ours_or_the_users(config, tmp_path):
  rows, about = jury.rows_of(config.jury)
  assert rows == list(labelled.written())
  assert about['dialogues'] == about['lines'] == 1120
  options = config.jury.copy_and_resolve_references()
  with options.unlocked():
    options.examples = 100
  some, about = jury.rows_of(options)
  assert 90 <= len(some) <= 100 and len({x.group for x in some}) == 0.5 * len(
    some
  )
  assert {x.task for x in some} == {x.task for x in rows}
  file = tmp_path / 'mine.jsonl'
  file.write_text('{"persona": "A.", "line": "B.", "label": "contradicts"}\n')
  options = config.jury.copy_and_resolve_references()
  with options.unlocked():
    options.labels = str(file)
    rows, about = jury.rows_of(options)
    assert [row.lines for row in rows] == [(wording.ANY_LINE, 'B.')]
    assert about['source'] == str(file)
    options.released = 'a folder'
  with pytest.raises(ValueError, match='one at a time'):
    jury.rows_of(options)


def test_a_persona_that_contradicts_itself_is_told():
  def score(asks):
    last = lambda x: x.history[-2] if len(x.history) > 1 else ''
    bad = lambda x: 'never' in x.line and 'steak' in last(x)
    return [-9.0 if bad(x) else -5.0 if 'cold' in x.line else 9 for x in asks]

  fit = scorecard.Fit({'between': 1.0}, {'between': 0.0}, 0.5)
  fine = 'You are Ida. You bake. You never eat meat. You feel cold.'
  odd = 'You are Bo. You eat steak. You never eat meat.'
  personas = [fine, odd, odd, 'You.']
  sound = ['You are Al. You run. You hate the cold.']
  [quarrel] = jury.quarrels(jury.hosted(score), fit, personas, sound, _silent)
  assert quarrel.persona == odd and quarrel.sentence == 'I never eat meat.'
  assert quarrel.chance < 0.01  # the cold is as unlikely where all is well
  found = jury.quarrels(jury.hosted(score), fit, personas, [odd], _silent)
  assert not found
