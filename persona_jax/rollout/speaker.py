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

  With `captures` its `apply` is one of `taps.keep`, and what it keeps of each
  token it says, `[L B T ...]`, is in `Dialogue.kept`; with `sums` too, only its
  sum over a line: memory for whole activations, `[L B T D]`.
  """

  variables: PyTree
  sampling: Sampling | tuple[Sampling, ...]
  apply: Callable = struct.field(pytree_node=False)
  unembed: Callable = struct.field(pytree_node=False)
  memory: Callable = struct.field(pytree_node=False)  # (batch, size) -> a Cache
  who: tuple[int, ...] = struct.field(pytree_node=False, default=())
  captures: bool = struct.field(pytree_node=False, default=False)
  sums: bool = struct.field(pytree_node=False, default=False)
  own: PyTree = None

  def read(self, cache, tokens, positions, seat):
    """`(hidden, cache, kept)`: the text read on, as each row's seat does."""
    variables = self.variables
    if self.own is not None:
      place = jnp.argmax(seat[:, None] == jnp.array(self.who)[None], axis=1)
      own = jax.tree.map(lambda x: x[place], self.own)
      variables = {**variables, **own}
    out = self.apply(variables, tokens, positions, cache)
    if self.captures:
      (hidden, cache), kept = out
      return hidden, cache, kept
    return *out, None

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


def bucket(size: int) -> int:
  """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not below `size`."""
  power = 1 << max(size - 1, 0).bit_length()
  return power * 3 // 4 if 4 <= power and size <= power * 3 // 4 else power


def bucketed(scenario: Scenario, *, tokens: int) -> Scenario:
  """`scenario` in a shape that many share: few programs for an epoch.

  Prompts and rows are rounded up (`bucket`), openings take `tokens`, the room
  of a line. Added rows are not live: `[:rows]` of what comes out is yours. A
  speaker's `Sampling` is for all rows, those with them.

  Raises:
    ValueError: no rows, or an opening is longer than `tokens`.
  """
  rows, _, room = scenario.prompts.shape
  if rows == 0:
    raise ValueError('the scenario has no rows; give at least one dialogue.')
  more = bucket(rows) - rows
  full = jax.tree.map(
    lambda x: jnp.concatenate([x, jnp.repeat(x[:1], more, axis=0)]), scenario
  )
  wide = lambda x, size: jnp.pad(
    x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]
  )
  opening = full.opening
  if opening is not None and opening.shape[1] > tokens:
    raise ValueError(
      f'the openings have room for {opening.shape[1]} tokens, more than the '
      f'{tokens} of a line; shorten them or raise the limit.'
    )
  return full.replace(
    prompts=wide(full.prompts, bucket(room)),
    opening=None if opening is None else wide(opening, tokens),
    live=full.live & (jnp.arange(rows + more) < rows),
  )
