"""Adapters: exact merges, edits beside them, what is trained."""

import functools

import fakes
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from persona_jax import learn, models, taps, trees
from persona_jax.activations import edits
from persona_jax.learn import losses, step
from persona_jax.models import cache, decoder, lora, names

CONFIG = fakes.CONFIG
TOKENS, POSITIONS = fakes.text(length=11)
APPLY, UNEMBED = decoder.functions(CONFIG)
ADAPTED = lora.adapted(APPLY)
quickly = functools.partial(  # most of the time goes into compiling
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)
run = quickly(lambda v: ADAPTED(v, TOKENS, POSITIONS)[0])
plain = quickly(lambda v: APPLY(v, TOKENS, POSITIONS)[0])


def adapter(seed=1, **options):
  """An adapter whose every number matters, each layer's scale its own."""
  rng = np.random.default_rng(seed)
  options = {'rank': 3, 'alpha': 2.0} | options
  init = functools.partial(lora.init, CONFIG, **options)
  shapes = jax.eval_shape(init, jax.random.key(0))
  draw = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)
  return jax.tree.map(draw, shapes)


@pytest.fixture(scope='module')
def base():
  return fakes.variables(CONFIG)


@pytest.fixture(scope='module')
def full(base):
  return {**base, 'lora': adapter()}


def close(got, want, atol=1e-5):
  np.testing.assert_allclose(got, want, atol=atol)


def far(got, want, by=0.1):
  assert np.abs(np.asarray(got) - np.asarray(want)).max() > by


# What is added.


def test_delta_by_hand():
  a, b = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [-1.0], [0.5]])
  # A x = 1 * 4 + 2 * -1 = 2; B (A x) = 6, -2, 1; times 0.5
  got = lora.delta(jnp.array([4.0, -1.0]), a, b, jnp.float32(0.5))
  np.testing.assert_allclose(got, [3.0, -1.0, 0.5])


def test_each_kernel_gets_its_own_layer_and_scale(base, full):
  # A slow reference: numpy adds to every kernel.
  params = jax.tree.map(np.array, base['params'])
  for name in lora.projections(CONFIG):
    kernel = names.leaf(params['layers'], name)['kernel']
    entry = names.leaf(full['lora']['layers'], name)
    for i in range(CONFIG.layers):
      kernel[i] += entry['scale'][i] * np.asarray(entry['b'][i] @ entry['a'][i])
  close(run(full), plain({'params': params}))
  far(run(full), plain(base))


@pytest.mark.parametrize('name', lora.projections(CONFIG))
def test_any_projection_alone_is_heard(base, full, name):
  off = lambda path, x: 0 * x if name not in trees.name(path) else x
  weights, scales = lora.split(full['lora'])
  scales = jax.tree_util.tree_map_with_path(off, scales)
  alone = {**base, 'lora': lora.joined(weights, scales)}
  far(run(alone), plain(base), 1e-3)
  close(run(alone), plain(lora.merge(alone)))


def test_some_projections(base):
  some = {**base, 'lora': adapter(targets='v|down')}
  assert len(jax.tree.leaves(some['lora'])) == 6
  close(run(some), plain(lora.merge(some)))
  far(run(some), plain(base))


def test_a_new_adapter_changes_nothing(base, full, key):
  init = functools.partial(lora.init, CONFIG, rank=3, alpha=4.0)
  fresh = quickly(init)(key)
  assert jax.tree.structure(fresh) == jax.tree.structure(full['lora'])
  close(run({**base, 'lora': fresh}), plain(base), 1e-6)


def test_init_is_that_of_peft(key):
  init = functools.partial(lora.init, CONFIG, key, rank=64, alpha=8.0)
  made = init(targets='attn/[qv]')
  assert set(made['layers']) == {'attn'}
  assert set(made['layers']['attn']) == {'q', 'v'}
  first, second = (made['layers']['attn'][k]['a'] for k in 'qv')
  bound = CONFIG.features**-0.5  # kaiming_uniform(a=sqrt(5))
  for a in (first, second):
    assert a.shape == (CONFIG.layers, 64, CONFIG.features)
    assert 0.99 * bound < np.abs(a).max() < bound
    assert abs(np.std(a) - bound / 3**0.5) < 0.02 * bound
  far(first, second)
  far(first[0], first[1])
  again = init(targets='attn/q')
  np.testing.assert_array_equal(again['layers']['attn']['q']['a'], first)
  np.testing.assert_array_equal(made['layers']['attn']['q']['scale'], 0.125)
  stable = init(targets='up', rank_stabilised=True)
  np.testing.assert_array_equal(stable['layers']['mlp']['up']['scale'], 1.0)


def test_without_adapters_the_program_is_the_plain_one(base, full):
  def text(apply, variables):
    step = lambda v: apply(v, TOKENS, POSITIONS)
    return jax.jit(step).lower(variables).as_text()

  assert text(ADAPTED, base) == text(APPLY, base)
  assert text(ADAPTED, full) != text(APPLY, full)


def test_new_adapters_do_not_compile_again(base):
  counted = fakes.Counted(lambda v: ADAPTED(v, TOKENS, POSITIONS)[0])
  jitted = quickly(counted)
  first = jitted({**base, 'lora': adapter(1)})
  far(jitted({**base, 'lora': adapter(2)}), first)
  assert counted.traces == 1


# With everything else.


def test_unstacked_layers_are_adapted_alike(full):
  close(run(trees.unstack_layers(full)), run(full))


def test_remat_changes_nothing(full, gradient):
  again = gradient_of(
    lora.adapted(decoder.functions(CONFIG, remat='full').apply)
  )
  jax.tree.map(functools.partial(close, atol=1e-4), again(full), gradient)


def gradient_of(apply):
  """Of a curved function of the hidden states, for all of the adapter."""

  def value(adapter, variables):
    full = {**variables, 'lora': adapter}
    return jnp.sum(jnp.sin(apply(full, TOKENS, POSITIONS)[0]))

  return lambda full: quickly(jax.grad(value))(full['lora'], full)


@pytest.fixture(scope='module')
def gradient(full):
  return gradient_of(ADAPTED)(full)


def test_caps_and_adapters_in_either_order(base, full):
  capped = fakes.with_edits(full, fakes.caps())
  orders = (
    lora.adapted(taps.edited(APPLY, edits.stored)),
    taps.edited(ADAPTED, edits.stored),
  )
  one, other = (
    quickly(lambda v, f=f: f(v, TOKENS, POSITIONS)[0])(capped) for f in orders
  )
  np.testing.assert_array_equal(one, other)
  only_capped = lambda v: fakes.with_edits(v, fakes.caps())
  edited = fakes.tiny().edited  # made out here: its arrays are kept for all
  cap = quickly(lambda v: edited(v, TOKENS, POSITIONS)[0])
  close(one, cap(only_capped(lora.merge(full))))
  far(one, run(full))
  far(one, cap(only_capped(base)))


def test_projections_stay_within_the_cap(full):
  keep = lambda tap, x: edits.projection(
    x, tap.get_variable('edits', 'cap')['axis']
  )
  capped = taps.edited(ADAPTED, edits.stored)
  variables = fakes.with_edits(full, fakes.caps(low=0.3, high=0.6))
  kept = taps.keep(capped, keep)
  along = quickly(lambda v: kept(v, TOKENS, POSITIONS)[1])(variables)
  assert along.shape == (CONFIG.layers, *TOKENS.shape)
  assert 0.3 - 1e-4 < along.min() and along.max() < 0.6 + 1e-4


def test_decoding_in_a_loop_is_one_pass(full):
  variables = trees.unstack_layers(full)
  size = TOKENS.shape[1]

  @quickly
  def decode(variables):
    def one(state):
      t, memory, out = state
      here = lambda x: jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1)
      hidden, memory = ADAPTED(variables, here(TOKENS), here(POSITIONS), memory)
      return t + 1, memory, out.at[:, t].set(hidden[:, 0])

    memory = cache.empty(CONFIG, TOKENS.shape[0], size)
    out = jnp.zeros((*TOKENS.shape, CONFIG.features))
    start = (jnp.int32(0), memory, out)
    return jax.lax.while_loop(lambda s: s[0] < size, one, start)[2]

  close(decode(variables), run(full))


def test_bfloat16_under_a_float32_adapter(full):
  apply = lora.adapted(decoder.functions(CONFIG, dtype=jnp.bfloat16).apply)
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), full['params'])

  def hidden(adapter):
    return apply({'params': narrow, 'lora': adapter}, TOKENS, POSITIONS)[0]

  total = lambda adapter: jnp.sum(hidden(adapter).astype(jnp.float32))
  grads = jax.eval_shape(jax.grad(total), full['lora'])
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(grads))
  got, want = quickly(hidden)(full['lora']), run(full)
  assert got.dtype == jnp.bfloat16
  apart = np.linalg.norm(got.astype(jnp.float32) - want)
  assert apart < 0.05 * np.linalg.norm(want)


# Merging.


@pytest.mark.parametrize('turn', [lambda v: v, trees.unstack_layers])
def test_a_merged_model_is_the_adapted_one(full, turn):
  merged = lora.merge(turn(full))
  assert set(merged) == {'params'}
  assert jax.tree.map(jnp.shape, merged) == jax.tree.map(
    jnp.shape, turn({'params': full['params']})
  )
  close(plain(merged), run(full))


def test_a_merge_is_summed_in_float32(full):
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), full)
  kernel = lora.merge(narrow)['params']['layers']['mlp']['up']['kernel']
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), narrow)
  entry = wide['lora']['layers']['mlp']['up']
  want = wide['params']['layers']['mlp']['up']['kernel']
  want = want + np.einsum(
    'l,lor,lri->loi', entry['scale'], entry['b'], entry['a']
  )
  assert kernel.dtype == jnp.bfloat16
  # rounded once: half a unit in the last of 8 bits
  apart = np.abs(np.asarray(kernel, np.float64) - want)
  assert np.all(apart <= np.abs(want) * 2**-8 + 1e-6)


def test_merging_inside_jit(full):
  inside = quickly(lora.merge)(full)
  jax.tree.map(functools.partial(close, atol=1e-6), inside, lora.merge(full))


# Training.


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  floats = lambda: jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
  ints = lambda high: jnp.asarray(rng.integers(0, high, (3, 6)))
  return learn.Batch(
    tokens=TOKENS,
    positions=POSITIONS,
    before=ints(11),
    actions=ints(300),
    mask=jnp.ones((3, 6), bool),
    advantages=floats(),
    old_logprobs=floats() - 5,
    reference_logprobs=floats() - 5,
  )


OPTIMIZER = optax.adamw(1e-2, weight_decay=0.1)


def update(state, base, scales, batch):
  loss_fn = step.policy_loss(
    ADAPTED,
    UNEMBED,
    learn.clipped_loss,
    {**base, 'lora': scales},
    temperature=1.0,
    held=4096,
    trained='lora',
  )
  return learn.train_step(
    state, batch, losses.per_token(batch), loss_fn=loss_fn, optimizer=OPTIMIZER
  )


def test_only_the_adapter_is_trained(base, full, batch):
  weights, scales = lora.split(full['lora'])
  state = learn.init_state(weights, OPTIMIZER)
  program = quickly(update)
  after, metrics = program(state, base, scales, batch)
  assert metrics['norm/grads'] > 0.1
  moved = trees.flatten(jax.tree.map(jnp.subtract, after.params, weights))
  assert {name.rpartition('/')[2] for name in moved} == {'a', 'b'}
  assert all(np.abs(x).max() > 1e-3 for x in moved.values())
  joined = lora.joined(after.params, scales)
  assert jax.tree.structure(joined) == jax.tree.structure(full['lora'])
  # the step goes down the loss of the same batch
  again = program(after, base, scales, batch)[1]
  assert again['loss'] < metrics['loss']


def test_no_gradient_of_a_kernel_is_computed(base, full, batch):
  weights, scales = lora.split(full['lora'])
  state = learn.init_state(weights, OPTIMIZER)
  graph = jax.make_jaxpr(update)(state, base, scales, batch).jaxpr
  made = set(_made(graph))
  assert (CONFIG.layers, CONFIG.hidden, 3) in made  # of B, stacked
  kernels = {shape[1:] for shape in lora.projections(CONFIG).values()}
  table = (CONFIG.vocab, CONFIG.features)
  for out, size in {*kernels, table} - {TOKENS.shape}:
    assert not {(out, size), (CONFIG.layers, out, size)} & made


def _made(jaxpr):
  """The shapes of all products and sums in a program, inner ones too."""
  for equation in jaxpr.eqns:
    if equation.primitive.name in ('dot_general', 'add', 'add_any', 'mul'):
      yield from (variable.aval.shape for variable in equation.outvars)
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from _made(inner)


def test_scales_are_never_trained(gradient):
  for name, leaf in trees.flatten(gradient).items():
    assert np.any(leaf) != name.endswith('scale'), name


# Bad input.


@pytest.mark.parametrize(
  ('spoil', 'match'),
  [
    (lambda v: trees.unstack_layers({'lora': v})['lora'], 'no layers_0/attn'),
    (
      lambda v: jax.tree.map(lambda x: x[:1], v),
      r'\(1, 3, 32\).*\(2, 36, 32\)',
    ),
    (lambda v: lora.split(v)[0], 'needs a, b and scale'),
    (lambda v: {'layers': {'mpl': v['layers']['mlp']}}, 'no layers/mpl/'),
  ],
  ids=['unstacked', 'fewer layers', 'no scales', 'misspelt'],
)
def test_a_foreign_adapter_is_never_ignored(base, spoil, match):
  wrong = {**base, 'lora': spoil(adapter())}
  for use in (lambda v: ADAPTED(v, TOKENS, POSITIONS), lora.merge):
    with pytest.raises(models.CheckpointError, match=match):
      use(wrong)


@pytest.mark.parametrize(
  ('options', 'match'),
  [({'rank': 0}, 'rank=0'), ({'targets': 'qkv'}, "'qkv' finds none of attn/q")],
)
def test_bad_choices(key, options, match):
  with pytest.raises(ValueError, match=match):
    lora.init(CONFIG, key, **({'rank': 2, 'alpha': 1.0} | options))


def test_a_jitted_apply_is_refused():
  with pytest.raises(ValueError, match='is jitted'):
    lora.adapted(jax.jit(APPLY))
