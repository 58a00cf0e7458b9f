"""The steps of a run, each told of when the next has begun.

So the devices need not wait for the host: while the next rollout is on its way
the metrics of the step before are read, written and saved.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from persona_jax import processes
from persona_jax.checkpoint import Checkpoints, Guard
from persona_jax.learn import Batch
from persona_jax.learner import Learner, States
from persona_jax.meter import Learned, Meter
from persona_jax.metrics import Scribe
from persona_jax.models import adapter_file


class Result(NamedTuple):
  """The trained policy, and the metrics of every step."""

  policy: dict  # {'params': ...} and, if one was trained, {'lora': ...}
  log: list[dict]


@runtime_checkable
class Begun(Protocol):
  """What a step learns from, on its way; to begin one waits for no device."""

  before: dict  # what a checkpoint keeps of where it came from
  after: dict  # and when it was learned from

  def wait(self):
    """Waits until it is there."""

  def batch(self, states: States) -> tuple[Batch, jax.Array]:
    """A batch, and whether it may be learned from; both on their way."""

  def told(self) -> dict[str, float]:
    """Numbers of what was learned from.

    Raises:
      FloatingPointError: it may not be learned from.
    """

  def texts(self) -> list[list[str]]:
    """Some of it in words."""


def run(
  learner: Learner,
  begin: Callable[[int, States], Begun],
  folder: Path,
  *,
  resume: Callable[[dict], Any] = lambda record: None,
  advance: Callable,
) -> Result:
  """Takes `rl.steps` steps; continues what `folder` holds.

  Every `rl.save_every`th is saved, and the last. An adapter is also left there
  in PEFT's layout, but where projections are fused (Phi).

  Args:
    learner: what learns.
    begin: what a step learns from, said without waiting for a device.
    folder: of checkpoints and metrics.
    resume: is told what a checkpoint kept of the last step's `Begun.after`.
    advance: is told of each step.

  Raises:
    FloatingPointError: a reward, loss or gradient is not finite.
  """
  states, log, rl = learner.init(), [], learner.rl
  saved = Checkpoints(folder)
  found = saved.restore(states)
  if found is not None:
    states, log = found.state, found.record['log']
    resume(found.record)
    advance(len(log))
  meter, last = learner.meter(), None
  with Guard(saved) as guard, Scribe(folder, log) as scribe:

    def tell(step):
      log.append(step.record)
      scribe.write(log[-1], step.begun.texts())
      if step.due:
        guard.save()
      advance(1)

    for number in range(len(log), rl.steps):
      guard.heed()
      begun = begin(number, states)
      if last is not None:
        tell(last)
      begun.wait()  # till then SIGTERM saves what is there
      guard.heed()
      with guard.changing():
        batch, fine = begun.batch(states)
        states, learned = learner.learn(states, batch, number, fine)
        due = number + 1 == rl.steps or (number + 1) % rl.save_every == 0
        last = _Step(number, begun, learned, learner, meter, log, due)
        guard.offer(states, last.kept, soon=due)
    if last is not None:
      tell(last)
  return Result(_finished(learner, states, folder), log)


@dataclasses.dataclass(eq=False)
class _Step:
  """A step whose numbers may still be on the devices."""

  number: int
  begun: Begun
  learned: Learned
  learner: Learner
  meter: Meter
  log: list[dict]
  due: bool  # it is to be saved
  lock: Any = dataclasses.field(default_factory=threading.Lock)

  @property
  def record(self) -> dict[str, float]:
    """All that is known of it; raises what `told` raises."""
    with self.lock:  # the thread that SIGTERM wakes may ask too
      return self._record

  @functools.cached_property
  def _record(self):
    about = self.begun.told()
    learned = self.learner.told(self.learned, self.number)
    return {
      **about,
      **learned,
      'step': self.number + 1,
      **self.meter.read(self.learned.work),
    }

  def kept(self) -> tuple[int, dict] | None:
    """The step that the states are those of, and its record; None: of none."""
    log = self.log[: self.number]
    try:
      log = [*log, self.record]
    except FloatingPointError:
      if self.learned.changed:
        return None
      return self.number, {'log': log, **self.begun.before}
    return self.number + 1, {'log': log, **self.begun.after}


def _finished(learner, states, folder):
  """The trained policy; an adapter is left for PEFT too."""
  model = learner.model
  policy = learner.trained.policy(states.policy.params)
  if adapter_file.fits(model.config) and 'lora' in policy:
    adapter, place = processes.here(policy['lora']), folder / 'adapter'
    if processes.first() and not place.exists():
      adapter_file.save(adapter, model, place)
  return policy
