"""A step of GRPO, generation included: ours, and TRL's GRPOTrainer.

  python launch/bench/grpo.py --trl=PYTHON  # one with trl, torch, transformers

The same weights (float32), prompts, group and number of tokens; stop tokens are
ignored, so every reply is full; temperature 1, no reference model, AdamW on
all parameters. Each is a process of its own, one after the other, in rounds:
beside another, though it waits, both are slower.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--trl', default=sys.executable)
  parser.add_argument('--model', default='smollm2-135m')
  parser.add_argument('--prompts', type=int, default=4)
  parser.add_argument('--group', type=int, default=4)
  parser.add_argument('--tokens', type=int, default=32)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--remat', default='none')
  parser.add_argument('--share', type=int, default=1)
  parser.add_argument('--worker', default='')
  parser.add_argument('--folder', default='')
  args = parser.parse_args()
  if args.worker:
    {'ours': ours, 'trl': trl}[args.worker](args)
  else:
    race(args)


def race(args):
  from persona_jax import data, models

  times = {'ours': [], 'trl': []}
  with tempfile.TemporaryDirectory() as folder:
    folder = os.path.join(folder, 'model')
    models.save(models.load(args.model), folder)
    scripts = data.scripts('train', args.prompts)
    prompts = [script.persona.prompt for script in scripts]
    with open(os.path.join(folder, 'prompts.json'), 'w') as file:
      json.dump(prompts, file)
    for _ in range(args.rounds):
      for name, python in {'ours': sys.executable, 'trl': args.trl}.items():
        times[name] += alone(name, python, folder, args.repeats)
  print('| | median s | min | max |')
  print('|---|---|---|---|')
  for name, x in times.items():
    median = statistics.median(x)
    print(f'| {name} | {median:.2f} | {min(x):.2f} | {max(x):.2f} |')
  ours, theirs = map(statistics.median, times.values())
  print(f'ours is {theirs / ours:.2f} x as fast')


def alone(name, python, folder, repeats):
  """Seconds of `repeats` steps of a process with nothing beside it."""
  command = [python, __file__, *sys.argv[1:]]
  worker = subprocess.Popen(
    [*command, '--worker', name, '--folder', folder],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  found = []
  for _ in range(repeats + 1):
    worker.stdin.write('\n')
    worker.stdin.flush()
    while not (line := worker.stdout.readline()).startswith('step '):
      if not line:
        raise SystemExit(f'{name} has ended: {worker.wait()}')
    found.append(float(line.split()[1]))
  worker.kill()
  worker.wait()
  return found[1:]  # the first compiles


def asked():
  """Waits for the parent; yields, then tells the seconds it took."""
  while sys.stdin.readline():
    begun = time.perf_counter()
    yield
    print('step', time.perf_counter() - begun, flush=True)


def ours(args):
  import functools

  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from persona_jax import learn, models, rollout, trees
  from persona_jax.learn import losses, prefix
  from persona_jax.learn.advantages import Earned
  from persona_jax.models import cache, decoder

  model = models.load(args.folder)
  tokens = [
    model.tokenizer.encode(x).ids
    for x in json.load(open(os.path.join(args.folder, 'prompts.json')))
  ]
  rows, size = args.prompts * args.group, max(map(len, tokens))
  prompt = np.zeros((rows, size), np.int32)
  length = np.repeat([len(x) for x in tokens], args.group).astype(np.int32)
  for i, text in enumerate(tokens):
    prompt[i * args.group : (i + 1) * args.group, : len(text)] = text
  row = learn.ALGORITHMS['grpo']
  loss = functools.partial(row.loss, kl=0.0)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0)
  )
  memory = functools.partial(cache.empty, model.config)
  apply, _ = decoder.functions(model.config, remat=args.remat, attend='xla')
  if args.share:
    stacked = functools.partial(
      cache.empty_stacked, model.config, blocked=False
    )
    apply = prefix.shared(apply, stacked, group=args.group, room=size)
  unstack = jax.jit(trees.unstack_layers)
  say = jax.jit(rollout.reply, static_argnames=rollout.STATIC)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, said, logprobs, prompt, length):
    slot = jnp.arange(size + args.tokens)[None]
    ends = length[:, None]
    own = jnp.clip(slot - ends, 0, args.tokens - 1)
    text = jnp.take_along_axis(said, own, axis=1)
    padded = jnp.pad(prompt, ((0, 0), (0, args.tokens)))
    text = jnp.where(slot < ends, padded, text)
    mask = jnp.ones(said.shape, bool)
    earned = Earned(
      rewards=jnp.mean(said % 7, axis=1, keepdims=True).astype(jnp.float32),
      mask=mask[:, None],
      group=args.group,
    )
    batch = learn.Batch(
      tokens=text,
      positions=jnp.where(slot < ends + args.tokens, slot, -1),
      before=ends - 1 + jnp.arange(args.tokens)[None],
      actions=said,
      mask=mask,
      advantages=row.advantage(earned).policy[:, 0],
      old_logprobs=logprobs,
      reference_logprobs=jnp.zeros_like(logprobs),
    )
    return learn.train_step(
      state,
      batch,
      losses.per_sequence(batch),
      loss_fn=learn.policy_loss(apply, model.unembed, loss, {}, held=1 << 25),
      optimizer=optimizer,
    )

  params = jax.tree.map(jnp.copy, model.variables['params'])
  state = jax.jit(lambda x: learn.init_state(x, optimizer))(params)
  for i, _ in enumerate(asked()):
    speaker = rollout.Speaker(
      variables=unstack({'params': state.params}),
      sampling=rollout.Sampling.of(rows, ()),
      apply=model.apply,
      unembed=model.unembed,
      memory=memory,
      who=(0,),
    )
    said = say(
      jax.random.key(i),
      speaker,
      prompt,
      length,
      jnp.arange(rows),
      jnp.ones(rows, bool),
      tokens=args.tokens,
      chunk=32,  # who follows in a group has one token to read
    )
    del speaker
    state, metrics = step(state, said.tokens, said.logprobs, prompt, length)
    jax.block_until_ready(state)
    print('loss', float(metrics['loss']), file=sys.stderr)


def trl(args):
  import datasets
  import transformers
  from trl import GRPOConfig, GRPOTrainer

  prompts = json.load(open(os.path.join(args.folder, 'prompts.json')))
  told = asked()
  next(told)

  class Told(transformers.TrainerCallback):
    def on_step_end(self, *_, **__):
      next(told)

  config = GRPOConfig(
    output_dir=args.folder,
    per_device_train_batch_size=args.prompts * args.group,
    num_generations=args.group,
    max_completion_length=args.tokens,
    generation_kwargs={'min_new_tokens': args.tokens},
    max_steps=args.repeats + 1,
    learning_rate=1e-6,
    beta=0.0,
    bf16=False,
    use_cpu=True,
    report_to='none',
    save_strategy='no',
    disable_tqdm=True,
    logging_strategy='no',
  )

  def reward(completion_ids, **_):
    return [sum(x % 7 for x in ids) / len(ids) for ids in completion_ids]

  trainer = GRPOTrainer(
    model=transformers.AutoModelForCausalLM.from_pretrained(
      args.folder, dtype='float32'
    ),
    reward_funcs=reward,
    args=config,
    train_dataset=datasets.Dataset.from_list([{'prompt': x} for x in prompts]),
    processing_class=transformers.AutoTokenizer.from_pretrained(args.folder),
    callbacks=[Told()],
  )
  trainer.train()


if __name__ == '__main__':
  main()
