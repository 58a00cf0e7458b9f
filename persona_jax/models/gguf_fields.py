"""The metadata of a GGUF file read as a `DecoderConfig`."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from persona_jax.models import families
from persona_jax.models.checkpoint import CheckpointError
from persona_jax.models.config import DecoderConfig, Experts, Rope
from persona_jax.models.fields import Fields

# general.architecture -> our family; mistral and falcon 3 are called llama.
ARCHITECTURES = {
  'llama': 'llama',
  'qwen2': 'qwen2',
  'qwen3': 'qwen3',
  'qwen3moe': 'qwen3_moe',
  'gemma2': 'gemma2',
  'gemma3': 'gemma3_text',
  'phi3': 'phi3',
  'olmo2': 'olmo2',
  'granite': 'granite',
  'smollm3': 'smollm3',
}
# What llama.cpp knows by the architecture alone.
_SLIDING_EVERY = {'gemma2': 2, 'gemma3': 6}  # but for one in so many layers
_ROPELESS_EVERY = {'smollm3': 4}
_LOCAL_THETA = {'gemma3': 10_000.0}
_WIDE_HEADS = {'gemma2': 46, 'gemma3': 62}  # 27B: scale by features / heads

FACTORS = 'rope_freqs.weight'  # Llama 3
SHORT, LONG = 'rope_factors_short.weight', 'rope_factors_long.weight'


def from_gguf(
  metadata: Mapping[str, Any],
  tensors: Collection[str],
  read: Callable[[str], np.ndarray],
) -> DecoderConfig:
  """The `DecoderConfig` of a GGUF's metadata.

  Args:
    metadata: all fields.
    tensors: the names of the tensors; without output.weight it is tied.
    read: gives a tensor, for the frequencies that are kept as such.

  Raises:
    CheckpointError: a field is missing, of a wrong type, or set to what we do
      not compute.
  """
  kind = Fields(metadata, 'the GGUF').text('general.architecture')
  families.known(kind, ARCHITECTURES, 'general.architecture')
  fields = Fields(
    {
      k.removeprefix(f'{kind}.'): _plain(v)
      for k, v in metadata.items()
      if k.startswith(f'{kind}.')
    },
    f'{kind} metadata',
  )
  tokens = metadata.get('tokenizer.ggml.tokens')
  if not isinstance(tokens, list):
    raise CheckpointError('tokenizer.ggml.tokens is missing; add it.')
  found = _numbers(fields, len(tokens))
  found['tied'] = 'output.weight' not in tensors
  family = ARCHITECTURES[kind]
  if fields.whole('expert_count') and family == 'llama':
    family = 'mixtral'
  found |= {'family': family} | families.FAMILIES[family].same
  found |= _scales(fields, kind, found) | _experts(fields, family)
  found |= _kinds(fields, kind, found, tensors, read)
  return families.make(found)


def _numbers(fields, vocab) -> dict[str, Any]:
  heads = fields.count('attention.head_count')
  features = fields.count('embedding_length')
  head_dim = fields.count('attention.key_length', max(1, features // heads))
  fields.only('attention.value_length', (head_dim,))
  return {
    'vocab': vocab,
    'features': features,
    'layers': fields.count('block_count', most=families.MOST),
    'heads': heads,
    'kv_heads': fields.count('attention.head_count_kv', heads),
    'head_dim': head_dim,
    'hidden': fields.count('feed_forward_length'),
    'norm_eps': _short(fields.number('attention.layer_norm_rms_epsilon')),
    'max_positions': fields.count('context_length'),
  }


def _scales(fields, kind, read) -> dict[str, Any]:
  if kind.startswith('gemma'):
    width = read['head_dim']
    if read['layers'] == _WIDE_HEADS[kind]:
      width = read['features'] // read['heads']
    return {
      'embed_scale': math.sqrt(read['features']),
      'attn_scale': width**-0.5,
      'attn_softcap': _softcap(fields, kind, 'attn_logit_softcapping', 50.0),
      'logit_softcap': _softcap(fields, kind, 'final_logit_softcapping', 30.0),
    }
  if kind == 'granite':
    scale = lambda name: _short(fields.number(name, 1.0))
    return {
      'embed_scale': scale('embedding_scale'),
      'residual_scale': scale('residual_scale'),
      'attn_scale': _short(fields.number('attention.scale')),
      'logit_divisor': scale('logit_scale'),
    }
  return {}


def _softcap(fields, kind, name, default):
  return fields.number(name, default if kind == 'gemma2' else None)


def _experts(fields, family) -> dict[str, Any]:
  if not fields.whole('expert_count'):
    return {}
  count = fields.count('expert_count', most=families.MOST)
  fields.only('expert_shared_count', (0,))
  own = fields.count('expert_feed_forward_length', None)
  return {
    'experts': Experts(count, fields.count('expert_used_count'), True),
  } | ({} if own is None else {'hidden': own})


def _kinds(fields, kind, read, tensors, tensor) -> dict[str, Any]:
  layers = range(read['layers'])
  rope = _rope(fields, kind, read, tensors, tensor)
  window = fields.whole('attention.sliding_window') or None
  every = _SLIDING_EVERY.get(kind)
  slides = [window and (not every or (i + 1) % every != 0) for i in layers]
  local = rope
  if kind in _LOCAL_THETA:
    local = Rope(fields.number('rope.freq_base_swa', _LOCAL_THETA[kind]))
  ropes = [local if slide else rope for slide in slides]
  step = _ROPELESS_EVERY.get(kind)
  if step:
    ropes = [None if (i + 1) % step == 0 else rope for i in layers]
  return families.layout([window if x else None for x in slides], ropes)


def _rope(fields, kind, read, tensors, tensor) -> Rope:
  default = 1_000_000.0 if kind == 'gemma3' else 10_000.0
  theta = _short(fields.number('rope.freq_base', default))
  rotary = fields.count('rope.dimension_count', read['head_dim'])
  fields.check(
    'rope.dimension_count',
    rotary <= read['head_dim'],
    f'a head has {read["head_dim"]} features',
  )
  fraction = rotary / read['head_dim']
  scaling = fields.text('rope.scaling.type', 'none')
  fields.only('rope.scaling.type', ('none', 'linear', 'yarn', 'longrope'))
  factor = fields.number('rope.scaling.factor', None)
  factor = factor or fields.number('rope.scale_linear', 1.0)
  longest = read['max_positions']
  original = fields.count('rope.scaling.original_context_length', longest)
  size = 'original_max_position_embeddings'
  if SHORT in tensors:
    fields.check('rope_factors', LONG in tensors, f'{LONG} is missing')
    numbers = {
      'short_factor': _floats(tensor(SHORT)),
      'long_factor': _floats(tensor(LONG)),
      'attention_factor': fields.number('rope.scaling.attn_factor', None),
      'factor': longest / original,
      size: original,
    }
    return _named(theta, 'longrope', numbers, fraction)
  if FACTORS in tensors:
    return _llama3(theta, _floats(tensor(FACTORS)), longest, fraction)
  if scaling == 'yarn':
    numbers = {'factor': factor, size: original} | _yarn(fields)
    return _named(theta, 'yarn', numbers, fraction)
  if scaling == 'linear' or factor != 1:
    return _named(theta, 'linear', {'factor': factor}, fraction)
  return Rope(theta, fraction=fraction)


def _yarn(fields) -> dict[str, float | None]:
  """What llama.cpp lets a file change of YaRN, as far as we compute it."""
  name = 'rope.scaling.'
  for factor in ('attn_factor', 'yarn_attn_factor', 'yarn_ext_factor'):
    fields.only(name + factor, (1.0,))
  fields.only(name + 'yarn_log_multiplier', (0.0,))
  betas = ('beta_fast', 'beta_slow')
  return {x: fields.number(f'{name}yarn_{x}', None) for x in betas}


def _llama3(theta, factors, longest, fraction) -> Rope:
  """The numbers of Llama 3.x behind the factors, or the factors themselves."""
  from persona_jax.models import rope

  numbers = {
    'factor': max(factors),
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  }
  one = _named(theta, 'llama3', numbers, fraction)
  head_dim = round(2 * len(factors) / fraction)
  plain = rope.table(Rope(theta, fraction=fraction), head_dim).frequencies
  again = plain / rope.table(one, head_dim).frequencies
  if np.allclose(again, factors, rtol=1e-4):
    return one
  numbers = {
    'short_factor': factors,
    'long_factor': factors,
    'attention_factor': 1.0,
    'factor': 1.0,
    'original_max_position_embeddings': longest,
  }
  return _named(theta, 'longrope', numbers, fraction)


def _named(theta, kind, numbers, fraction) -> Rope:
  scaling = sorted((k, v) for k, v in numbers.items() if v is not None)
  return Rope(theta, kind, tuple(scaling), fraction)


def _floats(array) -> tuple[float, ...]:
  return tuple(float(x) for x in np.asarray(array).reshape(-1))


def _plain(value):
  """Numbers as Python's own; a list of one repeated value as that value."""
  if isinstance(value, list) and value and all(x == value[0] for x in value):
    value = value[0]
  return value.item() if isinstance(value, np.generic) else value


def _short(value: float) -> float:
  """The shortest decimal that is the same float32: 1e-05, not 9.99..e-06."""
  return float(str(np.float32(value)))
