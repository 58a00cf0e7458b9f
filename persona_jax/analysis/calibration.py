"""How far a judge can be believed, on lines with known labels."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from persona_jax.analysis import statistics

_STEPS = 50  # Newton steps; a two-parameter fit takes about eight
_RIDGE = 1e-2  # keeps slopes finite on separable labels
_TINY = 1e-9  # and the offset


class Calibration(NamedTuple):
  """A judge's score as a chance of consistency, and its AUC."""

  auc: statistics.Interval
  slope: float  # P(consistent) = sigmoid(slope * score + offset)
  offset: float
  labelled: int
  by_error: dict[str, statistics.Interval]

  @property
  def informative(self) -> bool:
    """Whether the AUC's interval lies above one half."""
    return self.auc.low > 0.5

  def chance(self, scores: Float[np.ndarray, '*B']) -> Float[np.ndarray, '*B']:
    """P(consistent) for raw scores."""
    return 1 / (1 + np.exp(-(self.slope * scores + self.offset)))


def calibrate(
  scores: Float[np.ndarray, ' B'],
  consistent: Bool[np.ndarray, ' B'],
  errors: list[str],
  cluster,
) -> Calibration:
  """Platt's fit and the AUC, overall and against each type of error.

  `cluster` tells which rows share a persona: intervals are over those. A
  judge that points the wrong way gets slope zero, so that it rewards nothing.
  """
  slope, offset = platt(scores, consistent)
  by_error = {}
  for error in sorted(set(errors) - {'none', ''}):
    rows = consistent | np.array([e == error for e in errors])
    by_error[error] = statistics.auc_interval(
      scores[rows], consistent[rows], cluster[rows]
    )
  return Calibration(
    auc=statistics.auc_interval(scores, consistent, cluster),
    slope=slope,
    offset=offset,
    labelled=len(scores),
    by_error=by_error,
  )


def platt(
  scores: Float[np.ndarray, ' B'], consistent: Bool[np.ndarray, ' B']
) -> tuple[float, float]:
  """Slope and offset of `Calibration`; slope 0 for a judge that is wrong."""
  [slope], offset = _logistic(scores[:, None], consistent)
  if slope < 0:
    return 0.0, _logit(consistent.mean())
  return float(slope), offset


def weights(
  scores: Float[np.ndarray, 'B J'], consistent: Bool[np.ndarray, ' B']
) -> Float[np.ndarray, ' J']:
  """Weights of judges under which their sum foretells best."""
  slopes, _ = _logistic(scores, consistent)
  return slopes


def _logistic(x, y):
  """Slopes and offset of a logistic regression, by Newton's method."""
  centre, scale = x.mean(0), np.maximum(x.std(0), 1e-8)
  design = np.concatenate([(x - centre) / scale, np.ones((len(x), 1))], 1)
  weights = np.zeros(design.shape[1])
  ridge = np.diag([*[_RIDGE] * x.shape[1], _TINY])
  for _ in range(_STEPS):
    chance = 1 / (1 + np.exp(-design @ weights))
    gradient = design.T @ (chance - y) + ridge @ weights
    curve = (design * (chance * (1 - chance))[:, None]).T @ design + ridge
    weights = weights - np.linalg.solve(curve, gradient)
  slopes = weights[:-1] / scale
  return slopes, float(weights[-1] - slopes @ centre)


def _logit(p):
  return float(np.log(p / (1 - p)))
