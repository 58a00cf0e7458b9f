"""A critic: a trunk and a head that says what a text will still earn."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from persona_jax.learn.losses import Batch, value_loss


def init(params: PyTree, features: int) -> PyTree:
  """A critic whose trunk is `params`; it begins with a value of zero.

  The head is one row: the value is its product with a hidden state.
  """
  return {'trunk': params, 'head': {'kernel': jnp.zeros((1, features))}}


def values(
  head: PyTree, hidden: Float[Array, '*B S D'], before: Int[Array, '*B M']
) -> Float[Array, '*B M']:
  """The value before each of M tokens, in float32."""
  at = jnp.take_along_axis(hidden, before[..., None], axis=-2)
  kernel = head['kernel'][0].astype(jnp.float32)
  return jnp.einsum('...d,d->...', at.astype(jnp.float32), kernel)


def read(
  apply: Callable, variables: PyTree, params: PyTree, batch: Batch
) -> Float[Array, 'B M']:
  """The critic's values of a batch."""
  full = {**variables, 'params': params['trunk']}
  hidden, _ = apply(full, batch.tokens, batch.positions)
  return values(params['head'], hidden, batch.before)


def loss(apply: Callable, variables: PyTree, **numbers) -> Callable:
  """`loss_fn(params, batch, weights)` of a critic for `train_step`."""

  def loss_fn(params, batch: Batch, weights):
    return value_loss(
      read(apply, variables, params, batch), batch, weights, **numbers
    )

  return loss_fn
