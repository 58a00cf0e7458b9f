"""From a rollout and its rewards to an update, for any row of the tables.

Two compiled programs: `prepare` reads a rollout once under every model that the
algorithm needs, `update` learns from some rows of what that gives.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import PyTree

from persona_jax import groups, learn, masked, trained
from persona_jax.dialogue import POLICY, Dialogue, view
from persona_jax.lab import Lab
from persona_jax.learn import (
  advantages,
  critic,
  losses,
  preferences,
  prefix,
  process,
  sharding,
)
from persona_jax.learn.advantages import Earned
from persona_jax.learn.algorithms import (
  ANCHOR,
  CRITIC,
  PROCESS,
  REFERENCE,
  numbered,
  settings,
)
from persona_jax.learn.losses import Batch
from persona_jax.learn.step import clip, culprit, policy_loss, scores
from persona_jax.models import cache as caches
from persona_jax.models import decoder, lora

PARTS = ('policy', 'critic', 'process')  # fields of `States`


@struct.dataclass
class States:
  """Train states of all that learns; None where an algorithm has no such."""

  policy: PyTree  # in trees of shapes or places, one of those
  critic: PyTree = None
  process: PyTree = None


class Learner:
  """An algorithm on a model, compiled for one shape of rollouts."""

  def __init__(self, lab: Lab, config):
    rl = config.rl
    self._lab, self._rl = lab, rl
    self._temperature = config.rollout.temperature
    self._algorithm = (learn.ALGORITHMS | learn.PREFERENCES)[rl.algorithm]
    if rl.algorithm in learn.PREFERENCES:
      self._temperature = 1.0  # of replies that were not sampled here
    self._loss = numbered(self._algorithm.loss, rl.loss.to_dict())
    self._needs = set(self._algorithm.needs)
    parts = [self._loss]
    if isinstance(self._algorithm, learn.Algorithm):
      self._advantage = numbered(
        self._algorithm.advantage, rl.advantage.to_dict()
      )
      parts.append(self._advantage)
    if any(settings(x).get('kl') for x in parts) or PROCESS in self._needs:
      self._needs.add(REFERENCE)
    self.trained = trained.of(lab.model, config)
    self.mesh = lab.mesh
    ways = sharding.row_ways(lab.mesh)
    self._group, room = groups.alike(config, lab.frame, ways)
    model = decoder.functions(
      lab.model.config,
      dtype=jnp.dtype(config.dtype),
      remat=rl.remat,
      attend='xla' if self._group > 1 else config.attend or None,
    )
    self._apply = sharding.by_rows(lora.adapted(model.apply), self.mesh)
    if self._group > 1:
      self._apply = prefix.shared(
        self._apply,
        functools.partial(
          caches.empty_stacked,
          lab.model.config,
          dtype=jnp.dtype(config.dtype),
          blocked=False,
        ),
        group=self._group,
        room=room,
      )
    self._unembed = model.unembed
    self._read = functools.partial(
      scores,
      self._apply,
      self._unembed,
      temperature=self._temperature,
      held=rl.held,
    )
    rates = (rl.learning_rate, rl.critic_rate, rl.process_rate)
    self._optimizers = {
      name: optax.chain(
        clip(rl.max_grad_norm),
        optax.adamw(rate, b2=0.95, weight_decay=rl.weight_decay),
      )
      for name, rate in zip(PARTS, rates, strict=True)
    }
    self._jitted_prepare = jax.jit(self._prepare)
    self._jitted_given = jax.jit(self._given)
    self._jitted_update = None  # until it is known where states lie

  @property
  def parts(self) -> Callable:
    """`minibatches` of a rollout."""
    rl = self._rl
    return groups.minibatches(
      self._lab.batch, rl.minibatches, rl.epochs, self._group
    )

  def init(self) -> States:
    """The states before the first step, each in its place."""
    start, whole = self.trained.start, self._lab.model.variables['params']
    starts = {'policy': start}
    if CRITIC in self._needs:
      starts['critic'] = critic.init(whole, self._lab.model.config.features)
    if PROCESS in self._needs:
      starts['process'] = whole
    return States(
      **{
        name: sharding.init_sharded(
          functools.partial(_begin, self._optimizers[name]),
          self.mesh,
          params,
        )
        for name, params in starts.items()
      }
    )

  def prepare(self, states: States, said: Dialogue, rewards) -> tuple:
    """`(batch, metrics)`: a rollout as something to learn from."""
    return self._jitted_prepare(
      states, self._lab.model.variables, said, rewards
    )

  def given(self, states: States, batch: Batch, others: Batch) -> Batch:
    """Replies with what the loss asks of them; KTO's `others` answer others."""
    return self._jitted_given(states, self._lab.model.variables, batch, others)

  def learn(
    self, states: States, batch: Batch, parts, *, step: int, keep: Callable
  ) -> tuple[States, dict[str, float]]:
    """An update by each of `parts`, rows of the batch; the means of metrics.

    An update that meets a number that is not finite changes nothing. With
    `rl.skip` it is counted; else, if it is the first of this `step`,
    `keep(states)` may save them before the error.

    Raises:
      FloatingPointError: names the first such number.
    """
    found, skipped = [], 0
    for i, rows in enumerate(parts):
      states, told = self._compiled_update(states)(
        states, self._lab.model.variables, batch, rows
      )
      told = {name: float(value) for name, value in told.items()}
      culprits = {x: int(told.pop(f'{x}/culprit', -1)) for x in PARTS}
      wrong = [
        f'{what} of the {name}'
        for name, number in culprits.items()
        if (what := culprit(number, getattr(states, name)))
      ]
      if wrong and not self._rl.skip:
        if i == 0:
          keep(states)
        raise FloatingPointError(
          f'{wrong[0]} is not finite in step {step + 1}, update {i + 1} of '
          f'{len(parts)}, which was left out; lower the learning rate, look '
          'at the rewards, or set rl.skip=true to count such updates and go on.'
        )
      skipped += bool(wrong)
      if not wrong:
        found.append(told)
    metrics = {k: float(np.mean([x[k] for x in found])) for k in told if found}
    return states, metrics | {'step/skipped': float(skipped)}

  def _compiled_update(self, states):
    """The compiled update, whose states stay where they are."""
    if self._jitted_update is None:
      places = jax.tree.map(lambda x: x.sharding, states)
      self._jitted_update = jax.jit(
        self._update, out_shardings=(places, None), donate_argnums=0
      )
    return self._jitted_update

  def _variables(self, params, base):
    """What `apply` takes of trained parameters."""
    if self.trained.collection == 'params':
      return {'params': params}
    return {**base, 'lora': lora.joined(params, self.trained.fixed)}

  def _prepare(self, states, base, said, rewards):
    rl, needs = self._rl, self._needs
    batch, own = to_batch(self._lab, said)
    batch = jax.lax.with_sharding_constraint(
      batch, sharding.batch_sharding(self.mesh)
    )
    shape = own(said.tokens).shape
    lines = lambda x: None if x is None else x.reshape(shape)
    sampled, extra, metrics = batch.old_logprobs, {}, {}
    if rl.truncate:
      variables = self._variables(states.policy.params, base)
      old = self._read(variables, batch).logprobs
      correction = losses.truncated(old, sampled, batch.mask, rl.truncate)
      batch = batch.replace(old_logprobs=old, correction=correction)
      apart = losses.k3(sampled, old, batch.mask)
      metrics['sampler/kl'] = masked.mean(apart, batch.mask)
    if REFERENCE in needs:
      reference = self._read(base, batch).logprobs
      batch = batch.replace(reference_logprobs=reference)
      extra['shift'] = lines(batch.old_logprobs - reference)
    if CRITIC in needs:
      values = critic.read(self._apply, base, states.critic.params, batch)
      batch = batch.replace(old_values=values)
      extra['values'] = lines(values)
    if PROCESS in needs:
      model = self._read({'params': states.process.params}, batch).logprobs
      extra['process'] = lines(
        process.implicit(model, batch.reference_logprobs, batch.mask)
      )
    earned = Earned(
      rewards=own(rewards), mask=own(said.mask), group=rl.group, **extra
    )
    found = self._advantage(earned)
    flat = lambda x: None if x is None else x.reshape(x.shape[0], -1)
    batch = batch.replace(
      advantages=flat(found.policy), returns=flat(found.returns)
    )
    if PROCESS in needs:
      label = process.outcomes(earned.rewards, earned.spoken, rl.group)
      batch = batch.replace(label=label)
    if self._algorithm.group:
      metrics['groups/idle'] = advantages.idle_groups(earned)
    return batch, metrics

  def _given(self, states, base, batch, others):
    if REFERENCE in self._needs:
      reference = self._read(base, batch).logprobs
      batch = batch.replace(reference_logprobs=reference)
    if ANCHOR in self._needs:
      variables = self._variables(states.policy.params, base)
      distance = preferences.anchor(
        self._read(variables, others).logprobs,
        self._read(base, others).logprobs,
        others.mask,
      )
      anchor = jnp.broadcast_to(distance, batch.label.shape)
      batch = batch.replace(anchor=anchor)
    return batch

  def _update(self, states, base, batch, rows):
    rl, algorithm = self._rl, self._algorithm
    batch = jax.tree.map(lambda x: x[rows], batch)
    batch = jax.lax.with_sharding_constraint(
      batch, sharding.batch_sharding(self.mesh)
    )
    step = functools.partial(
      learn.train_step,
      microbatches=rl.microbatches,
      group=self._group if batch.tokens.ndim == 2 else 1,
    )
    policy_of = functools.partial(
      policy_loss,
      self._apply,
      self._unembed,
      temperature=self._temperature,
      held=rl.held,
    )
    rest = {}
    if self.trained.collection == 'lora':
      rest = {**base, 'lora': self.trained.fixed}
    weights = algorithm.weights(batch)
    policy, metrics = step(
      states.policy,
      batch,
      weights,
      loss_fn=policy_of(
        self._loss,
        rest,
        entropy=rl.entropy,
        trained=self.trained.collection,
      ),
      optimizer=self._optimizers['policy'],
    )
    metrics['policy/culprit'] = metrics.pop('step/culprit')
    before, states = states, states.replace(policy=policy)
    if states.critic is not None:
      new, told = step(
        states.critic,
        batch,
        losses.per_token(batch),
        loss_fn=critic.loss(self._apply, base),
        optimizer=self._optimizers['critic'],
      )
      states = states.replace(critic=new)
      metrics |= _named('critic', told)
    if states.process is not None:
      new, told = step(
        states.process,
        batch,
        losses.per_row(batch),
        loss_fn=policy_of(process.outcome_loss, {}),
        optimizer=self._optimizers['process'],
      )
      states = states.replace(process=new)
      metrics |= _named('process', told)
    if states.critic is not None or states.process is not None:
      told = [metrics.get(f'{name}/culprit', -1) for name in PARTS]
      fine = jnp.max(jnp.stack([jnp.asarray(x) for x in told])) < 0
      states = jax.tree.map(
        lambda new, old: jnp.where(fine, new, old), states, before
      )
    return states, losses.summary(metrics)


def to_batch(lab: Lab, said: Dialogue) -> tuple[Batch, Callable]:
  """The policy's lines as a learner's batch, and `own`, which picks them.

  The old log-probabilities are those of sampling, where no line may begin with
  a stop token; the learner does not bar it, so on policy the ratio of a first
  token is 1 - P(stop). `policy/ratio` shows how near to one that is.
  """
  seen = view(said, POLICY, lab.frame)
  own = lambda x: x[:, POLICY::2]
  mask = own(said.mask)
  flat = lambda x: x.reshape(x.shape[0], -1)
  line = jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :, None]
  old = flat(own(said.logprobs))
  return Batch(
    tokens=seen.tokens,
    positions=seen.positions,
    before=flat(own(seen.before)),
    actions=flat(own(said.tokens)),
    mask=flat(mask),
    advantages=jnp.zeros_like(old),
    old_logprobs=old,
    reference_logprobs=jnp.zeros_like(old),
    line=flat(jnp.broadcast_to(line, mask.shape)),
  ), own


def _begin(optimizer, params):
  return learn.init_state(jax.tree.map(jnp.copy, params), optimizer)


def _named(name, metrics):
  """Metrics of another thing that learns beside the policy."""
  own = {'loss', 'norm/grads', 'norm/updates', 'step/culprit'}
  new = {k: v for k, v in metrics.items() if k not in own}
  rename = {k: f'{name}/{k.rpartition("/")[2]}' for k in own & set(metrics)}
  return new | {new_name: metrics[k] for k, new_name in rename.items()}
