"""From words to arrays: scenarios, judges' tokens, labelled dialogues."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax import rewards
from persona_jax.dialogue import PARTNER, POLICY, Dialogue, Frame
from persona_jax.models import cache as caches
from persona_jax.rollout import Scenario
from persona_jax.text import corpus, wording
from persona_jax.text.chat import Chat

KINDS = ('consistent', 'contradicts')


class Script(NamedTuple):
  """One conversation to hold: who, with whom, and how it begins."""

  persona: corpus.Persona
  partner: corpus.Partner
  opening: str
  index: int  # names its random keys


def scripts(
  split: str, count: int, *, personas=None, seed: int = 0
) -> list[Script]:
  """`count` scripts of a split; kinds of partner take turns.

  Persona i meets partner i + round, so that with enough scripts every persona
  meets every kind.
  """
  people, kinds = corpus.personas(split, personas), corpus.partners()
  order = np.random.default_rng(seed).permutation(len(people))
  found = []
  for i in range(count):
    round_, place = divmod(i, len(people))
    partner = kinds[(place + round_) % len(kinds)]
    opening = partner.openings[i % len(partner.openings)]
    found.append(Script(people[order[place]], partner, opening, i))
  return found


def frame(chat: Chat) -> Frame:
  """The chat template's pieces as arrays."""
  pieces = chat.frame()
  return Frame(
    heard_to_own=jnp.asarray(pieces.user_to_own, jnp.int32),
    own_to_heard=jnp.asarray(pieces.own_to_user, jnp.int32),
  )


def scenario(
  chat: Chat,
  wanted: list[Script],
  *,
  prompt_tokens: int,
  line_tokens: int,
  samples: int = 1,
  rows: int | None = None,
) -> Scenario:
  """Scripts as arrays, `samples` rows each, filled up to `rows` with idle ones.

  Raises:
    ValueError: a prompt or an opening does not fit.
  """
  told = [(s, sample) for s in wanted for sample in range(samples)]
  rows = rows or len(told)
  idle = rows - len(told)
  told += [told[0]] * idle
  cue = chat.encode(wording.CUE)
  prompts = {PARTNER: [], POLICY: []}
  for script, _ in told:
    prompts[PARTNER].append(chat.prompt_ids(script.partner.prompt) + cue)
    prompts[POLICY].append(chat.prompt_ids(script.persona.prompt))
  names = {
    PARTNER: [f'the {s.partner.kind} partner' for s, _ in told],
    POLICY: [f'the persona {s.persona.name!r}' for s, _ in told],
  }
  tokens, length = {}, {}
  for who in (PARTNER, POLICY):
    tokens[who], length[who] = _checked(
      prompts[who], prompt_tokens, names[who], 'prompt_tokens'
    )
  opening, opening_length = _checked(
    [chat.encode(script.opening) for script, _ in told],
    line_tokens,
    [f'the opening {script.opening!r}' for script, _ in told],
    'tokens',
  )
  return Scenario(
    ids=jnp.array([script.index for script, _ in told], jnp.int32),
    samples=jnp.array([sample for _, sample in told], jnp.int32),
    prompts=jnp.stack([tokens[PARTNER], tokens[POLICY]], 1),
    prompt_length=jnp.stack([length[PARTNER], length[POLICY]], 1),
    opening=jnp.asarray(opening),
    opening_length=jnp.asarray(opening_length),
    live=jnp.arange(rows) < rows - idle,
  )


def labelled(chat: Chat, lines) -> Dialogue:
  """Labelled lines as dialogues: the question, then the line."""
  prompt = padded([chat.prompt_ids(line.persona) for line in lines])
  return spoken(chat, [(x.question, x.line) for x in lines], prompt)


def labelled_pairs(chat: Chat, pairs) -> Dialogue:
  """Pairs of lines as dialogues: cue, first, cue, second."""
  ask = wording.ANY_LINE
  said = [(ask, pair.first, ask, pair.second) for pair in pairs]
  return spoken(chat, said, padded([[0]] * len(pairs)))


def spoken(chat: Chat, said, prompt, *, room: int | None = None) -> Dialogue:
  """Dialogues `[B N]` of texts, an empty one where nothing was said.

  `prompt` is the tokens `[B P]` and the length `[B]` of what both were told;
  `room` the tokens of a line, by default of the longest.
  """
  rows, lines = len(said), len(said[0])
  texts = [chat.encode(x) for some in said for x in some]
  found, length = padded(texts, room)
  tokens = jnp.asarray(found.reshape(rows, lines, -1))
  blank = jnp.zeros(tokens.shape, jnp.float32)
  return Dialogue(
    tokens=tokens,
    length=jnp.asarray(length.reshape(rows, lines)),
    stopped=jnp.zeros((rows, lines), bool),
    logprobs=blank,
    raw_logprobs=blank,
    who=jnp.arange(lines) % 2,
    prompts=jnp.stack([prompt[0]] * 2, 1),
    prompt_length=jnp.stack([prompt[1]] * 2, 1),
    scenario=jnp.arange(rows),
    sample=jnp.zeros(rows, jnp.int32),
    live=jnp.ones(rows, bool),
  )


class Judges(NamedTuple):
  """Uncalibrated scores: `likelihood` trains, `verdict` does not."""

  likelihood: jax.tree_util.Partial  # Dialogue -> [B N]
  verdict: jax.tree_util.Partial
  pair_likelihood: jax.tree_util.Partial  # Dialogue -> [B N N]
  pair_verdict: jax.tree_util.Partial


def judges(model, chat: Chat) -> Judges:
  """The judges that one chat model can be."""
  ids = lambda text: jnp.asarray(text, jnp.int32)
  likely = rewards.Likelihood(
    variables=model.variables,
    frame=frame(chat),
    neutral=ids(chat.prompt_ids(wording.NEUTRAL)),
    cue=ids(chat.encode(wording.ANY_LINE)),
    apply=model.apply,
    unembed=model.unembed,
  )
  to_line = _asking(model, chat, wording.PROMPT_TO_LINE)
  between = _asking(model, chat, wording.LINE_TO_LINE)
  return Judges(
    likelihood=rewards.likelihood(likely),
    verdict=rewards.verdict(to_line),
    pair_likelihood=rewards.pair_likelihood(likely),
    pair_verdict=rewards.pair_verdict(between),
  )


def _asking(model, chat, ask: wording.Ask) -> rewards.Verdict:
  pieces = chat.frame()
  ids = lambda tokens: jnp.asarray(tokens, jnp.int32)
  answers = lambda words: ids(sorted({chat.encode(word)[0] for word in words}))
  questions = tuple(
    rewards.Question(
      tail=ids([*chat.encode(tail), *pieces.user_to_own]),
      good=answers(good),
      bad=answers(bad),
    )
    for tail, good, bad in wording.tails(ask)
  )
  return rewards.Verdict(
    variables=model.variables,
    head=ids([*pieces.no_system, *chat.encode(ask.head)]),
    middle=ids(chat.encode(ask.middle)),
    questions=questions,
    strip=(len(pieces.before_system), len(pieces.system_to_user)),
    memory=functools.partial(caches.empty_stacked, model.config),
    apply=model.apply,
    unembed=model.unembed,
  )


def texts(chat: Chat, dialogue: Dialogue) -> list[list[str]]:
  """The lines of every live dialogue, in words."""
  tokens, body = np.asarray(dialogue.tokens), np.asarray(dialogue.body)
  return [
    [
      chat.decode(tokens[b, n, : body[b, n]].tolist())
      for n in range(tokens.shape[1])
    ]
    for b in range(tokens.shape[0])
    if dialogue.live[b]
  ]


def padded(
  rows: Sequence[Sequence[int]], size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Token lists as `[B size]`, by default the longest, and their lengths."""
  length = np.array([len(row) for row in rows], np.int32)
  tokens = np.zeros((len(rows), size or length.max()), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
  return tokens, length


def _checked(rows, size, names, field):
  for name, row in zip(names, rows, strict=True):
    if len(row) > size:
      raise ValueError(
        f'{name} takes {len(row)} tokens, more than rollout.{field}={size}; '
        'shorten it or raise the limit.'
      )
  return padded(rows, size)
