"""Conversations on this machine: ours, and what a user would pick instead.

  python launch/bench/rollout.py  # extra: parity

One table: the same weights (float32), prompts and greedy tokens, stop tokens
ignored, every line full. Each contender is a process of its own; the parent
asks them in turn, so that noise meets all alike. `generate` reads the whole
dialogue again for each line; `cached` is a loop over transformers that keeps a
cache for each speaker. `--tunix=PYTHON,WORKER` adds a single line by the
vanilla sampler of google-tunix, in an environment of its own.
"""

import argparse
import ctypes
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

NEVER = ()  # stop ids


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--worker', default='')
  parser.add_argument('--model', default='smollm2-135m')
  parser.add_argument('--folder', default='')
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--lines', type=int, default=8)
  parser.add_argument('--tokens', type=int, default=32)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--contenders', default='ours,two,generate,cached')
  parser.add_argument('--tunix', default='')
  args = parser.parse_args()
  if args.worker:
    serve(args)
  else:
    race(args)


def race(args):
  """Asks every contender `repeats` times, in turn, and prints the table."""
  from persona_jax import models

  with tempfile.TemporaryDirectory() as folder:
    # Compiled programs are kept, as the programs of the project keep theirs.
    os.environ['JAX_COMPILATION_CACHE_DIR'] = os.path.join(folder, 'xla')
    folder = os.path.join(folder, 'model')
    models.save(models.load(args.model), folder)
    names = args.contenders.split(',')
    if args.tunix:
      names += ['line', 'tunix']
    workers = {name: _start(args, name, folder) for name in names}
    first = {name: _ask(worker, args) for name, worker in workers.items()}
    times = {name: [] for name in names}
    for _ in range(args.repeats):
      for name, worker in workers.items():
        times[name].append(_ask(worker, args)['seconds'])
        print(name, round(times[name][-1], 2), file=sys.stderr, flush=True)
    for worker in workers.values():
      worker.stdin.close()
    again = _ask(_start(args, names[0], folder), args)
  print(
    f'{"contender":10s} {"median s":>9s} {"tokens/s":>9s} {"min":>7s}'
    f' {"max":>7s} {"first":>7s} {"peak MiB":>9s} {"same":>6s}'
  )
  for name in names:
    seconds = times[name]
    median = statistics.median(seconds)
    print(
      f'{name:10s} {median:9.2f} {first[name]["count"] / median:9.1f} '
      f'{min(seconds):7.2f} {max(seconds):7.2f} '
      f'{first[name]["seconds"]:7.2f} {first[name]["peak"]:9.0f} '
      f'{_same(first, name):>6s}'
    )
  print(
    f'{names[0]}, compiled by an earlier run: first {again["seconds"]:.2f} s, '
    f'peak {again["peak"]:.0f} MiB'
  )
  for left, right in (
    ('ours', 'generate'),
    ('ours', 'cached'),
    ('line', 'tunix'),
  ):
    if left in times and right in times:
      ratios = [b / a for a, b in zip(times[left], times[right], strict=True)]
      print(f'{left} is {statistics.median(ratios):.2f} x {right}')


def _same(first, name):
  """The share of tokens that are those of `ours`."""
  if 'tokens' not in first[name] or 'tokens' not in first.get('ours', {}):
    return '-'
  left, right = first['ours']['tokens'], first[name]['tokens']
  return f'{np.mean(np.array(left) == np.array(right)):.3f}'


def _start(args, name, folder):
  command = [sys.executable, __file__, f'--worker={name}']
  for field in ('model', 'batch', 'lines', 'tokens'):
    command.append(f'--{field}={getattr(args, field)}')
  command.append(f'--folder={folder}')
  if name == 'tunix':
    command = [*args.tunix.split(','), folder]
  worker = subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  )
  while True:
    line = worker.stdout.readline()
    if not line:
      raise SystemExit(f'{name} did not start.')
    if line.startswith('{') and 'ready' in json.loads(line):
      return worker


def _ask(worker, args):
  request = {'batch': args.batch, 'prompt': 96, 'new': 64}
  worker.stdin.write(json.dumps(request) + '\n')
  worker.stdin.flush()
  while not (line := worker.stdout.readline()).startswith('{'):
    if not line:
      raise SystemExit('a contender died.')
  answer = json.loads(line)
  answer.setdefault('count', args.batch * request['new'])
  answer.setdefault('peak', float('nan'))
  return answer


def serve(args):
  """Runs one contender for each line of standard input."""
  run = CONTENDERS[args.worker](args)
  print(json.dumps({'ready': True}), flush=True)
  for line in sys.stdin:
    start = time.perf_counter()
    tokens = run(json.loads(line))
    seconds = time.perf_counter() - start
    answer = {
      'seconds': seconds,
      'count': int(np.size(tokens)),
      'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if args.worker not in ('line', 'tunix'):
      answer['tokens'] = np.asarray(tokens).tolist()
    print(json.dumps(answer), flush=True)


def material(args):
  """The model, its frame, and the beginnings of `batch` dialogues."""
  from persona_jax import data, models
  from persona_jax.text.chat import Chat

  model = models.load(args.model)
  chat = Chat(model.tokenizer, model.template, model.special)
  scripts = data.scripts('train', args.batch)
  scenario = data.scenario(
    chat, scripts, prompt_tokens=112, line_tokens=args.tokens
  )
  return model, data.frame(chat), scenario


def ours(args, together=True):
  """`rollout.converse`; both speakers in one pass, or each in its own."""
  import jax

  from persona_jax import rollout, trees
  from persona_jax.models import cache

  model, frame, scenario = material(args)
  speaker = rollout.Speaker(
    variables=jax.jit(trees.unstack_layers)(model.variables),
    sampling=rollout.Sampling.of(args.batch, NEVER, temperature=0.0),
    apply=model.apply,
    unembed=model.unembed,
    memory=functools.partial(cache.empty, model.config),
    who=(0, 1) if together else (),
  )
  del model
  speakers = (speaker,) if together else (speaker, speaker)
  given = jax.random.key(0), speakers, (frame, frame), scenario

  @functools.cache
  def converse():
    plan = {'lines': args.lines, 'tokens': args.tokens}
    program = jax.jit(functools.partial(rollout.converse, **plan))
    program = program.lower(*given).compile()
    # What XLA's compiler has freed, glibc would keep: 300 MiB.
    getattr(ctypes.CDLL(None), 'malloc_trim', abs)(0)
    return program

  def run(request):
    del request
    return np.asarray(converse()(*given).tokens[:, 1:])

  return run


def line(args):
  """`rollout.reply`: one line, as the vanilla sampler of google-tunix."""
  import jax
  import jax.numpy as jnp

  from persona_jax import models, rollout, trees
  from persona_jax.models import cache

  model = models.load(args.model)
  variables = jax.jit(trees.unstack_layers)(model.variables)
  reply = jax.jit(rollout.reply, static_argnames='tokens')

  def run(request):
    batch, size = request['batch'], request['prompt']
    speaker = rollout.Speaker(
      variables=variables,
      sampling=rollout.Sampling.of(batch, NEVER, temperature=0.0),
      apply=model.apply,
      unembed=model.unembed,
      memory=memory,
    )
    said = reply(
      jax.random.key(0),
      speaker,
      jax.random.randint(jax.random.key(1), (batch, size), 100, 40000),
      jnp.full(batch, size, jnp.int32),
      jnp.arange(batch),
      jnp.ones(batch, bool),
      tokens=request['new'],
    )
    return np.asarray(said.tokens)

  memory = functools.partial(cache.empty, model.config)
  return run


def transformers_model(args):
  import torch
  import transformers

  torch.set_num_threads(os.cpu_count())
  model = transformers.AutoModelForCausalLM.from_pretrained(
    args.folder, dtype=torch.float32
  )
  model.generation_config.eos_token_id = None
  model.generation_config.pad_token_id = 0
  return model.eval()


def texts(args):
  """What transformers is given: token lists, and the frames between."""
  _, frame, scenario = material(args)
  prompts, length = np.asarray(scenario.prompts), scenario.prompt_length
  prompts = [
    [prompts[b, k, : length[b, k]].tolist() for k in range(2)]
    for b in range(args.batch)
  ]
  opening = [
    np.asarray(scenario.opening)[b, : scenario.opening_length[b]].tolist()
    for b in range(args.batch)
  ]
  to_own = np.asarray(frame.heard_to_own).tolist()
  to_heard = np.asarray(frame.own_to_heard).tolist()
  return prompts, opening, to_own, to_heard


def left_padded(rows):
  import torch

  width = max(map(len, rows))
  ids = torch.zeros((len(rows), width), dtype=torch.long)
  mask = torch.zeros((len(rows), width), dtype=torch.long)
  for i, row in enumerate(rows):
    ids[i, width - len(row) :] = torch.tensor(row)
    mask[i, width - len(row) :] = 1
  return ids, mask


def read(prompt, lines, who, to_own, to_heard):
  """All that `who` has read when it is to say the next line."""
  text = list(prompt)
  for n, said in enumerate(lines):
    text += to_own if n % 2 == who else to_heard if n else []
    text += said
  return text + to_own


def generate(args):
  """`model.generate`, which reads each speaker's whole view for each line."""
  model = transformers_model(args)
  prompts, opening, *between = texts(args)

  def run(request):
    del request
    said = [[first] for first in opening]
    for n in range(1, args.lines):
      ids, mask = left_padded(
        [
          read(prompt[n % 2], lines, n % 2, *between)
          for prompt, lines in zip(prompts, said, strict=True)
        ]
      )
      out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=args.tokens,
        min_new_tokens=args.tokens,
      )
      for lines, new in zip(said, out[:, ids.shape[1] :].tolist(), strict=True):
        lines.append(new)
    return np.array([lines[1:] for lines in said])

  return run


def cached(args):
  """A loop over transformers' model, with a cache for each speaker."""
  import torch
  import transformers

  model = transformers_model(args)
  prompts, opening, *between = texts(args)

  def forward(state, ids, mask):
    state['mask'] = torch.cat([state['mask'], mask], dim=1)
    positions = state['mask'].cumsum(1)[:, -ids.shape[1] :] - 1
    out = model(
      input_ids=ids,
      attention_mask=state['mask'],
      position_ids=positions.clamp(min=0),
      past_key_values=state['cache'],
      logits_to_keep=1,
    )
    return out.logits[:, -1].argmax(-1)

  @torch.inference_mode()
  def run(request):
    del request
    empty = torch.zeros((args.batch, 0), dtype=torch.long)
    one = torch.ones((args.batch, 1), dtype=torch.long)
    states = [
      {'cache': transformers.DynamicCache(), 'mask': empty} for _ in range(2)
    ]
    done = [[0] * args.batch, [0] * args.batch]
    said = [[first] for first in opening]
    for n in range(1, args.lines):
      who, fresh = n % 2, []
      for i, (prompt, lines) in enumerate(zip(prompts, said, strict=True)):
        text = read(prompt[who], lines, who, *between)
        fresh.append(text[done[who][i] :])
        done[who][i] = len(text) + args.tokens - 1  # the last is not read
      ids, mask = left_padded(fresh)
      token = forward(states[who], ids, mask)
      new = [token]
      for _ in range(args.tokens - 1):
        token = forward(states[who], token[:, None], one)
        new.append(token)
      for lines, row in zip(said, torch.stack(new, 1).tolist(), strict=True):
        lines.append(row)
    return np.array([lines[1:] for lines in said])

  return run


CONTENDERS = {
  'ours': ours,
  'two': functools.partial(ours, together=False),
  'line': line,
  'generate': generate,
  'cached': cached,
}

if __name__ == '__main__':
  main()
