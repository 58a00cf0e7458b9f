"""Pictures of judges: a part of `judges.json` in, a matplotlib Figure out."""

import numpy as np
from matplotlib.figure import Figure

from persona_jax.analysis import looks
from persona_jax.analysis.looks import COLOURS

_MARKS = 'osD^vPX'
_HUES = ('vermilion', 'blue', 'green', 'purple', 'sky', 'orange', 'olive')
_TASKS = {
  'prompt_to_line': 'A line against the persona',
  'line_to_line': 'A line against an earlier line',
}


@looks.styled
def areas(judges: dict) -> Figure:
  """AUC with 95 % intervals by judge, overall and for each way to fail."""
  rows = ['all', *dict.fromkeys(k for x in judges.values() for k in _errors(x))]
  figure = Figure((looks.WIDTH, 1.1 + 0.42 * len(rows)), layout='constrained')
  axes = figure.subplots()
  axes.axvline(0.5, color=COLOURS['ink'], linewidth=1, linestyle='--')
  for i, card in enumerate(judges.values()):
    hue, mark = _look(i)
    for error, record in {'all': card, **_errors(card)}.items():
      mean, low, high = looks.interval(record.get('auc'))
      y = rows.index(error) + 0.7 * ((i + 0.5) / len(judges) - 0.5)
      axes.hlines(y, low, high, color=COLOURS[hue], linewidth=1.4)
      axes.plot(mean, y, mark, color=COLOURS[hue], markersize=4.5)
  axes.set_yticks(range(len(rows)), [row.replace('_', ' ') for row in rows])
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xlim(0, 1.02)
  axes.set_xlabel('AUC (dashed: chance)')
  _key(figure, judges)
  return figure


@looks.styled
def reliability(judges: dict) -> Figure:
  """The share of lines that fit, by the chance that was foretold."""
  figure, panels = looks.grid(len(judges), 4, 2.3, sharex=True, sharey=True)
  for i, (axes, (name, card)) in enumerate(
    zip(panels, judges.items(), strict=True)
  ):
    hue, mark = _look(i)
    bins = card.get('reliability') or []
    axes.plot([0, 1], [0, 1], '--', color=COLOURS['ink'], linewidth=1)
    if bins:
      told, found, count = np.array(bins, float).T
      size = 8 + 90 * count / count.sum()
      axes.plot(told, found, color=COLOURS[hue], linewidth=1)
      axes.scatter(told, found, size, COLOURS[hue], marker=mark)
    axes.set_title(name.replace('_', ' '))
    axes.set_xlabel('chance of consistency')
    axes.set_ylabel('share that fits')
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
  return figure


@looks.styled
def agreement(kappas: dict) -> Figure:
  """Cohen's kappa of every two judges' verdicts."""
  names = list(kappas)
  table = np.array([looks.numbers(kappas[a][b] for b in names) for a in names])
  size = 1.6 + 0.55 * len(names)
  figure = Figure((min(looks.WIDTH, size + 1), size), layout='constrained')
  axes = figure.subplots()
  axes.imshow(table, cmap='Blues', vmin=0, vmax=1.3)
  axes.grid(False)
  for i, j in np.ndindex(table.shape):
    if np.isfinite(table[i, j]):
      axes.text(j, i, f'{table[i, j]:.2f}', ha='center', va='center')
  shown = [name.replace('_', ' ') for name in names]
  axes.set_xticks(range(len(names)), shown, rotation=40, ha='right')
  axes.set_yticks(range(len(names)), shown)
  return figure


@looks.styled
def calibration(judges: dict) -> Figure | None:
  """AUC with 95 % intervals by judge, overall and by type of error."""
  measured = lambda task: [looks.interval(c['auc']) for c in task.values()]
  tasks = [t for t in _TASKS if looks.finite(measured(judges.get(t, {})))]
  if not tasks:
    return None
  rows = {t: _named(judges[t]) for t in tasks}
  most = max(map(len, rows.values()))
  figure, panels = looks.grid(len(tasks), 2, 1.0 + 0.36 * most)
  for axes, task in zip(panels, tasks, strict=True):
    axes.axvline(0.5, color=COLOURS['ink'], linewidth=1, linestyle='--')
    for i, (judge, record) in enumerate(judges[task].items()):
      areas = {'all errors': record['auc'], **record['by_error']}
      for error, area in areas.items():
        y = rows[task].index(error) + 0.16 * (1 - 2 * i)
        _area(axes, y, area, *looks.JUDGES.get(judge, ('ink', 'D')))
    looks.by_name(axes, dict(enumerate(rows[task])))
    axes.set_ylim(len(rows[task]) - most - 0.6, len(rows[task]) - 0.4)
    axes.set_xlim(0, 1.02)
    axes.set_title(_TASKS[task])
    axes.set_xlabel('AUC (dashed: chance)')
    axes.set_ylabel('type of error')
  judged = dict.fromkeys(name for t in tasks for name in judges[t])
  looks.key(
    figure,
    [
      looks.sample(f'{name} judge', *looks.JUDGES.get(name, ('ink', 'D')))
      for name in judged
    ],
  )
  return figure


def _named(task):
  errors = dict.fromkeys(e for c in task.values() for e in c['by_error'])
  return [*reversed(errors), 'all errors']


def _area(axes, y, area, colour, mark):
  mean, low, high = looks.interval(area)
  axes.hlines(y, low, high, color=COLOURS[colour], linewidth=1.8)
  axes.plot(mean, y, mark, color=COLOURS[colour], markersize=5.5)


def _errors(card):
  return card.get('errors') or {}


def _look(i):
  return _HUES[i % len(_HUES)], _MARKS[i % len(_MARKS)]


def _key(figure, judges):
  samples = [
    looks.sample(name.replace('_', ' '), *_look(i))
    for i, name in enumerate(judges)
  ]
  looks.key(figure, samples)
