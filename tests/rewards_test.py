"""Judges against slow references, and what consistency makes of scores."""

import dataclasses
import functools

import chex
import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from persona_jax import dialogue as dialogues
from persona_jax import rewards, trees
from persona_jax.dialogue import PARTNER, POLICY, Dialogue, Frame
from persona_jax.learn import logprobs
from persona_jax.models import cache, decoder
from persona_jax.rewards import consistency

VOCAB, B, N, T = fakes.CONFIG.vocab, 3, 6, 6
FRAME = Frame(jnp.array([291, 292, 293]), jnp.array([294, 295]))
NEUTRAL = jnp.array([280, 281, 282, 283])
CUE = jnp.array([270, 271])
APPLY, UNEMBED = decoder.functions(fakes.CONFIG)
MEMORY = functools.partial(cache.empty_stacked, fakes.CONFIG)
THREE = logprobs.only(UNEMBED, (9, 5, 7))


quickly = functools.partial(  # most of the time goes into compiling
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)


@quickly
def evaluate(reward, dialogue):
  return reward(dialogue)


@pytest.fixture(scope='module')
def weights():
  return fakes.variables(fakes.CONFIG)


@pytest.fixture(scope='module')
def dialogue():
  """Ragged lines and prompts; row 1 stops its lines, row 2 is dead."""
  rng = np.random.default_rng(0)
  stopped = np.zeros((B, N), bool)
  stopped[1] = True
  length = rng.integers(3, T + 1, (B, N))
  length[0, 3] = 0  # an empty line
  return Dialogue(
    tokens=jnp.asarray(rng.integers(0, 260, (B, N, T))),
    length=jnp.asarray(length),
    stopped=jnp.asarray(stopped),
    logprobs=jnp.zeros((B, N, T)),
    raw_logprobs=jnp.zeros((B, N, T)),
    who=jnp.arange(N) % 2,
    prompts=jnp.asarray(rng.integers(0, 260, (B, 2, 7))),
    prompt_length=jnp.array([[7, 5], [4, 7], [6, 6]]),
    scenario=jnp.arange(B),
    sample=jnp.zeros(B, int),
    live=jnp.array([True, True, False]),
  )


def likelihood_judge(weights, who=POLICY):
  return rewards.Likelihood(
    weights, FRAME, NEUTRAL, CUE, apply=APPLY, unembed=UNEMBED, who=who
  )


def verdict_judge(weights, who=POLICY):
  questions = (
    rewards.Question(jnp.array([265, 266]), jnp.array([5, 6]), jnp.array([7])),
    rewards.Question(jnp.array([267]), jnp.array([7]), jnp.array([5, 6, 8])),
  )
  return rewards.Verdict(
    weights,
    head=jnp.array([261, 262]),
    middle=jnp.array([263]),
    questions=questions,
    strip=(1, 2),
    memory=MEMORY,
    apply=APPLY,
    unembed=UNEMBED,
    who=who,
  )


def trained_judge(weights, who=POLICY):
  return rewards.Trained(
    weights,
    FRAME,
    neutral=NEUTRAL,
    apply=APPLY,
    unembed=THREE,
    who=who,
  )


JUDGES = {
  'trained': (rewards.trained, trained_judge),
  'among_lines': (rewards.among_lines, trained_judge),
  'likelihood': (rewards.likelihood, likelihood_judge),
  'verdict': (rewards.verdict, verdict_judge),
  'pair_likelihood': (rewards.pair_likelihood, likelihood_judge),
  'pair_verdict': (rewards.pair_verdict, verdict_judge),
}


# Slow references: python lists, one text a pass, no padding.


@quickly
def table(weights, tokens):
  hidden, _ = APPLY(weights, tokens, jnp.arange(tokens.size)[None], None)
  return jax.nn.log_softmax(UNEMBED(weights, hidden)[0])


def forward(weights, ids):
  """log softmax `[S V]` of the tokens that follow each of `ids`.

  Real tokens come after them, so that all texts share a compiled pass.
  """
  after = [1] * (80 - len(ids))
  return np.asarray(table(weights, jnp.array([ids + after])))[: len(ids)]


def mean_logprob(weights, context, line):
  logprobs = forward(weights, context + line)
  at = len(context) - 1
  return np.mean([logprobs[at + t, token] for t, token in enumerate(line)])


def body(dialogue, b, n):
  end = int(dialogue.length[b, n]) - int(dialogue.stopped[b, n])
  return dialogue.tokens[b, n, :end].tolist()


def prompt(dialogue, b, who):
  return dialogue.prompts[b, who, : dialogue.prompt_length[b, who]].tolist()


def history(dialogue, b, n, who, begin):
  """All that `who` has read when it begins line n."""
  own, heard = FRAME.heard_to_own.tolist(), FRAME.own_to_heard.tolist()
  ids = list(begin)
  for i in range(n):
    if i % 2 == who:
      ids += own + body(dialogue, b, i)
    else:  # the opening of the other follows the prompt at once
      ids += (heard if i else []) + body(dialogue, b, i)
  return ids + own


def lines_of(dialogue, who):
  for b in range(B):
    for n in range(who, N, 2):
      if dialogue.live[b] and body(dialogue, b, n):
        yield b, n


def slow_likelihood(weights, dialogue, who):
  out = np.zeros((B, N))
  for b, n in lines_of(dialogue, who):
    line = body(dialogue, b, n)
    told, untold = (
      mean_logprob(weights, history(dialogue, b, n, who, begin), line)
      for begin in (prompt(dialogue, b, who), NEUTRAL.tolist())
    )
    out[b, n] = told - untold
  return out


def slow_pair_likelihood(weights, dialogue, who):
  own, heard = FRAME.heard_to_own.tolist(), FRAME.own_to_heard.tolist()
  cue, out = CUE.tolist(), np.zeros((B, N, N))
  for b, n in lines_of(dialogue, who):
    for a, i in lines_of(dialogue, who):
      if a == b and i < n:
        alone = NEUTRAL.tolist() + cue + own
        after = alone + body(dialogue, b, i) + heard + cue + own
        line = body(dialogue, b, n)
        out[b, n, i] = mean_logprob(weights, after, line)
        out[b, n, i] -= mean_logprob(weights, alone, line)
  return out


def slow_ask(weights, judge, first, second):
  scores = []
  for question in judge.questions:
    ids = judge.head.tolist() + first + judge.middle.tolist() + second
    last = np.exp(forward(weights, ids + question.tail.tolist())[-1])
    good, bad = last[question.good].sum(), last[question.bad].sum()
    scores.append(np.log(good) - np.log(bad))
  return np.mean(scores)


def slow_verdict(weights, dialogue, who):
  out, judge = np.zeros((B, N)), verdict_judge(weights, who)
  for b, n in lines_of(dialogue, who):
    persona = prompt(dialogue, b, who)[1:-2]
    out[b, n] = slow_ask(weights, judge, persona, body(dialogue, b, n))
  return out


def slow_pair_verdict(weights, dialogue, who):
  out, judge = np.zeros((B, N, N)), verdict_judge(weights, who)
  for b, n in lines_of(dialogue, who):
    for a, i in lines_of(dialogue, who):
      if a == b and i < n:
        first, second = body(dialogue, b, i), body(dialogue, b, n)
        out[b, n, i] = slow_ask(weights, judge, first, second)
  return out


def slow_trained(weights, dialogue, who, begin=None):
  out = np.zeros((B, N))
  for b, n in lines_of(dialogue, who):
    told = prompt(dialogue, b, who) if begin is None else begin
    ids = history(dialogue, b, n, who, told) + body(dialogue, b, n)
    ids.append(int(FRAME.own_to_heard[0]))
    yes, maybe, no = np.exp(forward(weights, ids)[-1][[9, 5, 7]])
    out[b, n] = np.log((yes + maybe) / no)
  return out


def slow_among_lines(weights, dialogue, who):
  return slow_trained(weights, dialogue, who, NEUTRAL.tolist())


@pytest.mark.parametrize(
  ('name', 'who'),
  [
    *[(name, POLICY) for name in JUDGES],
    ('trained', PARTNER),
    ('likelihood', PARTNER),
    ('pair_verdict', PARTNER),
  ],
)
def test_a_judge_is_its_slow_reference(weights, dialogue, name, who):
  score, judge = JUDGES[name]
  fast = evaluate(score(judge(weights, who)), dialogue)
  slow = globals()[f'slow_{name}'](weights, dialogue, who)
  assert np.abs(slow).max() > 0.1  # else anything would pass
  np.testing.assert_allclose(fast, slow, atol=2e-5)


@pytest.mark.parametrize('name', JUDGES)
def test_padding_and_dead_rows_say_nothing(weights, dialogue, name):
  score, judge = JUDGES[name]
  score = score(judge(weights))
  clean = evaluate(score, dialogue)
  within = np.arange(T) < np.asarray(dialogue.body)[..., None]
  inside = np.arange(7) < np.asarray(dialogue.prompt_length)[..., None]
  dirty = dataclasses.replace(
    dialogue,
    tokens=jnp.where(within, dialogue.tokens, VOCAB - 1),
    prompts=jnp.where(inside, dialogue.prompts, VOCAB - 1),
  )
  np.testing.assert_allclose(evaluate(score, dirty), clean, atol=1e-6)
  assert not np.any(clean[2]) and not np.any(clean[:, ::2])
  assert not np.any(clean[0, 3])  # a line without tokens
  if clean.ndim == 3:
    assert not np.any(clean[:, :, ::2])
    assert not np.any(np.triu(clean))


def test_unstacked_judge_weights_give_the_same(weights, dialogue):
  plain = evaluate(rewards.likelihood(likelihood_judge(weights)), dialogue)
  flat = likelihood_judge(trees.unstack_layers(weights))
  again = evaluate(rewards.likelihood(flat), dialogue)
  np.testing.assert_allclose(again, plain, atol=1e-5)


def test_a_trained_judge_hears_the_last_line_of_a_dialogue_that_ended(weights):
  whole = fakes.made_up(batch=2, lines=6, size=T)
  blank = jnp.arange(6)[None] >= jnp.array([[4], [6]])  # row 0 said four
  ended = dataclasses.replace(whole, length=jnp.where(blank, 0, whole.length))
  score = rewards.trained(trained_judge(weights))
  want = np.array(evaluate(score, whole))
  want[0, 5] = 0
  np.testing.assert_allclose(evaluate(score, ended), want, atol=1e-5)


def test_relations_are_chances_of_three(weights, dialogue):
  judge = trained_judge(weights)
  told = quickly(rewards.relations)(judge, dialogue)
  assert told.shape == (B, N, 3)
  np.testing.assert_allclose(np.exp(told).sum(-1), 1, atol=1e-5)
  yes, maybe, no = np.exp(np.moveaxis(told, -1, 0))
  odds = evaluate(rewards.trained(judge), dialogue)
  for b, n in lines_of(dialogue, POLICY):
    np.testing.assert_allclose(
      odds[b, n], np.log((yes + maybe) / no)[b, n], atol=1e-4
    )


@pytest.mark.parametrize('name', ['likelihood', 'trained'])
def test_a_judge_alone_with_a_line_is_its_slow_reference(
  weights, dialogue, name
):
  score, judge = JUDGES[name]
  fast = evaluate(rewards.alone(score(judge(weights)), CUE), dialogue)
  out, heard = np.zeros((B, N)), FRAME.own_to_heard.tolist()
  for b, n in lines_of(dialogue, POLICY):
    line = body(dialogue, b, n)
    told, untold = (
      begin + CUE.tolist() + FRAME.heard_to_own.tolist()
      for begin in (prompt(dialogue, b, POLICY), NEUTRAL.tolist())
    )
    if name == 'likelihood':
      out[b, n] = mean_logprob(weights, told, line)
      out[b, n] -= mean_logprob(weights, untold, line)
    else:
      last = forward(weights, told + line + heard[:1])[-1]
      yes, maybe, no = np.exp(last[[9, 5, 7]])
      out[b, n] = np.log((yes + maybe) / no)
  assert np.abs(out).max() > 0.1
  np.testing.assert_allclose(fast, out, atol=2e-5)


@pytest.mark.parametrize('name', ['likelihood', 'trained', 'among_lines'])
def test_slots_that_are_left_out_were_empty(weights, dialogue, name):
  score, judge = JUDGES[name]
  whole = judge(weights)
  view = dialogues.view(dialogue, POLICY, FRAME)
  used = int(np.max(view.positions)) + 1 + FRAME.own_to_heard.size + 1
  assert used < view.positions.shape[1]
  short = dataclasses.replace(whole, slots=used)
  want = evaluate(score(whole), dialogue)
  np.testing.assert_allclose(evaluate(score(short), dialogue), want, atol=1e-5)


# Consistency.

SCORES = np.zeros((1, 7, 7), np.float32)
SCORES[0, 3, 1] = 2.0
SCORES[0, 5, 1] = -1.0
SCORES[0, 5, 3] = 1.0
SCORES[0, 5, 4] = -9.0  # the other's line
SCORES[0, 3, 5] = -9.0  # a later line


def toy_dialogue(lines=7, batch=1, live=None):
  shape = (batch, lines)
  return Dialogue(
    tokens=jnp.ones((*shape, 2), int),
    length=jnp.full(shape, 2),
    stopped=jnp.zeros(shape, bool),
    logprobs=jnp.zeros((*shape, 2)),
    raw_logprobs=jnp.zeros((*shape, 2)),
    who=jnp.arange(lines) % 2,
    prompts=jnp.ones((batch, 2, 3), int),
    prompt_length=jnp.full((batch, 2), 3),
    scenario=jnp.arange(batch),
    sample=jnp.zeros(batch, int),
    live=jnp.ones(batch, bool) if live is None else jnp.asarray(live),
  )


def says(scores):
  """A judge with a fixed opinion."""
  return Partial(lambda scores, dialogue: scores, jnp.asarray(scores))


def test_prompt_to_line_by_hand():
  scores = jnp.array([[9.0, 0.0, 9.0, 1.0, 9.0, -2.0, 9.0]])
  reward = rewards.prompt_to_line(says(scores), slope=2.0, offset=-1.0)
  # 1 / (1 + e^-(2 s - 1)) for s = 0, 1, -2: e^1, e^-1, e^5
  want = [0, 0.2689414, 0, 0.7310586, 0, 0.0066929, 0]
  np.testing.assert_allclose(reward(toy_dialogue())[0], want, rtol=1e-5)


def test_prompt_to_line_of_the_partner():
  scores = jnp.zeros((1, 3))
  reward = rewards.prompt_to_line(says(scores), who=PARTNER)
  np.testing.assert_allclose(reward(toy_dialogue(3))[0], [0.5, 0, 0.5])


def test_line_to_line_by_hand():
  dialogue = toy_dialogue()
  # sigmoid(2) = 0.880797, sigmoid(-1) = 0.268941, sigmoid(1) = 0.731059
  worst = rewards.line_to_line(says(SCORES))(dialogue)
  np.testing.assert_allclose(
    worst[0], [0, 1, 0, 0.880797, 0, 0.268941, 0], rtol=1e-5
  )
  mean = rewards.line_to_line(says(SCORES), reduce=rewards.average)(dialogue)
  # (0.268941 + 0.731059) / 2 = 0.5
  np.testing.assert_allclose(mean[0], [0, 1, 0, 0.880797, 0, 0.5, 0], rtol=1e-5)


def test_first_line_of_a_speaker_has_no_history():
  pairs = consistency.earlier_pairs(toy_dialogue(), POLICY)
  scores = jnp.full((1, 7, 7), 0.25)
  assert rewards.worst(scores, pairs)[0, 1] == 1
  assert rewards.average(scores, pairs)[0, 1] == 1
  assert jnp.argwhere(pairs[0]).tolist() == [[3, 1], [5, 1], [5, 3]]


def test_empty_and_dead_lines_are_no_history_and_no_reward():
  dialogue = toy_dialogue(batch=2, live=[True, False])
  dialogue = dataclasses.replace(
    dialogue, length=dialogue.length.at[0, 1].set(0)
  )
  scores = np.repeat(SCORES, 2, 0)
  reward = rewards.line_to_line(says(scores))(dialogue)
  # line 3 lost its only predecessor; line 5 keeps sigmoid(1)
  np.testing.assert_allclose(
    reward, [[0, 0, 0, 1, 0, 0.731059, 0], [0] * 7], rtol=1e-5
  )
  line = rewards.prompt_to_line(says(jnp.zeros((2, 7))))(dialogue)
  np.testing.assert_allclose(line, [[0, 0, 0, 0.5, 0, 0.5, 0], [0] * 7])


def test_a_judge_without_opinion_gives_a_constant():
  scores = jnp.array([[0.0, 5.0, 0.0, -5.0, 0.0, 50.0, 0.0]])
  reward = rewards.prompt_to_line(says(scores), slope=0.0, offset=1.0)
  own = reward(toy_dialogue())[0, 1::2]
  np.testing.assert_allclose(own, [0.731059] * 3, rtol=1e-5)


def test_weighted_adds_by_hand():
  first = says(jnp.array([[1.0, 2.0]]))
  second = says(jnp.array([[10.0, 100.0]]))
  reward = rewards.weighted({'a': (2.0, first), 'b': (0.5, second)})
  np.testing.assert_allclose(reward(toy_dialogue(2)), [[7.0, 54.0]])
  within = rewards.weighted({'all': (3.0, reward)})
  np.testing.assert_allclose(within(toy_dialogue(2)), [[21.0, 162.0]])


def test_weighted_takes_a_plain_function_through_jit():
  def longer(dialogue):
    return dialogue.length.astype(jnp.float32)

  reward = rewards.weighted({'length': (0.5, longer)})
  value = jax.jit(lambda reward, d: reward(d))(reward, toy_dialogue(2))
  np.testing.assert_allclose(value, [[1.0, 1.0]])


def test_weighted_needs_a_term():
  with pytest.raises(ValueError, match='no term'):
    rewards.weighted({})


def test_shuffled_permutes_each_line_by_itself(key):
  rewarded = jnp.arange(64.0).reshape(16, 4)
  dealt = np.asarray(rewards.shuffled(rewarded, key))
  np.testing.assert_array_equal(np.sort(dealt, 0), rewarded)
  orders = {tuple(column // 4) for column in dealt.T}
  assert len(orders) == 4  # each line in an order of its own
  assert np.any(dealt != rewarded)


# As part of somebody's program.


def both(weights, slope):
  """A reward of two judges, as a trainer would build it."""
  judge = likelihood_judge(weights)
  prompt = rewards.prompt_to_line(rewards.likelihood(judge), slope=slope)
  line = rewards.line_to_line(
    rewards.pair_verdict(verdict_judge(weights)),
    reduce=rewards.average,
    slope=slope,
  )
  return rewards.weighted({'prompt': (1.0, prompt), 'line': (0.5, line)})


def test_new_weights_and_slopes_do_not_retrace(weights, dialogue):
  chex.clear_trace_counter()
  value = quickly(chex.assert_max_traces(lambda r, d: r(d), n=1))
  first = value(both(weights, 1.0), dialogue)
  second = value(both(fakes.variables(fakes.CONFIG, 1), 1.0), dialogue)
  third = value(both(weights, 3), dialogue)
  assert np.all(first[:2, 1] != second[:2, 1])
  assert np.all(first[:2, 1] != third[:2, 1])


def test_judge_weights_are_no_constants_of_the_program(weights, dialogue):
  reward = both(weights, 1.0)
  traced = jax.make_jaxpr(lambda r, d: r(d))(reward, dialogue)
  assert all(np.size(x) < 100 for x in traced.consts)
  traced = jax.make_jaxpr(reward)(dialogue)  # held in a closure, they are
  assert max(np.size(x) for x in traced.consts) == VOCAB * fakes.CONFIG.features


@pytest.mark.parametrize('name', ['likelihood', 'verdict'])
def test_gradient_with_respect_to_the_judge_is_finite(weights, name):
  score, judge = JUDGES[name]
  dialogue = fakes.made_up(batch=2, lines=2)

  @quickly
  @jax.grad
  def grads(weights):
    reward = rewards.prompt_to_line(score(judge(weights)))
    return jnp.sum(reward(dialogue))

  grads = grads(weights)
  chex.assert_tree_all_finite(grads)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
