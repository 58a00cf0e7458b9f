"""Foreign configurations read as a `DecoderConfig`, and written again.

What each family does its own way is in `models.family`. `from_hf` and `to_hf`
are inverse to each other.
"""

from collections.abc import Mapping
from typing import Any

from persona_jax.models import rope_fields
from persona_jax.models.checkpoint import CheckpointError
from persona_jax.models.config import DecoderConfig, Kind
from persona_jax.models.family import FAMILIES, MOST
from persona_jax.models.fields import FULL, SLIDING, Fields


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
    **rope_fields.written(config),
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
      f'{", ".join(table)}. Add a row to models.family.FAMILIES.'
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
