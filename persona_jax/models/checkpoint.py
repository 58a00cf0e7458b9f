"""An opened checkpoint, whatever file format it came from."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from persona_jax.models import config as config_lib

# Tokens that end an assistant's line in the chat formats of our families.
ENDS = ('<|im_end|>', '<|endoftext|>', '<|eot_id|>', '<|end_of_text|>', '</s>')


class CheckpointError(ValueError):
  """A checkpoint, or a part of it, that cannot be read as it should."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Everything that a file format tells; tensors are read one by one."""

  where: str  # for errors
  files: tuple[Path, ...]  # that hold the weights
  config: config_lib.DecoderConfig
  names: Mapping[str, str]  # our name -> the format's
  shapes: Mapping[str, tuple[int, ...]]  # by the format's name
  read: Callable[[str], Any]  # the format's name -> what slices read from
  tokenizer: Any
  template: str | None
  special: Mapping[str, str]  # 'bos', 'eos', ...: the token's text
  ends: tuple[int, ...] = ()  # ids that the format itself calls an end

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """Ids after which an assistant's line is over."""
    texts = (*ENDS, self.special.get('eos', ''))
    ids = (self.tokenizer.token_to_id(text) for text in texts)
    return tuple(sorted({i for i in (*ids, *self.ends) if i is not None}))


def listed(items: Sequence[str], separator: str = '; ', most: int = 20) -> str:
  """The first `most` of `items`, and how many more there are."""
  more = len(items) - most
  shown = separator.join(items[:most])
  return f'{shown}; and {more} more' if more > 0 else shown


def sha256(files: tuple[Path, ...]) -> str:
  """Of one file; of several, the hash of their hashes by name."""
  with futures.ThreadPoolExecutor() as pool:
    digests = list(pool.map(digest, sorted(files)))
  if len(digests) == 1:
    return digests[0]
  return hashlib.sha256('\n'.join(digests).encode()).hexdigest()


def digest(path: str | Path) -> str:
  """The SHA-256 of a file, in hexadecimal."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
