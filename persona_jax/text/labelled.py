"""Dialogues with labels of the speaker's lines, to measure judges on."""

from typing import NamedTuple

from persona_jax.text import judged, wording

SUPPORTS, NEUTRAL, CONTRADICTS = judged.RELATIONS
CONSISTENT = 'consistent'  # supports or neutral: it is not known which
LABELS = (*judged.RELATIONS, CONSISTENT)


class Labelled(NamedTuple):
  """A dialogue, the partner first, and labels of some of the speaker's lines.

  Of the speaker's lines there is one label and one kind each.
  """

  persona: str  # '': none is told, and a line is judged by those before it
  task: str
  lines: tuple[str, ...]
  labels: tuple[str, ...]  # of LABELS; '': this line has none
  kinds: tuple[str, ...]  # how it fits or fails: 'implies', 'role_break'
  group: str  # rows of a group are no independent evidence
  where: str  # it stands, for errors

  @property
  def system(self) -> str:
    """What a judge is told of the speaker."""
    return self.persona or wording.NEUTRAL


def written() -> tuple[Labelled, ...]:
  """The test set that was written by hand: `judged.written`."""
  return tuple(
    Labelled(
      persona=row.persona,
      task=row.task,
      lines=row.lines,
      labels=(*[''] * (len(row.lines) // 2 - 1), _label(row)),
      kinds=(*[''] * (len(row.lines) // 2 - 1), row.kind),
      group=str(row.pair),
      where=f'the test set, pair {row.pair}',
    )
    for row in judged.written()
  )


def calibration(count: int, *, seed: int = 0) -> tuple[Labelled, ...]:
  """`count` dialogues of kinds of fact that nothing else is about."""
  rows = (judged.made(i, split='calibration', seed=seed) for i in range(count))
  return tuple(
    Labelled(
      persona=row.persona,
      task=row.task,
      lines=row.lines,
      labels=row.relations,
      kinds=row.kinds,
      group=str(i),
      where=f'the calibration set, dialogue {i}',
    )
    for i, row in enumerate(rows)
  )


def _label(row: judged.Written) -> str:
  if not row.fits:
    return CONTRADICTS
  return {'neutral': NEUTRAL, 'states': SUPPORTS, 'implies': SUPPORTS}.get(
    row.kind, CONSISTENT
  )
