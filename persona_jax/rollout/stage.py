"""What a rollout is given, checked, and in the form that the loop takes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Key

from persona_jax.dialogue import Frame, pieces, slots
from persona_jax.rollout import lanes as lanes_
from persona_jax.rollout.environment import OpenConversation
from persona_jax.rollout.lanes import HOST, WORLD, Given, Rules
from persona_jax.rollout.sampling import Sampling
from persona_jax.rollout.speaker import Scenario, Speaker


@struct.dataclass
class Stage:
  """All that stays as it is while dialogues are held."""

  speakers: tuple[Speaker, ...]
  rules: Rules
  given: Given
  scenario: Scenario
  lanes: int = struct.field(pytree_node=False)
  chunk: int = struct.field(pytree_node=False)
  width: int = struct.field(pytree_node=False)
  patience: int = struct.field(pytree_node=False)


def stage(
  key: Key[Array, ''],
  speakers: tuple[Speaker | None, ...],
  frames: tuple[Frame | None, ...],
  scenario: Scenario,
  *,
  lines: int,
  tokens: int,
  environment: Any = None,
  hosted: tuple[int, ...] = (),
  lanes: int | None = None,
  groups: int = 1,
  width: int | None = None,
  chunk: int | None = None,
  patience: int = 4,
) -> Stage:
  """Everything that dialogues need, in the form in which they need it.

  What is not named here is as in `converse`.

  Args:
    hosted: the seats whose lines the host gives.
    lanes: dialogues held at a time, by default all; a lane that ends one
      takes the next.
    groups: of lanes, each with its part of the dialogues. On a mesh, a
      multiple of the ways that rows are spread: nothing crosses a group.
    width: lanes of a group that read together, by default a quarter.
    chunk: tokens read at a time, by default what is said and heard in a turn.
    patience: steps without a read while a lane waits for others to join it.

  Raises:
    ValueError: too few lines, an opening that is too long, no dialogue, lanes
      or groups that do not divide, or seats that nobody or two speak for.
  """
  rows = scenario.ids.shape[0]
  _check(scenario, frames, lines, tokens)
  voices, speakers = _seats(speakers, len(frames), hosted)
  lanes = rows if lanes is None else min(lanes, rows)
  _check_lanes(rows, lanes, groups)
  first = 0 if scenario.opening is None else 1
  _check_seats(voices, frames, first)
  environment = OpenConversation() if environment is None else environment
  between = pieces(*frames)
  samplings = _samplings(speakers, voices)
  _check_settings(samplings, rows)
  table, strings = _strings(samplings, rows)
  rules = Rules(
    environment=environment,
    pieces=between,
    table=table,
    voices=voices,
    lines=lines,
    tokens=tokens,
    slots=slots(scenario.prompts.shape[2], between, lines, tokens),
    first=first,
  )
  keys = scenario.keys(key)
  live = scenario.live.reshape(groups, -1)
  split = lambda x: x.reshape(groups, rows // groups, *x.shape[1:])
  given = Given(
    keys=split(keys),
    prompts=split(scenario.prompts),
    prompt_length=split(scenario.prompt_length),
    sampling=jax.tree.map(split, _together(samplings)),
    strings=split(strings),
    state=jax.tree.map(
      split, jax.vmap(environment.reset)(lanes_.world_key(keys), scenario.task)
    ),
    order=jnp.argsort(~live, axis=1, stable=True).astype(jnp.int32),
    count=jnp.sum(live, axis=1, dtype=jnp.int32),
  )
  if chunk is None:
    chunk = 2 * between.tokens.shape[-1] + tokens + 1
  if width is None:
    width = max(1, lanes // groups // 4)
  if min(chunk, width, patience) < 1:
    raise ValueError(
      f'chunk={chunk}, width={width} and patience={patience} let nobody read; '
      'give 1 or more of each.'
    )
  width = min(width, lanes // groups)
  return Stage(speakers, rules, given, scenario, lanes, chunk, width, patience)


def _seats(speakers, seats, hosted):
  """The number of the speaker of every seat, and the speakers."""
  placed = []
  for place, speaker in enumerate(speakers):
    if speaker is not None:
      placed.append(speaker.replace(who=speaker.who or (place,)))
  voices = [WORLD] * seats
  for i, speaker in enumerate(placed):
    for seat in speaker.who:
      if seat >= seats or voices[seat] >= 0 or len(speaker.who) > 2:
        raise ValueError(
          f'a speaker is for the seats {speaker.who}, of {seats} with frames; '
          'give each seat one speaker, and a speaker one seat or two.'
        )
      voices[seat] = i
  for seat in hosted:
    if not 0 <= seat < seats or voices[seat] != WORLD:
      raise ValueError(
        f'the hosted seat {seat} of {seats} has a speaker or is none; name '
        'seats that nobody else speaks for.'
      )
    voices[seat] = HOST
  if not placed or voices.count(WORLD) > 1:
    raise ValueError(
      f'{voices.count(WORLD)} of {seats} seats have no speaker; give at least '
      'one speaker, and leave at most one seat to the environment.'
    )
  return tuple(voices), tuple(placed)


def _check_seats(voices, frames, first):
  if voices[first % len(voices)] == WORLD:
    raise ValueError(
      f"line {first} is the first to be said and its seat the environment's, "
      'which only answers; let a speaker begin.'
    )
  if len(voices) > 2:
    for seat, (voice, frame) in enumerate(zip(voices, frames, strict=True)):
      if voice >= 0 and (frame is None or frame.heard_to_heard is None):
        raise ValueError(
          f'the frame of seat {seat} has no heard_to_heard, and of '
          f'{len(voices)} seats it hears two lines in a row; give what stands '
          'between them.'
        )


def _samplings(speakers, voices):
  """How each seat draws; a seat without a speaker never does."""
  found = []
  for seat, voice in enumerate(voices):
    sampling = speakers[max(voice, 0)].sampling
    if not isinstance(sampling, Sampling):
      who = speakers[max(voice, 0)].who
      sampling = sampling[who.index(seat) if voice >= 0 else 0]
    found.append(sampling)
  return found


def _check_settings(samplings, rows):
  for sampling in samplings:
    given = sampling.temperature.shape[0]
    if given != rows:
      raise ValueError(
        f'the sampling is for {given} rows and the scenario has {rows}; give '
        'the settings of each dialogue (`Sampling.of`).'
      )


def _together(samplings):
  """The settings of all seats as arrays `[B K ...]`, without strings."""
  some = any(x.repetition is not None for x in samplings)
  width = max(x.stop.shape[1] for x in samplings)

  def alike(sampling):
    repetition = sampling.repetition
    if some and repetition is None:
      repetition = jnp.ones_like(sampling.temperature)
    room = width - sampling.stop.shape[1]
    stop = jnp.pad(sampling.stop, ((0, 0), (0, room)), constant_values=-1)
    return sampling.replace(repetition=repetition, stop=stop, strings=None)

  return jax.tree.map(
    lambda *x: jnp.stack(x, axis=1), *[alike(x) for x in samplings]
  )


def _strings(samplings, rows):
  """One table for the stop strings of all seats, and where each row starts."""
  none = jnp.zeros(rows, jnp.int32)
  tables, starts, found, size = [], [], {}, 0
  for sampling in samplings:
    strings = sampling.strings
    if strings is None:
      starts.append(none)
      continue
    new = id(strings.table) not in found  # seats may share theirs
    before = found.setdefault(id(strings.table), size)
    shift = lambda x, n=before: jnp.where(x < 2, x, x + n).astype(jnp.int32)
    starts.append(shift(strings.start))
    if new:
      tables.append(shift(strings.table) if tables else strings.table)
      size += strings.table.shape[0]
  table = jnp.concatenate(tables) if tables else None
  return table, jnp.stack(starts, axis=1)


def _check_lanes(rows, lanes, groups):
  if min(lanes, groups) < 1:
    raise ValueError(
      f'lanes={lanes} in groups={groups} hold no dialogue; give 1 or more.'
    )
  if rows % groups or lanes % groups:
    raise ValueError(
      f'groups={groups} does not divide {rows} dialogues in {lanes} lanes; '
      f'take a divisor of {math.gcd(rows, lanes)}.'
    )


def _check(scenario, frames, lines, tokens):
  rows, seats = scenario.prompts.shape[:2]
  if rows == 0:
    raise ValueError('the scenario has no rows; give at least one dialogue.')
  if seats != len(frames):
    raise ValueError(
      f'the scenario has prompts for {seats} seats, and there are frames for '
      f'{len(frames)}; give both for every seat.'
    )
  if scenario.opening is None:
    if lines < 1 or tokens < 1:
      raise ValueError(
        f'lines={lines} of tokens={tokens} say nothing; give 1 or more of both.'
      )
  elif lines < 2:
    raise ValueError(
      f'lines={lines}: a dialogue needs an opening and at least one reply; '
      'give 2 or more.'
    )
  elif scenario.opening.shape[1] > tokens:
    raise ValueError(
      f'the openings have room for {scenario.opening.shape[1]} tokens, more '
      f'than the {tokens} of a line; shorten them or raise the limit.'
    )
