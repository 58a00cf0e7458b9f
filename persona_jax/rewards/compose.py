"""Rewards add up as transformations chain."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from persona_jax.dialogue import Dialogue
from persona_jax.shapes import Array, Float, Key

Reward = Callable[[Dialogue], Float[Array, 'B N']]


def weighted(terms: dict[str, tuple[float, Reward]]) -> Reward:
  """Adds rewards: `weighted({'line': (1.0, line_to_line), ...})`.

  Raises:
    ValueError: there is no term.
  """
  if not terms:
    raise ValueError('weighted({}) has no term; give at least one reward.')
  weights = {name: jnp.float32(weight) for name, (weight, _) in terms.items()}
  rewards = {name: _as_leaves(fn) for name, (_, fn) in terms.items()}
  return Partial(_add, weights, rewards)


def shuffled(
  rewards: Float[Array, 'B N'], key: Key[Array, '']
) -> Float[Array, 'B N']:
  """A control: the same rewards, each line's dealt out to other dialogues."""
  lines = jnp.arange(rewards.shape[1])
  keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(lines)
  return jax.vmap(jax.random.permutation, in_axes=(0, 1), out_axes=1)(
    keys, rewards
  )


def _as_leaves(reward):
  # A plain function is no argument of a jitted program; a Partial is.
  return reward if isinstance(reward, Partial) else Partial(reward)


def _add(weights, rewards, dialogue):
  return sum(weights[name] * rewards[name](dialogue) for name in rewards)
