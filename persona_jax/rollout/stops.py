"""Strings that end a line, found token by token; the strings are data.

An automaton over tokens: looking one token up tells the next state, however
the token cuts the strings.
"""

from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

NONE, DONE = range(2)  # states: of a row without strings; a string is complete


@struct.dataclass
class StopStrings:
  """What each row's text may not say; see `stop_strings`.

  The token that completes a string, wherever in the token it ends, is the
  line's stop token. What earlier tokens hold of the string stays in the line.
  """

  table: Int[Array, 'A V']  # the state after a token
  start: Int[Array, ' B']

  def begin(self) -> Int[Array, ' B']:
    """The states before the first token of a line."""
    return self.start

  def step(
    self, state: Int[Array, ' B'], tokens: Int[Array, ' B']
  ) -> Int[Array, ' B']:
    """The states after one more token; `DONE` and `NONE` are never left.

    A token beyond the table, as models with spare rows may draw, says nothing.
    """
    known = tokens < self.table.shape[1]
    after = self.table[state, jnp.where(known, tokens, 0)]
    return jnp.where(known, after.astype(state.dtype), state)

  def done(self, state: Int[Array, ' B']) -> Bool[Array, ' B']:
    """Which rows have said one of their strings."""
    return state == DONE

  def completing(self, vocab: int) -> Bool[Array, 'B V']:
    """Which of `vocab` tokens hold a whole string of the row."""
    ends = self.table[self.start] == DONE
    spare = max(vocab - ends.shape[1], 0)
    return jnp.pad(ends, ((0, 0), (0, spare)))[:, :vocab]

  def rows(self, index):
    """The strings of some rows."""
    return self.replace(start=self.start[index])


def stop_strings(
  rows: Sequence[Sequence[str]], pieces: Sequence[bytes]
) -> StopStrings:
  """The stop strings of each row, for tokens that add these bytes to a text.

  `text.pieces.token_bytes` gives the pieces. The table takes as many states as
  the different sets of strings have bytes.

  Raises:
    ValueError: a string is empty, or no tokens can spell it.
  """
  if isinstance(rows, str) or any(isinstance(row, str) for row in rows):
    raise ValueError(
      'stop strings are one string where each row needs a list; put it in '
      'brackets.'
    )
  sets = dict.fromkeys(frozenset(row) for row in rows)
  for string in sorted(frozenset().union(*sets)):
    _check(string, pieces)
  starts, automata = _automata(sets)
  table = _over_tokens(automata, pieces)
  start = [starts[frozenset(row)] for row in rows]
  return StopStrings(jnp.asarray(table), jnp.asarray(start, jnp.int32))


def _check(string: str, pieces: Sequence[bytes]):
  if not string:
    raise ValueError("'' is a stop string that every text holds; leave it out.")
  alone = frozenset([string])
  starts, automata = _automata([alone])
  table = _over_tokens(automata, pieces)
  reached, new = set(), {starts[alone]}
  while new:
    reached |= new
    new = set(np.unique(table[sorted(new)]).tolist()) - reached
  if DONE not in reached:
    raise ValueError(
      f'no tokens can spell the stop string {string!r}; leave it out, or take '
      'characters that the tokenizer has.'
    )


def _automata(
  sets: Iterable[frozenset[str]],
) -> tuple[dict[frozenset[str], int], np.ndarray]:
  """Where each set of strings starts, and the state after each byte."""
  starts, states = {frozenset(): NONE}, 2
  tables = [np.repeat([[NONE], [DONE]], 256, axis=1)]
  for strings in sets:
    if strings:
      starts[strings] = states
      tables.append(_automaton([x.encode() for x in strings], states))
      states += len(tables[-1])
  return starts, np.concatenate(tables)


def _automaton(strings: Sequence[bytes], first: int) -> np.ndarray:
  """The automaton of Aho and Corasick (1975), its states from `first` on.

  A state is the longest end of the text so far that begins some string.
  """
  least = [x for x in strings if not any(y in x for y in strings if y != x)]
  beginnings = {x[:i] for x in least for i in range(len(x))}
  in_order = sorted(beginnings, key=lambda x: (len(x), x))  # on every host
  state = {x: first + i for i, x in enumerate(in_order)}
  after = np.full((len(state), 256), first)  # b'' is the first
  for beginning, own in state.items():
    ends = (beginning[i:] for i in range(1, len(beginning) + 1))
    shorter = next((state[x] for x in ends if x in state), first)
    after[own - first] = after[shorter - first]
    size = len(beginning)
    for x in least:
      if x.startswith(beginning):
        after[own - first, x[size]] = state.get(x[: size + 1], DONE)
  return after


def _over_tokens(after: np.ndarray, pieces: Sequence[bytes]) -> np.ndarray:
  """The state after each token: that after its bytes, one by one."""
  sizes = np.array([len(piece) for piece in pieces])
  longest = np.argsort(-sizes, kind='stable')
  text = np.array(pieces, 'S')[longest]  # padded to one width
  text = text.view(np.uint8).reshape(len(pieces), text.itemsize)
  small = len(after) <= np.iinfo(np.int16).max
  after = after.astype(np.int16 if small else np.int32)
  states = np.arange(len(after), dtype=after.dtype)
  table = np.repeat(states[:, None], len(pieces), axis=1)
  for i, byte in enumerate(text.T):
    left = np.sum(sizes > i)  # tokens with so many bytes come first
    table[:, :left] = after[table[:, :left], byte[:left]]
  out = np.empty_like(table)
  out[:, longest] = table
  return out
