"""From examples to arrays: texts as tokens, tokens as a learner's batch."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from persona_jax.dialogue import POLICY, Dialogue, Frame, view
from persona_jax.learn import Batch
from persona_jax.text.chat import Chat
from persona_jax.text.examples import Example


class Encoded(NamedTuple):
  """An example as tokens."""

  prompt: tuple[int, ...]  # all before the reply
  replies: tuple[tuple[int, ...], ...]  # with the stop token
  label: bool | None = None  # of a `Rated`
  where: str = ''


def encoded(
  chat: Chat,
  rows: Iterable[Example],
  *,
  stop_ids: Collection[int],
  prompt_tokens: int,
  reply_tokens: int,
) -> list[Encoded]:
  """Examples as the tokens that a rollout would have of them.

  The pieces are those of `chat.frame()`, so that a control token in somebody's
  text is plain characters, and a reply ends with what `ending` gives.

  Raises:
    ValueError: a prompt has more than `prompt_tokens`, a reply with its stop
      token more than `reply_tokens`, or two replies are the same tokens.
  """
  frame, end = chat.frame(), ending(chat, stop_ids)
  between = frame.user_to_own, frame.own_to_user
  found = []
  for index, row in enumerate(rows):
    where = row.where or f'example {index}'
    prompt = chat.prompt_ids(row.system)
    for i, line in enumerate(row.history):
      prompt += [*chat.encode(line), *between[i % 2]]
    _fits(where, 'the prompt', row.history[-1], prompt, prompt_tokens, 'prompt')
    replies = []
    for reply in row.replies:
      said = chat.encode(reply)
      if not said:
        raise ValueError(
          f'{where}: the reply {_short(reply)} has no tokens; give a text.'
        )
      replies.append((*said, *end))
      _fits(where, 'the reply', reply, replies[-1], reply_tokens, 'reply')
    if len(set(replies)) < len(replies):
      raise ValueError(
        f'{where}: the replies {" and ".join(map(_short, row.replies))} are '
        'the same tokens, and there is nothing to prefer; change one or take '
        'the row out.'
      )
    label = getattr(row, 'label', None)
    found.append(Encoded(tuple(prompt), tuple(replies), label, where))
  return found


def ending(chat: Chat, stop_ids: Collection[int]) -> tuple[int, ...]:
  """What a model says after a reply: the template's tokens up to a stop.

  Raises:
    ValueError: the template ends replies with none of `stop_ids`.
  """
  after = chat.frame().own_to_user
  for i, token in enumerate(after):
    if token in stop_ids:
      return after[: i + 1]
  raise ValueError(
    f'The chat template writes {chat.decode(after, control=True)!r} '
    f'({list(after)}) after a reply, and none of the stop tokens '
    f'{sorted(stop_ids)} is in it, so that a model would not learn to stop; '
    'give the stop_ids of the model that the template belongs to.'
  )


def to_batch(
  rows: Sequence[Encoded],
  *,
  prompt_tokens: int,
  reply_tokens: int,
  replies: int = 1,
  size: int | None = None,
) -> Batch:
  """Rows side by side: `[B S]`, or `[B 2 S]` of pairs, the chosen one first.

  S is `prompt_tokens + reply_tokens`, M is `reply_tokens`; a text begins at
  slot 0, and its reply and stop token alone are learned. Log-probabilities of
  a reference are zero, to be read by the learner.

  Args:
    rows: of one kind; there may be none where `size` is given.
    prompt_tokens: room for a prompt.
    reply_tokens: room for a reply with its stop token.
    replies: of a row, as `Preference.replies` says.
    size: fills up to as many rows, with some that do not count.

  Raises:
    ValueError: a row has another number of replies, does not fit, or labels
      stand beside none; or there are no rows, or more than `size`.
  """
  size = len(rows) if size is None else size
  if not size or len(rows) > size:
    raise ValueError(
      f'{len(rows)} rows do not make a batch of {size}; a batch has at least '
      'one row, and no more than its size.'
    )
  room, labels = (prompt_tokens, reply_tokens), [row.label for row in rows]
  if None in labels and set(labels) != {None}:
    raise ValueError(
      f'{rows[labels.index(None)].where} has no label, and another row has '
      'one; a batch holds examples of one kind.'
    )
  arrays = _empty(size, replies, *room)
  for index, row in enumerate(rows):
    if len(row.replies) != replies:
      raise ValueError(
        f'{row.where} has {len(row.replies)} replies where the algorithm '
        f'takes {replies}; give Compared pairs for 2, Rated or Shown for 1.'
      )
    for which, reply in enumerate(row.replies):
      _fill({k: x[index, which] for k, x in arrays.items()}, row, reply, *room)
  if replies == 1:
    arrays = {name: x[:, 0] for name, x in arrays.items()}
  blank = np.zeros(arrays['actions'].shape, np.float32)
  if rows and labels[0] is not None:
    arrays['label'] = np.zeros(size, np.float32)
    arrays['label'][: len(rows)] = labels
  return Batch(
    advantages=jnp.asarray(blank),
    old_logprobs=jnp.asarray(blank),
    reference_logprobs=jnp.asarray(blank),
    **{name: jnp.asarray(x) for name, x in arrays.items()},
  )


def of_dialogue(said: Dialogue, frame: Frame) -> tuple[Batch, Callable]:
  """The policy's lines as a learner's batch, and `own`, which picks them.

  The old log-probabilities are those of sampling, where no line may begin with
  a stop token; the learner does not bar it, so on policy the ratio of a first
  token is 1 - P(stop). `policy/ratio` shows how near to one that is.
  """
  seen = view(said, POLICY, frame)
  own = lambda x: x[:, POLICY::2]
  mask = own(said.mask)
  flat = lambda x: x.reshape(x.shape[0], -1)
  line = jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :, None]
  old = flat(own(said.logprobs))
  batch = Batch(
    tokens=seen.tokens,
    positions=seen.positions,
    before=flat(own(seen.before)),
    actions=flat(own(said.tokens)),
    mask=flat(mask),
    advantages=jnp.zeros_like(old),
    old_logprobs=old,
    reference_logprobs=jnp.zeros_like(old),
    line=flat(jnp.broadcast_to(line, mask.shape)),
  )
  return batch, own


def mismatched(rows: Sequence[Encoded]) -> list[Encoded]:
  """Each prompt with the reply of the next row that answers another prompt.

  What `learn.preferences.anchor` is the mean of. The last row is followed by
  the first. Taken of all rows, before they are shuffled, there is one for
  every row of every batch, however short.

  Raises:
    ValueError: all rows have one prompt.
  """
  count = len(rows)
  others, after = [0] * count, 0
  for i in reversed(range(2 * count - 1)):  # twice around
    here, following = i % count, (i + 1) % count
    if rows[here].prompt != rows[following].prompt:
      after = following
    others[here] = after
  if count and rows[0].prompt == rows[others[0]].prompt:
    raise ValueError(
      f'all {count} rows answer one prompt, so that none has a reply to '
      'another, which KTO compares with; give rows of several prompts.'
    )
  return [
    row._replace(replies=rows[other].replies)
    for row, other in zip(rows, others, strict=True)
  ]


def _empty(size, replies, prompt_tokens, reply_tokens):
  """Arrays of rows that hold one token, which is not learned."""
  slots = (size, replies, prompt_tokens + reply_tokens)
  learned = (size, replies, reply_tokens)
  positions = np.full(slots, -1, np.int32)
  positions[..., 0] = 0  # attention over nothing is no number
  return {
    'tokens': np.zeros(slots, np.int32),
    'positions': positions,
    'before': np.zeros(learned, np.int32),
    'actions': np.zeros(learned, np.int32),
    'mask': np.zeros(learned, bool),
  }


def _fill(arrays, row, reply, prompt_tokens, reply_tokens):
  """Writes one text; token t of the reply is predicted one slot before it."""
  start, count = len(row.prompt), len(reply)
  if start > prompt_tokens or count > reply_tokens:
    raise ValueError(
      f'{row.where}: {start} + {count} tokens do not fit in '
      f'prompt_tokens={prompt_tokens} + reply_tokens={reply_tokens}; give '
      'the numbers that it was encoded with.'
    )
  arrays['tokens'][: start + count] = [*row.prompt, *reply]
  arrays['positions'][: start + count] = np.arange(start + count)
  arrays['before'][:] = start - 1 + np.arange(reply_tokens)
  arrays['actions'][:count] = reply
  arrays['mask'][:count] = True


def _fits(where, what, text, ids, most, field):
  if len(ids) > most:
    raise ValueError(
      f'{where}: {what} {_short(text)} takes {len(ids)} tokens, more than '
      f'{field}_tokens={most}; shorten it, raise the limit or take the row out.'
    )


def _short(text: str) -> str:
  return repr(text if len(text) <= 60 else f'{text[:60]}...')
