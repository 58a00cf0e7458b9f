"""One reply to one prompt: the rollout of extraction questions."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int, Key

from persona_jax.rollout import line as lines_
from persona_jax.rollout.line import Line
from persona_jax.rollout.speaker import Speaker


@struct.dataclass
class Reply:
  """A prompt and the line that was said to it."""

  line: Line
  prompt: Int[Array, 'B P']
  prompt_length: Int[Array, ' B']

  def joined(self):
    """`(tokens, positions, said)`: the text as read, and which is the reply."""
    width = self.line.tokens.shape[1]
    asked = jnp.arange(self.prompt.shape[1])[None] < self.prompt_length[:, None]
    said = jnp.arange(width)[None] < self.line.body[:, None]
    tokens = jnp.concatenate([self.prompt, self.line.tokens], axis=1)
    valid = jnp.concatenate([asked, said], axis=1)
    count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    positions = jnp.where(valid, count - 1, -1)
    return tokens, positions, valid & ~jnp.pad(asked, ((0, 0), (0, width)))


def reply(
  key: Key[Array, ''],
  speaker: Speaker,
  prompt: Int[Array, 'B P'],
  prompt_length: Int[Array, ' B'],
  ids: Int[Array, ' B'],
  live: Bool[Array, ' B'],
  *,
  tokens: int,
) -> Reply:
  """What `speaker` says to each prompt; keys come from `ids`."""
  valid = jnp.arange(prompt.shape[1])[None] < prompt_length[:, None]
  size = prompt.shape[1] + tokens
  hidden, memory = lines_.prefill(speaker, prompt, valid & live[:, None], size)
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)
  line, _ = lines_.speak(keys, speaker, memory, hidden, live, tokens)
  return Reply(line, prompt, prompt_length)
