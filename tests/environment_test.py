"""Environments: what they hear, what they answer, how they end dialogues."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import lanes_test
import numpy as np
import pytest
from flax import struct
from lanes_test import BATCH, FRAMES, PAIR, TOKENS, talk

from persona_jax.dialogue import Frame
from persona_jax.rollout.converse import stage
from persona_jax.rollout.environment import Heard, OpenConversation, Outcome

LINES = 8
NEVER = 99
PLAN = dict(lines=LINES, lanes=4, groups=2, chunk=5)


@struct.dataclass
class Log:
  """What one dialogue's environment was told, line by line."""

  task: Any
  born: jax.Array  # the key of its beginning
  times: jax.Array
  tokens: jax.Array
  length: jax.Array
  who: jax.Array
  keys: jax.Array


@struct.dataclass
class World:
  """Writes down all that it hears; `task` says when a dialogue ends."""

  def reset(self, key, task):
    zeros = jnp.zeros(LINES, jnp.int32)
    return Log(
      task=task,
      born=jax.random.key_data(key),
      times=zeros,
      tokens=jnp.full((LINES, TOKENS), -1, jnp.int32),
      length=zeros,
      who=zeros,
      keys=jnp.zeros((LINES, 2), jnp.uint32),
    )

  def step(self, key, state, heard):
    task, line, slot = state.task, heard.line, jnp.arange(TOKENS)
    body = jnp.where(slot < heard.length, heard.tokens, -1)
    over = line == task['end']
    words, length = answered(line, task['row'], slot)
    return Outcome(
      state=state.replace(
        times=state.times.at[line].add(1),
        tokens=state.tokens.at[line].set(body),
        length=state.length.at[line].set(heard.length),
        who=state.who.at[line].set(heard.who),
        keys=state.keys.at[line].set(jax.random.key_data(key)),
      ),
      words=words,
      length=length,
      reward=reward(line, task['row']).astype(jnp.float32),
      terminated=over & task['ends'],
      truncated=over & ~task['ends'],
    )


def answered(line, row, slot):
  """What the world says after a line: from nothing to more than fits."""
  return 9 + (slot + 3 * line + row) % 40, (2 * line + row) % (TOKENS + 2)


def reward(line, row):
  return row + line / 16 + 0.5


# Some dialogues end at once, some later, some never; a line's end is the same.
END = np.array([NEVER, 1, 2, 5, NEVER, 3, 1, NEVER, 4, 6, 1, NEVER])
ENDS = np.arange(BATCH) % 2 == 1


def tasked(end=END, **of):
  row = jnp.arange(BATCH, dtype=jnp.int32)
  task = {'row': row, 'end': jnp.asarray(end), 'ends': jnp.asarray(ENDS)}
  return lanes_test.beginnings(**of).replace(task=task)


@functools.cache
def pair():
  """Dialogues of two speakers, some of which the world ends, and none."""
  key, speakers = jax.random.key(0), lanes_test.both(PAIR)
  ended = talk(key, speakers, tasked(), environment=World(), **PLAN)
  whole = tasked(end=np.full(BATCH, NEVER))
  return ended, talk(key, speakers, whole, environment=World(), **PLAN)


@functools.cache
def three():
  """Dialogues of two speakers and the world's voice, in this order."""
  speakers = *lanes_test.apart(PAIR), None
  return talk(
    jax.random.key(0),
    speakers,
    tasked(seats=3),
    frames=FRAMES,
    environment=World(),
    **PLAN,
  )[0]


def last_lines(end):
  return np.minimum(end, LINES - 1)


def inside():
  """The lines up to the end of each dialogue of `END`."""
  return np.arange(LINES)[None] <= last_lines(END)[:, None]


def test_an_ended_dialogue_changes_no_other_line():
  (said, _), (whole, _) = pair()
  for name in ('tokens', 'length', 'stopped', 'logprobs', 'raw_logprobs'):
    got, want = getattr(said, name), np.asarray(getattr(whole, name))
    there = inside().reshape(BATCH, LINES, *[1] * (want.ndim - 2))
    np.testing.assert_allclose(got, np.where(there, want, 0), atol=1e-5)
  assert np.all(np.asarray(whole.length) > 0)


def test_ended_dialogues_are_those_of_one_pass():
  (said, usage), (_, other) = pair()
  lanes_test.check_small(said, PAIR)
  length = np.asarray(said.length)
  assert usage.sampled == length[:, 1:].sum()
  new = lanes_test.unread(said, first=1)
  assert usage.read == new[length > 0].sum()
  assert usage.steps < 0.75 * other.steps and usage.utilisation > 0.6


def test_the_end_is_told_apart_from_a_cut():
  for (said, _), end in zip(pair(), (END, NEVER), strict=True):
    came = np.asarray(ENDS & (np.broadcast_to(end, BATCH) < LINES))
    np.testing.assert_array_equal(said.played.terminated, came)
    np.testing.assert_array_equal(said.played.truncated, ~came)


def test_the_dead_are_neither_ended_nor_heard(key):
  live = np.arange(BATCH) % 4 != 1
  scenario = tasked().replace(live=jnp.asarray(live))
  said, _ = talk(
    key, lanes_test.both(PAIR), scenario, environment=World(), **PLAN
  )
  (want, _), _ = pair()
  lanes_test.assert_same(
    lanes_test.rows_of(said, live), lanes_test.rows_of(want, live)
  )
  played = said.played
  for x in (
    played.terminated,
    played.truncated,
    played.reward,
    played.state.times,
  ):
    assert not np.asarray(x)[~live].any()


def check_log(said, spoken):
  """The world heard each line that was spoken, and no other, once."""
  log = jax.tree.map(np.asarray, said.played.state)
  np.testing.assert_array_equal(log.task['end'], END)
  np.testing.assert_array_equal(log.times, spoken)
  body = np.where(spoken, said.body, 0)
  np.testing.assert_array_equal(log.length, body)
  slot = np.arange(TOKENS)
  want = np.where(slot < body[..., None], said.tokens, -1)
  np.testing.assert_array_equal(log.tokens, want)
  np.testing.assert_array_equal(log.who, np.where(spoken, said.who, 0))
  line, row = np.arange(LINES), np.arange(BATCH)[:, None]
  want = np.where(spoken, reward(line, row), 0)
  np.testing.assert_allclose(said.played.reward, want)
  assert np.any(said.stopped & spoken) and np.any(~said.stopped & spoken)
  return log


def test_each_spoken_line_is_heard_once():
  (said, _), _ = pair()
  check_log(said, inside() & (np.arange(LINES) > 0))


def test_its_keys_are_its_own(key):
  (said, _), _ = pair()
  log = jax.tree.map(np.asarray, said.played.state)
  with jax.debug_key_reuse(False):  # the same keys, to compare
    rows = tasked().keys(key)
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    lines = [fold(rows, line) for line in range(LINES)]
    tokens = [fold(x, token) for x in lines for token in range(TOKENS)]
    # A world that splits its key, once or twice, finds no key of a line.
    born = jax.random.wrap_key_data(jnp.asarray(log.born))
    split = jax.vmap(lambda x: jax.random.split(jax.random.split(x)[1]))(born)
    keys = jnp.concatenate([born, split.reshape(-1), rows, *lines, *tokens])
    keys = np.asarray(jax.random.key_data(keys))
  keys = np.concatenate([keys, log.keys[log.times > 0]])
  assert len(np.unique(keys, axis=0)) == len(keys)


def test_each_line_has_a_key_of_the_worlds_own():
  (said, _), _ = pair()
  state = said.played.state
  keys = np.asarray(state.keys)[np.asarray(state.times) > 0]
  assert len(np.unique(keys, axis=0)) == len(keys)


def test_a_third_voice_is_the_worlds():
  said = three()
  length, tokens = np.asarray(said.length), np.asarray(said.tokens)
  seat = np.arange(LINES) % 3
  np.testing.assert_array_equal(said.who, seat)
  # It speaks after lines 1 and 4, hears not itself and so ends nothing there;
  # what it says as it ends a dialogue is still said.
  over = np.where(END % 3 == 2, NEVER, END)[:, None]
  spoken = (seat != 2) & (np.arange(LINES) <= over) & (np.arange(LINES) > 0)
  check_log(said, spoken)
  assert np.all((length > 0)[:, 1:] == spoken[:, 1:], where=(seat != 2)[1:])
  slot, row = np.arange(TOKENS), np.arange(BATCH)[:, None]
  lengths = set()
  for line in (2, 5):
    words, count = answered(line - 1, row, slot)
    count = np.where(over[:, 0] >= line - 1, np.minimum(count[:, 0], TOKENS), 0)
    np.testing.assert_array_equal(length[:, line], count)
    want = np.where(slot < count[:, None], words, 0)
    np.testing.assert_array_equal(tokens[:, line], want)
    lengths.update(count[over[:, 0] >= line - 1].tolist())
    for silent in (said.stopped, said.logprobs, said.raw_logprobs):
      assert not np.any(silent[:, line])
  assert {0, 1, TOKENS} < lengths


def test_three_seats_are_those_of_one_pass():
  lanes_test.check_small(three(), PAIR)


@pytest.mark.parametrize('who', [0, 1])
def test_three_seats_read_what_stands_between_lines(who):
  said, frame = three(), FRAMES[who]
  seen = lanes_test.view(said, who, frame)
  length, body = np.asarray(said.length), np.asarray(said.body)
  for row in range(BATCH):
    prompt = np.asarray(said.prompts)[row, who]
    text = prompt[: said.prompt_length[row, who]].tolist()
    said_lines = 1 + np.flatnonzero(length[row])[-1]
    for line in range(said_lines):
      own, before = line % 3 == who, line > 0 and (line - 1) % 3 == who
      between = frame.heard_to_own if own else frame.heard_to_heard
      between = frame.own_to_heard if before else between
      if line or own:  # the prompt ends where a line that is heard begins
        text += between.tolist()
      text += np.asarray(said.tokens)[row, line, : body[row, line]].tolist()
    if said_lines < LINES and said_lines % 3 == who:
      text += frame.heard_to_own.tolist()  # the cue of a line to come
    np.testing.assert_array_equal(seen.tokens[row, : len(text)], text)
    assert np.all(np.asarray(seen.positions)[row, len(text) :] == -1)


def test_the_world_may_answer_one_speaker(key):
  # Silent at times: the speaker then goes on after an empty line.
  scenario = tasked().replace(opening=None, opening_length=None)
  said, usage = talk(
    key,
    (lanes_test.voice(0.2, PAIR[0]), None),
    scenario,
    frames=(FRAMES[0], None),
    environment=World(),
    **PLAN,
  )
  line, row = np.arange(LINES), np.arange(BATCH)[:, None]
  # Lines of odd numbers are the world's: it ends nothing there.
  spoken = (line % 2 == 0) & (
    line <= np.where(END % 2 == 0, END, NEVER)[:, None]
  )
  check_log(said, spoken)
  length = np.asarray(said.length)
  np.testing.assert_array_equal(length[:, ::2] > 0, spoken[:, ::2])
  _, count = answered(line - 1, row, 0)
  count = np.where(spoken[:, ::2], np.minimum(count, TOKENS)[:, 1::2], 0)
  np.testing.assert_array_equal(length[:, 1::2], count)
  assert usage.sampled == length[:, ::2].sum()
  lanes_test.check_small(said, PAIR[:1], first=0)


def test_a_speaker_begins(key):
  open_ = lanes_test.beginnings()
  spoken = open_.replace(opening=None, opening_length=None)
  one = lanes_test.voice(0, PAIR[0])
  for speakers, scenario, line in (
    ((one,), open_, 1),
    ((None, one), spoken, 0),
  ):
    with pytest.raises(ValueError, match=f'line {line} is the first'):
      stage(key, speakers, FRAMES[:2], scenario, lines=4, tokens=TOKENS)


def test_lines_heard_in_a_row_have_a_frame(key):
  frames = FRAMES[0], dataclasses.replace(FRAMES[1], heard_to_heard=None), None
  speakers = *lanes_test.apart(PAIR), None
  scenario = lanes_test.beginnings(seats=3)
  with pytest.raises(ValueError, match='seat 1 has no heard_to_heard'):
    stage(key, speakers, frames, scenario, lines=4, tokens=TOKENS)


FAREWELLS = np.array([[5, 6, 7], [6, -1, -1], [8, 8, -1], [-1, -1, -1]])


@pytest.mark.parametrize(
  'line, ends',
  [
    ([5, 6, 7], True),
    ([1, 5, 6, 7], True),
    ([5, 6, 7, 1], False),
    ([6, 7], False),  # shorter than the farewell
    ([7, 6], True),
    ([6], True),
    ([8], False),
    ([8, 8], True),
    ([1, 8, 8, 8], True),
    ([8, 1, 8], False),
    ([5, 5, 6, 1], False),
    ([], False),
  ],
)
def test_farewells_end_a_line(line, ends):
  world = OpenConversation(jnp.asarray(FAREWELLS))
  # What lies beyond the line's end, as its stop token does, is not its text.
  for after in (6, 7, 8):
    tokens = jnp.full(5, after).at[: len(line)].set(jnp.array(line, int))
    heard = Heard(tokens, jnp.int32(len(line)), jnp.int32(1), jnp.int32(1))
    outcome = world.step(jax.random.key(0), (), heard)
    assert outcome.terminated == ends and not outcome.truncated
    assert outcome.length == 0 and outcome.reward == 0


def test_a_farewell_ends_the_dialogue(key):
  ids = np.concatenate([np.arange(15, 30), np.arange(9)])
  world = OpenConversation(
    jnp.array([*[[x, -1] for x in ids], [40, 41]], jnp.int32)
  )
  scenario = lanes_test.beginnings()
  said, usage = talk(
    key, lanes_test.both(PAIR), scenario, environment=world, **PLAN
  )
  lanes_test.check_small(said, PAIR)
  length, body = np.asarray(said.length), np.asarray(said.body)
  last = np.take_along_axis(
    np.asarray(said.tokens), np.maximum(body - 1, 0)[..., None], axis=2
  )[..., 0]
  farewell = np.isin(last, ids) & (length > 0) & (np.arange(LINES) > 0)
  count = (length > 0).sum(axis=1)
  came = farewell.any(axis=1)
  np.testing.assert_array_equal(said.played.terminated, came)
  np.testing.assert_array_equal(said.played.truncated, ~came)
  first = np.where(came, farewell.argmax(axis=1) + 1, LINES)
  np.testing.assert_array_equal(count, first)
  assert came.sum() > 3 and len(set(count.tolist())) > 2
  assert usage.sampled == length[:, 1:].sum()


def test_an_empty_frame_and_a_silent_world_still_go_on(key):
  # Nothing new to read between two lines: the last token is read again.
  nothing = jnp.zeros(0, jnp.int32)
  frame = Frame(nothing, nothing)
  scenario = lanes_test.beginnings().replace(opening=None, opening_length=None)
  said, _ = talk(
    key,
    (lanes_test.voice(0.2, PAIR[0]), None),
    scenario,
    frames=(frame, None),
    **PLAN,
  )
  seen = lanes_test.view(said, 0, frame)
  variables = {**lanes_test.weights(), 'turn': jnp.float32(0.2)}
  logits = lanes_test.one_pass(variables, seen)
  assert np.all(np.asarray(said.length)[:, ::2]) and not np.any(
    np.asarray(said.length)[:, 1::2]
  )
  lanes_test.check(said, 0, seen, logits, PAIR[0], first=0)
