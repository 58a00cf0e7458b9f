"""What the pictures and the report share: words, colours, panels."""

import functools
import math
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

COLOURS = {  # Okabe and Ito's, told apart by colour-blind readers
  'ink': '#1c2733',
  'faint': '#77818c',
  'rule': '#dde2e7',
  'page': '#fefefe',
  'blue': '#0072b2',
  'vermilion': '#d55e00',
  'green': '#009e73',
  'purple': '#cc79a7',
  'sky': '#56b4e9',
  'orange': '#e69f00',
  'olive': '#8c8c2b',
}
EDGE = {'edgecolor': COLOURS['page'], 'linewidth': 0.5}  # of scattered points
WIDTH = 9.6  # inches
_STYLE = {
  'axes.axisbelow': True,
  'axes.edgecolor': COLOURS['faint'],
  'axes.grid': True,
  'axes.labelcolor': COLOURS['ink'],
  'axes.labelsize': 8.5,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.titlelocation': 'left',
  'axes.titlesize': 9.5,
  'axes.titleweight': 'bold',
  'font.size': 8.5,
  'grid.color': COLOURS['rule'],
  'grid.linewidth': 0.6,
  'legend.frameon': False,
  'lines.linewidth': 1.6,
  'text.color': COLOURS['ink'],
  'text.parse_math': False,  # a '$' in a name is a '$'
  'xtick.color': COLOURS['faint'],
  'xtick.labelcolor': COLOURS['ink'],
  'ytick.color': COLOURS['faint'],
  'ytick.labelcolor': COLOURS['ink'],
}


class Metric(NamedTuple):
  """How a measure is called, and in what it counts."""

  title: str
  unit: str


class Arm(NamedTuple):
  """How an arm is called and drawn: hue is training, dashes are the cap."""

  title: str
  colour: str
  dashes: str
  mark: str


_SHARE = 'expected share of lines'
METRICS = {
  'inconsistency/global/likelihood': Metric(
    'Inconsistent with the prompt, likelihood judge', _SHARE
  ),
  'inconsistency/global/verdict': Metric(
    'Inconsistent with the prompt, verdict judge', _SHARE
  ),
  'inconsistency/local/likelihood': Metric(
    'Inconsistent with earlier lines, likelihood judge', _SHARE
  ),
  'inconsistency/local/verdict': Metric(
    'Inconsistent with earlier lines, verdict judge', _SHARE
  ),
  'projection': Metric(
    'Projection on the Assistant axis', '0 mean of roles, 1 default'
  ),
  'degenerate': Metric('Degenerate lines', 'share of lines'),
  'length': Metric('Length of a line', 'tokens'),
  'fired': Metric('The cap acted', 'share of tokens in the band'),
  'slope/inconsistency': Metric(
    'Slope of inconsistency with the prompt, likelihood judge', 'share per line'
  ),
  'slope/projection': Metric('Slope of the projection', 'per line'),
}
DRIFT = tuple(METRICS)[:5]  # shown line by line
EFFECTS = tuple(METRICS)[:7]
ARMS = {
  'base/free': Arm('base', 'blue', '-', 'o'),
  'base/capped': Arm('base + cap', 'sky', '--', 's'),
  'base/random': Arm('base + random cap', 'faint', ':', 'D'),
  'rl/free': Arm('RL', 'vermilion', '-', 'o'),
  'rl/capped': Arm('RL + cap', 'orange', '--', 's'),
  'shuffled/free': Arm('shuffled RL', 'purple', '-.', '^'),
}
JUDGES = {'likelihood': ('blue', 'o'), 'verdict': ('vermilion', 's')}


def metric(name: str) -> Metric:
  """The words for a metric; its own name if it is unknown."""
  return METRICS.get(name) or Metric(name, 'value')


def arm(name: str) -> Arm:
  """The words and the line of an arm; plain ink if it is unknown."""
  return ARMS.get(name) or Arm(name, 'ink', '-', 'o')


def styled(draw):
  """`draw` in this style; matplotlib's own settings stay as they are."""

  @functools.wraps(draw)
  def drawn(*args, **kwargs):
    with matplotlib.rc_context(_STYLE):
      return draw(*args, **kwargs)

  return drawn


def grid(count: int, columns: int, height: float = 2.5, **kwargs):
  """A figure of `count` panels, and the panels."""
  rows = math.ceil(count / columns)
  figure = Figure((WIDTH, 0.4 + height * rows), layout='constrained')
  panels = figure.subplots(rows, columns, squeeze=False, **kwargs).ravel()
  for axes in panels[count:]:
    axes.remove()
  return figure, panels[:count]


def words(axes, title: str, x: str, y: str):
  """A title and labels; `x` counts in whole numbers."""
  axes.set_title(fold(title, 34))
  axes.set_xlabel(x)
  axes.set_ylabel(y)
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def fold(title: str, width: int) -> str:
  """`title` in lines of fewer than `width` letters."""
  lines = ['']
  for word in title.split():
    if len(lines[-1]) + len(word) >= width:
      lines.append('')
    lines[-1] = f'{lines[-1]} {word}'.strip()
  return '\n'.join(lines)


def by_name(axes, names: dict[int, str]):
  """Rows of a panel, each by its name."""
  axes.set_yticks(list(names), list(names.values()))
  axes.set_ylim(-0.8, max(names) + 0.8)
  axes.grid(axis='y', visible=False)
  axes.tick_params('y', length=0)


def key(figure, handles):
  """One legend over all panels."""
  figure.legend(handles=handles, loc='outside upper left', ncols=7)


def sample(label: str, colour: str, mark: str = '', dashes: str = '', **kwargs):
  """An entry of a legend."""
  return Line2D(
    [],
    [],
    color=COLOURS[colour],
    marker=mark,
    linestyle=dashes,
    markersize=5,
    label=label,
    **kwargs,
  )


def numbers(values) -> np.ndarray:
  """An array in which None is not a number."""
  return np.array([np.nan if v is None else v for v in values], float)


def interval(record: dict | None) -> np.ndarray:
  """Mean, low and high."""
  record = record or {}
  return numbers(record.get(k) for k in ('mean', 'low', 'high'))


def finite(values) -> bool:
  """Whether there is anything to draw."""
  return bool(np.isfinite(values).any())
