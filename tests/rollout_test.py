"""Conversations: what was sampled is what one pass over the text predicts."""

import dataclasses
import types

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import dialogue as dialogues
from persona_jax import taps
from persona_jax.activations import edits
from persona_jax.rollout import (
  STATIC,
  Sampling,
  Speaker,
  bucketed,
  converse,
  reply,
)
from persona_jax.rollout import speaker as speakers
from persona_jax.rollout.speaker import take

BATCH, LINES, TOKENS = 5, 5, 6
TEMPERATURES = jnp.array([1.0, 0.6, 1.4, 0.0, 1.0])
VOCAB = fakes.CONFIG.vocab
STOPS = {
  'some': range(80),
  'never': [VOCAB - 1],
  'at once': range(1, VOCAB),  # each line begins with the one that is left
}
CAPS = {
  'capped': (fakes.caps(), fakes.caps(seed=1, low=-0.5, high=0.2)),
  'free': (fakes.no_caps(), fakes.no_caps()),
}

view = jax.jit(dialogues.view, static_argnums=1)
models = fakes.tiny(seed=0), fakes.tiny(seed=1)


def cast(caps='capped', stops='some', temperature=TEMPERATURES):
  """Two speakers with different weights, caps and temperatures."""
  partner, policy = (
    fakes.speaker(model, collection, temperature.size, STOPS[stops])
    for model, collection in zip(models, CAPS[caps], strict=True)
  )
  heat = lambda speaker, temperature: dataclasses.replace(
    speaker, sampling=speaker.sampling.replace(temperature=temperature)
  )
  return heat(partner, temperature), heat(policy, temperature[::-1])


def log_softmax(x):
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def forced(model, collection, seen):
  """float64 logits where each token of a dialogue was predicted."""
  variables = fakes.with_edits(model.stacked, collection)
  hidden, _ = model.run(variables, seen.tokens, seen.positions)
  before = np.asarray(seen.before).reshape(BATCH, -1)
  hidden = np.take_along_axis(np.asarray(hidden), before[..., None], axis=1)
  logits = np.asarray(model.unembed(variables, hidden), np.float64)
  return logits.reshape(*seen.before.shape, -1)


def at(x, tokens):
  return np.take_along_axis(x, np.asarray(tokens)[..., None], axis=-1)[..., 0]


def check(said, tokens, logits, mask, sampling):
  """Log-probabilities of `said` are those of teacher-forced logits."""
  mask = np.asarray(mask)
  raw = at(log_softmax(logits), tokens)
  np.testing.assert_allclose(said.raw_logprobs[mask], raw[mask], atol=1e-4)
  barred = logits.copy()
  barred[..., 0, np.asarray(sampling.stop)] = -np.inf
  temperature = np.asarray(sampling.temperature)
  heat = np.where(temperature == 0, 1, temperature)
  scaled = barred / heat.reshape(-1, *[1] * (barred.ndim - 1))
  want = at(log_softmax(scaled), tokens)
  want[temperature == 0] = 0
  np.testing.assert_allclose(said.logprobs[mask], want[mask], atol=1e-4)
  best = barred.argmax(-1) == np.asarray(tokens)
  cold = np.broadcast_to(
    (temperature == 0).reshape(-1, *[1] * (mask.ndim - 1)), mask.shape
  )
  assert best[mask & cold].all() and not best[mask & ~cold].all()


def rows_of(said, rows):
  """Some rows of a dialogue, as numpy arrays."""
  fields = vars(fakes.plain(said)).items()
  rows = np.asarray(rows)
  return types.SimpleNamespace(
    **{name: x[rows] for name, x in fields if name != 'who'}
  )


def assert_same_lines(left, right):
  """The same tokens; log-probs as close as sums in another order are."""
  for name in ('tokens', 'length', 'stopped', 'scenario', 'sample'):
    np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
  for name in ('logprobs', 'raw_logprobs'):
    np.testing.assert_allclose(
      getattr(left, name), getattr(right, name), atol=1e-5
    )


@pytest.mark.parametrize(
  'caps, stops',
  [
    ('capped', 'some'),
    ('free', 'some'),
    ('capped', 'never'),
    ('capped', 'at once'),
  ],
)
def test_logprobs_are_those_of_one_pass(key, caps, stops):
  scenario, speakers = fakes.scenario(BATCH), cast(caps, stops)
  said = fakes.talk(key, speakers, scenario)
  assert said.tokens.shape == (BATCH, LINES, TOKENS)
  for who in range(2):
    seen = view(said, who, fakes.FRAMES[who])
    logits = forced(models[who], CAPS[caps][who], seen)
    mask = said.mask & (said.who == who)[None, :, None]
    mask = mask.at[:, 0].set(False)  # the opening was given
    check(said, said.tokens, logits, mask, speakers[who].sampling)
    length = np.asarray(said.length)[:, 2 - who :: 2]
    if stops == 'some':  # another line follows these
      assert (length[:, 0] < TOKENS).any() and (length[:, 0] == TOKENS).any()
    else:
      assert np.mean(length == {'never': TOKENS, 'at once': 2}[stops]) > 0.8
    other = forced(models[who], CAPS['free'][who], seen)
    apart = np.abs(log_softmax(logits) - log_softmax(other))[mask].max()
    assert apart > 0.1 if caps == 'capped' else apart == 0


def test_lines_end_with_a_stop_token_or_full(key):
  dialogue = fakes.talk(key, cast(), fakes.scenario(BATCH))
  said, inside = fakes.plain(dialogue), np.asarray(dialogue.mask)
  own = np.s_[:, 1:]  # the opening was given
  stop = np.isin(said.tokens, STOPS['some']) & inside
  last = np.arange(TOKENS) == said.length[..., None] - 1
  assert not stop[own][..., 0].any() and not (stop & ~last)[own].any()
  np.testing.assert_array_equal(stop.any(-1)[own], said.stopped[own])
  assert (said.stopped | (said.length == TOKENS))[own].all()
  for x in (said.tokens, said.logprobs, said.raw_logprobs):
    assert not x[own][~inside[own]].any()


def test_the_opening_is_the_first_line(key):
  scenario = fakes.scenario(BATCH)
  said = fakes.talk(key, cast(), scenario)
  np.testing.assert_array_equal(said.length[:, 0], scenario.opening_length)
  np.testing.assert_array_equal(said.tokens[:, 0, :4], scenario.opening)
  assert not said.stopped[:, 0].any() and said.who.tolist() == [0, 1, 0, 1, 0]


def test_lines_do_not_depend_on_their_row(key):
  scenario = fakes.scenario(BATCH)
  said = fakes.talk(key, cast(), scenario)
  rows = jnp.array([3, 0, 4, 1, 2])
  partner, policy = cast()
  mix = lambda speaker: dataclasses.replace(
    speaker,
    sampling=speaker.sampling.replace(
      temperature=speaker.sampling.temperature[rows]
    ),
  )
  mixed = fakes.talk(key, (mix(partner), mix(policy)), take(scenario, rows))
  assert_same_lines(mixed, rows_of(said, rows))


def test_lines_depend_neither_on_the_batch_nor_on_what_follows(key):
  scenario, row = fakes.scenario(BATCH), jnp.array([2])
  said = fakes.talk(key, cast(temperature=jnp.ones(BATCH)), scenario)
  alone = fakes.talk(
    key, cast(temperature=jnp.ones(1)), take(scenario, row), lines=4
  )
  want = rows_of(said, row)
  for name in ('tokens', 'length', 'stopped', 'logprobs', 'raw_logprobs'):
    setattr(want, name, getattr(want, name)[:, :4])
  assert_same_lines(alone, want)
  assert alone.who.tolist() == [0, 1, 0, 1]


def test_keys_come_from_scenario_and_sample(key):
  scenario = take(fakes.scenario(BATCH), jnp.zeros(BATCH, jnp.int32))
  scenario = scenario.replace(
    ids=jnp.array([4, 4, 4, 7, 7]), samples=jnp.array([0, 1, 0, 0, 1])
  )
  warm = jnp.ones(BATCH)
  tokens = fakes.talk(key, cast(temperature=warm), scenario).tokens
  same = np.array([[np.array_equal(x, y) for x in tokens] for y in tokens])
  np.testing.assert_array_equal(np.argwhere(np.triu(same, 1)), [[0, 2]])
  other = jax.random.fold_in(key, 1)
  again = fakes.talk(other, cast(temperature=warm), scenario).tokens
  assert not np.array_equal(tokens, again)


def test_every_token_has_a_key_of_its_own(key):
  # Speakers that say anything, whatever they hear: of 120 draws from 301
  # tokens, 99 differ; 30 or less do where rows, lines or tokens share a key.
  anything = Speaker(
    variables={},
    sampling=Sampling.of(BATCH, [VOCAB - 1]),
    apply=lambda _, tokens, __, cache: (jnp.zeros((*tokens.shape, 1)), cache),
    unembed=lambda _, hidden: jnp.zeros((*hidden.shape[:-1], VOCAB)),
    memory=models[0].memory,
  )
  said = fakes.talk(key, (anything, anything), fakes.scenario(BATCH))
  assert len(np.unique(said.tokens[:, 1:])) > 80


def test_dead_rows_do_no_harm_and_stay_empty(key):
  scenario = fakes.scenario(BATCH)
  live = np.array([True, False, True, True, False])
  said = fakes.talk(key, cast(), scenario.replace(live=jnp.asarray(live)))
  want = fakes.talk(key, cast(), scenario)
  assert_same_lines(rows_of(said, live), rows_of(want, live))
  dead = rows_of(said, ~live)
  for empty in (dead.length, dead.tokens[:, 1:], dead.stopped):
    assert not empty.any()
  assert not np.any(dead.logprobs) and not np.any(dead.raw_logprobs)
  assert not said.mask[~live].any()


def test_new_values_are_not_traced_again(key):
  scenario = fakes.scenario(BATCH)
  first = fakes.talk(key, cast(), scenario)
  traces = fakes.conversing.traces
  others = (
    fakes.talk(jax.random.fold_in(key, 1), cast(), scenario),
    fakes.talk(key, cast(temperature=TEMPERATURES + 0.3), scenario),
    fakes.talk(key, cast(caps='free'), scenario),
    fakes.talk(key, cast(stops='at once'), scenario),
    fakes.talk(key, cast()[::-1], scenario),
    fakes.talk(key, cast(), fakes.scenario(BATCH, seed=1)),
  )
  assert fakes.conversing.traces == traces
  for other in others:
    assert not np.array_equal(first.tokens[:, 1:], other.tokens[:, 1:])


@pytest.mark.parametrize('lines', [0, 1])
def test_too_few_lines_are_refused(key, lines):
  with pytest.raises(ValueError, match=f'lines={lines}: .* give 2 or more'):
    fakes.talk(key, cast(), fakes.scenario(BATCH), lines=lines)


def test_openings_that_do_not_fit_are_refused(key):
  scenario = fakes.scenario(BATCH)
  long = scenario.replace(opening=jnp.ones((BATCH, TOKENS + 1), jnp.int32))
  with pytest.raises(ValueError, match='room for 7 tokens.* the 6 of a line'):
    fakes.talk(key, cast(), long)


answer = jax.jit(reply, static_argnames='tokens')


@pytest.mark.parametrize('stops', ['some', 'never'])
def test_replies_are_those_of_one_pass(key, stops):
  scenario, (_, speaker) = fakes.scenario(BATCH), cast(stops=stops)
  prompt, length = scenario.prompts[:, 1], scenario.prompt_length[:, 1]
  said = answer(
    key, speaker, prompt, length, scenario.ids, scenario.live, tokens=TOKENS
  )
  tokens, positions, is_reply = said.joined()
  variables = fakes.with_edits(models[1].stacked, CAPS['capped'][1])
  hidden, _ = models[1].run(variables, tokens, positions)
  width = prompt.shape[1]
  first = np.take_along_axis(
    np.asarray(hidden), np.asarray(length)[:, None, None] - 1, axis=1
  )
  hidden = np.concatenate([first, hidden[:, width:-1]], axis=1)
  logits = np.asarray(models[1].unembed(variables, hidden), np.float64)
  mask = np.arange(TOKENS) < np.asarray(said.length)[:, None]
  check(said, said.tokens, logits, mask, speaker.sampling)
  np.testing.assert_array_equal(np.sum(is_reply, axis=1), said.body)
  assert not np.any(is_reply[:, :width]) and np.any(said.body < TOKENS) == (
    stops == 'some'
  )


def test_replies_do_not_depend_on_the_batch(key):
  scenario, (_, speaker) = fakes.scenario(BATCH), cast()
  speaker = dataclasses.replace(
    speaker, sampling=speaker.sampling.replace(temperature=jnp.ones(BATCH))
  )
  rows = np.array([2, 4, 0, 3, 1])
  live = np.array([True, True, False, True, True])
  lines = []
  for order in (np.arange(BATCH), rows):
    part = take(scenario, jnp.asarray(order))
    lines.append(
      answer(
        key,
        speaker,
        part.prompts[:, 1],
        part.prompt_length[:, 1],
        part.ids,
        jnp.asarray(live if order is rows else live | True),
        tokens=TOKENS,
      )
    )
  np.testing.assert_array_equal(
    lines[1].tokens[live], lines[0].tokens[rows[live]]
  )
  assert lines[1].length[2] == 0 and not lines[1].tokens[2].any()


# Shapes.


def test_buckets_are_few_and_hold_what_they_should():
  sizes = [speakers.bucket(size) for size in range(1, 1000)]
  assert all(size <= b for size, b in enumerate(sizes, 1))
  assert all(b <= 1.5 * size for size, b in enumerate(sizes, 1) if size > 2)
  assert sorted(set(sizes))[:9] == [1, 2, 3, 4, 6, 8, 12, 16, 24]


def test_an_epoch_of_many_sizes_compiles_few_programs(key):
  counted = fakes.Counted(converse)
  run = jax.jit(counted, static_argnames=STATIC)
  rng = np.random.default_rng(0)
  for _ in range(12):
    rows, prompt = rng.integers(5, 7), rng.integers(5, 9)
    scenario = fakes.scenario(rows)
    scenario = scenario.replace(
      prompts=jnp.resize(scenario.prompts, (rows, 2, prompt)),
      prompt_length=jnp.minimum(scenario.prompt_length, prompt),
    )
    fitted = bucketed(scenario, tokens=TOKENS)
    wide = fitted.ids.shape[0]
    both = cast(temperature=jnp.ones(wide))
    said = run(key, both, fakes.FRAMES, fitted, lines=3, tokens=TOKENS)
    assert said.length[:rows, 1:].all() and not said.length[rows:].any()
  assert counted.traces <= 2  # prompts of 6 and of 8 tokens, rows of 6
  both = cast(temperature=jnp.ones(rows))
  plain = run(key, both, fakes.FRAMES, scenario, lines=3, tokens=TOKENS)
  np.testing.assert_array_equal(said.tokens[:rows], plain.tokens)


# One speaker for two seats.


def both_seats(speaker, **changes):
  return (dataclasses.replace(speaker, who=(0, 1), **changes),)


def test_caps_differ_by_seat(key):
  scenario = fakes.scenario(BATCH)
  caps = fakes.caps(), fakes.caps(seed=1, low=-0.5, high=0.2)
  apart = [
    fakes.speaker(models[0], collection, BATCH, STOPS['some'])
    for collection in caps
  ]
  own = edits.by_seat(*(x.variables['edits'] for x in apart))
  together = both_seats(apart[0], own=own)
  want = fakes.talk(key, tuple(apart), scenario)
  assert_same_lines(fakes.talk(key, together, scenario), want)
  free = fakes.speaker(models[0], fakes.no_caps(), BATCH, STOPS['some'])
  other = fakes.talk(key, (free, free), scenario)
  assert not np.array_equal(other.tokens, want.tokens)


def project(tap, x):
  return edits.projection(x, tap.get_variable('edits', 'probe')['axis'])


KEEPING = taps.keep(models[0].apply, project)
PROBES = edits.probes(jnp.asarray(fakes.axes()))


def test_what_is_kept_of_each_token_is_that_of_one_pass(key):
  scenario = fakes.scenario(BATCH)
  speaker = fakes.speaker(models[0], PROBES, BATCH, STOPS['some'])
  keeping = dataclasses.replace(speaker, apply=KEEPING, captures=True)
  said = fakes.talk(key, both_seats(keeping), scenario)
  plain = fakes.talk(key, both_seats(speaker), scenario)
  np.testing.assert_array_equal(said.tokens, plain.tokens)
  assert plain.kept is None
  read = jax.jit(KEEPING)
  # The last token of a line is read with the next one, and not kept.
  fed = np.arange(TOKENS) < np.asarray(said.length)[..., None] - 1
  fed[:, 0] = False
  for who in range(2):
    seen = view(said, who, fakes.FRAMES[who])
    variables = fakes.with_edits(models[0].stacked, PROBES)
    _, kept = read(variables, seen.tokens, seen.positions)  # [L B S]
    place = np.asarray(seen.before).reshape(BATCH, -1) + 1
    want = np.take_along_axis(np.asarray(kept), place[None], axis=2)
    want = np.moveaxis(want.reshape(-1, BATCH, LINES, TOKENS), 0, -1)
    mine = fed & (np.arange(LINES) % 2 == who)[:, None]
    np.testing.assert_allclose(said.kept[mine], want[mine], atol=1e-5)
  assert not said.kept[~fed].any() and np.all(np.any(said.kept[fed], axis=-1))


WHOLE = taps.keep(models[0].apply, lambda tap, x: x)


def test_whole_activations_are_summed_over_a_line(key):
  scenario = fakes.scenario(BATCH)
  speaker = fakes.speaker(models[0], fakes.no_caps(), BATCH, STOPS['some'])
  summing = dataclasses.replace(speaker, apply=WHOLE, captures=True, sums=True)
  said = fakes.talk(key, both_seats(summing), scenario)
  assert said.kept.shape == (BATCH, LINES, 2, fakes.CONFIG.features)
  read = jax.jit(WHOLE)
  fed = np.arange(TOKENS) < np.asarray(said.length)[..., None] - 1
  fed[:, 0] = False
  for who in range(2):
    seen = view(said, who, fakes.FRAMES[who])
    _, kept = read(models[0].stacked, seen.tokens, seen.positions)  # [L B S D]
    place = np.asarray(seen.before).reshape(BATCH, -1) + 1
    tokens = np.take_along_axis(
      np.asarray(kept), place[None, ..., None], axis=2
    ).reshape(2, BATCH, LINES, TOKENS, -1)
    want = np.einsum('lbntd,bnt->bnld', tokens, fed)
    own = np.arange(who, LINES, 2)
    np.testing.assert_allclose(
      said.kept[:, own], want[:, own], atol=1e-4, rtol=1e-4
    )
  assert np.any(said.kept[:, 1:])


def test_speakers_that_keep_unlike_shapes_are_refused(key):
  cap = fakes.speaker(models[0], PROBES, BATCH, STOPS['some'])
  one = dataclasses.replace(cap, apply=KEEPING, captures=True)
  other = dataclasses.replace(cap, apply=WHOLE, captures=True, sums=True)
  with pytest.raises(ValueError, match=r'the shapes \(2, 32\) and \(6, 2\)'):
    fakes.talk(key, (one, other), fakes.scenario(BATCH))


def test_settings_for_other_rows_are_refused(key):
  with pytest.raises(ValueError, match='for 4 rows and the scenario has 5'):
    fakes.talk(key, cast(temperature=jnp.ones(4)), fakes.scenario(BATCH))
