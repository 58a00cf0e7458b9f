"""An algorithm is a row: an advantage, a loss, what its mean is over.

`ALGORITHMS` learn from what the policy says, `PREFERENCES` from given replies.
Numbers are those of the papers; a config may give others.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

from persona_jax.learn import advantages, losses, preferences

# What `needs` may hold.
REFERENCE, ANCHOR = 'reference', 'anchor'
CRITIC, PROCESS = 'critic', 'process'


class Algorithm(NamedTuple):
  """What tells one policy-gradient algorithm from another.

  A reference is needed where the advantage or the loss has a `kl` above zero.
  """

  advantage: Callable  # Earned -> Advantages
  loss: Callable  # (logprobs, batch, weights, ...) -> scalar, metrics
  weights: Callable  # batch -> [B M], summing to one
  needs: tuple[str, ...] = ()
  group: bool = True  # whether it compares the dialogues of a scenario


class Preference(NamedTuple):
  """What tells one algorithm that learns from given replies from another."""

  loss: Callable  # (logprobs, batch, weights, ...) -> scalar, metrics
  weights: Callable
  replies: int  # of an example: a pair, or one
  needs: tuple[str, ...] = ()


_with = functools.partial

ALGORITHMS = {
  'ppo': Algorithm(
    _with(advantages.gae, kl=0.02),
    _with(losses.clipped_loss, kl=0.0),
    losses.per_token,
    (CRITIC,),
    group=False,
  ),
  'grpo': Algorithm(
    advantages.group_relative,
    losses.clipped_loss,
    losses.per_sequence,
  ),
  'dr_grpo': Algorithm(
    _with(advantages.group_relative, deviation=False),
    _with(losses.clipped_loss, kl=0.0),
    losses.per_slot,
  ),
  'dapo': Algorithm(
    advantages.group_relative,
    _with(losses.clipped_loss, clip_high=0.28, kl=0.0),
    losses.per_token,
  ),
  'delta_belief': Algorithm(
    _with(advantages.group_relative, ended=True, eps=1e-6),
    _with(losses.clipped_loss, clip_high=0.28, dual=3.0, kl=0.0),
    losses.per_token,
  ),
  'gspo': Algorithm(
    advantages.group_relative,
    _with(losses.clipped_loss, clip=3e-4, clip_high=4e-4, lines=True, kl=0.0),
    losses.per_sequence,
  ),
  'cispo': Algorithm(
    advantages.group_relative,
    losses.weighted_loss,
    losses.per_token,
  ),
  'rloo': Algorithm(
    advantages.leave_one_out,
    losses.reinforce_loss,
    losses.per_slot,  # a reply is one action: the sum over its tokens
  ),
  'reinforce++': Algorithm(
    _with(advantages.returns_to_go, kl=0.01),
    _with(losses.clipped_loss, kl=0.0),
    losses.per_token,
    group=False,
  ),
  'reinforce++_baseline': Algorithm(
    _with(advantages.returns_to_go, baseline=True),
    _with(losses.clipped_loss, kl=0.01, kl_kind='k2'),
    losses.per_token,
  ),
  'prime': Algorithm(
    advantages.prime,
    _with(losses.clipped_loss, kl=0.0),
    losses.per_token,
    (PROCESS,),
  ),
}

PREFERENCES = {
  'sft': Preference(losses.imitation_loss, losses.per_token, 1),
  'dpo': Preference(preferences.dpo_loss, losses.per_row, 2, (REFERENCE,)),
  'ipo': Preference(preferences.ipo_loss, losses.per_row, 2, (REFERENCE,)),
  'kto': Preference(
    preferences.kto_loss, losses.per_row, 1, (REFERENCE, ANCHOR)
  ),
  'orpo': Preference(preferences.orpo_loss, losses.per_row, 2),
  'simpo': Preference(preferences.simpo_loss, losses.per_row, 2),
}


def numbered(fn: Callable, numbers: Mapping) -> Callable:
  """`fn` with some of its numbers replaced.

  Raises:
    ValueError: it has no number of that name.
  """
  known = _numbers(fn)
  for name in numbers:
    if name not in known:
      inner = fn.func if isinstance(fn, functools.partial) else fn
      raise ValueError(
        f'{inner.__name__} has no number {name!r}; its numbers are {[*known]}.'
      )
  return functools.partial(fn, **numbers)


def settings(fn: Callable) -> dict:
  """The numbers of `fn` that are given or have a default, by name."""
  return {name: x for name, x in _numbers(fn).items() if x is not None}


def _numbers(fn):
  """What may be replaced of a function: all that is given by name alone."""
  return {
    name: x.default
    for name, x in inspect.signature(fn).parameters.items()
    if x.kind is inspect.Parameter.KEYWORD_ONLY
  }
