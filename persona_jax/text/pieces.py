"""The bytes that each token adds to a text."""

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

_BLANK = '▁'  # SentencePiece's
_BYTE = re.compile('<0x([0-9A-Fa-f]{2})>')


def token_bytes(tokenizer, special: Collection[int] = ()) -> list[bytes]:
  """The bytes of each token id of a `tokenizers.Tokenizer`.

  Joined, they are the text that `decode` gives. Control tokens, `special` ids
  and ids without a token add nothing. The blank that SentencePiece puts before
  a text is part of its first token, though `decode` may strip it.

  Raises:
    ValueError: it is neither byte-level nor in the manner of SentencePiece.
  """
  record = json.loads(tokenizer.to_str())
  read = _reader(record)
  silent = {x['id'] for x in record['added_tokens'] if x['special']}
  silent.update(special)
  vocabulary = tokenizer.get_vocab()
  pieces = [b''] * (max(vocabulary.values(), default=-1) + 1)
  for token, i in vocabulary.items():
    if i not in silent:
      pieces[i] = read(token)
  return pieces


def _reader(record: dict[str, Any]):
  """What turns a token into bytes, by how the tokenizer says that it decodes.

  A tokenizer that does not say is known by how it encodes.
  """
  parts = list(_parts(record['decoder'] or record['pre_tokenizer']))
  kinds = {part['type'] for part in parts}
  if 'ByteLevel' in kinds:
    return _byte_level
  if any(_puts_blanks(part) for part in parts):
    falls = 'ByteFallback' in kinds or record['model'].get('byte_fallback')
    return _sentencepiece_with_bytes if falls else _sentencepiece
  raise ValueError(
    f"the tokenizer's decoder is {record['decoder']!r:.60}, and only "
    'byte-level and SentencePiece tokenizers are read; give the bytes of each '
    'token yourself.'
  )


def _parts(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
  """A decoder or a pre-tokenizer and, of a sequence, all in it."""
  if part is not None:
    yield part
    for inner in part.get('decoders', part.get('pretokenizers', ())):
      yield from _parts(inner)


def _puts_blanks(part: dict[str, Any]) -> bool:
  if part['type'] == 'Metaspace':
    return part['replacement'] == _BLANK
  return part.get('pattern') == {'String': _BLANK} and part['content'] == ' '


def _byte_level(token: str) -> bytes:
  """As tokenizers decodes: what is not all in the table stands for itself."""
  try:
    return bytes(map(_BYTES.__getitem__, token))
  except KeyError:
    return token.encode()


def _sentencepiece(token: str) -> bytes:
  return token.replace(_BLANK, ' ').encode()


def _sentencepiece_with_bytes(token: str) -> bytes:
  byte = _BYTE.fullmatch(token)
  return bytes([int(byte[1], 16)]) if byte else _sentencepiece(token)


def _table() -> dict[str, int]:
  """GPT-2's letters for bytes: its own where it can be seen, or a later one."""
  seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  unseen = [byte for byte in range(0x100) if byte not in seen]
  later = {chr(0x100 + i): byte for i, byte in enumerate(unseen)}
  return {chr(byte): byte for byte in seen} | later


_BYTES = _table()
