"""What dialogues show: drift, intervals, calibration, degenerate text."""

from persona_jax.analysis.statistics import (
  Interval,
  auc,
  bootstrap,
  drift_slope,
)

__all__ = ['Interval', 'auc', 'bootstrap', 'drift_slope']
