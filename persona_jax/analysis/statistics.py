"""Means with bootstrap intervals over dialogues, slopes, and AUC."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped

_RESAMPLES = 2000


class Interval(NamedTuple):
  """A statistic with its 95 % bootstrap interval over `n` units."""

  mean: float
  low: float
  high: float
  n: int

  @property
  def excludes_zero(self) -> bool:
    """Whether the interval lies on one side of zero."""
    return self.low > 0 or self.high < 0


def bootstrap(
  statistic: Callable,
  *data: Shaped[np.ndarray, 'B ...'],
  seed: int = 0,
  resamples: int = _RESAMPLES,
) -> Interval:
  """`statistic(*data)` with a percentile interval over rows of `data`.

  Rows are dialogues and are drawn together from every array, so differences
  of arms that share scenarios are paired. Resamples in which the statistic is
  undefined are left out; `statistic` gets rows, and gives one number. One row
  has no interval: its bounds are NaN.

  Raises:
    ValueError: the arrays have different numbers of rows, or none.
  """
  rows = {len(x) for x in data}
  if len(rows) != 1 or not min(rows):
    raise ValueError(f'bootstrap needs equal, non-empty rows; got {rows}.')
  n = rows.pop()
  draws = np.random.default_rng(seed).integers(0, n, (resamples, n))
  with np.errstate(invalid='ignore', divide='ignore'):
    values = np.array([statistic(*(x[d] for x in data)) for d in draws])
    middle = float(statistic(*data))
  values = values[np.isfinite(values)]
  if n < 2 or not values.size:
    return Interval(middle, np.nan, np.nan, n)
  low, high = np.percentile(values, [2.5, 97.5])
  return Interval(middle, float(low), float(high), n)


def mean_by_dialogue(
  values: Float[np.ndarray, 'B N'], mask: Bool[np.ndarray, 'B N']
) -> Interval:
  """Mean over all masked lines, its interval over dialogues."""
  return bootstrap(_pooled_mean, values, mask)


def paired_difference(
  values: Float[np.ndarray, 'B N'],
  mask: Bool[np.ndarray, 'B N'],
  other: Float[np.ndarray, 'B N'],
  other_mask: Bool[np.ndarray, 'B N'],
) -> Interval:
  """Mean of `values` minus mean of `other`, dialogues drawn in pairs."""

  def difference(a, a_mask, b, b_mask):
    return _pooled_mean(a, a_mask) - _pooled_mean(b, b_mask)

  return bootstrap(difference, values, mask, other, other_mask)


def drift_slope(
  values: Float[np.ndarray, 'B N'],
  mask: Bool[np.ndarray, 'B N'],
  line: Num[np.ndarray, ' N'],
) -> Interval:
  """Least-squares slope of `values` by line number, over all dialogues."""
  where = np.broadcast_to(line, values.shape)

  def slope(y, keep):
    x = where[: len(y)][keep].astype(float)
    y = y[keep]
    x = x - x.mean()
    return (x @ y) / (x @ x)

  return bootstrap(slope, values, mask)


def auc(
  scores: Float[np.ndarray, ' B'], positive: Bool[np.ndarray, ' B']
) -> float:
  """P(a positive scores above a negative), ties counting half."""
  if positive.all() or not positive.any():
    return float('nan')
  order = np.sort(scores)
  ranks = 0.5 * (  # the mean of those that a score shares
    np.searchsorted(order, scores) + np.searchsorted(order, scores, 'right') + 1
  )
  count = positive.sum()
  below = ranks[positive].sum() - count * (count + 1) / 2
  return float(below / (count * (~positive).sum()))


def auc_interval(scores, positive, cluster) -> Interval:
  """AUC, its interval over clusters of rows that belong together."""
  groups = [np.flatnonzero(cluster == c) for c in np.unique(cluster)]

  def over(chosen):
    rows = np.concatenate([groups[i] for i in chosen])
    return auc(scores[rows], positive[rows])

  return bootstrap(over, np.arange(len(groups)), resamples=500)


def _pooled_mean(values, mask):
  return values[mask].mean() if mask.any() else np.nan
