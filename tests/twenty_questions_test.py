"""20 Questions, against string searches and a slow Bayes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax.models import gguf_header, vocabulary
from persona_jax.rollout import phrases as phrasings
from persona_jax.rollout import twenty_questions
from persona_jax.rollout.environment import Heard
from persona_jax.rollout.twenty_questions import (
  FINISHED,
  INVALID,
  NO,
  REPEATED,
  WORDS,
  YES,
  Phrases,
  TwentyQuestions,
  at_random,
  greedy,
)
from persona_jax.text import pieces

TABLE = twenty_questions.table()
QUESTIONS = TABLE.questions()
KNOWN = TABLE.phrasings()
LETTERS = [bytes([byte]) for byte in range(256)]  # a token a byte
TOKENS = 64


def letters_of(text):
  return re.sub(rb'[^a-z0-9]', b'', text.lower()).decode()


def meaning(parts):
  """The question that a text means, by looking at all of its ends.

  `parts` are the bytes of its tokens; a phrasing begins one of them.
  """
  text = b''.join(parts)
  if text.count(b'?') > 1:
    return -1
  start = 0
  for part in parts:
    before, after = text[:start], text[start:]
    inside = re.search(rb'[a-zA-Z0-9]\Z', before)
    if not (inside and re.match(rb'[a-zA-Z0-9]', after)):
      question = KNOWN.get(letters_of(after), -1)
      if question >= 0:
        return question
    start += len(part)
  return -1


def meaning_of(text):
  return meaning([bytes([byte]) for byte in text.encode()])


def ways(rng):
  """Every way to ask and every plain guess, and some of their variants."""
  variants = list(TABLE._variants())
  some = rng.choice(len(variants), 1500, replace=False)
  return [*TABLE._ways(), *(variants[i] for i in some)]


def dressed(rng, text):
  """The same question with other case, punctuation and words before it."""
  letters = list(text)
  for i in np.flatnonzero(rng.random(len(letters)) < 0.2):
    letters[i] = letters[i].upper()
  for i in np.flatnonzero(rng.random(len(letters)) < 0.1):
    letters[i] += str(rng.choice([',', '-', "'", ' ', '"', '…', '*']))
  before = ['', 'Okay! ', 'Hmm—', '1. ', 'So, my next question:\n', 'é ']
  after = ['', '?', '?', ' ?', '?\n', '.', ' ?!']
  return str(rng.choice(before)) + ''.join(letters) + str(rng.choice(after))


def spoilt(rng, text):
  """Another text: one word more or less, turned round, or asked twice."""
  words = text.split()
  i = rng.integers(len(words))
  return [
    ' '.join(words[:i] + ['not'] + words[i:]) + '?',
    ' '.join(words[:i] + words[i + 1 :]) + '?',
    ' '.join(words[1:] + words[:1]) + '?',
    f'th{text}?',
    f'{text}? {text}?',
    f'{text} please?',
    f"{words[0]}n't {' '.join(words[1:])}?",
  ][rng.integers(7)]


def lines(rng):
  asked = ways(rng)
  wrong = [asked[i][0] for i in rng.choice(len(asked), 1500)]
  texts = [dressed(rng, text) for text, _ in asked]
  texts += [spoilt(rng, text) for text in wrong]
  return texts, [question for _, question in asked]


def together(rows, size=None):
  """Token rows padded with an id of which nothing may be heard."""
  size = size or max(map(len, rows))
  tokens = np.full((len(rows), size), ord('?'), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = [*row]
  return jnp.asarray(tokens), jnp.asarray([len(x) for x in rows], jnp.int32)


@jax.jit
def found(phrases, tokens, length):
  return jax.vmap(phrases.find)(tokens, length)


@pytest.fixture(scope='session')
def smollm_vocabulary(gguf_path):
  metadata, _ = gguf_header.read(gguf_path)
  return vocabulary.from_gguf(metadata)


# What is understood.


def test_every_phrasing_in_a_real_tokenizer(smollm_vocabulary):
  texts, want = lines(np.random.default_rng(0))
  bytes_of = pieces.token_bytes(smollm_vocabulary)
  encoded = smollm_vocabulary.encode_batch(texts, add_special_tokens=False)
  rows = [x.ids for x in encoded]
  got = found(Phrases.of(KNOWN, bytes_of), *together(rows))
  np.testing.assert_array_equal(got[: len(want)], want)
  slow = [meaning([bytes_of[i] for i in row]) for row in rows]
  np.testing.assert_array_equal(got, slow)
  # Its tokens end where words end, so that the text alone tells the meaning.
  np.testing.assert_array_equal(got, [meaning_of(text) for text in texts])
  assert np.mean(got[len(want) :] == -1) > 0.7  # 'is it fruit' is one, too


def test_every_phrasing_in_made_up_tokens():
  # Tokens that cut words anywhere, hold blanks inside, or say nothing.
  rng = np.random.default_rng(1)
  texts, _ = lines(rng)
  vocabulary = list(LETTERS)
  for text in rng.choice(texts, 600):
    start = rng.integers(0, max(len(text) - 1, 1))
    vocabulary.append(text[start : start + rng.integers(2, 9)].encode())
  silent = [*range(len(vocabulary), len(vocabulary) + 3)]
  rows = [cut(rng, text.encode(), vocabulary, silent) for text in texts]
  tokens, length = together(rows)
  phrases = Phrases.of(KNOWN, [*vocabulary, b''])  # two have no row
  got = found(phrases, tokens, length)
  bytes_of = [*vocabulary, b'', b'', b'']
  slow = [meaning([bytes_of[i] for i in row]) for row in rows]
  np.testing.assert_array_equal(got, slow)
  assert 0.5 < np.mean(np.asarray(slow) >= 0) < 0.9


def cut(rng, text, vocabulary, silent):
  """Random tokens that spell `text`, silent ones only between words."""
  row, start = [], 0
  fits = {}
  for i, piece in enumerate(vocabulary):
    fits.setdefault(piece[:2], []).append(i)
  while start < len(text):
    own = [
      i
      for i in fits.get(text[start : start + 2], ())
      if text.startswith(vocabulary[i], start)
    ]
    token = rng.choice(own) if own and rng.random() < 0.6 else text[start]
    if text[start : start + 1] == b' ' and rng.random() < 0.1:
      row.append(int(rng.choice(silent)))
    row.append(int(token))
    start += len(vocabulary[token])
  return row


@functools.cache
def game(**settings):
  """A game whose tokens are bytes."""
  return TwentyQuestions.of(
    TABLE, LETTERS, lambda text: [*text.encode()], tokens=TOKENS, **settings
  )


@pytest.mark.parametrize(
  ('text', 'want'),
  [
    ('Is it a violin?', 'violin'),
    ('is it the violin', 'violin'),
    ('IS IT VIOLIN?', 'violin'),
    ('Is the object a violin?', 'violin'),
    ('My guess is a violin.', 'violin'),
    ('Is it a pair of scissors?', 'scissors'),
    ('is it the sun?', 'sun'),
    ('Is it a T-shirt?', 't-shirt'),
    ('Is it a screwdriver?', 'screwdriver'),  # not a river
    ('Is it acorn?', None),  # or a corn
    ('Is it an acorn?', 'acorn'),
    ('Is it corn?', 'corn'),
    ('Is it alive?', 'alive'),
    ('Is the object alive?', 'alive'),
    ('Does this object have 6 legs?', 'insect'),
    ('Does it have 4 legs?', 'has four legs'),
    ('A dog? Is it alive?', None),
    ('Is it alive? Is it red?', None),
    ('Is it alive??', None),
    ('Is it not alive?', None),
    ("Isn't it alive?", None),
    ('This it alive?', None),
    ('What is this? it is alive', None),
    ('No is it alive', 'alive'),
    ('Is it alive or not?', None),
    ('violin', None),
    ('?', None),
    ('', None),
    ('Is it a guess? ', None),
  ],
  ids=repr,
)
def test_questions_by_hand(text, want):
  tokens, length = together([text.encode()], TOKENS)
  question = int(found(game().phrases, tokens, length)[0])
  names = [*TABLE.attributes, *TABLE.objects]
  assert (names[question] if question >= 0 else None) == want
  assert question == meaning_of(text)


def test_the_longest_phrasing_is_meant():
  phrases = Phrases.of({'isita': 0, 'noisita': 1, 'a': 2}, LETTERS)
  texts = [b'is it a', b'no is it a', b'so is it a', b'ah a', b'aha', b'a b']
  got = found(phrases, *together(texts))
  assert got.tolist() == [0, 1, 0, 2, -1, -1]


def test_tokens_around_the_line_are_not_heard():
  tokens, _ = together([b'is it alive? is it red?'])
  for length, want in ((12, 'alive'), (23, None), (11, 'alive'), (10, None)):
    question = int(found(game().phrases, tokens, jnp.array([length]))[0])
    assert want == (TABLE.attributes[question] if question >= 0 else None)


def test_canonical_questions():
  assert QUESTIONS[0] == 'Is it alive?'
  nouns = {'violin': 'a violin', 'scissors': 'scissors', 'sun': 'the sun'}
  for name, noun in nouns.items():
    i = TABLE.objects.index(name)
    assert TABLE.guess(i) == f'Is it {noun}?'
    assert QUESTIONS[len(TABLE.attributes) + i] == TABLE.guess(i)
  assert [meaning_of(x) for x in QUESTIONS] == list(range(len(QUESTIONS)))


def test_every_object_can_be_told_from_all_others():
  assert len(np.unique(TABLE.answers, axis=0)) == len(TABLE.objects)
  assert TABLE.answers.shape == (len(TABLE.objects), len(TABLE.attributes))
  i, j = TABLE.objects.index('dog'), TABLE.attributes.index('mammal')
  assert TABLE.answers[i, j] and not TABLE.answers[i + 1 :, j].all()


def test_variants_give_way():
  # 'Is it a corn?' may be a corn or 'acorn', unless it is a way to ask.
  table = dataclasses.replace(
    TABLE,
    objects=('acorn', 'corn'),
    articles=('an', ''),
    attributes=('cereal',),
    asks=(('is it a cereal', 'is this a corn'),),
    answers=np.array([[False], [True]]),
  )
  known = table.phrasings()
  assert 'isitacorn' not in known
  clear = ('isthisacorn', 'isitanacorn', 'isitcorn')
  assert [known[text] for text in clear] == [0, 1, 2]


# Whole games.


def heard(text, line=0):
  tokens, length = together([text.encode()], TOKENS)
  return Heard(tokens[0], length[0], jnp.int32(line), jnp.int32(0))


@jax.jit
def step(game, state, heard):
  return game.step(None, state, heard)


def played(game, secret, texts):
  """The outcomes of these lines, one by one."""
  state = game.reset(None, jnp.int32(TABLE.objects.index(secret)))
  outcomes = []
  for i, text in enumerate(texts):
    outcomes.append(step(game, state, heard(text, i)))
    state = outcomes[-1].state
  return outcomes


@functools.partial(jax.jit, static_argnums=0)
def tournament(choose, game, secrets):
  """All games side by side, one question of `choose` a turn."""
  rows = together([x.encode() for x in QUESTIONS], TOKENS)

  def turn(state, seed):
    key = jax.random.key(seed)
    question = choose(key, game.answers, state.possible)
    said = Heard(rows[0][question], rows[1][question], *jnp.zeros((2,), int))
    out = game.step(None, state, said)
    over = state.solved | (state.turns >= game.turns)
    after = jax.tree.map(functools.partial(jnp.where, over), state, out.state)
    asked = jnp.where(over, -1, question)
    return after, (asked, jnp.where(over, 0.0, out.reward), after.belief)

  def one(secret):
    seeds = 100 * secret + jnp.arange(game.turns)
    return jax.lax.scan(turn, game.reset(None, secret), seeds)

  return jax.vmap(one)(secrets)


def by_gain(key, answers, possible):
  del key
  return greedy(answers, possible)


@functools.cache
def all_games(choose, **settings):
  secrets = jnp.arange(len(TABLE.objects))
  return tournament(choose, game(**settings), secrets)


def bayes(secret, asked):
  """log b_t of the secret and the last posterior, by Bayes' rule in numpy."""
  replies = TABLE.replies()
  belief = np.full(len(TABLE.objects), 1 / len(TABLE.objects))
  history = [np.log(belief[secret])]
  for question in asked:
    likelihood = replies[:, question] == replies[secret, question]
    belief = belief * likelihood / np.sum(belief * likelihood)
    history.append(np.log(belief[secret]))
  return np.array(history), belief


def test_halving_finds_every_object():
  state, _ = all_games(by_gain)
  least = np.log2(len(TABLE.objects))
  turns = np.asarray(state.turns)
  assert np.all(state.solved)
  assert least - 1 < turns.mean() < least + 1
  assert turns.max() <= least + 4
  assert not np.any(state.invalid) and not np.any(state.repeated)


def test_chance_finds_objects_later():
  halving, _ = all_games(by_gain)
  state, (asked, *_) = all_games(at_random)
  assert 0.6 < np.mean(state.solved) < 0.95
  assert np.mean(state.turns) > np.mean(halving.turns) + 1
  assert not np.any(state.invalid) and not np.any(state.repeated)
  assert len(np.unique(asked[:, 0])) > 50


@pytest.mark.parametrize('choose', [by_gain, at_random])
def test_beliefs_are_those_of_bayes(choose):
  state, (asked, _, beliefs) = all_games(choose)
  asked, beliefs = np.asarray(asked), np.asarray(beliefs)
  histories = np.asarray(state.history)
  for secret, turns in enumerate(np.asarray(state.turns)):
    history, belief = bayes(secret, asked[secret, :turns])
    kept = histories[secret]
    np.testing.assert_allclose(kept[: turns + 1], history, atol=1e-5)
    np.testing.assert_array_equal(kept[turns:], kept[turns])
    final = np.exp(beliefs[secret, -1])
    np.testing.assert_allclose(final, belief, atol=1e-6)
    # The rises add up to what the whole game told.
    told = np.log(belief[secret]) + np.log(len(TABLE.objects))
    np.testing.assert_allclose(np.sum(np.diff(kept)), told, atol=1e-5)
    assert np.all(np.diff(kept) >= 0)


def test_rewards_add_up_to_those_of_the_paper():
  settings = {'turns': 9, 'belief_weight': 0.1}  # too few turns for some
  state, (_, reward, _) = all_games(at_random, **settings)
  won, turns = np.asarray(state.solved), np.asarray(state.turns)
  rises = np.diff(np.asarray(state.history), axis=1)
  rises[won, turns[won] - 1] = 0.0  # the turn that wins has no rise
  want = 2.0 * won - 0.05 * turns + 0.1 * rises.sum(axis=1)
  np.testing.assert_allclose(np.sum(reward, axis=1), want, atol=1e-4)
  assert 0.1 < won.mean() < 0.9


def test_many_games_are_as_one():
  rng = np.random.default_rng(0)
  texts = rng.choice([*QUESTIONS[:20], 'What?', 'Is it red? Is it big?'], 16)
  env = game(belief_weight=0.5)
  some = [QUESTIONS[4 * (i % 5) : 4 * (i % 5) + i % 4] for i in range(16)]
  states = [
    played(env, TABLE.objects[20 * i], texts)[-1].state
    if texts
    else env.reset(None, jnp.int32(0))
    for i, texts in enumerate(some)
  ]
  rows = [heard(text) for text in texts.tolist()]
  stacked = lambda *x: jnp.stack(x)
  many = jax.jit(jax.vmap(env.step, in_axes=(None, 0, 0)))(
    None, jax.tree.map(stacked, *states), jax.tree.map(stacked, *rows)
  )
  single = jax.tree.map(stacked, *map(step, [env] * 16, states, rows))
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.tree.leaves(many),
    (jax.tree.leaves(single)),
  )
  assert len(np.unique(many.length)) == 3  # yes or no, invalid, repeated


def words(outcome):
  said = np.asarray(outcome.words[: outcome.length]).tolist()
  assert not np.any(outcome.words[outcome.length :])
  return bytes(said).decode()


def test_a_game_by_hand():
  script = [
    # line, what the oracle says, reward
    ('Hello!', 'invalid', -5.0 - 0.05),
    ('Is it an animal?', 'yes', -0.05),
    ('Hm. Is it a kind of animal?', 'repeated', -1.05),
    ('Tell me!', 'invalid', -5.05),
    ('Tell me!', 'invalid', -5.05),
    ('Is it a bird?', 'no', -0.05),
    ('Is it a cat?', 'no', -0.05),
    ('My guess is the cat', 'repeated', -1.05),
    ('Is it a dog? Is it a cow?', 'invalid', -5.05),
    ('Is it a dog?', 'finished', 1.95),
  ]
  outcomes = played(game(), 'dog', [text for text, *_ in script])
  for outcome, (_, said, reward) in zip(outcomes, script, strict=True):
    assert words(outcome) == WORDS[said]
    np.testing.assert_allclose(outcome.reward, reward, rtol=1e-6)
    assert bool(outcome.terminated) == (said == 'finished')
    assert not outcome.truncated
  end = outcomes[-1].state
  counts = (end.turns, end.invalid, end.repeated, jnp.sum(end.asked))
  assert [int(x) for x in counts] == [10, 4, 2, 4]
  # Only new, valid questions tell something; the cat alone is out by a guess.
  told = np.diff(np.asarray(end.history))[:10] > 0
  assert told.tolist() == [0, 1, 0, 0, 0, 1, 1, 0, 0, 1]
  before, after = outcomes[5].state.possible, outcomes[6].state.possible
  assert np.flatnonzero(before != after) == [TABLE.objects.index('cat')]
  assert np.flatnonzero(end.possible) == [TABLE.objects.index('dog')]


def test_belief_is_paid_where_it_rises():
  env = game(belief_weight=0.1, turn_cost=0.0)
  texts = ['Is it alive?', 'Is it alive?', 'Is it a dog?']
  outcomes = played(env, 'dog', texts)
  alive = TABLE.answers[:, TABLE.attributes.index('alive')]
  rise = np.log(len(alive) / alive.sum())
  got = [float(outcome.reward) for outcome in outcomes]
  np.testing.assert_allclose(got, [0.1 * rise, -1.0, 2.0], rtol=1e-5)


@pytest.mark.parametrize('last', ['Is it a dog?', 'Is it a cat?', 'What?'])
def test_games_are_cut_after_their_turns(last):
  texts = ['What?', 'Is it alive?', last]
  outcomes = played(game(turns=3), 'dog', texts)
  won = last == 'Is it a dog?'
  assert [bool(x.truncated) for x in outcomes] == [False, False, not won]
  assert [bool(x.terminated) for x in outcomes] == [False, False, won]


def test_a_game_of_one_turn_has_no_cost():
  # 2 = r_eog of the paper, whose cost of turns begins with the second.
  assert float(played(game(), 'dog', ['Is it a dog?'])[0].reward) == 2.0
  lost = played(game(turns=1), 'dog', ['Is it a cat?'])[0]
  assert float(lost.reward) == 0.0 and lost.truncated


def test_costs_are_as_asked():
  env = game(win=7.0, turn_cost=1.0, invalid_cost=2.0, repeated_cost=3.0)
  texts = ['What?', 'Is it red?', 'Is it red?', 'Is it a dog?']
  got = [float(outcome.reward) for outcome in played(env, 'dog', texts)]
  assert got == [-3.0, -1.0, -4.0, 6.0]


def test_only_candidates_are_believed_in():
  chosen = tuple(TABLE.objects.index(x) for x in ('dog', 'cat', 'violin'))
  env = game(candidates=chosen, belief_weight=0.1, turn_cost=0.0)
  texts = ['Is it alive?', 'Is it a cat?']
  first, second = played(env, 'dog', texts)
  history = [-np.log(3)] + [-np.log(2)] * 20
  np.testing.assert_allclose(first.state.history, history, rtol=1e-6)
  np.testing.assert_allclose(first.reward, 0.1 * np.log(1.5), rtol=1e-5)
  assert np.flatnonzero(second.state.possible) == chosen[:1]
  # A secret beyond them: no belief in it rises or falls.
  outcomes = played(env, 'cow', ['Is it alive?', 'Is it red?', 'Is it a cow?'])
  assert [float(x.reward) for x in outcomes] == [0.0, 0.0, 2.0]
  assert outcomes[-1].terminated


def test_replies_are_rows_of_the_words():
  order = {YES: 'yes', NO: 'no', INVALID: 'invalid', REPEATED: 'repeated'}
  order[FINISHED] = 'finished'
  env = game()
  for row, name in order.items():
    said = bytes(env.words[row, : env.length[row]].tolist()).decode()
    assert said == WORDS[name]


def test_the_kinds_of_arrays_stay():
  start = game().reset(None, jnp.int32(3))
  after = played(game(), 'dog', ['Is it alive?'])[0].state
  for before, leaf in zip(*map(jax.tree.leaves, (start, after)), strict=True):
    assert (before.shape, before.dtype) == (leaf.shape, leaf.dtype)
    assert not before.weak_type and not leaf.weak_type


# Who asks.


def test_greedy_questions_tell_most():
  rng = np.random.default_rng(0)
  replies = TABLE.replies()
  choose = jax.jit(greedy)
  for size in [1, 2, 3, 4, 7, 30, 200, len(replies)]:
    possible = np.zeros(len(replies), bool)
    possible[rng.choice(len(replies), size, replace=False)] = True
    chance = replies[possible].mean(axis=0)
    with np.errstate(divide='ignore', invalid='ignore'):
      bits = chance * np.log2(chance) + (1 - chance) * np.log2(1 - chance)
    gain = -np.nan_to_num(bits)
    question = int(choose(replies, possible))
    assert gain[question] >= gain.max() - 1e-9
    if size <= 3:
      assert question - TABLE.answers.shape[1] in np.flatnonzero(possible)


def test_random_questions_tell_something(key):
  replies = TABLE.replies()
  choose = jax.jit(jax.vmap(at_random, in_axes=(0, None, None)))
  for size in (1, 2, 20):
    keys = jax.random.split(jax.random.fold_in(key, size), 500)
    possible = np.arange(len(replies)) < size
    asked = np.unique(choose(keys, replies, possible))
    attributes = TABLE.answers[:size]
    telling = np.flatnonzero(attributes.any(axis=0) & ~attributes.all(axis=0))
    if size == 1:
      telling = [TABLE.answers.shape[1]]
    np.testing.assert_array_equal(asked, telling)


def test_random_guesses_where_no_attribute_tells(key):
  replies = np.concatenate([np.ones((3, 2), bool), np.eye(3, dtype=bool)], 1)
  choose = jax.jit(jax.vmap(at_random, in_axes=(0, None, None)))
  possible = np.array([True, False, True])
  asked = choose(jax.random.split(key, 50), replies, possible)
  assert np.unique(asked).tolist() == [2, 4]


# What is refused.


def altered(**fields):
  return dataclasses.replace(TABLE, **fields)


@pytest.mark.parametrize(
  ('asks', 'said'),
  [
    ((('is it a dog',), *TABLE.asks[1:]), "'is it a dog'.* asks for 'dog' and"),
    ((TABLE.asks[0], *TABLE.asks[:-1]), "asks for 'animal' and for 'alive'"),
    ((('¿…?',), *TABLE.asks[1:]), "'¿…\\?' has no letters to know it by"),
  ],
  ids=['object', 'attribute', 'letters'],
)
def test_tables_that_are_refused(asks, said):
  with pytest.raises(ValueError, match=said):
    altered(asks=asks).phrasings()


def test_words_that_do_not_fit():
  of = functools.partial(
    TwentyQuestions.of, TABLE, LETTERS, lambda text: [*text.encode()]
  )
  with pytest.raises(ValueError, match=r'question.*invalid\) take 29 tokens'):
    of(tokens=28)
  with pytest.raises(ValueError, match=r"the words '' \(no\) take 0 tokens"):
    of(tokens=40, words=WORDS | {'no': ''})


def test_hashes_that_are_alike(monkeypatch):
  hashed = phrasings._hashed
  seeds = []

  def coarse(text, seed):
    seeds.append(seed)
    code, power = hashed(text, seed)
    return code & np.uint32(0xF if seed < limit else 0xFFFFFFFF), power

  monkeypatch.setattr(phrasings, '_hashed', coarse)
  limit = 3  # the next seeds are tried, and the tokens take the same
  texts = {f'{number}': number for number in range(20)}
  phrases = Phrases.of(texts, LETTERS)
  assert seeds == [0, 1, 2, 3, 3]
  assert found(phrases, *together([b'7', b'13', b'31'])).tolist() == [7, 13, -1]
  limit = 64
  with pytest.raises(ValueError, match='hashes of 20 phrasings are not all'):
    Phrases.of(texts, LETTERS)


def test_hashes_of_near_misses_are_others():
  # Letters swapped or changed: what a polynomial tells apart least.
  rng = np.random.default_rng(0)
  texts = [x for x in KNOWN if len(x) > 12][::7]
  near = []
  for text in texts:
    i, j = sorted(rng.choice(len(text), 2, replace=False))
    near += [
      text[:i] + text[j] + text[i + 1 : j] + text[i] + text[j + 1 :],
      text[:i] + text[i + 1 :] + text[i],
      text[:j] + rng.choice(list('aeiou')) + text[j + 1 :],
    ]
  near = [text for text in near if text not in KNOWN]
  size = max(map(len, near))
  got = found(game().phrases, *together([x.encode() for x in near], size))
  want = [meaning_of(text) for text in near]
  np.testing.assert_array_equal(got, want)
  assert len(near) > 10_000
