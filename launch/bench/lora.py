"""Does RL of an 8B model fit one accelerator? Counts bytes, runs nothing.

Compiles the learner's step on shapes alone (Llama 3.1 8B in bfloat16, remat,
AdamW with float32 moments) and prints what XLA says that it needs:

  python launch/bench/lora.py --ranks 16 64
  python launch/bench/lora.py --tpu v5p:2x2x1  # with libtpu installed

Temporaries are those of the backend that compiles: on CPU about twice the base
more than on TPU, as if it kept the kernels in float32 too. Neither is a GPU's.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import optax

from persona_jax import learn, trees
from persona_jax.learn import losses, step
from persona_jax.models import decoder, families, lora

GIB = 2**30
LLAMA = {  # config.json of Llama-3.1-8B; its scaled RoPE costs no memory
  'model_type': 'llama',
  'vocab_size': 128256,
  'hidden_size': 4096,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'num_key_value_heads': 8,
  'intermediate_size': 14336,
  'rms_norm_eps': 1e-5,
  'rope_theta': 500000.0,
  'max_position_embeddings': 131072,
}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--ranks', type=int, nargs='*', default=[16, 64])
  parser.add_argument('--rows', type=int, default=8)
  parser.add_argument('--length', type=int, default=1024)
  parser.add_argument('--microbatches', type=int, nargs='*', default=[8, 1])
  parser.add_argument('--held', type=int, default=1 << 24)  # logits
  parser.add_argument('--layers', type=int, default=32)
  parser.add_argument('--full', action='store_true', help='all parameters too')
  parser.add_argument('--tpu', help='a topology to compile for')
  flags = parser.parse_args()
  config = families.from_hf(LLAMA | {'num_hidden_layers': flags.layers})
  device = _device(flags.tpu)
  print(f'{flags.rows} x {flags.length} tokens, {device.device_kind}; GiB')
  print('trained  | parts | base | state | temporaries | peak | compiled in')
  for rank in [*flags.ranks, *([None] if flags.full else [])]:
    for parts in flags.microbatches:
      row = measure(config, rank, parts, flags, device)
      print(' | '.join(row), flush=True)


def measure(config, rank, parts, flags, device):
  """One row of the table; rank None trains all parameters."""
  params = jax.eval_shape(
    functools.partial(decoder.init, config), jax.random.key(0)
  )['params']
  base = {'params': narrow(params)}
  apply, unembed = decoder.functions(config, dtype=jnp.bfloat16, remat='full')
  if rank is None:
    weights, base, scales, collection = params, {}, {}, 'params'
  else:
    adapter = jax.eval_shape(
      lambda key: lora.init(config, key, rank=rank, alpha=2.0 * rank),
      jax.random.key(0),
    )
    (weights, scales), collection = lora.split(adapter), 'lora'
    base |= {'lora': scales}

  def update(state, base, batch):
    loss_fn = step.policy_loss(
      lora.adapted(apply),
      unembed,
      learn.clipped_loss,
      base,
      temperature=1.0,
      held=flags.held,
      trained=collection,
    )
    return learn.train_step(
      state,
      batch,
      losses.per_token(batch),
      loss_fn=loss_fn,
      optimizer=OPTIMIZER,
      microbatches=parts,
    )

  state = jax.eval_shape(lambda w: learn.init_state(w, OPTIMIZER), weights)
  place = jax.sharding.SingleDeviceSharding(device)
  arguments = (state, base, batch_of(flags.rows, flags.length))
  begin = time.perf_counter()
  program = (
    jax.jit(update, donate_argnums=0, in_shardings=place, out_shardings=place)
    .lower(*arguments)
    .compile()
  )
  seconds = time.perf_counter() - begin
  found = program.memory_analysis()
  kept = found.output_size_in_bytes - found.alias_size_in_bytes
  inside = found.temp_size_in_bytes
  peak = found.argument_size_in_bytes + inside + kept
  name = 'all     ' if rank is None else f'rank {rank:3}'
  sizes = (size(base), size(state), inside, peak)
  return (
    name,
    str(parts),
    *(f'{x / GIB:.2f}' for x in sizes),
    f'{seconds:.0f} s',
  )


def narrow(params):
  """Shapes in bfloat16."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params
  )


def batch_of(rows, length):
  """Shapes of a batch in which every second token is the policy's."""
  shape = lambda width, dtype: jax.ShapeDtypeStruct((rows, width), dtype)
  view, said = length, length // 2
  return learn.Batch(
    tokens=shape(view, jnp.int32),
    positions=shape(view, jnp.int32),
    before=shape(said, jnp.int32),
    actions=shape(said, jnp.int32),
    mask=shape(said, bool),
    advantages=shape(said, jnp.float32),
    old_logprobs=shape(said, jnp.float32),
    reference_logprobs=shape(said, jnp.float32),
  )


def size(tree):
  return sum(x.size * x.dtype.itemsize for x in trees.flatten(tree).values())


def _device(topology):
  if topology is None:
    return jax.devices()[0]
  from jax.experimental import topologies

  wanted = topologies.get_topology_desc(platform='tpu', topology_name=topology)
  return wanted.devices[0]


if __name__ == '__main__':
  main()
