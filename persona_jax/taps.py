"""Named places in a Flax model where activations are read and edited.

`edited` and `keep` take an `apply` and give an `apply`. Both enter
`nn.intercept_methods` inside the function that they return, so that `jax.jit`
traces it: a context around an already compiled function is silently ignored.

The outermost transformation acts last: `keep(edited(apply, cap), read)` reads
capped activations, `edited(keep(apply, read), cap)` reads them before the cap.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

ACTS = 'acts'  # the collection that `keep` fills


class Tap(nn.Module):
  """Returns its input: a place called `name`, found once in every layer.

  `positions` [B T] tells an edit where in the text each token of its input
  stands; -1 is padding. What passes has the tap's name for
  `jax.checkpoint_policies`, as it is before any edit.
  """

  positions: Any = None

  def __call__(self, x):
    return checkpoint_name(x, self.name)


def edited(apply: Callable, edit: Callable, at: str = 'resid') -> Callable:
  """`apply`, with `edit(tap, x) -> x` at every tap called `at`.

  An edit reads this layer's arrays from the variable collection `edits`
  (`tap.get_variable('edits', ...)`): new values never recompile.

  Raises:
    ValueError: `apply` is jitted, so that edits might not reach its program;
      when called, if no tap that it passes is called `at`.
  """
  if hasattr(apply, 'lower'):
    raise ValueError(f'{apply} is jitted; edit it first and jit the result.')

  def apply_edited(*args, **kwargs):
    found = False

    def interceptor(next_fun, args, kwargs, context):
      nonlocal found
      x = next_fun(*args, **kwargs)
      if not _is_tap(context.module, at):
        return x
      found = True
      return edit(context.module, x)

    with nn.intercept_methods(interceptor):
      result = apply(*args, **kwargs)
    if not found:
      raise ValueError(
        f'no tap that this call passes is named {at!r}; see the taps of the '
        "model (the weights of attention are there with attend='xla')."
      )
    return result

  return apply_edited


def keep(apply: Callable, read: Callable, at: str = 'resid') -> Callable:
  """`apply`, which also returns `read(tap, x)` of every tap called `at`.

  The result is `(result of apply, kept)`; `kept` has a leading layer axis, so
  `read` should reduce: pool, project, or count, never return `[B, S, D]`.

  Raises:
    ValueError: as `edited`.
  """

  def sow(tap, x):
    tap.sow(ACTS, 'kept', read(tap, x), reduce_fn=lambda _, new: new)
    return x

  sowing = edited(apply, sow, at)

  def apply_keeping(*args, **kwargs):
    result, state = sowing(*args, mutable=[ACTS], **kwargs)
    return result, _stacked(state[ACTS], at)

  return apply_keeping


def _is_tap(module, at):
  return isinstance(module, Tap) and module.name == at


def _stacked(acts, at):
  if 'layers' in acts:
    return _find(acts['layers'], at)['kept']
  layers = [_find(acts[f'layers_{i}'], at)['kept'] for i in range(len(acts))]
  return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def _find(tree, at):
  if at in tree:
    return tree[at]
  for below in tree.values():
    if isinstance(below, dict) and (found := _find(below, at)) is not None:
      return found
  return None
