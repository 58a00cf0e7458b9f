"""What a judge on the host is asked, in words, and where its scores go."""

import dataclasses
import functools

import hosted_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import asked, data, rewards
from persona_jax.asked import Asked
from persona_jax.dialogue import PARTNER, POLICY
from persona_jax.text.chat import Chat

CHATML = (
  '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n'
  '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
ADA = 'You are Ada, 31, who bakes: no "tea".'
LONG = 'I bake. ' * 500
LINES = (  # of four dialogues: a cue, a line, a question, a line
  ('Hello', 'I am Ada. 🍞', 'Wo wohnst du?', 'In Köln, 你好.'),
  ('Hi', ' \n', 'And?', LONG),
  ('Hey', '', '', ''),
  ('Ho', 'dead', 'dead', 'dead'),
)
jitted = jax.jit(lambda judge, dialogue: judge(dialogue))
both = pytest.mark.parametrize(
  'run', [jitted, lambda judge, d: judge(d)], ids=['jit', 'plain']
)


@functools.cache
def chat():
  return Chat(hosted_test.chat().tokenizer, CHATML)


def dialogue(lines=LINES, persona=ADA):
  prompt = data.padded([chat().prompt_ids(persona)] * len(lines))
  made = data.spoken(chat(), lines, prompt)
  return dataclasses.replace(made, live=jnp.arange(len(lines)) != 3)


def recorder(seen, score=lambda line: float(len(line.line))):
  def scores(lines):
    seen.append(lines)
    return [score(line) for line in lines]

  return scores


@both
def test_a_judge_is_asked_about_the_speakers_lines_alone(run):
  seen = []
  judge = asked.judge(recorder(seen), chat())
  scores = np.asarray(run(judge, dialogue()))
  (lines,) = seen
  assert lines == [
    Asked(ADA, ('Hello',), 'I am Ada. 🍞'),
    Asked(ADA, ('Hello', 'I am Ada. 🍞', 'Wo wohnst du?'), 'In Köln, 你好.'),
    Asked(ADA, ('Hi', '', 'And?'), LONG.strip()),
  ]
  nan, own = np.nan, [len(x.line) for x in lines]
  want = np.zeros((4, 4))
  want[0, 1::2] = own[:2]
  want[1, 1::2] = nan, own[2]  # blanks are a line without a verdict
  np.testing.assert_array_equal(scores, want)


def test_the_partners_lines_may_be_judged():
  seen = []
  scores = asked.judge(recorder(seen), chat(), who=PARTNER)(dialogue())
  assert [x.line for x in seen[0]] == [
    *('Hello', 'Wo wohnst du?', 'Hi', 'And?', 'Hey'),
  ]
  assert seen[0][1].history == ('Hello', 'I am Ada. 🍞')
  assert seen[0][1].earlier == ('Hello',)
  np.testing.assert_array_equal(
    np.asarray(scores) > 0,
    np.isin(np.arange(16).reshape(4, 4), [0, 2, 4, 6, 8]),
  )


def test_without_a_persona_what_was_said_counts():
  seen = []
  said = dialogue(persona='')  # prompts of the template alone
  asked.judge(recorder(seen), chat(), told=False)(said)
  assert {x.persona for x in seen[0]} == {''}
  assert [x.earlier for x in seen[0]] == [(), ('I am Ada. 🍞',), ()]


@pytest.mark.parametrize('persona', ['', '  '])
def test_a_judge_of_personas_needs_one(persona):
  judge = asked.judge(recorder([]), chat())
  with pytest.raises(ValueError, match='dialogue 0 tells of no persona; give'):
    judge(dialogue(persona=persona))


def test_nothing_to_judge_asks_nobody():
  seen = []
  judge = asked.judge(recorder(seen), chat())
  silent = dialogue([('Hello', '', '', ''), ('Hi', '  ', '', '')])
  scores = np.asarray(judge(silent))
  assert not seen and np.isnan(scores[1, 1]) and not np.any(scores[0])


def test_words_that_spell_control_tokens_are_seen():
  seen = []
  said = dialogue([('Hello', '<|im_end|> Hi', '', '')])
  asked.judge(recorder(seen), chat())(said)
  assert seen[0][0].line == '<|im_end|> Hi'


def test_no_verdict_goes_through_to_the_reward():
  odds = iter([2.0, np.nan, -1.0])
  judge = asked.judge(recorder([], lambda line: next(odds)), chat())
  reward = rewards.prompt_to_line(judge)
  got = np.asarray(jitted(reward, dialogue()))
  nan = np.nan
  want = [[0, 0.880797, 0, nan], [0, nan, 0, 0.268941], [0] * 4, [0] * 4]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  spoken = np.asarray(dialogue().spoken(POLICY))
  assert np.isfinite(got[~spoken]).all()


@both
@pytest.mark.parametrize('count', [2, 4])
def test_a_judge_gives_one_score_to_each_line(run, count):
  judge = asked.judge(lambda lines: [0.0] * count, chat())
  with pytest.raises(ValueError, match=f'^the judge gave {count} scores to 3'):
    with rewards.plainly():
      run(judge, dialogue()).block_until_ready()
