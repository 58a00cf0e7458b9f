"""Multi-turn RL of the persona speaker against a frozen partner."""

import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from persona_jax import data, evaluate, processes, rewards
from persona_jax.checkpoint import Checkpoints, Guard
from persona_jax.dialogue import POLICY, Dialogue
from persona_jax.lab import Lab
from persona_jax.learner import Learner
from persona_jax.metrics import Scribe
from persona_jax.models import adapter_file


class Result(NamedTuple):
  """The trained policy, and the metrics of every step."""

  policy: dict  # {'params': ...} and, if one was trained, {'lora': ...}
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
  """Trains on weighted `terms`; continues what `folder` holds.

  Trained are all parameters, or an adapter of `rl.adapter.rank`, which is also
  left in PEFT's layout in `folder` (but where projections are fused: Phi).
  With `shuffle`, rewards are dealt out to other dialogues: a control.

  Raises:
    FloatingPointError: a reward, loss or gradient is not finite.
  """
  rl = config.rl
  learner = Learner(lab, config)
  states = learner.init()
  saved, log = Checkpoints(folder), []
  found = saved.restore(states)
  if found is not None:
    states, log = found.state, found.record['log']
    advance(len(log))
  with Guard(saved) as guard, Scribe(folder, len(log)) as scribe:
    for step in range(len(log), rl.steps):
      began = time.monotonic()
      said = _rollout(lab, config, learner, step, states.policy.params)
      guard.heed()
      words = processes.here(said)
      values, told = _judged(lab, terms, said, words.spoken(POLICY))
      guard.heed()
      if shuffle:
        key = jax.random.fold_in(jax.random.key(config.seed), 4)
        key = jax.random.fold_in(key, step)
        values = rewards.shuffled(values, key)
      with guard.changing():
        batch, about = learner.prepare(states, said, values)
        told |= {name: float(value) for name, value in about.items()}
        states, learned = learner.learn(
          states,
          batch,
          learner.parts(step),
          step=step,
          keep=lambda states, step=step: guard.offer(
            step, states, {'log': log}
          ),
        )
        log.append(_record(lab, step, words, told | learned, began))
        guard.offer(step + 1, states, {'log': log})
      scribe.write(log[-1], data.texts(lab.chat, words))
      guard.settle(step + 1, every=rl.save_every, last=rl.steps)
      advance(1)
  return finished(lab, learner, states, log, folder)


def finished(lab, learner, states, log, folder) -> Result:
  """The result of a run; an adapter is left for PEFT too."""
  policy = learner.trained.policy(states.policy.params)
  if adapter_file.fits(lab.model.config) and 'lora' in policy:
    adapter, place = processes.here(policy['lora']), folder / 'adapter'
    if processes.first() and not place.exists():
      adapter_file.save(adapter, lab.model, place)
  return Result(policy, log)


def _rollout(lab: Lab, config, learner, step: int, params) -> Dialogue:
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
  policy = lab.variables(learner.trained.policy(params), lab.free)
  return lab.talk(
    key, lab.cast(policy), scenario, lines=rl.lines, tokens=size.tokens
  )


def _judged(lab, terms, said, spoken):
  """The weighted reward `[B N]` and the mean of each term over lines."""
  spoken = np.asarray(spoken)
  total, metrics = 0.0, {}
  for name, (weight, reward) in terms.items():
    values = lab.score(reward, said)
    metrics[f'reward/{name}'] = _mean(values, spoken)
    total = total + weight * values
  finite = np.isfinite(np.asarray(processes.here(total)))
  if not finite.all():
    row, line = np.argwhere(~finite)[0]
    raise FloatingPointError(
      f'the reward of dialogue {row}, line {line} is not finite; look at '
      f'the judges of {sorted(terms)}.'
    )
  metrics['reward'] = _mean(total, spoken)
  return total, metrics


def _mean(values, spoken):
  return float(np.asarray(processes.here(values))[spoken].mean())


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
