"""Decoding against the memory bus: shapes of real models, random weights.

  python launch/bench/decode.py --shapes 0.6B 8B --batches 1 32 256
  python launch/bench/decode.py --shapes 0.6B --batches 32 --transformers

A step reads all weights and the cache once: that is the floor, at the copy
bandwidth that this machine measures. `share` is floor / time. Prints too the
bytes of copies of weights or caches inside the compiled loop, which should be
none. `--transformers`: `generate` (eager) of the same shape, greedy.
"""

import argparse
import functools
import re
import statistics
import time

import jax
import jax.numpy as jnp

from persona_jax import trees
from persona_jax.models import cache, decoder
from persona_jax.models.config import DecoderConfig, Kind, Rope

SHAPES = {  # of Qwen 3: features, layers, heads, hidden, tied
  'tiny': (64, 2, 4, 128, True),
  '0.6B': (1024, 28, 16, 3072, True),
  '1.7B': (2048, 28, 16, 6144, True),
  '4B': (2560, 36, 32, 9728, True),
  '8B': (4096, 36, 32, 12288, False),
}
KV_HEADS, HEAD_DIM, VOCAB = 8, 128, 151_936


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--shapes', nargs='+', default=['0.6B'])
  parser.add_argument('--batches', type=int, nargs='+', default=[1, 32, 256])
  parser.add_argument('--slots', type=int, default=512)
  parser.add_argument('--steps', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--dtype', default='bfloat16')
  parser.add_argument('--transformers', action='store_true')
  args = parser.parse_args()
  bandwidth = copy_bandwidth()
  print(f'{jax.devices()[0].device_kind}: copies at {bandwidth / 1e9:.0f} GB/s')
  print(
    '| shape | batch | compile s | ms a step | tokens/s | floor ms | share '
    '| copies | transformers tokens/s |'
  )
  print('|---|---|---|---|---|---|---|---|---|')
  for name in args.shapes:
    for batch in args.batches:
      print(row(name, batch, bandwidth, args), flush=True)


def row(name, batch, bandwidth, args):
  config = shape(name)
  dtype = jnp.dtype(args.dtype)
  variables = weights(config, dtype)
  apply, unembed = decoder.functions(config, dtype=dtype)
  full = jax.jit(
    functools.partial(cache.empty, config, batch, args.slots, dtype=dtype)
  )()
  start = args.slots - args.steps

  def run(variables, memory, token):
    def step(i, state):
      token, memory = state
      position = jnp.full((batch, 1), start + i, jnp.int32)
      hidden, memory = apply(variables, token, position, memory)
      token = jnp.argmax(unembed(variables, hidden[:, 0]), -1)
      return token[:, None].astype(jnp.int32), memory

    return jax.lax.fori_loop(0, args.steps, step, (token, memory))

  begun = time.perf_counter()
  token = jnp.ones((batch, 1), jnp.int32)
  program = jax.jit(run, donate_argnums=1).lower(variables, full, token)
  program = program.compile()
  compiled = time.perf_counter() - begun
  times = []
  for _ in range(args.repeats + 1):
    begun = time.perf_counter()
    token, full = jax.block_until_ready(program(variables, full, token))
    times.append((time.perf_counter() - begun) / args.steps)
  step = statistics.median(times[1:])
  read = nbytes(variables) + nbytes(full)
  if not config.tied:  # one row of the table a token is read
    read -= variables['params']['embed']['embedding'].nbytes
  floor = read / bandwidth
  copies = loop_copies(program.as_text(), variables, full)
  del variables, full
  peer = '-'
  if args.transformers:
    peer = f'{generate(config, batch, args):.0f}'
  return (
    f'| {name} | {batch} | {compiled:.0f} | {1e3 * step:.2f} '
    f'| {batch / step:.0f} | {1e3 * floor:.2f} | {floor / step:.2f} '
    f'| {copies} | {peer} |'
  )


def shape(name):
  features, layers, heads, hidden, tied = SHAPES[name]
  return DecoderConfig(
    vocab=VOCAB,
    features=features,
    layers=layers,
    heads=heads,
    kv_heads=min(KV_HEADS, heads),
    head_dim=HEAD_DIM,
    hidden=hidden,
    kinds=(Kind(Rope(1e6)),),
    norm_eps=1e-6,
    tied=tied,
    family='qwen3',
    qk_norm='head',
  )


def weights(config, dtype):
  """Random unstacked variables, made leaf by leaf where they lie."""
  init = functools.partial(decoder.init, config)
  shapes = jax.eval_shape(
    lambda key: trees.unstack_layers(init(key)), jax.random.key(0)
  )
  leaves, tree = jax.tree.flatten(shapes)
  draw = jax.jit(
    lambda key, shape: 0.02 * jax.random.normal(key, shape, dtype),
    static_argnums=1,
  )
  keys = jax.random.split(jax.random.key(0), len(leaves))
  return tree.unflatten(
    draw(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
  )


def copy_bandwidth(size=2**28):
  """Bytes a second, read and written, of the best of ten large copies."""
  x = jnp.zeros(size, jnp.float32)
  move = jax.jit(lambda x: x + 1, donate_argnums=0)  # no new pages
  x = jax.block_until_ready(move(x))
  best = float('inf')
  for _ in range(10):
    begun = time.perf_counter()
    x = jax.block_until_ready(move(x))
    best = min(best, time.perf_counter() - begun)
  return 2 * x.nbytes / best


def loop_copies(text, *arrays):
  """Copies of arrays of these shapes in the bodies of a program's loops."""
  bodies = set(re.findall(r'body=%?([\w.\-]+)', text))
  shapes = {tuple(x.shape) for x in jax.tree.leaves(arrays) if x.size > 2**16}
  count, inside = 0, False
  for line in text.splitlines():
    if head := re.match(r'%?([\w.\-]+) \(', line):
      inside = head[1] in bodies
    if inside and (copy := re.search(r'= \w+\[([\d,]+)\]\S* copy\(', line)):
      count += tuple(map(int, copy[1].split(','))) in shapes
  return count


def nbytes(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def generate(config, batch, args):
  """Tokens a second of transformers' `generate`, eager, after one warm-up."""
  import torch
  import transformers

  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  made = transformers.Qwen3Config(
    vocab_size=config.vocab,
    hidden_size=config.features,
    num_hidden_layers=config.layers,
    num_attention_heads=config.heads,
    num_key_value_heads=config.kv_heads,
    head_dim=config.head_dim,
    intermediate_size=config.hidden,
    tie_word_embeddings=config.tied,
  )
  with torch.device(device):
    model = transformers.AutoModelForCausalLM.from_config(
      made, dtype=getattr(torch, args.dtype)
    ).eval()
  model.generation_config.eos_token_id = None
  model.generation_config.pad_token_id = 0
  ids = torch.ones(
    (batch, args.slots - args.steps), dtype=torch.long, device=device
  )

  def once(new):
    begun = time.perf_counter()
    model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      max_new_tokens=new,
      min_new_tokens=new,
    )
    if device == 'cuda':
      torch.cuda.synchronize()
    return time.perf_counter() - begun

  once(2)
  # The prefill is in both, and leaves only steps when subtracted.
  spent = [once(args.steps) - once(1) for _ in range(args.repeats)]
  return batch * (args.steps - 1) / statistics.median(spent)


if __name__ == '__main__':
  main()
