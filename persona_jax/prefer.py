"""Training on given replies: preference pairs, labelled replies, examples."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax import batches, learn, steps
from persona_jax.batches import Encoded
from persona_jax.feed import Feed
from persona_jax.lab import Lab
from persona_jax.learn import Batch, sharding
from persona_jax.learn.algorithms import ANCHOR
from persona_jax.learner import Learner
from persona_jax.text import examples


class Row(NamedTuple):
  """An example, and for KTO its prompt with a reply to another."""

  own: Encoded
  other: Encoded | None


def run(
  lab: Lab, config, folder: Path, *, shuffle: bool = False, advance
) -> steps.Result:
  """Trains on `rl.data`, by default our pairs; continues what `folder` holds.

  With `shuffle`, about half of the examples, drawn by chance, are wrong: a
  control.

  Raises:
    FloatingPointError: a loss or gradient is not finite.
    ValueError: a row of the data breaks a rule.
  """
  learner = Learner(lab, config)
  part, parts = sharding.share(lab.mesh)
  feed = Feed(
    read(lab, config, shuffle=shuffle),
    batch=config.rollout.batch,
    seed=config.seed,
    process=part,
    processes=parts,
  )

  def begin(step, states):
    before = {'feed': feed.get_state()}
    arrays = _arrays(lab, config, next(feed))
    return Given(learner, *arrays, before, {'feed': feed.get_state()})

  return steps.run(
    learner,
    begin,
    folder,
    resume=lambda record: feed.set_state(record['feed']),
    advance=advance,
  )


class Given(NamedTuple):
  """The replies of a step."""

  learner: Learner
  own: Batch
  others: Batch
  before: dict
  after: dict

  def wait(self):
    """They are there."""

  def batch(self, states):
    """The replies with what the loss asks of them."""
    batch = self.learner.given(states, self.own, self.others)
    return batch, jnp.ones((), bool)

  def told(self):
    """Nothing: they are as they were given."""
    return {}

  def texts(self):
    """None."""
    return []


def read(lab: Lab, config, *, shuffle: bool = False) -> list[Row]:
  """The examples of `rl.data`, as tokens."""
  name, size = config.rl.algorithm, config.rollout
  preference = learn.PREFERENCES[name]
  anchored = ANCHOR in preference.needs
  if config.rl.data:
    kind = examples.Shown if preference.replies == 1 else examples.Compared
    kind = examples.Rated if anchored else kind
    rows = list(examples.read(config.rl.data, kind))
  else:
    from persona_jax import datasets

    rows = list(datasets.read('pairs', 'train'))
    if preference.replies == 1:
      rows = list((examples.rated if anchored else examples.shown)(rows))
  encoded = batches.encoded(
    lab.chat,
    rows,
    stop_ids=lab.model.stop_ids,
    prompt_tokens=size.prompt_tokens,
    reply_tokens=size.tokens,
  )
  if shuffle:
    encoded = _spoilt(encoded, config.seed)
  others = batches.mismatched(encoded) if anchored else [None] * len(encoded)
  return [Row(*both) for both in zip(encoded, others, strict=True)]


def _spoilt(rows: list[Encoded], seed: int) -> list[Encoded]:
  """About half of the rows, by chance, made wrong.

  A pair is turned round, a label too; what has neither gets a reply to another
  prompt.
  """
  wrong = np.random.default_rng(seed).random(len(rows)) < 0.5
  if len(rows[0].replies) == 2:
    others = [row._replace(replies=row.replies[::-1]) for row in rows]
  elif rows[0].label is not None:
    others = [row._replace(label=not row.label) for row in rows]
  else:
    others = batches.mismatched(rows)
  return [b if w else a for a, b, w in zip(rows, others, wrong, strict=True)]


def _arrays(lab, config, rows):
  """A batch of rows, and one of their prompts with replies to others.

  Each process gives its own rows of it.
  """
  size = config.rollout
  room = {'prompt_tokens': size.prompt_tokens, 'reply_tokens': size.tokens}
  replies = learn.PREFERENCES[config.rl.algorithm].replies

  def make(rows):
    batch = batches.to_batch(rows, **room, replies=replies)
    if jax.process_count() == 1:
      return batch
    where = sharding.batch_sharding(lab.mesh)
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(
        where, np.asarray(x), (size.batch, *x.shape[1:])
      ),
      batch,
    )

  own = make([row.own for row in rows])
  if rows[0].other is None:
    return own, own
  return own, make([row.other for row in rows])
