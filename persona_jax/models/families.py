"""Families of decoders: foreign configurations read as a `DecoderConfig`."""

from typing import Any, NamedTuple

import numpy as np

from persona_jax.models import config as config_lib

DecoderConfig = config_lib.DecoderConfig


class Family(NamedTuple):
  """What a `model_type` means beyond its numbers."""

  architecture: str  # the class of transformers
  qkv_bias: bool = False
  qk_norm: bool = False
  head_dim: int | None = None  # None: features / heads
  window: int | None = None  # sliding window of a config that names none


FAMILIES = {
  'llama': Family('LlamaForCausalLM'),
  'mistral': Family('MistralForCausalLM', window=4096),
  'qwen2': Family('Qwen2ForCausalLM', qkv_bias=True),
  'qwen3': Family('Qwen3ForCausalLM', qk_norm=True, head_dim=128),
}
GGUF_ARCHITECTURES = ('llama', 'qwen2', 'qwen3')  # mistral calls itself llama

# Fields that change the numbers, and the only values that we compute.
HF_ONLY = {
  'hidden_act': ('silu',),
  'attention_bias': (False,),
  'mlp_bias': (False,),
  'quantization_config': (None,),
}
GGUF_ONLY = {
  'rope.scaling.type': ('none',),
  'rope.scale_linear': (1.0,),
  'expert_count': (0,),
  'attention.sliding_window': (0,),
}


def from_hf(config: dict[str, Any]) -> DecoderConfig:
  """The `DecoderConfig` of a Hugging Face config.json, already parsed."""
  kind = config.get('model_type')
  family = _known(FAMILIES, kind, 'model_type')
  for field, allowed in HF_ONLY.items():
    _only(f'config.json: {field}', config.get(field, allowed[0]), allowed)
  _no_window(config, family)
  heads = _need(config, 'num_attention_heads')
  features = _need(config, 'hidden_size')
  return DecoderConfig(
    vocab=_need(config, 'vocab_size'),
    features=features,
    layers=_need(config, 'num_hidden_layers'),
    heads=heads,
    kv_heads=config.get('num_key_value_heads') or heads,
    head_dim=config.get('head_dim') or family.head_dim or features // heads,
    hidden=_need(config, 'intermediate_size'),
    rope_theta=_rope_theta(config),
    norm_eps=config.get('rms_norm_eps', 1e-6),
    tied=config.get('tie_word_embeddings', False),
    qkv_bias=family.qkv_bias,
    qk_norm=family.qk_norm,
    max_positions=_need(config, 'max_position_embeddings'),
  )


def from_gguf(metadata: dict[str, Any], *, tied: bool) -> DecoderConfig:
  """The `DecoderConfig` of a GGUF's metadata; tied: it has no output.weight."""
  kind = metadata.get('general.architecture')
  known = {k: FAMILIES[k] for k in GGUF_ARCHITECTURES}
  family = _known(known, kind, 'general.architecture')
  prefix = f'{kind}.'
  field = {
    k.removeprefix(prefix): v
    for k, v in metadata.items()
    if k.startswith(prefix)
  }
  for name, allowed in GGUF_ONLY.items():
    _only(f'{kind}.{name}', field.get(name, allowed[0]), allowed)
  heads = _need(field, 'attention.head_count')
  features = _need(field, 'embedding_length')
  head_dim = field.get('attention.key_length') or features // heads
  for name in ('attention.value_length', 'rope.dimension_count'):
    _only(f'{kind}.{name}', field.get(name, head_dim), (head_dim,))
  return DecoderConfig(
    vocab=len(_need(metadata, 'tokenizer.ggml.tokens')),
    features=features,
    layers=_need(field, 'block_count'),
    heads=heads,
    kv_heads=field.get('attention.head_count_kv') or heads,
    head_dim=head_dim,
    hidden=_need(field, 'feed_forward_length'),
    rope_theta=_short(field.get('rope.freq_base', 10_000.0)),
    norm_eps=_short(_need(field, 'attention.layer_norm_rms_epsilon')),
    tied=tied,
    qkv_bias=family.qkv_bias,
    qk_norm=family.qk_norm,
    max_positions=_need(field, 'context_length'),
  )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
  """A config.json for `config`: the inverse of `from_hf`."""
  kind = _kind(config)
  return {
    'model_type': kind,
    'architectures': [FAMILIES[kind].architecture],
    'vocab_size': config.vocab,
    'hidden_size': config.features,
    'num_hidden_layers': config.layers,
    'num_attention_heads': config.heads,
    'num_key_value_heads': config.kv_heads,
    'head_dim': config.head_dim,
    'intermediate_size': config.hidden,
    'hidden_act': 'silu',
    'rms_norm_eps': config.norm_eps,
    'rope_theta': config.rope_theta,
    'rope_parameters': {
      'rope_theta': config.rope_theta,
      'rope_type': 'default',
    },
    'tie_word_embeddings': config.tied,
    'max_position_embeddings': config.max_positions,
  }


def _kind(config: DecoderConfig) -> str:
  for kind, family in FAMILIES.items():
    if (family.qkv_bias, family.qk_norm) == (config.qkv_bias, config.qk_norm):
      return kind
  raise ValueError(
    f'qkv_bias={config.qkv_bias} with qk_norm={config.qk_norm} is no family '
    f'of {", ".join(FAMILIES)}; such a model has no Hugging Face layout.'
  )


def _known(table, kind, field) -> Family:
  if kind not in table:
    raise ValueError(
      f'{field} {kind!r} is not a decoder that we compute; known are '
      f'{", ".join(table)}. Add a row to models.families.FAMILIES.'
    )
  return table[kind]


def _need(record, field):
  value = record.get(field)
  if value is None:
    raise ValueError(f'{field} is missing from the configuration; add it.')
  if isinstance(value, list) and field != 'tokenizer.ggml.tokens':
    raise ValueError(
      f'{field}={value} differs from layer to layer; only one value for all '
      'layers is supported.'
    )
  return value


def _only(field, value, allowed):
  if value not in allowed:
    raise ValueError(
      f'{field}={value!r} is not supported, only '
      f'{" or ".join(map(repr, allowed))}: the outputs would be wrong. Use '
      'another checkpoint.'
    )


def _no_window(config, family):
  window = config.get('sliding_window', family.window)
  if config.get('use_sliding_window', config['model_type'] == 'mistral'):
    _only('config.json: sliding_window', window, (None,))
  kinds = set(config.get('layer_types') or ()) - {'full_attention'}
  _only('config.json: layer_types beyond full_attention', sorted(kinds), ([],))


def _rope_theta(config) -> float:
  """`rope_theta` as transformers 4 (top level) or 5 (in a record) keep it."""
  rope = config.get('rope_parameters') or {}
  for record in (rope, config.get('rope_scaling') or {}):
    kind = record.get('rope_type', record.get('type', 'default'))
    _only('config.json: rope_type', kind, ('default',))
  partial = rope.get(
    'partial_rotary_factor', config.get('partial_rotary_factor')
  )
  _only('config.json: partial_rotary_factor', partial, (None, 1.0))
  return float(rope.get('rope_theta') or config.get('rope_theta') or 10_000.0)


def _short(value: float) -> float:
  """The shortest decimal that is the same float32: 1e-05, not 9.99..e-06."""
  return float(str(np.float32(value)))
