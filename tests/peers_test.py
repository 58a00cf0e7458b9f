"""Our losses, gradients and advantages beside those of TRL and of Tunix.

`golden/make_losses.py` ran their own methods on the arrays that it keeps; here
ours run on the same. Where they agree, it is with these words for their
options (`ROWS`). Where they do not, on purpose:

What a mean is over. TRL's `grpo` counts rows without tokens as rows of loss
zero; `per_sequence`, as Tunix, leaves them out. TRL divides `dr_grpo` by
`max_completion_length`, we and Tunix by the room that the batch has; Tunix
leaves rows without tokens out of it, we and TRL do not.

One ratio a sequence. TRL's and Tunix's sequence is the row; ours is a line of
it, and the row where a batch tells of no lines. Tunix takes the ratio out of
the gradient and puts each token's own in (GSPO-token): the sums are the same
where the tokens of a row share an advantage and a weight.

Distances. TRL's GRPO knows k3 alone, Tunix calls k1 `kl`, k2 `mse_kl` and k3
`low_var_kl`. TRL's RLOO and Tunix's PPO take k1 off the reward, as `gae(kl=)`
and `returns_to_go(kl=)` do; our RLOO has it in the loss.

RLOO. TRL clips the ratio of whole replies, a product over tokens, so that old
rollouts may be used again; ours is the gradient of the first update, and the
two are the same there. It is a sum over a reply's tokens: `per_slot` times M.

Deviations. All divide by G - 1 within a group; eps is 1e-4 in TRL and here,
1e-6 in Tunix. Over a batch, Tunix whitens by the deviation that divides by
n - 1, we by the one that divides by n, as the code of arXiv:1909.08593.

DPO. TRL's `sigmoid` no longer smooths labels; its AOT does, of one pair at a
time. `robust` (arXiv:2403.00409) is ours with `smoothing` -s / (1 - 2 s). IPO
is of means over tokens in both. CPO without its NLL is DPO without a reference.

ORPO. TRL's NLL is over prompt and chosen reply, and a mean over all tokens of
the batch; ours, as equation 6 of the paper has it, a mean over the reply, and
over pairs (so these were made a pair at a time, with an empty prompt). Tunix
takes the odds of summed log-probabilities, the paper and TRL of means: only
for replies of one token is that the same.

Numbers. Where nothing is said, TRL's GRPO has no distance, Tunix's 0.04 times
k1, ours 0.01 times k3. Tunix keeps log ratios within 20 (10 for a sequence).

PRIME, REINFORCE++, delta belief and dialogues of several lines have no peer.
"""

import functools
import json
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_losses

from persona_jax import learn
from persona_jax.learn import advantages, losses, preferences
from persona_jax.learn.advantages import Earned

M, G = make_losses.M, make_losses.G
GOLDEN = json.loads(make_losses.FILE.read_text())
ARRAYS = ('empty', 'first', 'swapped', 'correction')  # no words, other arrays


class Row(NamedTuple):
  """What of ours a method of theirs is, and their options in our words."""

  run: Callable  # how ours is called
  ours: Callable
  words: dict  # an option: our keyword, or our keywords for each of its values


# Ours on their arrays.


def made(a, options):
  """A batch of their arrays."""
  whole = jnp.zeros(a['mask'].shape, jnp.int32)
  each = a['mask'] * a['advantages'][:, None]
  return learn.Batch(
    tokens=whole,
    positions=whole,
    before=whole,
    actions=whole,
    mask=jnp.asarray(a['mask']),
    advantages=jnp.asarray(each),
    old_logprobs=jnp.asarray(a['old']),
    reference_logprobs=jnp.asarray(a['reference']),
    correction=jnp.asarray(a['correction'])
    if options.get('correction')
    else None,
    returns=jnp.asarray(a['returns']),
    old_values=jnp.asarray(a['old_values']),
  )


def solved(loss, x, batch, weights, **numbers):
  """Value and gradient, and nothing where there is no token."""
  value = jax.value_and_grad(lambda x: loss(x, batch, weights, **numbers)[0])
  found, grad = value(jnp.asarray(x))
  return {'loss': found, 'grad': grad.reshape(-1, M)}


def policy(ours, a, options, *, weigh=losses.per_token, **numbers):
  batch = made(a, options)
  return solved(ours, a['logprobs'], batch, weigh(batch), **numbers)


def first_update(ours, a, options, **numbers):
  a = a | {'old': a['logprobs']}
  found = policy(ours, a, options, **numbers)
  return {'grad': found['grad']}  # their value is that of ratios


def critic(ours, a, options, **numbers):
  batch = made(a, options)
  return solved(ours, a['values'], batch, losses.per_token(batch), **numbers)


def pairs(ours, a, options, **numbers):
  two = lambda x: x.reshape(-1, 2, M)
  batch = jax.tree.map(two, made(a, options))
  weights = losses.per_row(batch)
  return solved(ours, two(a['logprobs']), batch, weights, **numbers)


def unreferenced(ours, a, options, **numbers):
  a = a | {'reference': np.zeros_like(a['reference'])}
  return pairs(ours, a, options, **numbers)


def chosen(ours, a, options):
  mask = a['mask'] & (np.arange(len(a['mask'])) % 2 == 0)[:, None]
  return policy(ours, a | {'mask': mask}, options)


def single(ours, a, options, **numbers):
  mask = jnp.roll(jnp.asarray(a['mask']), 1, 0)
  other, reference = map(jnp.asarray, (a['other'], a['other_reference']))
  anchor = preferences.anchor(other, reference, mask)
  batch = made(a, options).replace(
    label=jnp.asarray(a['label']), anchor=jnp.full(len(mask), anchor)
  )
  weights = losses.per_row(batch)
  return solved(ours, a['logprobs'], batch, weights, **numbers)


def earned(a):
  """Dialogues of one line."""
  line = lambda x: jnp.asarray(x)[:, None]
  return Earned(
    rewards=line(a['rewards']),
    mask=line(a['mask']),
    group=G,
    values=line(a['values']),
    shift=line(a['old'] - a['reference']),
  )


def grouped(ours, a, options, **numbers):
  found = ours(earned(a), **numbers).policy[:, 0]
  assert not jnp.any(found[~a['mask']])
  return {'advantages': jnp.where(a['mask'].any(1), found[:, 0], 0)}


def in_time(ours, a, options, **numbers):
  found = ours(earned(a), **numbers)
  count = np.sum(a['mask'])
  theirs = found.policy[:, 0] * np.sqrt((count - 1) / count)
  return {'advantages': theirs, 'returns': found.returns[:, 0]}


def sampler(ours, a, options, **numbers):
  old, sampled, mask = (jnp.asarray(a[x]) for x in ('old', 'sampled', 'mask'))
  return {'weights': ours(old, sampled, mask, **numbers)}


# Theirs in our words.

CLIPPED = {'epsilon': 'clip', 'epsilon_high': 'clip_high', 'beta': 'kl'}
DISTANCE = {'kl': 'k1', 'mse_kl': 'k2', 'low_var_kl': 'k3'}
RLOO = learn.ALGORITHMS['rloo']
SUM = lambda batch: M * losses.per_slot(batch)  # a mean over rows of sums
ROWS_OF_ALL = 5 / 6  # with tokens, where row 4 has none
ROWS = {
  'trl grpo': Row(
    functools.partial(policy, kl=0.0),
    losses.clipped_loss,
    CLIPPED
    | {
      'delta': 'dual',
      'importance_sampling_level': {'token': {}, 'sequence': {'lines': True}},
      'loss_type': {
        'grpo': {'weigh': losses.per_sequence},
        'bnpo': {'weigh': losses.per_token},
        'dr_grpo': {'weigh': losses.per_slot},
        'dapo': {'weigh': losses.per_token},
      },
    },
  ),
  'trl grpo_rows': Row(
    functools.partial(
      policy,
      weigh=lambda x: losses.per_sequence(x) * ROWS_OF_ALL,
      clip_high=0.28,
      kl=0.0,
    ),
    losses.clipped_loss,
    {},
  ),
  'trl cispo': Row(
    policy, losses.weighted_loss, {'epsilon_high': 'most', 'beta': 'kl'}
  ),
  'trl sampler': Row(
    sampler, losses.truncated, {'vllm_importance_sampling_clip_max': 'most'}
  ),
  'trl grpo_advantages': Row(
    grouped,
    advantages.group_relative,
    {'scale_rewards': {'group': {}, 'none': {'deviation': False}}},
  ),
  'trl rloo': Row(
    functools.partial(first_update, weigh=lambda x: M * RLOO.weights(x)),
    RLOO.loss,
    {},
  ),
  'trl rloo_advantages': Row(grouped, advantages.leave_one_out, {}),
  'trl dpo': Row(
    pairs,
    preferences.dpo_loss,
    {
      'loss_type': {'sigmoid': {}, 'aot': {}},
      'beta': 'beta',
      'label_smoothing': 'smoothing',
    },
  ),
  'trl robust': Row(
    pairs,
    preferences.dpo_loss,
    {'beta': 'beta', 'label_smoothing': {0.1: {'smoothing': -0.1 / 0.8}}},
  ),
  'trl ipo': Row(pairs, preferences.ipo_loss, {'beta': 'beta'}),
  'trl sft': Row(chosen, losses.imitation_loss, {}),
  'trl kto': Row(
    single,
    preferences.kto_loss,
    {
      'beta': 'beta',
      'desirable_weight': 'desirable',
      'undesirable_weight': 'undesirable',
    },
  ),
  'trl simpo': Row(
    pairs, preferences.simpo_loss, {'beta': 'beta', 'simpo_gamma': 'margin'}
  ),
  'trl cpo': Row(
    unreferenced,
    preferences.dpo_loss,
    {'beta': 'beta', 'label_smoothing': 'smoothing'},
  ),
  'trl orpo': Row(pairs, preferences.orpo_loss, {'beta': 'beta'}),
  'tunix grpo': Row(
    functools.partial(policy, weigh=losses.per_sequence, clip_high=0.2, kl=0.0),
    losses.clipped_loss,
    CLIPPED
    | {
      'epsilon_c': 'dual',
      'kl_loss_mode': {k: {'kl_kind': x} for k, x in DISTANCE.items()},
      'loss_algo': {'grpo': {}, 'gspo-token': {'lines': True}},
      'loss_agg_mode': {
        'token-mean': {'weigh': losses.per_token},
        'sequence-mean-token-mean': {'weigh': losses.per_sequence},
        'sequence-mean-token-scale': {'weigh': losses.per_slot},
        'seq-mean-token-sum': {'weigh': SUM},
      },
    },
  ),
  'tunix grpo_rows': Row(
    functools.partial(policy, kl=0.0),
    losses.clipped_loss,
    {
      'loss_agg_mode': {
        'sequence-mean-token-scale': {
          'weigh': lambda x: losses.per_slot(x) / ROWS_OF_ALL
        },
        'seq-mean-token-sum': {'weigh': lambda x: SUM(x) / ROWS_OF_ALL},
      }
    },
  ),
  'tunix ppo': Row(
    functools.partial(policy, kl=0.0, kl_kind='k1'),
    losses.clipped_loss,
    {
      'epsilon_low': 'clip',
      'epsilon_high': 'clip_high',
      'epsilon_c': 'dual',
      'kl_coef': 'kl',
    },
  ),
  'tunix value': Row(critic, losses.value_loss, {'clip_range_value': 'clip'}),
  'tunix gae': Row(
    in_time,
    advantages.gae,
    {'gamma': 'discount', 'gae_lambda': 'decay', 'beta': 'kl'},
  ),
  'tunix grpo_advantages': Row(
    functools.partial(grouped, eps=1e-6), advantages.group_relative, {}
  ),
  'tunix drgrpo_advantages': Row(
    functools.partial(grouped, deviation=False), advantages.group_relative, {}
  ),
  'tunix rloo_advantages': Row(grouped, advantages.leave_one_out, {}),
  'tunix dpo': Row(
    pairs,
    preferences.dpo_loss,
    {'beta': 'beta', 'label_smoothing': 'smoothing'},
  ),
  'tunix orpo': Row(pairs, preferences.orpo_loss, {'lambda_orpo': 'beta'}),
}
CASES = [
  (f'{peer} {case["method"]}', case)
  for peer in make_losses.PEERS
  for case in GOLDEN[peer]['cases']
]


def label(case):
  name, told = case
  return ' '.join([name, *(f'{k}={x}' for k, x in told['options'].items())])


def keywords(words, options):
  """Their options in our words."""
  found = {}
  for name, value in options.items():
    if name not in ARRAYS:
      word = words[name]
      found |= {word: value} if isinstance(word, str) else word[value]
  return found


@pytest.mark.parametrize('case', CASES, ids=label)
def test_ours_is_theirs(case):
  name, told = case
  row, options = ROWS[name], told['options']
  arrays = make_losses.with_options(GOLDEN['inputs'], options)
  found = row.run(row.ours, arrays, options, **keywords(row.words, options))
  for key, got in found.items():
    want = np.asarray(told[key], np.float32)
    if key in ('returns', 'advantages') and want.ndim == 2:
      want = np.where(arrays['mask'], want, 0)  # theirs go on where none spoke
    close(got, want)


def close(got, want):
  """To 1e-5; what should be zero, to 1e-6 of the largest entry."""
  least = 1e-6 * np.max(np.abs(want))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=least)


def test_no_method_is_left_out():
  assert {name for name, _ in CASES} == set(ROWS)
  assert GOLDEN['inputs'] == make_losses.inputs()


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # theirs
@pytest.mark.parametrize('peer', make_losses.PEERS)
def test_they_still_say_so(peer):
  pytest.importorskip(peer, exc_type=ImportError)
  again = make_losses.asked(peer, GOLDEN['inputs'])
  assert len(again) == len(GOLDEN[peer]['cases'])
  for new, old in zip(again, GOLDEN[peer]['cases'], strict=True):
    assert (new['method'], new['options']) == (old['method'], old['options'])
    for key in set(old) - {'method', 'options'}:
      close(np.asarray(new[key]), np.asarray(old[key]))
