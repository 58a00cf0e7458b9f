"""`persona-jax evaluate --config=judges`: which judges can be believed.

Each judge scores a calibration set, which turns its scores into chances, and
then the labelled lines that it is measured on. Scores are kept as they come,
so that a second start goes on.
"""

import datetime
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from persona_jax import judges_report, jury, metrics
from persona_jax import workdir as owned
from persona_jax.analysis import calibration, scorecard, validity
from persona_jax.analysis.scorecard import Lines
from persona_jax.lab import open_lab
from persona_jax.text import labelled
from persona_jax.text.labelled import Labelled

ENSEMBLE = 'ensemble'


def run(config, workdir, *, quiet: bool = False) -> dict:
  """Measures every judge of `config.jury`; writes judges.json and .html.

  Raises:
    ValueError: the config is out of range, the workdir is another's, a judge
      is unknown or a labelled file is wrong.
  """
  _check(config)
  workdir = Path(workdir)
  owned.claim(workdir, config)
  known = labelled.calibration(config.jury.calibration, seed=config.seed)
  rows, about = jury.rows_of(config.jury)
  names = config.jury.names.split(',')
  opened = jury.open_judges(open_lab(config), config.jury, names)
  with metrics.progress(
    'Judges', len(names) * (len(known) + len(rows)), quiet=quiet
  ) as advance:
    scores = {
      name: {
        part: _kept(workdir / 'scores' / f'{name}_{part}', judge, some, advance)
        for part, some in (('calibration', known), ('labelled', rows))
      }
      for name, judge in opened.items()
    }
    results = measured(scores, known, rows, alarms=config.jury.alarms)
    results['quarrels'] = _quarrels(opened, results, known, rows)
  results['about'] = {
    'version': metadata.version('persona_jax'),
    'config_name': config.name,
    'date': datetime.date.today().isoformat(),
    'model': config.model,
    **about,
  }
  metrics.write_json(workdir / 'judges.json', results)
  judges_report.write(metrics.plain(results), workdir / 'judges.html')
  return metrics.plain(results)


def _quarrels(opened, results, known, rows) -> list[dict]:
  """Personas that contradict themselves, as the first judge finds."""
  name = results['first']
  card = results['judges'][name]
  fit = scorecard.Fit(*(card[field] for field in scorecard.Fit._fields))
  if not (card['informative'] and fit.slopes.get('between')):
    return []
  told = [[row.persona for row in x if row.persona] for x in (rows, known)]
  found = jury.quarrels(opened[name], fit, *told, lambda count=1: None)
  return [x._asdict() for x in found]


def measured(scores: dict, known: Sequence[Labelled], rows, *, alarms) -> dict:
  """What each judge is worth, how they agree, and what they are together.

  `scores[name]['calibration' or 'labelled']` are arrays of scores and their
  pace, as `_kept` gives them.
  """
  before, lines = described(known), described(rows)
  chances, cards = {}, {}
  for name, of in scores.items():
    fit = scorecard.fitted(of['calibration'].values, before, alarms=alarms)
    chances[name] = fit.chance(of['labelled'].values, lines.scope)
    cards[name] = _card(chances[name], lines, fit) | {
      'raw': _raw(of['labelled'].values, lines),
      'per_second': of['labelled'].pace,
    }
  if len(scores) > 1:
    both = [{n: of[p].values for n, of in scores.items()} for p in _PARTS]
    weights, chances[ENSEMBLE], fit = _together(*both, before, lines, alarms)
    card = _card(chances[ENSEMBLE], lines, fit)
    cards[ENSEMBLE] = card | {'weights': weights}
  thresholds = {name: card['threshold'] for name, card in cards.items()}
  first = next(iter(scores))
  return {
    'judges': cards,
    'agreement': _agreement(chances, thresholds),
    'first': first,
    'gains': {
      name: scorecard.gain(chances[first], chance, lines)
      for name, chance in chances.items()
      if name != first
    },
  }


_PARTS = ('calibration', 'labelled')


def _card(chance, lines, fit: scorecard.Fit) -> dict:
  card = scorecard.card(chance, lines, fit.threshold)
  return card | {
    'informative': scorecard.informative(card),
    'slopes': fit.slopes,
    'offsets': fit.offsets,
    'threshold': fit.threshold,
  }


def _raw(scores, lines) -> dict:
  """AUC of the scores as they are, by scope: no calibration turns it to 1/2."""
  found = {}
  for scope in np.unique(lines.scope):
    rows = (lines.scope == scope) & np.isfinite(scores)
    if rows.any():
      found[str(scope)] = scorecard.area(scores[rows], lines.rows(rows))
  return found


def described(rows: Sequence[Labelled]) -> Lines:
  """What is known of every line that has a label."""
  groups = {name: i for i, name in enumerate({row.group for row in rows})}
  found = [
    (
      label != labelled.CONTRADICTS,
      label == labelled.NEUTRAL,
      kind,
      row.task,
      'persona' if row.persona else 'between',
      groups[row.group],
      len(line.split()),
      place,
      len(row.persona.split()),
    )
    for row in rows
    for place, (line, label, kind) in enumerate(
      zip(row.lines[1::2], row.labels, row.kinds, strict=True), 1
    )
    if label
  ]
  return Lines(*map(np.array, zip(*found, strict=True)))


def _together(known, scores, before, lines, alarms):
  """Weights of the judges by scope, and the chances of all together.

  Judges without a verdict on some line leave it without one.
  """
  weights, sums = {}, [np.full(len(x.fits), np.nan) for x in (before, lines)]
  for scope in np.unique(before.scope):
    rows = before.scope == scope
    names = [n for n, x in known.items() if np.isfinite(x[rows]).all()]
    fits = before.fits[rows]
    if not names or fits.all() or not fits.any():
      continue
    table = np.stack([known[n][rows] for n in names], 1)
    found = calibration.weights(table, fits)
    weights[str(scope)] = dict(zip(names, found.tolist(), strict=True))
    for total, of, where in zip(
      sums, (known, scores), (before, lines), strict=True
    ):
      here = where.scope == scope
      total[here] = np.stack([of[n][here] for n in names], 1) @ found
  fit = scorecard.fitted(sums[0], before, alarms=alarms)
  return weights, fit.chance(sums[1], lines.scope), fit


def _agreement(chances, thresholds) -> dict:
  """Cohen's kappa of every two judges, where both have a verdict."""
  found = {}
  for a, left in chances.items():
    for b, right in chances.items():
      both = np.isfinite(left) & np.isfinite(right)
      said = (left >= thresholds[a])[both], (right >= thresholds[b])[both]
      found.setdefault(a, {})[b] = validity.kappa(*said) if both.any() else None
  return found


class Kept(NamedTuple):
  """The scores of labelled lines, and how many verdicts a second there were."""

  values: np.ndarray
  pace: float


def _kept(path: Path, judge: jury.Judge, rows, advance) -> Kept:
  """A judge's scores of `rows`, from disk or made now."""
  file = path.with_suffix('.npz')
  if file.exists():
    arrays = metrics.read_arrays(file)
    advance(len(rows))
    return Kept(arrays['values'], float(arrays['pace']))
  found = judge(rows, advance)
  pace = found.verdicts / found.seconds if found.seconds else float('nan')
  kept = Kept(jury.of_labels(found.values, rows), pace)
  metrics.write_arrays(file, {'values': kept.values, 'pace': np.array(pace)})
  return kept


def _check(config):
  if 'jury' not in config:
    raise ValueError(
      f'the config {config.name!r} has no group jury, which says what judges '
      'are measured; start from --config=judges.'
    )
  if config.jury.calibration < 20:
    raise ValueError(
      f'jury.calibration={config.jury.calibration} is too small; give 20 or '
      'more dialogues.'
    )
  if not 0 <= config.jury.alarms < 1:
    raise ValueError(
      f'jury.alarms={config.jury.alarms} is no share; give 0 or more, below 1.'
    )
