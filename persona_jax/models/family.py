"""The table of families: what each does its own way, field by field.

A family is a row: what it always does (`same`), and the Hugging Face fields
that only it has, read by `more` and written by `less`.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from persona_jax.models import rope_fields
from persona_jax.models.config import Experts
from persona_jax.models.fields import FULL, SLIDING

MOST = 1000  # layers, and experts of a layer
_GEMMA = {
  'norm_after': True,
  'norm_offset': 1.0,
  'activation': 'gelu_tanh',
}


class Family(NamedTuple):
  """What a `model_type` means beyond its numbers.

  `slides(fields, layers)` tells the layers with a window. `more` reads what
  no other family has, and `less` writes it.
  """

  architecture: str  # the class of transformers
  same: Mapping[str, Any] = {}  # fields of every DecoderConfig of the family
  defaults: Mapping[str, Any] = {}  # of fields that a config.json may leave out
  slides: Callable = lambda fields, layers: [False] * layers
  layered: bool = False  # config.json may name the kind of each layer
  ropes: Callable = rope_fields.same_everywhere
  more: Callable = lambda fields, config: {}
  less: Callable = lambda config: {}


def _all_slide(fields, layers):
  return [True] * layers


def _late_slide(fields, layers):
  return [i >= fields.count('max_window_layers', 28) for i in range(layers)]


def _all_but_every(default):
  def slides(fields, layers):
    every = fields.count('_sliding_window_pattern', None)
    every = fields.count('sliding_window_pattern', None) or every or default
    return [(i + 1) % every != 0 for i in range(layers)]

  return slides


def _without_rope_slide(fields, layers):
  return [not turns for turns in rope_fields.turning(fields, layers)]


def _gemma(fields, read):
  fields.ignore('hidden_act')  # transformers reads hidden_activation
  fields.only('sliding_window_size', (fields.count('sliding_window', None),))
  fields.only('use_bidirectional_attention', (False,))
  cap = lambda name: fields.number(name, None)
  return {
    'embed_scale': math.sqrt(read['features']),
    'attn_scale': fields.number('query_pre_attn_scalar') ** -0.5,
    'attn_softcap': cap('attn_logit_softcapping'),
    'logit_softcap': cap('final_logit_softcapping'),
  }


def _gemma_out(config):
  return _windowed_out(config) | {
    'query_pre_attn_scalar': _round(config.attn_scale**-2),
    'attn_logit_softcapping': config.attn_softcap,
    'final_logit_softcapping': config.logit_softcap,
  }


def _granite(fields, read):
  return {
    'embed_scale': fields.number('embedding_multiplier', 1.0),
    'residual_scale': fields.number('residual_multiplier', 1.0),
    'attn_scale': fields.number('attention_multiplier', 1.0),
    'logit_divisor': fields.number('logits_scaling', 1.0),
  }


def _granite_out(config):
  return {
    'embedding_multiplier': config.embed_scale,
    'residual_multiplier': config.residual_scale,
    'attention_multiplier': config.attn_scale,
    'logits_scaling': config.logit_divisor,
  }


def _chunked(fields, read):
  """Dual chunk attention (Qwen 1M), which is plain within the first chunk."""
  name = 'dual_chunk_attention_config'
  record = fields.record(name, None)
  if record is None:
    return {}
  inner = fields.inner(record, name)
  plain = inner.count('chunk_size') - inner.count('local_size')
  fields.check(name, plain > 0, 'chunk_size must be above local_size')
  return {'max_positions': min(read['max_positions'], plain)}


def _qwen3_moe(fields, read):
  fields.only('decoder_sparse_step', (1,))
  fields.only('mlp_only_layers', ([],))
  count = fields.count('num_local_experts', None, most=MOST)
  return _chunked(fields, read) | {
    'hidden': fields.count('moe_intermediate_size'),
    'experts': Experts(
      count=count or fields.count('num_experts', most=MOST),
      active=fields.count('num_experts_per_tok'),
      normalised=fields.flag('norm_topk_prob', False),
    ),
  }


def _qwen3_moe_out(config):
  return _windowed_out(config) | {
    'moe_intermediate_size': config.hidden,
    'num_experts': config.experts.count,
    'num_experts_per_tok': config.experts.active,
    'norm_topk_prob': config.experts.normalised,
    'decoder_sparse_step': 1,
    'mlp_only_layers': [],
  }


def _mixtral(fields, read):
  count = fields.count('num_local_experts', most=MOST)
  active = fields.count('num_experts_per_tok')
  return {'experts': Experts(count, active, normalised=True)}


def _mixtral_out(config):
  return _window_out(config) | {
    'num_local_experts': config.experts.count,
    'num_experts_per_tok': config.experts.active,
  }


def _window(config) -> int | None:
  return next((k.window for k in config.kinds if k.window is not None), None)


def _window_out(config):
  return {'sliding_window': _window(config)}


def _windowed_out(config):
  """Layer by layer, with the switch that the Qwens have."""
  types = [SLIDING if slides else FULL for slides in config.slides]
  return _window_out(config) | {'layer_types': types} | _switch_out(config)


def _switch_out(config):
  if config.family not in ('qwen2', 'qwen3', 'qwen3_moe', 'smollm3'):
    return {}
  return {'use_sliding_window': _window(config) is not None}


def _smollm3_out(config):
  turning = [config.kinds[k].rope is not None for k in config.kind_of]
  return _windowed_out(config) | {'no_rope_layers': [int(x) for x in turning]}


def _round(x: float) -> int | float:
  """The integer that `x` is but for rounding, or `x`."""
  return round(x) if math.isclose(x, round(x), rel_tol=1e-12) else x


FAMILIES = {
  'llama': Family('LlamaForCausalLM'),
  'mistral': Family(
    'MistralForCausalLM',
    defaults={'sliding_window': 4096},
    slides=_all_slide,
    less=_window_out,
  ),
  'mixtral': Family(
    'MixtralForCausalLM',
    defaults={'rms_norm_eps': 1e-5},
    slides=_all_slide,
    ropes=functools.partial(rope_fields.same_everywhere, default=1_000_000.0),
    more=_mixtral,
    less=_mixtral_out,
  ),
  'qwen2': Family(
    'Qwen2ForCausalLM',
    same={'qkv_bias': True},
    defaults={'use_sliding_window': False},
    slides=_late_slide,
    layered=True,
    more=_chunked,
    less=_windowed_out,
  ),
  'qwen3': Family(
    'Qwen3ForCausalLM',
    same={'qk_norm': 'head'},
    defaults={'head_dim': 128, 'use_sliding_window': False},
    slides=_late_slide,
    layered=True,
    more=_chunked,
    less=_windowed_out,
  ),
  'qwen3_moe': Family(
    'Qwen3MoeForCausalLM',
    same={'qk_norm': 'head'},
    defaults={'use_sliding_window': False},
    slides=_all_slide,
    more=_qwen3_moe,
    less=_qwen3_moe_out,
  ),
  'gemma2': Family(
    'Gemma2ForCausalLM',
    same=_GEMMA,
    defaults={
      'head_dim': 256,
      'query_pre_attn_scalar': 256,
      'sliding_window': 4096,
      'attn_logit_softcapping': 50.0,
      'final_logit_softcapping': 30.0,
      'tie_word_embeddings': True,
    },
    slides=_all_but_every(2),
    layered=True,
    more=_gemma,
    less=_gemma_out,
  ),
  'gemma3_text': Family(
    'Gemma3ForCausalLM',
    same=_GEMMA | {'qk_norm': 'head'},
    defaults={
      'vocab_size': 262_208,
      'num_attention_heads': 8,
      'num_key_value_heads': 4,
      'head_dim': 256,
      'max_position_embeddings': 131_072,
      'query_pre_attn_scalar': 256,
      'sliding_window': 4096,
      'tie_word_embeddings': True,
    },
    slides=_all_but_every(6),
    layered=True,
    ropes=rope_fields.local_and_global,
    more=_gemma,
    less=_gemma_out,
  ),
  'phi3': Family(
    'Phi3ForCausalLM',
    defaults={
      'rms_norm_eps': 1e-5,
      'original_max_position_embeddings': 4096,
    },
    slides=_all_slide,
    less=_window_out,
  ),
  'olmo2': Family(
    'Olmo2ForCausalLM',
    defaults={'rms_norm_eps': 1e-5},
    same={'qk_norm': 'whole', 'norm_before': False, 'norm_after': True},
  ),
  'granite': Family('GraniteForCausalLM', more=_granite, less=_granite_out),
  'smollm3': Family(
    'SmolLM3ForCausalLM',
    defaults={
      'tie_word_embeddings': True,
      'use_sliding_window': False,
    },
    slides=_without_rope_slide,
    layered=True,
    ropes=rope_fields.some_turn,
    less=_smollm3_out,
  ),
}
