"""What judges are asked: no taste for a word or a place may show."""

from collections import Counter

import pytest

from persona_jax.text import wording

ASKS = (wording.PROMPT_TO_LINE, wording.LINE_TO_LINE)


@pytest.mark.parametrize('ask', ASKS)
def test_wordings_swap_what_is_said_and_what_is_said_first(ask):
  counts = Counter()
  for tail, good, bad in wording.tails(ask):
    assert set(good).isdisjoint(bad)
    assert tail.startswith('"\n') and tail.endswith('.')
    first, second = tail[:-1].split(' Answer ')[1].split(' or ')
    assert {first, second} == set(wording.SAID)
    counts[good[0], first] += 1
  assert len(counts) == 4 and len(set(counts.values())) == 1


@pytest.mark.parametrize('ask', ASKS)
def test_wordings_are_several(ask):
  words = [question.words for question in ask.questions]
  assert len(set(words)) == len(words) >= 4
  assert all(text.endswith('?') for text in words)
