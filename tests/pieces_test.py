"""The bytes of tokens: joined, they are the text."""

import json
import unicodedata

import numpy as np
import pytest
import tokenizers
from chat_sentencepiece_test import spm
from tokenizers import decoders, models, pre_tokenizers
from vocabulary_test import SENTENCEPIECE, byte_level, sentencepiece

from persona_jax.models import gguf_header, vocabulary
from persona_jax.text.pieces import token_bytes

LETTERS = 'abehlo .,!\n\t_<0x41>'
FOREIGN = 'éüßÆ½¡­\xa0ŁΩя再見🙂\x00\x7f\u200d\ufeff'


def texts(letters, count=50):
  rng = np.random.default_rng(0)
  sizes = rng.integers(1, 30, count)
  return [''.join(rng.choice(list(letters), size)) for size in sizes]


def joined(tokenizer, text):
  pieces = token_bytes(tokenizer)
  ids = tokenizer.encode(text, add_special_tokens=False).ids
  return b''.join(pieces[i] for i in ids)


@pytest.mark.parametrize('letters', [LETTERS, LETTERS + FOREIGN])
@pytest.mark.parametrize('pre', ['gpt-2', 'qwen2', 'llama-bpe', 'default'])
def test_byte_level(pre, letters):
  tokenizer = vocabulary.from_gguf(byte_level(pre))
  for text in texts(letters):
    if pre == 'qwen2':
      text = unicodedata.normalize('NFC', text)
    assert joined(tokenizer, text) == text.encode()


@pytest.mark.parametrize('letters', [LETTERS, LETTERS + FOREIGN])
@pytest.mark.parametrize('model', SENTENCEPIECE, ids=['llama', 'gemma'])
def test_sentencepiece(model, letters):
  tokenizer = vocabulary.from_gguf(sentencepiece(model))
  blank = ' ' if model['prefix'] else ''
  for text in [*texts(letters), *(row['text'] for row in model['rows'])]:
    text = text.replace('▁', ' ')
    tokenizer.encode_special_tokens = True
    want = (blank + text).encode() if text else b''
    assert joined(tokenizer, text) == want


@pytest.mark.parametrize('letters', [LETTERS, LETTERS + FOREIGN])
@pytest.mark.parametrize('prefix', ['never', 'always'])
def test_sentencepiece_known_by_how_it_encodes(prefix, letters):
  tokenizer = spm(prefix=prefix)
  assert json.loads(tokenizer.to_str())['decoder'] is None
  for text in texts(letters):
    added = prefix == 'always' and not text.startswith(' ')
    assert joined(tokenizer, text) == (' ' * added + text).encode()


def test_a_real_tokenizer(gguf_path):
  metadata, _ = gguf_header.read(gguf_path)
  tokenizer = vocabulary.from_gguf(metadata)
  for text in texts(LETTERS + 'abcdefghijklmnopqrstuvwxyz   ', 5):
    assert joined(tokenizer, text) == text.encode()
  pieces = token_bytes(tokenizer)
  assert len(pieces) == 49152
  for i in np.random.default_rng(0).integers(0, 49152, 300).tolist():
    assert pieces[i].decode(errors='replace') == tokenizer.decode([i])


def test_unigram_without_bytes():
  units = [('<unk>', 0.0), ('▁', -2.0), ('a', -2.0), ('▁aé', -1.0)]
  units += [('<0x41>', -3.0)]
  tokenizer = tokenizers.Tokenizer(models.Unigram(units, 0, False))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.decoder = decoders.Metaspace()
  assert joined(tokenizer, 'a aé') == ' a aé'.encode()
  assert token_bytes(tokenizer)[4] == b'<0x41>'


def test_tokens_that_add_nothing():
  tokenizer = vocabulary.from_gguf(byte_level())
  pieces = token_bytes(tokenizer)
  assert pieces[256:259] == [b'', b'', b'<think>']  # control, and one's own
  assert token_bytes(tokenizer, [258, 262])[257:] == [
    *(b'', b'', b'he', b'll', b'llo', b'', b'xyz')
  ]
  assert len(pieces) == 264


def test_added_tokens_as_they_are_decoded():
  tokenizer = vocabulary.from_gguf(byte_level())
  tokenizer.add_tokens(['a b', '再Ġ', '    '])
  ids = [264, 265, 266]
  pieces = token_bytes(tokenizer)
  assert [pieces[i].decode() for i in ids] == ['a b', '再Ġ', '    ']
  assert [tokenizer.decode([i]) for i in ids] == ['a b', '再Ġ', '    ']


def test_ids_without_a_token():
  tokenizer = tokenizers.Tokenizer(models.BPE({'a': 0, 'Ġ': 3}, []))
  tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
  assert token_bytes(tokenizer) == [b'a', b'', b'', b' ']


def test_byte_level_known_by_how_it_encodes():
  tokenizer = tokenizers.Tokenizer(models.BPE({'a': 0, 'Ġ': 1}, []))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()]
  )
  assert token_bytes(tokenizer) == [b'a', b' ']


@pytest.mark.parametrize(
  ('decoder', 'said'),
  [
    (None, 'decoder is None, and only byte-level and SentencePiece'),
    (decoders.WordPiece(), "decoder is .'type': 'WordPiece'"),
    (decoders.BPEDecoder(), "decoder is .'type': 'BPEDecoder'"),
    (decoders.Metaspace('_'), "decoder is .'type': 'Metaspace', 'replacem"),
    (decoders.Replace('▁', '_'), "decoder is .'type': 'Replace'"),
  ],
  ids=str,
)
def test_tokenizers_that_are_not_read(decoder, said):
  tokenizer = tokenizers.Tokenizer(models.BPE({'a': 0}, []))
  if decoder is not None:
    tokenizer.decoder = decoder
  with pytest.raises(ValueError, match=said):
    token_bytes(tokenizer)
