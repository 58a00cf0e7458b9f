"""The end of a study: one page to read, and one screen for the terminal."""

import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from persona_jax import metrics, pages
from persona_jax.analysis import judge_plots, looks, plots

PARTS = ('about', 'times', 'space', 'judges', 'rl', 'arms', 'effects', 'answer')
TASKS = {  # the judge's task, by scope of an inconsistency
  'global': 'prompt_to_line',
  'local': 'line_to_line',
}
SLOPES = {'slope/inconsistency': 'inconsistency/global/likelihood'}
RL_ARMS = ('base/free', 'rl/free', 'shuffled/free')
CAP_ARMS = ('base/free', 'base/capped', 'base/random', 'rl/free', 'rl/capped')
SCREEN = (24, 100)  # lines and columns of the terminal's answer


def write(results: dict, path: str | Path):
  """Renders `results` to one self-contained file, whole or not at all."""
  page = render(results).encode('utf-8', 'replace')
  metrics.replace(Path(path), lambda fresh: fresh.write_bytes(page))


def render(results: dict) -> str:
  """The page; parts that `results` lacks are left out."""
  parts = {part: results.get(part) or {} for part in PARTS}
  judges = parts['judges']
  return pages.page(
    'report.html.jinja',
    **parts,
    badges=lambda *names: badges(judges, names),
    flat=flat,
    gain=gain,
    looks=looks,
    pictures=pictures(parts),
    side=side,
    valid=valid,
  )


def pictures(parts: dict) -> dict[str, Markup]:
  """Every picture that there are numbers for, as inline SVG."""
  space, judges, rl, arms = (
    parts[k] for k in ('space', 'judges', 'rl', 'arms')
  )
  only = lambda names: {a: arms[a] for a in names if a in arms}
  figures = {
    'calibration': judge_plots.calibration(judges),
    'effects': plots.effects(parts['effects'] or []),
    'base': plots.drift(only(['base/free'])),
    'partners': plots.partners(arms.get('base/free') or {}),
    'all': plots.drift(arms) if len(arms) > 1 else None,
  }
  if space:
    figures['scatter'] = plots.scatter(space)
    figures['ranking'] = plots.ranking(space)
    figures['layers'] = plots.layers(space)
  if rl:
    shuffled = rl.get('shuffled_steps') or []
    figures['training'] = plots.training(rl['steps'], shuffled)
  if 'rl/free' in arms:
    figures['rl'] = plots.drift(only(RL_ARMS))
  if 'base/capped' in arms or 'rl/capped' in arms:
    figures['cap'] = plots.drift(only(CAP_ARMS))
  return {name: pages.svg(figure) for name, figure in figures.items() if figure}


class Badge(NamedTuple):
  """What a number that rests on a judge is worth."""

  text: str
  valid: bool


def badges(judges: dict, names: tuple[str, ...]) -> list[Badge]:
  """The judges that the metrics `names` rest on, each once."""
  found = {}
  for name in names:
    kind, *rest = SLOPES.get(name, name).split('/')
    if kind == 'inconsistency' and len(rest) == 2 and rest[0] in TASKS:
      found[TASKS[rest[0]], rest[1]] = None
  return [badge(judges, *key) for key in found]


def badge(judges: dict, task: str, judge: str) -> Badge:
  """'likelihood judge: AUC 0.71 [0.62, 0.79] on 144 labelled lines'."""
  record = (judges.get(task) or {}).get(judge)
  if not record:
    return Badge(f'{judge} judge: not calibrated', False)
  what = {'prompt_to_line': 'lines', 'line_to_line': 'pairs'}[task]
  area = f'AUC {pages.interval(record["auc"])}'
  text = f'{judge} judge: {area} on {record["labelled"]} labelled {what}'
  if valid(record):
    return Badge(text, True)
  return Badge(f'{text}, not told from chance', False)


def valid(record: dict) -> bool:
  """Whether a judge's AUC lies above one half, interval and all."""
  area = record.get('auc') or {}
  return area.get('low') is not None and area['low'] > 0.5 and area['n'] > 1


def flat(config: dict, prefix: str = '') -> dict:
  """`{'rl.steps': 4}` of a nested dict."""
  found = {}
  for name, value in config.items():
    name = f'{prefix}{name}'
    found |= (
      flat(value, f'{name}.') if isinstance(value, dict) else {name: value}
    )
  return found


def gain(steps: list[dict]) -> tuple[int, float, float] | None:
  """Mean reward of the first and of the last tenth, and how many steps."""
  rewards = [s['reward'] for s in steps if s.get('reward') is not None]
  if len(rewards) < 2:
    return None
  few = max(1, len(rewards) // 10)
  return few, sum(rewards[:few]) / few, sum(rewards[-few:]) / few


def side(space: dict) -> str:
  """Which bound the cap sets: 'ceiling' or 'floor', toward the Assistant."""
  limits = space['bounds']
  on = [
    word
    for word, which in (('floor', 'low'), ('ceiling', 'high'))
    if any(limit is not None for limit in limits[which])
  ]
  return ' and '.join(on)


def answer_panel(results: dict, width: int | None = None) -> Panel:
  """The answer for the terminal, no larger than `SCREEN`."""
  high, wide = SCREEN
  width = min(wide, width or shutil.get_terminal_size().columns)
  inside = width - 4  # the frame and a blank on either side
  answer = results.get('answer') or {}
  headline = answer.get('headline') or 'No answer: the study is not whole.'
  above = [Text(line, 'bold') for line in _fold(headline, inside)[:2]]
  below = _arm_lines(results.get('arms') or {}, inside)
  below += _judge_lines(results.get('judges') or {}, inside)
  room = high - 2 - len(above) - len(below) - 1
  said = _sentences(answer.get('sentences') or [], inside, room)
  lines = [*above, *said, Text(), *below]
  for line in lines:
    line.no_wrap, line.overflow = True, 'ellipsis'
  title = 'persona-jax study'
  return Panel(Group(*lines), title=title, title_align='left', width=width)


def _fold(text, width):
  return textwrap.wrap(text, max(width, 20)) or ['']


def _sentences(sentences, width, room):
  """Whole sentences, in order, as long as there is room."""
  lines = []
  for i, sentence in enumerate(sentences):
    more = _fold(sentence, width)
    left = len(sentences) - i
    if len(lines) + len(more) > room - (left > 1):
      return [*lines, Text(f'{left} more in report.html', 'dim')][
        : max(room, 0)
      ]
    lines += map(Text, more)
  return lines


def _arm_lines(arms, width):
  """Arms by row: inconsistency by both judges, and the projection."""
  columns = [looks.DRIFT[0], looks.DRIFT[1], looks.DRIFT[4]]
  heads = ('likelihood', 'verdict', 'projection')
  shown = [
    (
      looks.arm(name).title,
      *(pages.interval(arm['summary'].get(c)) for c in columns),
    )
    for name, arm in list(arms.items())[:8]
    if arm.get('summary')
  ]
  if not shown:
    return []
  rows = [('inconsistent by', *heads), *shown]
  size = [max(len(row[i]) for row in rows) for i in range(4)]
  gap = '  ' if sum(size) + 6 <= width else ' '
  texts = [
    gap.join(cell.ljust(n) for cell, n in zip(row, size, strict=True))
    for row in rows
  ]
  return [Text(t, '' if i else 'dim') for i, t in enumerate(texts)]


def _judge_lines(judges, width):
  """Each judge's AUC on lines and on pairs, yellow where one is chance."""
  lines = [Text()] if any(judges.values()) else []
  for name in looks.JUDGES:
    told = [badge(judges, t, name) for t in TASKS.values() if judges.get(t)]
    texts = [b.text.removeprefix(f'{name} judge: ') for b in told]
    style = '' if all(b.valid for b in told) else 'yellow'
    for line in _fold(f'{name} judge: {"; ".join(texts)}', width)[:2]:
      lines.append(Text(line, style))
  return lines if judges else []
