"""The decoder against a slow reference, and the laws that it must keep."""

import dataclasses
import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import trees
from persona_jax.models import cache as caches
from persona_jax.models import decoder

close = functools.partial(np.testing.assert_allclose, atol=1e-5)
other = functools.partial(dataclasses.replace, fakes.CONFIG)
CONFIGS = {
  'llama': fakes.CONFIG,
  'qwen 2, untied': other(qkv_bias=True, tied=False, layers=3),
  'qwen 3, a key for each head': other(qk_norm='head', kv_heads=6, head_dim=8),
}


@pytest.fixture
def tiny():
  return fakes.tiny()


def padded(valid):
  """Text of the fakes with holes, and the positions that skip them."""
  tokens, _ = fakes.text()
  return tokens, fakes.ragged(valid)


def reference(config, variables, tokens):
  """Logits of one text, token by token and head by head, in float64."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
  params = params['params']

  def norm(x, scale):
    return x / np.sqrt(np.mean(x * x) + config.norm_eps) * scale

  def linear(layer, x):
    return layer['kernel'] @ x + layer.get('bias', 0)

  def rotate(x, position):
    half = config.head_dim // 2
    out = np.zeros_like(x)
    for i in range(half):
      angle = position * config.kinds[0].rope.theta ** (
        -2 * i / config.head_dim
      )
      turn = np.array(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
      )
      out[[i, i + half]] = turn @ x[[i, i + half]]
    return out

  def heads(layer, name, count, x, position=None):
    out = linear(layer[name], x).reshape(count, config.head_dim)
    if config.qk_norm and name != 'v':
      out = [norm(head, layer[f'{name}_norm']['scale']) for head in out]
    return out if position is None else [rotate(x, position) for x in out]

  def attend(layer, xs):
    keys = [heads(layer, 'k', config.kv_heads, x, t) for t, x in enumerate(xs)]
    values = [heads(layer, 'v', config.kv_heads, x) for x in xs]
    for t, x in enumerate(xs):
      mixed = []
      for h, query in enumerate(heads(layer, 'q', config.heads, x, t)):
        kv = h // (config.heads // config.kv_heads)
        score = np.array([query @ keys[s][kv] for s in range(t + 1)])
        weight = np.exp(score / np.sqrt(config.head_dim))
        weight /= weight.sum()
        mixed.append(sum(w * values[s][kv] for s, w in enumerate(weight)))
      yield linear(layer['o'], np.concatenate(mixed))

  xs = [params['embed']['embedding'][token] for token in tokens]
  for i in range(config.layers):
    layer = jax.tree.map(lambda x, i=i: x[i], params['layers'])
    normed = [norm(x, layer['attn_norm']['scale']) for x in xs]
    heard = attend(layer['attn'], normed)
    xs = [x + y for x, y in zip(xs, heard, strict=True)]
    for t, x in enumerate(xs):
      x = norm(x, layer['mlp_norm']['scale'])
      gate = linear(layer['mlp']['gate'], x)
      x = gate / (1 + np.exp(-gate)) * linear(layer['mlp']['up'], x)
      xs[t] = xs[t] + linear(layer['mlp']['down'], x)
  tied = params['embed']['embedding']
  unembed = tied if config.tied else params['unembed']['kernel']
  return np.stack([unembed @ norm(x, params['norm']['scale']) for x in xs])


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_the_reference(config):
  tiny = fakes.tiny(config)
  tokens, positions = fakes.text()
  for variables in (tiny.stacked, tiny.unstacked):
    hidden, _ = tiny.run(variables, tokens, positions)
    logits = tiny.unembed(variables, hidden)
    want = reference(config, tiny.stacked, np.asarray(tokens)[1])
    np.testing.assert_allclose(logits[1], want, atol=1e-4)
  assert want.std() > 0.3


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_init_makes_the_variables_of_the_config(config):
  shapes = jax.eval_shape(
    functools.partial(decoder.init, config), jax.random.key(0)
  )
  names = ' '.join(trees.flatten(shapes))
  assert ('bias' in names) == config.qkv_bias
  assert ('q_norm' in names) == bool(config.qk_norm)
  assert ('unembed' in names) != config.tied
  layers = jax.tree.leaves(shapes['params']['layers'])
  assert {x.shape[0] for x in layers} == {config.layers}


@pytest.mark.parametrize(
  'remat', ['full', 'dots', 'save:attn_out,mlp_out', 'offload:resid']
)
def test_scan_and_remat_change_no_gradient(tiny, remat):
  def run(variables, remat):
    apply = decoder.functions(tiny.config, remat=remat).apply

    def loss(variables):
      return jnp.mean(jnp.sin(apply(variables, *fakes.text())[0]))

    return jax.jit(jax.value_and_grad(loss))(variables)

  value, grads = run(tiny.stacked, remat)
  want, apart = run(tiny.unstacked, 'none')
  close(value, want)
  jax.tree.map(close, grads, trees.stack_layers(apart))
  assert min(np.abs(x).max() for x in jax.tree.leaves(grads)) > 1e-5


@pytest.mark.parametrize('remat', ['none', 'full', 'dots'])
def test_remat_is_in_the_program_where_asked_for(tiny, remat):
  apply = decoder.functions(tiny.config, remat=remat).apply
  program = jax.make_jaxpr(apply)(tiny.stacked, *fakes.text())
  assert ('prevent_cse' in str(program)) == (remat != 'none')


@pytest.mark.parametrize(
  'remat', ['all', 'save', 'save:resid,nothing', 'full:resid', '']
)
def test_an_unknown_remat_is_refused(tiny, remat):
  apply = decoder.functions(tiny.config, remat=remat).apply
  with pytest.raises(ValueError, match='is unknown; give'):
    jax.eval_shape(apply, tiny.stacked, *fakes.text())


def test_scanned_equals_unrolled(tiny):
  scanned, _ = tiny.run(tiny.stacked, *fakes.text())
  unrolled, _ = tiny.run(tiny.unstacked, *fakes.text())
  close(scanned, unrolled)


@pytest.mark.parametrize('t', [3, 7, 11])
def test_later_tokens_do_not_change_earlier_ones(tiny, t):
  tokens, positions = fakes.text()
  hidden, _ = tiny.run(tiny.stacked, tokens, positions)
  again, _ = tiny.run(tiny.stacked, tokens.at[:, t].add(1), positions)
  moved = np.abs(np.asarray(hidden) - again).max(axis=2)
  assert moved[:, :t].max() == 0 and moved[:, t:].min() > 1e-4


@pytest.mark.parametrize('seed', range(3))
def test_padding_anywhere_changes_nothing(tiny, seed):
  # Rows of 7 real tokens, wherever they lie and whatever the padding holds.
  rng = np.random.default_rng(seed)
  valid = rng.permuted(np.tile(np.arange(12) < 7, (3, 1)), axis=1)
  tokens, positions = padded(valid)
  packed = np.asarray(tokens)[valid].reshape(3, 7)
  first = np.tile(np.arange(12) < 7, (3, 1))
  dense = jnp.pad(jnp.asarray(packed), ((0, 0), (0, 5)))
  want = np.asarray(tiny.run(tiny.stacked, dense, fakes.ragged(first))[0])
  got = np.asarray(tiny.run(tiny.stacked, tokens, positions)[0])
  close(got[valid], want[first])
  assert np.isfinite(got).all()


def test_a_row_of_padding_stays_finite(tiny):
  tokens, positions = fakes.text()
  hidden, _ = tiny.run(tiny.stacked, tokens, positions.at[1].set(-1))
  assert np.isfinite(hidden).all()


def test_cache_is_the_same_stacked_and_unstacked(tiny):
  valid = np.ones((3, 12), bool)
  valid[0, 2:4] = valid[2, :5] = False
  tokens, positions = padded(valid)
  empty = caches.empty_stacked(tiny.config, 3, 15)
  one, stacked = tiny.run(tiny.stacked, tokens, positions, empty)
  two, apart = tiny.run(tiny.unstacked, tokens, positions, tiny.memory(3, 15))
  close(one, two)
  close(stacked.keys, np.stack(apart.keys))
  close(stacked.values, np.stack(apart.values))
  written = np.any(stacked.values, axis=(0, 2, 4))  # [B S]
  slots = np.arange(stacked.size)
  assert stacked.size >= 15
  np.testing.assert_array_equal(written, slots < valid.sum(1, keepdims=True))


def test_blocked_keys_are_the_same(tiny):
  valid = np.ones((3, 70), bool)  # more than a block
  valid[0, 20:40] = valid[2, :5] = False
  tokens, positions = fakes.text(length=70)[0], fakes.ragged(valid)
  seen = []
  for blocked in (False, True):
    cache = caches.empty(tiny.config, 3, 70, blocked=blocked)
    assert cache.size == 128
    _, cache = tiny.run(
      tiny.unstacked, tokens[:, :60], positions[:, :60], cache
    )
    hidden, _ = tiny.run(
      tiny.unstacked, tokens[:, 60:], positions[:, 60:], cache
    )
    seen.append(hidden)
  close(*seen)


def test_a_row_is_begun_anew_by_counting_from_zero(tiny):
  tokens, positions = fakes.text()
  empty = tiny.memory(3, 15)
  want, _ = tiny.run(tiny.unstacked, tokens, positions, empty)
  _, used = tiny.run(tiny.unstacked, tokens[::-1] + 1, positions, empty)
  again, _ = tiny.run(tiny.unstacked, tokens, positions, used)
  close(again, want)


def test_bfloat16_runs_and_returns_float32_logits(tiny):
  apply, unembed = decoder.functions(tiny.config, dtype=jnp.bfloat16)
  hidden, _ = jax.jit(apply)(tiny.stacked, *fakes.text())
  want, _ = tiny.run(tiny.stacked, *fakes.text())
  assert hidden.dtype == jnp.bfloat16
  assert unembed(tiny.stacked, hidden).dtype == jnp.float32
  assert 1e-4 < np.abs(np.asarray(hidden, np.float32) - want).max() < 0.2
