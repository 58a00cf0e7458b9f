"""Narrow weights and caches: how far off, and as part of everything else."""

import dataclasses
import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import taps, trees
from persona_jax.activations import edits
from persona_jax.models import cache, config, decoder, lora, quantised
from persona_jax.models.quantised import Narrow, quantise

CONFIG = dataclasses.replace(fakes.CONFIG, qkv_bias=True, tied=False)
FLOAT8 = jnp.float8_e4m3fn
TOKENS, POSITIONS = fakes.text(length=11)
APPLY, UNEMBED = decoder.functions(CONFIG)
NARROW = quantised.quantised(APPLY)
ROUNDED = quantised.quantised(APPLY, activations=True)
SHALLOW = dataclasses.replace(CONFIG, layers=1)
ONE_LAYER = decoder.functions(SHALLOW).apply
quickly = functools.partial(  # most of the time goes into compiling
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def runs(apply):
  """The hidden states of one text."""
  return quickly(lambda v: apply(v, TOKENS, POSITIONS)[0])


plain, narrow, rounded = runs(APPLY), runs(NARROW), runs(ROUNDED)
times = quickly(quantised.times, static_argnames='activations')
widened = quickly(quantised.dequantise)
apart_layers = quickly(trees.unstack_layers)
reading = quickly(ONE_LAYER)


@pytest.fixture(scope='module')
def base():
  return fakes.variables(CONFIG)


@pytest.fixture(scope='module', params=[jnp.int8, FLOAT8], ids=str)
def small(base, request):
  return quantise(base, request.param)


@pytest.fixture(scope='module')
def int8(base):
  return quantise(base)


@pytest.fixture(scope='module')
def shallow():
  return apart_layers(fakes.variables(SHALLOW))


def close(got, want, atol=2e-5):
  np.testing.assert_allclose(got, want, atol=atol)


def apart(got, want):
  """The distance as a share of `want`."""
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def kernels(variables):
  """The kernels by name, quantised or not."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(
    variables['params'], is_leaf=lambda x: isinstance(x, Narrow)
  )
  return {trees.name(path): leaf for path, leaf in leaves}


# What is rounded.


def test_int8_by_hand():
  kernel = jnp.array([[2.54, -1.0, 0.011], [0.0, 0.0, 0.0]])
  made = quantise({'params': {'unembed': {'kernel': kernel}}})
  got = made['params']['unembed']['kernel']
  # scale = 2.54 / 127 = 0.02; -1 / 0.02 = -50, 0.011 / 0.02 = 0.55
  np.testing.assert_array_equal(got.values, [[127, -50, 1], [0, 0, 0]])
  close(got.scale, [0.02, 0.0], atol=1e-6)
  close(got.wide(), [[2.54, -1.0, 0.02], [0, 0, 0]], atol=1e-6)


def test_rounding_is_to_the_nearest(base, small):
  before, after = kernels(base), kernels(small)
  wide = kernels(widened(small))
  found = {k for k, x in after.items() if isinstance(x, Narrow)}
  assert len(found) == 9  # q k v o, gate up down, two tables
  for name in found:
    size = np.abs(before[name])
    values = np.asarray(after[name].values, np.float32)
    scale = np.asarray(after[name].scale)[..., None]
    error = np.abs(np.asarray(wide[name]) - np.asarray(before[name]))
    most, bound = 127, scale / 2
    if after[name].values.dtype == FLOAT8:
      most, bound = 448, np.maximum(size / 16, scale / 1024)
    assert np.all(error <= bound * (1 + 1e-5)), name
    assert np.all(np.abs(values).max(-1) == most), name
  nbytes = lambda v: sum(x.nbytes for x in jax.tree.leaves(v))
  assert nbytes(small) < 0.35 * nbytes(base)  # scales of rows of 32 numbers
  rest = set(before) - found
  assert rest and all(after[name] is before[name] for name in rest)


@pytest.mark.parametrize('size', [0.0, 1e-45, 1e-38, 1e30])
def test_rows_of_any_size_stay_finite(size):
  kernel = jnp.full((2, 4), size, jnp.float32)
  for dtype in (jnp.int8, FLOAT8):
    made = quantise({'params': {'unembed': {'kernel': kernel}}}, dtype)
    made = made['params']['unembed']['kernel']
    assert np.isfinite(made.wide()).all()
    y = times(jnp.zeros((1, 4)), made, activations=dtype == jnp.int8)
    np.testing.assert_array_equal(y, 0)


def test_some_kernels(base):
  some = quantise(base, targets='v|down')
  found = {k for k, x in kernels(some).items() if isinstance(x, Narrow)}
  assert found == {'layers/attn/v/kernel', 'layers/mlp/down/kernel'}
  close(narrow(some), plain(widened(some)))


# What is multiplied.


def test_narrow_kernels_are_the_plain_ones_they_stand_for(base, small):
  want = plain(widened(small))
  close(narrow(small), want)
  assert 1e-3 < apart(want, plain(base)) < 0.2


def test_rounded_activations_are_near(int8):
  got, want = rounded(int8), plain(widened(int8))
  assert 1e-4 < apart(got, want) < 0.05


@pytest.mark.parametrize('rows', [3, 100])
def test_integer_products_by_numpy(rows):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((rows, 40)).astype(np.float32)
  x[1] = 0
  values = rng.integers(-127, 128, (50, 40))
  scale = rng.random(50).astype(np.float32)
  kernel = Narrow(values.astype(np.int8), scale)
  got = times(x, kernel, activations=True)
  size = np.abs(x).max(1) / np.float32(127)
  safe = np.where(size > 0, size, 1)[:, None]
  want = np.round(x / safe) @ values.T * size[:, None] * scale[None]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('tied', [True, False])
def test_logits(tied):
  of = dataclasses.replace(
    fakes.CONFIG, tied=tied, logit_divisor=1.7, logit_softcap=3.0
  )
  variables = fakes.variables(of)
  small = quantise(variables)
  shape = (2, 3, of.features)
  hidden = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  exact = quickly(decoder.functions(of).unembed)
  logits = quickly(quantised.unembed(of))
  want = exact(widened(small), hidden)
  close(logits(small, hidden), want)
  near = quickly(quantised.unembed(of, activations=True))(small, hidden)
  assert 1e-4 < apart(near, want) < 0.05
  plainly = logits(quantise(variables, targets='attn'), hidden)
  np.testing.assert_array_equal(plainly, exact(variables, hidden))


def test_bfloat16_rounds_no_more_than_before(base, int8):
  apply = decoder.functions(CONFIG, dtype=jnp.bfloat16).apply
  got = runs(quantised.quantised(apply))(int8)
  assert got.dtype == jnp.bfloat16
  want = plain(widened(int8))
  assert apart(got, want) < 2 * apart(runs(apply)(base), plain(base))


def test_plain_variables_make_the_plain_program(base):
  def text(apply):
    step = lambda v: apply(v, TOKENS, POSITIONS)
    return jax.jit(step).lower(base).as_text()

  assert text(NARROW) == text(ROUNDED) == text(APPLY)


def test_widened_kernels_are_not_kept_from_step_to_step():
  kernel = Narrow(jnp.ones((512, 256), jnp.int8), jnp.ones(512))

  def loop(kernel, x):
    step = lambda _, x: quantised.times(x, kernel)[:, :256]
    return jax.lax.fori_loop(0, 9, step, x)

  x = jnp.ones((100, 256))
  lowered = jax.jit(loop).lower(kernel, x).compile().as_text()
  start = lowered[lowered.index('ENTRY') :]
  assert 's8[512,256]' in start and 'f32[512,256]' not in start


# With everything else.


def test_unstacked_layers_are_quantised_alike(base, int8):
  unstacked = apart_layers(int8)
  close(narrow(unstacked), narrow(int8))
  fakes.same(unstacked, quantise(apart_layers(base)))
  fakes.same(quickly(trees.stack_layers)(unstacked), int8)


def adapter(config=CONFIG):
  rng = np.random.default_rng(1)
  init = functools.partial(lora.init, config, rank=3, alpha=2.0)
  shapes = jax.eval_shape(init, jax.random.key(0))
  draw = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)
  return jax.tree.map(draw, shapes)


capped = functools.partial(taps.edited, edit=edits.stored)
ORDERS = {
  'quantised first': lambda q: lora.adapted(capped(q(APPLY))),
  'quantised last': lambda q: q(lora.adapted(capped(APPLY))),
  'between': lambda q: lora.adapted(q(capped(APPLY))),
}


@pytest.fixture(scope='module')
def everything(int8):
  """Variables with an adapter and caps, and what comes of them."""
  variables = fakes.with_edits(int8 | {'lora': adapter()}, fakes.caps(CONFIG))
  wide = widened(variables)
  run = runs(lora.adapted(capped(APPLY)))
  want = run(wide)
  no_adapter = jax.tree.map(jnp.zeros_like, wide['lora'])
  for less in ({'lora': no_adapter}, {'edits': fakes.no_caps(CONFIG)}):
    assert apart(run(wide | less), want) > 0.05  # each of them matters
  return variables, want


@pytest.mark.parametrize('order', ORDERS)
def test_adapters_and_caps_in_any_order(everything, order):
  variables, want = everything
  close(runs(ORDERS[order](quantised.quantised))(variables), want)


def test_adapters_and_caps_with_rounded_activations(everything):
  variables, want = everything
  both = functools.partial(quantised.quantised, activations=True)
  got = runs(ORDERS['between'](both))(variables)
  assert 1e-4 < apart(got, want) < 0.1


def test_gradients_reach_an_adapter(shallow):
  small = quantise(shallow)
  adapted = lora.adapted(quantised.quantised(ONE_LAYER))
  made = apart_layers({'lora': adapter(SHALLOW)})['lora']
  weights, scales = lora.split(made)

  @quickly
  @jax.value_and_grad
  def value(weights):
    variables = {**small, 'lora': lora.joined(weights, scales)}
    return jnp.mean(jnp.sin(adapted(variables, TOKENS, POSITIONS)[0]))

  _, gradient = value(weights)
  rng = np.random.default_rng(2)
  draw = lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype)
  flat = lambda x: np.concatenate([np.ravel(y) for y in jax.tree.leaves(x)])
  for way in (jax.tree.map(draw, weights), gradient):
    size = 0.02 / np.linalg.norm(flat(way))
    less, more = (
      value(jax.tree.map(lambda x, y, by=by: x + by * y, weights, way))[0]
      for by in (-size, size)
    )
    slope = (float(more) - float(less)) / (2 * size)
    want = flat(gradient) @ flat(way)
    np.testing.assert_allclose(slope, want, rtol=0.02)


def test_experts_stay_as_they_are():
  experts = config.Experts(4, 2, normalised=True)
  of = dataclasses.replace(fakes.CONFIG, experts=experts)
  variables = fakes.variables(of)
  small = quantise(variables)
  mlp = small['params']['layers']['mlp']
  fakes.same(mlp, variables['params']['layers']['mlp'])
  apply = quantised.quantised(decoder.functions(of).apply)
  hidden, _ = jax.eval_shape(apply, small, TOKENS, POSITIONS)
  assert hidden.shape == (*TOKENS.shape, of.features)


# Caches.


def decoded(variables, read=reading, cuts=(0, 7, 8, 9, 10, 11), **of):
  """The hidden states of a text that is read in a part and four tokens."""
  memory, out = cache.empty(SHALLOW, *TOKENS.shape, **of), []
  for start, stop in zip(cuts, cuts[1:], strict=False):
    here = (slice(None), slice(start, stop))
    hidden, memory = read(variables, TOKENS[here], POSITIONS[here], memory)
    out.append(hidden)
  return np.concatenate(out, axis=1), memory


def kept(memory):
  """The keys and values `[B H S E]` of what was read, by numpy."""
  keys, values = memory.keys[0], memory.values[0]
  if keys.ndim == 5:
    keys = jnp.swapaxes(keys, 3, 4).reshape(values.shape)
  return [np.asarray(x, np.float32)[:, :, :11] for x in (keys, values)]


@pytest.fixture(scope='module')
def exact(shallow):
  return decoded(shallow, blocked=False)


@pytest.mark.parametrize(
  ('dtype', 'off', 'blocked'),
  [(jnp.bfloat16, 0.01, True), (FLOAT8, 0.1, True), (FLOAT8, 0.1, False)],
  ids=str,
)
def test_narrow_caches(shallow, exact, dtype, off, blocked):
  got, memory = decoded(shallow, dtype=dtype, blocked=blocked)
  want, wide = exact
  assert all(x.dtype == dtype for x in jax.tree.leaves(memory))
  assert off / 100 < apart(got, want) < off
  for near, far in zip(kept(memory), kept(wide), strict=True):
    np.testing.assert_array_equal(near, np.asarray(jnp.asarray(far, dtype)))


def test_narrow_weights_and_caches(shallow, exact):
  both = quickly(quantised.quantised(ONE_LAYER, activations=True))
  got, _ = decoded(quantise(shallow), both, (0, 11), dtype=FLOAT8)
  assert 1e-3 < apart(got, exact[0]) < 0.1


@pytest.mark.parametrize('blocked', [True, False])
def test_what_is_too_large_for_a_cache_is_its_largest_number(shallow, blocked):
  large = jax.tree.map(jnp.copy, shallow)
  for part in 'kv':
    large['params']['layers_0']['attn'][part]['kernel'] *= 1e4
  hidden, memory = decoded(large, dtype=FLOAT8, blocked=blocked)
  assert np.isfinite(hidden).all()
  for x in kept(memory):
    assert np.isfinite(x).all() and x.max() == -x.min() == 448


# Bad input.


@pytest.mark.parametrize(
  ('of', 'match'),
  [
    ({'dtype': jnp.int4}, 'choose int8 or float8_e4m3fn'),
    ({'dtype': jnp.bfloat16}, 'choose int8 or float8_e4m3fn'),
    ({'targets': 'qkv'}, "'qkv' finds no kernel"),
  ],
)
def test_bad_requests(base, of, match):
  with pytest.raises(ValueError, match=match):
    quantise(base, **of)


def test_twice(int8):
  with pytest.raises(ValueError, match='quantised already'):
    quantise(int8)
  wide = widened(int8)
  fakes.same(quantised.dequantise(wide), wide)


@pytest.mark.parametrize('targets', ['', 'attn', '^embed'])
def test_a_plain_program_refuses(base, targets):
  small = quantise(base, targets=targets)
  refusal = pytest.raises(ValueError, match='wants plain ones; run quantised')
  with refusal:
    jax.eval_shape(APPLY, small, TOKENS, POSITIONS)
  if not targets:
    with refusal:
      UNEMBED(small, jnp.ones((1, CONFIG.features)))


def test_integer_products_need_integers(base):
  with pytest.raises(ValueError, match='the kernels are float8_e4m3fn'):
    jax.eval_shape(ROUNDED, quantise(base, FLOAT8), TOKENS, POSITIONS)


def test_a_jitted_apply_is_refused():
  with pytest.raises(ValueError, match='is jitted'):
    quantised.quantised(jax.jit(APPLY))
