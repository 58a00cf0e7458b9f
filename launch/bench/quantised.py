"""What narrow weights and narrow caches cost in quality, and what they save.

  python launch/bench/quantised.py --json=quantised.json

The float32 model speaks dialogues of real personas, as both speakers. Every
variant then reads each speaker's view into its cache, chunk by chunk as a
rollout does, and is compared with float32 at the tokens that were spoken: KL of
the next token in nats, whether both would choose the same token, and how far
apart the log-probabilities of the spoken token are. Means over tokens with 95 %
bootstrap intervals over dialogues. Times are of decoding a step with a row a
lane, unembedding and choice included, and of reading a chunk in four of the
lanes, variants in turn: medians, and medians of the ratios to float32.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax import data, models, rollout, trees
from persona_jax.analysis.statistics import bootstrap
from persona_jax.dialogue import PARTNER, POLICY, view
from persona_jax.models import cache, decoder, quantised
from persona_jax.text.chat import Chat

WIDTH, CHUNK = 4, 43  # rows and tokens of a read
TOKENS = 64  # compared at a time
STEPS = 16  # of decoding in a timed program
FLOAT8 = jnp.float8_e4m3fn


class Variant(NamedTuple):
  """A model as somebody might decode with it."""

  variables: Any
  apply: Any
  unembed: Any
  kept: Any  # dtype of the cache
  dtype: Any = jnp.float32  # of the computation

  def memory(self, config, args):
    return cache.empty(config, args.batch, args.slots, dtype=self.kept)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', default='smollm2-135m')
  parser.add_argument('--dialogues', type=int, default=16)
  parser.add_argument('--lines', type=int, default=8)
  parser.add_argument('--tokens', type=int, default=32)
  parser.add_argument('--temperature', type=float, default=1.0)
  parser.add_argument('--batch', type=int, default=16, help='lanes')
  parser.add_argument('--slots', type=int, default=448)
  parser.add_argument('--repeats', type=int, default=5, help='0: no times')
  parser.add_argument('--variants', nargs='+', help='some of them')
  parser.add_argument('--json', default='', help='a file to write')
  args = parser.parse_args()
  model = models.load(args.model)
  every = variants(model)
  chosen = {k: every[k] for k in ('float32', *(args.variants or every))}
  seen = spoken(model, every['float32'], args)
  rows = {
    name: sizes(model.config, variant, args) for name, variant in chosen.items()
  }
  readers = {name: reader(variant.apply) for name, variant in chosen.items()}
  base = None
  for name, variant in chosen.items():
    hidden = read(model.config, variant, readers[name], seen, args)
    if base is None:
      base = hidden
    far = apart(chosen['float32'], variant, base, hidden, seen)
    rows[name] |= {k: over_dialogues(x, seen) for k, x in far.items()}
    print(name, f'KL {rows[name]["kl"]["mean"]:.2e}', file=sys.stderr)
  if args.repeats:
    race(model.config, chosen, readers, rows, args)
  show(rows, seen)
  if args.json:
    with open(args.json, 'w') as file:
      json.dump({'arguments': vars(args), **machine(), 'rows': rows}, file)


def variants(model) -> dict[str, Variant]:
  """All of them, with unstacked variables; what they can share they share."""
  wide = jax.jit(trees.unstack_layers)(model.variables)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
  int8, float8 = (quantised.quantise(wide, x) for x in (jnp.int8, FLOAT8))
  plain = (model.apply, model.unembed)
  narrow, rounded = (
    (
      quantised.quantised(model.apply, activations=x),
      quantised.unembed(model.config, activations=x),
    )
    for x in (False, True)
  )
  bfloat16 = decoder.functions(model.config, dtype=jnp.bfloat16)
  return {
    'float32': Variant(wide, *plain, jnp.float32),
    'bf16 weights': Variant(half, *plain, jnp.float32),
    'int8 weights': Variant(int8, *narrow, jnp.float32),
    'int8 weights, activations': Variant(int8, *rounded, jnp.float32),
    'fp8 weights': Variant(float8, *narrow, jnp.float32),
    'bf16 KV': Variant(wide, *plain, jnp.bfloat16),
    'fp8 KV': Variant(wide, *plain, FLOAT8),
    'int8 weights, activations, fp8 KV': Variant(int8, *rounded, FLOAT8),
    'bf16 throughout': Variant(half, *bfloat16, jnp.bfloat16, jnp.bfloat16),
  }


class Seen(NamedTuple):
  """R views of dialogues, and the M tokens spoken in them."""

  tokens: Any  # [R S]
  positions: Any  # [R S]
  row: Any  # [M] view
  slot: Any  # [M] where the token is predicted
  token: Any  # [M]
  dialogue: Any  # [M]


def spoken(model, variant, args) -> Seen:
  """Dialogues of the float32 model with itself, as each seat reads them."""
  chat = Chat(model.tokenizer, model.template, model.special)
  frame = data.frame(chat)
  scenario = data.scenario(
    chat,
    data.scripts('train', args.dialogues),
    prompt_tokens=112,
    line_tokens=args.tokens,
  )
  speaker = rollout.Speaker(
    variables=variant.variables,
    sampling=rollout.Sampling.of(
      args.dialogues, model.stop_ids, temperature=args.temperature
    ),
    apply=variant.apply,
    unembed=variant.unembed,
    memory=functools.partial(cache.empty, model.config),
    who=(PARTNER, POLICY),
  )
  said = jax.jit(rollout.converse, static_argnames=rollout.STATIC)(
    jax.random.key(0),
    (speaker,),
    (frame, frame),
    scenario,
    lines=args.lines,
    tokens=args.tokens,
    lanes=min(args.batch, args.dialogues),
  )
  for line in data.texts(chat, said)[0]:
    print(f'  {line!r}', file=sys.stderr)
  look = jax.jit(view, static_argnums=1)
  tokens, positions, found = [], [], []
  for who in (PARTNER, POLICY):
    seen = look(said, who, frame)
    lines = (np.asarray(said.who) == who) & (np.arange(args.lines) > 0)
    dialogue, line, token = np.nonzero(np.asarray(said.mask) & lines[:, None])
    at = (dialogue, line, token)
    row = who * args.dialogues + dialogue
    found.append(
      (row, np.asarray(seen.before)[at], np.asarray(said.tokens)[at], dialogue)
    )
    tokens.append(np.asarray(seen.tokens))
    positions.append(np.asarray(seen.positions))
  tokens, positions = np.concatenate(tokens), np.concatenate(positions)
  if positions.max() >= args.slots:
    raise SystemExit(f'a view takes {positions.max() + 1} slots; raise --slots')
  return Seen(tokens, positions, *map(np.concatenate, zip(*found, strict=True)))


def sizes(config, variant, args) -> dict[str, float]:
  count = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  memory = jax.eval_shape(lambda: variant.memory(config, args))
  places = args.batch * memory.size
  return {
    'weights': count(variant.variables),
    'kv': sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memory))
    / places,
  }


def reader(apply):
  """`(variables, memory, tokens, positions)`, in the first lanes of memory."""

  def read(variables, memory, tokens, positions):
    rows = jnp.arange(WIDTH)[None]
    hidden, memory = apply(
      variables, tokens, positions, memory.replace(rows=rows)
    )
    return hidden, memory.replace(rows=None)

  return jax.jit(read, donate_argnums=1)


def read(config, variant, reader, seen, args):
  """Hidden states of all views, `[R S D]`."""
  rows, size = seen.tokens.shape
  out = np.zeros((rows, size, config.features), variant.dtype)
  more = ((0, -rows % WIDTH), (0, -size % CHUNK))
  tokens = np.pad(seen.tokens, more)
  positions = np.pad(seen.positions, more, constant_values=-1)
  memory = variant.memory(config, args)
  for row in range(0, rows, WIDTH):
    for slot in range(0, size, CHUNK):
      here = (slice(row, row + WIDTH), slice(slot, slot + CHUNK))
      if (positions[here] < 0).all():
        continue
      hidden, memory = reader(
        variant.variables, memory, tokens[here], positions[here]
      )
      part = out[here]
      part[:] = np.asarray(hidden)[: len(part), : part.shape[1]]
  return out


def apart(base, variant, base_hidden, hidden, seen):
  """KL, agreement and difference of log-probabilities of each token, `[M]`."""

  @jax.jit
  def compare(base_variables, variables, base_hidden, hidden, tokens):
    before = jax.nn.log_softmax(base.unembed(base_variables, base_hidden))
    after = jax.nn.log_softmax(variant.unembed(variables, hidden))
    moved = jnp.take_along_axis(after - before, tokens[:, None], 1)[:, 0]
    share = jnp.exp(before)
    return {
      'kl': jnp.sum(share * (before - after), -1),
      'agree': (jnp.argmax(before, -1) == jnp.argmax(after, -1)) * 1.0,
      'moved': jnp.abs(moved),
      'entropy': -jnp.sum(share * before, -1),
    }

  found, at = [], (seen.row, seen.slot)
  pad = lambda x: np.pad(x, [(0, -len(x) % TOKENS)] + [(0, 0)] * (x.ndim - 1))
  parts = [pad(x) for x in (base_hidden[at], hidden[at], seen.token)]
  for start in range(0, len(parts[0]), TOKENS):
    here = (x[start : start + TOKENS] for x in parts)
    found.append(compare(base.variables, variant.variables, *here))
  join = lambda *x: np.concatenate(x)[: len(seen.token)].astype(np.float64)
  return jax.tree.map(join, *found)


def over_dialogues(values, seen):
  """The mean over tokens, its interval over dialogues."""
  total = np.bincount(seen.dialogue, values)
  count = np.bincount(seen.dialogue).astype(float)
  mean = lambda total, count: total.sum() / count.sum()
  return bootstrap(mean, total, count)._asdict()


def race(config, chosen, readers, rows, args):
  """Adds times to `rows`; everybody runs once before anybody is timed."""
  runs, times = {}, {}
  for name, variant in chosen.items():
    runs[name] = {
      'step': stepping(config, variant, args),
      'read': reading(config, variant, readers[name], args),
    }
    times[name] = {kind: [] for kind in runs[name]}
  for repeat in range(args.repeats + 1):
    for name, kinds in runs.items():
      for kind, run in kinds.items():
        begun = time.perf_counter()
        run()
        if repeat:
          times[name][kind].append(1e3 * (time.perf_counter() - begun))
    print('round', repeat, file=sys.stderr)
  for name, kinds in times.items():
    for kind, taken in kinds.items():
      per = STEPS if kind == 'step' else 1
      pairs = zip(taken, times['float32'][kind], strict=True)
      rows[name][kind] = {
        'ms': statistics.median(taken) / per,
        'ratio': statistics.median(a / b for a, b in pairs),
      }


def stepping(config, variant, args):
  """A function that decodes STEPS greedy tokens a lane."""

  def run(variables, memory, token):
    def step(i, state):
      token, memory = state
      position = jnp.full((args.batch, 1), args.slots // 2 + i, jnp.int32)
      hidden, memory = variant.apply(variables, token, position, memory)
      token = jnp.argmax(variant.unembed(variables, hidden[:, 0]), -1)
      return token[:, None].astype(jnp.int32), memory

    return jax.lax.fori_loop(0, STEPS, step, (token, memory))

  return _again(
    jax.jit(run, donate_argnums=1),
    variant,
    config,
    args,
    jnp.ones((args.batch, 1), jnp.int32),
  )


def reading(config, variant, reader, args):
  """A function that reads CHUNK tokens in WIDTH lanes."""
  shape = (WIDTH, CHUNK)
  slots = jnp.arange(CHUNK, dtype=jnp.int32)[None] + args.slots // 2
  return _again(
    reader,
    variant,
    config,
    args,
    jnp.ones(shape, jnp.int32),
    jnp.broadcast_to(slots, shape),
  )


def _again(program, variant, config, args, *inputs):
  """A function that runs `program` on a memory of its own."""
  memory = variant.memory(config, args)

  def run():
    nonlocal memory
    out, memory = program(variant.variables, memory, *inputs)
    jax.block_until_ready((out, memory))

  return run


def machine():
  return {'device': jax.devices()[0].device_kind, 'jax': jax.__version__}


def show(rows, seen):
  """The table, in Markdown."""
  first = next(iter(rows.values()))
  print(
    f'{len(seen.token)} tokens of {first["kl"]["n"]} dialogues; entropy '
    f'{first["entropy"]["mean"]:.2f} nats a token'
  )
  timed = 'step' in first
  heads = ['variant', 'weights MB', 'KV KB a token', 'KL, nats']
  heads += ['same choice, %', 'log-prob moves by']
  heads += ['step ms', 'x float32', 'read ms', 'x float32'] * timed
  print('| ' + ' | '.join(heads) + ' |')
  print('|---' * len(heads) + '|')
  for name, row in rows.items():
    cells = [name, f'{row["weights"] / 1e6:.0f}', f'{row["kv"] / 1e3:.1f}']
    cells.append(_interval(row['kl'], '.5f'))
    cells.append(
      _interval({k: 100 * x for k, x in row['agree'].items()}, '.2f')
    )
    cells.append(_interval(row['moved'], '.4f'))
    for kind in ('step', 'read') * timed:
      cells.append(f'{row[kind]["ms"]:.1f}')
      cells.append(f'{row[kind]["ratio"]:.2f}')
    print('| ' + ' | '.join(cells) + ' |')


def _interval(x, form):
  return f'{x["mean"]:{form}} [{x["low"]:{form}}, {x["high"]:{form}}]'


if __name__ == '__main__':
  main()
