"""A plan as tables for a terminal, wide or narrow."""

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from persona_jax import pace
from persona_jax.chips import GIB

_PROGRAMS = ('train', 'talk')
_HEADS = ('', 'learn', 'talk')
_DEPTHS = ('a rollout', 'a token', 'a token, both speakers', 'a read')

_NARROW = (
  'fsdp leaves {narrow} features of a weight to a chip, fewer than the lanes '
  'of a TPU: XLA then adds up padded arrays where it would gather, and sends '
  'twice as much. Part of fsdp as data or tensor sends less.'
)


def of_plan(record: dict[str, Any]) -> Group:
  """Memory, work, collectives, time and money; then what would fit."""
  job = record['job']
  where = f'{job["model"]} on {job["topology"]}, {_mesh(job)}'
  what = (
    f'{job["batch"]:,} dialogues of {job["tokens"]:,} tokens: {job["lines"]} '
    f'lines of at most {job["line"]}; {_trained(job)}, remat={job["remat"]}, '
    f'microbatches={job["microbatches"]}'
  )
  return Group(
    Text(where, style='bold'),
    Text(f'{what}; {record["how"]}.', style='dim'),
    '',
    Text('On each chip, GiB', style='bold'),
    _memory(record),
    '',
    Text('A step: what its rollout and its update take', style='bold'),
    _work(record),
    *_collectives(record),
    '',
    *_verdict(record),
  )


def _mesh(job):
  axes = ', '.join(f'{k}={v}' for k, v in job['mesh'].items() if v > 1)
  return axes or 'one device'


def _trained(job):
  if job['rank']:
    return f'an adapter of rank {job["rank"]}'
  return 'all parameters'


def _memory(record):
  rows = [
    ('state, or weights of the speakers', 'held'),
    ('cache of both speakers', 'cache'),
    ('kept for the rest of the run', 'kept'),
    ('activations and temporaries', 'temporaries'),
    ('in all', 'total'),
    ('limit', 'limit'),
  ]
  table = _table(*_HEADS)
  for label, key in rows:
    table.add_row(label, *(f'{record[x][key] / GIB:.2f}' for x in _PROGRAMS))
  fits = ('yes' if record[x]['fits'] else 'no' for x in _PROGRAMS)
  table.add_row('fits', *fits)
  off = [record[x]['off'] for x in _PROGRAMS]
  if None not in off:
    table.add_row('compiled / counted by hand', *(f'{x:.2f}' for x in off))
  return table


def _work(record):
  parts = [record[x] for x in _PROGRAMS]
  chips = record['chips']
  table = _table(*_HEADS)

  def row(label, show):
    table.add_row(label, *map(show, parts))

  row('PFLOPs that the model needs', lambda x: _big(x['flops_model'] / 1e15))
  row('PFLOPs that are computed', lambda x: _big(x['flops'] / 1e15))
  row('GB of memory moved by a chip', lambda x: _big(x['moved'] / 1e9))
  row('GB sent by a chip', lambda x: _big(x['sent'] / 1e9))
  for part in pace.REACHED:
    row(f'{part} at its peak, s', lambda x, p=part: _big(x['parts'][p]))
  row('bound by', lambda x: x['bound'])
  row('expected, s', lambda x: _span(x['seconds']))
  row('tokens/s a chip', lambda x: _rate(record, x, chips))
  return table


def _rate(record, part, chips):
  job = record['job']
  tokens = job['batch'] * job['tokens']
  if part is record['talk']:
    tokens = job['batch'] * (job['lines'] - 1) * job['line']
  low, high = part['seconds']
  return _span((tokens / chips / high, tokens / chips / low))


def _collectives(record):
  rows = [
    (program, one)
    for program in _PROGRAMS
    for one in record[program]['collectives'] or ()
    if one['sent'] >= 1e3
  ]
  if not rows:
    return ()
  table = _table('', 'each', 'times', 'MB sent by a chip')
  for program, one in rows:
    each = 'a step' if program == 'train' else _depth(one['open'])
    table.add_row(
      f'{program}: {one["kind"]}',
      each,
      f'{one["count"]:,}',
      _big(one['sent'] / 1e6),
    )
  return '', Text('Collectives', style='bold'), table


def _depth(loops):
  """What of a rollout lies in so many open loops."""
  return _DEPTHS[min(loops, len(_DEPTHS) - 1)]


def _verdict(record):
  money = record['dollars']
  lines = [
    f'A step takes {_span(record["seconds"])} s, {_span(money["step"])} $; '
    f'an hour {_span(money["hour"])} $.',
    f'Time: {pace.ABOUT}. Lines of full length; judges and the reference come '
    f'on top. Money: {money["about"]}.',
  ]
  shown = [Text(lines[0]), Text(lines[1], style='dim')]
  if record['narrow']:
    shown.append(Text(_NARROW.format(**record), style='dim'))
  found = record['suggestion']
  if found is not None:
    shown += ['', *_suggested(found)]
  return shown


def _suggested(found):
  for one in found['tried']:
    yield Text(f'does not fit, compiled: {one["words"]}', style='dim')
  if found['words'] is None:
    yield Text('It does not fit; no change that was tried makes it fit.')
    return
  how = 'compiled' if found['verified'] else 'counted by hand'
  yield Text(f'It does not fit. This does ({how}): {found["words"]}')
  for program, total in found.get('totals', {}).items():
    yield Text(f'  {program}: {total / GIB:.2f} GiB on each chip')


def _table(*heads):
  table = Table(box=None, padding=(0, 2, 0, 0))
  table.add_column(heads[0])
  for head in heads[1:]:
    table.add_column(head, justify='right')
  return table


def _big(x):
  """Three digits that count."""
  return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


def _span(pair):
  low, high = pair
  return f'{_big(low)} to {_big(high)}'
