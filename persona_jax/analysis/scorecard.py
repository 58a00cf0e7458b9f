"""What a judge is worth on labelled lines: overall, by error, by length."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from persona_jax.analysis import calibration, statistics, validity
from persona_jax.analysis.statistics import Interval

_RESAMPLES = 500
_BINS = {  # by their first number
  'length': {0: '0–5', 6: '6–10', 11: '11–15', 16: '16–25', 26: '26 or more'},
  'place': {1: '1', 2: '2', 3: '3–4', 5: '5–8', 9: '9 or more'},
  'persona': {0: 'none', 1: '1–30', 31: '31–60', 61: '61–120', 121: 'over 120'},
}


class Lines(NamedTuple):
  """Labelled lines, and what they are told apart by."""

  fits: Bool[np.ndarray, ' B']
  neutral: Bool[np.ndarray, ' B']  # neither supports nor contradicts
  kind: Shaped[np.ndarray, ' B']  # how it fits or fails, in a word
  task: Shaped[np.ndarray, ' B']
  scope: Shaped[np.ndarray, ' B']  # 'persona', or 'between' lines
  group: Int[np.ndarray, ' B']  # what is drawn together
  length: Int[np.ndarray, ' B']  # words
  place: Int[np.ndarray, ' B']  # among the speaker's lines, from 1
  persona: Int[np.ndarray, ' B']  # words

  def rows(self, chosen) -> 'Lines':
    """Some of them."""
    return Lines(*(x[chosen] for x in self))


class Fit(NamedTuple):
  """A judge's score as a chance: sigmoid(slope * score + offset), by scope."""

  slopes: dict[str, float]
  offsets: dict[str, float]
  threshold: float  # a line whose chance is lower is said to contradict

  def chance(self, scores, scope) -> Float[np.ndarray, ' B']:
    """P(consistent); NaN where there is no verdict, or no fit."""
    at = lambda of: np.array([of.get(x, np.nan) for x in scope], float)
    with np.errstate(over='ignore'):
      return 1 / (1 + np.exp(-(at(self.slopes) * scores + at(self.offsets))))


def fitted(
  scores: Float[np.ndarray, ' B'], lines: Lines, *, alarms: float
) -> Fit:
  """Platt's fit of a judge, and its threshold.

  That is one half, or less where over a share `alarms` of neutral lines would
  be below it. A judge that points the wrong way gets a slope of zero.
  """
  slopes, offsets = {}, {}
  for scope in np.unique(lines.scope):
    rows = (lines.scope == scope) & np.isfinite(scores)
    fits = lines.fits[rows]
    if not fits.any() or fits.all():
      continue
    slopes[scope], offsets[scope] = calibration.platt(scores[rows], fits)
  fit = Fit(slopes, offsets, 0.5)
  chance = fit.chance(scores, lines.scope)
  neutral = chance[lines.neutral & np.isfinite(chance)]
  if neutral.size:
    most = validity.threshold(neutral, alarms=alarms)
    fit = fit._replace(threshold=min(0.5, most))
  return fit


def card(
  chance: Float[np.ndarray, ' B'], lines: Lines, threshold: float
) -> dict:
  """All that is to be known of a judge whose chances these are.

  Lines without a verdict (NaN) are counted and are in nothing else.
  """
  known = np.isfinite(chance)
  found = {'lines': len(chance), 'none': int((~known).sum())}
  chance, lines = chance[known], lines.rows(known)
  if not len(chance):
    return found
  right = (chance >= threshold) == lines.fits
  return found | {
    'auc': area(chance, lines),
    'within': within(chance, lines),
    'accuracy': share(right, lines.group),
    'calibration_error': validity.calibration_error(chance, lines.fits),
    'reliability': _reliability(chance, lines.fits),
    'alarms': _part(~right, lines, lines.neutral),
    'missed': _part(~right, lines, ~lines.fits),
    'errors': _errors(chance, lines, right),
    'tasks': _by(chance, lines, right, lines.task),
    **{name: _binned(name, chance, lines, right) for name in _BINS},
  }


def informative(record: dict) -> bool:
  """Whether a judge is told from chance: its AUC's interval is above 1/2."""
  auc = record.get('auc')
  return bool(auc and np.isfinite(auc.low) and auc.low > 0.5)


def area(chance, lines: Lines) -> Interval:
  """AUC, its interval over groups."""
  return statistics.auc_interval(chance, lines.fits, lines.group)


def gain(
  chance: Float[np.ndarray, ' B'], other: Float[np.ndarray, ' B'], lines: Lines
) -> Interval:
  """AUC minus another judge's, on the lines of which both say something."""
  both = np.isfinite(chance) & np.isfinite(other)
  chance, other, lines = chance[both], other[both], lines.rows(both)
  if not len(chance):
    return Interval(np.nan, np.nan, np.nan, 0)

  def difference(rows):
    fits = lines.fits[rows]
    return statistics.auc(chance[rows], fits) - statistics.auc(
      other[rows], fits
    )

  return _over_groups(difference, lines.group)


def within(chance, lines: Lines) -> Interval:
  """P(a line that fits scores above one of its group that does not).

  Where a group is a pair of nearly one length, length cannot help.
  """
  best, count = [], []
  for group in np.unique(lines.group):
    rows = lines.group == group
    good, bad = (chance[rows & (lines.fits == x)] for x in (True, False))
    if good.size and bad.size:
      more = np.subtract.outer(good, bad)
      best.append(np.sum(more > 0) + 0.5 * np.sum(more == 0))
      count.append(more.size)
  if not count:
    return Interval(np.nan, np.nan, np.nan, 0)
  ratio = lambda a, b: a.sum() / b.sum()
  return statistics.bootstrap(
    ratio, np.array(best), np.array(count), resamples=_RESAMPLES
  )


def share(which: Bool[np.ndarray, ' B'], group) -> Interval:
  """The share of lines, its interval over groups."""
  return _over_groups(lambda rows: which[rows].mean(), group)


def _part(which, lines, chosen):
  if not chosen.any():
    return None
  return share(which[chosen], lines.group[chosen])


def _reliability(chance, fits, bins: int = 10) -> list:
  """Mean chance, share that fits and number of lines, of bins in use."""
  place = np.minimum((chance * bins).astype(int), bins - 1)
  rows = [place == i for i in np.unique(place)]
  return [
    (float(chance[x].mean()), float(fits[x].mean()), int(x.sum())) for x in rows
  ]


def _errors(chance, lines, right) -> dict:
  """Each way to fail, against what fits in the same groups, or at all."""
  found = {}
  for kind in np.unique(lines.kind[~lines.fits]):
    bad = ~lines.fits & (lines.kind == kind)
    good = lines.fits & np.isin(lines.group, lines.group[bad])
    rows = bad | (good if good.any() else lines.fits)
    found[str(kind) or 'contradicts'] = {
      'lines': int(bad.sum()),
      'auc': area(chance[rows], lines.rows(rows)),
      'within': within(chance[rows], lines.rows(rows)),
      'missed': _part(~right, lines, bad),
    }
  return found


def _by(chance, lines, right, parts) -> dict:
  found = {}
  for part in dict.fromkeys(parts.tolist()):
    rows = parts == part
    found[str(part)] = {
      'lines': int(rows.sum()),
      'auc': area(chance[rows], lines.rows(rows)),
      'accuracy': share(right[rows], lines.group[rows]),
      'reliability': _reliability(chance, lines.fits),
      'alarms': _part(~right, lines, rows & lines.neutral),
    }
  return found


def _binned(name, chance, lines, right) -> dict:
  starts, names = zip(*_BINS[name].items(), strict=True)
  place = np.searchsorted(starts, getattr(lines, name), 'right') - 1
  found = _by(chance, lines, right, np.array(names)[place])
  return {name: found[name] for name in names if name in found}


def _over_groups(statistic, group) -> Interval:
  groups = [np.flatnonzero(group == g) for g in np.unique(group)]
  over = lambda chosen: statistic(np.concatenate([groups[i] for i in chosen]))
  return statistics.bootstrap(
    over, np.arange(len(groups)), resamples=_RESAMPLES
  )
