"""What a judge is worth, against scikit-learn and sums by hand."""

import numpy as np
import pytest
from sklearn import metrics

from persona_jax.analysis import calibration, scorecard, statistics


def _lines(count=400, seed=0, **fields):
  """Pairs of lines: one fits, the other fails in one of two ways."""
  rng = np.random.default_rng(seed)
  fits = np.arange(count) % 2 == 0
  kind = np.where(fits, 'states', rng.choice(['denies', 'breaks'], count))
  kind = np.where(fits & (np.arange(count) % 4 == 0), 'small_talk', kind)
  return scorecard.Lines(
    **{
      'fits': fits,
      'neutral': kind == 'small_talk',
      'kind': kind,
      'task': rng.choice(['chat', 'therapy'], count),
      'scope': np.where(np.arange(count) < count // 4, 'between', 'persona'),
      'group': np.arange(count) // 2,
      'length': rng.integers(1, 40, count),
      'place': rng.integers(1, 12, count),
      'persona': rng.integers(0, 300, count),
      **fields,
    }
  )


def _scores(lines, sharp=1.5, seed=1):
  return np.random.default_rng(seed).normal(sharp * lines.fits)


def test_auc_is_that_of_sklearn_with_ties():
  rng = np.random.default_rng(0)
  scores, positive = (
    rng.integers(0, 7, 300).astype(float),
    rng.random(300) < 0.4,
  )
  want = metrics.roc_auc_score(positive, scores)
  assert statistics.auc(scores, positive) == pytest.approx(want)


def test_a_fit_is_of_each_scope():
  lines = _lines(4000)
  scores = _scores(lines)
  scores[lines.scope == 'between'] *= 10
  fit = scorecard.fitted(scores, lines, alarms=0.1)
  ratio = fit.slopes['persona'] / fit.slopes['between']
  assert ratio == pytest.approx(10, rel=0.2)
  chance = fit.chance(scores, lines.scope)
  card = scorecard.card(chance, lines, fit.threshold)
  assert card['calibration_error'] < 0.03
  assert card['alarms'].mean <= 0.1 + 1e-9


def test_a_threshold_yields_to_false_alarms():
  lines = _lines(4000)
  scores = _scores(lines) - 2.0 * lines.neutral  # it takes them for failures
  fit = scorecard.fitted(scores, lines, alarms=0.05)
  assert 0 < fit.threshold < 0.5
  chance = fit.chance(scores, lines.scope)
  assert np.mean(chance[lines.neutral] < fit.threshold) <= 0.05
  loose = scorecard.fitted(scores, lines, alarms=0.99)
  assert loose.threshold == 0.5


def test_a_judge_the_wrong_way_round_says_nothing():
  lines = _lines()
  fit = scorecard.fitted(-_scores(lines), lines, alarms=0.1)
  assert set(fit.slopes.values()) == {0.0}
  card = scorecard.card(
    fit.chance(-_scores(lines), lines.scope), lines, fit.threshold
  )
  assert card['auc'].mean == 0.5 and not scorecard.informative(card)


def test_a_scope_without_labels_of_both_kinds_has_no_verdict():
  lines = _lines()
  only = lines.rows((lines.scope == 'persona') | lines.fits)
  fit = scorecard.fitted(_scores(only), only, alarms=0.1)
  assert set(fit.slopes) == {'persona'}
  chance = fit.chance(_scores(lines), lines.scope)
  assert np.isnan(chance[lines.scope == 'between']).all()


def test_every_part_is_what_its_lines_say():
  lines = _lines()
  chance = 1 / (1 + np.exp(-_scores(lines)))
  card = scorecard.card(chance, lines, 0.5)
  want = metrics.roc_auc_score(lines.fits, chance)
  assert card['auc'].mean == pytest.approx(want)
  assert card['auc'].low < want < card['auc'].high
  verdicts = chance >= 0.5
  assert card['accuracy'].mean == pytest.approx(np.mean(verdicts == lines.fits))
  assert card['alarms'].mean == pytest.approx(np.mean(~verdicts[lines.neutral]))
  assert card['missed'].mean == pytest.approx(np.mean(verdicts[~lines.fits]))
  assert set(card['errors']) == {'denies', 'breaks'}
  bad = lines.kind == 'breaks'
  rows = bad | (lines.fits & np.isin(lines.group, lines.group[bad]))
  error = card['errors']['breaks']
  assert error['lines'] == bad.sum()
  want = metrics.roc_auc_score(lines.fits[rows], chance[rows])
  assert error['auc'].mean == pytest.approx(want)
  for part in ('tasks', 'length', 'place', 'persona'):
    assert sum(x['lines'] for x in card[part].values()) == len(chance)
  few = (lines.length >= 6) & (lines.length <= 10)
  want = metrics.roc_auc_score(lines.fits[few], chance[few])
  assert card['length']['6–10']['auc'].mean == pytest.approx(want)
  told, found, count = np.array(card['reliability']).T
  assert count.sum() == len(chance)
  assert told @ count / count.sum() == pytest.approx(chance.mean())
  assert found @ count / count.sum() == pytest.approx(lines.fits.mean())


def test_pairs_are_compared_with_their_own():
  lines = _lines(8)
  chance = np.array([0.9, 0.1, 0.2, 0.3, 0.5, 0.5, 0.7, 0.6])
  found = scorecard.within(chance, lines)
  assert found.mean == pytest.approx((1 + 0 + 0.5 + 1) / 4) and found.n == 4
  assert np.isnan(
    scorecard.within(chance[::2], lines.rows(slice(0, 8, 2))).mean
  )


def test_lines_without_a_verdict_are_counted_and_left_out():
  lines = _lines()
  chance = 1 / (1 + np.exp(-_scores(lines)))
  some = chance.copy()
  some[::5] = np.nan
  card = scorecard.card(some, lines, 0.5)
  assert card['none'] == 80 and card['lines'] == 400
  keep = np.isfinite(some)
  want = metrics.roc_auc_score(lines.fits[keep], chance[keep])
  assert card['auc'].mean == pytest.approx(want)
  nothing = scorecard.card(np.full(400, np.nan), lines, 0.5)
  assert nothing == {'lines': 400, 'none': 400}
  assert not scorecard.informative(nothing)


def test_a_judge_that_always_says_the_same_is_told():
  lines = _lines()
  card = scorecard.card(np.full(400, 0.7), lines, 0.5)
  assert card['auc'].mean == 0.5 and not scorecard.informative(card)


def test_a_gain_is_paired():
  lines = _lines(1000)
  chance = 1 / (1 + np.exp(-_scores(lines)))
  worse = np.random.default_rng(3).random(1000)
  found = scorecard.gain(chance, worse, lines)
  want = metrics.roc_auc_score(lines.fits, chance)
  want -= metrics.roc_auc_score(lines.fits, worse)
  assert found.mean == pytest.approx(want) and found.low > 0
  same = scorecard.gain(chance, chance, lines)
  assert same.low == same.high == 0
  nobody = scorecard.gain(chance, np.full(1000, np.nan), lines)
  assert nobody.n == 0 and np.isnan(nobody.mean)


def test_weights_give_each_judge_what_it_knows():
  lines = _lines(4000)
  good, noise = _scores(lines, 2.0, 1), _scores(lines, 0.0, 2)
  other = _scores(lines, 2.0, 4)
  found = calibration.weights(np.stack([good, noise, other], 1), lines.fits)
  assert abs(found[1]) < 0.2 * min(found[0], found[2])
  assert found[0] == pytest.approx(found[2], rel=0.2)
  both = np.stack([good, noise, other], 1) @ found
  assert statistics.auc(both, lines.fits) > statistics.auc(good, lines.fits)
