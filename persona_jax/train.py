"""Multi-turn RL of the persona speaker against a frozen partner."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from persona_jax import data, evaluate, learn, rewards
from persona_jax.checkpoint import Checkpoints
from persona_jax.dialogue import POLICY, Dialogue, view
from persona_jax.lab import Lab
from persona_jax.learn import sharding
from persona_jax.learn.logprobs import token_logprobs
from persona_jax.learn.losses import Batch
from persona_jax.learn.step import TrainState, policy_loss
from persona_jax.models import adapter_file, decoder, lora


class Result(NamedTuple):
  """The trained policy, and the metrics of every step."""

  policy: dict  # {'params': ...} and, if one was trained, {'lora': ...}
  log: list[dict]


class Trained(NamedTuple):
  """What is trained, and how it becomes a policy."""

  start: PyTree  # before the first step
  collection: str  # that it is the leaves of: 'params' or 'lora'
  fixed: PyTree  # what else that collection holds
  policy: Callable  # trained -> {'params': ..., 'lora': ...}


def run(
  lab: Lab,
  config,
  terms: dict[str, tuple[float, rewards.Reward]],
  folder: Path,
  *,
  shuffle: bool = False,
  advance,
) -> Result:
  """Trains on weighted `terms`; continues what `folder` holds.

  Trained are all parameters, or an adapter of `rl.adapter.rank`, which is also
  left in PEFT's layout in `folder` (but where projections are fused: Phi).
  With `shuffle`, rewards are dealt out to other dialogues: a control.

  Raises:
    FloatingPointError: a reward, loss or gradient is not finite.
  """
  rl = config.rl
  mesh = sharding.make_mesh()
  optimizer = optax.chain(
    optax.clip_by_global_norm(rl.max_grad_norm),
    optax.adamw(rl.learning_rate, b2=0.95, weight_decay=0.0),
  )
  trained = _adapter(lab, config) if rl.adapter.rank else _whole(lab)
  state = sharding.init_sharded(
    lambda params: learn.init_state(jax.tree.map(jnp.copy, params), optimizer),
    mesh,
    trained.start,
  )
  saved, log = Checkpoints(folder), []
  if saved.latest is not None:
    state, log = saved.restore(state)
    advance(len(log))
  update = _update(lab, config, trained, optimizer, state, mesh)
  speak = functools.partial(_rollout, lab, config, trained)
  for step in range(len(log), rl.steps):
    began = time.monotonic()
    said = speak(step, state.params)
    values, metrics = _judged(lab, terms, said)
    if shuffle:
      key = jax.random.fold_in(jax.random.key(config.seed), 4)
      key = jax.random.fold_in(key, step)
      values = rewards.shuffled(values, key)
    state, learned = update(state, said, values)
    log.append(_record(lab, step, said, metrics | learned, began))
    if (step + 1) % rl.save_every == 0 or step + 1 == rl.steps:
      saved.save(step + 1, state, log)
    advance(1)
  saved.close()
  policy = trained.policy(state.params)
  if adapter_file.fits(lab.model.config) and 'lora' in policy:
    if not (folder / 'adapter').exists():
      adapter_file.save(policy['lora'], lab.model, folder / 'adapter')
  return Result(policy, log)


def _whole(lab: Lab) -> Trained:
  """All parameters."""
  return Trained(
    start=lab.model.variables['params'],
    collection='params',
    fixed={},
    policy=lambda params: {'params': params},
  )


def _adapter(lab: Lab, config) -> Trained:
  """A low-rank adapter; the model itself stays as it is."""
  key = jax.random.fold_in(jax.random.key(config.seed), 5)
  adapter = lora.init(lab.model.config, key, **config.rl.adapter)
  start, scales = lora.split(adapter)
  return Trained(
    start=start,
    collection='lora',
    fixed=scales,
    policy=lambda weights: {
      **lab.model.variables,
      'lora': lora.joined(weights, scales),
    },
  )


def _rollout(lab: Lab, config, trained, step: int, params) -> Dialogue:
  """This step's dialogues: `lab.batch` rows in groups of one scenario."""
  rl, size = config.rl, config.rollout
  count = lab.batch // rl.group
  if lab.batch % rl.group:
    raise ValueError(
      f'rollout.batch={lab.batch} does not divide into groups of '
      f'rl.group={rl.group}.'
    )
  scripts = data.scripts('train', (step + 1) * count, seed=config.seed)
  scenario = data.scenario(
    lab.chat,
    scripts[-count:],
    prompt_tokens=size.prompt_tokens,
    line_tokens=size.tokens,
    samples=rl.group,
  )
  key = jax.random.fold_in(jax.random.key(config.seed), 3)
  policy = lab.variables(trained.policy(params), lab.free)
  return lab.talk(
    key, lab.cast(policy), scenario, lines=rl.lines, tokens=size.tokens
  )


def _judged(lab, terms, said):
  """The weighted reward `[B N]` and the mean of each term over lines."""
  spoken = np.asarray(said.spoken(POLICY))
  total, metrics = 0.0, {}
  for name, (weight, reward) in terms.items():
    values = lab.score(reward, said)
    metrics[f'reward/{name}'] = float(np.asarray(values)[spoken].mean())
    total = total + weight * values
  finite = np.isfinite(np.asarray(total))
  if not finite.all():
    row, line = np.argwhere(~finite)[0]
    raise FloatingPointError(
      f'the reward of dialogue {row}, line {line} is not finite; look at '
      f'the judges of {sorted(terms)}.'
    )
  metrics['reward'] = float(np.asarray(total)[spoken].mean())
  return total, metrics


def _update(lab: Lab, config, trained, optimizer, state: TrainState, mesh):
  """`(state, dialogue, rewards) -> state, metrics`, compiled once."""
  rl = config.rl
  algorithm = learn.ALGORITHMS[rl.algorithm]
  functions = decoder.functions(
    lab.model.config,
    dtype=jnp.dtype(config.dtype),
    remat=True,
    attend=config.attend or None,
  )
  apply = sharding.by_rows(lora.adapted(functions.apply), mesh)
  temperature = config.rollout.temperature

  def step(state, said, values, base):
    batch = jax.lax.with_sharding_constraint(
      to_batch(lab, said, values, algorithm, rl.group),
      sharding.batch_sharding(mesh),
    )
    hidden, _ = apply(base, batch.tokens, batch.positions)
    reference = token_logprobs(
      functions.unembed,
      base,
      hidden,
      batch.before,
      batch.actions,
      temperature=temperature,
      chunk=rl.chunk,
    )
    batch = batch.replace(reference_logprobs=reference)
    loss_fn = policy_loss(
      apply,
      functions.unembed,
      functools.partial(algorithm.loss, kl=rl.kl),
      {**base, 'lora': trained.fixed} if rl.adapter.rank else {},
      temperature=temperature,
      chunk=rl.chunk,
      trained=trained.collection,
    )
    return learn.train_step(
      state,
      batch,
      algorithm.weights(batch),
      loss_fn=loss_fn,
      optimizer=optimizer,
      microbatches=rl.microbatches,
    )

  places = sharding.state_shardings(state, mesh)
  compiled = jax.jit(step, out_shardings=(places, None), donate_argnums=0)

  def update(state, said, values):
    state, metrics = compiled(state, said, values, lab.model.variables)
    metrics = {name: float(value) for name, value in metrics.items()}
    for name, value in metrics.items():
      if not np.isfinite(value):
        raise FloatingPointError(
          f'{name} is {value} after step {int(state.step)}; the last '
          'checkpoint is from before it.'
        )
    return state, metrics

  return update


def to_batch(lab: Lab, said: Dialogue, values, algorithm, group: int) -> Batch:
  """The persona speaker's lines of grouped dialogues as a learner's batch.

  The old log-probabilities are those of sampling, where no line may begin with
  a stop token; the learner does not bar it, so on policy the ratio of a first
  token is 1 - P(stop). `policy/ratio` shows how near to one that is.
  """
  seen = view(said, POLICY, lab.frame)
  own = lambda x: x[:, POLICY::2]
  grouped = lambda x: x.reshape(-1, group, *x.shape[1:])
  advantages = jax.vmap(algorithm.advantage)(
    grouped(own(values)), grouped(own(said.spoken(POLICY)))
  )
  mask = own(said.mask)
  advantages = jnp.broadcast_to(
    advantages.reshape(*mask.shape[:2], 1), mask.shape
  )
  flat = lambda x: x.reshape(x.shape[0], -1)
  old = flat(own(said.logprobs))
  return Batch(
    tokens=seen.tokens,
    positions=seen.positions,
    before=flat(own(seen.before)),
    actions=flat(own(said.tokens)),
    mask=flat(mask),
    advantages=flat(advantages),
    old_logprobs=old,
    reference_logprobs=jnp.zeros_like(old),
  )


def _record(lab, step, said, metrics, began):
  spoken = np.asarray(said.spoken(POLICY))
  own = spoken[:, POLICY::2]
  bad = evaluate.degenerate(data.texts(lab.chat, said))
  return metrics | {
    'step': step + 1,
    'length': float(np.asarray(said.length)[spoken].mean()),
    'degenerate': float(bad[own].mean()),
    'seconds': time.monotonic() - began,
  }
