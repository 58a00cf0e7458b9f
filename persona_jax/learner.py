"""From a rollout and its rewards to an update, for any row of the tables.

Two compiled programs: `prepare` reads a rollout once under every model that the
algorithm needs, `update` learns from some rows of what that gives.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import PyTree

from persona_jax import batches, groups, learn, masked, trained
from persona_jax.dialogue import Dialogue
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
from persona_jax.meter import Learned, Meter, Passes, work
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
    self._lab, self.rl, self.model = lab, rl, lab.model
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
      mix=lab.model.mix,
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
    self._unembed = lab.model.unembed
    self._read = functools.partial(
      scores,
      self._apply,
      self._unembed,
      temperature=self._temperature,
      held=rl.held,
    )
    updates = rl.steps * len(self.parts(0))
    rates = (rl.learning_rate, rl.critic_rate, rl.process_rate)
    self._optimizers = {
      name: optax.chain(
        clip(rl.max_grad_norm),
        optax.adamw(
          _schedule(rate, rl, updates), b2=0.95, weight_decay=rl.weight_decay
        ),
      )
      for name, rate in zip(PARTS, rates, strict=True)
    }
    self._jitted_prepare = jax.jit(self._prepare)
    self._jitted_given = jax.jit(self._given)
    self._jitted_update = None  # until it is known where states lie
    self._like = None  # and what they are

  def parts(self, step: int) -> list[np.ndarray]:
    """The rows of each update of a step."""
    rl = self.rl
    size = self._lab.batch
    if rl.algorithm in learn.PREFERENCES:
      return [np.arange(size)]
    count = rl.minibatches
    return groups.minibatches(size, count, rl.epochs, self._group)(step)

  def meter(self) -> Meter:
    """A meter of steps that begin now.

    In a rollout both speakers read about what the policy reads.
    """
    rl, needs = self.rl, self._needs
    rolls = isinstance(self._algorithm, learn.Algorithm)
    once = rolls * (2 + bool(rl.truncate)) + len(needs) + (ANCHOR in needs)
    whole = 1 + (CRITIC in needs) + (PROCESS in needs)
    # What an adapter is beside has no gradient of its own.
    learned = 3 * whole - (self.trained.collection == 'lora')
    epochs = rl.epochs if rolls else 1
    hidden = jax.ShapeDtypeStruct(
      (1, 1, self.model.config.features), jnp.float32
    )
    logits = jax.eval_shape(self._unembed, self.model.variables, hidden)
    passes = Passes(once, learned, logits.shape[-1])
    return Meter(self.model.config, passes, epochs)

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
    self, states: States, batch: Batch, step: int, fine: jax.Array
  ) -> tuple[States, Learned]:
    """The updates of a step; what they tell is on its way, as the states are.

    An update that meets a number that is not finite changes nothing; nor do
    those after it, unless `rl.skip`. None does where the batch is not `fine`.
    """
    found = []
    for rows in self.parts(step):
      states, told = self._compiled_update(states)(
        states, self.model.variables, batch, rows, fine
      )
      if not self.rl.skip:
        fine = told['step/fine']
      found.append(told)
    return states, Learned(found)

  def told(self, learned: Learned, step: int) -> dict[str, float]:
    """The means of what the updates of a step tell; waits for them.

    With `rl.skip`, updates that changed nothing are counted.

    Raises:
      FloatingPointError: names the first number that is not finite.
    """
    fine, skipped = [], 0
    for i, told in enumerate(learned.here):
      culprits = {x: int(told.pop(f'{x}/culprit', -1)) for x in PARTS}
      wrong = [
        f'{what} of the {name}'
        for name, number in culprits.items()
        if (what := culprit(number, getattr(self._like, name)))
      ]
      if wrong and not self.rl.skip:
        raise FloatingPointError(
          f'{wrong[0]} is not finite in step {step + 1}, update {i + 1} of '
          f'{len(learned.found)}, which was left out; lower the learning rate, '
          'look at the rewards, or set rl.skip=true to count such updates and '
          'go on.'
        )
      if told.pop('step/fine'):
        fine.append(told)
      else:
        skipped += 1
    metrics = {k: float(np.mean([x[k] for x in fine])) for k in told if fine}
    return metrics | {'step/skipped': float(skipped)}

  def _compiled_update(self, states):
    """The compiled update, whose states stay where they are."""
    if self._jitted_update is None:
      places = jax.tree.map(lambda x: x.sharding, states)
      self._like = jax.eval_shape(lambda: states)
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
    rl, needs = self.rl, self._needs
    batch, own = batches.of_dialogue(said, self._lab.frame)
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

  def _update(self, states, base, batch, rows, allowed):
    rl, algorithm = self.rl, self._algorithm
    batch = jax.tree.map(lambda x: x[rows], batch)
    batch = jax.lax.with_sharding_constraint(
      batch, sharding.batch_sharding(self.mesh)
    )
    step = functools.partial(
      learn.train_step,
      microbatches=rl.microbatches,
      group=self._group if batch.tokens.ndim == 2 else 1,
      allowed=allowed,
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
    told = [metrics[f'{x}/culprit'] for x in PARTS if f'{x}/culprit' in metrics]
    fine = allowed & (jnp.max(jnp.stack(told)) < 0)
    if len(told) > 1:
      states = jax.tree.map(
        lambda new, old: jnp.where(fine, new, old), states, before
      )
    told = {f'work/{k}': x for k, x in work(batch)._asdict().items()}
    return states, losses.summary(metrics) | told | {'step/fine': fine}


def _schedule(rate: float, rl, updates: int):
  """The rate of an update: it rises over `rl.warmup` and may fall after."""

  def at(count):
    risen = jnp.minimum(1.0, (count + 1) / max(rl.warmup, 1))
    left = jnp.maximum(0.0, 1.0 - count / updates) if rl.decay else 1.0
    return rate * risen * left

  return at if rl.warmup or rl.decay else rate


def _begin(optimizer, params):
  return learn.init_state(jax.tree.map(jnp.copy, params), optimizer)


def _named(name, metrics):
  """Metrics of another thing that learns beside the policy."""
  own = {'loss', 'norm/grads', 'norm/updates', 'step/culprit'}
  new = {k: v for k, v in metrics.items() if k not in own}
  rename = {k: f'{name}/{k.rpartition("/")[2]}' for k in own & set(metrics)}
  return new | {new_name: metrics[k] for k, new_name in rename.items()}
