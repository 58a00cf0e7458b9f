"""Who speaks, about what: the inputs of a rollout."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int, Key, PyTree

from persona_jax.rollout.sampling import Sampling


@struct.dataclass
class Speaker:
  """A voice: a model as functions, its variables, its way of sampling.

  The functions are static: build them once, or every call compiles anew.
  Give unstacked variables (`trees.unstack_layers`): decoding reads each
  layer's weights where they lie.

  `who` names the seats that it speaks for, by default the one of its place
  among the speakers. One that speaks for two seats reads its weights once for
  both; `sampling` may then be a pair, and `own` holds collections that differ,
  their leaves with an axis of seats in front (`edits.by_seat`).
  """

  variables: PyTree
  sampling: Sampling | tuple[Sampling, ...]
  apply: Callable = struct.field(pytree_node=False)
  unembed: Callable = struct.field(pytree_node=False)
  memory: Callable = struct.field(pytree_node=False)  # (batch, size) -> cache
  who: tuple[int, ...] = struct.field(pytree_node=False, default=())
  own: PyTree = None

  def read(self, cache, tokens, positions, seat):
    """The normed hidden states of each row's seat, and the cache with them."""
    variables = self.variables
    if self.own is not None:
      place = jnp.argmax(seat[:, None] == jnp.array(self.who)[None], axis=1)
      own = jax.tree.map(lambda x: x[place], self.own)
      variables = {**variables, **own}
    return self.apply(variables, tokens, positions, cache)

  def logits(self, hidden):
    """float32 logits of the next token."""
    return self.unembed(self.variables, hidden)


@struct.dataclass
class Scenario:
  """B beginnings of a dialogue of K seats: their prompts and the first line.

  A prompt holds all tokens before the first line (`Chat.prompt_ids`); the
  opener's prompt ends with the cue that it answers. Without an opening
  (`opening=None`) the first line is spoken too. `task` is what the environment
  is told of each row.
  """

  ids: Int[Array, ' B']
  samples: Int[Array, ' B']  # tells apart dialogues of the same scenario
  prompts: Int[Array, 'B K P']
  prompt_length: Int[Array, 'B K']
  opening: Int[Array, 'B T'] | None
  opening_length: Int[Array, ' B'] | None
  live: Bool[Array, ' B']
  task: Any = None

  def keys(self, key: Key[Array, '']) -> Key[Array, ' B']:
    """A key per row, by scenario and sample, never by place in the batch."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    by_scenario = fold(key, self.ids)
    return jax.vmap(jax.random.fold_in)(by_scenario, self.samples)


def take(scenario: Scenario, rows: Int[Array, ' R']) -> Scenario:
  """Some rows of `scenario`."""
  return jax.tree.map(lambda x: jnp.asarray(x)[rows], scenario)
