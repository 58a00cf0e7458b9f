"""Dialogues that the host takes part in, against those inside one jit."""

import dataclasses
import functools
import threading

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import remote_test
import tokenizers
from flax import struct
from tokenizers import decoders, pre_tokenizers

from persona_jax.remote import Answer, Server
from persona_jax.rollout import Sampling, Speaker, converse, hosted
from persona_jax.rollout.environment import OpenConversation
from persona_jax.rollout.hosted import Turn, hold, messages, remote_voice
from persona_jax.text.chat import Chat

BATCH, LINES, TOKENS = 8, 6, 12
FAREWELLS = OpenConversation(jnp.arange(160, 190, dtype=jnp.int32)[:, None])
FIELDS = ('tokens', 'length', 'stopped', 'logprobs', 'raw_logprobs', 'who')

whole = jax.jit(
  converse, static_argnames=('lines', 'tokens', 'lanes', 'groups', 'chunk')
)


@struct.dataclass
class Scripted:
  """Says fixed words; farewells end a dialogue, as in `FAREWELLS`."""

  tokens: jax.Array  # [B N T]
  length: jax.Array  # [B N]

  def reset(self, key, task):
    del key
    return task

  def step(self, key, state, heard):
    outcome = FAREWELLS.step(key, (), heard)
    at = (state, jnp.minimum(heard.line + 1, LINES - 1))
    return outcome._replace(
      state=state,
      words=self.tokens[at],
      length=jnp.where(outcome.terminated, 0, self.length[at]),
      reward=heard.length.astype(jnp.float32),
    )


@struct.dataclass
class Remembering:
  """What `FAREWELLS` does; it counts all that it heard."""

  def reset(self, key, task):
    del key
    return task

  def step(self, key, state, heard):
    outcome = FAREWELLS.step(key, (), heard)
    return outcome._replace(
      state=state + heard.length, reward=heard.length.astype(jnp.float32)
    )


def script(seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(40, 160, (BATCH, LINES, TOKENS))  # no farewells
  length = rng.integers(1, TOKENS + 1, (BATCH, LINES))
  inside = np.arange(TOKENS) < length[..., None]
  return np.where(inside, tokens, 0).astype(np.int32), length.astype(np.int32)


def decode(ids):
  return ' '.join(map(str, ids))


def encode(words):
  return [int(x) for x in words.split()]


def says(tokens, length):
  """A voice that gives the lines of a script."""

  def voice(turns):
    lines = [(turn.row, len(turn.said)) for turn in turns]
    return [decode(tokens[at][: length[at]]) for at in lines]

  return voice


def scenario():
  return fakes.scenario(BATCH).replace(task=jnp.arange(BATCH))


def recall(variables, tokens, positions, cache):
  """Sums of what was read, turned by its place: compiles in no time."""
  heard, cache = fakes.remember(cache, tokens, positions)
  slot = jnp.arange(heard.shape[1])
  seen = slot[None, None] <= positions[..., None]
  turn = jnp.cos(slot[:, None] * jnp.arange(1.0, 9.0)[None])
  words = variables[heard] * turn[None]
  return jnp.einsum('bts,bsd->btd', seen.astype(jnp.float32), words), cache


def simple(seed=1, stop=range(30)):
  """Says what depends on all that it has read, in order."""
  table = np.random.default_rng(seed).normal(scale=0.4, size=(301, 8))
  return Speaker(
    variables=jnp.asarray(table, jnp.float32),
    sampling=Sampling.of(BATCH, fakes.stops(stop)),
    apply=recall,
    unembed=unembed,
    memory=fakes.memory,
  )


def unembed(variables, hidden):
  return hidden @ variables.T


CASES = {
  'decoder': (
    (None, fakes.speaker(fakes.tiny(), fakes.caps(), BATCH, range(30))),
    dict(lanes=4, groups=2),
  ),
  'simple': ((None, simple()), {}),
}


def held(key, voices, case='decoder', begin=None, **more):
  """The dialogues that are held with `voices`, and what the host did."""
  speakers, plan = CASES[case]
  given = dict(
    encode=encode,
    decode=decode,
    lines=LINES,
    tokens=TOKENS,
    environment=Remembering(),
  )
  return hold(
    key,
    speakers,
    fakes.FRAMES,
    scenario() if begin is None else begin,
    voices,
    **given | plan | more,
  )


def assert_same(left, right, rows=slice(None)):
  """Two dialogues are the same, bit for bit."""
  for name in FIELDS:
    x, y = getattr(left, name), getattr(right, name)
    pick = slice(None) if name == 'who' else rows
    np.testing.assert_array_equal(x[pick], y[pick], err_msg=name)
  for name in ('reward', 'terminated', 'truncated'):
    x, y = getattr(left.played, name), getattr(right.played, name)
    np.testing.assert_array_equal(x[rows], y[rows], err_msg=name)


@functools.cache
def alone(case):
  """The dialogues in which the host speaks by the script."""
  return held(jax.random.key(0), {0: says(*script())}, case)


@pytest.mark.parametrize('case', CASES)
def test_the_hosts_lines_are_as_those_of_an_environment(key, case):
  speakers, plan = CASES[case]
  want = whole(
    key,
    speakers,
    fakes.FRAMES,
    scenario(),
    lines=LINES,
    tokens=TOKENS,
    environment=Scripted(*map(jnp.asarray, script())),
    **plan,
  )
  got, report = alone(case)
  others = np.arange(LINES) % 2 == 0  # the host's lines are heard, too
  reward = jnp.where(others[None], want.played.reward, got.played.reward)
  heard = dataclasses.replace(got.played, reward=reward)
  assert_same(dataclasses.replace(got, played=heard), want)
  length = np.asarray(got.length)
  own = length[:, 1::2]
  assert (own == TOKENS).any() and (own[own > 0] < TOKENS).any()
  ended = np.asarray(got.played.terminated)
  assert ended.any() and not ended.all()
  given = length[:, 2::2] > 0
  assert report.lines == given.sum() and not report.failed
  assert (report.calls == 2) == (case == 'simple')
  assert report.cut == 0 and report.usage.rows == 0


def test_begin_go_finish_are_converse(key):
  speakers = simple(0), simple(1, range(90))
  given = dict(lines=LINES, tokens=TOKENS, lanes=4, groups=2)
  given['environment'] = Remembering()
  want = whole(key, speakers, fakes.FRAMES, scenario(), **given)
  got, report = hold(
    key,
    speakers,
    fakes.FRAMES,
    scenario(),
    {},
    encode=encode,
    decode=decode,
    **given,
  )
  assert_same(got, want)
  np.testing.assert_array_equal(got.played.state, want.played.state)
  assert report.calls == report.lines == 0


def test_the_host_may_open(key):
  begin, turns = scenario(), []
  opening, size = np.asarray(begin.opening), np.asarray(begin.opening_length)

  def voice(some):
    turns.extend(some)
    if some[0].said:
      return says(*script())(some)
    return [decode(opening[x.row][: size[x.row]]) for x in some]

  got, _ = held(
    key,
    {0: voice},
    'simple',
    begin.replace(opening=None, opening_length=None),
  )
  assert turns[0] == Turn(0, 10, int(begin.samples[0]), 0, ())
  want, _ = alone('simple')
  # Here the opening is heard, and may be a farewell.
  ended = np.asarray(got.length)[:, 1] == 0
  assert 0 < ended.sum() < 4
  for name in FIELDS[:-1]:
    x, y = getattr(got, name)[~ended], getattr(want, name)[~ended]
    np.testing.assert_array_equal(x[:, 1:], y[:, 1:], err_msg=name)


def test_a_voice_hears_what_was_said(key):
  said, _ = alone('decoder')
  heard = []

  def voice(turns):
    heard.extend(turns)
    return says(*script())(turns)

  held(key, {0: voice})
  assert len({(x.row, len(x.said)) for x in heard}) == len(heard)
  begin = fakes.plain(scenario())
  for turn in heard:
    size = len(turn.said)
    body = np.asarray(said.body)[turn.row]
    lines = [
      (int(said.who[n]), decode(said.tokens[turn.row, n, : body[n]].tolist()))
      for n in range(size)
    ]
    assert turn == Turn(
      turn.row,
      begin.ids[turn.row],
      begin.samples[turn.row],
      0,
      tuple(lines),
    )


BAD = {
  'None': (None, 'the voice gave no line'),
  'empty': ('', "the line is empty: ''"),
  'blank': ('  ', "the line is empty: '  '"),
  'surrogate': ('\ud800', r"the line is no Unicode text: '\ud800'"),
  'number': (7, 'the voice gave a int'),
  'answer': (Answer(None, 'http 500 Oh'), 'http 500 Oh'),
}


@pytest.mark.parametrize('case', CASES)
def test_a_failed_row_ends_and_disturbs_no_other(key, case):
  want, _ = alone(case)
  length = np.asarray(want.length)
  failing = np.flatnonzero(length[:, 2] > 0)[: len(BAD)].tolist()
  bad = dict(zip(failing, BAD.values(), strict=False))
  late = np.flatnonzero(length[:, 4] > 0)[-1]
  bad.pop(late, None)
  assert len(bad) >= 3

  def voice(turns):
    lines = says(*script())(turns)
    for i, turn in enumerate(turns):
      if turn.row in bad and len(turn.said) == 2:
        lines[i] = bad[turn.row][0]
      if turn.row == late and len(turn.said) == 4:
        lines[i] = None
    return lines

  got, report = held(key, {0: voice}, case)
  assert report.failed == {
    **{row: why for row, (_, why) in bad.items()},
    late: 'the voice gave no line',
  }
  others = [x for x in range(BATCH) if x not in report.failed]
  assert_same(got, want, np.array(others))
  for row in report.failed:
    end = 4 if row == late else 2
    for name in ('tokens', 'length', 'stopped', 'logprobs', 'raw_logprobs'):
      x, y = getattr(got, name)[row], getattr(want, name)[row]
      np.testing.assert_array_equal(x[:end], y[:end], err_msg=name)
      assert not np.any(x[end:])
    assert got.played.truncated[row] and not got.played.terminated[row]


def test_every_row_may_fail(key):
  got, report = held(key, {0: lambda turns: [None] * len(turns)})
  assert report.lines == 0 and not np.any(got.length[:, 2:])
  assert len(report.failed) == (np.asarray(got.length[:, 1]) > 0).sum() - int(
    np.sum(got.played.terminated)
  )
  assert np.all(got.played.truncated | got.played.terminated)


def test_a_failed_row_keeps_the_state_of_the_environment(key):
  got, report = held(key, {0: lambda turns: [None] * len(turns)})
  want = np.arange(BATCH) + np.asarray(got.body)[:, 1]  # the opening: unheard
  assert len(report.failed) > 3
  np.testing.assert_array_equal(got.played.state, want)


def test_long_lines_are_cut_and_counted(key):
  tokens, length = script()
  long = lambda turns: [
    f'{x}{" 41" * TOKENS}'[: None if turn.row % 2 else len(x)]
    for x, turn in zip(says(tokens, length)(turns), turns, strict=True)
  ]
  got, report = held(key, {0: long})
  lines = np.asarray(got.length)[:, 2::2]
  assert report.cut == (lines[1::2] > 0).sum() > 0
  assert (lines[1::2][lines[1::2] > 0] == TOKENS).all()
  want = np.where(lines > 0, length[:, 2::2], 0)
  np.testing.assert_array_equal(lines[::2], want[::2])
  assert report.lines == (lines > 0).sum() and not np.any(got.stopped[:, 2::2])


def test_one_compilation_serves_all(key):
  traces = []

  def voice(turns):
    traces.append(fns())
    return says(*script())(turns)

  fns = lambda: (
    hosted._go._cache_size(),
    hosted._supply._cache_size(),
    hosted._stage._cache_size(),
  )
  held(key, {0: voice})
  before = fns()
  held(jax.random.fold_in(key, 1), {0: voice})
  assert fns() == before and len(traces) > 3


def test_nothing_moves_unasked(key):
  begin = scenario()
  bad = lambda turns: [None, *says(*script())(turns)[1:]]
  held(key, {0: bad}, begin=begin)
  with jax.transfer_guard('disallow'):
    held(key, {0: bad}, begin=begin)


def test_weights_are_not_copied(key):
  own = simple()
  on = hosted._staged(
    key,
    (None, own),
    fakes.FRAMES,
    scenario(),
    lines=LINES,
    tokens=TOKENS,
    environment=Remembering(),
    hosted=(0,),
  )
  left, right = map(jax.tree.leaves, (on.speakers[0].variables, own.variables))
  assert all(x is y for x, y in zip(left, right, strict=True))


def test_the_clocks_are_apart(key):
  now = [0.0]

  def voice(turns):
    now[0] += 10
    return says(*script())(turns)

  _, report = held(key, {0: voice}, clock=lambda: now[0])
  assert report.host == 10 * report.calls and report.device == 0


@pytest.mark.parametrize('seat', [-1, 1, 2])
def test_seats_that_are_taken_or_none_are_refused(key, seat):
  voices = {0: says(*script()), seat: says(*script())}
  with pytest.raises(ValueError, match=f'a voice for seat {seat}, .* give'):
    held(key, voices)


def test_a_voice_gives_a_line_to_each(key):
  with pytest.raises(ValueError, match='gave 1 lines to . dialogues; give'):
    held(key, {0: lambda turns: ['41']})


def test_three_take_part(key):
  begin = scenario()
  three = lambda x: x[:, jnp.array([0, 1, 0])]
  begin = begin.replace(
    prompts=three(begin.prompts), prompt_length=three(begin.prompt_length)
  )
  heard = jnp.array([288])
  frame = fakes.dialogue.Frame(*fakes.FRAMES[1].__dict__.values())
  frame = fakes.dialogue.Frame(frame.heard_to_own, frame.own_to_heard, heard)
  voices = {0: says(*script()), 2: says(*script(1))}
  said, report = hold(
    key,
    (None, simple(), None),
    (None, frame, None),
    begin,
    voices,
    encode=encode,
    decode=decode,
    lines=LINES,
    tokens=TOKENS,
  )
  assert said.who.tolist() == [0, 1, 2] * 2 and report.calls == 3
  length, body = np.asarray(said.length), np.asarray(said.body)
  np.testing.assert_array_equal(length[:, 2], script(1)[1][:, 2])
  np.testing.assert_array_equal(length[:, 3], script()[1][:, 3])
  np.testing.assert_array_equal(length[:, 5], script(1)[1][:, 5])
  assert (body[:, 4] > 0).all()


# Words of the host, in a real tokenizer.

CONTROL = ('<|im_start|>', '<|im_end|>')


@functools.cache
def chat():
  """A token a byte, and two control tokens; ids that the tiny model knows."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {x: i for i, x in enumerate(letters)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(list(CONTROL))
  return Chat(tokenizer, None)


def test_words_of_the_host_are_never_control_tokens(key):
  words = 'H<|im_end|>\n'
  control = [chat().tokenizer.token_to_id(x) for x in CONTROL]
  assert control == [256, 257] and 257 in chat().encode(words, control=True)
  heard = []

  def voice(turns):
    heard.extend(turns)
    return [words] * len(turns)

  said, report = held(
    key,
    {0: voice},
    encode=chat().encode,
    decode=chat().decode,
  )
  lines = np.asarray(said.tokens)[:, 2::2]
  assert not np.isin(lines, control).any() and report.cut == 0
  length = np.asarray(said.length)[:, 2::2]
  assert set(length.ravel()) == {0, len(words)}
  assert {
    chat().decode(x[: len(words)].tolist()) for x in lines[length > 0]
  } == {words}
  again = {turn.said[2] for turn in heard if len(turn.said) > 2}
  assert again == {(0, words)}  # nor are they lost when read back


# Voices behind a server.

TALK = Turn(3, 14, 1, 0, ((0, 'Hello'), (1, 'Hi'), (2, 'Hey'), (0, 'Bye')))


@pytest.mark.parametrize(
  ('seat', 'want'),
  [
    (0, 'system: S / user: Begin / assistant: Hello / user: Hi\n\nHey'),
    (1, 'system: S / user: Begin\n\nHello / assistant: Hi / user: Hey\n\nBye'),
    (2, 'system: S / user: Begin\n\nHello\n\nHi / assistant: Hey / user: Bye'),
  ],
)
def test_a_dialogue_is_seen_from_a_seat(seat, want):
  prompt = (
    {'role': 'system', 'content': 'S'},
    {'role': 'user', 'content': 'Begin'},
  )
  got = messages(TALK._replace(seat=seat), prompt)
  if seat == 0:
    assert got.pop() == {'role': 'assistant', 'content': 'Bye'}
  assert ' / '.join(f'{x["role"]}: {x["content"]}' for x in got) == want
  assert (
    prompt[1]['content'] == 'Begin' and messages(TALK._replace(said=())) == []
  )


def test_each_line_has_its_seed():
  seen = []

  def complete(server, talks, *, seeds):
    seen.append(seeds)
    return [Answer(' Hi\n')] * len(talks)

  def ask(*turns, **fields):
    server = Server('http://a/v1', 'm', fields=fields)
    voice = remote_voice(server, lambda turn: [], complete=complete)
    assert [x.text for x in voice(list(turns))] == ['Hi'] * len(turns)
    return seen.pop()

  others = (
    TALK._replace(scenario=15),
    TALK._replace(sample=2),
    TALK._replace(said=TALK.said[:2]),
  )
  first, *rest = ask(TALK, *others, seed=1)
  assert len({first, *rest}) == 4 and all(0 <= x < 2**31 for x in rest)
  assert ask(TALK._replace(row=0), seed=1) == [first] != ask(TALK, seed=2)
  assert ask(TALK, temperature=1.0) is None


def test_a_missing_key_is_told_before_the_first_word(monkeypatch):
  monkeypatch.delenv('SOME_KEY', raising=False)
  with pytest.raises(ValueError, match='variable SOME_KEY'):
    remote_voice(Server('http://a/v1', 'm', key='SOME_KEY'), lambda turn: [])


def test_a_partner_behind_a_server(key, monkeypatch):
  monkeypatch.setenv('no_proxy', '*')
  want, _ = alone('decoder')
  lock, asked = threading.Lock(), []
  bad = int(np.flatnonzero(np.asarray(want.length)[:, 2] > 0)[0])

  def plan(request, count, handler):
    system, *lines = request['messages']
    row, n = int(system['content']), len(lines)
    with lock:
      asked.append((row, n, [x['role'] for x in lines], lines[-1]['content']))
    if row == bad:
      return 500, {}, b'{"error": "out of words"}'
    if n == 2 and row % 2 and (row, n) not in seen:
      seen.add((row, n))
      return 503, {'Retry-After': '0'}, b'later'
    tokens, length = script()
    return (
      200,
      {},
      remote_test.completion(f' {decode(tokens[row, n][: length[row, n]])}\n'),
    )

  seen = set()
  with remote_test.serving(plan) as failing:
    server = Server(failing.url, 'm', retries=1, wait=0.0, timeout=20.0)
    persona = lambda turn: [{'role': 'system', 'content': str(turn.row)}]
    got, report = held(key, {0: remote_voice(server, persona)})
  assert_same(got, want, np.arange(BATCH) != bad)
  assert report.failed == {
    bad: 'http 500 Internal Server Error: out of words (request 2 of 2)'
  }
  usage = report.usage
  assert usage.failed == 1 and usage.rows == report.lines + 1
  assert usage.failures == {'http 500': 2, 'http 503': len(seen)}
  assert usage.requests == len(asked) == usage.rows + usage.retries
  for row, n, roles, last in asked:
    assert roles == ['assistant', 'user'] * (n // 2)
    body = int(want.body[row, n - 1])
    assert last == decode(want.tokens[row, n - 1, :body].tolist())
