"""Directions that say what they are, in one safetensors file."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float

TOWARD = 'toward_assistant'
_SIGNS = (TOWARD, 'away_from_assistant')


@dataclasses.dataclass(frozen=True)
class Directions:
  """One vector a layer, with all that its use depends on."""

  vectors: Float[np.ndarray, 'L D']  # not normalised
  model: str
  sha256: str  # of the weights that the vectors were measured on
  sign: str = TOWARD
  site: str = 'resid'  # output of the decoder block, before any norm
  layer_base: int = 0  # row 0 is block 0
  pooling: str = 'mean over response tokens'
  low: Float[np.ndarray, ' L'] | None = None  # bounds on the unit vector
  high: Float[np.ndarray, ' L'] | None = None
  first_position: int = 0  # of the text, from which on the bounds hold
  calibration: str = ''  # which distribution and percentile gave the bounds

  def __post_init__(self):
    if self.sign not in _SIGNS:
      raise ValueError(f'sign={self.sign!r} is none of {_SIGNS}.')

  def toward_assistant(self) -> Float[np.ndarray, 'L D']:
    """The vectors, turned if need be."""
    return self.vectors if self.sign == TOWARD else -self.vectors

  def save(self, path: str | Path):
    """Writes all fields to `path`, whole or not at all."""
    from safetensors import numpy as safetensors

    arrays, words = {}, {}
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, np.ndarray):
        arrays[field.name] = np.ascontiguousarray(value)  # else scrambled
      elif value is not None:
        words[field.name] = json.dumps(value)
    data = safetensors.save(arrays, metadata=words)
    path = Path(path)
    fresh = path.with_name(path.name + '.partial')
    fresh.write_bytes(data)
    os.replace(fresh, path)

  @classmethod
  def load(cls, path: str | Path) -> 'Directions':
    """Reads what `save` wrote.

    Raises:
      ValueError: the file does not say what its vectors are.
    """
    from safetensors import SafetensorError, safe_open

    try:
      with safe_open(path, framework='numpy') as file:
        words = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
      raise ValueError(
        f'{path} is no whole safetensors file: {error}; write it again.'
      ) from error
    missing = {'model', 'sha256', 'sign'} - set(words)
    if missing or 'vectors' not in arrays:
      raise ValueError(
        f'{path} holds no described directions (missing: '
        f'{sorted(missing) or "vectors"}); save them with Directions.save.'
      )
    return cls(**arrays, **{k: json.loads(v) for k, v in words.items()})
