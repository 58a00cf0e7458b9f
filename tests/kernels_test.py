"""Kernels for accelerators, interpreted, each against the weights in full."""

import dataclasses
import functools
import subprocess
import sys

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import cache as caches
from persona_jax import trees
from persona_jax.models import attention, decoder, kernels
from persona_jax.models.cache import empty
from persona_jax.models.config import Kind, Rope

KV_HEADS, GROUP = 2, 3
OF = {'scale': 0.4}
FEWER = {'cap': 0.7, 'window': 70}
XLA = functools.partial(kernels.cudnn, implementation='xla')
quickly = functools.partial(  # most of the time goes into compiling
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)


def normal(seed, *shape):
  random = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(random, jnp.float32)


def traced(of):
  """The window as the model gives it: an array."""
  return {k: jnp.int32(v) if k == 'window' else v for k, v in of.items()}


def in_full(
  queries, keys, values, positions, rows=None, cached=False, cap=None, **of
):
  cache = caches.Cache((keys,), (values,)) if cached else None
  seen = attention.mask(positions, cache, of.get('window'))
  keys, values = caches.pick((keys, values), rows)
  weights = attention.weights(queries, keys, seen, cap=cap, **OF)
  return attention.mix(weights, values)


def close(got, want, atol=1e-5):
  for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol)


def one_token(group=GROUP):
  """A query a row, and what six rows of a cache hold."""
  held = (6, KV_HEADS, 192, 8)
  asked = normal(0, 6, 1, KV_HEADS * group, 8)
  return asked, normal(1, *held), normal(2, *held)


def step(*arrays, block=64, **of):
  fused = functools.partial(kernels.step, block=block, **OF, **traced(of))
  return quickly(fused)(*arrays)


def in_cache(*arrays, **of):
  return quickly(functools.partial(in_full, cached=True, **of))(*arrays)


ENDS = jnp.array([[0], [63], [64], [127], [191], [90]])


@pytest.mark.parametrize(
  ('block', 'group', 'of'),  # of 192 slots
  [(64, 3, {}), (64, 3, FEWER), (128, 1, FEWER), (512, 4, {})],
)
def test_a_step_is_attention_in_full(block, group, of):
  arrays = *one_token(group), ENDS
  close(step(*arrays, block=block, **of), in_cache(*arrays, **of))


@pytest.mark.parametrize('rows', [[[0, 5, 3]], [[2, 3], [1, 0]]], ids=str)
def test_a_step_on_some_rows_of_a_cache(rows):
  rows = jnp.array(rows)  # 3: beyond the last of its group
  asked, *held = one_token()
  asked, positions = asked[: rows.size], ENDS[: rows.size]
  arrays = asked, *held, positions, rows
  close(step(*arrays), in_cache(*arrays))


def test_slots_that_no_token_stands_at_are_not_read():
  asked, *held = one_token()
  keys, values = (x.at[:, :, 100:].set(jnp.nan) for x in held)
  positions = jnp.array([[0], [63], [64], [99], [-1], [100]])
  heard = step(asked, keys, values, positions)
  assert np.isfinite(heard[:5]).all() and np.isnan(heard[5]).all()
  np.testing.assert_array_equal(heard[4], 0)


def test_blocks_before_the_window_are_not_read():
  asked, *held = one_token()
  keys, values = (x.at[:, :, :128].set(jnp.nan) for x in held)
  positions = jnp.array([[180], [181], [180], [180], [180], [179]])
  heard = step(asked, keys, values, positions, window=53)
  assert np.isnan(heard[5]).all() and np.isfinite(heard[:5]).all()


@pytest.mark.parametrize(
  ('length', 'window', 'blocks'),
  [
    (0, 192, (0, 0)),
    (1, 192, (0, 0)),
    (64, 192, (0, 0)),
    (65, 192, (0, 1)),
    (192, 192, (0, 2)),
    (128, 64, (1, 1)),
    (129, 64, (1, 2)),
    (129, 1, (2, 2)),
  ],
)
def test_a_row_fetches_the_blocks_it_sees(length, window, blocks):
  got = kernels._needed(jnp.int32(length), jnp.int32(window), 64)
  assert tuple(map(int, got)) == blocks


def test_a_step_in_bfloat16_sums_in_float32():
  arrays = one_token()
  got = step(*(x.astype(jnp.bfloat16) for x in arrays), ENDS)
  assert got.dtype == jnp.bfloat16
  close(got.astype(jnp.float32), in_cache(*arrays, ENDS), atol=0.03)


def sequence(length, size=8):
  """Four rows: padding amid the tokens, behind them, alone; three texts."""
  heads = KV_HEADS * GROUP
  held = (4, KV_HEADS, length, size)
  arrays = normal(3, 4, length, heads, size), normal(4, *held), normal(5, *held)
  place = np.arange(length)
  real = [place % 7 != 2, place < length // 2 + 1, place < 0]
  real = np.stack([real[0] & (place > 1), *real[1:]])
  third = length // 3
  texts = np.where(place < 3 * third, place % third, -1)
  return arrays, jnp.concatenate([fakes.ragged(real), texts[None]])


def heard(attend, of, arrays, positions):
  """What tokens hear, and a gradient; what padding hears is nobody's."""

  def loss(arrays):
    heard = attend(*arrays, positions, **of).astype(jnp.float32)
    kept = jnp.where((positions >= 0)[..., None], heard, 0)
    return jnp.sum(jnp.sin(kept)), (kept, heard)

  grad, (kept, heard) = quickly(jax.grad(loss, has_aux=True))(arrays)
  assert np.isfinite(heard).all()
  return kept, grad


def assert_in_full(kernel, length, of):
  arrays, positions = sequence(length)
  got = heard(kernel, OF | traced(of), arrays, positions)
  want = heard(in_full, of, arrays, positions)
  close(got, want)


@pytest.mark.parametrize('of', [{}, FEWER], ids=['all', 'fewer'])
def test_splash_is_attention_in_full(of):
  assert_in_full(kernels.splash, 300, of)  # three blocks


@pytest.mark.parametrize(('length', 'of'), [(32, {}), (33, {'window': 3})])
def test_what_cudnn_is_given_is_attention_in_full(length, of):
  assert_in_full(XLA, length, of)


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs a GPU')
@pytest.mark.parametrize('of', [{}, {'window': 30}], ids=str)
def test_cudnn_is_attention_in_full(of):
  arrays, positions = sequence(150, 64)
  narrow = tuple(x.astype(jnp.bfloat16) for x in arrays)
  got = heard(kernels.cudnn, OF | traced(of), narrow, positions)
  want = heard(in_full, of, arrays, positions)
  got = jax.tree.map(lambda x: x.astype(jnp.float32), got)
  close(got, want, atol=0.05)


def by(attend):
  """A model whose second layer sees three tokens."""
  kinds = Kind(Rope(500.0)), Kind(Rope(500.0), window=3)
  config = dataclasses.replace(
    fakes.CONFIG, kinds=kinds, layout=(0, 1), attn_softcap=0.7
  )
  return decoder.functions(config, attend=attend, remat='full').apply


def test_a_model_learns_by_pallas():
  tokens, _ = fakes.text(batch=2, length=9)
  positions = fakes.ragged(np.arange(9) >= [[0], [3]])

  def learn(attend):
    def loss(variables):
      hidden, _ = by(attend)(variables, tokens, positions)
      return jnp.mean(jnp.sin(hidden), where=(positions >= 0)[..., None])

    return quickly(jax.value_and_grad(loss))(fakes.variables(fakes.CONFIG))

  close(learn('pallas'), learn('xla'))


def test_a_model_speaks_by_pallas():
  variables = trees.unstack_layers(fakes.variables(fakes.CONFIG))
  memory = empty(fakes.CONFIG, 3, 70, blocked=False)
  memory = jax.tree.map(lambda x: normal(6, *x.shape), memory)
  tokens, positions = jnp.ones((3, 1), jnp.int32), jnp.array([[66], [7], [0]])
  speak = lambda attend: quickly(by(attend))(
    variables, tokens, positions, memory
  )
  close(speak('pallas'), speak('xla'))


EXPORTED = [  # rows, slots, key heads, queries of one, size
  (2, 64, 2, 3, 64),
  (3, 192, 1, 1, 128),
  (2, 1088, 2, 4, 64),
  (2, 1024, 2, 2, 256),
]


def lowers(fused, *shapes):
  """Whether a function of arrays becomes a program for a TPU."""
  made = jax.export.export(jax.jit(fused), platforms=['tpu'])(*shapes)
  return 'tpu_custom_call' in made.mlir_module()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('shape', EXPORTED, ids=str)
def test_a_step_lowers_for_a_tpu(shape, dtype):
  rows, slots, kv_heads, group, size = shape
  held = jax.ShapeDtypeStruct((rows, kv_heads, slots, size), dtype)
  asked = jax.ShapeDtypeStruct((rows, 1, kv_heads * group, size), dtype)
  place = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
  window = jax.ShapeDtypeStruct((), jnp.int32)

  def fused(asked, keys, values, place, window):
    return kernels.step(
      asked, keys, values, place, window=window, interpret=False, cap=5.0, **OF
    )

  assert lowers(fused, asked, held, held, place, window)


@pytest.mark.parametrize('slides', [False, True])
def test_splash_lowers_for_a_tpu(slides):
  asked = jax.ShapeDtypeStruct((2, 600, 4, 64), jnp.bfloat16)
  held = jax.ShapeDtypeStruct((2, 2, 600, 64), jnp.bfloat16)
  place = jax.ShapeDtypeStruct((2, 600), jnp.int32)
  window = jax.ShapeDtypeStruct((), jnp.int32)

  def loss(arrays, place, window):
    window = window if slides else None
    heard = kernels.splash(*arrays, place, window=window, interpret=False, **OF)
    return jnp.sum(heard.astype(jnp.float32))

  assert lowers(jax.grad(loss), (asked, held, held), place, window)


def test_keys_in_blocks_are_refused():
  asked, keys, values = one_token(8)
  keys = jnp.swapaxes(caches.in_blocks(keys), 3, 4)
  with pytest.raises(ValueError, match='blocked.*make the cache with'):
    kernels.step(asked, keys, values, jnp.zeros((6, 1), jnp.int32), **OF)


def test_what_cudnn_cannot_do_is_refused():
  arrays, positions = sequence(5, 8)
  with pytest.raises(ValueError, match='caps them at 0.7; choose attend='):
    kernels.cudnn(*arrays, positions, cap=0.7, **OF)
  with pytest.raises(ValueError, match="not in float32; choose dtype='bf"):
    kernels.cudnn(*arrays, positions, **OF)


def test_pallas_is_imported_where_it_is_asked_for():
  source = (
    'import sys; from persona_jax.models import attention, decoder;'
    '[attention.kernels(x) for x in (None, "xla", "blocks")];'
    'here = lambda: "persona_jax.models.kernels" in sys.modules;'
    'assert not here() and "jax.experimental.pallas" not in sys.modules;'
    'assert attention.kernels("pallas").step and here()'
  )
  subprocess.run([sys.executable, '-c', source], check=True)
