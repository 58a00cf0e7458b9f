"""Families of decoders: foreign configurations read as a `DecoderConfig`.

A family is a row: what it always does (`same`), and the Hugging Face fields
that only it has. `from_hf` and `to_hf` are inverse to each other.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from persona_jax.models import rope_fields
from persona_jax.models.checkpoint import CheckpointError
from persona_jax.models.config import DecoderConfig, Experts, Kind
from persona_jax.models.fields import FULL, SLIDING, Fields

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


def from_hf(
  config: Mapping[str, Any], *, inert: tuple[str, ...] = ()
) -> DecoderConfig:
  """The `DecoderConfig` of a Hugging Face config.json, already parsed.

  Args:
    config: the parsed file.
    inert: names of unknown fields that may be ignored.

  Raises:
    CheckpointError: a field is missing, contradictory, unknown or set to what
      we do not compute; all unknown ones are named at once.
  """
  fields = Fields(config, 'config.json', inert)
  family = known(fields.text('model_type'), FAMILIES, 'model_type')
  fields = fields.with_defaults(FAMILIES[family].defaults)
  _refuse(fields)
  read = _numbers(fields, family)
  read |= _kinds(fields, FAMILIES[family], read['layers'], read['head_dim'])
  read |= FAMILIES[family].same
  read |= FAMILIES[family].more(fields, read)
  fields.all_known()
  return make(read)


def text_part(settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
  """The configuration of the decoder inside, and the prefix of its tensors.

  Of a model that also sees (Gemma 3 from 4B on) only the text is computed.
  """
  kind = settings.get('model_type')
  inner = settings.get('text_config')
  if kind not in SEEING or not isinstance(inner, Mapping):
    return settings, ''
  outer = {k: settings[k] for k in _OF_ALL if settings.get(k) is not None}
  return {'model_type': f'{kind}_text', **outer, **inner}, PREFIX


def to_hf(config: DecoderConfig) -> dict[str, Any]:
  """A config.json for `config`: the inverse of `from_hf`."""
  family = FAMILIES[config.family]
  sliding = [config.kinds[k].window is not None for k in config.kind_of]
  activation = _ACTIVATIONS[config.activation]
  return {
    'model_type': config.family,
    'architectures': [family.architecture],
    'vocab_size': config.vocab,
    'hidden_size': config.features,
    'num_hidden_layers': config.layers,
    'num_attention_heads': config.heads,
    'num_key_value_heads': config.kv_heads,
    'head_dim': config.head_dim,
    'intermediate_size': config.hidden,
    _activation_field(config.family): activation,
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tied,
    'max_position_embeddings': config.max_positions,
    'bos_token_id': None,  # or transformers takes its class's own
    'eos_token_id': None,
    'pad_token_id': None,
    **rope_fields.written(config, sliding),
    **family.less(config),
  }


def make(read: Mapping[str, Any]) -> DecoderConfig:
  """A `DecoderConfig`, its own complaints as a CheckpointError."""
  try:
    return DecoderConfig(**read)
  except ValueError as error:
    raise CheckpointError(f'contradictory configuration: {error}') from error


def known(kind: str, table, field: str) -> str:
  """`kind`, if it is a row of `table`."""
  if kind not in table:
    raise CheckpointError(
      f'{field} {kind!r} is not a decoder that we compute; known are '
      f'{", ".join(table)}. Add a row to models.families.FAMILIES.'
    )
  return kind


def layout(windows, ropes) -> dict[str, Any]:
  """`kinds` and `layout` of a DecoderConfig from lists over layers."""
  kinds = [Kind(r, w) for r, w in zip(ropes, windows, strict=True)]
  unique = tuple(dict.fromkeys(kinds))
  alike = len(unique) == 1
  return {
    'kinds': unique,
    'layout': () if alike else tuple(unique.index(k) for k in kinds),
  }


def _refuse(fields):
  for name, allowed in _ONLY.items():
    fields.only(name, allowed)


def _numbers(fields, family) -> dict[str, Any]:
  heads = fields.count('num_attention_heads')
  features = fields.count('hidden_size')
  head_dim = fields.count('head_dim', None)
  if head_dim is None:
    if features % heads:
      raise CheckpointError(
        f'config.json: hidden_size={features} is not a multiple of '
        f'num_attention_heads={heads}, and there is no head_dim; add it.'
      )
    head_dim = features // heads
  fields.check('head_dim', head_dim % 2 == 0, f'{head_dim} is odd; pairs turn')
  names = {v: k for k, v in _ACTIVATIONS.items()}
  field = _activation_field(family)
  usual = 'silu' if field == 'hidden_act' else 'gelu_pytorch_tanh'
  activation = fields.text(field, usual)
  fields.only(field, tuple(names))
  return {
    'family': family,
    'vocab': fields.count('vocab_size'),
    'features': features,
    'layers': fields.count('num_hidden_layers', most=MOST),
    'heads': heads,
    'kv_heads': fields.count('num_key_value_heads', None) or heads,
    'head_dim': head_dim,
    'hidden': fields.count('intermediate_size'),
    'norm_eps': fields.number('rms_norm_eps', 1e-6),
    'tied': fields.flag('tie_word_embeddings', False),
    'activation': names[activation],
    'max_positions': fields.count('max_position_embeddings'),
  }


def _kinds(fields, family, layers, head_dim) -> dict[str, Any]:
  window = fields.count('sliding_window', None)
  used = fields.flag('use_sliding_window', window is not None)
  slides = family.slides(fields, layers) if used else [False] * layers
  types = fields.list('layer_types', None)
  if types is not None:
    fields.check(
      'layer_types',
      len(types) == layers and set(types) <= {SLIDING, FULL},
      f'it needs {layers} entries, each {SLIDING} or {FULL}',
    )
    listed = [x == SLIDING for x in types]
    fields.check(
      'layer_types',
      listed == slides or (used and family.layered),
      f'{family.architecture} does not choose its windows by it; drop it',
    )
    slides = listed
  if any(slides) and window is None:
    raise CheckpointError(
      'config.json: some layers slide, but sliding_window is null; give the '
      'window or make all layers full_attention.'
    )
  windows = [window if x else None for x in slides]
  return layout(windows, family.ropes(fields, slides, head_dim))


def _activation_field(family):
  return 'hidden_activation' if family.startswith('gemma') else 'hidden_act'


# What each family adds.


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
  sliding = [config.kinds[k].window is not None for k in config.kind_of]
  types = [SLIDING if x else FULL for x in sliding]
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

# Models that also see, and how their tensors are called.
SEEING = ('gemma3',)
PREFIX = 'language_model.'
UNSEEN = ('vision_tower.', 'multi_modal_projector.')
_OF_ALL = ('quantization_config',)  # said of the whole, true of the text

# Fields that change the numbers, and the only values that we compute.
_ONLY = {
  'attention_bias': (False,),
  'mlp_bias': (False,),
  'quantization_config': (),
  'is_encoder_decoder': (False,),
  'use_mrope': (False,),
  'rope_interleaved': (False,),
  'activation': ('swiglu',),  # Falcon 3 says it beside hidden_act
  'lm_head_bias': (False,),
  'full_attn_mod': (1,),  # Phi-4 mini: every layer attends fully,
  'interpolate_factor': (1,),  # and nothing is interpolated
}
_ACTIVATIONS = {
  'silu': 'silu',
  'gelu': 'gelu',
  'gelu_tanh': 'gelu_pytorch_tanh',
}
