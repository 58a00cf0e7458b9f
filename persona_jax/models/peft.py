"""What an adapter_config.json of PEFT says, read and written.

Whatever changes the numbers and is not computed as `lora.adapted` does is
refused by name, fields of the future with it.
"""

import collections
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from persona_jax.models.checkpoint import CheckpointError

Config = Mapping[str, Any]  # the parsed file

ONLY = {  # fields that change the numbers, and the values that we compute
  'peft_type': ('LORA',),
  'task_type': ('CAUSAL_LM', None),
  'bias': ('none', None),
  # Others (pissa, olora, corda, loftq) change the kernels of the base too.
  'init_lora_weights': (True, False, None, 'gaussian', 'eva', 'orthogonal'),
}
NEEDED = ('peft_type', 'r', 'lora_alpha', 'target_modules')
KNOWN = {  # fields that are read here, or that change nothing once trained
  *(*ONLY, *NEEDED, 'rank_pattern', 'alpha_pattern', 'use_rslora'),
  *('base_model_name_or_path', 'revision', 'auto_mapping', 'inference_mode'),
  *('lora_dropout', 'peft_version', 'megatron_core', 'qalora_group_size'),
  *('eva_config', 'layers_pattern'),
}


def check(config: Config, where: str):
  """Raises one CheckpointError that names all that we do not compute."""
  problems = [f'{k} is missing' for k in NEEDED if config.get(k) is None]
  problems += [
    f'{k}={config[k]!r} is not supported'
    for k in config
    if (config[k] not in ONLY[k] if k in ONLY else config[k] and k not in KNOWN)
  ]
  problems = problems or list(_unreadable(config))
  if problems:
    raise CheckpointError(
      f'{where}: {"; ".join(problems)}. Merge the adapter into its model with '
      'PEFT, or train a plain LoRA.'
    )


def _unreadable(config: Config):
  """What is wrong with the values that are read."""
  if not _is_rank(config['r']):
    yield f'r={config["r"]!r} is not a whole number from 1 on'
  if not _is_number(config['lora_alpha']):
    yield f'lora_alpha={config["lora_alpha"]!r} is not a number'
  yield from _bad_patterns(config, 'rank_pattern', _is_rank)
  yield from _bad_patterns(config, 'alpha_pattern', _is_number)
  targets = config['target_modules']
  texts = [targets] if isinstance(targets, str) else targets
  if not isinstance(texts, list) or not all(type(x) is str for x in texts):
    yield f'target_modules={targets!r} is neither a text nor a list of texts'
  elif isinstance(targets, str) and not _finds(targets):
    yield f'target_modules={targets!r} is no pattern'


def _bad_patterns(config: Config, name: str, right):
  patterns = config.get(name) or {}
  if not isinstance(patterns, Mapping):
    yield f'{name}={patterns!r} is no record'
    return
  for pattern, value in patterns.items():
    if not (_finds(pattern) and right(value)):
      yield f'{name} has {pattern!r}: {value!r}, which cannot be read'


def _is_rank(value) -> bool:
  return type(value) is int and 0 < value < 2**16


def _is_number(value) -> bool:
  return type(value) in (int, float) and math.isfinite(value)


def _finds(pattern: str) -> bool:
  try:
    return bool(re.compile(pattern))
  except re.error:
    return False


def base(config: Config) -> str:
  """The model that the adapter was made for, as it calls it."""
  return repr(config.get('base_model_name_or_path') or 'an unnamed model')


def targeted(config: Config, modules: Iterable[str], where: str) -> list[str]:
  """The modules that PEFT would adapt; every target must find some."""
  targets = config['target_modules']
  if targets == 'all-linear':
    return list(modules)
  if isinstance(targets, str):
    finds = {targets: lambda name: re.fullmatch(targets, name)}
  else:
    finds = {end: lambda name, end=end: _ends(name, end) for end in targets}
  lost = [k for k, find in finds.items() if not any(map(find, modules))]
  if lost or not finds:
    known = sorted({last(name) for name in modules})
    raise CheckpointError(
      f'{where}: an adapter of {base(config)} for {", ".join(lost)}; this '
      f'model has {", ".join(known)} in each of its layers and no other '
      'projection to adapt.'
    )
  return [m for m in modules if any(find(m) for find in finds.values())]


def rank(config: Config, module: str) -> int:
  """r of one module."""
  return _value(config.get('rank_pattern'), module, config['r'])


def scale(config: Config, module: str) -> float:
  """alpha / r of one module, or alpha / sqrt(r) (rsLoRA)."""
  r = rank(config, module)
  alpha = _value(config.get('alpha_pattern'), module, config['lora_alpha'])
  return alpha / (r**0.5 if config.get('use_rslora') else r)


def record(
  ranks: Mapping[str, int],
  alphas: Mapping[str, float | int],
  modules: Iterable[str],
  name: str,
) -> dict[str, Any]:
  """The configuration of an adapter of the model `name`.

  Args:
    ranks: r of every adapted module.
    alphas: scale * r of every adapted module.
    modules: all that the model has.
    name: of the model.
  """
  name, _, revision = name.removeprefix('hf:').partition('@')
  r, rank_pattern = _common(ranks)
  alpha, alpha_pattern = _common(alphas)
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': name,
    'revision': revision or None,
    'r': r,
    'lora_alpha': alpha,
    'rank_pattern': rank_pattern,
    'alpha_pattern': alpha_pattern,
    'target_modules': _targets(set(ranks), modules),
    'use_rslora': False,
    'use_dora': False,
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
    'init_lora_weights': True,
    'lora_dropout': 0.0,
    'modules_to_save': None,
  }


def last(module: str) -> str:
  """'q_proj' of 'model.layers.0.self_attn.q_proj'."""
  return module.rpartition('.')[2]


def _ends(name, end):
  return name == end or name.endswith('.' + end)


def _value(patterns, module, default):
  """The value of the first pattern that fits, as PEFT matches them."""
  for pattern, value in (patterns or {}).items():
    if re.match(rf'(.*\.)?({pattern})$', module):
      return value
  return default


def _common(values):
  """The most frequent value, and those that differ from it."""
  common = collections.Counter(values.values()).most_common(1)[0][0]
  return common, {k: v for k, v in values.items() if v != common}


def _targets(adapted: set[str], modules) -> list[str]:
  """'q_proj' where all layers are adapted, whole names where only some are."""
  short = {last(name) for name in adapted}
  whole = {name for name in modules if last(name) in short}
  return sorted(short if whole == adapted else adapted)
