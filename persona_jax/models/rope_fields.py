"""Rotary positions in a Hugging Face configuration, read and written.

transformers 4 keeps `rope_theta` and `rope_scaling`, transformers 5 all in
`rope_parameters`; Gemma 3 has one record a kind of layer.
"""

import inspect
import math
from typing import Any

from persona_jax.models import rope
from persona_jax.models.checkpoint import CheckpointError
from persona_jax.models.config import DecoderConfig, Rope
from persona_jax.models.fields import FULL, SLIDING, Fields

_ALIASES = {'su': 'longrope'}  # early Phi-3
_NOTES = ('finetuned',)  # fields of a record that say nothing to us


def same_everywhere(
  fields, slides, head_dim, default=10_000.0
) -> list[Rope | None]:
  """One rope for all layers."""
  fields.ignore('original_max_position_embeddings')  # read where it matters
  record = _merged(
    fields,
    fields.record('rope_parameters', {}),
    'rope_scaling',
    'rope_theta',
    default,
  )
  return [_rope(fields, record, head_dim)] * len(slides)


def some_turn(fields, slides, head_dim) -> list[Rope | None]:
  """One rope, and layers without any (SmolLM3)."""
  ropes = same_everywhere(fields, slides, head_dim, 2_000_000.0)
  turns = turning(fields, len(slides))
  fields.check(
    'partial_rotary_factor',
    ropes[0].fraction == 1 or all(turns),
    'layers without a rope need whole heads to turn in the others',
  )
  return [x if turn else None for x, turn in zip(ropes, turns, strict=True)]


def local_and_global(fields, slides, head_dim) -> list[Rope | None]:
  """A rope for the sliding layers and one for the others (Gemma 3)."""
  nested = fields.record('rope_parameters', {})
  for name in nested:
    fields.check('rope_parameters', name in (SLIDING, FULL), _GEMMA3)
  local = _merged(
    fields, nested.get(SLIDING) or {}, None, 'rope_local_base_freq', 10_000.0
  )
  whole = _merged(
    fields, nested.get(FULL) or {}, 'rope_scaling', 'rope_theta', 1_000_000.0
  )
  ropes = [_rope(fields, x, head_dim) for x in (whole, local)]
  return [ropes[slide] for slide in slides]


def turning(fields, layers: int) -> list[bool]:
  """Which layers of a SmolLM3 have a rope."""
  flags = fields.list('no_rope_layers', None)
  if flags is None:
    every = fields.count('no_rope_layer_interval', 4)
    return [(i + 1) % every != 0 for i in range(layers)]
  fields.check(
    'no_rope_layers',
    len(flags) == layers and set(flags) <= {0, 1},
    f'it needs {layers} entries, each 0 or 1',
  )
  return [bool(x) for x in flags]


def written(config: DecoderConfig) -> dict[str, Any]:
  """The fields of all versions of transformers."""
  ropes = [config.kinds[k].rope for k in config.kind_of]
  turning = [x for x in ropes if x is not None]
  if config.family != 'gemma3_text':
    record = _record(turning[0])
    old = {'rope_theta': turning[0].theta, 'rope_parameters': record}
    if 'original_max_position_embeddings' in record and config.family == 'phi3':
      name = 'original_max_position_embeddings'
      old[name] = record[name]
    if turning[0].fraction != 1:
      old['partial_rotary_factor'] = turning[0].fraction
    return old | _scaling(turning[0])
  pick = lambda which: next(
    (x for x, s in zip(ropes, config.slides, strict=True) if s == which), None
  )
  local, whole = pick(True) or pick(False), pick(False) or pick(True)
  return {
    'rope_theta': whole.theta,
    'rope_local_base_freq': local.theta,
    'rope_parameters': {SLIDING: _record(local), FULL: _record(whole)},
  } | _scaling(whole)


def _merged(fields, new, old_scaling, old_theta, default):
  """One record from the fields of either version, which must agree."""
  scaling = fields.record(old_scaling, {}) if old_scaling else {}
  theta = fields.number(old_theta, None)
  theta = {} if theta is None else {'rope_theta': theta}
  merged = {'rope_theta': default}
  for record in (theta, scaling, new):
    for name, value in record.items():
      clash = name in merged and merged[name] != value and name != 'rope_theta'
      twice = record is new and name in theta and theta[name] != value
      if value is not None and (clash or twice):
        raise CheckpointError(
          f'config.json: {name} is {merged[name]!r} and {value!r}; rope_theta, '
          'rope_scaling and rope_parameters must agree.'
        )
      if value is not None:
        merged[name] = value
  return merged


def _rope(fields: Fields, record, head_dim) -> Rope:
  record = {k: v for k, v in record.items() if k not in _NOTES}
  inner = fields.inner(record, 'rope_parameters')
  kind = inner.text('rope_type', None) or inner.text('type', 'default')
  kind = _ALIASES.get(kind, kind)
  if kind not in rope.FREQUENCIES:
    raise CheckpointError(
      f'config.json: rope_type {kind!r} is not supported, only '
      f'{", ".join(rope.FREQUENCIES)}: the outputs would be wrong. Use '
      'another checkpoint.'
    )
  fraction = inner.number('partial_rotary_factor', None)
  fraction = fraction or fields.number('partial_rotary_factor', 1.0)
  rotary = int(head_dim * fraction + 1e-6)
  fields.check(
    'partial_rotary_factor',
    fraction <= 1 and rotary >= 2 and rotary % 2 == 0,
    f'{rotary} of {head_dim} features is no even number of them',
  )
  inner.ignore('type', 'rope_type')
  fields.ignore('partial_rotary_factor')
  theta = inner.number('rope_theta')
  numbers = _numbers(fields, inner, kind, rotary // 2)
  inner.all_known()
  scaling = tuple(sorted((k, v) for k, v in numbers.items() if v is not None))
  return Rope(float(theta), kind, scaling, float(fraction))


def _numbers(fields, inner, kind, pairs) -> dict[str, Any]:
  """The numbers of a kind: the keywords of its row in rope.FREQUENCIES."""
  parameters = inspect.signature(rope.FREQUENCIES[kind]).parameters
  names = [k for k, v in parameters.items() if v.kind is v.KEYWORD_ONLY]
  original = 'original_max_position_embeddings'
  found = {}
  for name in names:
    if name == 'truncate':
      found[name] = inner.flag(name, None)
    elif name in ('short_factor', 'long_factor'):
      found[name] = _factors(inner, name, pairs)
    else:
      found[name] = inner.number(name, None)
  if original in names:
    outer = fields.count(original, None)
    longest = fields.count('max_position_embeddings')
    found[original] = int(outer or found[original] or longest)
    if found['factor'] is None and kind != 'llama3':
      found['factor'] = longest / found[original]
  for name in names:
    needed = parameters[name].default is inspect.Parameter.empty
    if needed and found[name] is None:
      inner.number(name)  # says that it is missing
  return found


def _factors(inner, name, pairs) -> tuple[float, ...]:
  values = inner.list(name)
  right = lambda x: type(x) in (int, float) and math.isfinite(x) and x > 0
  inner.check(
    name,
    len(values) == pairs and all(map(right, values)),
    f'it needs {pairs} numbers above zero, one a pair of features that turn',
  )
  return tuple(float(x) for x in values)


def _record(one: Rope) -> dict[str, Any]:
  plain = {k: list(v) if isinstance(v, tuple) else v for k, v in one.scaling}
  record = {'rope_type': one.kind, 'rope_theta': one.theta} | plain
  if one.fraction != 1:
    record['partial_rotary_factor'] = one.fraction
  return record


def _scaling(one: Rope) -> dict[str, Any]:
  """`rope_scaling`, as transformers 4 reads it."""
  if one.kind == 'default':
    return {}
  record = _record(one)
  del record['rope_theta']
  record.pop('partial_rotary_factor', None)
  return {'rope_scaling': record}


_GEMMA3 = f'it needs the records {SLIDING} and {FULL}'
