"""A policy of a training run as a folder that others read."""

import contextlib
import dataclasses
from pathlib import Path

import jax

from persona_jax import judge, lab, models, trained
from persona_jax import workdir as owned
from persona_jax.checkpoint import Checkpoints
from persona_jax.models import adapter_file, lora, shards


def run(
  workdir: str | Path,
  to: str | Path,
  *,
  step: int = 0,
  policy: str = 'rl',
  merge: bool = False,
  dtype: str = '',
) -> int:
  """Writes a policy of `workdir` into the folder `to`; returns its step.

  All parameters go into a Hugging Face folder, in the dtype that they were
  trained in; an adapter into one of PEFT, or, with `merge`, into its model.

  Args:
    workdir: of `study` or `train`, which may be running.
    to: a folder that does not exist, or is empty.
    step: one that is on disk; 0: the newest.
    policy: a folder of `workdir/policies`.
    merge: whether an adapter is added to the weights of its model.
    dtype: of what is written; '': as it was trained.

  Raises:
    ValueError: there is no such workdir, policy, step or dtype, or `to` is in
      use.
  """
  if dtype and dtype not in shards.DTYPES:
    raise ValueError(
      f'--dtype={dtype} is not written; give one of {", ".join(shards.DTYPES)}.'
    )
  workdir, to = Path(workdir), Path(to)
  config = owned.read(workdir)
  folder = _policy(workdir, policy)
  _check_free(to)
  with contextlib.closing(Checkpoints(folder)) as saved:
    step = _step(saved, step)
    model = _model(config)
    what = trained.of(model, config)
    _check_layout(model, what, merge)
    params = _read(saved, step, what.start)
  if to.exists():
    to.rmdir()
  _write(model, what.policy(params), to, merge, dtype)
  if 'judge' in config and not merge:
    judge.sign(to, lab.chat_of(model, config))
  return step


def _policy(workdir, name):
  folder = workdir / 'policies' / name
  there = sorted(x.name for x in folder.parent.glob('*') if x.is_dir())
  if name not in there:
    raise ValueError(
      f'{workdir} has no policy {name!r}; those there are {there}. Train it '
      f'first: persona-jax train --workdir={workdir}.'
    )
  return folder


def _check_free(to):
  if to.exists() and (not to.is_dir() or any(to.iterdir())):
    raise ValueError(
      f'{to} exists and is not empty; name another folder with --to, or delete '
      'it.'
    )


def _step(saved, step):
  steps = saved.steps
  if not steps:
    raise ValueError(
      f'{saved.folder} has no checkpoint yet; wait for the first, which comes '
      'after rl.save_every steps.'
    )
  if step and step not in steps:
    raise ValueError(
      f'{saved.folder} has no step {step}; the steps there are {steps}.'
    )
  return step or steps[0]


def _model(config) -> models.LanguageModel:
  """What was trained, as it was before; on one device, whatever the mesh."""
  return models.load(
    config.model,
    dtype=config.dtype if config.rl.adapter.rank else 'float32',
    context=config.context or None,
    inert=tuple(config.inert.split(',')),
  )


def _check_layout(model, what, merge):
  if what.collection == 'params' and merge:
    raise ValueError(
      'all parameters were trained, and there is no adapter to merge; leave '
      'out --merge.'
    )
  fits = adapter_file.fits(model.config)
  if what.collection == 'lora' and not (merge or fits):
    raise ValueError(
      f"{model.name} has fused projections, and PEFT's layout no place for "
      'their adapters; export the whole model with --merge.'
    )


def _read(saved, step, start):
  """The policy's parameters, on the host, and not what trained them."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), start)
  found = saved.part(step, {'policy': {'params': shapes}})
  return found['policy']['params']


def _write(model, policy, to, merge, dtype):
  if 'lora' in policy and merge:
    policy = lora.merge(policy)
  cast = lambda x: x.astype(dtype or x.dtype)
  if 'lora' in policy:
    weights, scales = lora.split(policy['lora'])
    weights = jax.tree.map(cast, weights)
    adapter_file.save(lora.joined(weights, scales), model, to)
    return
  policy = jax.tree.map(cast, policy)
  models.save(dataclasses.replace(model, variables=policy), to)
