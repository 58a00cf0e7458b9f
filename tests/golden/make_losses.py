"""Golden numbers of losses and advantages, computed by TRL and by Tunix.

Neither is needed by the package, and each wants a Python of its own; the other
one's numbers stay as they are:

  pip install trl==1.16.0 torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
  python tests/golden/make_losses.py trl

  pip install google-tunix==0.1.7 jax==0.11.0 flax==0.12.8
  python tests/golden/make_losses.py tunix

Their own methods run, on the arrays of `inputs`, with the options of `CASES` in
`trl_losses.py` and `tunix_losses.py`. What stands in for a trainer
holds only what the method reads of it; what stands in for a model returns the
given log-probabilities, or logits of two tokens of which the second has them
(`log(1 - p), log p` is normalised, so their gradients are those of log p).
Gradients are with respect to the log-probabilities, or to the values.
"""

import argparse
import importlib
import json
from importlib import metadata
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / 'losses.json'
PEERS = {'trl': ('trl', 'torch'), 'tunix': ('google-tunix', 'jax')}  # packages
B, M, G = 6, 9, 3  # rows; tokens of each; rows of a scenario


def inputs():
  """What all losses read; rows 2 p and 2 p + 1 are pair p, chosen and not."""
  rng = np.random.default_rng(16)
  normal = lambda *shape: rng.normal(size=shape)
  logprobs = -0.2 - np.abs(normal(B, M))
  near = lambda scale: np.minimum(logprobs + scale * normal(B, M), -0.01)
  length = np.array([9, 4, 7, 1, 6, 9])[:, None]
  mask = np.arange(M) < length
  mask[[0, 2, 5], [3, 2, 6]] = False  # what another said in between
  found = {
    'group': np.array(G),
    'mask': mask,
    'logprobs': logprobs,
    'old': near(0.3),
    'reference': near(0.4),
    'sampled': near(0.3),
    'correction': 0.5 + rng.random((B, M)),
    'advantages': np.array([1.3, -0.8, -0.4, -1.1, 0.0, 0.9]),
    'rewards': normal(B),
    'values': normal(B, M),
    'old_values': normal(B, M),
    'returns': normal(B, M),
    'label': np.array([1, 0, 1, 1, 0, 1]),
    # Replies to other prompts than their own (KTO): rows of `mask`, rotated.
    'other': -0.3 - np.abs(normal(B, M)),
    'other_reference': -0.6 - np.abs(normal(B, M)),
  }
  tell = lambda x: x.astype(int) if x.dtype == bool else np.round(x, 4)
  return {name: tell(x).tolist() for name, x in found.items()}


def with_options(arrays, options):
  """`arrays` in numpy, with what some cases change of them."""
  found = {
    name: np.asarray(x, bool if name == 'mask' else np.float32)
    for name, x in arrays.items()
  }
  if options.get('empty'):  # row 4 has no tokens
    found['mask'][4] = False
  if options.get('first'):  # one token a row
    found['mask'][:, 1:] = False
  if options.get('swapped'):
    found['other'], found['other_reference'] = (
      found['other_reference'],
      found['other'],
    )
  return found


def asked(peer, arrays):
  """What each method of a peer says, for each of its options."""
  home = f'{__package__}.' if __package__ else ''
  module = importlib.import_module(f'{home}{peer}_losses')
  return [
    {'method': name, 'options': options}
    | told(module.METHODS[name](options, with_options(arrays, options)))
    for name, rows in module.CASES.items()
    for options in rows
  ]


def told(found):
  """Arrays as lists of float32 that JSON gives back as they were."""
  short = lambda x: float(f'{x:.9g}')
  lists = lambda x: [lists(y) for y in x] if isinstance(x, list) else short(x)
  return {
    name: lists(np.asarray(x, np.float32).tolist()) for name, x in found.items()
  }


def written(record):
  """JSON with a case a line."""
  parts = [f'"inputs": {json.dumps(record["inputs"])}']
  for peer in record.keys() & PEERS:
    cases = ',\n'.join(json.dumps(x) for x in record[peer]['cases'])
    versions = json.dumps(record[peer]['versions'])
    parts.append(f'"{peer}": {{"versions": {versions}, "cases": [\n{cases}]}}')
  return '{' + ',\n'.join(sorted(parts)) + '}\n'


def main():
  """Writes the cases of one peer into losses.json."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('peer', choices=PEERS)
  peer = parser.parse_args().peer
  arrays = inputs()
  record = json.loads(FILE.read_text()) if FILE.exists() else {}
  if record.get('inputs') != arrays:
    record = {'inputs': arrays}  # and the other peer's cases are no more
  record[peer] = {
    'versions': {name: metadata.version(name) for name in PEERS[peer]},
    'cases': asked(peer, arrays),
  }
  FILE.write_text(written(record))


if __name__ == '__main__':
  main()
