"""One program on eight devices says what it says on one.

In a process of its own:
XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest -m devices
"""

import dataclasses
import functools
import math
import re

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from persona_jax import dialogue as dialogues
from persona_jax import learn, models, rewards, rollout, trees
from persona_jax.learn import losses, sharding, step
from persona_jax.models import cache, decoder, lora
from persona_jax.models.config import Kind, Rope

pytestmark = pytest.mark.devices

CONFIG = models.DecoderConfig(
  vocab=304,
  features=16,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  hidden=48,
  kinds=(Kind(Rope(1e4)),),
  norm_eps=1e-6,
  tied=False,
)
APPLY, UNEMBED = decoder.functions(CONFIG)
OPTIMIZER = optax.chain(
  optax.clip_by_global_norm(1.0), optax.sgd(1.0, momentum=0.9)
)
MESHES = [
  {'fsdp': 8},
  {'data': 2, 'fsdp': 4},
  {'data': 2, 'fsdp': 2, 'tensor': 2},
  {'fsdp': 2, 'sequence': 2, 'tensor': 2},
  {'fsdp': 2, 'expert': 4},
]
B, S, M = 16, 12, 6

on_meshes = pytest.mark.parametrize(
  'shape', MESHES, ids=lambda shape: '-'.join(map(str, shape.values()))
)


@pytest.fixture(autouse=True)
def eight_devices():
  if jax.device_count() != 8:
    pytest.fail(f'{jax.device_count()} devices, not 8; {__doc__}')


@pytest.fixture(scope='module')
def variables():
  """Numpy arrays: nothing lies on a device before it is placed."""
  return jax.tree.map(np.asarray, fakes.variables(CONFIG))


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  size = rng.integers(7, S + 1, (B, 1))
  mask = np.arange(M) < rng.integers(1, M + 1, (B, 1))
  normal = lambda: jnp.asarray(rng.normal(size=(B, M)), jnp.float32)
  return learn.Batch(
    tokens=jnp.asarray(rng.integers(0, CONFIG.vocab, (B, S))),
    positions=jnp.asarray(np.where(np.arange(S) < size, np.arange(S), -1)),
    before=jnp.asarray(rng.integers(0, 7, (B, M))),
    actions=jnp.asarray(rng.integers(0, CONFIG.vocab, (B, M))),
    mask=jnp.asarray(mask),
    advantages=normal(),
    old_logprobs=normal() - 6,
    reference_logprobs=normal() - 6,
  )


def on_one(fn, *args):
  """`fn` where all lies on the first device."""
  return jax.jit(fn)(*jax.device_put(args, jax.devices()[0]))


def placed(tree, mesh):
  """Numpy arrays put where the rules say, each device reading its slices."""

  def put(leaf, place):
    read = lambda index: leaf[index]
    return jax.make_array_from_callback(leaf.shape, place, read)

  return jax.tree.map(put, tree, trees.shardings(tree, mesh, sharding.RULES))


def assert_close(got, want, tolerance):
  got, want = trees.flatten(got), trees.flatten(want)
  assert got.keys() == want.keys()
  for name, leaf in got.items():
    np.testing.assert_allclose(
      leaf, want[name], atol=tolerance, rtol=tolerance, err_msg=name
    )


# Places.


@on_meshes
def test_weights_are_spread_and_say_the_same(variables, batch, shape):
  mesh = sharding.make_mesh(shape)
  spread = placed(variables, mesh)
  for name, leaf in trees.flatten(spread).items():
    parts = {str(shard.index) for shard in leaf.addressable_shards}
    copies = [shape.get(x, 1) for x in ('data', 'sequence', 'expert')]
    ways = 8 // math.prod(copies)
    assert len(parts) == (1 if name.endswith('scale') else ways), name

  def hidden(variables):
    return UNEMBED(
      variables, APPLY(variables, batch.tokens, batch.positions)[0]
    )

  np.testing.assert_allclose(
    jax.jit(hidden)(spread), on_one(hidden, variables), atol=1e-4
  )


@on_meshes
def test_moments_lie_like_their_parameters(variables, shape):
  mesh = sharding.make_mesh(shape)
  optimizer = optax.adamw(1e-3)
  state = sharding.init_sharded(
    lambda params: learn.init_state(params, optimizer),
    mesh,
    variables['params'],
  )
  leaves = trees.flatten(state)
  params = [name for name in leaves if name.startswith('params/')]
  assert len(params) > 10
  for name in params:
    for moment in ('mu', 'nu'):
      other = leaves[f'opt_state/0/{moment}/{name.removeprefix("params/")}']
      assert other.sharding == leaves[name].sharding, name
  assert leaves['step'].sharding.is_fully_replicated


@pytest.mark.parametrize(
  'shape', [{'fsdp': 4}, {'model': 8}, {'fsdp': 16}, {'data': 8, 'tensor': 2}]
)
def test_a_mesh_that_does_not_fit_the_devices(shape):
  with pytest.raises(ValueError, match='does not fit 8 devices; give sizes'):
    sharding.make_mesh(shape)


def test_a_mesh_that_does_not_divide_the_weights():
  config = dataclasses.replace(CONFIG, features=36)
  init = functools.partial(decoder.init, config)
  mesh = sharding.make_mesh({'fsdp': 8})
  with pytest.raises(ValueError, match=r'36.* does not divide .*change its'):
    sharding.init_sharded(init, mesh, jax.random.key(0))


# The step.


def start(params):
  return learn.init_state(jax.tree.map(jnp.copy, params), OPTIMIZER)


def update(state, batch, microbatches=1, apply=APPLY):
  loss_fn = step.policy_loss(
    apply, UNEMBED, learn.clipped_loss, {}, temperature=1.0, held=8192
  )
  return learn.train_step(
    state,
    batch,
    losses.per_sequence(batch),
    loss_fn=loss_fn,
    optimizer=OPTIMIZER,
    microbatches=microbatches,
  )


@pytest.fixture(scope='module')
def alone(variables, batch):
  """State and metrics after a step on one device."""
  return on_one(lambda p, b: update(start(p), b), variables['params'], batch)


def on_mesh(shape, variables, batch, microbatches=1):
  """The compiled step, its result, and where that should lie."""
  mesh = sharding.make_mesh(shape)
  state = sharding.init_sharded(start, mesh, variables['params'])
  places = sharding.state_shardings(state, mesh)
  rows = jax.device_put(batch, sharding.batch_sharding(mesh))
  leaves, structure = jax.tree.flatten(rows)  # `lower` builds odd batches

  def moved(state, *leaves):
    batch = structure.unflatten(leaves)
    return update(state, batch, microbatches, sharding.by_rows(APPLY, mesh))

  lowered = jax.jit(moved, out_shardings=(places, None)).lower(state, *leaves)
  program = lowered.compile()
  return program, program(state, *leaves), places


@on_meshes
def test_a_step_on_a_mesh_is_the_step_on_one_device(
  variables, batch, alone, shape
):
  _, (after, metrics), places = on_mesh(shape, variables, batch)
  want, whole = alone
  assert whole['norm/grads'] > 0.1
  assert_close(metrics, whole, 1e-4)
  assert_close(after, want, 1e-5)
  for got, place in zip(
    jax.tree.leaves(after), jax.tree.leaves(places), strict=True
  ):
    assert got.sharding.is_equivalent_to(place, got.ndim)


def test_each_device_works_on_its_own_rows(variables, batch, alone):
  program, (after, metrics), _ = on_mesh(MESHES[0], variables, batch, 2)
  want, whole = alone
  assert_close(metrics, whole, 1e-4)
  assert_close(after, want, 1e-5)
  # a microbatch has 8 rows of 12 slots and 6 tokens, a device one of them
  shapes = re.findall(r'f32\[([\d,]+)\]', program.as_text())
  sizes = [tuple(map(int, shape.split(','))) for shape in shapes]
  rows = lambda width: {math.prod(s[:-1]) for s in sizes if s[-1] == width}
  block = CONFIG.vocab // 2  # as many as may be held at a time
  assert 6 in rows(block) and not rows(CONFIG.vocab)
  assert 12 in rows(CONFIG.hidden) and 96 not in rows(CONFIG.hidden)


def test_rows_that_do_not_divide_over_the_mesh(variables, batch):
  with pytest.raises(ValueError, match='4 rows do not divide over the 8 ways'):
    on_mesh(MESHES[0], variables, batch, microbatches=4)


# Adapters.


@pytest.fixture(scope='module')
def adapter():
  """(A and B, scales), every number of which matters."""
  rng = np.random.default_rng(1)
  init = functools.partial(lora.init, CONFIG, rank=3, alpha=2.0)
  shapes = jax.eval_shape(init, jax.random.key(0))
  draw = lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32)
  return lora.split(jax.tree.map(draw, shapes))


def update_adapter(weights, base, scales, batch, rows=lambda apply: apply):
  loss_fn = step.policy_loss(
    rows(lora.adapted(APPLY)),
    UNEMBED,
    learn.clipped_loss,
    {**base, 'lora': scales},
    temperature=1.0,
    held=8192,
    trained='lora',
  )
  return learn.train_step(
    start(weights),
    batch,
    losses.per_sequence(batch),
    loss_fn=loss_fn,
    optimizer=OPTIMIZER,
  )


@on_meshes
def test_adapters_are_spread_and_step_alike(variables, adapter, batch, shape):
  want, whole = on_one(update_adapter, adapter[0], variables, adapter[1], batch)
  assert whole['norm/grads'] > 0.1
  mesh = sharding.make_mesh(shape)
  base, weights = placed(variables, mesh), placed(adapter[0], mesh)
  rows = jax.device_put(batch, sharding.batch_sharding(mesh))
  by_rows = functools.partial(sharding.by_rows, mesh=mesh)
  places = sharding.state_shardings(want, mesh)
  moved = functools.partial(update_adapter, rows=by_rows)
  got, metrics = jax.jit(moved, out_shardings=(places, None))(
    weights, base, adapter[1], rows
  )
  assert_close(metrics, whole, 1e-4)
  assert_close(got, want, 1e-5)
  for name, leaf in trees.flatten(got.params).items():
    kernel = base['params']
    for part in name.split('/')[:-1]:
      kernel = kernel[part]
    _, out, size = kernel['kernel'].sharding.spec
    spec = (None, None, size) if name.endswith('/a') else (None, out, None)
    like = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    assert leaf.sharding.is_equivalent_to(like, 3), name


@on_meshes
def test_what_is_merged_lies_where_it_lay(variables, adapter, shape):
  full = {**variables, 'lora': lora.joined(*adapter)}
  want = jax.device_get(lora.merge(full))
  spread = placed(full, sharding.make_mesh(shape))
  merged = lora.merge(spread)
  assert_close(merged, want, 1e-5)
  for got, before in zip(
    jax.tree.leaves(merged),
    jax.tree.leaves({'params': spread['params']}),
    strict=True,
  ):
    assert got.sharding == before.sharding


# Rewards.


@pytest.mark.parametrize('name', ['likelihood', 'pair_verdict'])
def test_rewards_of_spread_rows_are_those_of_one_device(variables, name):
  def reward(variables, dialogue):
    return judged(name, variables)(dialogue)

  dialogue = fakes.made_up(batch=B, lines=5)
  want = on_one(reward, variables, dialogue)
  assert np.abs(want).max() > 0.1
  mesh = sharding.make_mesh(MESHES[2])
  rows = sharding.batch_sharding(mesh)
  spread = dialogues.rows(dialogue, lambda x: jax.device_put(x, rows))
  got = jax.jit(reward)(placed(variables, mesh), spread)
  np.testing.assert_allclose(got, want, atol=1e-4)


def judged(name, variables):
  """A judge of either kind, `variables` inside."""
  functions = dict(apply=APPLY, unembed=UNEMBED)
  if name == 'likelihood':
    judge = rewards.Likelihood(
      variables, fakes.FRAMES[1], jnp.arange(5), jnp.arange(3), **functions
    )
    return rewards.likelihood(judge)
  ask = rewards.Question(jnp.array([9, 8]), jnp.array([5]), jnp.array([6]))
  judge = rewards.Verdict(
    variables,
    head=jnp.array([1, 2]),
    middle=jnp.array([3]),
    questions=(ask,),
    strip=(0, 0),
    memory=functools.partial(cache.empty_stacked, CONFIG),
    **functions,
  )
  return rewards.pair_verdict(judge)


# Rollouts.


@pytest.mark.parametrize('together', [True, False])
@on_meshes
def test_dialogues_are_those_of_one_device(variables, shape, together):
  mesh = sharding.make_mesh(shape)
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  rows, lanes = 32, 16  # two dialogues a lane
  scenario = fakes.scenario(rows)
  apart = jax.tree.map(np.asarray, trees.unstack_layers(variables))

  def cast(apply, variables):
    speaker = rollout.Speaker(
      variables=variables,
      sampling=rollout.Sampling.of(rows, fakes.stops(range(80))),
      apply=apply,
      unembed=UNEMBED,
      memory=functools.partial(cache.empty, CONFIG),
    )
    if together:
      return (dataclasses.replace(speaker, who=(0, 1)),)
    return speaker, speaker

  def talk(speakers, scenario):
    return rollout.converse(
      jax.random.key(0),
      speakers,
      fakes.FRAMES,
      scenario,
      lines=4,
      tokens=6,
      lanes=lanes,
      groups=8,
    )

  want = on_one(talk, cast(APPLY, apart), scenario)
  rules = sharding.gathered(sharding.RULES)
  stacked = trees.shardings(variables, mesh, rules)
  spread = jax.jit(trees.unstack_layers, in_shardings=(stacked,))(
    jax.device_put(variables, stacked)
  )
  placed = jax.device_put(scenario, sharding.batch_sharding(mesh))
  apply = sharding.by_rows(APPLY, mesh)
  program = jax.jit(lambda variables: talk(cast(apply, variables), placed))
  program = program.lower(spread).compile()
  said = program(spread)
  np.testing.assert_array_equal(said.tokens, want.tokens)
  np.testing.assert_array_equal(said.length, want.length)
  np.testing.assert_allclose(said.logprobs, want.logprobs, atol=1e-5)
  whole = f'f32[{lanes},2,'  # a cache of all rows on one device
  assert ways == 1 or whole not in program.as_text()
