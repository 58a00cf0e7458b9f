"""The inventory as tables for a terminal, wide or narrow."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_COMPILED = 'xla'  # a folder of our cache
_INTACT = {
  None: 'checked at each load',
  True: 'SHA-256 is right',
  False: 'another file: delete it',
}


def of_overview(found: dict[str, Any]) -> Group:
  """Named sources, families and caches."""
  return Group(
    *_named(found['names']),
    *_families(found['families']),
    *_cache(found['cache']),
    *_hub(found['hub']),
    Text(f'A source is {found["forms"]}.', style='dim'),
  )


def of_source(row: dict[str, Any]) -> Group:
  """What one source is, and what it needs on each device."""
  return Group(*_section(row['source'], _facts(row)), *_memory(row['memory']))


def size(count: int) -> str:
  """Bytes in the largest unit of which there is at least one."""
  if count < 1024:
    return f'{count} B'
  power = min((count.bit_length() - 1) // 10, 4)
  return f'{count / 1024**power:.1f} {"KMGT"[power - 1]}iB'


def _named(rows):
  lines = [
    (
      row['name'],
      row['package'],
      'not fetched yet' if row['bytes'] is None else size(row['bytes']),
      '' if row['bytes'] is None else _INTACT[row['intact']],
    )
    for row in rows
  ]
  return _section('Names', lines)


def _families(rows):
  lines = [
    (
      row['family'],
      row['architecture'],
      f'GGUF: {", ".join(row["gguf"])}' if row['gguf'] else '',
    )
    for row in rows
  ]
  return _section('Families', lines)


def _cache(found):
  lines = [
    (
      row['name'],
      size(row['bytes']),
      'compiled programs' if row['name'] == _COMPILED else '',
    )
    for row in found['files']
  ]
  return _section(f'Cache: {found["path"]}', lines)


def _hub(found):
  if found['path'] is None:
    need = 'huggingface_hub is not installed: pip install "persona_jax[hf]"'
    return _section('Hugging Face hub', [(need,)])
  lines = [
    (row['name'], size(row['bytes']), '\n'.join(_revisions(row)))
    for row in found['models']
  ]
  return _section(f'Hugging Face hub: {found["path"]}', lines)


def _revisions(row) -> list[str]:
  """Short commits with the branches and tags that point at them."""
  return sorted(
    ' '.join((commit[:8], *refs)) for commit, refs in row['revisions'].items()
  )


def _facts(row) -> list[tuple[str, str]]:
  files = f'{row["files"]} files' if row['files'] > 1 else '1 file'
  stops = (f'{text} ({i})' for text, i in row['stop_tokens'].items())
  tied = ', tied to the unembedding' if row['tied'] else ''
  facts = [
    ('family', row['family']),
    ('parameters', f'{row["parameters"]:,}'),
    ('layers', f'{row["layers"]} of {row["features"]:,} features'),
    (
      'heads',
      f'{row["heads"]} of {row["head_dim"]} features, {row["kv_heads"]} of '
      'keys and values',
    ),
    ('MLP', f'{row["hidden"]:,} features'),
    ('vocabulary', f'{row["vocabulary"]:,} tokens{tied}'),
    ('context', f'{row["context"]:,} tokens'),
    ('lines end at', ', '.join(stops) or 'nothing'),
    ('chat template', 'yes' if row['template'] else 'no'),
    ('on disk', f'{size(row["bytes"])}, {files}, {row["format"]}'),
    ('path', row['path']),
  ]
  return facts + ([('commit', row['commit'])] if row['commit'] else [])


def _memory(needs):
  axes = ', '.join(f'{k}={v}' for k, v in needs['mesh'].items() if v > 1)
  where = f'each of {needs["devices"]:,} devices, {axes}'
  lines = [
    (label, size(needs[key]))
    for label, key in (
      (f'weights in {needs["dtype"]}', 'weights'),
      (f'cache of {needs["batch"]:,} x {needs["tokens"]:,} tokens', 'cache'),
      ('inference: weights and cache', 'inference'),
      (f'training an adapter of rank {needs["rank"]}', 'adapter_training'),
      ('training all in float32 with AdamW', 'full_training'),
    )
  ]
  section = _section(f'Memory of {where if axes else "one device"}', lines)
  note = Text('Activations and temporaries come on top.\n', style='dim')
  return (*section[:-1], note)


def _section(title: str, lines) -> tuple[RenderableType, ...]:
  """A title, a table without lines, and a blank line."""
  table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
  for line in lines or [('nothing',)]:
    table.add_row(*(Text(word, overflow='fold') for word in line))
  return Text(title, style='bold'), table, ''
