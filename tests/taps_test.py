"""Reading and editing at taps, and that it costs no compilation."""

import functools

import fakes
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import taps, trees
from persona_jax.activations import edits
from persona_jax.models import cache as caches
from persona_jax.models import decoder

LOW, HIGH = 0.3, 0.6  # of `fakes.caps`
forms = pytest.mark.parametrize('form', ['stacked', 'unstacked'])
close = functools.partial(np.testing.assert_allclose, atol=1e-5)


@pytest.fixture
def tiny():
  return fakes.tiny()


@pytest.fixture
def capped(tiny):
  return fakes.with_edits(tiny.stacked, fakes.caps())


def along(kept):
  """Projections of what was kept on the axes of the caps."""
  return np.einsum('lbtd,ld->lbt', kept, fakes.axes())


def whole(tap, x):
  del tap
  return x


def double(tap, x):
  del tap
  return 2 * x


def apart(x, y):
  return np.abs(np.asarray(x) - np.asarray(y)).max()


def lowered(apply, variables):
  one_name = lambda *args: apply(*args)
  return jax.jit(one_name).lower(variables, *fakes.text()).as_text()


@forms
def test_taps_leave_no_trace_in_the_program(tiny, form, monkeypatch):
  variables = getattr(tiny, form)
  tapped = lowered(tiny.apply, variables)
  unedited = lowered(tiny.edited, variables)  # no collection `edits`
  monkeypatch.setattr(decoder, 'Tap', lambda where, name: lambda x: x)
  plain = decoder.functions(tiny.config).apply  # traced without taps
  assert lowered(plain, variables) == tapped == unedited


@forms
def test_an_edit_changes_the_program(tiny, form):
  variables = getattr(tiny, form)
  tapped = lowered(tiny.apply, variables)
  assert lowered(taps.edited(tiny.apply, double), variables) != tapped
  off = fakes.with_edits(variables, fakes.no_caps())
  assert lowered(tiny.edited, off) != tapped


def test_new_edits_are_not_traced_again(tiny):
  counted = fakes.Counted(tiny.edited)
  apply = jax.jit(counted)
  hidden = [
    apply(fakes.with_edits(tiny.stacked, collection), *fakes.text())[0]
    for collection in (
      fakes.caps(),
      fakes.caps(low=0.4),
      fakes.caps(high=0.5),
      fakes.caps(seed=1),
      fakes.caps(low=-jnp.inf, high=jnp.inf),
      fakes.no_caps(),
    )
  ]
  assert counted.traces == 1
  for i in range(4):
    assert apart(hidden[i], hidden[i + 1]) > 1e-2
  np.testing.assert_array_equal(hidden[4], hidden[5])


@forms
def test_caps_that_are_off_change_nothing(tiny, form):
  variables = getattr(tiny, form)
  off = fakes.with_edits(variables, fakes.no_caps())
  hidden, _ = tiny.run(off, *fakes.text())
  plain, _ = tiny.run(variables, *fakes.text())
  np.testing.assert_array_equal(hidden, plain)


def test_the_outer_transformation_acts_last(tiny, capped):
  # The first layer reads the same input in both.
  after = taps.keep(tiny.edited, whole)
  before = taps.edited(taps.keep(tiny.apply, whole), edits.stored)
  (hidden, _), bounded = jax.jit(after)(capped, *fakes.text())
  (again, _), free = jax.jit(before)(capped, *fakes.text())
  close(hidden, again)
  bounded, free = along(bounded), along(free)
  close(bounded[0], np.clip(free[0], LOW, HIGH))
  close(bounded, np.clip(bounded, LOW, HIGH))
  assert (free < LOW - 0.1).any() and (free > HIGH + 0.1).any()


def test_steers_act_after_caps(tiny):
  steers = edits.steers(jnp.asarray(5 * fakes.axes()))
  both = edits.merged(fakes.caps(), steers)
  variables = fakes.with_edits(tiny.stacked, both)
  kept = jax.jit(taps.keep(tiny.edited, whole))(variables, *fakes.text())[1]
  close(along(kept), np.clip(along(kept), 5 + LOW, 5 + HIGH))


@pytest.mark.parametrize(
  'form, remat',
  [('stacked', 'none'), ('stacked', 'full'), ('unstacked', 'none')],
)
def test_caps_act_in_every_form_of_the_model(tiny, capped, form, remat):
  apply = decoder.functions(tiny.config, remat=remat).apply
  apply = jax.jit(taps.keep(taps.edited(apply, edits.stored), whole))
  variables = fakes.with_edits(getattr(tiny, form), fakes.caps())
  (hidden, _), kept = apply(variables, *fakes.text())
  close(hidden, tiny.run(capped, *fakes.text())[0])
  close(along(kept), np.clip(along(kept), LOW, HIGH))


def test_gradients_pass_through_caps_and_remat(tiny, capped):
  # Against finite differences in one direction of the parameters.
  apply = decoder.functions(tiny.config, remat='full').apply
  apply = taps.edited(apply, edits.stored)

  @jax.jit
  @jax.value_and_grad
  def at(params, edits):
    variables = {'params': params, 'edits': edits}
    return jnp.mean(jnp.sin(apply(variables, *fakes.text())[0]))

  params, caps = jax.device_get((capped['params'], capped['edits']))
  grads = jax.device_get(at(params, caps)[1])
  move = jax.tree.map(lambda g: g / max(np.abs(g).max(), 1e-9), grads)
  shift = lambda step: jax.tree.map(lambda x, m: x + step * m, params, move)
  step = np.float32(2e-4)
  slope = at(shift(step), caps)[0] - at(shift(-step), caps)[0]
  dot = sum(jax.tree.leaves(jax.tree.map(np.vdot, grads, move)))
  np.testing.assert_allclose(slope / (2 * step), dot, rtol=0.02)
  free = at(params, fakes.no_caps())[1]
  assert max(jax.tree.leaves(jax.tree.map(apart, grads, free))) > 1e-3


def _padded():
  """Text with padding at both ends and between, and how to read it."""
  tokens, _ = fakes.text()
  valid = np.ones(tokens.shape, bool)
  valid[0, :2] = valid[1, 3:5] = valid[2, 5:7] = False
  valid[1, 10] = valid[0, 8] = False  # while decoding
  return tokens, fakes.ragged(valid), valid


@pytest.mark.parametrize('first', [0, 3])
@forms
def test_cached_decoding_equals_one_pass_under_caps(tiny, form, first):
  variables = fakes.with_edits(getattr(tiny, form), fakes.caps(first=first))
  tokens, positions, valid = _padded()
  empty = {'stacked': caches.empty_stacked, 'unstacked': caches.empty}[form]
  hidden, memory = tiny.run(
    variables, tokens[:, :7], positions[:, :7], empty(tiny.config, 3, 15)
  )
  pieces = [hidden]
  for t in range(7, 12):
    now = slice(t, t + 1)
    hidden, memory = tiny.run(
      variables, tokens[:, now], positions[:, now], memory
    )
    pieces.append(hidden)
  want = np.asarray(tiny.run(variables, tokens, positions)[0])
  plain = np.asarray(tiny.run(tiny.stacked, tokens, positions)[0])
  close(np.concatenate(pieces, axis=1)[valid], want[valid])
  assert apart(plain[valid], want[valid]) > 1e-2


def test_caps_act_inside_a_while_loop(tiny):
  tokens, positions, valid = _padded()

  @jax.jit
  def decode(variables, tokens, positions):
    def step(state):
      t, memory, out = state
      now = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=t, slice_size=1, axis=1
      )
      hidden, memory = tiny.edited(
        variables, now(tokens), now(positions), memory
      )
      return t + 1, memory, out.at[:, t].set(hidden[:, 0])

    out = jnp.zeros((*tokens.shape, tiny.config.features))
    start = jnp.zeros((), jnp.int32), tiny.memory(3, 12), out
    return jax.lax.while_loop(lambda s: s[0] < 12, step, start)[2]

  got = []
  for collection in (fakes.caps(), fakes.no_caps()):
    variables = fakes.with_edits(tiny.unstacked, collection)
    want = np.asarray(tiny.run(variables, tokens, positions)[0])
    got.append(np.asarray(decode(variables, tokens, positions)))
    close(got[-1][valid], want[valid])
  assert apart(got[0][valid], got[1][valid]) > 1e-2


def test_caps_act_from_a_position_on(tiny):
  # Positions, not slots: the rows begin with none, one and two of padding.
  positions = fakes.ragged(np.arange(12) >= np.arange(3)[:, None])
  variables = fakes.with_edits(tiny.stacked, fakes.caps(first=2))
  run = jax.jit(taps.keep(tiny.edited, whole))
  kept = along(run(variables, fakes.text()[0], positions)[1])
  inside = (kept > LOW - 1e-5) & (kept < HIGH + 1e-5)
  late = np.asarray(positions) >= 2
  assert inside[:, late].all() and not inside[:, ~late].all(axis=0).any()


def test_a_context_around_compiled_code_is_ignored(tiny):
  # Why `edited` enters its context inside of the function that it returns.
  def interceptor(next_fun, args, kwargs, context):
    x = next_fun(*args, **kwargs)
    return 2 * x if context.module.name == 'resid' else x

  text = tiny.stacked, *fakes.text()
  apply = jax.jit(tiny.apply)
  plain, _ = apply(*text)
  with nn.intercept_methods(interceptor):
    ignored, _ = apply(*text)
    baked, _ = jax.jit(lambda *args: tiny.apply(*args))(*text)
  np.testing.assert_array_equal(ignored, plain)
  assert apart(baked, plain) > 1e-2
  edited = jax.jit(taps.edited(tiny.apply, double))
  np.testing.assert_array_equal(edited(*text)[0], baked)


def test_compiled_code_is_not_edited_in_silence(tiny):
  with pytest.raises(ValueError, match='jit the result'):
    taps.edited(jax.jit(tiny.apply), edits.stored)
  compiled = jax.jit(tiny.apply)
  hidden = taps.edited(lambda *args: compiled(*args), edits.stored)
  text = tiny.stacked, *fakes.text()
  compiled(*text)
  with pytest.raises(ValueError, match="passes is named 'resid'"):
    hidden(*text)


def test_fused_attention_has_no_weights_to_edit(tiny):
  apply = decoder.functions(fakes.CONFIG, attend='blocks').apply
  changed = taps.edited(apply, double, at='attn_weights')
  text = tiny.unstacked, *fakes.text()
  with pytest.raises(ValueError, match="attend='xla'"):
    changed(*text, tiny.memory(3, 12))


@forms
def test_attention_weights_are_read(tiny, form):
  tokens, positions = fakes.text()
  positions = positions.at[0, 5].set(-1)
  reading = jax.jit(taps.keep(tiny.apply, whole, at='attn_weights'))
  weights = np.asarray(reading(getattr(tiny, form), tokens, positions)[1])
  assert weights.shape == (2, 3, 2, 3, 12, 12)  # L B K G T S
  close(weights.sum(-1), 1)
  assert not np.triu(weights, 1).any()
  assert not weights[:, 0, ..., 5].any() and weights[:, 1, ..., 5, 5].all()


def test_attention_weights_are_edited(tiny):
  # Where each token attends to itself alone, none hears another one.
  alone = lambda tap, x: jnp.broadcast_to(jnp.eye(x.shape[-1]), x.shape)
  deaf = jax.jit(taps.edited(tiny.apply, alone, at='attn_weights'))
  tokens, positions = fakes.text()
  changed = tokens.at[:, 0].add(1)
  for apply, hears in ((deaf, False), (tiny.run, True)):
    hidden, _ = apply(tiny.stacked, tokens, positions)
    other, _ = apply(tiny.stacked, changed, positions)
    moved = np.abs(np.asarray(hidden) - other).max(axis=(0, 2))
    assert moved[0] > 1e-2 and (moved[1:] > 1e-4).all() == hears


@forms
@pytest.mark.parametrize('transform', [taps.keep, taps.edited])
def test_a_place_that_does_not_exist_is_named(tiny, form, transform):
  changed = transform(tiny.apply, double, at='rezid')
  with pytest.raises(ValueError, match="'rezid'"):
    jax.eval_shape(changed, getattr(tiny, form), *fakes.text())


def test_edits_unstack_with_the_parameters(capped):
  layers = trees.unstack_layers(capped)['edits']
  axis = layers['layers_1']['resid']['cap']['axis']
  close(axis, fakes.axes()[1])
