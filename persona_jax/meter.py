"""What the updates of a step tell, the work that they were, and its pace."""

import resource
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from persona_jax import chips, costs


class Work(NamedTuple):
  """What was learned from, padding left out; a row that comes twice is two."""

  tokens: jax.Array | float
  pairs: jax.Array | float  # of a token and one that it attends to
  learned: jax.Array | float  # tokens that are predicted


def work(batch) -> Work:
  """The work of one update."""
  seen = jnp.maximum(batch.positions + 1, 0)  # by each token, itself too
  return Work(
    tokens=jnp.sum(seen > 0, dtype=jnp.float32),
    pairs=jnp.sum(seen, dtype=jnp.float32),
    learned=jnp.sum(batch.mask, dtype=jnp.float32),
  )


class Learned(NamedTuple):
  """What the updates of a step tell; numbers that may be on their way."""

  found: list[dict[str, jax.Array]]

  @property
  def here(self) -> list[dict[str, float]]:
    """The metrics of each update; waits for them."""
    return [
      {k: float(x) for k, x in told.items() if not k.startswith('work/')}
      for told in self.found
    ]

  @property
  def work(self) -> Work:
    """The work of all updates; waits for it."""
    total = lambda k: sum(float(told[f'work/{k}']) for told in self.found)
    return Work(**{k: total(k) for k in Work._fields})

  @property
  def changed(self) -> bool:
    """Whether the states are others than before; waits for it."""
    return any(bool(told['step/fine']) for told in self.found)


class Passes(NamedTuple):
  """Forward passes of a step, a backward pass being two."""

  once: float  # over all that was said
  learned: float  # in every update
  logits: int  # of a token that is predicted


class Meter:
  """The pace of a run's steps; the peak is that of bfloat16."""

  def __init__(self, config, passes: Passes, epochs: int):
    self._config, self._passes, self._epochs = config, passes, epochs
    chip = chips.of(jax.devices()[0].device_kind)
    self._peak = chip and chip.flops * jax.device_count()
    self._last = time.monotonic()

  def read(self, work: Work) -> dict[str, float]:
    """Seconds since the step before, and what was done in them.

    FLOPs are those that the model needs for its tokens, whatever was padded,
    masked, computed again or shared; those of judges are not counted.
    """
    now = time.monotonic()
    seconds, self._last = now - self._last, now
    passes = self._passes.once / self._epochs + self._passes.learned
    logits = self._passes.logits
    flops = passes * _forward(self._config, work, logits) / seconds
    found = {
      'pace/seconds': seconds,
      'pace/tokens': work.tokens / self._epochs / seconds,
      'pace/tflops': flops / 1e12,
      'pace/memory_gib': _memory() / chips.GIB,
    }
    if self._peak:
      found['pace/mfu'] = flops / self._peak
    return found


def _forward(config, work, logits):
  """FLOPs of one pass over what was learned from."""
  weights = costs.products(config).all * config.layers
  heard = 2 * config.heads * config.head_dim * config.layers
  said = logits * config.features
  return 2.0 * (
    work.tokens * weights + work.pairs * heard + work.learned * said
  )


def _memory():
  """The most that a device of this process has held, in bytes.

  Where devices do not tell, as a CPU's, it is the most of the process.
  """
  stats = [x.memory_stats() or {} for x in jax.local_devices()]
  peaks = [x['peak_bytes_in_use'] for x in stats if 'peak_bytes_in_use' in x]
  if peaks:
    return max(peaks)
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
