"""Train states on disk, through orbax; the newest whole one is restored."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
  """The checkpoints of one run; keeps the newest only."""

  def __init__(self, folder: Path):
    options = ocp.CheckpointManagerOptions(
      max_to_keep=1, enable_async_checkpointing=False
    )
    self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

  @property
  def latest(self) -> int | None:
    """The step of the newest checkpoint; None where there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, log: list[dict]):
    """Writes `state` and the metrics so far."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), log=ocp.args.JsonSave(log)
      ),
    )
    self._manager.wait_until_finished()

  def restore(self, like: Any) -> tuple[Any, list[dict]]:
    """The newest state, in the shapes and places of `like`, and metrics."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    found = self._manager.restore(
      self.latest,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), log=ocp.args.JsonRestore()
      ),
    )
    return found.state, found.log

  def close(self):
    """Waits for what is being written."""
    self._manager.close()
