"""The learner: advantages, losses, and one step for every algorithm."""

from persona_jax.learn.advantages import group_relative, leave_one_out
from persona_jax.learn.algorithms import ALGORITHMS, Algorithm
from persona_jax.learn.losses import Batch, clipped_loss
from persona_jax.learn.step import TrainState, init_state, train_step

__all__ = [
  'ALGORITHMS',
  'Algorithm',
  'Batch',
  'TrainState',
  'clipped_loss',
  'group_relative',
  'init_state',
  'leave_one_out',
  'train_step',
]
