"""Whole conversations in one compiled program."""

from persona_jax.rollout.converse import STATIC, converse, converse_counted
from persona_jax.rollout.environment import OpenConversation
from persona_jax.rollout.reply import Reply, reply
from persona_jax.rollout.sampling import Sampling
from persona_jax.rollout.speaker import Scenario, Speaker, bucketed
from persona_jax.rollout.stops import stop_strings

__all__ = [
  'STATIC',
  'OpenConversation',
  'Reply',
  'Sampling',
  'Scenario',
  'Speaker',
  'bucketed',
  'converse',
  'converse_counted',
  'reply',
  'stop_strings',
]
