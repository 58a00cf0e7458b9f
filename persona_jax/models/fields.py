"""A foreign configuration, and which of its fields were understood."""

import math
import re
from collections.abc import Mapping
from typing import Any

from persona_jax.models.checkpoint import CheckpointError

# Fields that change no number of a forward pass, whatever they hold.
INERT = (
  r'_name_or_path|_commit_hash|_sliding_window_pattern',
  r'_(attn|experts)_implementation(_internal|_autoset)?',
  r'.*_token_id|.*dropout(_prob)?|.*_pdrop|[a-z]+_version',
  r'initializer_(range|factor)',
  r'architectures|auto_map|model_type|(torch_)?dtype|torchscript|use_bfloat16',
  r'use_cache|cache_implementation|attn_implementation|return_dict.*',
  r'output_(attentions|hidden_states|past|scores|logits|router_logits)',
  r'pretraining_tp|router_(aux_loss_coef|jitter_noise)|tokenizer_class|prefix',
  r'id2label|label2id|num_labels|problem_type|task_specific_params|is_decoder',
  r'finetuning_task|pruned_heads|chunk_size_feed_forward|tf_legacy_loss',
  r'cross_attention_hidden_size|add_cross_attention|tie_encoder_decoder',
  r'temperature|top_[kp]|typical_p|num_beams|max_length|min_length|do_sample',
  r'(repetition|length|diversity)_penalty|.*no_repeat_ngram_size|num_beam_groups',
  r'early_stopping|bad_words_ids|num_return_sequences|begin_suppress_tokens',
  r'suppress_tokens|exponential_decay_length_penalty|remove_invalid_values',
  r'is_llama_config|transformers\.js_config|unsloth.*|model_max_length|name',
  r'max_window_layers|sliding_window_pattern|no_rope_layer_interval',
  r'gradient_checkpointing|neftune_noise_alpha|max_sequence_length',
  r'use_flash_attention(_2)?',
)
_INERT = re.compile('|'.join(f'(?:{x})' for x in INERT))
SLIDING, FULL = 'sliding_attention', 'full_attention'  # kinds of layers
_NEEDED = object()


class Fields:
  """Reads typed fields of a record; null is the same as absent.

  Every method that takes a `default` raises a CheckpointError for a missing
  field if none is given, and for a value of another type. `inert` names
  unknown fields that may be ignored, here and in inner records.
  """

  def __init__(self, record: Mapping[str, Any], where: str, inert=()):
    self._record = record
    self._where = where
    self._inert = tuple(inert)
    self._known = set()

  def with_defaults(self, defaults: Mapping[str, Any]) -> 'Fields':
    """The same fields, where `defaults` stand in for absent ones."""
    record = {**self._record}
    for name, value in defaults.items():
      record.setdefault(name, value)
    return Fields(record, self._where, self._inert)

  def inner(self, record: Mapping[str, Any], where: str) -> 'Fields':
    """The fields of a record inside this one."""
    return Fields(record, f'{self._where}, {where}', self._inert)

  def count(self, name: str, default=_NEEDED, most: int = 2**31) -> int | None:
    """A whole number from 1 to `most`."""
    right = lambda x: type(x) is int and 0 < x <= most
    return self._typed(name, default, right, f'a whole number from 1 to {most}')

  def whole(self, name: str, default=0) -> int | None:
    """A whole number from 0 to 2^31."""
    right = lambda x: type(x) is int and 0 <= x <= 2**31
    return self._typed(name, default, right, 'a whole number from 0 on')

  def number(self, name: str, default=_NEEDED) -> float | None:
    """A finite number above zero."""
    right = lambda x: type(x) in (int, float) and math.isfinite(x) and x > 0
    value = self._typed(name, default, right, 'a number above zero')
    return None if value is None else float(value)

  def flag(self, name: str, default=_NEEDED) -> bool | None:
    """true or false."""
    return self._typed(
      name, default, lambda x: type(x) is bool, 'true or false'
    )

  def text(self, name: str, default=_NEEDED) -> str | None:
    """A string."""
    return self._typed(name, default, lambda x: type(x) is str, 'a text')

  def list(self, name: str, default=_NEEDED) -> list | None:
    """A list of plain values."""
    right = lambda x: (
      isinstance(x, list) and all(type(y) in (str, int, float, bool) for y in x)
    )
    return self._typed(name, default, right, 'a list of plain values')

  def record(self, name: str, default=_NEEDED) -> Mapping | None:
    """A record of further fields."""
    return self._typed(
      name, default, lambda x: isinstance(x, Mapping), 'a record'
    )

  def only(self, name: str, allowed: tuple):
    """Refuses a value other than those that we compute."""
    value = self._record.get(name)
    self._known.add(name)
    if value is not None and not any(
      type(value) is type(x) and value == x for x in allowed
    ):
      raise CheckpointError(
        f'{self._where}: {name}={_short(value)} is not supported, only '
        f'{" or ".join(map(repr, allowed)) or "null"}: the outputs would be '
        'wrong. Use another checkpoint.'
      )

  def check(self, name: str, right: bool, rule: str):
    """Refuses the value of `name` unless `right`."""
    if not right:
      value = _short(self._record.get(name))
      raise CheckpointError(f'{self._where}: {name}={value}; {rule}.')

  def ignore(self, *names: str):
    """Takes these fields as understood."""
    self._known |= set(names)

  def all_known(self):
    """Raises one CheckpointError that names every field not understood."""
    unknown = [
      name
      for name, value in self._record.items()
      if value is not None
      and name not in self._known
      and name not in self._inert
      and not _INERT.fullmatch(name)
    ]
    if unknown:
      values = ', '.join(f'{k}={_short(self._record[k])}' for k in unknown)
      raise CheckpointError(
        f'{self._where}: unknown field(s) {values} may change the numbers. '
        f'If they do not, load with inert={tuple(unknown)!r}.'
      )

  def _typed(self, name, default, right, what):
    self._known.add(name)
    value = self._record.get(name)
    if value is None:
      if default is _NEEDED:
        raise CheckpointError(f'{name} is missing from {self._where}; add it.')
      return default
    if not right(value):
      raise CheckpointError(
        f'{self._where}: {name}={_short(value)} is not {what}.'
      )
    return value


def _short(value) -> str:
  text = repr(value)
  return text if len(text) < 80 else f'{text[:77]}...'
