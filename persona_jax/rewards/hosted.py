"""A judge whose scores come from a Python function on the host."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.tree_util import Partial

from persona_jax.dialogue import POLICY


class Lines(NamedTuple):
  """What the host sees of B dialogues: numpy arrays."""

  prompts: Any  # [B P] of the speaker
  prompt_length: Any  # [B]
  tokens: Any  # [B N T]
  body: Any  # [B N] tokens of each line's text
  spoken: Any  # [B N] lines whose scores count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Host:
  score: Callable = dataclasses.field(metadata={'static': True})
  who: int = dataclasses.field(metadata={'static': True})


def hosted(score: Callable, *, who: int = POLICY) -> Partial:
  """`Dialogue -> Float[B N]`: what `score(Lines) -> [B N]` says on the host.

  NaN means that there is no verdict. The other speaker's lines score zero.
  Build it once: each new function is compiled anew. In a compiled program the
  host is called once for all rows, `vmap`ped ones too, and for all devices, in
  the first process. There `score` must not use JAX, which may wait for it.

  `plainly` shows what it raises in a compiled program.
  """
  return Partial(_hosted, _Host(score, who))


@contextlib.contextmanager
def plainly():
  """Raises what a judge on the host said of its failure, and no more.

  Around compiled programs, which put it at the end of a long error of their
  own, and around whatever waits for their results.

  Raises:
    ValueError: a judge on the host failed.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    _, failed, why = str(error).rpartition(_FAILED)
    if not failed:
      raise
    raise ValueError(why) from None


_FAILED = 'A judge on the host failed: '


def _hosted(host, dialogue):
  lines = Lines(
    prompts=dialogue.prompts[:, host.who],
    prompt_length=dialogue.prompt_length[:, host.who],
    tokens=dialogue.tokens,
    body=dialogue.body,
    spoken=dialogue.spoken(host.who),
  )
  if any(isinstance(x, jax.core.Tracer) for x in lines):
    scores = jax.pure_callback(
      functools.partial(_called, host.score),
      jax.ShapeDtypeStruct(lines.spoken.shape, np.float32),
      lines,
      vmap_method='broadcast_all',
    )
  else:
    scores = jax.device_put(_scored(host.score, jax.device_get(lines)))
  return jnp.where(lines.spoken, scores, 0.0)


def _called(score, lines):
  """`_scored`, in a compiled program: what is raised there is text alone."""
  try:
    return _scored(score, lines)
  except Exception as error:
    why = str(error)
    if not isinstance(error, ValueError):
      why = f'{type(error).__name__}: {why}'
    raise ValueError(f'{_FAILED}{why}') from error


def _scored(score, lines: Lines) -> np.ndarray:
  """The scores of lines; `vmap` puts more axes in front."""
  *batch, count = lines.spoken.shape
  rows, lead = math.prod(batch), len(batch)
  flat = (np.asarray(x) for x in lines)
  flat = Lines(*(x.reshape(rows, *x.shape[lead:]) for x in flat))
  scores = np.asarray(score(flat), np.float32)
  if scores.shape != (rows, count):
    raise ValueError(
      f'the judge on the host gave scores of shape {scores.shape} to {rows} '
      f'dialogues of {count} lines; give one to each line.'
    )
  return scores.reshape(lines.spoken.shape)
