"""One reply to one prompt: the rollout of extraction questions."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from persona_jax.dialogue import Frame
from persona_jax.rollout.converse import converse
from persona_jax.rollout.speaker import Scenario, Speaker


@struct.dataclass
class Reply:
  """A prompt and the line that was said to it."""

  prompt: Int[Array, 'B P']
  prompt_length: Int[Array, ' B']
  tokens: Int[Array, 'B T']
  length: Int[Array, ' B']
  stopped: Bool[Array, ' B']
  logprobs: Float[Array, 'B T']
  raw_logprobs: Float[Array, 'B T']
  kept: Float[Array, 'B ...'] | None  # as `Dialogue.kept`

  @property
  def body(self) -> Int[Array, ' B']:
    """The number of tokens without the stop token."""
    return self.length - self.stopped

  def joined(self):
    """`(tokens, positions, said)`: the text as read, and which is the reply."""
    width = self.tokens.shape[1]
    asked = jnp.arange(self.prompt.shape[1])[None] < self.prompt_length[:, None]
    said = jnp.arange(width)[None] < self.body[:, None]
    tokens = jnp.concatenate([self.prompt, self.tokens], axis=1)
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
  **plan,
) -> Reply:
  """What `speaker` says to each prompt; keys come from `ids`.

  A dialogue of one seat and one line; `plan` as `converse` takes it.
  """
  nothing = jnp.zeros(0, jnp.int32)  # the prompt ends with the cue
  said = converse(
    key,
    (speaker,),
    (Frame(nothing, nothing),),
    Scenario(
      ids=ids,
      samples=jnp.zeros_like(ids),
      prompts=prompt[:, None],
      prompt_length=prompt_length[:, None],
      opening=None,
      opening_length=None,
      live=live,
    ),
    lines=1,
    tokens=tokens,
    **{'chunk': min(prompt.shape[1], 128), **plan},
  )
  return Reply(
    prompt=prompt,
    prompt_length=prompt_length,
    tokens=said.tokens[:, 0],
    length=said.length[:, 0],
    stopped=said.stopped[:, 0],
    logprobs=said.logprobs[:, 0],
    raw_logprobs=said.raw_logprobs[:, 0],
    kept=None if said.kept is None else said.kept[:, 0],
  )
