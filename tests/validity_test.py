"""Calibration and agreement against sums by hand and scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics

from persona_jax.analysis import validity


def _drawn(count=4000, sharp=1.0, seed=0):
  """Scores, and what is: the chance of it is sigmoid(score / sharp)."""
  rng = np.random.default_rng(seed)
  scores = rng.normal(0, 3, count)
  chance = 1 / (1 + np.exp(-scores / sharp))
  return scores, rng.random(count) < chance, chance


def test_the_error_is_the_sum_by_hand():
  chance = np.array([0.05, 0.15, 0.95, 0.85, 1.0])
  positive = np.array([False, True, True, False, True])
  # Ten bins: 0.05 | 0.15 | 0.85 | 0.95 and 1.0
  apart = abs(0.05) + abs(0.15 - 1) + abs(0.85) + abs(1.95 - 2)
  found = validity.calibration_error(chance, positive, bins=10)
  assert found == pytest.approx(apart / 5)


def test_true_chances_are_calibrated_and_sharp_ones_are_not():
  _, positive, chance = _drawn(40000)
  assert validity.calibration_error(chance, positive) < 0.01
  sharper = chance**3 / (chance**3 + (1 - chance) ** 3)
  assert validity.calibration_error(sharper, positive) > 0.05


@pytest.mark.parametrize('bad', [np.zeros(0), np.array([0.5, 1.2])])
def test_what_is_no_chance_is_named(bad):
  with pytest.raises(ValueError, match='each within 0 to 1'):
    validity.calibration_error(bad, np.zeros(len(bad), bool))


@pytest.mark.parametrize('sharp', [0.3, 1.0, 4.0])
def test_the_temperature_is_found(sharp):
  scores, positive, _ = _drawn(40000, sharp)
  found = validity.temperature(scores, positive)
  assert found == pytest.approx(sharp, rel=0.05)
  loss = lambda t: metrics.log_loss(positive, 1 / (1 + np.exp(-scores / t)))
  assert loss(found) <= min(loss(0.98 * found), loss(1.02 * found))


def test_a_judge_the_wrong_way_round_says_nothing():
  scores, positive, _ = _drawn()
  found = validity.temperature(-scores, positive)
  assert np.ptp(1 / (1 + np.exp(scores / found))) < 1e-3


def test_a_threshold_gives_so_many_false_alarms():
  fine = np.linspace(0.01, 1, 100)
  at = validity.threshold(fine, alarms=0.1)
  assert np.mean(fine < at) == pytest.approx(0.1)
  assert validity.threshold(fine, alarms=0.0) == fine.min()
  assert validity.threshold(fine, alarms=1.0) == np.inf
  with pytest.raises(ValueError, match='alarms=1.5'):
    validity.threshold(fine, alarms=1.5)


def test_kappa_is_that_of_sklearn():
  rng = np.random.default_rng(0)
  left = rng.random(300) < 0.3
  right = np.where(rng.random(300) < 0.7, left, rng.random(300) < 0.5)
  want = metrics.cohen_kappa_score(left, right)
  assert validity.kappa(left, right) == pytest.approx(want)
  assert np.isnan(validity.kappa(np.ones(4, bool), np.ones(4, bool)))
