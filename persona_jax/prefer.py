"""Training on given replies: preference pairs, labelled replies, examples."""

import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from persona_jax import batches, learn
from persona_jax.batches import Encoded
from persona_jax.checkpoint import Checkpoints, Guard
from persona_jax.feed import Feed
from persona_jax.lab import Lab
from persona_jax.learn.algorithms import ANCHOR
from persona_jax.learner import Learner
from persona_jax.metrics import Scribe
from persona_jax.text import examples
from persona_jax.train import Result


class Row(NamedTuple):
  """An example, and for KTO its prompt with a reply to another."""

  own: Encoded
  other: Encoded | None


def run(
  lab: Lab, config, folder: Path, *, shuffle: bool = False, advance
) -> Result:
  """Trains on `rl.data`, by default our pairs; continues what `folder` holds.

  With `shuffle`, every other example, drawn by chance, has the wrong label: a
  control.

  Raises:
    FloatingPointError: a loss or gradient is not finite.
    ValueError: a row of the data breaks a rule.
  """
  rl = config.rl
  learner = Learner(lab, config)
  feed = Feed(
    read(lab, config, shuffle=shuffle),
    batch=config.rollout.batch,
    seed=config.seed,
    process=jax.process_index(),
    processes=jax.process_count(),
  )
  states, log = learner.init(), []
  saved = Checkpoints(folder)
  found = saved.restore(states)
  if found is not None:
    states, log = found.state, found.record['log']
    feed.set_state(found.record['feed'])
    advance(len(log))
  with Guard(saved) as guard, Scribe(folder, len(log)) as scribe:
    for step in range(len(log), rl.steps):
      began = time.monotonic()
      batch, others = _arrays(config, next(feed))
      with guard.changing():
        batch = learner.given(states, batch, others)
        rows = np.arange(config.rollout.batch)
        states, told = learner.update(states, batch, rows)
        told = {name: float(value) for name, value in told.items()}
        if not rl.skip:
          learner.check(told, states)
        seconds = time.monotonic() - began
        log.append(told | {'step': step + 1, 'seconds': seconds})
        record = {'log': log, 'feed': feed.get_state()}
        guard.offer(step + 1, states, record)
      scribe.write(log[-1])
      guard.settle(step + 1, every=rl.save_every, last=rl.steps)
      advance(1)
  saved.close()
  return Result(learner.trained.policy(states.policy.params), log)


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
    encoded = _mislabelled(encoded, config.seed)
  others = batches.mismatched(encoded) if anchored else [None] * len(encoded)
  return [Row(*both) for both in zip(encoded, others, strict=True)]


def _mislabelled(rows, seed):
  """Half of the rows, by chance, with pairs or labels the other way round."""
  wrong = np.random.default_rng(seed).random(len(rows)) < 0.5
  turned = lambda row: row._replace(
    replies=row.replies[::-1],
    label=None if row.label is None else not row.label,
  )
  return [turned(r) if w else r for r, w in zip(rows, wrong, strict=True)]


def _arrays(config, rows):
  """A batch of rows, and one of their prompts with replies to others."""
  size = config.rollout
  room = {'prompt_tokens': size.prompt_tokens, 'reply_tokens': size.tokens}
  replies = learn.PREFERENCES[config.rl.algorithm].replies
  make = lambda rows: batches.to_batch(rows, **room, replies=replies)
  own = make([row.own for row in rows])
  if rows[0].other is None:
    return own, own
  return own, make([row.other for row in rows])
