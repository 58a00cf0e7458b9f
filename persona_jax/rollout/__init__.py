"""Whole conversations in one compiled program."""

from persona_jax.rollout.converse import converse
from persona_jax.rollout.reply import Reply, reply
from persona_jax.rollout.sampling import Sampling
from persona_jax.rollout.speaker import Scenario, Speaker

__all__ = ['Reply', 'Sampling', 'Scenario', 'Speaker', 'converse', 'reply']
