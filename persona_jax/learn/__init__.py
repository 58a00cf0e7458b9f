"""The learner: advantages, losses, and one step for every algorithm."""

from persona_jax.learn.advantages import Advantages, Earned
from persona_jax.learn.algorithms import (
  ALGORITHMS,
  PREFERENCES,
  Algorithm,
  Preference,
)
from persona_jax.learn.losses import Batch, clipped_loss
from persona_jax.learn.step import (
  TrainState,
  init_state,
  policy_loss,
  train_step,
)

__all__ = [
  'ALGORITHMS',
  'PREFERENCES',
  'Advantages',
  'Algorithm',
  'Batch',
  'Earned',
  'Preference',
  'TrainState',
  'clipped_loss',
  'init_state',
  'policy_loss',
  'train_step',
]
