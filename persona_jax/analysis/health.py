"""Signs of degenerate text, so that a reward cannot hide behind it."""

import collections
import re

_WORD = re.compile(r"\w+(?:'\w+)?")
_SHORTEST = 3  # words; a line of fewer says nothing
_DISTINCT = 0.5  # share of distinct words below which a line repeats itself
_REPEATS = 3  # times that a run of three words may not occur


def degenerate(line: str, earlier: list[str] = ()) -> str | None:
  """What is wrong with a line: 'empty', 'looping', 'repeated'; None if fine."""
  words = [word.lower() for word in _WORD.findall(line)]
  if len(words) < _SHORTEST:
    return 'empty'
  runs = collections.Counter(zip(words, words[1:], words[2:], strict=False))
  if runs and max(runs.values()) >= _REPEATS:
    return 'looping'
  if len(words) >= 10 and len(set(words)) < _DISTINCT * len(words):
    return 'looping'
  if any(words == [w.lower() for w in _WORD.findall(e)] for e in earlier):
    return 'repeated'
  return None
