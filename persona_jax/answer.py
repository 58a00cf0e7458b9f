"""What the numbers say: summaries of arms, effects, and the sentences.

Nothing here knows how it should come out: every sentence is chosen by whether
an interval excludes zero, and on which side.
"""

import numpy as np

from persona_jax.analysis import statistics
from persona_jax.analysis.statistics import Interval
from persona_jax.evaluate import Arm, Capability

EFFECTS = (  # name, arm, against
  ('RL', 'rl/free', 'base/free'),
  ('cap', 'base/capped', 'base/free'),
  ('RL and cap', 'rl/capped', 'base/free'),
  ('cap on RL', 'rl/capped', 'rl/free'),
  ('random cap', 'base/random', 'base/free'),
  ('shuffled RL', 'shuffled/free', 'base/free'),
)
SLOPES = {
  'slope/projection': 'projection',
  'slope/inconsistency': 'inconsistency/global/likelihood',
}
PROJECTION = 'projection'
FIRED = 'fired'  # told apart from a free arm by construction: no effect


def summarise(arm: Arm, kinds: list[str], ability: Capability | None) -> dict:
  """Means, slopes and curves by line with intervals, overall and by kind."""
  record = _measures(arm, np.ones(len(kinds), bool))
  record['by_kind'] = {
    kind: _measures(arm, np.array([k == kind for k in kinds]))
    for kind in dict.fromkeys(kinds)
  }
  if ability is not None:
    record['capability'] = {
      'perplexity': statistics.bootstrap(
        lambda nats: np.exp(nats.mean()), ability.nats
      ),
      'accuracy': statistics.bootstrap(np.mean, ability.right),
    }
  return record


def _measures(arm, rows):
  mask = arm.mask[rows]
  lines = np.arange(mask.shape[1])
  summary, curves = {}, {}
  for name, values in arm.values.items():
    values = values[rows]
    summary[name] = statistics.mean_by_dialogue(values, mask)
    curves[name] = [
      statistics.mean_by_dialogue(values[:, n : n + 1], mask[:, n : n + 1])
      for n in lines
    ]
  for name, metric in SLOPES.items():
    if len(lines) > 1:
      summary[name] = statistics.drift_slope(
        arm.values[metric][rows], mask, lines
      )
  return {'summary': summary, 'curves': curves}


def effects(arms: dict[str, Arm]) -> list[dict]:
  """Paired differences of arms, for every metric that both have."""
  found = []
  for name, of, against in EFFECTS:
    if of not in arms or against not in arms:
      continue
    a, b = arms[of], arms[against]
    for metric in sorted(a.values.keys() - {FIRED}):
      difference = statistics.paired_difference(
        a.values[metric], a.mask, b.values[metric], b.mask
      )
      found.append(
        {
          'name': name,
          'of': of,
          'against': against,
          'metric': metric,
          'difference': difference,
          'excludes_zero': difference.excludes_zero,
        }
      )
  return found


def gap(arms: dict[str, Arm]) -> dict:
  """How far the base stands toward the Assistant, and what RL closed of it.

  The scale of `evaluate.settle`: 0 is the mean of roles, 1 the default
  Assistant. A gap whose interval reaches zero cannot be closed.
  """
  base = arms['base/free']
  stands = statistics.mean_by_dialogue(base.values[PROJECTION], base.mask)
  if 'rl/free' not in arms or stands.low <= 0:
    return {'base': stands, 'closed_by_rl': None}
  after = arms['rl/free']

  def closed(a, a_mask, b, b_mask):
    return 1 - b[b_mask].mean() / a[a_mask].mean()

  return {
    'base': stands,
    'closed_by_rl': statistics.bootstrap(
      closed,
      base.values[PROJECTION],
      base.mask,
      after.values[PROJECTION],
      after.mask,
    ),
  }


def words(found: list[dict], gap_: dict, trust: dict, hold: str) -> dict:
  """The headline and the sentences of the answer."""
  by = {(e['name'], e['metric']): e['difference'] for e in found}
  symptom = 'inconsistency/global/likelihood'
  second = 'inconsistency/global/verdict'
  sentences = [_stands(gap_['base'])]
  for name in ('RL', 'cap', 'RL and cap', 'random cap', 'shuffled RL'):
    if (name, symptom) not in by:
      continue
    sentences.append(
      f'{_capital(name)}: inconsistency {_moved(by[name, symptom])} by the '
      f'training judge and {_moved(by[name, second])} by the independent '
      f'one; projection {_moved(by[name, PROJECTION])}; degenerate lines '
      f'{_moved(by[name, "degenerate"])}.'
    )
  if closed := gap_['closed_by_rl']:
    sentences.append(f'RL closed {_share(closed)} of the projection gap.')
  elif ('RL', PROJECTION) in by:
    sentences.append(
      'The gap toward the Assistant does not exclude zero, so no share of it '
      'can be said to be closed by RL.'
    )
  sentences.append(_chance(found))
  sentences.append(_hold(hold))
  sentences += _believe(trust)
  return {
    'headline': _headline(by, symptom, second, trust),
    'sentences': sentences,
    'gap': gap_,
  }


def _headline(by, symptom, second, trust):
  if ('RL', symptom) not in by:
    return 'No RL arm was run: this describes the base model alone.'
  symptom_moved = [
    _side(by['RL', metric])
    for metric, judge in ((symptom, 'likelihood'), (second, 'verdict'))
    if _valid(trust['prompt_to_line'][judge]['auc'])
  ]
  pull = _side(by['RL', PROJECTION])
  surface = {
    (): 'no judge is valid enough to tell whether RL changed inconsistency',
    (-1,): 'RL reduced inconsistency',
    (1,): 'RL raised inconsistency',
    (0,): 'RL did not measurably change inconsistency',
  }
  distinct = tuple(set(symptom_moved))
  said = surface.get(distinct, 'the judges disagree on what RL did')
  beneath = {
    -1: 'moved the persona away from the Assistant',
    1: 'moved it toward the Assistant',
    0: 'left its place on the Assistant axis where it was',
  }[pull]
  return f'{said[0].upper()}{said[1:]}; it {beneath}.'


def _side(interval: Interval) -> int:
  if not interval.excludes_zero:
    return 0
  return 1 if interval.low > 0 else -1


def _moved(interval: Interval) -> str:
  word = {-1: 'fell', 0: 'did not measurably change', 1: 'rose'}
  return f'{word[_side(interval)]} ({interval.mean:+.3f} {_range(interval)})'


def _range(interval):
  return f'[{interval.low:+.3f}, {interval.high:+.3f}]'


def _share(interval):
  return f'{interval.mean:.0%} [{interval.low:.0%}, {interval.high:.0%}]' + (
    '' if interval.excludes_zero else ' (not told from zero)'
  )


def _stands(base):
  where = {
    1: 'on the Assistant side of the average role',
    0: 'no further from the Assistant than the average role, as far as can '
    'be told',
    -1: 'further from the Assistant than the average role',
  }[_side(base)]
  return (
    f'Untrained personas stand {where}: {base.mean:+.2f} {_range(base)} on a '
    'scale where 0 is the mean of roles and 1 the default Assistant.'
  )


def _chance(found):
  beyond = sum(e['excludes_zero'] for e in found)
  return (
    f'{beyond} of {len(found)} intervals exclude zero; about '
    f'{len(found) / 20:.0f} would by chance alone.'
  )


def _hold(hold):
  side = {
    'persona': 'a ceiling: it keeps the model from sliding toward the '
    'Assistant',
    'assistant': 'a floor: it keeps the model from leaving the Assistant',
  }[hold]
  return f'The cap is {side}.'


def _believe(trust):
  said = []
  for judge, role in (('likelihood', 'training'), ('verdict', 'independent')):
    area = trust['prompt_to_line'][judge]['auc']
    known = area['low'] is not None
    range_ = f' [{area["low"]:.2f}, {area["high"]:.2f}]' if known else ''
    doubt = '' if _valid(area) else ': not told from chance'
    said.append(
      f'The {role} judge ({judge}) has AUC {area["mean"]:.2f}{range_} on '
      f'labelled lines{doubt}.'
    )
  return said


def _valid(area: dict) -> bool:
  """Whether an AUC, as read from a record, is told from one half."""
  return area['low'] is not None and area['low'] > 0.5


def _capital(name):
  return name[0].upper() + name[1:]
