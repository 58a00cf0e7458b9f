"""Every family against transformers, in one process: a table for LOG.md.

Tiny random models of transformers are saved, loaded by us and compared on a
ragged padded batch longer than any window; with --model, real checkpoints are
compared by their greedy tokens. Needs the extra `parity`:

  python launch/parity.py
  python launch/parity.py --model=FOLDER_OR_GGUF --tokens=64
"""

import argparse
import tempfile
from pathlib import Path

import golden_families as golden
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import torch
import transformers

from persona_jax import models, taps, trees
from persona_jax.models import cache as caches
from persona_jax.models import names

LENGTHS = (40, 33, 21)  # of the rows; windows are 7, longrope begins at 16
PROMPTS = (
  'Hello! Who are you?',
  'Write two sentences about the sea.',
  'def fibonacci(n):',
  'The three largest cities of France are',
  'What is 17 + 25? Explain.',
)


def main():
  """Prints the table of families, or of one real model."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', type=Path)
  parser.add_argument('--tokens', type=int, default=64)
  flags = parser.parse_args()
  if flags.model:
    print(real(flags.model, flags.tokens))
    return
  print('| family | logits | blocks | cached | gradient | export |')
  print('|---|---|---|---|---|---|')
  for name in golden.FAMILIES:
    found = tiny(name)
    print(f'| {name} | ' + ' | '.join(f'{x:.1e}' for x in found) + ' |')


def tiny(name):
  """Largest differences: logits, blocks, cached, gradient, export."""
  reference = random_model(name)
  rng = np.random.default_rng(0)
  most = 32 if 'short longrope' in name else max(LENGTHS)
  rows = [rng.integers(3, 61, min(n, most)) for n in LENGTHS]
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, 'theirs')
    reference.save_pretrained(path)
    tokenizer().save(str(path / 'tokenizer.json'))
    context = {'context': 40} if 'long longrope' in name else {}
    model = models.load(path, **context)
    models.save(model, Path(folder, 'ours'))
    again = models.load(Path(folder, 'ours'), **context)
    exported = load_reference(Path(folder, 'ours'))
  for k, x in trees.flatten(model.variables).items():
    np.testing.assert_array_equal(x, trees.flatten(again.variables)[k])
  want = [outputs(reference, row) for row in rows]
  logits, blocks = ours(model, rows)
  return (
    worst(logits, [x for x, _ in want]),
    worst(blocks, [x for _, x in want]),
    worst(decoded(model, rows), [x for x, _ in want]),
    gradients(model, reference, rows[0]),
    worst([outputs(exported, row)[0] for row in rows], [x for x, _ in want]),
  )


def random_model(name):
  """A model of transformers with random weights, large enough to matter."""
  model = golden.tiny_model(name)
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.mul_(0.5).add_(0.1 * torch.randn_like(parameter))
  return model


def load_reference(path):
  return transformers.AutoModelForCausalLM.from_pretrained(
    path,
    attn_implementation='eager',
    experts_implementation='eager',
    dtype=torch.float32,
  ).eval()


def tokenizer():
  """61 tokens, for the sake of the loader."""
  letters = {chr(0x4E00 + i): i for i in range(61)}
  return tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))


def outputs(reference, row):
  """Logits [T V] and block outputs [L T D] of transformers, unpadded."""
  blocks = []
  hooks = [
    layer.register_forward_hook(
      lambda module, args, out: blocks.append(
        out[0] if isinstance(out, tuple) else out
      )
    )
    for layer in reference.model.layers
  ]
  with torch.inference_mode():
    logits = reference(torch.tensor(row)[None]).logits[0]
  for hook in hooks:
    hook.remove()
  blocks = torch.stack([b.reshape(len(row), -1) for b in blocks])
  return logits.numpy(), blocks.numpy()


def padded(rows):
  """The rows in one batch: padded on the right, the second on the left."""
  size = max(map(len, rows))
  tokens = np.zeros((len(rows), size), np.int32)
  positions = np.full((len(rows), size), -1, np.int32)
  for i, row in enumerate(rows):
    start = size - len(row) if i == 1 else 0
    tokens[i, start : start + len(row)] = row
    positions[i, start : start + len(row)] = np.arange(len(row))
  return jnp.asarray(tokens), jnp.asarray(positions)


def unpadded(values, positions):
  """Rows of `values` [B T ...] at real positions."""
  return [
    np.asarray(v)[p >= 0]
    for v, p in zip(values, np.asarray(positions), strict=True)
  ]


def ours(model, rows):
  tokens, positions = padded(rows)
  apply = jax.jit(taps.keep(model.apply, lambda tap, x: x))
  (hidden, _), blocks = apply(model.variables, tokens, positions)
  logits = model.unembed(model.variables, hidden)
  blocks = np.moveaxis(np.asarray(blocks), 0, 2)  # [B T L D]
  kept = [np.moveaxis(b, 1, 0) for b in unpadded(blocks, positions)]
  return unpadded(logits, positions), kept


def decoded(model, rows):
  """Logits of a prefill of ten slots, then one slot at a time."""
  tokens, positions = padded(rows)
  variables = trees.unstack_layers(model.variables)
  cache = caches.empty(model.config, len(rows), tokens.shape[1])
  step, parts, start = jax.jit(model.apply), [], 0
  for size in (10, *(1,) * (tokens.shape[1] - 10)):
    here = slice(start, start + size)
    hidden, cache = step(variables, tokens[:, here], positions[:, here], cache)
    parts.append(model.unembed(variables, hidden))
    start += size
  return unpadded(np.concatenate(parts, axis=1), positions)


def gradients(model, reference, row):
  """The largest relative error of a tensor's gradient."""
  logits = reference(torch.tensor(row)[None]).logits[0]
  scores = logits[:-1].log_softmax(-1)
  (-scores[torch.arange(len(row) - 1), torch.tensor(row[1:])].mean()).backward()
  want = golden.saved(reference, lambda x: x.grad)
  tokens = jnp.asarray(row, jnp.int32)

  def loss(variables):
    where = jnp.arange(len(row))[None]
    hidden, _ = model.apply(variables, tokens[None], where)
    scores = jax.nn.log_softmax(model.unembed(variables, hidden)[0, :-1])
    return -jnp.mean(jnp.take_along_axis(scores, tokens[1:, None], 1))

  grads = jax.jit(jax.grad(loss))(model.variables)['params']
  table = names.table(model.config, names.HUGGING_FACE)
  errors = []
  for tensor in names.tensors(grads, model.config, table):
    theirs = want[tensor.name].numpy()
    size = np.linalg.norm(theirs)
    errors.append(np.linalg.norm(tensor.fetch() - theirs) / max(size, 1e-6))
  return max(errors)


def worst(got, want):
  return max(np.abs(g - w).max() for g, w in zip(got, want, strict=True))


def real(path, count):
  """Greedy tokens of a real checkpoint, one prompt a line."""
  model = models.load(path)
  folder, options = path, {}
  if path.is_file():
    folder, options = path.parent, {'gguf_file': path.name}
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager', **options
  ).eval()
  lines = [
    '| prompt | same tokens | largest logit difference | of logits up to |',
    '|---|---|---|---|',
  ]
  for prompt in PROMPTS:
    ids = model.tokenizer.encode(prompt, add_special_tokens=False).ids
    with torch.inference_mode():
      out = reference.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones((1, len(ids))),  # token 0 may be a word
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
      )[0].tolist()
      want = reference(torch.tensor([out])).logits[0].numpy()
    tokens = jnp.asarray([out], jnp.int32)
    where = jnp.arange(len(out))[None]
    hidden, _ = jax.jit(model.apply)(model.variables, tokens, where)
    got = np.asarray(model.unembed(model.variables, hidden)[0])
    new = np.array(out[len(ids) :])
    same = got[len(ids) - 1 : -1].argmax(1) == new
    cells = [f'{prompt!r}', f'{same.sum()} of {len(same)}']
    cells += [f'{np.abs(got - want).max():.1e}', f'{np.abs(want).max():.0f}']
    lines.append(f'| {" | ".join(cells)} |{ties(want, got, new, len(ids))}')
  return '\n'.join(lines)


def ties(want, got, new, start) -> str:
  """How near a tie transformers is wherever we choose another token."""
  said = ''
  for i, token in enumerate(new):
    row, best = want[start + i - 1], got[start + i - 1].argmax()
    if best != token:
      said += (
        f' at {i} ours is {best}, theirs with a cache {token}, without one '
        f'{row.argmax()}: {row[best]:.5f} and {row[token]:.5f}'
      )
  return said


if __name__ == '__main__':
  main()
