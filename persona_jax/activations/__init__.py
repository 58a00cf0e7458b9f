"""The default in activation space: directions, caps, persona space."""

from persona_jax.activations.directions import Directions
from persona_jax.activations.edits import ablate, cap, steer, stored

__all__ = ['Directions', 'ablate', 'cap', 'steer', 'stored']
