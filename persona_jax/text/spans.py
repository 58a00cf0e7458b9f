"""Where contents stand in a rendered conversation, and in its tokens.

A content is not searched for: it may occur twice, and be trimmed. Its place is
what changes when a stand-in takes its place and all else stays.
"""

import bisect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Span = tuple[int, int]  # from, up to


def in_text(
  write: Callable[[Sequence[Message]], str], messages: Sequence[Message]
) -> list[Span]:
  """The characters of `write(messages)` that are each message's content.

  Blanks that the template trims are in no span. Where it writes something else
  for a content, such as thoughts in tags, that is the span.

  Raises:
    ValueError: a content is no text, is written twice or never, or changes
      other parts of the conversation.
  """
  for index, message in enumerate(messages):
    if not isinstance(message.get('content'), str):
      raise ValueError(
        f'The content of message {index} is {message.get("content")!r}, which '
        'has no place in the conversation; give a text.'
      )
  text = write(messages)
  mark = 'Zqx'
  while any(mark in str(x) for x in (text, messages)):
    mark += 'x'
  places = [
    _place(write, text, messages, i, mark) for i in range(len(messages))
  ]
  order = sorted(range(len(places)), key=lambda i: places[i])
  for before, after in zip(order, order[1:], strict=False):
    if places[before][1] > places[after][0]:
      raise ValueError(
        f'The chat template writes message {after} differently because of '
        f'what message {before} says, so that their places are unknown; '
        f'change {messages[before]["content"][:60]!r}, or give another '
        'template.'
      )
  return places


def _place(write, text, messages, index, mark) -> Span:
  """Tries marks around the content, so that the template may look into it.

  Then a mark in its place; then one inside it, for templates that ask how a
  content begins and ends; then takes all that differs.
  """
  said = messages[index]['content']
  half = len(said) // 2
  for stand_in, marks in ((f'{mark}{said}{mark}', 2), (mark, 1)):
    parts = write(_said(messages, index, stand_in)).split(mark)
    start, stop = len(parts[0]), len(text) - len(parts[-1])
    whole = len(parts) == marks + 1 and start <= stop
    if whole and text.startswith(parts[0]) and text.endswith(parts[-1]):
      return start, stop
  if len(parts) != 2:
    raise ValueError(
      f'The chat template writes the content of message {index} '
      f'({messages[index]["role"]}) {len(parts) - 1} times as it is, where '
      'exactly once is needed; give another template.'
    )
  inside = write(_said(messages, index, said[:half] + mark + said[half:]))
  before, _, after = inside.partition(mark)
  if before + after == text and before.endswith(said[:half]):
    start = len(before) - half
    if after.startswith(said[half:]):
      return start, start + len(said)
  start = len(os.path.commonprefix([text, parts[0]]))
  same = len(os.path.commonprefix([text[::-1], parts[1][::-1]]))
  return start, max(start, len(text) - same)


def _said(messages, index, content) -> list[Message]:
  message = {**messages[index], 'content': content}
  return [*messages[:index], message, *messages[index + 1 :]]


def in_tokens(
  ids: Sequence[int],
  offsets: Sequence[Span],
  places: Sequence[Span],
  control: Collection[int] = (),
) -> list[Span]:
  """The tokens of each place, from the tokens' own places in the text.

  A token that crosses a border counts to the content that it overlaps, the
  earlier one if there are two; but a control token that swallows blanks of a
  content is the template's.
  """
  starts, stops = [s for s, _ in offsets], [e for _, e in offsets]
  spans, floor = [(0, 0)] * len(places), 0
  for i in sorted(range(len(places)), key=lambda i: places[i]):
    begin, end = places[i]
    start = max(floor, bisect.bisect_right(stops, begin))
    stop = max(start, bisect.bisect_left(starts, end)) if begin < end else start
    while start < stop and ids[start] in control and starts[start] < begin:
      start += 1
    while start < stop and ids[stop - 1] in control and stops[stop - 1] > end:
      stop -= 1
    spans[i], floor = (start, stop), stop
  return spans
