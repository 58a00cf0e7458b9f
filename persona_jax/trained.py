"""What of a model is trained: all of it, or an adapter."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from persona_jax import trees
from persona_jax.models import LanguageModel, adapter_file, lora


class Trained(NamedTuple):
  """What is trained, and how it becomes a policy."""

  start: PyTree  # before the first step
  collection: str  # that it is the leaves of: 'params' or 'lora'
  fixed: PyTree  # what else that collection holds
  policy: Callable  # trained -> {'params': ..., 'lora': ...}


def of(model: LanguageModel, config) -> Trained:
  """What `config` trains: an adapter where `rl.adapter` has a rank."""
  return _adapter(model, config) if config.rl.adapter.rank else _whole(model)


def _whole(model: LanguageModel) -> Trained:
  """All parameters."""
  return Trained(
    start=model.variables['params'],
    collection='params',
    fixed={},
    policy=lambda params: {'params': params},
  )


def _adapter(model: LanguageModel, config) -> Trained:
  """A low-rank adapter; the model itself stays as it is."""
  how = config.rl.adapter.to_dict()
  begun = how.pop('start')
  if begun:
    adapter = _begun(model, begun, how['rank'])
  else:
    key = jax.random.fold_in(jax.random.key(config.seed), 5)
    adapter = lora.init(model.config, key, **how)
  start, scales = lora.split(adapter)
  return Trained(
    start=start,
    collection='lora',
    fixed=scales,
    policy=lambda weights: {
      **model.variables,
      'lora': lora.joined(weights, scales),
    },
  )


def _begun(model, path, rank):
  """The adapter of a folder of PEFT, which training goes on from.

  Raises:
    ValueError: its rank is another than the config's.
    CheckpointError: it is damaged, or made for another model.
  """
  adapter = adapter_file.load(path, model)
  [theirs, *_] = {
    x.shape[1]
    for name, x in trees.flatten(adapter).items()
    if name[-2:] == '/a'
  }
  if theirs != rank:
    raise ValueError(
      f'rl.adapter.start={path} has the rank {theirs} and rl.adapter.rank is '
      f'{rank}; give that rank.'
    )
  return adapter
