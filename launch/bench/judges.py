"""All verdicts about a dialogue in two passes, against a call for each.

  python launch/bench/judges.py --lines 60 --repeats 3

A trained judge scores every line of a speaker against the persona in one pass
over the dialogue, and against all that was said before it in another. One call
a verdict, as https://arxiv.org/abs/2511.00222 was computed: a line and the
persona; a line and all lines before; five questions about the persona, each
written once, then answered and graded after every line. In the first rows a
call is one pass that ends in one token; in the last it says `--said` tokens, as
the paper's say a sentence before their verdict: what one such call says is
measured at the mean length, and multiplied. FLOPs are of the model's products
and the visible half of attention, counted by hand. The first row of calls
answers what the two passes do; to the questions about the persona they say
nothing.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax import data, judge, lab, main, rewards
from persona_jax.costs import products
from persona_jax.models import lora
from persona_jax.text import judged

WORDS = 60  # of an instruction, in tokens
QUESTIONS, QUESTION = 5, 50  # about the persona, and tokens of one
ROUND = 64  # shapes of calls are multiples of it


class Calls(NamedTuple):
  """The tokens of each call."""

  to_line: list[int]
  between: list[int]
  questions: list[int]


def run():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--lines', type=int, default=60)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--said', type=int, default=24)
  parser.add_argument('--model', default='smollm2-135m')
  parser.add_argument('--dtype', default='float32')
  args = parser.parse_args()
  config = main.load_config('judges')
  main.override(config, 'model', args.model)
  main.override(config, 'dtype', args.dtype)
  opened = lab.open_lab(config)
  persona, lines = talk(args.lines)
  prompt = opened.chat.prompt_ids(persona)
  said = data.spoken(opened.chat, [lines], data.padded([prompt]))
  adapter = lora.init(
    opened.model.config, jax.random.key(0), rank=6, alpha=12.0
  )
  scorer = judge.made(opened, adapter)
  body = np.asarray(said.body)[0]
  frames = (opened.frame.heard_to_own, opened.frame.own_to_heard)
  own = int(body.sum()) + sum(x.size for x in frames) * args.lines // 2
  reads = [len(prompt) + own, scorer.neutral.size + own]
  scorer = dataclasses.replace(scorer, slots=rounded(max(reads)))
  both = jax.jit(
    lambda scorer, said: (
      rewards.trained(scorer)(said),
      rewards.among_lines(scorer)(said),
    )
  )
  ours = timed(lambda: both(scorer, said), args.repeats)
  calls = asked(len(prompt), body)
  shapes = opened.model.config
  rows = [('two passes', reads, args.lines - 1, ours)]
  for name, lengths in (
    ('a call a verdict', [*calls.to_line, *calls.between]),
    ('and for the questions', [x for y in calls for x in y]),
  ):
    rows.append((name, lengths, len(lengths), called(opened, lengths)))
  _, lengths, verdicts, seconds = rows[-1]
  mean = rounded(sum(lengths) // len(lengths) + args.said)
  words = timed(lambda: spoken(opened, mean, args.said), args.repeats)
  rows.append(
    (
      f'and {args.said} tokens said by each',
      [x + args.said for x in lengths],
      verdicts,
      seconds + words * len(lengths),
    )
  )
  print(
    f'{jax.devices()[0].device_kind}: {args.lines} lines, {body.sum()} tokens'
  )
  print(
    '| | passes | tokens read | TFLOP | verdicts | s | times ours | FLOPs |'
  )
  print('|---|---|---|---|---|---|---|---|')
  least = sum(flops(shapes, x) for x in reads)
  for name, lengths, verdicts, seconds in rows:
    cost = sum(flops(shapes, x) for x in lengths)
    print(
      f'| {name} | {len(lengths)} | {sum(lengths):,} | {cost / 1e12:.2f} '
      f'| {verdicts} | {seconds:.2f} | {seconds / ours:.1f} '
      f'| {cost / least:.1f} |'
    )


def talk(count: int) -> tuple[str, list[str]]:
  """A persona, and lines of as many dialogues as it takes."""
  lines, index, persona = [], 0, ''
  while len(lines) < count:
    made = judged.made(index)
    persona = max(persona, made.persona, key=len) if index < 5 else persona
    lines += made.lines
    index += 1
  return persona, lines[:count]


def asked(persona: int, body) -> Calls:
  """What each call reads: a line of the speaker, and what it is held to."""
  before = np.cumsum(body) - body
  own = range(1, len(body), 2)
  return Calls(
    to_line=[WORDS + persona + int(body[n]) for n in own],
    between=[WORDS + int(before[n] + body[n]) for n in own[1:]],
    questions=[
      *(WORDS + persona + QUESTION * i for i in range(QUESTIONS)),
      *(
        WORDS + persona + int(before[n] + body[n]) + QUESTION
        for n in own
        for _ in range(QUESTIONS)
      ),
      *[WORDS + QUESTION] * (QUESTIONS * len(own)),
    ],
  )


def called(opened, lengths) -> float:
  """Seconds of a pass for each of `lengths`, one after another."""

  @jax.jit
  def verdict(variables, tokens):
    positions = jnp.arange(tokens.size, dtype=jnp.int32)[None]
    hidden, _ = opened.model.apply(variables, tokens, positions)
    return opened.model.unembed(variables, hidden[:, -1])

  texts = [jnp.ones((1, rounded(x)), jnp.int32) for x in lengths]
  for shape in {text.shape for text in texts}:
    verdict(opened.model.variables, jnp.ones(shape, jnp.int32))
  begun = time.perf_counter()
  for text in texts:
    verdict(opened.model.variables, text).block_until_ready()
  return time.perf_counter() - begun


def spoken(opened, slots: int, count: int):
  """So many tokens, one by one, after a text that fills the slots."""
  voice = opened.partner
  memory = voice.memory(1, slots)
  functions = voice.apply, voice.unembed
  return saying(voice.variables, memory, *functions, slots, count)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def saying(variables, memory, apply, unembed, slots, count):
  def step(i, state):
    token, memory = state
    position = jnp.full((1, 1), slots - count + i, jnp.int32)
    hidden, memory = apply(variables, token, position, memory)
    token = jnp.argmax(unembed(variables, hidden[:, 0]), -1)
    return token[:, None].astype(jnp.int32), memory

  start = jnp.ones((1, 1), jnp.int32), memory
  return jax.lax.fori_loop(0, count, step, start)[0]


def rounded(size: int) -> int:
  return -(-size // ROUND) * ROUND


def timed(work, repeats: int) -> float:
  """Median seconds of `work`, compiled before."""
  jax.block_until_ready(work())
  times = []
  for _ in range(repeats):
    begun = time.perf_counter()
    jax.block_until_ready(work())
    times.append(time.perf_counter() - begun)
  return statistics.median(times)


def flops(config, tokens: int) -> float:
  """Of a pass over so many tokens."""
  attention = 2 * config.heads * config.head_dim * tokens
  return 2.0 * config.layers * tokens * (products(config).all + attention / 2)


if __name__ == '__main__':
  run()
