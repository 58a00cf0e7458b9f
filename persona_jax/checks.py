"""What the fields of a config may be."""

from persona_jax import learn
from persona_jax.activations import calibration
from persona_jax.learn.algorithms import numbered


def check(config):
  """Refuses sizes that cannot be run, before anything is loaded.

  Raises:
    ValueError: names the field, its value and the rule.
  """
  rules = {
    'rollout.lines': (config.rollout.lines, 2),
    'rl.lines': (config.rl.lines, 2),
    'rollout.tokens': (config.rollout.tokens, 1),
    'rollout.batch': (config.rollout.batch, 1),
    'evaluation.dialogues': (config.evaluation.dialogues, 2),
    'rl.group': (config.rl.group, 2 if _compares(config) else 1),
    'space.roles': (config.space.roles, 3),
    'judges.lines': (config.judges.lines, 2),
  }
  for field, (value, least) in rules.items():
    if value < least:
      raise ValueError(f'{field}={value} is too small; give {least} or more.')
  if config.rollout.batch % config.rl.group:
    raise ValueError(
      f'rollout.batch={config.rollout.batch} does not divide into groups of '
      f'rl.group={config.rl.group}.'
    )
  algorithms = learn.ALGORITHMS | learn.PREFERENCES
  known = {
    'cap.hold': (config.cap.hold, calibration.SIDES),
    'rl.algorithm': (config.rl.algorithm, tuple(algorithms)),
    'dtype': (config.dtype, ('float32', 'bfloat16')),
  }
  for field, (value, choices) in known.items():
    if value not in choices:
      raise ValueError(f'{field}={value!r} is unknown; give one of {choices}.')
  if config.rl.adapter.start and not config.rl.adapter.rank:
    raise ValueError(
      f'rl.adapter.start={config.rl.adapter.start!r} and rl.adapter.rank=0, '
      'which trains all parameters; give the rank of that adapter.'
    )
  algorithm = algorithms[config.rl.algorithm]
  for part in {'advantage', 'loss'} & set(algorithm._fields):
    numbered(getattr(algorithm, part), config.rl[part].to_dict())
  if not 0 <= config.cap.first < config.cap.last <= 1:
    raise ValueError(
      f'cap.first={config.cap.first}, cap.last={config.cap.last}: the band '
      'needs 0 <= first < last <= 1, as shares of the depth.'
    )


def _compares(config) -> bool:
  """Whether the algorithm compares the dialogues of a scenario."""
  row = learn.ALGORITHMS.get(config.rl.algorithm)
  return row is not None and row.group
