"""The programs of a plan, compiled on shapes alone, in a process of its own.

Reads a `Job` as JSON from its input and writes what was found as JSON.
"""

import contextlib
import functools
import json
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from persona_jax import dialogue as dialogues
from persona_jax import hlo, learn, rollout, trees
from persona_jax import job as jobs
from persona_jax.job import Job
from persona_jax.learn import sharding
from persona_jax.learn.step import policy_loss
from persona_jax.models import decoder, lora

PROGRAMS = ('train', 'talk')
_TOO_LARGE = {  # as the compiler for TPUs says it, of all or of a part
  'used': r'Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm',
  'temporaries': r'temporaries \(([\d.]+)([KMG]?)\) exceeds available HBM '
  r'\(([\d.]+)([KMG]?)\)',
}


def measure(job: Job, program: str) -> dict[str, Any]:
  """Bytes on a chip and collectives of one of the `PROGRAMS`, compiled."""
  mesh = make_mesh(job)
  begin = time.perf_counter()
  lowered = {'train': lower_train, 'talk': lower_talk}[program](job, mesh)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    found = too_large(str(error))
    if found is None:
      raise
    return found | {'seconds': time.perf_counter() - begin}
  memory = compiled.memory_analysis()
  kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return {
    'arguments': memory.argument_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes + max(kept, 0),
    'collectives': hlo.summary(compiled.as_text()),
    'seconds': time.perf_counter() - begin,
  }


def too_large(message: str) -> dict[str, float] | None:
  """What a program needs and what there is, if that is what an error says."""
  for what, pattern in _TOO_LARGE.items():
    need = re.search(pattern, message)
    if need:
      return {
        what: _bytes(*need.groups()[:2]),
        'limit': _bytes(*need.groups()[2:]),
      }
  return None


def make_mesh(job: Job) -> Mesh:
  """The learner's mesh, of the topology or of as many devices of a CPU."""
  if job.place.chip.platform == 'gpu':
    return sharding.make_mesh(job.mesh)
  from jax.experimental import topologies

  found = topologies.get_topology_desc(
    platform='tpu', topology_name=job.topology
  )
  return sharding.make_mesh(job.mesh, found.devices)


# The learner's step.


def lower_train(job: Job, mesh: Mesh):
  """`learn.train_step` as the learner takes it, donated, on shapes."""
  config = job.config
  model = decoder.functions(
    config, dtype=jnp.dtype(job.dtype), remat=job.remat, attend=job.attend
  )
  apply = sharding.by_rows(lora.adapted(model.apply), mesh)
  algorithm = learn.ALGORITHMS['grpo']
  collection = 'lora' if job.rank else 'params'

  def update(state, rest, batch):
    loss_fn = policy_loss(
      apply,
      model.unembed,
      algorithm.loss,
      rest,
      held=job.held,
      trained=collection,
    )
    return learn.train_step(
      state,
      batch,
      algorithm.weights(batch),
      loss_fn=loss_fn,
      optimizer=jobs.OPTIMIZER,
      microbatches=job.microbatches,
    )

  state, rest = jobs.state(job)
  place = functools.partial(_placed, mesh=mesh)
  rows = jax.tree.map(
    lambda x: _at(x, sharding.batch_sharding(mesh)), jobs.batch(job)
  )
  state = place(state)
  places = jax.tree.map(lambda x: x.sharding, state)
  program = jax.jit(update, out_shardings=(places, None), donate_argnums=0)
  return program.lower(state, place(rest), rows)


# The rollout.


def lower_talk(job: Job, mesh: Mesh):
  """`rollout.converse` of the policy with its frozen partner, on shapes."""
  config = job.config
  model = decoder.functions(
    config, dtype=jnp.dtype(job.dtype), attend=job.attend
  )
  apply = sharding.by_rows(lora.adapted(model.apply), mesh)
  memory = jobs.memory(job)
  frame = jnp.zeros(jobs.FRAME, jnp.int32)

  def talk(base, policy, scenario):
    sampling = rollout.Sampling.of(job.batch, [0], temperature=0.8)
    speakers = tuple(
      rollout.Speaker(
        variables=variables,
        sampling=sampling,
        apply=apply,
        unembed=model.unembed,
        memory=memory,
      )
      for variables in (base, {**base, **policy})
    )
    return rollout.converse(
      jax.random.key(0),
      speakers,
      (dialogues.Frame(frame, frame),) * 2,
      scenario,
      lines=job.lines,
      tokens=job.line,
      groups=job.ways,
    )

  base = {'params': _serving(jobs.params(config, jnp.dtype(job.dtype)), mesh)}
  policy = {'lora': _serving(jobs.adapter(job), mesh)} if job.rank else base
  rows = jax.tree.map(
    lambda x: _at(x, sharding.batch_sharding(mesh)), jobs.scenario(job)
  )
  return jax.jit(talk).lower(base, policy, rows)


def _serving(tree, mesh):
  """Unstacked shapes, whole on every chip but over `tensor`."""
  rules = sharding.gathered(sharding.RULES)
  stacked = _placed(tree, mesh, rules)
  rest = {k: v for k, v in stacked.items() if k != 'layers'}
  layers = stacked['layers']
  count = jax.tree.leaves(layers)[0].shape[0]

  def one(x):
    where = NamedSharding(mesh, P(*tuple(x.sharding.spec)[1:]))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=where)

  layer = jax.tree.map(one, layers)
  return rest | {f'layers_{i}': layer for i in range(count)}


def _placed(tree, mesh, rules=sharding.RULES):
  """Shapes with the places that the rules give them."""
  return jax.tree.map(_at, tree, trees.shardings(tree, mesh, rules))


def _at(x, place):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _bytes(number, unit):
  return float(number) * 1024 ** ' KMG'.index(unit or ' ')


def main():
  """One job, one answer."""
  asked = json.load(sys.stdin)
  with contextlib.redirect_stdout(sys.stderr):  # the compiler may print too
    found = measure(Job(**asked['job']), asked['program'])
  json.dump(found, sys.stdout)


if __name__ == '__main__':
  main()
