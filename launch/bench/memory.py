"""Peak memory of an update: by hand, by the compiler, and of the process.

  python launch/bench/memory.py
  python launch/bench/memory.py --only='wide 0' --compile

Each case is an update as `learner.Learner` compiles it (GRPO, AdamW, float32),
on one CPU device, in a process of its own. By hand: what `persona-jax plan`
counts, the state and what a step holds beside it. By the compiler:
`memory_analysis()`, what is donated once. Of the process: the most that was
resident during an update over what was before state and batch were made.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax import costs, dialogue, main
from persona_jax import job as jobs
from persona_jax.chips import GIB
from persona_jax.learn import sharding
from persona_jax.learner import Learner
from persona_jax.models import decoder

_LLAMA = {
  'model_type': 'llama',
  'rms_norm_eps': 1e-5,
  'rope_theta': 10000.0,
  'max_position_embeddings': 4096,
  'tie_word_embeddings': True,
}
SHAPES = {
  '135m': _LLAMA  # of SmolLM2-135M
  | {
    'vocab_size': 49152,
    'hidden_size': 576,
    'num_hidden_layers': 30,
    'num_attention_heads': 9,
    'num_key_value_heads': 3,
    'intermediate_size': 1536,
  },
  'wide': _LLAMA
  | {
    'vocab_size': 32000,
    'hidden_size': 2048,
    'num_hidden_layers': 4,
    'num_attention_heads': 16,
    'num_key_value_heads': 8,
    'intermediate_size': 5632,
  },
}
CASES = (  # shape, rank of the adapter or 0, microbatches, remat, rows, tokens
  ('135m', 0, 1, 'full', 4, 1024),
  ('135m', 0, 4, 'full', 4, 1024),
  ('135m', 0, 1, 'none', 1, 1024),
  ('135m', 0, 4, 'none', 4, 1024),
  ('135m', 16, 1, 'full', 4, 1024),
  ('135m', 16, 4, 'none', 4, 1024),
  ('wide', 0, 1, 'full', 4, 512),
  ('wide', 0, 4, 'none', 4, 512),
  ('wide', 16, 1, 'none', 4, 512),
)
_HEAD = (
  '| shape | trained | microbatches | remat | rows x tokens | by hand GiB | '
  'compiler | process | compiler / hand | process / hand |'
)


def run(argv):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--only', default='')  # cases that begin so
  parser.add_argument('--compile', action='store_true')  # nothing is run
  parser.add_argument('--case', default='')  # in this process
  args = parser.parse_args(argv)
  if args.case:
    print(json.dumps(measure(*json.loads(args.case), args.compile)))
    return
  print(_HEAD)
  print('|---' * 10 + '|')
  for case in CASES:
    if ' '.join(map(str, case)).startswith(args.only):
      print(row(case, apart(case, args.compile)), flush=True)


def row(case, found):
  shape, rank, parts, remat, rows, tokens = case
  hand = found['state'] + found['temporaries']
  cells = [shape, f'rank {rank}' if rank else 'all', parts, remat]
  cells += [f'{rows} x {tokens}']
  own = [hand, found['compiler'], found.get('process', 0)]
  cells += [f'{x / GIB:.2f}' for x in own]
  cells += [f'{x / hand:.2f}' for x in own[1:]]
  return f'| {" | ".join(map(str, cells))} |'


def apart(case, compile_only):
  """`measure` in a process that gives back what it frees."""
  command = [sys.executable, __file__, f'--case={json.dumps(case)}']
  own = {'JAX_PLATFORMS': 'cpu', 'MALLOC_MMAP_THRESHOLD_': str(1 << 17)}
  done = subprocess.run(
    command + ['--compile'] * compile_only,
    env=os.environ | own,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return json.loads(done.stdout)


def measure(shape, rank, parts, remat, rows, tokens, compile_only):
  """Bytes by hand, by the compiler and of this process."""
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, 'config.json')
    path.write_text(json.dumps(SHAPES[shape]))
    job = jobs.make(
      topology='h100:1', model=str(path), batch=rows, tokens=tokens, lines=4,
      microbatches=parts, remat=remat, rank=rank, dtype='float32',
    )  # fmt: skip
    job.config  # noqa: B018  it is read once, from the folder
  config = settings(job)
  blank = jax.tree.map(
    lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape),
    jobs.params(job.config, jnp.float32),
  )
  learner = Learner(lab(job, blank), config)
  states = jax.eval_shape(learner.init)
  states = placed(states, sharding.state_shardings(states, learner.mesh))
  base = jax.tree.map(shape_of, {'params': blank})
  batch = jax.eval_shape(lambda: a_batch(job))
  picked = jax.ShapeDtypeStruct((rows,), jnp.int32)
  compiled = (
    learner._compiled_update(states)
    .lower(states, base, batch, picked)
    .compile()
  )
  memory = compiled.memory_analysis()
  found = {
    'state': costs.state(job),
    'temporaries': costs.temporaries(job),
    'arguments': memory.argument_size_in_bytes,
    'temp': memory.temp_size_in_bytes,
    'kept': memory.output_size_in_bytes - memory.alias_size_in_bytes,
  }
  found['compiler'] = sum(found[x] for x in ('arguments', 'temp', 'kept'))
  if not compile_only:
    found['process'] = peak(job, config, compiled)
  return found


def peak(job, config, compiled):
  """What an update adds to this process at most, its state and batch too."""
  make = jax.jit(lambda key: decoder.init(job.config, key)['params'])
  before = resident() if job.rank else 0
  params = jax.block_until_ready(make(jax.random.key(0)))
  before = before or resident()  # trained whole, they are copied
  states = jax.block_until_ready(Learner(lab(job, params), config).init())
  batch = jax.block_until_ready(a_batch(job))
  Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
  picked = jnp.arange(job.batch, dtype=jnp.int32)
  states, told = compiled(states, {'params': params}, batch, picked)
  told = {k: float(v) for k, v in told.items()}
  assert np.isfinite(told['loss']) and told['norm/grads'] > 0, told
  return status('VmHWM') - before


def settings(job):
  config = main.load_config('study:tiny')
  for field, value in {
    'rollout.batch': job.batch,
    'rl.group': job.batch,
    'rl.microbatches': job.microbatches,
    'rl.remat': job.remat,
    'rl.adapter.rank': job.rank,
    'rl.held': job.held,
    'attend': job.attend,
  }.items():
    main.override(config, field, str(value))
  return config


def lab(job, params):
  """What a learner needs of a lab."""
  model = types.SimpleNamespace(config=job.config, variables={'params': params})
  nothing = jnp.zeros(1, jnp.int32)
  return types.SimpleNamespace(
    model=model,
    mesh=sharding.make_mesh(),
    frame=dialogue.Frame(nothing, nothing),
  )


def a_batch(job):
  """Rows of random tokens, learned from with random advantages."""
  batch = jobs.batch(job, jnp.zeros)
  key = jax.random.key(1)
  width = job.said
  slots = jnp.arange(job.tokens, dtype=jnp.int32)[None]
  return batch.replace(
    tokens=jax.random.randint(key, batch.tokens.shape, 0, job.config.vocab),
    positions=jnp.broadcast_to(slots, batch.positions.shape),
    before=jnp.broadcast_to(slots[:, :width], batch.before.shape),
    mask=jnp.ones_like(batch.mask),
    advantages=jax.random.normal(key, batch.advantages.shape),
  )


def placed(tree, places):
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    tree,
    places,
  )


def shape_of(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def resident():
  """Bytes, what is free given back."""
  ctypes.CDLL(None).malloc_trim(0)
  return status('VmRSS')


def status(name):
  lines = Path('/proc/self/status').read_text().splitlines()
  [line] = [x for x in lines if x.startswith(f'{name}:')]
  return 1024 * int(line.split()[1])


if __name__ == '__main__':
  run(sys.argv[1:])
