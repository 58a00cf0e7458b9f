"""Attention by name, each against the weights in full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import cache as caches
from persona_jax.models import attention
from persona_jax.models.cache import empty
from persona_jax.models.config import DecoderConfig, Kind, Rope

ROWS, SLOTS, KV_HEADS, SIZE = 6, 192, 2, 8
CONFIG = DecoderConfig(
  vocab=11,
  features=16,
  layers=1,
  heads=3 * KV_HEADS,
  kv_heads=KV_HEADS,
  head_dim=SIZE,
  hidden=8,
  kinds=(Kind(Rope(500.0)),),
  norm_eps=1e-6,
)
OF = {'scale': 0.4}


def memory(blocked, dtype=jnp.float32):
  """Random keys and values of one layer; no slot is blank."""
  cache = empty(CONFIG, ROWS, SLOTS, blocked=blocked, dtype=dtype)
  random = np.random.default_rng(0).standard_normal
  return [
    jnp.asarray(random(x.shape), jnp.float32).astype(dtype)
    for x in (cache.keys[0], cache.values[0])
  ]


def queries(rows, length):
  shape = (rows, length, CONFIG.heads, SIZE)
  random = np.random.default_rng(1).standard_normal(shape)
  return jnp.asarray(random, jnp.float32)


def in_full(queries, keys, values, positions, rows=None, window=None, cap=None):
  cache = caches.Cache((keys,), (values,))
  seen = attention.mask(positions, cache, window)
  keys, values = caches.pick((keys, values), rows)
  weights = attention.weights(queries, keys, seen, cap=cap, **OF)
  return attention.mix(weights, values.astype(queries.dtype))


@pytest.mark.parametrize('blocked', [True, False])
@pytest.mark.parametrize(
  'rows', [None, [[0, 5, 3, 1]], [[2, 0], [1, 1]]], ids=str
)
@pytest.mark.parametrize(
  'of', [{}, {'cap': 0.7}, {'window': 70}], ids=lambda x: str([*x])
)
def test_blocks_are_attention_in_full(blocked, rows, of):
  if rows is not None:
    rows = jnp.array(rows, jnp.int32)
  count = ROWS if rows is None else rows.size
  first = jnp.array([0, 60, 100, 170, 3, 64])[:count, None]
  positions = first + jnp.arange(7, dtype=jnp.int32)[None]
  held, asked = memory(blocked), queries(count, 7)
  traced = {k: jnp.int32(v) if k == 'window' else v for k, v in of.items()}
  fused = jax.jit(lambda *x: attention.blocks(*x, **OF, **traced))
  got = fused(asked, *held, positions, rows)
  want = in_full(asked, *held, positions, rows, **of)
  np.testing.assert_allclose(got, want, atol=2e-6)


def test_blocks_beyond_the_last_token_are_not_read():
  held = [x.at[:, :, 1:].set(jnp.nan) for x in caches.in_blocks(memory(True))]
  keys, values = held[0], held[1].reshape(ROWS, KV_HEADS, SLOTS, SIZE)
  positions = jnp.broadcast_to(jnp.arange(60, 64, dtype=jnp.int32), (ROWS, 4))
  heard = attention.blocks(queries(ROWS, 4), keys, values, positions, **OF)
  assert np.isfinite(heard).all()
  more = attention.blocks(queries(ROWS, 4), keys, values, positions + 1, **OF)
  assert np.isnan(more).any()


@pytest.mark.parametrize('positions', [[[-1, -1]], [[-1, 4]]], ids=str)
def test_blocks_of_padding_stay_finite(positions):
  positions = jnp.broadcast_to(jnp.array(positions, jnp.int32), (ROWS, 2))
  heard = attention.blocks(queries(ROWS, 2), *memory(True), positions, **OF)
  assert np.isfinite(heard).all()


def test_gradients_of_blocks_are_those_of_attention_in_full():
  positions = jnp.array([[0, 1], [62, 63], [64, 65], [90, 91], [-1, 9], [5, 6]])
  held = memory(True)

  def gradient(attend):
    value = lambda *x: jnp.sum(jnp.sin(attend(*x, positions)))
    return jax.jit(jax.grad(value, (0, 1, 2)))(queries(ROWS, 2), *held)

  # A row of padding alone hears the mean in full, and nothing from blocks.
  want = gradient(lambda *x: in_full(*x).at[4, 0].set(0))
  got = gradient(lambda *x: attention.blocks(*x, **OF).at[4, 0].set(0))
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, atol=2e-6)


def test_bfloat16_blocks_sum_in_float32():
  positions = jnp.broadcast_to(jnp.arange(150, 154, dtype=jnp.int32), (ROWS, 4))
  asked = queries(ROWS, 4)
  want = in_full(asked, *memory(True), positions)
  got = attention.blocks(
    asked.astype(jnp.bfloat16), *memory(True, jnp.bfloat16), positions, **OF
  )
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.02)


def test_attention_of_an_unknown_name_is_refused():
  with pytest.raises(ValueError, match="by 'flash'; choose one of .*'xla'"):
    attention.kernels('flash')


def keyed(rows, seed=0):
  """Two caches whose every number tells its cache, row and slot."""
  random = np.random.default_rng(seed).standard_normal
  made = []
  for _ in range(2):
    one = empty(CONFIG, rows, SLOTS, blocked=True)
    fill = lambda x: jnp.asarray(random(x.shape), jnp.float32)
    made.append(jax.tree.map(fill, one))
  return made


@pytest.mark.parametrize('used', [1, 64, 65, SLOTS])
def test_rows_change_places(used):
  one, two = keyed(ROWS)
  beyond = ROWS
  front = caches.Move(  # rows 4 and 5 from the other cache, 1 from row 0
    rows=jnp.array([[4, 5, 1, beyond]]),
    cache=jnp.array([[1, 1, 0, 1]]),
    source=jnp.array([[4, 5, 0, 2]]),
  )
  behind = caches.Move(
    rows=jnp.array([[4, beyond, beyond, beyond]]),
    cache=jnp.zeros((1, 4), jnp.int32),
    source=jnp.array([[4, 5, 1, 2]]),
  )
  got = jax.jit(caches.move)([one, two], [front, behind], jnp.int32(used))
  moved = -(-used // 64) * 64
  old = [np.asarray(x.values[0]) for x in (one, two)]
  want = [x.copy() for x in old]
  want[0][[4, 5], :, :moved] = old[1][[4, 5], :, :moved]
  want[0][1, :, :moved] = old[0][0, :, :moved]
  want[1][4, :, :moved] = old[0][4, :, :moved]
  for cache, values in zip(got, want, strict=True):
    np.testing.assert_array_equal(cache.values[0], values)
  keys = np.asarray(two.keys[0])[5, :, : moved // 64]
  np.testing.assert_array_equal(got[0].keys[0][5, :, : moved // 64], keys)


def test_rows_stay_where_no_move_is_wanted():
  one, two = keyed(ROWS)
  none = jnp.full((2, 3), ROWS // 2)  # beyond the last of each of two groups
  still = caches.Move(none, jnp.zeros_like(none), jnp.zeros_like(none))
  got = caches.move([one, two], [still, still], jnp.int32(SLOTS))
  jax.tree.map(np.testing.assert_array_equal, got, [one, two])


def test_rows_of_a_group_are_counted_in_it():
  keys, values = memory(True)
  new = queries(4, 3)[:, :, :KV_HEADS]
  positions = jnp.array([[0, 1, 2], [5, -1, 6], [63, 64, 65], [9, 8, 7]])
  rows = jnp.array([[0, 2], [1, 3]])  # 3: beyond the last of its group
  got = caches.write(keys, values, new, new, positions, rows)
  want = np.asarray(values).copy()
  want[0, :, 0:3] = np.swapaxes(new[0], 0, 1)
  want[2, :, [5, 6]] = np.asarray(new)[1, [0, 2]]
  want[4, :, 63:66] = np.swapaxes(new[2], 0, 1)
  np.testing.assert_array_equal(got[1], want)
  picked = caches.pick(got[1], rows)
  np.testing.assert_array_equal(picked[:3], want[[0, 2, 4]])
  keys = np.asarray(got[0])
  np.testing.assert_array_equal(keys[4, :, 1, :, 0], new[2, 1])
  np.testing.assert_array_equal(keys[3], memory(True)[0][3])
