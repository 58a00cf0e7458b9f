"""Whether a judge's chances are chances, and whether judges agree."""

import numpy as np
from jaxtyping import Bool, Float

_TIGHT = 80  # halvings of the range that a temperature is looked for in


def calibration_error(
  chance: Float[np.ndarray, ' B'],
  positive: Bool[np.ndarray, ' B'],
  *,
  bins: int = 15,
) -> float:
  """Mean distance of what is foretold from what is, over bins of equal width.

  (Expected calibration error, https://arxiv.org/abs/1706.04599, equation 3.)

  Raises:
    ValueError: there are no rows, or a chance lies outside 0 to 1.
  """
  if not len(chance) or chance.min() < 0 or chance.max() > 1:
    raise ValueError(
      f'{len(chance)} chances from {np.min(chance, initial=1)} to '
      f'{np.max(chance, initial=0)}; give some, each within 0 to 1.'
    )
  place = np.minimum((chance * bins).astype(int), bins - 1)
  apart = np.bincount(place, chance - positive, minlength=bins)
  return float(np.abs(apart).sum() / len(chance))


def temperature(
  scores: Float[np.ndarray, ' B'], positive: Bool[np.ndarray, ' B']
) -> float:
  """T > 0 under which sigmoid(score / T) makes what is likeliest.

  (Temperature scaling, https://arxiv.org/abs/1706.04599, section 4.2.) A judge
  that points the wrong way gets a T so large that it says nothing.
  """
  scores = scores.astype(float)

  def slope(inverse):  # of the log-likelihood, which is concave
    chance = 1 / (1 + np.exp(-np.clip(inverse * scores, -500, 500)))
    return np.sum((positive - chance) * scores)

  low, high = np.log(1e-6), np.log(1e6)
  for _ in range(_TIGHT):
    middle = (low + high) / 2
    low, high = (middle, high) if slope(np.exp(middle)) > 0 else (low, middle)
  return float(np.exp(-(low + high) / 2))


def threshold(chance: Float[np.ndarray, ' B'], *, alarms: float = 0.1) -> float:
  """The highest below which at most a share `alarms` of the chances lies.

  Of lines that are fine: at this threshold as many are false alarms.

  Raises:
    ValueError: there are none, or `alarms` lies outside 0 to 1.
  """
  if not len(chance) or not 0 <= alarms <= 1:
    raise ValueError(
      f'{len(chance)} chances and alarms={alarms}; give chances of lines that '
      'are fine, and a share within 0 to 1.'
    )
  order = np.sort(chance)
  most = int(alarms * len(order))
  return float(order[most]) if most < len(order) else float('inf')


def kappa(left: Bool[np.ndarray, ' B'], right: Bool[np.ndarray, ' B']) -> float:
  """Cohen's kappa of two judges' verdicts; NaN where chance explains all."""
  same = np.mean(left == right)
  both = left.mean() * right.mean() + (~left).mean() * (~right).mean()
  return float((same - both) / (1 - both)) if both < 1 else float('nan')
