"""Tokenizers: from a tokenizer.json, or rebuilt from a GGUF's metadata."""

from pathlib import Path
from typing import Any

CONTROL, USER_DEFINED = 3, 4  # GGUF's token types that text may not spell

# The splits of text before merging, as each tokenizer was trained.
_QWEN2 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_LLAMA3 = _QWEN2.replace(r'|\p{N}|', r'|\p{N}{1,3}|')


def from_file(path: str | Path):
  """The `tokenizers.Tokenizer` of a tokenizer.json."""
  import tokenizers

  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises bare Exceptions
    raise ValueError(
      f'{path} is not a tokenizer.json that tokenizers '
      f'{tokenizers.__version__} reads ({error}).'
    ) from error


def from_gguf(metadata: dict[str, Any]):
  """A byte-level BPE rebuilt from tokens, merges and token types."""
  import tokenizers
  from tokenizers import decoders, models

  pre = _pre(metadata)
  tokens = metadata['tokenizer.ggml.tokens']
  merges = metadata.get('tokenizer.ggml.merges', ())
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(merge.split(' ', 1)) for merge in merges],
      ignore_merges=pre == 'llama-bpe',
    )
  )
  normalizer, tokenizer.pre_tokenizer = _splits()[pre]
  if normalizer is not None:
    tokenizer.normalizer = normalizer
  tokenizer.decoder = decoders.ByteLevel()
  types = metadata.get('tokenizer.ggml.token_type', ())
  for kind, add in (
    (CONTROL, tokenizer.add_special_tokens),
    (USER_DEFINED, tokenizer.add_tokens),
  ):
    add(
      [
        tokenizers.AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, its in zip(tokens, types, strict=False)
        if its == kind
      ]
    )
  return tokenizer


def special_of_gguf(metadata: dict[str, Any]) -> dict[str, str]:
  """The texts of the special tokens that the metadata names."""
  tokens = metadata.get('tokenizer.ggml.tokens', ())
  rows = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}
  ids = {
    k: metadata.get(f'tokenizer.ggml.{v}_token_id') for k, v in rows.items()
  }
  return {k: tokens[i] for k, i in ids.items() if i is not None}


def _pre(metadata) -> str:
  model = metadata.get('tokenizer.ggml.model')
  pre = metadata.get('tokenizer.ggml.pre')
  if model != 'gpt2' or pre not in _splits():
    raise ValueError(
      f'tokenizer.ggml.model {model!r} with tokenizer.ggml.pre {pre!r} is '
      f'not supported, only gpt2 with {", ".join(_splits())}. Load the '
      "model's Hugging Face folder, which has a tokenizer.json."
    )
  return pre


def _splits():
  """tokenizer.ggml.pre -> (normalizer, pre_tokenizer)."""
  from tokenizers import normalizers, pre_tokenizers

  def byte_level(first, *, use_regex=False):
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([first, last])

  def split(pattern):
    import tokenizers

    return pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')

  digits = pre_tokenizers.Digits(individual_digits=True)
  return {
    'smollm': (None, byte_level(digits, use_regex=True)),
    'qwen2': (normalizers.NFC(), byte_level(split(_QWEN2))),
    'llama-bpe': (None, byte_level(split(_LLAMA3))),
  }
