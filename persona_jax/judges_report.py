"""What judges are worth: a page to read, and tables for the terminal."""

from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from persona_jax import metrics, pages
from persona_jax.analysis import judge_plots

PARTS = {  # of a card: how its rows are called
  'errors': 'way to fail',
  'tasks': 'task',
  'length': 'words of the line',
  'place': "the speaker's line",
  'persona': 'words of the persona',
}


def write(results: dict, path: str | Path):
  """Renders `results` to one self-contained file, whole or not at all."""
  text = render(results).encode('utf-8', 'replace')
  metrics.replace(Path(path), lambda fresh: fresh.write_bytes(text))


def render(results: dict) -> str:
  """The page."""
  judges = {k: x for k, x in results['judges'].items() if 'auc' in x}
  return pages.page(
    'judges.html.jinja',
    **results,
    parts=PARTS,
    rows_of=rows_of,
    silent=[k for k in results['judges'] if k not in judges],
    pictures={
      name: pages.svg(figure)
      for name, figure in {
        'areas': judge_plots.areas(judges),
        'reliability': judge_plots.reliability(judges),
        'agreement': judge_plots.agreement(results['agreement']),
      }.items()
      if judges
    },
  )


def rows_of(judges: dict, part: str) -> dict[str, int]:
  """The rows of a part of all cards, and how many lines each is about."""
  found = {}
  for card in judges.values():
    for name, record in (card.get(part) or {}).items():
      found[name] = max(record['lines'], found.get(name, 0))
  return found


def panel(results: dict) -> Group:
  """The terminal's tables: all judges, and each way to fail."""
  judges = results['judges']
  whole = Table(box=None, header_style='bold', pad_edge=False)
  whole.add_column('judge')
  for name in (
    'AUC',
    'raw',
    'pairs',
    'right',
    'ECE',
    'alarms',
    'none',
    'a second',
  ):
    whole.add_column(name, justify='right', no_wrap=True)
  for name, card in judges.items():
    whole.add_row(
      name,
      pages.interval(card.get('auc')),
      pages.mean((card.get('raw') or {}).get('persona')),
      pages.mean(card.get('within')),
      pages.mean(card.get('accuracy')),
      pages.number(card.get('calibration_error')),
      pages.mean(card.get('alarms')),
      str(card['none']),
      pages.number(card.get('per_second'), 1),
      style='' if card['informative'] else 'yellow',
    )
  errors = Table(box=None, header_style='bold', pad_edge=False)
  errors.add_column('AUC by way to fail')
  for name in judges:
    errors.add_column(name.replace('_', ' '), justify='right')
  for error, count in rows_of(judges, 'errors').items():
    found = [(card.get('errors') or {}).get(error) for card in judges.values()]
    errors.add_row(
      f'{error} ({count})', *(pages.mean((x or {}).get('auc')) for x in found)
    )
  parts = [whole, Text(), errors]
  poor = [name for name, card in judges.items() if not card['informative']]
  if poor:
    parts += [Text(), Text(f'Not told from chance: {", ".join(poor)}.')]
  return Group(*parts)
