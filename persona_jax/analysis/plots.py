"""Pictures of a study: its numbers in, a matplotlib Figure out.

Every function takes parts of `results.json`, where any number may be None. It
returns None where there is nothing to draw.
"""

import numpy as np
from matplotlib.figure import Figure

from persona_jax.analysis import looks
from persona_jax.analysis.looks import COLOURS, EDGE, finite

_MARKS = {  # of groups of roles: colour and shape both tell
  'blue': 'o',
  'vermilion': 's',
  'green': '^',
  'purple': 'D',
  'sky': 'v',
  'orange': 'P',
  'olive': 'X',
}
_SIDES = (  # where a name may stand: right, left, above, below
  (1, 0, 'left', 'center'),
  (-1, 0, 'right', 'center'),
  (0, 1, 'center', 'bottom'),
  (0, -1, 'center', 'top'),
)
_LETTER, _HIGH = 5.2, 11  # pixels of 7.5 pt type, generously
_TRAINING = {
  'reward': ('Reward', 'chance of consistency, weighted'),
  'loss/kl': ('KL from the start', 'nats per token'),
  'length': ('Length of a line', 'tokens'),
  'degenerate': ('Degenerate lines', 'share of lines'),
  'policy/clipped': ('Clipped ratios', 'share of tokens'),
  'norm/grads': ('Gradient norm', 'before clipping'),
}
_TERMS = {'reward/prompt_to_line': 'blue', 'reward/line_to_line': 'vermilion'}
_BY_PARTNER = (looks.DRIFT[4], looks.DRIFT[0], looks.DRIFT[1])


@looks.styled
def scatter(space: dict) -> Figure | None:
  """Roles in the plane of the first two components, extremes by name."""
  roles = [r for r in space['roles'] if None not in r['pc']]
  centre = space['default']['pc']
  if not roles or None in centre:
    return None
  figure = Figure((looks.WIDTH, 5.6))
  axes = figure.add_axes((0.07, 0.1, 0.9, 0.79))
  share = [f' ({100 * e:.0f} % of variance)' for e in space['explained'][:2]]
  share += ['', '']
  axes.set_xlabel(f'PC1{share[0]}, activation units')
  axes.set_ylabel(f'PC2{share[1]}, activation units')
  for group, (colour, mark) in _groups(roles).items():
    xy = np.array([r['pc'] for r in roles if r['group'] == group])
    axes.scatter(*xy.T, 42, COLOURS[colour], marker=mark, label=group, **EDGE)
  axes.scatter(*centre, 240, COLOURS['ink'], marker='*', zorder=4, **EDGE)
  axes.margins(0.09)
  axes.autoscale_view()
  figure.legend(
    loc='upper left', bbox_to_anchor=(0.05, 0.98), ncols=7, columnspacing=1.4
  )
  names = ['default Assistant', *(r['name'] for r in roles)]
  _name(axes, names, np.array([centre, *(r['pc'] for r in roles)]))
  return figure


def _groups(roles):
  names = dict.fromkeys(r['group'] for r in roles)
  marks = list(_MARKS.items())
  return {name: marks[i % len(marks)] for i, name in enumerate(names)}


def _name(axes, names, xy):
  """Names the first point, then the outermost, wherever there is room."""
  points = axes.transData.transform(xy)
  spread = (points - points.mean(0)) / np.maximum(points.std(0), 1e-9)
  order = np.argsort(-np.linalg.norm(spread, axis=1), kind='stable')
  taken = [_box(point, (11, 11)) for point in points]
  for i in [0, *order[order != 0]]:
    size = (_LETTER * len(names[i]) + 4, _HIGH)
    gap = (12, 11) if i == 0 else (7, 6)  # a star is large
    for dx, dy, across, up in _SIDES:
      shift = np.array([dx * gap[0], dy * gap[1]])
      box = _box(points[i] + shift + np.array([dx, dy]) * size / 2, size)
      if _within(box, axes.bbox.extents) and not _hits(box, taken):
        taken.append(box)
        axes.annotate(
          names[i],
          xy[i],
          shift * 0.72,  # points a pixel
          textcoords='offset points',
          ha=across,
          va=up,
          fontsize=7.5,
          fontweight='bold' if i == 0 else 'normal',
        )
        break


def _box(centre, size):
  half = np.array(size) / 2
  return (*(centre - half), *(centre + half))


def _hits(a, boxes):
  return any(
    a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes
  )


def _within(a, b):
  return a[0] > b[0] and a[1] > b[1] and a[2] < b[2] and a[3] < b[3]


@looks.styled
def ranking(space: dict, ends: int = 12) -> Figure | None:
  """Roles in order along the axis: the `ends` of either side by name."""
  roles = [r for r in space['roles'] if r['projection'] is not None]
  default = space['default']['projection']
  if not roles or not default:
    return None
  roles = sorted(roles, key=lambda r: r['projection'])
  cut = ends if len(roles) > 2 * ends else len(roles)
  far, between, near = roles[:cut], roles[cut:-ends], roles[cut:][-ends:]
  start = cut + 3 if between else cut
  rows = {**dict(enumerate(far)), **dict(enumerate(near, start))}
  top = start + len(near)
  figure = Figure((looks.WIDTH, 1.4 + 0.19 * top), layout='constrained')
  axes = figure.subplots()
  axes.axvline(0, color=COLOURS['faint'], linewidth=1)
  axes.axvline(1, color=COLOURS['ink'], linewidth=1, linestyle='--')
  groups = _groups(space['roles'])

  def draw(role, y, size):
    x, (colour, mark) = role['projection'] / default, groups[role['group']]
    axes.scatter(x, y, size, COLOURS[colour], marker=mark, zorder=3, **EDGE)
    return [0, x], [y, y], COLOURS[colour]

  for y, role in rows.items():
    *line, colour = draw(role, y, 42)
    axes.plot(*line, color=colour, linewidth=1, alpha=0.5)
  for i, role in enumerate(between):
    draw(role, cut + 1 + 0.35 * (i % 5 - 2), 26)
  axes.scatter(1, top, 190, COLOURS['ink'], marker='*', zorder=4, **EDGE)
  names = {y: role['name'] for y, role in rows.items()}
  names[top] = 'default Assistant'
  if between:
    names[cut + 1] = f'{len(between)} roles between'
  looks.by_name(axes, names)
  axes.set_xlabel(
    'projection on the Assistant axis (0 mean of roles, 1 default Assistant)'
  )
  axes.set_ylabel('role')
  looks.key(figure, [looks.sample(g, *look) for g, look in groups.items()])
  return figure


@looks.styled
def layers(space: dict) -> Figure | None:
  """Explained variance, and the axis by layer: |cos| with PC1 and norm."""
  explained = 100 * looks.numbers(space['explained'])
  if not finite(explained):
    return None
  figure, (variance, cosine, norm) = looks.grid(3, 3)
  where = np.arange(1, len(explained) + 1)
  together = np.cumsum(explained)
  variance.bar(where, explained, color=COLOURS['blue'], label='each')
  variance.plot(
    where, together, color=COLOURS['vermilion'], marker='.', label='together'
  )
  variance.legend(loc='center right')
  variance.set_ylim(0, 104)
  looks.words(variance, 'Explained variance', 'component', 'per cent')
  for axes, name, title, unit in (
    (cosine, 'cosine_by_layer', 'Axis and PC1', '|cosine|'),
    (norm, 'norm_by_layer', 'Length of the axis', 'activation units'),
  ):
    values, at = looks.numbers(space[name]), space['layer']
    first, end = np.array(space['band']) - 0.5
    axes.axvspan(first, end, color=COLOURS['orange'], alpha=0.18, linewidth=0)
    axes.plot(values, color=COLOURS['blue'], marker='.')
    axes.plot(at, values[at], 'o', color=COLOURS['vermilion'])
    looks.words(axes, title, 'layer (shaded: capped; dot: reported)', unit)
    axes.set_ylim(0, 1 if axes is cosine else None)
  return figure


@looks.styled
def training(steps: list[dict], shuffled: list[dict] = ()) -> Figure | None:
  """Reward and its terms, KL, length and health by step of RL."""
  parts = [name for name in _TRAINING if finite(_of(steps, name))]
  if not parts:
    return None
  figure, panels = looks.grid(len(parts), 3)
  for axes, name in zip(panels, parts, strict=True):
    terms = _TERMS if name == 'reward' else {}
    for series, colour in {name: 'ink', **terms}.items():
      _curve(axes, steps, series, COLOURS[colour])
    _curve(axes, shuffled, name, COLOURS['purple'], '--')
    title, unit = _TRAINING[name]
    looks.words(axes, title, 'step', unit)
  handles = [
    looks.sample('RL (reward: total)', 'ink', dashes='-'),
    looks.sample('term: prompt to line', 'blue', dashes='-'),
    looks.sample('term: line to line', 'vermilion', dashes='-'),
    looks.sample('shuffled RL', 'purple', dashes='--'),
  ]
  looks.key(figure, handles if shuffled else handles[:3])
  return figure


def _curve(axes, steps, name, colour, dashes='-'):
  """A line; if it is long, its running mean over a tenth of the steps."""
  x, y = _of(steps, 'step'), _of(steps, name)
  if not finite(y):
    return
  width = len(y) // 10
  if width > 2:
    axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.35)
    y = np.convolve(y, np.ones(width) / width, 'valid')
    x = x[width // 2 :][: len(y)]
  mark = 'o' if len(y) < 12 else ''
  axes.plot(x, y, color=colour, linestyle=dashes, marker=mark, markersize=3.5)


def _of(steps, name):
  return looks.numbers(step.get(name) for step in steps)


@looks.styled
def drift(arms: dict, metrics: tuple[str, ...] = looks.DRIFT) -> Figure | None:
  """Each metric by line of the persona, a line an arm, 95 % bands."""
  drawn = lambda name: [a for a in arms if finite(_rows(arms[a], name))]
  parts = [name for name in metrics if drawn(name)]
  if not parts:
    return None
  figure, panels = looks.grid(len(parts), min(3, len(parts)))
  alpha = 0.14 if len(arms) < 5 else 0.08
  for axes, name in zip(panels, parts, strict=True):
    for which in drawn(name):
      _band(axes, _rows(arms[which], name), looks.arm(which), alpha)
    title, unit = looks.metric(name)
    looks.words(axes, title, 'line of the persona', unit)
  looks.key(figure, [_line(looks.arm(which)) for which in arms])
  return figure


def _rows(record, name):
  """`[N 3]`: mean, low and high by line."""
  curve = record.get('curves', {}).get(name) or []
  return np.array([looks.interval(i) for i in curve]).reshape(-1, 3)


def _band(axes, rows, look, alpha=0.14):
  mean, low, high = rows.T
  x, colour = 1 + np.arange(len(rows)), COLOURS[look.colour]
  if len(rows) > 1:
    axes.fill_between(x, low, high, color=colour, alpha=alpha, linewidth=0)
  else:
    axes.vlines(x, low, high, color=colour)
  size = 4 if len(rows) < 20 else 0
  axes.plot(
    x,
    mean,
    color=colour,
    linestyle=look.dashes,
    marker=look.mark,
    markersize=size,
  )


def _line(look):
  return looks.sample(look.title, look.colour, look.mark, look.dashes)


@looks.styled
def effects(
  found: list[dict], metrics: tuple[str, ...] = looks.EFFECTS
) -> Figure | None:
  """Differences of arms with 95 % intervals; panels of a unit share x."""
  found = [e for e in found if finite(looks.interval(e['difference']))]
  parts = [m for m in metrics if any(e['metric'] == m for e in found)]
  if not parts:
    return None
  names = list(dict.fromkeys(e['name'] for e in found))[::-1]
  figure, panels = looks.grid(len(parts), 2, 0.75 + 0.21 * len(names))
  first = {}  # panel of each unit
  for axes, name in zip(panels, parts, strict=True):
    title, unit = looks.metric(name)
    if first.setdefault(unit, axes) is not axes:
      axes.sharex(first[unit])
    axes.axvline(0, color=COLOURS['faint'], linewidth=1)
    for effect in found:
      if effect['metric'] == name:
        _effect(axes, names.index(effect['name']), effect)
    looks.by_name(axes, dict(enumerate(names)))
    axes.set_title(title)
    axes.set_xlabel(f'difference ({unit})')
    axes.set_ylabel('effect')
  hollow = {'markerfacecolor': COLOURS['page']}
  looks.key(
    figure,
    [
      looks.sample('95 % interval excludes zero', 'ink', 'o', '-'),
      looks.sample('includes zero', 'ink', 'o', '-', **hollow),
    ],
  )
  return figure


def _effect(axes, y, effect):
  mean, low, high = looks.interval(effect['difference'])
  colour = COLOURS[looks.arm(effect['of']).colour]
  face = colour if effect['excludes_zero'] else COLOURS['page']
  axes.hlines(y, low, high, color=colour, linewidth=1.8)
  axes.plot(mean, y, 'o', color=colour, markerfacecolor=face, markersize=6)


@looks.styled
def partners(
  record: dict, name: str = 'base/free', metrics: tuple[str, ...] = _BY_PARTNER
) -> Figure | None:
  """One arm by kind of partner: a column a kind, all kinds in grey."""
  kinds = record.get('by_kind') or {}
  parts = [m for m in metrics if finite(_rows(record, m))]
  if not kinds or not parts:
    return None
  figure = Figure((looks.WIDTH, 0.7 + 1.75 * len(parts)), layout='constrained')
  panels = figure.subplots(
    len(parts), len(kinds), sharex=True, sharey='row', squeeze=False
  )
  look = looks.arm(name)
  whole = looks.Arm('all kinds', 'faint', ':', '')
  for row, which in zip(panels, parts, strict=True):
    mean = _rows(record, which)[:, :1]
    for axes, some in zip(row, kinds.values(), strict=True):
      _band(axes, np.repeat(mean, 3, 1), whole)
      if finite(rows := _rows(some, which)):
        _band(axes, rows, look)
    title, unit = looks.metric(which)
    row[0].set_ylabel(f'{looks.fold(title, 27)}\n({unit})')
  for column, kind in zip(panels.T, kinds, strict=True):
    looks.words(column[-1], '', 'line of the persona', column[-1].get_ylabel())
    column[0].set_title(kind)
  looks.key(figure, [_line(look), _line(whole)])
  return figure
