"""The world of a dialogue: what it answers, rewards and ends.

An environment is a record of arrays with two pure functions of one dialogue,
`jax.vmap`ped by the rollout:

  reset(key, task) -> state
  step(key, state, heard) -> Outcome

`task` is the dialogue's row of `Scenario.task`. `step` comes after each line
that a speaker says. Dialogues that ended are frozen, not reset.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree


class Heard(NamedTuple):
  """A line as the environment hears it: its first `length` tokens."""

  tokens: Int[Array, ' T']
  length: Int[Array, '']  # without the stop token, which may follow
  line: Int[Array, '']  # counted from 0
  who: Int[Array, '']


class Outcome(NamedTuple):
  """What a line led to.

  `words` are the next line where the next seat has no speaker, and are
  dropped elsewhere. `terminated` says that the dialogue came to its end,
  `truncated` that it was cut short; the last line that fits truncates too.
  """

  state: PyTree
  words: Int[Array, ' T']
  length: Int[Array, '']  # 0: it says nothing
  reward: Float[Array, '']
  terminated: Bool[Array, '']
  truncated: Bool[Array, '']


@struct.dataclass
class OpenConversation:
  """Talk without an aim: no words of its own, no reward, no end.

  With `farewells` (rows of token ids, padded with -1) a line that ends with
  one of them ends the dialogue.
  """

  farewells: Int[Array, 'W F'] | None = None

  def reset(self, key: Array, task: Any) -> tuple[()]:
    """Nothing to remember."""
    del key, task
    return ()

  def step(self, key: Array, state: tuple[()], heard: Heard) -> Outcome:
    """Ends the dialogue with a farewell, if there is one."""
    del key
    return Outcome(
      state=state,
      words=jnp.zeros_like(heard.tokens),
      length=jnp.zeros((), jnp.int32),
      reward=jnp.zeros((), jnp.float32),
      terminated=self._farewell(heard),
      truncated=jnp.zeros((), bool),
    )

  def _farewell(self, heard):
    if self.farewells is None:
      return jnp.zeros((), bool)
    size = self.farewells.shape[1]
    length = jnp.sum(self.farewells >= 0, axis=1)
    slot = jnp.arange(size)[None]
    place = heard.length - length[:, None] + slot
    said = heard.tokens[jnp.clip(place, 0, heard.tokens.shape[0] - 1)]
    alike = (said == self.farewells) & (place >= 0) | (slot >= length[:, None])
    return jnp.any(jnp.all(alike, axis=1) & (length > 0))
