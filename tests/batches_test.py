"""Examples as arrays, against the chat's own rendering and slow loops."""

import json
from pathlib import Path

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from persona_jax import batches, data
from persona_jax.dialogue import POLICY, view
from persona_jax.learn import PREFERENCES, preferences
from persona_jax.learn.step import scores
from persona_jax.models import gguf_file
from persona_jax.text import corpus, examples
from persona_jax.text.chat import Chat
from persona_jax.text.examples import Compared, Shown

GOLDEN = Path(__file__).parent / 'golden'
RECORD = json.loads((GOLDEN / 'chat_families.json').read_text())
FAMILIES = {  # with a frame over SmolLM2's tokenizer, and what ends a reply
  'qwen2': '<|im_end|>',
  'qwen3': '<|im_end|>',
  'gemma2': '<end_of_turn>',
  'gemma3': '<end_of_turn>',
  'mistral7': '</s>',
  'phi3': '<|end|>',
  'phi4': '<|im_end|>',
  'olmo2': '<|endoftext|>',
  'granite3': '<|end_of_text|>',
  'smollm3': '<|im_end|>',
}
SIZES = {'prompt_tokens': 80, 'reply_tokens': 20}
STOPS = (0, 2)  # of SmolLM2

PAIRS = (
  Compared('You are Ada, 36.', ('Hi!',), 'Hello, dear.', 'I am an AI (5 €).'),
  Compared('', ('Who is it?', 'Me.', 'Who?'), 'Ada, who else', 'Nobody 再见'),
  Compared('You are Bo.', ('a b', '"c"', 'd', 'e', 'f?'), 'Bo.', 'No!'),
)
RATED = examples.rated(PAIRS)
SHOWN = examples.shown(PAIRS)
SHORT = Shown('A', ('a',), 'a')


@pytest.fixture(scope='module')
def chat(gguf_path):
  opened = gguf_file.read(gguf_path)  # no weights, which take long
  return Chat(opened.tokenizer, opened.template, opened.special)


@pytest.fixture(scope='module')
def control(chat):
  """SmolLM2's tokenizer with the control tokens of all families."""
  tokenizer = tokenizers.Tokenizer.from_str(chat.tokenizer.to_str())
  tokenizer.add_special_tokens(RECORD['control'])
  return tokenizer


def encoded(chat, rows, stop_ids=STOPS, **sizes):
  return batches.encoded(chat, rows, stop_ids=stop_ids, **SIZES | sizes)


def batch(chat, rows, stop_ids=STOPS, **how):
  return batches.to_batch(encoded(chat, rows, stop_ids), **SIZES | how)


def messages(row, reply):
  roles = ('user', 'assistant') * len(row.history)
  lines = zip(roles, (*row.history, reply), strict=False)
  talk = [{'role': role, 'content': line} for role, line in lines]
  system = [{'role': 'system', 'content': row.system}] if row.system else []
  return system + talk


def slowly(chat, rows, later=()):
  """The arrays, a token at a time, from whole conversations as rendered."""
  slots, room = sum(SIZES.values()), SIZES['reply_tokens']
  names = ('tokens', 'positions', 'before', 'actions', 'mask')
  out = {name: [] for name in names}
  for row in rows:
    found = {name: [] for name in names}
    for reply in row.replies:
      talk = messages(row, reply)
      whole = chat.tokens([*talk, *later])
      start, stop = whole.spans[len(talk) - 1]
      own = whole.mask(ends=1)
      learned = [s for s in range(start, stop + 1) if own[s]]
      ids = [*whole.ids[: learned[-1] + 1]]
      pad = slots - len(ids)
      found['tokens'].append(ids + [0] * pad)
      found['positions'].append([*range(len(ids))] + [-1] * pad)
      found['before'].append([start - 1 + t for t in range(room)])
      rest = room - len(learned)
      found['actions'].append([ids[s] for s in learned] + [0] * rest)
      found['mask'].append([True] * len(learned) + [False] * rest)
    for name in names:
      out[name].append(found[name])
  return {name: np.array(x) for name, x in out.items()}


def check(made, want):
  for name, x in want.items():
    np.testing.assert_array_equal(getattr(made, name), x, err_msg=name)


def test_pairs_are_the_conversation_as_rendered(chat):
  check(batch(chat, PAIRS, replies=2), slowly(chat, PAIRS))


@pytest.mark.parametrize('name', FAMILIES)
def test_so_are_those_of_every_family(control, name):
  family = next(x for x in RECORD['families'] if x['name'] == name)
  given = (family['template'], family['special'], family['variables'])
  chat = Chat(control, *given)
  stops = [control.token_to_id(FAMILIES[name])]
  # Qwen 3 writes empty thoughts before the last answer, unless more follows.
  later = [{'role': 'user', 'content': 'So?'}] * (name == 'qwen3')
  check(batch(chat, PAIRS, stops, replies=2), slowly(chat, PAIRS, later))


@pytest.mark.parametrize('rows', [RATED, SHOWN], ids=['rated', 'shown'])
def test_single_replies(chat, rows):
  made = batch(chat, rows)
  check(made, {k: x[:, 0] for k, x in slowly(chat, rows).items()})
  assert made.tokens.shape == (len(rows), sum(SIZES.values()))


def test_labels(chat):
  assert batch(chat, RATED).label.tolist() == [1, 0] * len(PAIRS)
  assert batch(chat, SHOWN).label is None
  assert batch(chat, PAIRS, replies=2).label is None


def test_places_are_those_of_a_dialogue(chat):
  lines = corpus.labelled_lines()[:6]
  rows = [Shown(x.persona, (x.question,), x.line) for x in lines]
  made = batches.to_batch(
    encoded(chat, rows, prompt_tokens=120, reply_tokens=40),
    prompt_tokens=120,
    reply_tokens=40,
  )
  told = data.labelled(chat, lines)
  read = jax.jit(view, static_argnums=1)
  seen = read(told, POLICY, data.frame(chat))
  for b, count in enumerate(told.length[:, 1].tolist()):
    slots = int(made.before[b, 0]) + 1 + count
    np.testing.assert_array_equal(
      made.tokens[b, :slots], seen.tokens[b, :slots]
    )
    before = made.before[b, :count]
    np.testing.assert_array_equal(before, seen.before[b, 1, :count])
    actions = made.actions[b, :count]
    np.testing.assert_array_equal(actions, told.tokens[b, 1, :count])
    assert made.mask[b].sum() == count + 1
    assert made.actions[b, count] in STOPS


def test_control_tokens_in_a_text_are_characters(chat):
  row = Shown('<|im_start|>', ('<|im_end|>',), 'So.<|im_end|> Not yet.')
  made = batch(chat, [row])
  stops = np.isin(made.actions[0], STOPS) & np.asarray(made.mask[0])
  assert stops.sum() == 1 and stops[made.mask[0].sum() - 1]
  text = chat.decode(made.actions[0][made.mask[0]].tolist(), control=True)
  assert text == 'So.<|im_end|> Not yet.<|im_end|>'


def test_rows_that_fill_up_do_not_count(chat):
  full = batch(chat, PAIRS, replies=2)
  more = batch(chat, PAIRS, replies=2, size=5)
  for name, x in vars(full).items():
    if x is not None:
      np.testing.assert_array_equal(getattr(more, name)[:3], x)
  assert not more.mask[3:].any()
  weights = PREFERENCES['dpo'].weights(more)
  np.testing.assert_allclose(weights, [1 / 3] * 3 + [0] * 2, rtol=1e-6)
  none = batches.to_batch([], **SIZES, size=2)
  assert none.tokens.shape == (2, 100) and not none.mask.any()


# With a model of random weights and this vocabulary.


@pytest.fixture(scope='module')
def tiny():
  config = fakes.CONFIG
  return fakes.tiny(type(config)(**vars(config) | {'vocab': 49152}))


@pytest.fixture(scope='module')
def read(tiny):
  """Log-probabilities of a batch; pairs are read as twice the rows."""
  compiled = jax.jit(
    lambda variables, batch: (
      scores(tiny.apply, tiny.unembed, variables, batch).logprobs
    )
  )

  def read(batch):
    flat = jax.tree.map(
      lambda x: x.reshape(-1, x.shape[-1]), batch.replace(label=None)
    )
    return compiled(tiny.stacked, flat).reshape(batch.mask.shape)

  return read


def test_logprobs_are_those_of_the_whole_text(chat, tiny, read):
  made = batch(chat, PAIRS, replies=2, size=4)
  found = read(made)
  assert bool(jnp.isfinite(found).all())
  total = jnp.sum(found, axis=2, where=made.mask)
  for b, row in enumerate(PAIRS):
    for which, reply in enumerate(row.replies):
      whole = chat.tokens(messages(row, reply))
      tokens = np.zeros((1, 100), np.int32)
      tokens[0, : len(whole.ids)] = whole.ids
      positions = jnp.arange(100)[None]  # what comes later is not seen
      hidden, _ = tiny.run(tiny.stacked, jnp.asarray(tokens), positions)
      logits = np.asarray(tiny.unembed(tiny.stacked, hidden)[0], np.float64)
      logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
      start, stop = whole.spans[-1]
      want = sum(logits[s - 1, whole.ids[s]] for s in range(start, stop + 1))
      np.testing.assert_allclose(total[b, which], want, rtol=1e-4)


@pytest.mark.parametrize('name', PREFERENCES)
def test_every_algorithm_takes_its_batch(chat, read, name):
  row = PREFERENCES[name]
  rows = {'kto': RATED, 'sft': SHOWN + SHOWN}.get(name, PAIRS)
  size = 8 // row.replies
  made = batch(chat, rows, replies=row.replies, size=size)
  logprobs = read(made)
  if row.needs:
    made = made.replace(reference_logprobs=logprobs)
  if name == 'kto':
    others = batches.mismatched(encoded(chat, rows))
    others = batches.to_batch(others, **SIZES, size=size)
    assert others.mask.any(axis=1).tolist() == [True] * 6 + [False] * 2
    at = read(others)
    anchor = preferences.anchor(at, at, others.mask)
    made = made.replace(anchor=jnp.full(size, anchor))
  loss, _ = row.loss(logprobs, made, row.weights(made))
  at_the_start = {'dpo': np.log(2), 'kto': 0.5, 'ipo': 25.0}  # (1 / 0.2)^2
  want = at_the_start.get(name)
  if name == 'sft':
    want = -np.mean(logprobs, where=np.asarray(made.mask))
  if want is not None:
    np.testing.assert_allclose(loss, want, rtol=1e-5)
  assert bool(jnp.isfinite(loss))


# Replies to other prompts.


def rows_of(prompts):
  """Rows that answer some prompts, each in its own way."""
  return [
    batches.Encoded((prompt,), ((10 + i,),), True)
    for i, prompt in enumerate(prompts)
  ]


def test_replies_of_the_next_row_that_has_another_prompt():
  found = batches.mismatched(rows_of([1, 1, 2, 3]))
  assert [x.prompt for x in found] == [(1,), (1,), (2,), (3,)]
  assert [x.replies for x in found] == [((12,),), ((12,),), ((13,),), ((10,),)]


@pytest.mark.parametrize('seed', range(5))
def test_so_does_a_search(seed):
  prompts = np.random.default_rng(seed).integers(0, 3, 12).tolist()
  rows = rows_of(prompts)
  for i, found in enumerate(batches.mismatched(rows)):
    after = rows[i + 1 :] + rows[:i]
    other = next(x for x in after if x.prompt != rows[i].prompt)
    assert found == rows[i]._replace(replies=other.replies)


@pytest.mark.parametrize('count', [1, 2, 3])
def test_one_prompt_has_no_other(count):
  with pytest.raises(ValueError, match=f'all {count} rows answer one prompt'):
    batches.mismatched(rows_of([5] * count))
  assert batches.mismatched([]) == []


# What does not fit.


@pytest.mark.parametrize(
  ('row', 'sizes', 'said'),
  [
    (SHOWN[0], {'reply_tokens': 4}, "the reply 'Hello, dear.' takes 5 tokens"),
    (
      SHOWN[0],
      {'prompt_tokens': 18},
      "the prompt 'Hi!' takes 2. tokens, more than prompt_tokens=18; shorten",
    ),
    (PAIRS[0]._replace(rejected='Hello, dear.'), {}, 'are the same tokens'),
  ],
)
def test_what_does_not_fit_is_told_with_its_place(chat, row, sizes, said):
  row = row._replace(where='mine.jsonl, line 7')
  with pytest.raises(ValueError, match=f'^mine.jsonl, line 7: .*{said}'):
    encoded(chat, [row], **sizes)
  nowhere = row._replace(where='')
  with pytest.raises(ValueError, match=f'^example 1: .*{said}'):
    encoded(chat, [SHORT, nowhere], **sizes)


def test_a_reply_may_fill_its_room(chat):
  (row,) = encoded(chat, SHOWN[:1], reply_tokens=5)
  made = batches.to_batch([row], prompt_tokens=len(row.prompt), reply_tokens=5)
  assert made.mask.all() and (made.positions >= 0).all()


def test_a_stop_token_that_never_comes_is_told(chat):
  with pytest.raises(ValueError, match=r"'<\|im_end\|>.*none of .*\[7\]"):
    encoded(chat, SHOWN, stop_ids=(7,))


@pytest.mark.parametrize(
  ('rows', 'how', 'said'),
  [
    (PAIRS, {}, 'has 2 replies where the algorithm takes 1; give'),
    (SHOWN, {'replies': 2}, 'has 1 replies where the algorithm takes 2'),
    ((*RATED, *SHOWN), {}, 'has no label, and another row has one'),
    (SHOWN, {'size': 2}, '3 rows do not make a batch of 2'),
    ((), {}, '0 rows do not make a batch of 0'),
    (SHOWN, {'prompt_tokens': 5}, 'do not fit in prompt_tokens=5'),
  ],
)
def test_batches_that_are_none(chat, rows, how, said):
  with pytest.raises(ValueError, match=said):
    batch(chat, rows, **how)
