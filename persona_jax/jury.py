"""Judges by name, and how each scores dialogues with labelled lines."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from persona_jax import asked, data, entailment, judge, polled, remote, rewards
from persona_jax import dialogue as dialogues
from persona_jax.analysis.scorecard import Fit
from persona_jax.dialogue import POLICY, Dialogue
from persona_jax.lab import Lab, batches, fill
from persona_jax.models import source
from persona_jax.rewards.consistency import earlier_pairs
from persona_jax.text import judged, labelled, released, wording
from persona_jax.text.labelled import Labelled

ROUND = 32  # shapes are multiples of it, so that few are compiled
OTHERS = (  # personas that a line may be likelier under
  'You are Tom, a retired bus driver who lives alone with an old dog.',
  'You are a medical student from Lagos who loves chess and hates the cold.',
  'You are Ida, 34, an architect with twins and no time for anything.',
)

Row = Labelled
Advance = Callable[[int], object]


class Scores(NamedTuple):
  """What a judge says of the speaker's lines of each row; NaN: no verdict."""

  values: list[np.ndarray]  # a score a line, higher for consistent
  verdicts: int  # that were timed: of programs that had been compiled
  seconds: float  # that they took


Judge = Callable[[Sequence[Row], Advance], Scores]


NAMES = (
  'trained',
  'likelihood',
  'likelihood_alone',
  'likelihood_others',
  'verdict',
  'entailment',
  'remote',
  'shortness',
)


def open_judges(lab: Lab, options, names: Sequence[str]) -> dict[str, Judge]:
  """The judges of `names`, as the config's group `jury` says.

  `shortness` is none: it shows what the length of a line tells.

  Raises:
    ValueError: there is no such judge, or `options` lack what it needs.
  """
  if unknown := [name for name in names if name not in NAMES]:
    raise ValueError(
      f'{unknown[0]!r} is no judge; give some of {", ".join(NAMES)}.'
    )
  if len(set(names)) < len(names):
    raise ValueError(f'jury.names={",".join(names)} has a judge twice.')
  return {name: _opened(name, lab, options) for name in names}


def _opened(name, lab, options) -> Judge:
  if name == 'trained':
    learnt = judge.made(lab, judge.adapter(lab, options.adapter))
    return on_device(lab, lambda slots: rewards.trained(within(learnt, slots)))
  if name == 'shortness':
    return hosted(lambda asks: [-len(x.line.split()) for x in asks])
  if name == 'entailment':
    return hosted(_entailment(options))
  if name == 'remote':
    return hosted(_remote(options))
  to_line, between = _zero_shot(name, lab)
  pairs = on_device(lab, lambda slots: _least(between))
  return _by_scope(on_device(lab, to_line), pairs)


def _zero_shot(name, lab):
  """What an untrained model says of a line, in some slots, and of pairs."""
  plain = data.judges(lab.model, lab.chat)
  if name == 'verdict':
    return lambda slots: plain.verdict, plain.pair_verdict
  [likely] = plain.likelihood.args
  told = lambda slots: rewards.likelihood(within(likely, slots))
  if name == 'likelihood_alone':
    cue = jnp.asarray(lab.chat.encode(wording.ANY_LINE), jnp.int32)
    return lambda slots: rewards.alone(told(slots), cue), plain.pair_likelihood
  if name == 'likelihood_others':
    prompts = [
      jnp.asarray(lab.chat.prompt_ids(text), jnp.int32) for text in OTHERS
    ]
    others = lambda slots: rewards.weighted(
      {
        str(i): (
          1 / len(prompts),
          rewards.likelihood(within(likely, slots, neutral=prompt)),
        )
        for i, prompt in enumerate(prompts)
      }
    )
    return others, plain.pair_likelihood
  return told, plain.pair_likelihood


def _entailment(options):
  if not options.entailment:
    raise ValueError(
      'the judge entailment needs an NLI cross-encoder; give it as '
      '--config.jury.entailment=hf:org/name, or a folder.'
    )
  label = options.contradiction
  return entailment.Entailment.load(
    options.entailment, contradiction=int(label) if label else None
  )


def _remote(options):
  if not options.server or not options.server_model:
    raise ValueError(
      'the judge remote needs a server and its model; give '
      '--config.jury.server=http://localhost:8000/v1 and '
      '--config.jury.server_model=NAME.'
    )
  server = remote.Server(
    options.server, options.server_model, key=options.server_key or None
  )
  return polled.Remote(server, source.cache_folder() / 'verdicts')


def within(record, slots, **fields):
  """A judge that reads no more than so many slots."""
  return dataclasses.replace(record, slots=slots, **fields)


def _least(between) -> Partial:
  """A judge of pairs of lines as one of lines; none where nothing is earlier.

  A line is worth what its worst pair is worth.
  """
  return Partial(_least_of, between)


def _least_of(between, dialogue: Dialogue):
  pairs = earlier_pairs(dialogue, POLICY)
  least = jnp.min(between(dialogue), axis=2, where=pairs, initial=jnp.inf)
  return jnp.where(jnp.any(pairs, axis=2), least, jnp.nan)


def _by_scope(to_line: Judge, between: Judge) -> Judge:
  """One judge where a persona is told, another where none is."""

  def score(rows, advance):
    values, timed = [np.zeros(0)] * len(rows), [0, 0.0]
    for some, told in ((to_line, True), (between, False)):
      chosen = [i for i, row in enumerate(rows) if bool(row.persona) == told]
      found = some([rows[i] for i in chosen], advance)
      for i, value in zip(chosen, found.values, strict=True):
        values[i] = value
      timed = [timed[0] + found.verdicts, timed[1] + found.seconds]
    return Scores(values, *timed)

  return score


def hosted(score: Callable[[list[asked.Asked]], Sequence[float]]) -> Judge:
  """A judge that the host gives: a server, an NLI model, a function.

  It is asked about the lines that have a label and words.
  """

  def scored(rows, advance):
    asks, places = [], []
    for i, row in enumerate(rows):
      for k, label in enumerate(row.labels):
        line = row.lines[2 * k + 1]
        if label and line.strip():
          asks.append(asked.Asked(row.persona, row.lines[: 2 * k + 1], line))
          places.append((i, k))
    values = [np.full(len(row.labels), np.nan) for row in rows]
    began = time.perf_counter()
    for (i, k), value in zip(places, score(asks), strict=True):
      values[i][k] = value
    advance(len(rows))
    return Scores(values, len(asks), time.perf_counter() - began)

  return scored


def on_device(lab: Lab, made: Callable[[int], Partial]) -> Judge:
  """`made(slots)` scores dialogues that take no more slots than that."""

  def scored(rows, advance):
    sizes = [_slots(lab, row) for row in rows]
    key = lambda i: (len(rows[i].lines), sizes[i])
    order = sorted(range(len(rows)), key=key)
    values = [np.zeros(0)] * len(rows)
    seen, verdicts, seconds = set(), 0, 0.0
    for part in batches(len(rows), lab.batch):
      some = order[part]
      dialogue = _arrays(lab, [rows[i] for i in some])
      slots = _rounded(max(sizes[i] for i in some))
      began = time.perf_counter()
      score = np.asarray(lab.score(made(slots), dialogue))
      shape = slots, dialogue.tokens.shape, dialogue.prompts.shape
      if shape in seen:
        verdicts += sum(len(rows[i].labels) for i in some)
        seconds += time.perf_counter() - began
      seen.add(shape)
      spoken = np.asarray(dialogue.spoken(POLICY))
      score = np.where(spoken, score, np.nan)[:, POLICY::2]
      for i, value in zip(some, score, strict=False):  # then what fills up
        values[i] = value[: len(rows[i].labels)]
      advance(len(some))
    return Scores(values, verdicts, seconds)

  return scored


def _slots(lab, row) -> int:
  """At most so many tokens does the speaker read."""
  pieces = max(lab.frame.heard_to_own.size, lab.frame.own_to_heard.size)
  prompt = len(lab.chat.prompt_ids(row.system))
  said = sum(len(lab.chat.encode(line)) + pieces for line in row.lines)
  return prompt + said + pieces + 1


def _arrays(lab, rows) -> Dialogue:
  """Dialogues as `rewards` take them, in few shapes, filled to a batch."""
  most = max(len(row.lines) for row in rows)
  said = [row.lines + ('',) * (most - len(row.lines)) for row in rows]
  prompts = [lab.chat.prompt_ids(row.system) for row in rows]
  prompt = data.padded(prompts, _rounded(max(map(len, prompts))))
  longest = max(len(lab.chat.encode(x)) for some in said for x in some)
  found = data.spoken(lab.chat, said, prompt, room=_rounded(longest))
  return dialogues.rows(found, lambda x: fill(x, lab.batch))


def _rounded(size: int) -> int:
  return -(-size // ROUND) * ROUND


class Quarrel(NamedTuple):
  """A sentence of a persona that contradicts what stands before it."""

  persona: str
  sentence: str
  chance: float  # that it does not


def quarrels(
  score: Judge,
  fit: Fit,
  personas: Iterable[str],
  sound: Iterable[str],
  advance: Advance,
) -> list[Quarrel]:
  """Where a judge finds that a persona contradicts itself, the worst first.

  The persona is read as if it told of itself, sentence by sentence. Told are
  sentences that the judge likes less than any of the `sound` personas.
  """
  known = _of_themselves(score, fit, sound, advance)
  least = min([x.chance for x in known], default=0.0)
  found = [
    x
    for x in _of_themselves(score, fit, personas, advance)
    if x.chance < min(least, fit.threshold)
  ]
  return sorted(found, key=lambda x: x.chance)


def _of_themselves(score, fit, personas, advance) -> list[Quarrel]:
  """Every sentence of the personas that have several."""
  rows = []
  for persona in dict.fromkeys(personas):
    said = list(entailment.sentences(judged.first_person(persona)))
    if len(said) > 1:
      lines = [x for sentence in said for x in (wording.ANY_LINE, sentence)]
      labels, kinds = ('consistent',) * len(said), ('',) * len(said)
      rows.append(
        Row('', 'chat', tuple(lines), labels, kinds, persona, 'a persona')
      )
  found = []
  for row, values in zip(rows, score(rows, advance).values, strict=True):
    chances = fit.chance(values, ['between'] * len(values))
    found += [
      Quarrel(row.group, sentence, float(chance))
      for sentence, chance in zip(row.lines[1::2], chances, strict=True)
    ]
  return [x for x in found if np.isfinite(x.chance)]


def _some(rows, most) -> list[Row]:
  """At most so many of `rows`, by whole groups from all over; 0: all."""
  groups = {}
  for row in rows:
    groups.setdefault(row.group, []).append(row)
  every = -(-len(rows) // most) if most else 1
  return [row for some in list(groups.values())[::every] for row in some]


def of_labels(values: Iterable[np.ndarray], rows: Sequence[Row]) -> np.ndarray:
  """The scores of the lines that have a label, one after another."""
  found = [
    value
    for some, row in zip(values, rows, strict=True)
    for value, label in zip(some, row.labels, strict=True)
    if label
  ]
  return np.array(found, float)


def rows_of(options) -> tuple[list[Row], dict]:
  """The labelled dialogues that the group `jury` names, and what they are.

  Raises:
    ValueError: both `labels` and `released` are given, or a file is wrong.
  """
  if options.labels and options.released:
    raise ValueError(
      f'jury.labels={options.labels!r} and jury.released='
      f'{options.released!r} are both given; measure one at a time.'
    )
  about = {}
  if options.released:
    found = released.read(options.released)
    rows, told = found.rows, 'dialogue files of consistent-LLMs'
    about['counts'] = found.counts
  elif options.labels:
    rows, told = labelled.read(options.labels), options.labels
  else:
    rows, told = labelled.written(), 'our test set, written by hand'
  rows = _some(rows, options.examples)
  lines = sum(label != '' for row in rows for label in row.labels)
  groups = f'{len({row.group for row in rows})} groups'
  return rows, {
    'source': told,
    'dialogues': len(rows),
    'lines': lines,
    'groups': groups,
    'calibration': options.calibration,
    **about,
  }
