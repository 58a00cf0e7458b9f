"""Conversations as one pure function, or as pieces that a host drives."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Key

from persona_jax.dialogue import Dialogue, Frame, Played, pieces, slots
from persona_jax.rollout import lanes as lanes_
from persona_jax.rollout import loop
from persona_jax.rollout.environment import OpenConversation
from persona_jax.rollout.lanes import HOST, WORLD, Given, Line, Rules, Said
from persona_jax.rollout.loop import Talk, Usage
from persona_jax.rollout.sampling import Sampling
from persona_jax.rollout.speaker import Scenario, Speaker

PLAN = ('lanes', 'groups', 'width', 'chunk', 'patience')
STATIC = ('lines', 'tokens', *PLAN)


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


def converse(
  key: Key[Array, ''],
  speakers: tuple[Speaker | None, ...],
  frames: tuple[Frame | None, ...],
  scenario: Scenario,
  *,
  lines: int,
  tokens: int,
  environment: Any = None,
  **plan,
) -> Dialogue:
  """B dialogues of at most `lines` lines of at most `tokens` tokens.

  The seats take turns, beginning with `scenario.opening`. Each speaker keeps
  its cache: nothing is read twice. Jit it with `static_argnames=STATIC`. Keys
  come from scenario, sample, line and token, so a scenario gives the same
  lines in any batch.

  Args:
    key: names all draws, with the scenario.
    speakers: one a seat, or one for two seats (`Speaker.who`); None is the
      seat of the environment.
    frames: what stands between two lines, as each seat reads it.
    scenario: how the dialogues begin.
    lines: most lines of a dialogue, the opening included.
    tokens: most tokens of a line, its stop token included.
    environment: what hears every line (`rollout.environment`).
    **plan: the names of `PLAN`, as `stage` has them: how, not what.

  Raises:
    ValueError: what is asked for does not fit together; see `stage`.
  """
  held, _ = converse_counted(
    key,
    speakers,
    frames,
    scenario,
    lines=lines,
    tokens=tokens,
    environment=environment,
    **plan,
  )
  return held


def converse_counted(
  key, speakers, frames, scenario, **of
) -> tuple[Dialogue, Usage]:
  """`converse`, and what it took."""
  if of.get('hosted'):
    raise ValueError(
      f"hosted={of['hosted']}: nobody gives the host's lines here; hold such "
      'dialogues by `rollout.hosted.hold`.'
    )
  on = stage(key, speakers, frames, scenario, **of)
  talk = go(on, begin(on))
  return finish(on, talk), talk.usage


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

  Args:
    key: as `converse`, like all that is not named here.
    speakers: as `converse`.
    frames: as `converse`.
    scenario: as `converse`.
    lines: as `converse`.
    tokens: as `converse`.
    environment: as `converse`.
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


def begin(on: Stage) -> Talk:
  """The dialogues before anything was read."""
  scenario, rules = on.scenario, on.rules
  groups, rows = on.given.keys.shape
  each = on.lanes // groups
  shape = (groups, rows, rules.lines)
  zeros = lambda dtype, *more: jnp.zeros((*shape, *more), dtype)
  said = Said(
    tokens=zeros(jnp.int32, rules.tokens),
    length=zeros(jnp.int32),
    stopped=zeros(bool),
    logprobs=zeros(jnp.float32, rules.tokens),
    raw_logprobs=zeros(jnp.float32, rules.tokens),
    reward=zeros(jnp.float32),
    terminated=jnp.zeros(shape[:2], bool),
    truncated=jnp.zeros(shape[:2], bool),
    state=on.given.state,
    kept=None,
  )
  if scenario.opening is not None:
    size = scenario.opening.shape[1]
    opening = scenario.opening.reshape(groups, rows, size)
    length = jnp.where(scenario.live, scenario.opening_length, 0)
    said = said.replace(
      tokens=said.tokens.at[:, :, 0, :size].set(opening),
      length=said.length.at[:, :, 0].set(length.reshape(groups, rows)),
    )
  lanes = jax.vmap(lambda given: lanes_.begin(rules, given, each))(on.given)
  voices = tuple(_voice(speaker, on) for speaker in on.speakers)
  kept = [voice.kept.shape[1] for voice in voices if voice.kept is not None]
  if len(set(kept)) > 1:
    raise ValueError(
      f'the speakers keep {kept} numbers of a token; let one of them capture, '
      'or as many.'
    )
  if kept:
    said = said.replace(kept=zeros(jnp.float32, rules.tokens, kept[0]))
  seen = None
  if on.given.sampling.repetition is not None:
    width = max(_vocab(x, v) for x, v in zip(on.speakers, voices, strict=True))
    seen = jnp.zeros((on.lanes, width), bool)
  waited = jnp.zeros((), jnp.int32)
  return Talk(said, lanes, voices, seen, waited, Usage.none())


def go(on: Stage, talk: Talk) -> Talk:
  """Talks until all is said, or every lane waits for the host."""
  return loop.go(
    on.speakers,
    on.rules,
    on.given,
    talk,
    chunk=on.chunk,
    width=on.width,
    patience=on.patience,
  )


def supply(on: Stage, talk: Talk, line: Line, given) -> Talk:
  """`talk` with the host's lines in the lanes that are `given` one."""
  given &= talk.lanes.phase == lanes_.WAITING
  said = jax.vmap(lanes_.write_line)(talk.said, talk.lanes, line, given)
  said, lanes = loop.move(on.rules, on.given, said, talk.lanes, given)
  return talk.replace(said=said, lanes=lanes)


def finish(on: Stage, talk: Talk) -> Dialogue:
  """What was said, in the order of the scenario."""
  scenario = on.scenario
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  said = jax.tree.map(flat, talk.said)
  return Dialogue(
    tokens=said.tokens,
    length=said.length,
    stopped=said.stopped,
    logprobs=said.logprobs,
    raw_logprobs=said.raw_logprobs,
    who=jnp.arange(on.rules.lines) % on.rules.seats,
    prompts=scenario.prompts,
    prompt_length=scenario.prompt_length,
    scenario=scenario.ids,
    sample=scenario.samples,
    live=scenario.live,
    kept=said.kept,
    played=Played(said.reward, said.terminated, said.truncated, said.state),
  )


def _voice(speaker, on):
  caches = tuple(speaker.memory(on.lanes, on.rules.slots) for _ in speaker.who)
  nothing = jnp.zeros((on.lanes, 1), jnp.int32)
  seat = nothing[:, 0] + speaker.who[0]
  hidden, _, kept = jax.eval_shape(
    speaker.read, caches[0], nothing, nothing, seat
  )
  return loop.Voice(
    caches=caches,
    front=jnp.full(on.lanes, speaker.who[0], jnp.int32),
    hidden=jnp.zeros((on.lanes, hidden.shape[2]), hidden.dtype),
    kept=None if kept is None else jnp.zeros((on.lanes, kept.shape[0])),
  )


def _vocab(speaker, voice):
  return jax.eval_shape(speaker.logits, voice.hidden).shape[1]


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
  tables, starts, size = [], [], 0
  for sampling in samplings:
    strings = sampling.strings
    if strings is None:
      starts.append(none)
      continue
    shift = lambda x, size=size: jnp.where(x < 2, x, x + size).astype(jnp.int32)
    tables.append(shift(strings.table) if tables else strings.table)
    starts.append(shift(strings.start))
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
