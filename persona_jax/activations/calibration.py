"""From a distribution of projections to the bounds of a cap."""

import numpy as np
from jaxtyping import Float

SIDES = PERSONA, ASSISTANT = 'persona', 'assistant'
QUARTILE = 25  # of the side that the cap holds (paper, appendix G.4)


def bounds(
  projections: Float[np.ndarray, 'N L'],
  *,
  hold: str,
  band: tuple[int, int],
  percentile: float = QUARTILE,
) -> tuple[Float[np.ndarray, ' L'], Float[np.ndarray, ' L']]:
  """`(low, high)` by layer for projections measured toward the Assistant.

  hold='assistant' is the paper's cap: a floor at the 75th percentile of the
  Assistant-ward projection (its released files call it "p0.25", since they
  measure away from the Assistant). hold='persona' is its mirror image, which
  keeps a persona from sliding toward the Assistant: a ceiling at the 25th.
  A smaller `percentile` is a stronger cap on either side. Layers outside the
  half-open `band` stay free.

  Raises:
    ValueError: an unknown side, or a band that does not fit the layers.
  """
  layers = projections.shape[1]
  if hold not in SIDES:
    raise ValueError(
      f'hold={hold!r} is no side of the axis; give {PERSONA!r} (a ceiling) '
      f'or {ASSISTANT!r} (a floor).'
    )
  first, last = band
  if not 0 <= first < last <= layers:
    raise ValueError(
      f'the band [{first}, {last}) does not lie in the {layers} layers.'
    )
  low = np.full(layers, -np.inf, np.float32)
  high = np.full(layers, np.inf, np.float32)
  inside = slice(first, last)
  if hold == PERSONA:
    high[inside] = np.percentile(projections[:, inside], percentile, axis=0)
  else:
    low[inside] = np.percentile(
      projections[:, inside], 100 - percentile, axis=0
    )
  return low, high


def random_axis(
  seed: int, axis: Float[np.ndarray, 'L D']
) -> Float[np.ndarray, 'L D']:
  """A control: a random direction a layer, as long as `axis` there."""
  rng = np.random.default_rng(seed)
  other = rng.standard_normal(axis.shape).astype(np.float32)
  length = np.linalg.norm(axis, axis=1, keepdims=True)
  return other / np.linalg.norm(other, axis=1, keepdims=True) * length
