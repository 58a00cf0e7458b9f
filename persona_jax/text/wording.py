"""What judges and openings say, as text."""

from typing import NamedTuple

CUE = 'Hello. Please begin the conversation.'  # what an opener answers
NEUTRAL = 'You are a person who chats with a stranger.'
ANY_LINE = 'Tell me something about yourself.'  # what any line may answer
ANSWERS = ('Yes', 'Maybe', 'No')  # of a trained judge: does the line fit?


class Ask(NamedTuple):
  """A judge's question around two texts, put in two orders."""

  head: str
  middle: str
  tails: tuple[str, str]
  good: tuple[tuple[str, ...], tuple[str, ...]]  # answers, by tail
  bad: tuple[tuple[str, ...], tuple[str, ...]]


_YES, _NO = ('Yes', ' Yes', 'yes'), ('No', ' No', 'no')

PROMPT_TO_LINE = Ask(
  head='A speaker was given this description: "',
  middle='"\nThe speaker then said: "',
  tails=(
    '"\nDoes what the speaker said fit the description? Answer Yes or No.',
    '"\nDoes what the speaker said contradict the description? '
    'Answer No or Yes.',
  ),
  good=(_YES, _NO),
  bad=(_NO, _YES),
)

LINE_TO_LINE = Ask(
  head='Somebody said: "',
  middle='"\nLater the same person said: "',
  tails=(
    '"\nCan both be true of one person? Answer Yes or No.',
    '"\nDo the two contradict each other? Answer No or Yes.',
  ),
  good=(_YES, _NO),
  bad=(_NO, _YES),
)
