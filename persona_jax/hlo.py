"""What a compiled program sends between devices, from its text (HLO).

A loop's body stands in the text once. Where the loop says how often it runs,
what is in it counts as often; a loop whose end is data counts once, and what
is in it is told apart (`open`).
"""

import collections
import functools
import math
import re
from typing import Any, NamedTuple

BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 'bf16': 2, 'f16': 2, 'c64': 8}
KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
)
_HEAD = re.compile(r'^(ENTRY )?%?([\w.-]+) .*\{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.-]+) = (.*)$')
_ARRAY = re.compile(r'\b(pred|bf16|[suf]\d+|c64|f8\w+)\[([\d,]*)\]')
_KIND = re.compile(r'\s({})(-start)?\('.format('|'.join(KINDS)))
_CALLS = re.compile(
  r'\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)'
)
_ROOT = 'ROOT'
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')


class Collective(NamedTuple):
  """One collective operation of a program."""

  kind: str
  size: float  # bytes of the whole array, on each device of a group
  group: int  # devices
  times: int  # that it runs, loops of unknown length once
  open: int  # loops of unknown length around it

  @property
  def sent(self) -> float:
    """Bytes that a device sends each time, by the algorithms of a ring."""
    share = (self.group - 1) / self.group
    return {
      'all-reduce': 2 * share,
      'collective-permute': 1.0,
      'collective-broadcast': 1.0,
    }.get(self.kind, share) * self.size


def summary(text: str) -> list[dict[str, Any]]:
  """Collectives of a program by kind and depth of open loops, added up."""
  found = collections.defaultdict(lambda: [0, 0.0])
  for one in collectives(text):
    total = found[one.kind, one.open]
    total[0] += one.times
    total[1] += one.times * one.sent
  return [
    {'kind': kind, 'open': depth, 'count': count, 'sent': sent}
    for (kind, depth), (count, sent) in sorted(found.items())
    if sent
  ]


def collectives(text: str) -> list[Collective]:
  """Every collective that a program runs, from its entry on."""
  rooms, entry = _computations(text)
  return _walk(rooms, _partitions(text), entry)


def trips(line: str, rooms: dict[str, list[str]]) -> int | None:
  """How often a while loop runs, where that is known.

  Its backend says so, or its condition compares a counter with a constant;
  counters begin at zero, as those of a scan.
  """
  said = re.search(r'known_trip_count[\\":{ n]+(\d+)', line)
  if said:
    return int(said[1])
  condition, body = (
    _named(rooms.get(re.search(rf'{x}=%?([\w.-]+)', line)[1], ()))
    for x in ('condition', 'body')
  )
  compared = re.search(
    r'compare\((.*?)\), direction=LT', condition.get(_ROOT, '')
  )
  if compared is None:
    return None
  counter, last = (x.split()[-1].lstrip('%') for x in compared[1].split(', '))
  last = _constant(condition.get(last, ''))
  index = re.search(r'index=(\d+)', condition.get(counter, ''))
  if last is None or index is None:
    return None
  return math.ceil(last / _stride(body, int(index[1])))


def _stride(body, index):
  """What a loop adds to the element of its state that counts: 1, as a rule."""
  state = re.search(r' tuple\((.*?)\)', body.get(_ROOT, ''))
  names = re.findall(r'%([\w.-]+)', state[1]) if state else []
  line = body.get(names[index], '') if index < len(names) else ''
  added = re.search(r' add\((.*?)\)', line)
  operands = re.findall(r'%([\w.-]+)', added[1]) if added else []
  found = [_constant(body.get(name, '')) for name in operands]
  return next((x for x in found if x), 1)


def _constant(line) -> int | None:
  found = re.match(r'[su]\d+\[\]\S* constant\((\d+)\)', line)
  return int(found[1]) if found else None


def _named(lines) -> dict[str, str]:
  """What is right of each name in a computation; _ROOT is its last line."""
  named = {}
  for line in lines:
    found = _LINE.match(line)
    if found:
      named[found[2]] = found[3]
      if found[1]:
        named[_ROOT] = found[3]
  return named


def _computations(text):
  """The lines of every computation, and the name of the first that runs."""
  rooms, entry, name = {}, None, None
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head and not line.startswith('HloModule'):
      name = head[2]
      rooms[name] = []
      entry = name if head[1] else entry
    elif name is not None and line.startswith(' '):
      rooms[name].append(line)
  if entry is None:
    raise ValueError('the text holds no ENTRY: it is no compiled program.')
  return rooms, entry


def _walk(rooms, devices, entry) -> list[Collective]:
  @functools.cache
  def inside(name):
    """Collectives of a computation that runs once."""
    found = []
    for line in rooms.get(name, ()):
      body = _LINE.match(line)
      if body is None:
        continue
      body = body[3]
      one = _collective(body, devices, rooms.get(name))
      if one is not None:
        found.append(one)
        continue
      if ' while(' in body:
        found += _repeated(inside, body, rooms)
        continue
      for callee in _CALLS.findall(body):
        found += inside(callee)
      for branches in _BRANCHES.findall(body):
        options = [inside(x.strip().lstrip('%')) for x in branches.split(',')]
        found += max(options, key=lambda x: sum(c.times * c.sent for c in x))
    return found

  return inside(entry)


def _repeated(inside, body, rooms):
  count = trips(body, rooms)
  callee = re.search(r'body=%?([\w.-]+)', body)[1]
  often, deeper = (1, 1) if count is None else (count, 0)
  return [
    one._replace(times=one.times * often, open=one.open + deeper)
    for one in inside(callee)
  ]


def _collective(body, devices, room) -> Collective | None:
  found = _KIND.search(body)
  if found is None:
    return None
  kind, start = found[1], found[2]
  arrays = _ARRAY.findall(body[: found.start()])
  sizes = [_size(*array) for array in arrays]
  if start and kind == 'collective-permute':
    sizes = sizes[1:2]  # what is sent, what comes, and their locks
  elif start and kind == 'all-gather':
    sizes = sizes[len(sizes) // 2 :]  # what is given, what comes
  size, group = sum(sizes), _group(body, devices)
  if kind == 'reduce-scatter':
    size *= group
  if kind == 'all-reduce' and _scatters(room):
    kind = 'reduce-scatter'
  return Collective(kind, size, group, 1, 0)


def _scatters(room):
  """Whether a device keeps its slice alone: XLA's TPU backend fuses that."""
  small = len(room) < 20 and 'dynamic-slice(%all-reduce' in room[-1]
  return small and room[-1].lstrip().startswith('ROOT')


def _group(body, devices) -> int:
  """Devices of a group, in any of the three ways that they are written."""
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', body)
  if listed:
    return len(listed[1].split(','))
  tiled = re.search(r'replica_groups=\[([\d,]+)\]<=', body)
  if tiled:
    return int(tiled[1].split(',')[-1])
  meshed = re.search(r'replica_groups=mesh\[(.*?)\] ?\{(.*?)\}', body)
  if meshed:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", meshed[1]))
    # A part of an axis is written 'axis':(before)size.
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", meshed[2])
    return math.prod(int(part or sizes[name]) for name, part in axes)
  return devices


def _partitions(text) -> int:
  found = re.search(r'num_partitions=(\d+)', text)
  return int(found[1]) if found else 1


def _size(kind, shape) -> float:
  width = BYTES.get(kind)
  if width is None:
    digits = re.match(r'[a-z]+(\d+)', kind)[1]
    width = int(digits) / 8
  return float(width * math.prod(int(x) for x in shape.split(',') if x))
