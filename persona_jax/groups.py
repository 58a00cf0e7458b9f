"""Rows of a batch that belong together, and rows that are learned together."""

from collections.abc import Callable

import jax
import numpy as np

from persona_jax import dialogue as dialogues
from persona_jax import learn
from persona_jax.dialogue import Frame


def alike(config, frame: Frame, ways: int) -> tuple[int, int]:
  """`(group, room)`: neighbours whose texts begin alike, in at most some slots.

  Dialogues of one scenario begin with its prompt and opening, pairs of replies
  with their prompt. Groups of one where whole ones do not divide over the
  minibatches, their microbatches and the `ways` of the mesh, where attention
  is by a kernel of the user's choice, or where `rl.share` is off.
  """
  rl, size = config.rl, config.rollout
  parts = ways * rl.microbatches
  if rl.algorithm in learn.PREFERENCES:
    group = learn.PREFERENCES[rl.algorithm].replies
    count, room = size.batch, size.prompt_tokens
  else:
    group, count = rl.group, size.batch // rl.group
    between = jax.tree.map(lambda x: x[0], dialogues.pieces(frame))
    room = dialogues.slots(size.prompt_tokens, between, 1, size.tokens)
    parts *= rl.minibatches
  shares = rl.share and not config.attend and count % parts == 0
  return (group if shares else 1), room


def minibatches(rows: int, count: int, epochs: int, group: int = 1) -> Callable:
  """`step -> rows of each update`: shuffled rounds of `count` equal parts.

  One part is all rows in their order. Neighbours stay in their groups.

  Raises:
    ValueError: the rows do not divide into `count` parts.
  """
  if rows % count:
    raise ValueError(
      f'rollout.batch={rows} does not divide into rl.minibatches={count}.'
    )

  def parts(step: int) -> list[np.ndarray]:
    if count == 1:
      return [np.arange(rows)] * epochs
    rng = np.random.default_rng([step, 6])
    groups = np.arange(rows).reshape(-1, group)
    orders = [rng.permutation(groups).reshape(-1) for _ in range(epochs)]
    return [part for order in orders for part in np.split(order, count)]

  return parts
