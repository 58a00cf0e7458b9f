"""Strings that end a line, against a search in the text so far."""

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax.models import gguf_header, vocabulary
from persona_jax.rollout import stops
from persona_jax.rollout.stops import stop_strings
from persona_jax.text import pieces

SMALL = [b'', *(bytes([byte]) for byte in 'abé'.encode())]
SMALL += [b'ab', b'ba', b'aab', b'b\xc3', b'\xa9a', b'abab', b'\0', b'']


def walk(strings, tokens):
  """Whether each row is done, after each of its tokens `[B T]`."""

  def step(state, now):
    state = strings.step(state, now)
    return state, strings.done(state)

  _, done = jax.lax.scan(step, strings.begin(), jnp.asarray(tokens).T)
  return done.T


def searched(rows, tokens, bytes_of):
  """The same, by looking for the strings in the bytes so far."""
  done = np.zeros(tokens.shape, bool)
  for i, (strings, line) in enumerate(zip(rows, tokens, strict=True)):
    for t in range(len(line)):
      said = b''.join(bytes_of[token] for token in line[: t + 1])
      done[i, t] = any(string.encode() in said for string in strings)
  return done


def texts(rng, letters, count, longest):
  sizes = rng.integers(1, longest + 1, count)
  return [''.join(rng.choice(list(letters), size)) for size in sizes]


@pytest.mark.parametrize('seed', range(5))
def test_random_strings_over_random_tokens(seed):
  rng = np.random.default_rng(seed)
  sets = [texts(rng, 'aabé', n % 4, 6) for n in range(8)]
  rows = [sets[i] for i in rng.integers(0, 8, 200)]
  tokens = rng.integers(0, len(SMALL), (200, 15))
  done = jax.jit(walk)(stop_strings(rows, SMALL), tokens)
  want = searched(rows, tokens, SMALL)
  np.testing.assert_array_equal(done, want)
  assert 0.1 < want.mean() < 0.9


@pytest.mark.parametrize('seed', range(3))
def test_strings_of_a_real_tokenizer(seed, smollm_pieces):
  # Strings cut out of what the random tokens say, so that they are said.
  rng = np.random.default_rng(seed)
  tokens = rng.integers(17, len(smollm_pieces), (40, 12))
  rows = []
  for line in tokens:
    said = b''.join(smollm_pieces[i] for i in line).decode(errors='replace')
    starts = rng.integers(0, len(said), rng.integers(0, 3))
    cuts = (said[i : i + rng.integers(1, 9)] for i in starts)
    rows.append([cut for cut in cuts if '\ufffd' not in cut])
  done = walk(stop_strings(rows, smollm_pieces), tokens)
  want = searched(rows, tokens, smollm_pieces)
  np.testing.assert_array_equal(done, want)
  assert 0.1 < want.mean() < 0.9


@pytest.fixture(scope='session')
def smollm_pieces(gguf_path):
  metadata, _ = gguf_header.read(gguf_path)
  return pieces.token_bytes(vocabulary.from_gguf(metadata))


@pytest.mark.parametrize(
  ('strings', 'line', 'want'),
  [
    (['abc'], [b'a', b'b', b'c', b'x'], 3),
    (['abc'], [b'xab', b'', b'cx'], 3),  # over borders, and a silent token
    (['abc'], [b'xabcx', b'x'], 1),  # inside a token
    (['aab'], [b'a', b'a', b'a', b'b'], 4),  # one letter too many
    (['abac'], [b'ab', b'ab', b'ac'], 3),
    (['abc', 'b'], [b'a', b'b', b'c'], 2),  # the shorter comes first
    (['abcd', 'bc'], [b'ab', b'c'], 2),  # within the longer
    (['abcd', 'bx'], [b'ab', b'x'], 2),  # beside it
    (['é'], [b'\xc3', b'\xa9'], 2),  # half a letter a token
    (['\0'], [b'a', b'a\0'], 2),
    (['a\0'], [b'a', b'x'], None),  # no padding is read
    (['abc'], [b'ab', b'x', b'c'], None),
    ([], [b'a', b'b'], None),
  ],
  ids=str,
)
def test_strings_by_hand(strings, line, want):
  tokens = np.arange(len(line))[None]
  more = [b'abc', b'd', b'\0', b'\xc3\xa9']  # so that each can be spelled
  done = np.asarray(walk(stop_strings([strings], line + more), tokens))[0]
  assert done.tolist() == [
    bool(want and t + 1 >= want) for t in range(done.size)
  ]


def test_tokens_beyond_the_table_say_nothing():
  strings = stop_strings([['ab']] * 2, [b'b', b'a'])
  done = walk(strings, np.array([[1, 2, 9, 0, 2], [2, 0, 2, 1, 2]]))
  np.testing.assert_array_equal(done, [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])


def test_tokens_that_hold_a_whole_string():
  strings = stop_strings([['ab', 'bé'], [], ['ab'], ['b']], SMALL)
  for vocab in (len(SMALL) + 3, len(SMALL), 5):
    holds = np.zeros((4, vocab), bool)
    for i, row in enumerate([['ab', 'bé'], [], ['ab'], ['b']]):
      for token, piece in enumerate(SMALL[:vocab]):
        holds[i, token] = any(string.encode() in piece for string in row)
    np.testing.assert_array_equal(strings.completing(vocab), holds)


def test_sets_are_shared_and_rows_taken():
  rows = [['ab', 'b'], ['a'], [], ['b', 'ab'], ['b']]
  strings = stop_strings(rows, SMALL)
  start = strings.start.tolist()
  assert start[0] == start[3] and len(set(start)) == 4
  assert start[2] == stops.NONE
  # Two states of every row, of ['ab', 'b'] as of ['b'] the beginning alone.
  assert strings.table.shape == (2 + 1 + 1 + 1, len(SMALL))
  some = jax.jit(stops.StopStrings.rows)(strings, jnp.array([4, 0]))
  np.testing.assert_array_equal(some.start, [start[4], start[0]])
  np.testing.assert_array_equal(some.table, strings.table)


@pytest.mark.parametrize('states', [2**15 - 1, 2**15])
def test_tables_have_room_for_their_states(states):
  after = np.repeat(np.arange(states)[::-1, None], 256, axis=1)
  table = stops._over_tokens(after, [b'', b'a', b'aa'])
  numbers = np.arange(states)
  want = np.stack([numbers, numbers[::-1], numbers], axis=1)
  np.testing.assert_array_equal(table, want)
  assert table.itemsize == (2 if states < 2**15 else 4)


def test_new_strings_of_one_shape_are_not_traced_again():
  counted = fakes.Counted(walk)
  run = jax.jit(counted)
  tokens = np.array([[1, 2, 1], [2, 1, 1]])
  for rows, want in (
    ([['ab'], ['aa']], [[0, 1, 1], [0, 0, 1]]),
    ([['ba'], ['bb']], [[0, 0, 1], [0, 0, 0]]),
    ([['bbb'], ['b']], [[0, 0, 0], [1, 1, 1]]),
  ):
    done = run(stop_strings(rows, SMALL), tokens)
    np.testing.assert_array_equal(done, want)
  assert counted.traces == 1


@pytest.mark.parametrize(
  ('rows', 'said'),
  [
    ([['ab'], ['', 'b']], "'' is a stop string that every text holds; leave"),
    ([['ab', 'xyz']], "no tokens can spell the stop string 'xyz'; leave it"),
    ([['aü']], "spell the stop string 'aü'"),  # its first byte is there
    (['ab', 'b'], 'stop strings are one string where each row needs a list'),
    ('ab', 'stop strings are one string where'),
  ],
  ids=str,
)
def test_strings_that_are_refused(rows, said):
  with pytest.raises(ValueError, match=said):
    stop_strings(rows, SMALL)


def test_strings_that_only_long_tokens_spell():
  for bytes_of in ([b'xay', b'b'], [b'xa', b'yb', b'b']):
    with pytest.raises(ValueError, match="the stop string 'ayb?'"):
      stop_strings([['ayb'], ['ay']], bytes_of[:1] + [b'c'])
    stop_strings([['ayb']], bytes_of)
