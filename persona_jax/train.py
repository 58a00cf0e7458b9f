"""Multi-turn RL of the persona speaker against a frozen partner."""

import functools
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from persona_jax import data, evaluate, learn, rewards
from persona_jax.checkpoint import Checkpoints
from persona_jax.dialogue import POLICY, Dialogue, view
from persona_jax.lab import Lab
from persona_jax.learn import sharding
from persona_jax.learn.logprobs import token_logprobs
from persona_jax.learn.losses import Batch
from persona_jax.learn.step import TrainState, policy_loss
from persona_jax.models import decoder


class Result(NamedTuple):
  """Trained parameters, and the metrics of every step."""

  params: dict
  log: list[dict]


def run(
  lab: Lab,
  config,
  terms: dict[str, tuple[float, rewards.Reward]],
  folder: Path,
  *,
  shuffle: bool = False,
  advance,
) -> Result:
  """Trains all parameters on weighted `terms`; continues what `folder` holds.

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
  state = sharding.init_sharded(
    lambda params: learn.init_state(jax.tree.map(jnp.copy, params), optimizer),
    mesh,
    lab.model.variables['params'],
  )
  saved, log = Checkpoints(folder), []
  if saved.latest is not None:
    state, log = saved.restore(state)
    advance(len(log))
  update = _update(lab, config, optimizer, state, mesh)
  speak = functools.partial(_rollout, lab, config)
  for step in range(len(log), rl.steps):
    began = time.monotonic()
    said = speak(step, state.params)
    values, metrics = _judged(lab, terms, said)
    if shuffle:
      key = jax.random.fold_in(jax.random.key(config.seed), step)
      values = rewards.shuffled(values, key)
    state, learned = update(state, said, values)
    log.append(_record(lab, step, said, metrics | learned, began))
    if (step + 1) % rl.save_every == 0 or step + 1 == rl.steps:
      saved.save(step + 1, state, log)
    advance(1)
  saved.close()
  return Result(state.params, log)


def _rollout(lab: Lab, config, step: int, params) -> Dialogue:
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
  speakers = (lab.partner, lab.speaker(lab.variables(params, lab.free)))
  return lab.talk(key, speakers, scenario, lines=rl.lines, tokens=size.tokens)


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


def _update(lab: Lab, config, optimizer, state: TrainState, mesh):
  """`(state, dialogue, rewards) -> state, metrics`, compiled once."""
  rl = config.rl
  algorithm = learn.ALGORITHMS[rl.algorithm]
  trained = decoder.functions(
    lab.model.config, dtype=jnp.dtype(config.dtype), remat=True
  )
  apply = sharding.by_rows(trained.apply, mesh)
  temperature = config.rollout.temperature
  loss_fn = policy_loss(
    apply,
    trained.unembed,
    functools.partial(algorithm.loss, kl=rl.kl),
    {},
    temperature=temperature,
    chunk=rl.chunk,
  )

  def step(state, said, values, base):
    batch = jax.lax.with_sharding_constraint(
      to_batch(lab, said, values, algorithm, rl.group),
      sharding.batch_sharding(mesh),
    )
    hidden, _ = apply(base, batch.tokens, batch.positions)
    reference = token_logprobs(
      trained.unembed,
      base,
      hidden,
      batch.before,
      batch.actions,
      temperature=temperature,
      chunk=rl.chunk,
    )
    batch = batch.replace(reference_logprobs=reference)
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
