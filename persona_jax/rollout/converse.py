"""A conversation of two speakers as one pure function."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from persona_jax.dialogue import Dialogue, Frame
from persona_jax.rollout import line as lines_
from persona_jax.rollout.line import Line
from persona_jax.rollout.speaker import Scenario, Speaker


def converse(
  key: Key[Array, ''],
  speakers: tuple[Speaker, Speaker],
  frames: tuple[Frame, Frame],
  scenario: Scenario,
  *,
  lines: int,
  tokens: int,
) -> Dialogue:
  """B dialogues of `lines` lines of at most `tokens` tokens.

  `speakers[0]` opens with `scenario.opening`; then both speak in turn. Each
  keeps its cache: nothing is read twice. Jit it with `lines` and `tokens`
  static. Keys come from scenario, sample, line and token, so a scenario gives
  the same lines in any batch.

  Raises:
    ValueError: `lines` is below 2, or the opening is longer than `tokens`.
  """
  _check(scenario, lines, tokens)
  row_keys = scenario.keys(key)
  opening = _opening(scenario, tokens)
  exchanges = lines // 2
  size = _slots(scenario, frames, exchanges, tokens)
  _, opener = _prefill(
    speakers[0], scenario, 0, size, opening, frames[0].heard_to_own
  )
  _, replier = _prefill(speakers[1], scenario, 1, size)

  def turn(who, memory, heard, n):
    frame, keys = frames[who], _fold(row_keys, n)
    hidden, memory = lines_.listen(
      speakers[who],
      memory,
      heard,
      frame.own_to_heard,
      frame.heard_to_own,
      scenario.live,
      first=n == 1,  # only the replier's first line follows a bare prompt
    )
    return lines_.speak(
      keys, speakers[who], memory, hidden, scenario.live, tokens
    )

  def exchange(carry, n):
    replier, opener, heard = carry
    said, replier = turn(1, replier, heard, n)
    answered, opener = jax.lax.cond(
      n + 1 < lines,
      lambda memory: turn(0, memory, said, n + 1),
      lambda memory: (jax.tree.map(jnp.zeros_like, said), memory),
      opener,
    )
    return (replier, opener, answered), (said, answered)

  odd = 2 * jnp.arange(exchanges) + 1  # the replier's lines
  _, (said, answered) = jax.lax.scan(exchange, (replier, opener, opening), odd)
  return _dialogue(scenario, _interleave(opening, said, answered, lines))


def _dialogue(scenario: Scenario, every: Line) -> Dialogue:
  return Dialogue(
    tokens=every.tokens,
    length=every.length,
    stopped=every.stopped,
    logprobs=every.logprobs,
    raw_logprobs=every.raw_logprobs,
    who=jnp.arange(every.length.shape[1]) % 2,
    prompts=scenario.prompts,
    prompt_length=scenario.prompt_length,
    scenario=scenario.ids,
    sample=scenario.samples,
    live=scenario.live,
  )


def _fold(row_keys, n):
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, n)


def _check(scenario, lines, tokens):
  if lines < 2:
    raise ValueError(
      f'lines={lines}: a dialogue needs an opening and at least one reply; '
      'give 2 or more.'
    )
  if scenario.opening.shape[1] > tokens:
    raise ValueError(
      f'the openings have room for {scenario.opening.shape[1]} tokens, more '
      f'than the {tokens} of a line; shorten them or raise the limit.'
    )


def _slots(scenario, frames, exchanges, tokens):
  """Enough for the prompt, an opening, and all that is heard and said."""
  frame = max(f.heard_to_own.size + f.own_to_heard.size for f in frames)
  exchange = frame + 2 * tokens + 1
  return scenario.prompts.shape[2] + (exchanges + 1) * exchange


def _opening(scenario, tokens):
  room = tokens - scenario.opening.shape[1]
  batch = scenario.opening.shape[0]
  zeros = jnp.zeros((batch, tokens), jnp.float32)
  return Line(
    tokens=jnp.pad(scenario.opening, ((0, 0), (0, room))),
    length=jnp.where(scenario.live, scenario.opening_length, 0),
    stopped=jnp.zeros(batch, bool),
    logprobs=zeros,
    raw_logprobs=zeros,
  )


def _prefill(speaker, scenario, who, size, opening=None, header=None):
  tokens = [scenario.prompts[:, who]]
  batch, room = tokens[0].shape
  valid = [jnp.arange(room)[None] < scenario.prompt_length[:, who, None]]
  if opening is not None:
    tokens += [jnp.broadcast_to(header, (batch, header.size)), opening.tokens]
    valid.append(jnp.ones((batch, header.size), bool))
    valid.append(
      jnp.arange(opening.tokens.shape[1])[None] < opening.length[:, None]
    )
  valid = jnp.concatenate(valid, axis=1) & scenario.live[:, None]
  return lines_.prefill(speaker, jnp.concatenate(tokens, axis=1), valid, size)


def _interleave(opening: Line, said: Line, answered: Line, lines: int) -> Line:
  def weave(first, own, other):  # [B ...], [X B ...], [X B ...]
    both = jnp.stack([own, other], axis=1)  # [X 2 B ...]
    both = both.reshape(-1, *both.shape[2:])
    every = jnp.concatenate([first[None], both])[:lines]
    return jnp.moveaxis(every, 0, 1)

  return jax.tree.map(weave, opening, said, answered)
