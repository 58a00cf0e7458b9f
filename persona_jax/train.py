"""Multi-turn RL of the persona speaker against a frozen partner."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax import data, evaluate, masked, processes, rewards, steps
from persona_jax.dialogue import POLICY, Dialogue
from persona_jax.lab import Lab
from persona_jax.learner import Learner

Terms = dict[str, tuple[float, rewards.Reward]]  # and their weights


def run(
  lab: Lab,
  config,
  terms: Terms,
  folder: Path,
  *,
  shuffle: bool = False,
  advance,
) -> steps.Result:
  """Trains on weighted `terms`; continues what `folder` holds.

  Trained are all parameters, or an adapter of `rl.adapter.rank`. With
  `shuffle`, rewards are dealt out to other dialogues: a control.

  Raises:
    FloatingPointError: a reward, loss or gradient is not finite.
  """
  learner = Learner(lab, config)

  def begin(step, states):
    said = _rollout(lab, config, learner, step, states.policy.params)
    return Talk(lab, config, learner, terms, said, step, shuffle)

  return steps.run(learner, begin, folder, advance=advance)


class Talk:
  """Dialogues of a step, and what they earn."""

  def __init__(self, lab, config, learner, terms, said, step, shuffle):
    self._lab, self._config, self._learner = lab, config, learner
    self._terms, self._said = terms, said
    self._step, self._shuffle = step, shuffle
    self.before = self.after = {}

  def wait(self):
    """Until all is said."""
    jax.block_until_ready(self._said)

  def batch(self, states):
    """What the policy said, to learn from where all rewards are finite."""
    values, self._means = _judged(self._lab, self._terms, self._said)
    self._values, fine = values, jnp.all(jnp.isfinite(values))
    if self._shuffle:
      key = jax.random.fold_in(jax.random.key(self._config.seed), 4)
      values = rewards.shuffled(values, jax.random.fold_in(key, self._step))
    batch, self._about = self._learner.prepare(states, self._said, values)
    return batch, fine

  def told(self):
    """The means of the rewards, and what the dialogues are like."""
    finite = np.isfinite(np.asarray(processes.here(self._values)))
    if not (finite.all() or self._config.rl.skip):
      row, line = np.argwhere(~finite)[0]
      raise FloatingPointError(
        f'the reward of dialogue {row}, line {line} is not finite in step '
        f'{self._step + 1}; look at the judges of {sorted(self._terms)}, or '
        'set rl.skip=true to count such steps and go on.'
      )
    spoken = np.asarray(self._words.spoken(POLICY))
    bad = evaluate.degenerate(self.texts())
    numbers = {**self._means, **self._about}
    return {
      **{name: float(value) for name, value in numbers.items()},
      'length': float(np.asarray(self._words.length)[spoken].mean()),
      'degenerate': float(bad[spoken[:, POLICY::2]].mean()),
    }

  def texts(self):
    """The dialogues in words."""
    return self._texts

  @functools.cached_property
  def _words(self):
    return processes.here(self._said)

  @functools.cached_property
  def _texts(self):
    return data.texts(self._lab.chat, self._words)


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


def _judged(lab, terms, said) -> tuple[jax.Array, dict[str, Any]]:
  """The weighted reward `[B N]`, and the mean of each term over lines."""
  spoken, total, means = said.spoken(POLICY), 0.0, {}
  for name, (weight, reward) in terms.items():
    values = lab.score(reward, said)
    means[f'reward/{name}'] = masked.mean(values, spoken)
    total = total + weight * values
  return total, means | {'reward': masked.mean(total, spoken)}
