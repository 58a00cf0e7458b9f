"""What Tunix's own functions say of given arrays; `make_losses.py` asks.

Each of `METHODS` takes options and arrays.
"""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.rl import algo_core, common, function_registry
from tunix.sft.dpo import dpo_trainer

CASES = {
  'grpo': [
    *[
      {'loss_algo': algo, 'loss_agg_mode': mode} | clip
      for mode, (algo, clip) in itertools.product(
        (
          'token-mean',
          'sequence-mean-token-mean',
          'sequence-mean-token-scale',
          'seq-mean-token-sum',
        ),
        (
          ('grpo', {'epsilon': 0.2, 'epsilon_high': 0.28}),
          ('gspo-token', {'epsilon': 0.03, 'epsilon_high': 0.06}),
        ),
      )
    ],
    *[
      {'beta': 0.04, 'kl_loss_mode': k} for k in ('kl', 'mse_kl', 'low_var_kl')
    ],
    {'epsilon_high': 0.2, 'epsilon_c': 1.3},
    {'correction': True, 'beta': 0.04, 'kl_loss_mode': 'low_var_kl'},
    {'empty': True},
  ],
  'grpo_rows': [
    {'loss_agg_mode': mode, 'empty': True}
    for mode in ('sequence-mean-token-scale', 'seq-mean-token-sum')
  ],
  'ppo': [
    {'epsilon_low': 0.2, 'epsilon_high': 0.2},
    {'epsilon_low': 0.2, 'epsilon_high': 0.28, 'epsilon_c': 1.3},
    {'epsilon_low': 0.2, 'epsilon_high': 0.2, 'kl_coef': 0.04},
  ],
  'value': [{'clip_range_value': 0.2}, {'clip_range_value': 10.0}],
  'gae': [
    {'gamma': 1.0, 'gae_lambda': 0.95, 'beta': 0.0},
    {'gamma': 0.9, 'gae_lambda': 0.8, 'beta': 0.1},
  ],
  'grpo_advantages': [{}],
  'drgrpo_advantages': [{}],
  'rloo_advantages': [{}],
  'dpo': [
    {'beta': 0.1},
    {'beta': 0.5, 'label_smoothing': 0.1},
  ],
  'orpo': [{'lambda_orpo': 0.1, 'first': True}],
}


class Model(nnx.Module):
  """Returns what it holds, whatever it reads."""

  def __init__(self, said):
    self.said = nnx.Param(said)

  def __call__(self, tokens, **_):
    return self.said[...], None


def grpo(options, a):
  own = {
    'beta': 0.0,
    'epsilon': 0.2,
    'epsilon_high': 0.2,
    'loss_algo': 'grpo',
    'loss_agg_mode': 'sequence-mean-token-mean',
    'kl_loss_mode': 'kl',
    'kl_clamp_value': None,
    'temperature': 1.0,
  }
  config, read = SimpleNamespace(**own | options), example(a)
  if options.get('correction'):
    read.sampler_is_weights = a['correction']
  loss = lambda x: algo_core.grpo_loss_fn(Model(logits(x)), read, config, 0, 2)
  return solved(loss, a['logprobs'])


def ppo(options, a):
  config, read = SimpleNamespace(entropy_coef=0.0, **options), example(a)
  read.advantages = np.broadcast_to(a['advantages'][:, None], a['mask'].shape)
  loss = lambda x: algo_core.ppo_policy_loss_fn(
    Model(logits(x)), read, config, 0, 2
  )
  return solved(loss, a['logprobs'])


def value(options, a):
  clip, read = options['clip_range_value'], example(a)
  read.old_values, read.returns = a['old_values'], a['returns']
  scores = lambda x: jnp.pad(x, ((0, 0), (0, 1)))[..., None]
  loss = lambda x: algo_core.ppo_value_loss_fn(
    Model(scores(x)), read, clip, 0, 2
  )
  return solved(loss, a['values'])


def gae(options, a):
  """A reward at the last token of each row, less a distance at each token."""
  rows, room = a['mask'].shape
  apart = common.compute_kl_divergence(a['old'], a['reference'], 'kl')
  last = room - 1 - np.argmax(a['mask'][:, ::-1], axis=1)
  rewards = np.zeros((rows, room), np.float32)
  rewards[np.arange(rows), last] = a['rewards']
  found, returns = algo_core.compute_gae_advantages(
    rewards - options['beta'] * apart * a['mask'],
    a['values'],
    a['mask'].astype(np.float32),
    options['gamma'],
    options['gae_lambda'],
  )
  return {'advantages': found, 'returns': returns}


def grouped(name):
  """The advantages of that name."""

  def method(options, a):
    estimate = function_registry.get_advantage_estimator(name)
    found = estimate(rewards=a['rewards'], num_generations=int(a['group']))
    return {'advantages': found}

  return method


def preference(algorithm):
  """The loss of pairs of that name."""

  def method(options, a):
    rows, room = a['mask'].shape
    order = np.r_[0:rows:2, 1:rows:2]  # the chosen, then the rejected
    tokens = jnp.ones((rows, room + 1), int)
    mask = jnp.asarray(a['mask'][order], int)
    chosen, rejected = dpo_trainer.compute_logps(
      Model(logits(a['reference'][order])), tokens, None, None, room, mask
    )
    read = dpo_trainer.TrainExample(
      input_ids=tokens,
      positions=None,
      attention_mask=None,
      ref_chosen_logps=chosen,
      ref_rejected_logps=rejected,
      completion_mask=mask,
      logits_to_keep=room,
    )
    own = {k: x for k, x in options.items() if k != 'first'}
    loss = lambda x: dpo_trainer.dpo_loss_fn(
      Model(logits(x[order])), read, algorithm, **own
    )
    return solved(loss, a['logprobs'])

  return method


# What stands in.


def example(a):
  """What a loss reads of a batch."""
  rows, room = a['mask'].shape
  return SimpleNamespace(
    prompt_ids=jnp.ones((rows, 1), int),
    completion_ids=jnp.ones((rows, room), int),
    completion_mask=jnp.asarray(a['mask'], int),
    advantages=a['advantages'],
    old_per_token_logps=a['old'],
    ref_per_token_logps=a['reference'],
  )


def logits(logprobs):
  """Of two tokens; the last slot predicts nothing."""
  pair = jnp.stack([jnp.log(-jnp.expm1(logprobs)), logprobs], axis=-1)
  return jnp.pad(pair, ((0, 0), (0, 1), (0, 0)))


def solved(loss, leaf):
  loss, grad = jax.value_and_grad(lambda x: loss(x)[0])(jnp.asarray(leaf))
  return {'loss': loss, 'grad': grad}


METHODS = {
  'grpo': grpo,
  'grpo_rows': grpo,
  'ppo': ppo,
  'value': value,
  'gae': gae,
  'grpo_advantages': grouped('grpo'),
  'drgrpo_advantages': grouped('drgrpo'),
  'rloo_advantages': grouped('rloo'),
  'dpo': preference('dpo'),
  'orpo': preference('orpo'),
}
