"""Judges whose scores a Python function gives, inside and outside of jit."""

import dataclasses
import logging

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from persona_jax import dialogue as dialogues
from persona_jax import rewards
from persona_jax.dialogue import PARTNER, POLICY

jitted = jax.jit(lambda judge, dialogue: judge(dialogue))
plain = lambda judge, dialogue: judge(dialogue)
both = pytest.mark.parametrize('run', [jitted, plain], ids=['jit', 'plain'])


@pytest.fixture
def dialogue():
  """Four dialogues; line 3 of row 0 is empty, row 2 is dead."""
  made = fakes.made_up(batch=4, lines=6)
  return dataclasses.replace(
    made,
    length=made.length.at[0, 3].set(0),
    stopped=made.stopped.at[0, 3].set(False),
    live=jnp.array([True, True, False, True]),
  )


def means(lines):
  """The mean token of each line less the speaker's last prompt token."""
  assert all(type(x) is np.ndarray for x in lines)
  slot = np.arange(lines.tokens.shape[-1])
  inside = slot < lines.body[..., None]
  total = np.where(inside, lines.tokens, 0).sum(-1)
  rows = np.arange(len(lines.prompts))
  last = lines.prompts[rows, lines.prompt_length - 1]
  return total / np.maximum(lines.body, 1) - last[:, None]


def slow_means(dialogue, who):
  d = fakes.plain(dialogue)
  out = np.zeros(d.length.shape)
  for b, n in np.ndindex(d.length.shape):
    line = d.tokens[b, n, : d.length[b, n] - d.stopped[b, n]]
    if n % 2 == who and line.size and d.live[b]:
      last = d.prompts[b, who, d.prompt_length[b, who] - 1]
      out[b, n] = line.mean() - last
  return out


@both
@pytest.mark.parametrize('who', [POLICY, PARTNER])
def test_the_hosts_scores_are_those_of_the_speakers_lines(run, who, dialogue):
  judge = rewards.hosted(means, who=who)
  scores = run(judge, dialogue)
  assert scores.dtype == jnp.float32
  want = slow_means(dialogue, who)
  assert (want != 0).sum() >= 8
  np.testing.assert_allclose(scores, want, rtol=1e-6)


@both
def test_no_verdict_is_handed_on(run, dialogue):
  judge = rewards.hosted(lambda lines: np.full(lines.spoken.shape, np.nan))
  scores = np.asarray(run(judge, dialogue))
  np.testing.assert_array_equal(np.isnan(scores), dialogue.spoken(POLICY))
  assert not np.any(scores[~np.isnan(scores)])


def test_it_is_compiled_once_and_the_host_is_called_each_time(dialogue):
  calls = []

  def score(lines):
    calls.append(lines.spoken.shape)
    return np.zeros(lines.spoken.shape)

  run = fakes.Counted(plain)
  compiled = jax.jit(run)
  for _ in range(3):
    compiled(rewards.hosted(score), dialogue).block_until_ready()
  assert run.traces == 1 and calls == [(4, 6)] * 3


@pytest.mark.parametrize('wrap', [jax.jit, lambda f: f], ids=['jit', 'plain'])
def test_vmap_calls_the_host_once(wrap, dialogue):
  calls = []

  def score(lines):
    calls.append(lines.spoken.shape)
    return means(lines)

  judge = rewards.hosted(score)
  said = lambda tokens: dataclasses.replace(dialogue, tokens=tokens)
  tokens = jnp.stack([dialogue.tokens, dialogue.tokens + 3])
  got = wrap(jax.vmap(lambda tokens: judge(said(tokens))))(tokens)
  want = [slow_means(said(x), POLICY) for x in tokens]
  np.testing.assert_allclose(got, want, rtol=1e-6)
  assert calls == [(8, 6)]


def test_a_batch_without_rows(dialogue):
  none = dialogues.rows(dialogue, lambda x: x[:0])
  assert rewards.hosted(means)(none).shape == (0, 6)


def test_large_dialogues_do_not_lock(dialogue):
  large = fakes.made_up(batch=256, lines=40, size=200)
  score = rewards.hosted(means)
  got = jitted(rewards.weighted({'a': (2.0, score)}), large)
  np.testing.assert_allclose(got, 2 * slow_means(large, POLICY), rtol=1e-5)


def test_it_is_one_term_of_a_reward(dialogue):
  judge = rewards.prompt_to_line(rewards.hosted(means), slope=0.01)
  reward = rewards.weighted({'host': (2.0, judge)})
  want = np.asarray(slow_means(dialogue, POLICY), np.float32)
  spoken = np.asarray(dialogue.spoken(POLICY))
  want = np.where(spoken, 2 / (1 + np.exp(-0.01 * want)), 0)
  np.testing.assert_allclose(jitted(reward, dialogue), want, rtol=1e-5)


def test_a_gradient_passes_by():
  dialogue = fakes.made_up(batch=2, lines=4)
  judge = rewards.hosted(means)
  loss = lambda scale: jnp.sum(scale * judge(dialogue))
  got = jax.jit(jax.grad(loss))(1.0)
  np.testing.assert_allclose(got, slow_means(dialogue, POLICY).sum(), rtol=1e-5)


def fails(why):
  def score(lines):
    raise why

  return rewards.hosted(score)


def test_what_the_host_raises_comes_as_it_is(dialogue):
  with pytest.raises(KeyError, match='persona'):
    fails(KeyError('persona'))(dialogue)


@pytest.mark.parametrize(
  ('why', 'want'),
  [
    (ValueError('http://a answered none; start it.'), None),
    (KeyError('persona'), "KeyError: 'persona'"),
  ],
)
def test_what_the_host_raises_in_jit_is_one_sentence(
  why, want, dialogue, caplog
):
  caplog.set_level(logging.CRITICAL)
  with pytest.raises(ValueError) as raised, rewards.plainly():
    jitted(fails(why), dialogue).block_until_ready()
  assert str(raised.value) == (want or str(why))
  assert raised.value.__suppress_context__
  with pytest.raises(jax.errors.JaxRuntimeError, match='on the host failed: '):
    jitted(fails(why), dialogue).block_until_ready()


def test_other_errors_stay_as_they_are():
  with pytest.raises(jax.errors.JaxRuntimeError, match='^INTERNAL: other'):
    with rewards.plainly():
      raise jax.errors.JaxRuntimeError('INTERNAL: other')
  with pytest.raises(KeyError), rewards.plainly():
    raise KeyError('a')


@both
def test_scores_of_another_shape_are_refused(run, dialogue):
  judge = rewards.hosted(lambda lines: np.zeros((4, 3)))
  want = r'scores of shape \(4, 3\) to 4 dialogues of 6 lines; give one'
  with pytest.raises(ValueError, match=want), rewards.plainly():
    run(judge, dialogue).block_until_ready()


@pytest.mark.devices
def test_several_devices_call_the_host_once():
  mesh = Mesh(jax.devices(), ('data',))
  dialogue = fakes.made_up(batch=16, lines=6)
  where = NamedSharding(mesh, PartitionSpec('data'))
  spread = dialogues.rows(dialogue, lambda x: jax.device_put(x, where))
  nowhere = NamedSharding(mesh, PartitionSpec())
  spread = dataclasses.replace(spread, who=jax.device_put(spread.who, nowhere))
  calls = []

  def score(lines):
    calls.append(lines.spoken.shape)
    return means(lines)

  judge, want = rewards.hosted(score), slow_means(dialogue, POLICY)
  np.testing.assert_allclose(jitted(judge, spread), want, rtol=1e-6)
  np.testing.assert_allclose(judge(spread), want, rtol=1e-6)
  assert calls == [(16, 6)] * 2


# No verdict.


def opinion(*scores):
  return Partial(lambda scores, dialogue: scores, jnp.array(scores)[None])


@both
def test_consistency_has_no_verdict_where_the_judge_has_none(run):
  dialogue = fakes.made_up(batch=1, lines=6)
  nan = np.nan
  judge = opinion(nan, 0.0, 0.0, nan, 0.0, 0.0)
  for slope in (1.0, 0.0):
    got = run(rewards.prompt_to_line(judge, slope=slope), dialogue)
    np.testing.assert_array_equal(got[0], [0, 0.5, 0, nan, 0, 0.5])


@both
@pytest.mark.parametrize('reduce', [rewards.worst, rewards.average])
def test_a_line_to_line_reward_has_no_verdict_where_a_pair_has_none(
  run, reduce
):
  dialogue = fakes.made_up(batch=1, lines=6)
  scores = np.full((6, 6), np.nan, np.float32)  # of no pairs, too
  scores[3, 1] = 0.0
  scores[5, 3] = -50.0  # the worst that can be
  judge = opinion(*scores)
  got = run(rewards.line_to_line(judge, reduce=reduce), dialogue)
  np.testing.assert_array_equal(got[0], [0, 1, 0, 0.5, 0, np.nan])


@both
def test_no_verdict_may_be_settled(run):
  dialogue = fakes.made_up(batch=1, lines=4)
  judge = opinion(np.nan, np.nan, 3.0, -2.0)
  got = run(rewards.settled(judge, -1.5), dialogue)
  np.testing.assert_array_equal(got[0], [-1.5, -1.5, 3.0, -2.0])
  reward = rewards.prompt_to_line(rewards.settled(judge, -50.0))
  got = run(reward, dialogue)  # sigmoid(-2) = 0.119203
  np.testing.assert_allclose(got[0], [0, 0, 0, 0.119203], atol=1e-6)
  pairs = rewards.settled(opinion(*np.full((4, 4), np.nan)), 0.0)
  got = run(rewards.line_to_line(pairs), dialogue)
  np.testing.assert_array_equal(got[0], [0, 1, 0, 0.5])
  host = rewards.hosted(lambda lines: np.full(lines.spoken.shape, np.nan))
  got = run(rewards.settled(host, 2.0), dialogue)
  np.testing.assert_array_equal(got[0], [0, 2, 0, 2])


@pytest.mark.parametrize('score', [np.nan, np.inf])
def test_no_verdict_is_settled_by_a_number(score):
  with pytest.raises(ValueError, match='is not finite; give'):
    rewards.settled(opinion(0.0), score)
