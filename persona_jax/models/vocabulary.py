"""Tokenizers: from a tokenizer.json, or rebuilt from a GGUF's metadata."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from persona_jax.models import checkpoint

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # GGUF's

# The splits of text before merging, as each tokenizer was trained.
_GPT2 = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
  r'|\s+(?!\S)|\s+'
)
_QWEN2 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_LLAMA3 = _QWEN2.replace(r'|\p{N}|', r'|\p{N}{1,3}|')
_UPPER, _LOWER = (
  r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]',
  r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]',
)
_CASED = (  # words of a camelCase name come apart
  rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s'
  rf'|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s'
  r'| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_TEKKEN = _CASED % ('', '', r'\p{N}')
_GPT4O = _CASED % (_SHORT, _SHORT, r'\p{N}{1,3}')
_DEFAULT = (r'[\p{P}\$\+<=>\^~\|]+', _GPT2, r'\p{N}+', r'[0-9][0-9][0-9]')


class _Pre(NamedTuple):
  """What a tokenizer.ggml.pre stands for, beyond bytes and merges."""

  splits: tuple[str, ...]  # regular expressions, one after the other
  nfc: bool = False  # composes é of e and an accent
  whole_words: bool = False  # a word of the vocabulary needs no merges
  bos: bool = False  # unless tokenizer.ggml.add_bos_token says otherwise


_DIGITS = _Pre((r'\p{N}', _GPT2))
_LLAMA_BPE = _Pre((_LLAMA3,), whole_words=True, bos=True)
PRES = {
  'default': _Pre(_DEFAULT),
  'gpt-2': _Pre((_GPT2,)),
  'smollm': _DIGITS,
  'refact': _DIGITS,  # Granite 3
  'qwen2': _Pre((_QWEN2,), nfc=True),
  'deepseek-r1-qwen': _Pre((_QWEN2,)),
  'llama-bpe': _LLAMA_BPE,
  'llama3': _LLAMA_BPE,
  'llama-v3': _LLAMA_BPE,
  'falcon3': _LLAMA_BPE,
  'smaug-bpe': _Pre((_LLAMA3,), whole_words=True),  # SmolLM 3
  'dbrx': _Pre((_LLAMA3,)),  # OLMo 2, Phi-4, Granite 4
  'tekken': _Pre((_TEKKEN,), whole_words=True, bos=True),  # Mistral Nemo
  'gpt-4o': _Pre((_GPT4O,)),  # Phi-4-mini
}


def from_file(path: str | Path):
  """The `tokenizers.Tokenizer` of a tokenizer.json."""
  import tokenizers

  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises bare Exceptions
    raise checkpoint.CheckpointError(
      f'{path} is not a tokenizer.json that tokenizers '
      f'{tokenizers.__version__} reads ({error}).'
    ) from error


def fitting(tokenizer, rows: int, where: str):
  """The tokenizer, when every token has one of the embedding's rows.

  Spare rows are padding. A control token without a row (Gemma 3's image token
  in models that do not see) becomes plain text.

  Raises:
    CheckpointError: it has more tokens than the embedding rows.
  """
  import tokenizers

  added = tokenizer.get_added_tokens_decoder()
  beyond = {i for i, token in added.items() if i >= rows and token.special}
  size = max(set(tokenizer.get_vocab().values()) - beyond, default=-1) + 1
  if size > rows:
    raise checkpoint.CheckpointError(
      f'{where}: the tokenizer has {size} tokens, the embedding {rows} rows; '
      'they are not of one model. Fetch both again.'
    )
  if not beyond:
    return tokenizer
  record = json.loads(tokenizer.to_str())
  kept = [x for x in record['added_tokens'] if x['id'] not in beyond]
  return tokenizers.Tokenizer.from_str(
    json.dumps(record | {'added_tokens': kept})
  )


def from_gguf(metadata: dict[str, Any]):
  """The tokenizer that a GGUF describes: byte-level BPE or SentencePiece."""
  pre = _pre(metadata)
  tokens = _array(metadata, 'tokens', (str,))
  if len(set(tokens)) < len(tokens):
    raise checkpoint.CheckpointError(
      f'tokenizer.ggml.tokens has {len(tokens):,} tokens, but only '
      f'{len(set(tokens)):,} different ones; fetch the file again.'
    )
  types = [NORMAL] * len(tokens)
  if 'tokenizer.ggml.token_type' in metadata:
    types = _array(metadata, 'token_type', (int,), like=tokens)
  try:
    if pre is None:
      tokenizer = _sentencepiece(metadata, tokens, types)
    else:
      tokenizer = _byte_level(metadata, tokens, pre)
    _add(tokenizer, metadata, tokens, types)
    _surround(tokenizer, metadata, pre is None or pre.bos)
  except checkpoint.CheckpointError:
    raise
  except Exception as error:  # the library raises bare Exceptions
    raise checkpoint.CheckpointError(
      f'The tokenizer of the metadata cannot be built ({error}); fetch the '
      'file again.'
    ) from error
  return tokenizer


def special_of_gguf(metadata: dict[str, Any]) -> dict[str, str]:
  """The texts of the special tokens that the metadata names."""
  rows = {'bos': 'bos', 'eos': 'eos', 'unk': 'unknown', 'pad': 'padding'}
  found = {ours: _special(metadata, theirs) for ours, theirs in rows.items()}
  return {ours: text for ours, text in found.items() if text is not None}


def _special(metadata, name: str) -> str | None:
  tokens = _array(metadata, 'tokens', (str,))
  i = metadata.get(f'tokenizer.ggml.{name}_token_id')
  if i is None:
    return None
  if not isinstance(i, int) or not 0 <= i < len(tokens):
    raise checkpoint.CheckpointError(
      f'tokenizer.ggml.{name}_token_id is {i!r:.40}, not one of the '
      f'{len(tokens):,} tokens; fetch the file again.'
    )
  return tokens[i]


def _pre(metadata) -> _Pre | None:
  """How text is split; None for SentencePiece, which does not."""
  model = metadata.get('tokenizer.ggml.model')
  pre = metadata.get('tokenizer.ggml.pre')
  if model == 'llama':
    return None
  if model != 'gpt2' or not isinstance(pre, str) or pre not in PRES:
    raise checkpoint.CheckpointError(
      f'tokenizer.ggml.model {model!r:.40} with tokenizer.ggml.pre '
      f'{pre!r:.40} is not supported, only llama, and gpt2 with '
      f"{', '.join(PRES)}. Load the model's Hugging Face folder, which has a "
      'tokenizer.json.'
    )
  return PRES[pre]


def _array(metadata, name: str, kinds: tuple[type, ...], like=None) -> list:
  """A list of the metadata, all of some kinds, and as long as `like`."""
  key = f'tokenizer.ggml.{name}'
  values = metadata.get(key)
  if not isinstance(values, list) or set(map(type, values)) - set(kinds):
    raise checkpoint.CheckpointError(
      f'{key} is {values!r:.40}, not a list of {kinds[0].__name__}; fetch the '
      'file again.'
    )
  if like is not None and len(values) != len(like):
    raise checkpoint.CheckpointError(
      f'{key} has {len(values):,} entries for {len(like):,} tokens; fetch the '
      'file again.'
    )
  return values


def _byte_level(metadata, tokens, pre: _Pre):
  import tokenizers
  from tokenizers import decoders, models, normalizers, pre_tokenizers

  merges = _array(metadata, 'merges', (str,))
  model = models.BPE(
    vocab={token: i for i, token in enumerate(tokens)},
    merges=[_pair(merge) for merge in merges],
    ignore_merges=pre.whole_words,
  )
  tokenizer = tokenizers.Tokenizer(model)
  if pre.nfc:
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(split), 'isolated')
      for split in pre.splits
    ]
    + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _pair(merge: str) -> tuple[str, str]:
  left, blank, right = merge.partition(' ')
  if not (left and right):
    raise checkpoint.CheckpointError(
      f'tokenizer.ggml.merges has {merge!r:.40}, which is no two tokens with '
      'a blank between them; fetch the file again.'
    )
  return left, right


def _sentencepiece(metadata, tokens, types):
  """SentencePiece's BPE, which joins whatever scores best, as merges."""
  import tokenizers
  from tokenizers import decoders, models, normalizers

  scores = _array(metadata, 'scores', (float, int), like=tokens)
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=_merges(tokens, types, scores),
      unk_token=_special(metadata, 'unknown'),
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  blanks = normalizers.Replace(' ', '▁')
  decoder = [decoders.Replace('▁', ' '), decoders.ByteFallback()]
  decoder.append(decoders.Fuse())
  if metadata.get('tokenizer.ggml.add_space_prefix', True):
    blanks = normalizers.Sequence([normalizers.Prepend('▁'), blanks])
    decoder.append(decoders.Strip(' ', 1, 0))
  tokenizer.normalizer = blanks
  tokenizer.decoder = decoders.Sequence(decoder)
  return tokenizer


def _merges(tokens, types, scores) -> list[tuple[str, str]]:
  """Every split of a token into two others, the best token's first.

  Of one token's splits the longest left half comes first, so that repeated
  letters join from the left as in SentencePiece. Control tokens and bytes are
  never spelled out by text, and user-defined ones are found before merging.
  """
  known = {
    token
    for token, kind in zip(tokens, types, strict=True)
    if kind in (NORMAL, UNUSED)
  }
  best = sorted(zip(scores, tokens, strict=True), key=lambda x: -x[0])
  return [
    (token[:i], token[i:])
    for _, token in best
    if token in known
    for i in range(len(token) - 1, 0, -1)
    if token[:i] in known and token[i:] in known
  ]


def _add(tokenizer, metadata, tokens, types):
  """Tells the tokenizer which tokens are looked for before merging."""
  import tokenizers

  phi3 = metadata.get('general.architecture') == 'phi3'
  eats = phi3 and metadata['tokenizer.ggml.model'] == 'llama'
  spares = ('<unk>', '<s>', '<|endoftext|>')

  def added(kinds, special):
    return [
      tokenizers.AddedToken(
        token,
        normalized=False,
        special=special,
        rstrip=eats and token not in spares,  # as Phi-3's tokenizer.json
      )
      for token, kind in zip(tokens, types, strict=True)
      if kind in kinds
    ]

  tokenizer.add_special_tokens(added((UNKNOWN, CONTROL), True))
  tokenizer.add_tokens(added((USER_DEFINED,), False))


def _surround(tokenizer, metadata, bos: bool):
  """Sets what `encode` puts around a text unless told not to."""
  from tokenizers import processors

  wanted = {
    name: metadata.get(f'tokenizer.ggml.add_{name}_token', default)
    for name, default in (('bos', bos), ('eos', False))
  }
  texts = {
    name: _special(metadata, name) if wanted[name] else None for name in wanted
  }
  parts = [texts['bos'], '$A', texts['eos']]
  used = [text for text in texts.values() if text is not None]
  if used:
    tokenizer.post_processor = processors.TemplateProcessing(
      single=[part for part in parts if part is not None],
      special_tokens=[
        (text, tokenizer.token_to_id(text)) for text in set(used)
      ],
    )
