"""Tokenizers of GGUFs: against sentencepiece, and word by word."""

import json
import math
from pathlib import Path

import pytest
import tokenizers

from persona_jax import models
from persona_jax.models import vocabulary

GOLDEN = Path(__file__).parent / 'golden' / 'vocabulary.json'
SENTENCEPIECE = json.loads(GOLDEN.read_text())
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


def metadata(**changes):
  """Metadata of a GGUF by their last names."""
  return {
    f'tokenizer.ggml.{k}' if k != 'architecture' else 'general.architecture': v
    for k, v in changes.items()
    if v is not None
  }


def sentencepiece(model, **changes):
  return metadata(
    **{
      'model': 'llama',
      'tokens': model['tokens'],
      'scores': model['scores'],
      'token_type': model['types'],
      'add_space_prefix': model['prefix'],
      'unknown_token_id': 0,
      'bos_token_id': 1,
      'eos_token_id': 2,
    }
    | changes
  )


def byte_level(pre='gpt-2', **changes):
  """Every byte, a few merges, and tokens of each type at the end."""
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  more = ['<s>', '</s>', '<think>', 'he', 'll', 'llo', 'hello', 'xyz']
  kinds = [CONTROL, CONTROL, USER_DEFINED] + [NORMAL] * 5
  return metadata(
    **{
      'model': 'gpt2',
      'pre': pre,
      'tokens': letters + more,
      'token_type': [NORMAL] * 256 + kinds,
      'merges': ['h e', 'l l', 'll o', 'he llo'],
      'bos_token_id': 256,
      'eos_token_id': 257,
    }
    | changes
  )


def tokens(tokenizer, text, **options):
  ids = tokenizer.encode(text, **options).ids
  return [tokenizer.id_to_token(i) for i in ids]


# SentencePiece.


@pytest.mark.parametrize('model', SENTENCEPIECE, ids=['llama', 'gemma'])
def test_sentencepiece_is_that_of_sentencepiece(model):
  tokenizer = vocabulary.from_gguf(sentencepiece(model))
  tokenizer.encode_special_tokens = True  # as sentencepiece reads a text
  for row in model['rows']:
    got = tokenizer.encode(row['text'], add_special_tokens=False).ids
    assert got == row['ids'], row['text']
    text = tokenizer.decode(got, skip_special_tokens=False)
    assert text == row['text'].replace('▁', ' ')


@pytest.mark.parametrize('model', SENTENCEPIECE, ids=['llama', 'gemma'])
def test_sentencepiece_survives_export(model):
  tokenizer = vocabulary.from_gguf(sentencepiece(model))
  again = tokenizers.Tokenizer.from_str(tokenizer.to_str())
  for row in model['rows']:
    assert again.encode(row['text']).ids == tokenizer.encode(row['text']).ids


def test_control_tokens_of_sentencepiece():
  tokenizer = vocabulary.from_gguf(sentencepiece(SENTENCEPIECE[1]))
  assert tokens(tokenizer, '<turn>a  b') == ['<s>', '<turn>', 'a', '  ', 'b']
  tokenizer.encode_special_tokens = True
  plain = tokens(tokenizer, '<turn><s>', add_special_tokens=False)
  assert not {'<turn>', '<s>'} & set(plain)


def test_merges_of_the_best_score_come_first():
  pieces = ['<unk>', 'a', 'b', 'ab', 'ba', 'aba', '▁', '<0x61>']
  tokenizer = vocabulary.from_gguf(
    metadata(
      model='llama',
      tokens=pieces,
      scores=[0.0, -9.0, -9.0, -2.0, -1.0, -3.0, -9.0, 0.0],
      token_type=[UNKNOWN, *[NORMAL] * 6, 6],
      unknown_token_id=0,
      bos_token_id=None,
      add_bos_token=False,
      add_space_prefix=False,
    )
  )
  # 'ba' is better than 'ab'; then 'a'+'ba' is a piece, and so is 'aba'.
  assert tokens(tokenizer, 'aba') == ['aba']
  assert tokens(tokenizer, 'bab') == ['ba', 'b']
  assert tokens(tokenizer, 'abab') == ['aba', 'b']
  assert tokens(tokenizer, 'zz') == ['<unk>']  # no bytes for a z: one, fused


def test_text_never_spells_a_control_token():
  tokenizer = vocabulary.from_gguf(
    metadata(
      model='llama',
      tokens=['<unk>', '<', 's', '>', '<s', '<s>'],
      scores=[0.0, -9.0, -9.0, -9.0, -1.0, -2.0],
      token_type=[UNKNOWN, *[NORMAL] * 4, CONTROL],
      unknown_token_id=0,
      add_bos_token=False,
      add_space_prefix=False,
    )
  )
  assert tokens(tokenizer, '<s>') == ['<s>']
  tokenizer.encode_special_tokens = True
  assert tokens(tokenizer, '<s>') == ['<s', '>']


def test_repeated_letters_join_from_the_left():
  pieces = ['<unk>', 'a', 'aa', 'aaa']
  tokenizer = vocabulary.from_gguf(
    metadata(
      model='llama',
      tokens=pieces,
      scores=[0.0, -9.0, -1.0, -2.0],
      token_type=[UNKNOWN, NORMAL, NORMAL, NORMAL],
      unknown_token_id=0,
      add_bos_token=False,
      add_space_prefix=False,
    )
  )
  # aa aa a: only the last two make a piece.
  assert tokens(tokenizer, 'a' * 5) == ['aa', 'aaa']


@pytest.mark.parametrize(
  ('architecture', 'want'),
  [
    ('phi3', ['<|user|>', '▁', 'a', '<s>', '▁', '▁', 'a']),
    ('llama', ['<|user|>', '▁', '▁', 'a', '<s>', '▁', '▁', 'a']),
  ],
)
def test_blanks_after_a_control_token(architecture, want):
  pieces = ['<unk>', '<s>', '<|user|>', 'a', '▁', '<0x0A>']
  tokenizer = vocabulary.from_gguf(
    metadata(
      architecture=architecture,
      model='llama',
      tokens=pieces,
      scores=[0.0] * 6,
      token_type=[UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL, 6],
      unknown_token_id=0,
      add_bos_token=False,
    )
  )
  assert tokens(tokenizer, '<|user|> a<s> a') == want


# Byte-level BPE.

TEXT = "I'LL pay 1234 ½ to myHTTPServer/x's  \n\n  …ok_"


def words(pre, text):
  """The text as cut before merging; a bar between two words."""
  tokenizer = vocabulary.from_gguf(byte_level(pre))
  cut = tokenizer.pre_tokenizer.pre_tokenize_str(text)
  return '|'.join(text[start:end] for _, (start, end) in cut)


@pytest.mark.parametrize(
  ('pres', 'want'),
  [
    (
      ['default'],
      "I|'|LL| pay| |123|4| |½| to| myHTTPServer|/|x|'|s|  \n\n  |…|ok|_",
    ),
    (
      ['gpt-2'],
      "I|'|LL| pay| 1234| ½| to| myHTTPServer|/|x|'s|  \n\n | …|ok|_",
    ),
    (
      ['smollm', 'refact'],
      "I|'|LL| pay| |1|2|3|4| |½| to| myHTTPServer|/|x|'s|  \n\n | …|ok|_",
    ),
    (
      ['qwen2', 'deepseek-r1-qwen'],
      "I|'LL| pay| |1|2|3|4| |½| to| myHTTPServer|/x|'s|  \n\n| | …|ok|_",
    ),
    (
      ['llama-bpe', 'llama3', 'llama-v3', 'falcon3', 'smaug-bpe', 'dbrx'],
      "I|'LL| pay| |123|4| |½| to| myHTTPServer|/x|'s|  \n\n| | …|ok|_",
    ),
    (
      ['tekken'],
      "I|'LL| pay| |1|2|3|4| |½| to| my|HTTPServer|/x|'s|  \n\n| | …|ok|_",
    ),
    (
      ['gpt-4o'],
      "I'LL| pay| |123|4| |½| to| my|HTTPServer|/x's|  \n\n| | …|ok|_",
    ),
  ],
  ids=lambda x: x[0] if isinstance(x, list) else '',
)
def test_words_before_merging(pres, want):
  for pre in pres:
    assert words(pre, TEXT) == want, pre


def test_every_pre_keeps_the_text():
  for pre in vocabulary.PRES:
    tokenizer = vocabulary.from_gguf(byte_level(pre))
    text = TEXT + ' 再见 🙂 \x00\t'
    assert tokenizer.decode(tokenizer.encode(text).ids) == text, pre


@pytest.mark.parametrize('pre', ['qwen2', 'llama-bpe'])
def test_only_qwen_composes_accents(pre):
  tokenizer = vocabulary.from_gguf(byte_level(pre))
  ids = tokenizer.encode('e\u0301', add_special_tokens=False).ids
  assert tokenizer.decode(ids) == ('é' if pre == 'qwen2' else 'e\u0301')


@pytest.mark.parametrize('pre', ['dbrx', 'llama-bpe', 'tekken', 'smaug-bpe'])
def test_whole_words_need_no_merges(pre):
  tokenizer = vocabulary.from_gguf(byte_level(pre))
  got = tokens(tokenizer, 'xyz', add_special_tokens=False)
  assert got == (['x', 'y', 'z'] if pre == 'dbrx' else ['xyz'])


def test_merges_and_added_tokens():
  tokenizer = vocabulary.from_gguf(byte_level())
  assert tokens(tokenizer, 'hello') == ['hello']
  assert tokens(tokenizer, 'hell<think>') == ['he', 'll', '<think>']
  assert tokens(tokenizer, '<s>') == ['<s>']
  tokenizer.encode_special_tokens = True
  assert tokens(tokenizer, '<s>') == ['<', 's', '>']
  assert tokens(tokenizer, '<think>') == ['<think>']  # no control token
  ids = [256, 258]
  assert tokenizer.decode(ids) == '<think>'


@pytest.mark.parametrize(
  ('changes', 'want'),
  [
    ({}, ['a']),
    ({'pre': 'llama-bpe'}, ['<s>', 'a']),
    ({'pre': 'tekken'}, ['<s>', 'a']),
    ({'pre': 'llama-bpe', 'add_bos_token': False}, ['a']),
    ({'add_bos_token': True, 'add_eos_token': True}, ['<s>', 'a', '</s>']),
    ({'add_eos_token': True}, ['a', '</s>']),
    ({'pre': 'llama-bpe', 'bos_token_id': None}, ['a']),
  ],
  ids=str,
)
def test_what_is_put_around_a_text(changes, want):
  tokenizer = vocabulary.from_gguf(byte_level(**changes))
  assert tokens(tokenizer, 'a') == want
  assert tokens(tokenizer, 'a', add_special_tokens=False) == ['a']


# Bad input.


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'pre': 'bloom'}, "'gpt2' with tokenizer.ggml.pre 'bloom' is not"),
    ({'pre': None}, 'pre None is not supported, only llama, and gpt2 with'),
    ({'pre': ['gpt-2']}, 'is not supported'),
    ({'model': 'bert'}, "model 'bert'"),
    ({'tokens': None}, 'tokenizer.ggml.tokens is None, not a list of str'),
    ({'tokens': [1, 2]}, 'not a list of str'),
    ({'tokens': ['a', 'b', 'a']}, 'has 3 tokens, but only 2 different'),
    ({'token_type': [1]}, 'token_type has 1 entries for 264 tokens'),
    ({'token_type': 'x'}, 'token_type is .x., not a list of int'),
    ({'merges': None}, 'merges is None, not a list of str'),
    ({'merges': ['he']}, "'he', which is no two tokens"),
    ({'merges': ['h q u']}, 'cannot be built'),
    ({'merges': ['h nothere']}, 'cannot be built'),
    (
      {'bos_token_id': 999, 'add_bos_token': True},
      'is 999, not one of the 264',
    ),
    ({'eos_token_id': -1, 'add_eos_token': True}, 'is -1, not one'),
    ({'eos_token_id': 'x', 'add_eos_token': True}, "is 'x', not one"),
    ({'model': 'llama'}, 'scores is None, not a list of float'),
    ({'model': 'llama', 'scores': [0.5]}, 'scores has 1 entries'),
  ],
  ids=str,
)
def test_vocabularies_that_are_not_read(changes, said):
  with pytest.raises(models.CheckpointError, match=said):
    vocabulary.from_gguf(byte_level(**changes))


def test_scores_that_are_no_numbers():
  model = SENTENCEPIECE[0]
  scores = [math.nan] * len(model['tokens'])
  tokenizer = vocabulary.from_gguf(sentencepiece(model, scores=scores))
  assert tokenizer.get_vocab_size() == len(model['tokens'])


def test_special_tokens_by_their_ids():
  assert vocabulary.special_of_gguf(byte_level()) == {
    'bos': '<s>',
    'eos': '</s>',
  }
  with pytest.raises(models.CheckpointError, match='padding_token_id is 264'):
    vocabulary.special_of_gguf(byte_level(padding_token_id=264))


def test_tokenizer_json_that_is_none(tmp_path):
  (tmp_path / 'tokenizer.json').write_text('{"model": 1}')
  with pytest.raises(models.CheckpointError, match='is not a tokenizer.json'):
    vocabulary.from_file(tmp_path / 'tokenizer.json')
