"""Judges that are asked in words: each line, and what it may contradict."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.tree_util import Partial

from persona_jax import rewards
from persona_jax.dialogue import POLICY
from persona_jax.text.chat import Chat


class Asked(NamedTuple):
  """A line that a judge is asked about."""

  persona: str  # '' where only what was said before counts
  history: tuple[str, ...]  # lines before, of both by turns; '' for no words
  line: str

  @property
  def earlier(self) -> tuple[str, ...]:
    """The lines before that the same speaker said."""
    own = self.history[len(self.history) % 2 :: 2]
    return tuple(line for line in own if line)


# Log-odds that each line is consistent; NaN for no verdict.
Score = Callable[[list[Asked]], Sequence[float]]


def judge(
  score: Score, chat: Chat, *, told: bool = True, who: int = POLICY
) -> Partial:
  """`Dialogue -> Float[B N]`: what `score` says of each line, in words.

  Of the persona and the dialogue so far or, without `told`, of the dialogue
  alone. A line of blanks is not asked about: it has no verdict. See
  `rewards.hosted` on compiled programs.
  """
  pieces = chat.frame()
  around = (len(pieces.before_system), len(pieces.system_to_user))
  words = _Words(score, chat, around if told else None)
  return rewards.hosted(words, who=who)


@dataclasses.dataclass(frozen=True, eq=False)
class _Words:
  """From lines as tokens to scores."""

  score: Score
  chat: Chat
  around: tuple[int, int] | None  # tokens of a prompt around the persona

  def __call__(self, lines: rewards.Lines) -> np.ndarray:
    scores = np.full(lines.spoken.shape, np.nan, np.float32)
    asked = {}
    for row in np.flatnonzero(lines.spoken.any(axis=1)).tolist():
      persona = self._persona(lines, row)
      said = [
        self._decoded(tokens[:length])
        for tokens, length in zip(
          lines.tokens[row], lines.body[row], strict=True
        )
      ]
      for n in np.flatnonzero(lines.spoken[row]).tolist():
        if said[n]:
          asked[row, n] = Asked(persona, tuple(said[:n]), said[n])
    if not asked:
      return scores
    given = list(self.score(list(asked.values())))
    if len(given) != len(asked):
      raise ValueError(
        f'the judge gave {len(given)} scores to {len(asked)} lines; give one '
        'to each, NaN where there is no verdict.'
      )
    for place, score in zip(asked, given, strict=True):
      scores[place] = score
    return scores

  def _persona(self, lines, row) -> str:
    if self.around is None:
      return ''
    before, after = self.around
    end = lines.prompt_length[row] - after
    persona = self._decoded(lines.prompts[row, before : max(end, before)])
    if not persona:
      raise ValueError(
        f'the prompt of dialogue {row} tells of no persona; give it one, or '
        'told=False for a judge of what was said alone.'
      )
    return persona

  def _decoded(self, tokens) -> str:
    return self.chat.decode(tokens.tolist()).strip() if tokens.size else ''
