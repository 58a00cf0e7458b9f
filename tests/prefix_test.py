"""What a group's texts begin with is read once, and nothing else changes."""

import dataclasses
import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import groups, main, taps
from persona_jax.activations import edits
from persona_jax.learn import prefix
from persona_jax.models import cache, decoder, lora
from persona_jax.models.config import Kind, Rope

GROUP, ROOM, SIZE = 3, 20, 40
ALIKE = (17, 20, 25)  # tokens that the rows of each group begin with
LENGTH = (30, 25, 37, 20, 40, 22, 45, 26, 25)
WINDOWED = dataclasses.replace(
  fakes.CONFIG,
  kinds=(Kind(Rope(500.0), window=6), Kind(Rope(1e4))),
  layout=(0, 1),
)


def texts():
  """Nine texts in three groups; two are all that they begin with."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, fakes.CONFIG.vocab, (len(LENGTH), SIZE))
  for row, alike in enumerate(np.repeat(ALIKE, GROUP)):
    tokens[row, :alike] = tokens[row // GROUP * GROUP, :alike]
  slot, length = np.arange(SIZE)[None], np.array(LENGTH)[:, None]
  positions = np.where(slot < np.minimum(length, SIZE), slot, -1)
  return jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32)


def variables(config):
  adapter = lora.init(config, jax.random.key(1), rank=2, alpha=4.0)
  adapter = jax.tree.map(lambda x: x + 0.1, adapter)
  caps = fakes.caps() if config is fakes.CONFIG else None
  stacked = {**fakes.variables(config), 'lora': adapter}
  return stacked if caps is None else fakes.with_edits(stacked, caps)


def made(config, remat='none'):
  """`apply` with an adapter and caps, and the same that shares."""
  apply = lora.adapted(
    decoder.functions(config, remat=remat, attend='xla').apply
  )
  if config is fakes.CONFIG:
    apply = taps.edited(apply, edits.stored)
  memory = functools.partial(cache.empty_stacked, config, blocked=False)
  return apply, prefix.shared(apply, memory, group=GROUP, room=ROOM)


@pytest.mark.parametrize(
  ('config', 'remat'), [(fakes.CONFIG, 'full'), (WINDOWED, 'none')]
)
def test_sharing_changes_nothing(config, remat):
  tokens, positions = texts()
  inside = np.asarray(positions >= 0)[..., None]
  shape = (*tokens.shape, config.features)
  weights = np.random.default_rng(1).normal(size=shape).astype(np.float32)

  rest = variables(config)
  trained = {k: rest.pop(k) for k in ('params', 'lora')}

  def total(apply, trained):
    hidden, _ = apply({**rest, **trained}, tokens, positions)
    return jnp.sum(jnp.where(inside, hidden * weights, 0)), hidden

  found = [
    jax.jit(jax.value_and_grad(functools.partial(total, apply), has_aux=True))(
      trained
    )
    for apply in made(config, remat)
  ]
  ((_, want), gradients), ((_, got), shared) = found
  np.testing.assert_allclose(got * inside, want * inside, atol=2e-5)
  for (path, one), two in zip(
    jax.tree.leaves_with_path(gradients), jax.tree.leaves(shared), strict=True
  ):
    scale = np.abs(one).max() + 1e-3
    np.testing.assert_allclose(
      two / scale, one / scale, atol=2e-5, err_msg=str(path)
    )


def test_the_start_is_read_for_one_row_of_a_group():
  read = []
  apply, _ = made(WINDOWED)

  def told(variables, tokens, positions, cache=None):
    read.append(tokens.shape)
    return apply(variables, tokens, positions, cache)

  memory = functools.partial(cache.empty_stacked, WINDOWED, blocked=False)
  shared = prefix.shared(told, memory, group=GROUP, room=ROOM)
  shared(variables(WINDOWED), *texts())
  assert read == [(3, ROOM), (9, SIZE - ROOM)]


def test_a_row_that_does_not_fit_is_no_number():
  tokens, positions = texts()
  tokens = tokens.at[3, 2].set(0)  # so that its group begins with two alike
  hidden, _ = made(WINDOWED)[1](variables(WINDOWED), tokens, positions)
  bad = np.isnan(np.asarray(hidden)).all(axis=(1, 2))
  assert bad.tolist() == [False] * 4 + [True] + [False] * 4


def test_a_cache_is_not_taken():
  with pytest.raises(ValueError, match='without a cache'):
    made(WINDOWED)[1]({}, *texts(), cache=1)


@pytest.mark.parametrize('group', [1, 4])
def test_minibatches_keep_groups_and_use_every_row(group):
  parts = groups.minibatches(24, 3, 2, group)
  first, second = parts(0), parts(1)
  assert [len(x) for x in first] == [8] * 6
  for epoch in (first[:3], first[3:], second[:3]):
    assert sorted(np.concatenate(epoch)) == list(range(24))
  for part in first:
    grouped = part.reshape(-1, group)
    np.testing.assert_array_equal(grouped[:, :1] + np.arange(group), grouped)
  assert any((a != b).any() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
  ('fields', 'group'),
  [
    ({}, 4),
    ({'rl.share': 'false'}, 1),
    ({'attend': 'cudnn'}, 1),
    ({'rl.microbatches': '3'}, 4),
    ({'rl.microbatches': '2'}, 1),  # three groups
    ({'rl.minibatches': '6'}, 1),
    ({'rl.algorithm': 'dpo'}, 2),
    ({'rl.algorithm': 'kto'}, 1),
  ],
)
def test_who_shares(fields, group):
  config = main.load_config('study:laptop')
  for field, value in fields.items():
    main.override(config, field, value)
  found, room = groups.alike(config, fakes.FRAMES[0], 1)
  assert found == group
  assert room == 112 + (0 if 'rl.algorithm' in fields else 26 + 3)
  assert groups.alike(config, fakes.FRAMES[0], 7)[0] == 1
