"""Whether a run fits the chips, what bounds it and what it costs.

The learner's step and the rollout are compiled ahead of time on shapes alone:
for a TPU by its own compiler, which needs no TPU; for GPUs, whose compiler
needs one, by the compiler for as many CPU devices, which is an estimate.
"""

import dataclasses
import importlib.util
import json as json_lib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from persona_jax import costs, pace
from persona_jax import job as jobs
from persona_jax.job import Job

PROGRAMS = ('train', 'talk')
TRIES = 3  # suggestions that are compiled
_TENSOR = 8  # most that a suggestion spreads features over
_CPU = (
  'compiled for {count} CPU devices, an estimate: a GPU has other kernels, and '
  'XLA widens bfloat16 products on a CPU'
)
_TPU = 'compiled for {place} by libtpu {version}, without the chips'
_COUNTED = 'counted by hand, nothing was compiled'


def run(topology: str, *, quick: bool = False, json: bool = False, **flags):
  """Prints the plan of a run on a topology; flags are the fields of `Job`.

  Args:
    topology: 'v5p:4x4x4', 'h100:8'.
    quick: count by hand and compile nothing.
    json: for machines.
    **flags: as `job.make` takes them.
  """
  job = jobs.make(topology=topology, **flags)
  record = plan(job, None if quick else compiled)
  if json:
    print(json_lib.dumps(record, indent=2))
    return
  from rich.console import Console

  from persona_jax import plan_tables

  Console().print(plan_tables.of_plan(record))


def plan(job: Job, measure: Callable | None) -> dict[str, Any]:
  """All that is known of a job; `measure(job, program)` compiles."""
  found = measured(job, measure)
  record = {
    'job': dataclasses.asdict(job) | {'line': job.line, 'said': job.said},
    'chips': job.place.count,
    'how': _how(job, measure),
  }
  for name, timed in (('train', pace.train), ('talk', pace.talk)):
    record[name] = memory(job, name, found[name])
    record[name] |= timed(job, record[name]['collectives'])
  times = [record[x]['seconds'] for x in PROGRAMS]
  record['seconds'] = tuple(map(sum, zip(*times, strict=True)))
  record['narrow'] = costs.narrow(job)
  record['dollars'] = pace.dollars(job, record['seconds'])
  fits = all(record[x]['fits'] for x in PROGRAMS)
  record['suggestion'] = None if fits else suggest(job, found, measure)
  return record


def measured(job: Job, measure: Callable | None) -> dict[str, dict | None]:
  """What the compiler found of each program."""
  costs.serving(job)  # raises where the rules do not divide the weights
  return {x: measure and measure(job, x) for x in PROGRAMS}


def memory(job: Job, program: str, found: dict | None) -> dict[str, Any]:
  """Bytes on a chip while a program runs, with what the run keeps beside it.

  While it learns, the partner's weights stay, and the parameters from before
  training; while it talks, those and the train state. By hand, a rollout holds
  two more copies of its caches: the compiler for TPUs was seen to.
  """
  if program == 'train':
    own, cache = costs.state(job), 0
    kept = costs.serving(job) + costs.start(job)
    more = costs.temporaries(job)
  else:
    own, cache = costs.speakers(job), 2 * costs.cache(job)
    kept = costs.state(job) + costs.start(job)
    more = 2 * cache
  limit, counted = job.place.chip.memory, own + cache + more
  if found is not None:  # the compiler may only say by how much it is too large
    own, limit = found.get('arguments', own), found.get('limit', limit)
    more = found.get('temporaries', found.get('used', 0) - own) - cache
    more = max(more, 0)
  total = own + cache + kept + more
  return {
    'held': own,
    'cache': cache,
    'kept': kept,
    'temporaries': more,
    'total': total,
    'limit': limit,
    'fits': total <= limit,
    'off': found and (own + cache + more) / counted,
    'compile_seconds': found and found['seconds'],
    'collectives': found and found.get('collectives'),
  }


def _how(job, measure):
  if measure is None:
    return _COUNTED
  if job.place.chip.platform == 'gpu':
    return _CPU.format(count=job.place.count)
  return _TPU.format(place=job.place, version=_libtpu())


# What makes it fit.


def suggest(
  job: Job, found: dict[str, dict | None], measure: Callable | None
) -> dict[str, Any] | None:
  """The first change that makes a job fit, compiled if `measure` does.

  Changes that do not fit by hand-counted sums, as far off as they were for
  this job, are not compiled.
  """
  wrong = {x: _wrong(job, x, found[x]) for x in PROGRAMS}
  seen, tried = [job], []
  for other in changes(job):
    if other in seen or not _fits_by_hand(other, wrong):
      continue
    seen.append(other)
    words = difference(job, other)
    if measure is None:
      return {'words': words, 'verified': False, 'tried': tried}
    again = measured(other, measure)
    bytes_ = {x: memory(other, x, again[x]) for x in PROGRAMS}
    totals = {x: bytes_[x]['total'] for x in PROGRAMS}
    if all(x['fits'] for x in bytes_.values()):
      verified = {'words': words, 'verified': True, 'tried': tried}
      return verified | {'totals': totals}
    tried.append({'words': words, 'totals': totals})
    if len(tried) == TRIES:
      break
  return {'words': None, 'verified': False, 'tried': tried}


def changes(job: Job) -> Iterator[Job]:
  """Jobs that need less on a chip, the one that costs least first."""
  for wider in _wider(job):
    for less in (wider, wider.changed(remat='full')):
      most = less.batch // less.ways
      parts = less.microbatches
      while parts <= most:
        if less.batch % (less.ways * parts) == 0:
          yield less.changed(microbatches=parts)
        parts += 1
    batch = job.batch // 2
    while batch >= wider.ways and batch % wider.ways == 0:
      parts = batch // wider.ways
      yield wider.changed(batch=batch, remat='full', microbatches=parts)
      batch //= 2


def _wider(job):
  """The job, then with features spread wider, then all that on more chips."""
  shape = list(job.place.shape)
  for times in (1, 2, 4, 8, 16):
    name = f'{job.place.chip.name}:{"x".join(map(str, shape))}'
    mesh = job.mesh | {'fsdp': job.mesh['fsdp'] * times}
    yield _on(job, name, mesh)
    while mesh['fsdp'] % 2 == 0 and mesh['tensor'] * 2 <= _TENSOR:
      mesh |= {'fsdp': mesh['fsdp'] // 2, 'tensor': mesh['tensor'] * 2}
      yield _on(job, name, dict(mesh))
    shape[shape.index(min(shape))] *= 2


def _on(job, topology, mesh):
  """The job on other chips, its batch as large as they need."""
  other = job.changed(topology=topology, mesh=mesh)
  least = other.ways
  batch = max(job.batch, least)
  batch += -batch % least
  parts = min(job.microbatches, batch // least)
  while batch % (least * parts):
    parts -= 1
  return other.changed(batch=batch, microbatches=parts)


def _wrong(job, program, found):
  """How many times the temporaries are those counted by hand, at least 1."""
  now, hand = (memory(job, program, x)['temporaries'] for x in (found, None))
  return max(1.0, now / hand)


def _fits_by_hand(job, wrong):
  try:
    found = {x: memory(job, x, None) for x in PROGRAMS}
  except ValueError:  # the rules do not divide the weights
    return False
  return all(
    x['total'] + (wrong[name] - 1) * x['temporaries'] <= x['limit']
    for name, x in found.items()
  )


def difference(job: Job, other: Job) -> str:
  """The words that change `job` into `other`."""
  words = []
  for field in dataclasses.fields(job):
    name = field.name
    value = getattr(other, name)
    if value == getattr(job, name):
      continue
    if name == 'topology':
      words.insert(0, value)
    elif name == 'mesh':
      words.append(f'--mesh={mesh_words(value)}')
    else:
      words.append(f'--{name}={value}')
  return ' '.join(words)


def mesh_words(mesh: dict[str, int]) -> str:
  """'fsdp=32,tensor=2' of the axes that are more than one."""
  axes = ','.join(f'{k}={v}' for k, v in mesh.items() if v > 1)
  return axes or 'fsdp=1'


# The compiler.


def compiled(job: Job, program: str) -> dict[str, Any]:
  """`planned.measure` in a process of its own, told about its devices.

  Raises:
    ImportError: libtpu is not installed, and the topology is one of TPUs.
    ValueError: the program could not be compiled; says why.
  """
  if job.place.chip.platform == 'tpu' and not _libtpu():
    raise ImportError(
      f'{job.place} needs the compiler for TPUs: pip install '
      '"persona_jax[tpu]", or count by hand with --quick.'
    )
  fields = {x.name: getattr(job, x.name) for x in dataclasses.fields(job)}
  what = f'{mesh_words(job.mesh)}, {job.batch} rows in {job.microbatches}'
  print(
    f'Compiling {program} for {job.place}, {what} ...',
    file=sys.stderr,
    flush=True,
  )
  done = subprocess.run(
    [sys.executable, '-m', 'persona_jax.planned'],
    input=json_lib.dumps({'job': fields, 'program': program}),
    capture_output=True,
    text=True,
    env=_environment(job),
    check=False,
  )
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ['it was killed: no memory?']
    raise ValueError(
      f'{program} could not be compiled for {job.place}: {_reason(lines)}'
    )
  return json_lib.loads(done.stdout)


def _environment(job):
  count = f'--xla_force_host_platform_device_count={job.place.count}'
  own = {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',  # this machine need not be a TPU's
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # nor is a TPU opened
  }
  if job.place.chip.platform == 'gpu':
    own['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {count}'
  return os.environ | own


def _reason(lines):
  """The sentence of the last error in a traceback."""
  named = [x for x in lines if 'Error: ' in x.split(' ')[0] + ' ']
  return (named or lines)[-1].strip()


def _libtpu() -> str | None:
  """The version of the compiler for TPUs, if it is installed."""
  if importlib.util.find_spec('libtpu') is None:
    return None
  from importlib import metadata

  return metadata.version('libtpu')
