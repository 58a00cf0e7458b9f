"""Conversations as one pure function, or as pieces that a host drives."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from persona_jax.dialogue import Dialogue, Frame, Played
from persona_jax.rollout import lanes as lanes_
from persona_jax.rollout import loop
from persona_jax.rollout.lanes import Line, Said
from persona_jax.rollout.loop import Talk, Usage
from persona_jax.rollout.speaker import Scenario, Speaker
from persona_jax.rollout.stage import Stage, stage

PLAN = ('lanes', 'groups', 'width', 'chunk', 'patience')
STATIC = ('lines', 'tokens', *PLAN)


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
  kept = {
    ((() if speaker.sums else (rules.tokens,)), voice.kept.shape[1:])
    for speaker, voice in zip(on.speakers, voices, strict=True)
    if voice.kept is not None
  }
  if len(kept) > 1:
    shapes = ' and '.join(str((*a, *b)) for a, b in sorted(kept))
    raise ValueError(
      f'what the speakers keep of a line has the shapes {shapes}; let one of '
      'them capture, or both alike.'
    )
  for each, of_token in kept:
    said = said.replace(kept=zeros(jnp.float32, *each, *of_token))
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
    kept=None
    if kept is None
    else jnp.zeros((on.lanes, kept.shape[0], *kept.shape[3:])),
  )


def _vocab(speaker, voice):
  return jax.eval_shape(speaker.logits, voice.hidden).shape[1]
