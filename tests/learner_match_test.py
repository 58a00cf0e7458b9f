"""The learner reads what the rollout sampled, a few logits at a time."""

import functools
import re

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import dialogue as dialogues
from persona_jax.dialogue import POLICY
from persona_jax.learn.logprobs import token_logprobs

BATCH, HELD = 5, 40  # logits at a time: of 39 tokens, one column
VOCAB, FEATURES = fakes.CONFIG.vocab, fakes.CONFIG.features


@jax.jit
def learned(variables, said):
  """Log-probabilities `[B N T]` as the learner computes them."""
  tiny = fakes.tiny()
  seen = dialogues.view(said, POLICY, fakes.FRAMES[POLICY])
  hidden, _ = tiny.edited(variables, seen.tokens, seen.positions)
  flat = lambda x: x.reshape(x.shape[0], -1)
  return token_logprobs(
    tiny.unembed,
    variables,
    hidden,
    flat(seen.before),
    flat(said.tokens),
    held=HELD,
  ).reshape(said.tokens.shape)


@pytest.mark.parametrize('caps', [fakes.caps(), fakes.no_caps()])
def test_learner_and_rollout_agree(key, caps):
  # At temperature 1; the first token of a line was not allowed to stop it.
  tiny, close = fakes.tiny(), np.testing.assert_allclose
  partner = fakes.speaker(fakes.tiny(seed=1), fakes.no_caps(), BATCH, range(80))
  policy = fakes.speaker(tiny, caps, BATCH, range(80))
  said = fakes.talk(key, (partner, policy), fakes.scenario(BATCH))
  mask = np.array(said.mask & (said.who == POLICY)[None, :, None])
  variables = fakes.with_edits(tiny.stacked, caps)
  logprobs = np.asarray(learned(variables, said))
  close(logprobs[mask], said.raw_logprobs[mask], atol=1e-4)
  mask[:, :, 0] = False
  close(logprobs[mask], said.logprobs[mask], atol=1e-4)
  other = fakes.with_edits(tiny.stacked, fakes.caps(seed=2))
  wrong = np.asarray(learned(other, said))
  assert np.abs(wrong - said.raw_logprobs)[mask].max() > 0.1


def _texts():
  """Hidden states of three texts, and tokens predicted from them."""
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((3, 20, FEATURES)).astype(np.float32)
  before, tokens = rng.integers(0, 20, (3, 13)), rng.integers(0, VOCAB, (3, 13))
  return jnp.asarray(hidden), jnp.asarray(before), jnp.asarray(tokens)


def head(variables, hidden, *, held, temperature=1.0):
  """Log-probabilities of the texts above."""
  return token_logprobs(
    fakes.tiny().unembed,
    variables,
    hidden,
    *_texts()[1:],
    temperature=temperature,
    held=held,
  )


@pytest.mark.parametrize(
  'held, temperature', [(40, 1.0), (39 * 17, 0.7), (1 << 20, 2.0)]
)
def test_blocks_change_nothing(held, temperature):
  hidden, before, tokens = map(np.asarray, _texts())
  variables = fakes.tiny().stacked
  run = functools.partial(head, held=held, temperature=temperature)
  got = jax.jit(run)(variables, hidden)
  table = np.asarray(variables['params']['embed']['embedding'], np.float64)
  for row in range(3):
    logits = hidden[row][before[row]] @ table.T / temperature
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    want = logits[np.arange(13), tokens[row]]
    np.testing.assert_allclose(got[row], want, atol=1e-4)


def widest(program):
  """The most logits of the 39 tokens in one array of a compiled text."""
  shapes = re.findall(r'\bf32\[([\d,]+)\]', program)
  shapes = {tuple(map(int, shape.split(','))) for shape in shapes}
  sizes = [s for s in shapes if s[0] == 39 or s[:2] == (3, 13)]
  rest = [np.prod(s) // 39 for s in sizes]
  return max(x for x in rest if x != FEATURES)


def compiled(grad):
  """The text of the learner's head, forward or with the gradient."""
  run = lambda variables, hidden: jnp.sum(
    jnp.sin(head(variables, hidden, held=39 * 38))
  )
  run = jax.value_and_grad(run, argnums=(0, 1)) if grad else run
  lowered = jax.jit(run).lower(fakes.tiny().stacked, _texts()[0])
  return lowered.compile().as_text()


@pytest.mark.parametrize('grad', [False, True])
def test_only_a_block_of_logits_is_held(grad):
  assert widest(compiled(grad)) == 38  # 8 blocks of 301, the last not full


def test_without_the_checkpoint_all_logits_are_held(monkeypatch):
  # That the test above can fail.
  monkeypatch.setattr(jax, 'checkpoint', lambda f: f)
  shapes = re.findall(r'\bf32\[([\d,]+)\]', compiled(grad=True))
  most = max(np.prod(list(map(int, shape.split(',')))) for shape in shapes)
  assert most >= 39 * VOCAB
