"""Phrasings that are known in a line of tokens, however they are cut."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, UInt32

_LETTERS = b'abcdefghijklmnopqrstuvwxyz0123456789'
_OTHERS = bytes(set(range(256)) - {*_LETTERS})
_NUMBERS = np.arange(1, len(_LETTERS) + 1)
_FOLD = np.zeros(256, np.int32)  # the number of each letter; 0 is none
_FOLD[[*_LETTERS]] = _FOLD[[*_LETTERS.upper()]] = _NUMBERS
_MARK = ord('?')


def normalised(text: str) -> str:
  """Its ASCII letters, in lower case, and digits; nothing else."""
  return text.encode().lower().translate(None, _OTHERS).decode()


@struct.dataclass
class Phrases:
  """P phrasings, known at the end of a line however V tokens cut it.

  A text is its letters (`normalised`), hashed as two polynomials modulo 2^32,
  so that the hash of a line comes from those of its tokens. Digits count as
  letters; blanks, all else and so a blank line mean nothing. A phrasing is
  known where it ends the line, and begins it or both a token and a word: the
  text before it ends, or its own begins, with something other than a letter.
  Tokens beyond the table and those that add no bytes only separate words.

  Hashes of phrasings are distinct. That one of the T ends of a line matches
  falsely has a chance of P T / 2^64, were the hashes random: 2e-13 for 50
  tokens and 60 000 phrasings.
  """

  code: UInt32[Array, '*B W 2']  # W = V + 1, and the last adds nothing
  power: UInt32[Array, '*B W 2']  # what the token multiplies the hash before by
  marks: Int[Array, '*B W']  # question marks
  opens: Bool[Array, '*B W']  # begins with no letter
  closes: Bool[Array, '*B W']  # ends with none
  known: UInt32[Array, '*B P 2']  # in the order of the first hash
  meaning: Int[Array, '*B P']

  @classmethod
  def of(cls, known: Mapping[str, int], pieces: Sequence[bytes]):
    """Phrasings by their letters, for tokens that add these bytes to a text.

    Raises:
      ValueError: there are so many phrasings that hashes are alike.
    """
    texts, _ = _matrix([text.encode() for text in known])
    for seed in range(64):
      hashes, _ = _hashed(texts, seed)
      order = np.argsort(hashes[:, 0], kind='stable')
      if np.all(np.diff(hashes[order, 0])):  # one search finds the only one
        break
    else:
      raise ValueError(
        f'the hashes of {len(known)} phrasings are not all different; take '
        'fewer objects or attributes.'
      )
    text, sizes = _matrix([*pieces, b''])
    code, power = _hashed(text, seed)
    last = text[np.arange(len(sizes)), np.maximum(sizes - 1, 0)]
    return cls(
      code=jnp.asarray(code),
      power=jnp.asarray(power),
      marks=jnp.asarray(np.sum(text == _MARK, axis=1), jnp.int32),
      opens=jnp.asarray(_FOLD[text[:, 0]] == 0),
      closes=jnp.asarray(_FOLD[last] == 0),
      known=jnp.asarray(hashes[order]),
      meaning=jnp.asarray(np.array([*known.values()])[order], jnp.int32),
    )

  def find(
    self, tokens: Int[Array, ' T'], length: Int[Array, '']
  ) -> Int[Array, '']:
    """The meaning of the longest phrasing that ends the line; -1 without one.

    Nor does a line with two question marks have a meaning.
    """
    size, none = tokens.shape[0], self.marks.shape[0] - 1
    here = (jnp.arange(size) < length) & (tokens >= 0) & (tokens < none)
    at = jnp.where(here, tokens, none)
    power = jnp.pad(self.power[at], ((0, 1), (0, 0)), constant_values=1)
    after = jax.lax.cumprod(power, reverse=True)[1:]
    ends = jax.lax.cumsum(self.code[at] * after, reverse=True)
    begins = self.opens[at] | jnp.roll(self.closes[at], 1)
    begins = begins.at[0].set(True)
    place = jnp.searchsorted(self.known[:, 0], ends[:, 0])
    place = jnp.minimum(place, self.known.shape[0] - 1)
    found = begins & jnp.all(self.known[place] == ends, axis=1)
    longest = self.meaning[place[jnp.argmax(found)]]
    single = jnp.sum(self.marks[at]) <= 1
    return jnp.where(jnp.any(found) & single, longest, -1)


def _matrix(rows: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
  """The bytes of each row, padded with 0 to one width, and their number."""
  text = np.array(rows, 'S')
  text = text.view(np.uint8).reshape(len(rows), text.itemsize)
  return text, np.array([len(row) for row in rows])


def _hashed(text: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Two hashes of each row's letters, and what they multiply others by.

  hash(x y) = hash(x) power(y) + hash(y). The bases are 3 modulo 8: where
  letters are swapped, a base nearer to 1 would tell fewer bits of them.
  """
  rng = np.random.default_rng(seed)
  value = rng.integers(2**32, size=(len(_LETTERS) + 1, 2), dtype=np.uint32)
  base = 8 * rng.integers(2**29, size=2, dtype=np.uint32) + 3
  code = np.zeros((len(text), 2), np.uint32)
  power = np.ones_like(code)
  for letters in _FOLD[text.T]:
    has = np.flatnonzero(letters)
    code[has] = code[has] * base + value[letters[has]]
    power[has] *= base
  return code, power
