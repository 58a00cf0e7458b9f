"""What a rollout costs: by its lines, by their lengths, with edits on.

  python launch/bench/rollout_cost.py --lines 2 4 8 16 32 --plot=cost.png
  python launch/bench/rollout_cost.py --spread
  python launch/bench/rollout_cost.py --edits

`--lines`: full lines, and the fit of seconds = a + b N + c N^2. `--spread`:
lines of one sentence at temperature 1, dialogues through fewer lanes; beside
the utilisation stands what steps in which all lines begin together would reach
on the same lengths. `--edits`: a line with and without caps on all layers and a
projection kept of every token, in turn.
"""

import argparse
import dataclasses
import functools
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax import data, models, rollout, taps, trees
from persona_jax.activations import edits
from persona_jax.models import cache
from persona_jax.text.chat import Chat


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', default='smollm2-135m')
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--tokens', type=int, default=26)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--lines', type=int, nargs='+', default=[])
  parser.add_argument('--plot', default='')
  parser.add_argument('--spread', action='store_true')
  parser.add_argument('--dialogues', type=int, default=48)
  parser.add_argument('--patience', type=int, nargs='+', default=[1, 4])
  parser.add_argument('--two', action='store_true')  # speakers
  parser.add_argument('--edits', action='store_true')
  args = parser.parse_args()
  bench = Bench(args)
  if args.lines:
    by_lines(bench, args)
  if args.spread:
    by_spread(bench, args)
  if args.edits:
    by_edits(bench, args)


class Bench:
  """The model, ready to speak."""

  def __init__(self, args):
    model = models.load(args.model)
    self.config, self.stop = model.config, model.stop_ids
    self.apply, self.unembed = model.apply, model.unembed
    self.chat = Chat(model.tokenizer, model.template, model.special)
    self.frame = data.frame(self.chat)
    self.variables = jax.jit(trees.unstack_layers)(model.variables)
    self.memory = functools.partial(cache.empty, model.config)

  def speaker(self, rows, stop=(), who=(0, 1), **sampling):
    return rollout.Speaker(
      variables=self.variables,
      sampling=rollout.Sampling.of(rows, stop, **sampling),
      apply=self.apply,
      unembed=self.unembed,
      memory=self.memory,
      who=who,
    )

  def scenario(self, rows, tokens):
    return data.scenario(
      self.chat,
      data.scripts('train', rows),
      prompt_tokens=112,
      line_tokens=tokens,
    )


def by_lines(bench, args):
  """Seconds against the number of lines, and how they grow."""
  print('| lines | compile s | median s | min | max | steps | peak MiB |')
  print('|---|---|---|---|---|---|---|')
  frames = (bench.frame, bench.frame)
  scenario = bench.scenario(args.batch, args.tokens)
  speakers = (bench.speaker(args.batch, temperature=0.0),)
  found = []
  for lines in args.lines:
    run = jax.jit(
      functools.partial(
        rollout.converse_counted, lines=lines, tokens=args.tokens
      )
    )
    begun = time.perf_counter()
    program = run.lower(jax.random.key(0), speakers, frames, scenario).compile()
    compiled = time.perf_counter() - begun
    once = functools.partial(
      program, jax.random.key(0), speakers, frames, scenario
    )
    _, usage = jax.block_until_ready(once())
    times = timed(once, args.repeats)
    found.append((lines, statistics.median(times)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
      f'| {lines} | {compiled:.1f} | {found[-1][1]:.2f} | {min(times):.2f} '
      f'| {max(times):.2f} | {int(usage.steps)} | {peak:.0f} |',
      flush=True,
    )
  if len(found) > 2:
    fit(found, args)


def fit(found, args):
  """seconds = a + b N + c N^2, with the largest relative error."""
  lines, seconds = map(np.array, zip(*found, strict=True))
  weight = 1 / seconds
  terms = np.stack([np.ones(lines.size), lines, lines**2.0], 1)
  for count, name in ((2, 'a + b N'), (3, 'a + b N + c N^2')):
    part = terms[:, :count]
    fitted, *_ = np.linalg.lstsq(
      part * weight[:, None], seconds * weight, rcond=None
    )
    off = np.max(np.abs(part @ fitted / seconds - 1))
    numbers = ', '.join(f'{x:.4g}' for x in fitted)
    print(f'{name}: {numbers}; off by at most {100 * off:.0f} %')
  if args.plot:
    plot(lines, seconds, terms @ fitted, args.plot)


def plot(lines, seconds, fitted, path):
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(5, 3.2), layout='constrained')
  axes.plot(lines, seconds, 'o', color='black', label='measured')
  axes.plot(lines, fitted, '-', color='tab:blue', label='a + bN + cN²')
  axes.set_xlabel('lines of a dialogue')
  axes.set_ylabel('seconds for all dialogues')
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False)
  figure.savefig(path, dpi=150)


def by_spread(bench, args):
  """How well rows are used where lines have natural lengths."""
  rows, lines, tokens = args.dialogues, 8, 48
  scenario = bench.scenario(rows, tokens)
  # This model seldom ends a line by itself; its sentences vary as lines do.
  vocab = bench.chat.tokenizer.get_vocab()
  ends = [
    i for piece, i in vocab.items() if piece.strip('Ġ') in ('.', '!', '?')
  ]
  speaker = bench.speaker(rows, (*bench.stop, *ends))
  run = jax.jit(rollout.converse_counted, static_argnames=rollout.STATIC)
  frames = (bench.frame, bench.frame)
  speakers = (speaker,)
  if args.two:
    speakers = (speaker.replace(who=(0,)), speaker.replace(who=(1,)))
  print('| lanes | patience | utilisation | together | s | sampled/s |')
  print('|---|---|---|---|---|---|')
  for patience in args.patience:
    given = (jax.random.key(0), speakers, frames, scenario)
    plan = {'lanes': args.batch, 'patience': patience}
    once = run.lower(*given, lines=lines, tokens=tokens, **plan).compile()
    times = []
    for _ in range(max(1, args.repeats // 2)):
      begun = time.perf_counter()
      said, usage = jax.block_until_ready(once(*given))
      times.append(time.perf_counter() - begun)
    length = np.asarray(said.length)[:, 1:]
    seconds = statistics.median(times)
    print(
      f'| {args.batch} | {patience} | {float(usage.utilisation):.3f} '
      f'| {together(length, args.batch):.3f} | {seconds:.1f} '
      f'| {int(usage.sampled) / seconds:.1f} |',
      flush=True,
    )
  quartiles = np.percentile(length, [10, 25, 50, 75, 90]).astype(int).tolist()
  print(f'lengths of lines at 10, 25, 50, 75, 90 %: {quartiles}')


def together(length, batch):
  """The utilisation of batches whose lines all wait for the longest."""
  steps = sum(
    batch * length[i : i + batch].max(axis=0).sum()
    for i in range(0, len(length), batch)
  )
  return length.sum() / steps


def by_edits(bench, args):
  """A reply of 64 tokens: plain, capped at every layer, projections kept."""
  layers, features = bench.config.layers, bench.config.features
  axis = jax.random.normal(jax.random.key(1), (layers, features))
  bound = jnp.full(layers, -1.0, jnp.float32)
  caps = edits.caps(axis, bound, jnp.full(layers, 1.0, jnp.float32), first=1)
  apart = lambda x: jax.jit(trees.unstack_layers)({'edits': x})
  edited = taps.edited(bench.apply, edits.stored)

  def project(tap, x):
    return edits.projection(x, tap.get_variable('edits', 'probe')['axis'])

  plain = bench.speaker(args.batch, who=(0,), temperature=0.0)
  variants = {
    'plain': plain,
    'capped': dataclasses.replace(
      plain, apply=edited, variables={**bench.variables, **apart(caps)}
    ),
    'kept': dataclasses.replace(
      plain,
      apply=taps.keep(bench.apply, project),
      variables={**bench.variables, **apart(edits.probes(axis))},
      captures=True,
    ),
  }
  run = jax.jit(rollout.reply, static_argnames=rollout.STATIC)
  prompt = jax.random.randint(jax.random.key(2), (args.batch, 16), 100, 40000)
  rows = args.batch

  def once(speaker):
    return run(
      jax.random.key(0),
      speaker,
      prompt,
      jnp.full(rows, 16, jnp.int32),
      jnp.arange(rows),
      jnp.ones(rows, bool),
      tokens=64,
    )

  times = {name: [] for name in variants}
  for i in range(args.repeats + 1):
    for name, speaker in variants.items():
      [seconds] = timed(functools.partial(once, speaker), 1)
      if i:  # the first compiles
        times[name].append(seconds)
  base = times['plain']
  print('| | median s | over plain, median of pairs |')
  print('|---|---|---|')
  for name, seconds in times.items():
    over = [b / a - 1 for a, b in zip(base, seconds, strict=True)]
    print(
      f'| {name} | {statistics.median(seconds):.2f} '
      f'| {100 * statistics.median(over):+.1f} % |'
    )


def timed(run, repeats):
  times = []
  for _ in range(repeats):
    begun = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - begun)
  return times


if __name__ == '__main__':
  main()
