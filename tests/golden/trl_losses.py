"""What TRL's own methods say of given arrays; `make_losses.py` asks.

Each of `METHODS` takes options and arrays. `told` stands in for a trainer.
"""

import collections
import itertools
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch.nn import functional
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

RATIOS = [  # of TRL's GRPO: all kinds of mean, with one ratio a token or a row
  {'loss_type': mean, 'importance_sampling_level': level, 'beta': beta} | clip
  for mean, (level, clip), beta in itertools.product(
    ('grpo', 'bnpo', 'dr_grpo', 'dapo'),
    (
      ('token', {'epsilon': 0.2, 'epsilon_high': 0.28}),
      ('sequence', {'epsilon': 0.03, 'epsilon_high': 0.06}),
    ),
    (0.0, 0.04),
  )
]
CASES = {
  'grpo': [
    *RATIOS,
    {'loss_type': 'grpo', 'epsilon': 0.2, 'epsilon_high': 0.2},
    {'loss_type': 'dapo', 'epsilon': 0.2, 'epsilon_high': 0.2, 'delta': 1.3},
    *[  # weights of what another sampled, and a row without tokens
      {'loss_type': mean, 'epsilon': 0.2, 'epsilon_high': 0.2} | more
      for mean in ('bnpo', 'dr_grpo')
      for more in ({'correction': True, 'beta': 0.04}, {'empty': True})
    ],
  ],
  'grpo_rows': [{'empty': True}],
  'cispo': [{'epsilon_high': 1.4}, {'epsilon_high': 1.4, 'beta': 0.04}],
  'grpo_advantages': [
    {'scale_rewards': 'group'},
    {'scale_rewards': 'none'},
    {'scale_rewards': 'group', 'empty': True},
  ],
  'sampler': [{'vllm_importance_sampling_clip_max': 1.2}],
  'rloo': [{}],
  'rloo_advantages': [{}, {'empty': True}],
  'dpo': [
    {'loss_type': 'sigmoid', 'beta': 0.1},
    {'loss_type': 'sigmoid', 'beta': 0.5},
    {'loss_type': 'aot', 'beta': 0.5, 'label_smoothing': 0.1},
  ],
  'robust': [{'beta': 0.5, 'label_smoothing': 0.1}],
  'ipo': [{'beta': 0.1}, {'beta': 0.5}],
  'sft': [{}],
  'kto': [
    {'beta': 0.1},
    {'beta': 0.5, 'desirable_weight': 1.3, 'undesirable_weight': 0.7},
    {'beta': 0.5, 'swapped': True},  # the anchor would be below zero
  ],
  'simpo': [
    {'beta': 2.0, 'simpo_gamma': 1.0},
    {'beta': 2.5, 'simpo_gamma': 0.5},
  ],
  'cpo': [{'beta': 0.1}, {'beta': 0.5, 'label_smoothing': 0.1}],
  'orpo': [{'beta': 0.1}, {'beta': 1.0}],
}
PARTS = {  # methods that those of CPO and ORPO call
  'concatenated_forward',
  'concatenated_inputs',
  'cpo_loss',
  'get_batch_logps',
  'odds_ratio_loss',
}


ACCELERATOR = Accelerator(cpu=True)
MODEL = SimpleNamespace(training=True, is_gradient_checkpointing=False)
ARGUMENTS = SimpleNamespace(  # the arguments of a trainer
  per_device_train_batch_size=1,
  gradient_checkpointing_kwargs=None,
  gradient_accumulation_steps=1,
  steps_per_generation=1,
  use_bias_correction_kl=False,
  delta=None,
)


# Policies.


def policy(method, options, a, **more):
  rows, room = a['mask'].shape
  leaf = a['logprobs'].clone().requires_grad_()
  own = {'beta': 0.0, 'importance_sampling_level': 'token', 'loss_type': None}
  own |= {k: x for k, x in options.items() if k in own}
  told = trainer(
    _get_per_token_logps_and_entropies=lambda *_, **__: (
      leaf,
      torch.zeros(rows, room),
      None,
    ),
    args=SimpleNamespace(**vars(ARGUMENTS) | {'delta': options.get('delta')}),
    epsilon_low=options.get('epsilon'),
    epsilon_high=options['epsilon_high'],
    use_vllm=bool(options.get('correction')),
    vllm_importance_sampling_correction=True,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    current_gradient_accumulation_steps=1,
    max_completion_length=room,
    _entropy_bonus_enabled=False,
    **own,
  )
  prompt = torch.ones(rows, 1, dtype=torch.long)
  read = {
    'prompt_ids': prompt,
    'prompt_mask': prompt,
    'completion_ids': torch.ones(rows, room, dtype=torch.long),
    'completion_mask': a['mask'].long(),
    'advantages': a['advantages'],
  }
  return solved(method(told, None, read | more), leaf)


def grpo(options, a):
  a = torched(a)
  return policy(
    GRPOTrainer._compute_loss,
    options,
    a,
    old_per_token_logps=a['old'],
    ref_per_token_logps=a['reference'],
    importance_sampling_ratio=a['correction'],
    num_items_in_batch=a['mask'].sum(),
  )


def rloo(options, a):
  """The first update after a rollout: the old policy is the policy."""
  a = torched(a)
  old = (a['logprobs'] * a['mask']).sum(1)
  clips = {'epsilon': 0.2, 'epsilon_high': 0.2}  # and cuts nothing
  return policy(RLOOTrainer._compute_loss, clips | options, a, old_logps=old)


# Advantages.


def scored(method, a, said, **more):
  """A rollout in which `said` was said."""
  rewards = a['rewards'].clone()
  rewards[~a['mask'].any(1)] = torch.nan  # no reward function had a word
  own = {
    'scale_rewards': 'group',
    'use_vllm': False,
    'vllm_importance_sampling_clip_min': None,
  }
  told = trainer(
    _generate=lambda prompts: said,
    _calculate_rewards=lambda *_: rewards[:, None],
    _get_per_token_logps_and_entropies=lambda *_, **__: (a['old'], None, None),
    _tokenizer=SimpleNamespace(pad_token_id=0),
    environment_factories=None,
    environments=None,
    tools=None,
    pad_to_multiple_of=None,
    mask_truncated_completions=False,
    num_iterations=1,
    num_generations=int(a['group']),
    vllm_importance_sampling_correction=True,
    vllm_importance_sampling_mode='token_truncate',
    beta=0.0,
    reward_weights=torch.ones(1),
    reward_func_names=['reward'],
    reward_clip_range=None,
    normalize_advantages=False,
    multi_objective_aggregation='sum_then_normalize',
    _logs=collections.defaultdict(list, rewards={'reward': []}),
    _pending_extra_logs={},
    _pending_metrics={},
    log_multimodal=False,
    **own | more,
  )
  return method(told, [{'prompt': ''}] * len(rewards))


def grpo_rollout(options, a):
  rows, room = a['mask'].shape
  ids, holes = [[1] * room] * rows, a['mask'].long().tolist()
  sampled = a['sampled'].tolist()
  said = ids, ids, holes, [''] * rows, sampled, {}, None, None
  own = {k: x for k, x in options.items() if k != 'empty'}
  method = GRPOTrainer._generate_and_score_completions
  return scored(method, a, said, **own)


def grpo_advantages(options, a):
  found = grpo_rollout(options, torched(a))
  return {'advantages': found['advantages'].numpy()}


def sampler(options, a):
  found = grpo_rollout({'use_vllm': True} | options, torched(a))
  return {'weights': found['importance_sampling_ratio'].numpy()}


def rloo_advantages(options, a):
  a = torched(a)
  rows, room = a['mask'].shape
  ids = [[1] * room] * rows
  said = ids, ids, [''] * rows
  method = RLOOTrainer._generate_and_score_completions
  return {'advantages': scored(method, a, said)['advantages'].numpy()}


# Preferences.


def dpo(options, a):
  a = torched(a)
  leaf = a['logprobs'].requires_grad_()
  count = len(leaf) // 2
  parts = [range(count)]
  if options['loss_type'] == 'aot':  # of a single pair it only smooths
    parts = [[pair] for pair in range(count)]
  loss = 0.0
  for part in parts:
    order = [2 * p for p in part] + [2 * p + 1 for p in part]
    mask = a['mask'][order]
    told = trainer(
      ref_model=model(a['reference'][order]),
      loss_types=[options['loss_type']],
      loss_weights=[1.0],
      beta=options.get('beta', 0.1),
      label_smoothing=options.get('label_smoothing', 0.0),
      f_divergence_type='reverse_kl',
      ld_alpha=None,
      use_weighting=False,
    )
    said = model(leaf[order])
    loss += DPOTrainer._compute_loss(told, said, texts(mask), False)
  return solved(loss / len(parts), leaf)


def kto(options, a):
  a = torched(a)
  leaf = a['logprobs'].requires_grad_()
  own, other = texts(a['mask']), texts(a['mask'].roll(1, 0), mark=2)
  told = trainer(
    ref_model=model(a['reference'], a['other_reference']),
    loss_type='kto',
    calculate_KL=True,
    **{'desirable_weight': 1.0, 'undesirable_weight': 1.0} | options,
  )
  told._compute_kl_logps = KTOTrainer._compute_kl_logps.__get__(told)
  read = own | {f'KL_{k}': x for k, x in other.items()}
  read['label'] = a['label'].bool()
  said = model(leaf, a['other'])
  return solved(KTOTrainer._compute_loss(told, said, read, False), leaf)


def unreferenced(method, options, a, **more):
  """CPO and ORPO, a pair at a time."""
  a = torched(a)
  leaf = a['logprobs'].requires_grad_()
  loss = 0.0
  for row in range(0, len(leaf), 2):
    told = trainer(
      is_encoder_decoder=False,
      padding_value=0,
      pad_token_id=0,
      beta=options['beta'],
      **more,
    )
    for name in PARTS & set(vars(method)):
      setattr(told, name, vars(method)[name].__get__(told))
    read = {}
    for i, name in enumerate(('chosen', 'rejected')):
      text = texts(a['mask'][row + i][None])
      counts = text.pop('completion_mask') == 1
      text['labels'] = torch.where(counts, text['input_ids'], -100)
      read |= {f'{name}_{key}': x for key, x in text.items()}
    said = SimpleNamespace(logits=logits(leaf[row : row + 2]))
    answer = lambda *_, said=said, **__: said
    loss += method.get_batch_loss_metrics(told, answer, read)[0]
  return solved(2 * loss / len(leaf), leaf)


def cpo(options, a):
  own = {'loss_type': 'sigmoid', 'simpo_gamma': 0.0, 'label_smoothing': 0.0}
  own |= {k: x for k, x in options.items() if k != 'beta'}
  return unreferenced(CPOTrainer, options, a, cpo_alpha=0.0, alpha=0.0, **own)


def orpo(options, a):
  return unreferenced(ORPOTrainer, options, a)


# What stands in.


def trainer(**more):
  """What all methods read of a trainer, and `more`."""
  table = lambda: collections.defaultdict(list)
  common = {
    'accelerator': ACCELERATOR,
    'model': MODEL,
    'args': ARGUMENTS,
    'aux_loss_enabled': False,
    'precompute_ref_logps': False,
    '_metrics': collections.defaultdict(table),
    '_total_train_tokens': 0,
    '_tp_size': 1,
  }
  return SimpleNamespace(**common | more)


def texts(mask, mark=1):
  """Replies to a prompt of one token; their tokens are `mark`."""
  mask = functional.pad(mask.long(), (1, 0))
  return {
    'input_ids': torch.full_like(mask, mark),
    'attention_mask': functional.pad(mask[:, 1:], (1, 0), value=1),
    'completion_mask': mask,
  }


def model(*logprobs):
  """Its head gives the first of `texts` with mark 1, the second with mark 2."""

  def call(input_ids, labels, **_):
    given = logprobs[input_ids[0, 0] - 1]
    zeros = torch.zeros(given.shape)
    return SimpleNamespace(
      log_probs=torch.where(labels[:, 1:] != -100, given, 0.0),
      entropy=zeros,
      mean_logits=zeros,
      is_top1=zeros.bool(),
    )

  return call


def logits(logprobs):
  """Of two tokens; the last slot predicts nothing."""
  pair = torch.stack([torch.log(-torch.expm1(logprobs)), logprobs], dim=-1)
  return functional.pad(pair, (0, 0, 0, 1))


def torched(a):
  return {name: torch.tensor(x) for name, x in a.items()}


def solved(loss, leaf):
  loss.backward()
  return {'loss': loss.detach().numpy(), 'grad': leaf.grad.numpy()}


def preset(method, **own):
  """`method` with options that its name implies."""
  return lambda options, a: method(own | options, a)


METHODS = {
  'grpo': grpo,
  'grpo_rows': preset(grpo, **RATIOS[0]),
  'cispo': preset(grpo, loss_type='cispo'),
  'grpo_advantages': grpo_advantages,
  'sampler': sampler,
  'rloo': rloo,
  'rloo_advantages': rloo_advantages,
  'dpo': dpo,
  'robust': preset(dpo, loss_type='robust'),
  'ipo': preset(dpo, loss_type='ipo'),
  'sft': preset(dpo, loss_type='sft'),
  'kto': kto,
  'simpo': preset(cpo, loss_type='simpo'),
  'cpo': cpo,
  'orpo': orpo,
}
