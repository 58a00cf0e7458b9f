"""Shape annotations: jaxtyping's names, or plain stand-ins without it.

`persona_jax.rewards` must import with jax alone; the tests install jaxtyping
and check every annotation.
"""

import jax

try:
  from jaxtyping import Array, Bool, Float, Int, Key, PyTree
except ImportError:

  class _Any:
    """`Float[Array, 'B N']` without a checker is just an array."""

    def __class_getitem__(cls, item):
      return jax.Array

  Array = jax.Array
  Bool = Float = Int = Key = PyTree = _Any

__all__ = ['Array', 'Bool', 'Float', 'Int', 'Key', 'PyTree']
