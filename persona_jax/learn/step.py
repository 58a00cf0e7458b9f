"""One update, for any algorithm, on any mesh."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, PyTree

from persona_jax import masked, trees
from persona_jax.learn.logprobs import Scores, token_scores
from persona_jax.learn.losses import Batch


@struct.dataclass
class TrainState:
  """What a step changes."""

  step: PyTree  # an int32 scalar; in trees of shapes or places, one of those
  params: PyTree
  opt_state: PyTree


def init_state(params: PyTree, optimizer) -> TrainState:
  """The state before the first step."""
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def policy_loss(
  apply,
  unembed,
  loss,
  variables: PyTree,
  *,
  temperature: float = 1.0,
  held: int = 1 << 24,
  entropy: float = 0.0,
  trained: str = 'params',
) -> Callable:
  """`loss_fn(params, batch, weights)` of a policy with `apply`.

  `variables` holds what is not trained, such as `edits`: the learner applies
  the caps that the rollout applied, or its ratios would be wrong. Large ones
  must be arguments of the jitted step, or they become constants of it.

  `trained` names the collection that `params` are the leaves of; what else it
  holds (the scales of `lora`, a frozen part of a model) is in `variables`.
  `entropy` is the weight of a bonus, the mean entropy of the tokens.
  """

  def loss_fn(params, batch: Batch, weights):
    full = _over(variables, {trained: params})
    found = scores(
      apply, unembed, full, batch, temperature=temperature, held=held
    )
    value, metrics = loss(found.logprobs, batch, weights)
    if weights.shape == batch.mask.shape:
      mean = masked.total(weights * found.entropy, batch.mask)
      value, metrics = (
        value - entropy * mean,
        metrics | {'policy/entropy': mean},
      )
    return value, metrics

  return loss_fn


def scores(apply, unembed, variables: PyTree, batch: Batch, **how) -> Scores:
  """What a model says of the batch's actions, `[*B M]`; see `token_scores`."""
  flat = lambda x: x.reshape(-1, x.shape[-1])
  hidden, _ = apply(variables, flat(batch.tokens), flat(batch.positions))
  found = token_scores(
    unembed, variables, hidden, flat(batch.before), flat(batch.actions), **how
  )
  return Scores(*[x.reshape(batch.actions.shape) for x in found])


def train_step(
  state: TrainState,
  batch: Batch,
  weights,
  *,
  loss_fn: Callable,
  optimizer,
  microbatches: int = 1,
  group: int = 1,
  allowed: Bool[Array, ''] | bool = True,
) -> tuple[TrainState, dict]:
  """One update; `loss_fn(params, batch, weights)` gives (loss, metrics).

  Microbatches are read one after the other; `weights` sum to one over the
  whole batch, so their sums are what one batch gives. Each holds whole groups
  of `group` neighbouring rows. Where the loss, a gradient or the update is not
  finite the state stays as it was, and `step/culprit` says where (`culprit`);
  it also stays where nothing is `allowed`.

  Raises:
    ValueError: the batch does not divide into `microbatches`.
  """
  grads, metrics = _gradient(
    state.params, batch, weights, loss_fn, microbatches, group
  )
  updates, _ = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics |= {
    'norm/grads': optax.tree.norm(grads),
    'norm/updates': optax.tree.norm(updates),
  }
  flags = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(grads)]
  ends = [jnp.isfinite(metrics[x]) for x in ('loss', 'norm/updates')]
  wrong = ~jnp.stack([ends[0], *flags, ends[1]])
  fine = ~jnp.any(wrong) & allowed
  # The moments are computed once more, after all that reads the old ones: so
  # they are written over them, where XLA would copy them first.
  old, same = jax.lax.optimization_barrier((state.opt_state, grads))
  _, opt_state = optimizer.update(same, old, state.params)
  new = TrainState(state.step + 1, params, opt_state)
  state = jax.tree.map(lambda new, old: jnp.where(fine, new, old), new, state)
  metrics['step/culprit'] = jnp.where(jnp.any(wrong), jnp.argmax(wrong), -1)
  return state, metrics


def culprit(number: int, state: PyTree) -> str | None:
  """What `step/culprit` means: None, the loss, a gradient, or the update."""
  if number < 0:
    return None
  grads = [f'the gradient of {x}' for x in trees.flatten(state.params)]
  return ['the loss', *grads, 'the update'][number]


def clip(most: float) -> optax.GradientTransformation:
  """Gradients whose norm is at most `most`.

  optax's own divides first; what is divided XLA keeps as a copy of them all.
  """

  def update(grads, state, params=None):
    del params
    factor = jnp.minimum(1.0, most / optax.tree.norm(grads))
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), grads), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _over(below, above):
  """`below` with the leaves of `above` in or over it."""
  if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
    return above
  return {
    **below,
    **{k: _over(below.get(k), v) for k, v in above.items()},
  }


def _gradient(params, batch, weights, loss_fn, microbatches, group):
  value = jax.value_and_grad(loss_fn, has_aux=True)
  if microbatches == 1:
    (loss, metrics), grads = value(params, batch, weights)
    return grads, {'loss': loss, **metrics}
  rows = weights.shape[0]
  if rows % (microbatches * group):
    raise ValueError(
      f'a batch of {rows} does not divide into {microbatches} microbatches'
      + (f' of groups of {group}.' if group > 1 else '.')
    )
  leaves, structure = jax.tree.flatten((batch, weights))

  def parts(x):
    # Group g goes to part g % microbatches, so that each part spans the mesh.
    apart = x.reshape(-1, microbatches, group, *x.shape[1:])
    return jnp.moveaxis(apart, 1, 0).reshape(microbatches, -1, *x.shape[1:])

  split = [parts(x) for x in leaves]

  def add(total, part):
    (loss, metrics), grads = value(params, *structure.unflatten(part))
    return jax.tree.map(jnp.add, total, (grads, {'loss': loss, **metrics})), ()

  first = structure.unflatten([x[0] for x in split])
  (shape, aux), grads = jax.eval_shape(value, params, *first)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), (grads, {'loss': shape, **aux})
  )
  return jax.lax.scan(add, zeros, split)[0]
