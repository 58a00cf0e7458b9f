"""Advantages: hand sums, slow references, laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax.learn import advantages
from persona_jax.learn.advantages import Earned


def earned(rewards, group, size=2, mask=None, **more):
  """Every line with `size` tokens, but where a mask is given."""
  rewards = jnp.asarray(rewards, jnp.float32)
  if mask is None:
    mask = jnp.ones((*rewards.shape, size), bool)
  return Earned(rewards=rewards, mask=jnp.asarray(mask), group=group, **more)


def ragged(key, rows=6, lines=3, size=4, group=3, dead=True):
  """Random dialogues: lines of any length, some without a token."""
  keys = jax.random.split(key, 6)
  length = jax.random.randint(keys[0], (rows, lines, 1), 0 if dead else 1, 5)
  normal = lambda key: jax.random.normal(key, (rows, lines, size))
  return Earned(
    rewards=jax.random.normal(keys[1], (rows, lines)),
    mask=jnp.arange(size)[None, None] < length,
    group=group,
    values=normal(keys[2]),
    shift=0.3 * normal(keys[3]),
    process=normal(keys[4]),
  )


def lines(found):
  """Advantages `[B N]` of lines whose tokens share one."""
  policy = np.asarray(found.policy)
  np.testing.assert_array_equal(policy, policy[..., :1] + 0 * policy)
  return policy[..., 0]


# Against the group.


def test_group_relative_by_hand():
  # mean 4, squares 9 + 1 + 16 = 26, deviation sqrt(26 / 2) = 3.605551
  found = advantages.group_relative(earned([[1, 4], [3, 4], [8, 4]], 3))
  want = np.array([[-3, 0], [-1, 0], [4, 0]]) / 3.605651
  np.testing.assert_allclose(lines(found), want, rtol=1e-5)
  bare = advantages.group_relative(
    earned([[1.0, 4], [3, 4], [8, 4]], 3), deviation=False
  )
  np.testing.assert_allclose(lines(bare), [[-3, 0], [-1, 0], [4, 0]], atol=1e-6)


def test_leave_one_out_by_hand():
  found = advantages.leave_one_out(earned([[1], [3], [8]], 3))
  # 1 - 11/2, 3 - 9/2, 8 - 4/2
  np.testing.assert_allclose(lines(found)[:, 0], [-4.5, -1.5, 6.0])


def test_whole_dialogues_by_hand():
  # sums 5, 7 | 3, 9: against the other -2, 2 | -6, 6
  given = earned([[1, 4], [3, 4], [2, 1], [8, 1]], 2)
  found = advantages.leave_one_out(given, whole=True)
  np.testing.assert_allclose(lines(found), [[-2, -2], [2, 2], [-6, -6], [6, 6]])


def test_ended_games_stay_in_the_group_by_hand():
  mask = np.ones((3, 2, 2), bool)
  mask[2, 1] = False  # this game ended before its second line
  given = earned([[1, 2], [3, 4], [8, 5]], 3, mask=mask)
  # line 2: rewards 2, 4, 0: mean 2, deviation 2
  found = advantages.group_relative(given, ended=True, eps=0.0)
  np.testing.assert_allclose(found.policy[:, 1, 0], [0, 1, 0], atol=1e-6)
  # without: 2, 4: mean 3, deviation sqrt(2)
  found = advantages.group_relative(given, eps=0.0)
  np.testing.assert_allclose(
    found.policy[:, 1, 0], [-(0.5**0.5), 0.5**0.5, 0], rtol=1e-6
  )


COMPARED = pytest.mark.parametrize(
  'advantage',
  [
    advantages.group_relative,
    advantages.leave_one_out,
    functools.partial(advantages.leave_one_out, whole=True),
  ],
)


@COMPARED
def test_lines_without_tokens_do_not_count(advantage):
  mask = np.ones((4, 1, 2), bool)
  mask[1] = False
  got = lines(advantage(earned([[1.0], [np.nan], [3], [8]], 4, mask=mask)))
  want = lines(advantage(earned([[1.0], [3], [8]], 3)))
  np.testing.assert_allclose(got[[0, 2, 3]], want, rtol=1e-6)
  assert got[1, 0] == 0


@COMPARED
def test_one_without_company_has_no_advantage(advantage):
  alone = advantage(earned([[5.0, -2.0]], 1))
  np.testing.assert_array_equal(lines(alone), [[0.0, 0.0]])
  none = advantage(earned(np.ones((3, 1)), 3, mask=np.zeros((3, 1, 2), bool)))
  np.testing.assert_array_equal(none.policy, np.zeros((3, 1, 2)))


@COMPARED
def test_groups_do_not_meet(advantage, key):
  given = ragged(key)
  together = jax.jit(advantage)(given).policy
  for rows in (slice(0, 3), slice(3, 6)):
    part = jax.tree.map(lambda x, rows=rows: x[rows], given)
    np.testing.assert_allclose(
      together[rows], advantage(part).policy, atol=1e-5
    )


def test_equal_rewards_teach_nothing_and_are_counted():
  given = earned([[1, 1], [1, 1], [2, 1], [3, 1]], 2)
  found = advantages.group_relative(given)
  np.testing.assert_array_equal(lines(found)[:2], 0)
  assert advantages.idle_groups(given) == 0.5


# In time.


def slow_gae(rewards, values, discount, decay):
  """The definition: A[t] = sum over l of (discount decay)^l d[t + l]."""
  following = np.append(values[1:], 0)
  errors = rewards + discount * following - values
  steps = range(len(rewards))
  return np.array(
    [
      sum((discount * decay) ** (s - t) * errors[s] for s in steps if s >= t)
      for t in steps
    ]
  )


def test_gae_by_hand():
  given = earned([[0.0, 1.0]], 1, size=1, values=jnp.array([[[0.5], [0.25]]]))
  found = advantages.gae(given, discount=0.9, decay=0.5, whiten=False)
  # d[1] = 1 - 0.25 = 0.75; d[0] = 0 + 0.9 x 0.25 - 0.5 = -0.275
  # A[0] = -0.275 + 0.45 x 0.75 = 0.0625
  np.testing.assert_allclose(found.policy[0, :, 0], [0.0625, 0.75], rtol=1e-6)
  np.testing.assert_allclose(found.returns[0, :, 0], [0.5625, 1.0], rtol=1e-6)


@pytest.mark.parametrize('turns', [False, True])
@pytest.mark.parametrize('kl', [0.0, 0.3])
def test_gae_is_its_definition_on_ragged_lines(key, turns, kl):
  given = ragged(key)
  found = advantages.gae(
    given, discount=0.9, decay=0.8, kl=kl, turns=turns, whiten=False
  )
  for row in range(6):
    mask = np.asarray(given.mask[row])
    rewards, values = [], []
    for line in range(3):
      count = mask[line].sum()
      if not count:
        continue
      own = -kl * np.asarray(given.shift[row, line, :count])
      own[-1] += given.rewards[row, line]
      value = np.asarray(given.values[row, line, :count])
      rewards += [own.sum()] if turns else list(own)
      values += [value[0]] if turns else list(value)
    want = slow_gae(np.array(rewards), np.array(values), 0.9, 0.8)
    returns = want + np.array(values)
    if turns:
      counts = mask.sum(1)[mask.any(1)]
      want, returns = np.repeat(want, counts), np.repeat(returns, counts)
    np.testing.assert_allclose(found.policy[row][mask], want, atol=1e-5)
    np.testing.assert_allclose(found.returns[row][mask], returns, atol=1e-5)
    assert not np.any(found.policy[row][~mask])


def test_with_decay_one_the_return_is_what_comes(key):
  given = ragged(key)
  found = advantages.gae(given, decay=1.0, whiten=False)
  spoken = np.asarray(given.spoken)
  rewards = np.where(spoken, given.rewards, 0)
  to_go = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
  want = np.where(given.mask, to_go[..., None], 0)
  np.testing.assert_allclose(found.returns, want, atol=1e-5)


def test_whitened_has_mean_zero_and_deviation_one(key):
  given = ragged(key)
  for advantage in (advantages.gae, advantages.returns_to_go):
    found = np.asarray(advantage(given).policy)[np.asarray(given.mask)]
    np.testing.assert_allclose(found.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(found.std(), 1, rtol=1e-4)


def test_returns_to_go_by_hand():
  mask = jnp.array([[[True, True], [True, False]]])
  shift = jnp.array([[[1.0, 2.0], [3.0, 9.0]]])
  given = earned([[1, 10]], 1, mask=mask, shift=shift)
  # from the end: 10 - 0.3 = 9.7; 1 - 0.2 + 9.7 = 10.5; -0.1 + 10.5 = 10.4
  found = advantages.returns_to_go(given, kl=0.1).policy
  x = np.array([10.4, 10.5, 9.7])
  want = (x - x.mean()) / x.std()
  np.testing.assert_allclose(found[mask], want, rtol=1e-4)
  assert found[0, 1, 1] == 0


def test_the_baseline_takes_the_mean_of_the_group_off():
  given = earned([[1], [3], [10], [20]], 2, size=1)
  # -1, 1, -5, 5 over their deviation, sqrt(13)
  found = lines(advantages.returns_to_go(given, baseline=True))[:, 0]
  np.testing.assert_allclose(found, np.array([-1, 1, -5, 5]) / 13**0.5)


# PRIME.


def test_prime_is_its_equation(key):
  given = ragged(key, dead=False)
  found = advantages.prime(given, discount=0.9)
  mask, process = np.asarray(given.mask), np.asarray(given.process)
  outcome = np.where(mask.any(2), given.rewards, 0).sum(1)
  mean = np.array([process[b][mask[b]].mean() for b in range(6)])
  for row in range(6):
    first = row // 3 * 3
    others = [b for b in range(first, first + 3) if b != row]
    steps = process[row][mask[row]] - mean[others].mean()
    want = [
      sum(0.9 ** (s - t) * steps[s] for s in range(t, len(steps)))
      + outcome[row]
      - outcome[others].mean()
      for t in range(len(steps))
    ]
    np.testing.assert_allclose(found.policy[row][mask[row]], want, atol=1e-4)
    assert not np.any(found.policy[row][~mask[row]])


@pytest.mark.parametrize(
  ('advantage', 'name'),
  [
    (advantages.gae, 'values'),
    (advantages.prime, 'process'),
    (functools.partial(advantages.returns_to_go, kl=0.1), 'shift'),
  ],
)
def test_what_is_missing_is_named(advantage, name):
  with pytest.raises(ValueError, match=f'Earned.{name}'):
    advantage(earned([[1.0], [2.0]], 2))
