"""Host memory while a checkpoint of many shards streams to its place.

A Llama of random weights is written as bfloat16 shards and loaded in a child
process, whose own (anonymous) memory is sampled; pages of the mapped files are
the system's to drop, and are not counted. The floor is the target itself.

  python launch/bench/load.py --layers=8
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

FIELDS = {
  'model_type': 'llama',
  'vocab_size': 48_000,
  'hidden_size': 1536,
  'num_attention_heads': 12,
  'num_key_value_heads': 4,
  'intermediate_size': 6144,
  'rms_norm_eps': 1e-5,
  'rope_theta': 5e5,
  'tie_word_embeddings': False,
  'max_position_embeddings': 8192,
}
MIB = 2**20


def main():
  """Writes the shards, loads them in children, prints one table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--layers', type=int, default=8)
  parser.add_argument('--child', type=json.loads)
  parser.add_argument('--folder', type=Path)
  flags = parser.parse_args()
  if flags.child:
    print(json.dumps(measured(flags.folder, **flags.child)))
    return
  with tempfile.TemporaryDirectory() as folder:
    count = write(Path(folder), flags.layers)
    print(f'{count} shards of bfloat16, {flags.layers} layers; MiB')
    print('| devices | dtype | target | largest | peak | over | s |')
    print('|---|---|---|---|---|---|---|')
    for devices, dtype in ((1, 'bfloat16'), (1, 'float32'), (8, 'bfloat16')):
      print(row(folder, devices, dtype))


def row(folder, devices, dtype) -> str:
  """One child; `over` is (peak - target) / largest tensor of the target."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  child = json.dumps({'devices': devices, 'dtype': dtype})
  command = [sys.executable, __file__, f'--folder={folder}', f'--child={child}']
  done = subprocess.run(
    command, env=environment, capture_output=True, text=True, check=True
  )
  found = json.loads(done.stdout.splitlines()[-1])
  over = (found['peak'] - found['target']) / found['largest']
  cells = [found[k] / MIB for k in ('target', 'largest', 'peak')]
  cells = ' | '.join(f'{x:.0f}' for x in cells)
  seconds = found['seconds']
  return f'| {devices} | {dtype} | {cells} | {over:.2f} | {seconds:.1f} |'


def write(folder: Path, layers: int) -> int:
  """A folder of one shard a layer; gives the number of shards."""
  import ml_dtypes
  import numpy as np
  import tokenizers
  from safetensors.numpy import save_file

  from persona_jax.models import families, names

  config = families.from_hf(FIELDS | {'num_hidden_layers': layers})
  table = names.table(config, names.HUGGING_FACE)
  rng, where, shards = np.random.default_rng(0), {}, {}
  for name, shape in names.foreign(config, table).items():
    part = name.split('.')[2] if '.layers.' in name else name.split('.')[-2]
    where[name] = f'{part}.safetensors'
    shards.setdefault(where[name], {})[name] = shape
  for file, shapes in shards.items():
    tensors = {
      name: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
      for name, shape in shapes.items()
    }
    save_file(tensors, folder / file, metadata={'format': 'pt'})
  index = {'metadata': {}, 'weight_map': where}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  (folder / 'config.json').write_text(json.dumps(families.to_hf(config)))
  model = tokenizers.models.BPE({'a': 0}, [])
  tokenizers.Tokenizer(model).save(str(folder / 'tokenizer.json'))
  return len(shards)


def measured(folder: Path, *, devices: int, dtype: str) -> dict:
  """Bytes of the target, its largest tensor and the peak; seconds."""
  import jax
  import jax.numpy as jnp

  from persona_jax import models
  from persona_jax.learn import sharding
  from persona_jax.models import names

  jnp.zeros(8).block_until_ready()
  places = {}
  if devices > 1:
    places = {'mesh': sharding.make_mesh(), 'rules': sharding.RULES}
  before, peak, stop = own_memory(), [0], threading.Event()

  def watch():
    while not stop.is_set():
      peak[0] = max(peak[0], own_memory())
      time.sleep(0.002)

  watcher = threading.Thread(target=watch)
  watcher.start()
  began = time.monotonic()
  model = models.load(folder, dtype=jnp.dtype(dtype), **places)
  jax.block_until_ready(model.variables)
  seconds = time.monotonic() - began
  stop.set()
  watcher.join()
  size = jnp.dtype(dtype).itemsize
  largest = max(
    jnp.prod(jnp.array(shape)).item()
    for shape in names.foreign(
      model.config, names.table(model.config, names.HUGGING_FACE)
    ).values()
  )
  return {
    'target': size * names.parameters(model.config),
    'largest': size * largest,
    'peak': peak[0] - before,
    'seconds': seconds,
  }


def own_memory() -> int:
  """Bytes of memory that no file backs."""
  for line in Path('/proc/self/status').read_text().splitlines():
    if line.startswith('RssAnon'):
      return 1024 * int(line.split()[1])
  raise OSError('/proc/self/status has no RssAnon; this needs Linux.')


if __name__ == '__main__':
  main()
