"""Costs counted by hand against hand sums, XLA's count and real arrays."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import chips, costs, learn, outlines, pace, trees
from persona_jax import job as jobs
from persona_jax.learn.step import policy_loss
from persona_jax.models import decoder

SETTINGS = {
  'model_type': 'llama',
  'vocab_size': 512,
  'hidden_size': 128,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'intermediate_size': 384,
  'rms_norm_eps': 1e-5,
  'rope_theta': 500000.0,
  'max_position_embeddings': 4096,
  'tie_word_embeddings': False,
}


@pytest.fixture
def model(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(SETTINGS))
  return str(path)


def job(model, topology='h100:1', **fields):
  given = {'batch': 2, 'tokens': 128, 'lines': 4} | fields
  return jobs.make(topology=topology, model=model, **given)


# Topologies.


def test_topologies():
  place = chips.topology('v5p:4x4x8')
  assert (place.chip.name, place.shape, place.count) == ('v5p', (4, 4, 8), 128)
  assert str(place) == 'v5p:4x4x8'
  assert chips.topology('h100:8').network == 450e9
  assert chips.topology('h100:16').network == 50e9  # over two nodes


@pytest.mark.parametrize(
  ('text', 'match'),
  [
    ('v9:2', "'v9:2' names no chip .*v5p:4x4x4.*h100:8"),
    ('v5p:4x4', 'has no 3 sizes, as a v5p has; write v5p:4x4x4'),
    ('v6e:8', 'has no 2 sizes'),
    ('h200:8x8', 'has no 1 sizes, as a h200 has; write h200:8'),
    ('v5p:4x0x4', 'has no 3 sizes'),
    ('v5p', 'has no 3 sizes'),
  ],
)
def test_topologies_that_are_none(text, match):
  with pytest.raises(ValueError, match=match):
    chips.topology(text)


# Shapes of models.


@pytest.mark.parametrize(
  ('name', 'count'),
  [
    ('llama-3.1-8b', 8_030_261_248),  # as its model card and transformers say
    ('hf:meta-llama/Llama-3.1-70B', 70_553_706_496),
  ],
)
def test_named_shapes_have_as_many_parameters(name, count):
  shapes = jobs.params(outlines.outline(name), jnp.float32)
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count


# Jobs.


def test_what_a_job_is(model):
  found = job(model, 'h100:8', mesh='fsdp=4,tensor=2', batch=8)
  assert (found.ways, found.prompt, found.line, found.said) == (4, 16, 20, 40)
  assert jobs.make(topology='h100:8', model=model).batch == 8


@pytest.mark.parametrize(
  ('fields', 'match'),
  [
    ({'mesh': 'fsdp=3'}, '--mesh=fsdp=3 has 3 places and h100:8 has 8 chips'),
    ({'mesh': 'rows=8'}, "'rows=8' is no axis"),
    ({'batch': 12}, '--batch=12 does not divide over the 8 ways'),
    ({'microbatches': 2}, '--batch=8 .*give a multiple of 16'),
    ({'microbatches': 0}, '--batch=8 does not divide'),
    ({'lines': 40}, 'leave -6 tokens to each of --lines=40'),
    ({'remat': 'half'}, "remat='half' is unknown; give 'none', 'full'"),
    ({'attend': 'fast'}, '--attend=fast is none of xla, blocks'),
    ({'rank': -1}, '--rank=-1 is below 0'),
    ({'model': 'no-such'}, "'no-such' is no source of weights"),
  ],
)
def test_jobs_that_do_not_fit_together(model, fields, match):
  with pytest.raises(ValueError, match=match):
    job(**({'model': model, 'topology': 'h100:8', 'batch': 8} | fields))


def test_a_mesh_that_does_not_divide_the_weights(model):
  with pytest.raises(ValueError, match=r'128.* does not divide over'):
    costs.state(job(model, 'h100:6', mesh='fsdp=6', batch=6))


# FLOPs.


def test_flops_by_hand(model):
  # A layer: q and o 128 x 128, k and v 128 x 64, three of 128 x 384.
  weights = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384
  assert costs.products(job(model).config).all == weights
  tokens, said = 2 * 128, 2 * 40
  forward = 2 * (2 * weights * tokens + 512 * 128 * said)
  heard = 4 * tokens * 128 * 128 * 2  # two products of 128 slots, two layers
  found = costs.train_flops(job(model, remat='none'))
  assert found['program'] == 3 * (forward + heard)
  assert found['model'] == 3 * (forward + heard / 2)
  again = costs.train_flops(job(model))['program'] - found['program']
  assert again == 2 * 2 * (weights - 128 * 384) * tokens + heard
  again = costs.train_flops(job(model, remat='dots'))['program']
  assert again - found['program'] == heard


def test_an_adapter_has_no_gradient_of_its_base(model):
  full = costs.train_flops(job(model, remat='none'))
  few = costs.train_flops(job(model, remat='none', rank=1))
  assert 0.66 < few['program'] / full['program'] < 0.75


def test_experts_that_a_token_visits_count(tmp_path):
  path = tmp_path / 'config.json'
  settings = SETTINGS | {
    'model_type': 'mixtral',
    'num_local_experts': 8,
    'num_experts_per_tok': 2,
  }
  path.write_text(json.dumps(settings))
  found = costs.products(outlines.outline(str(path)))
  assert found.down == 2 * 128 * 384 and found.up == 2 * 2 * 128 * 384 + 1024


@pytest.mark.parametrize('remat', ['none', 'full', 'dots'])
def test_flops_are_those_that_xla_counts_unrolled(model, remat):
  one = job(model, remat=remat)
  apply, unembed = decoder.functions(one.config, remat=remat, attend='xla')
  stacked = {'params': _zeros(jobs.params(one.config, jnp.float32))}
  params = trees.unstack_layers(stacked)['params']
  loss_fn = policy_loss(apply, unembed, learn.clipped_loss, {}, held=one.held)
  batch = jobs.batch(one, jnp.zeros)
  grad = jax.grad(lambda p: loss_fn(p, batch, batch.advantages)[0])
  # Not compiled: XLA would find what is computed twice.
  counted = jax.jit(grad).lower(params).cost_analysis()['flops']
  ours = costs.train_flops(one)['program']
  assert ours < counted < 1.08 * ours  # norms, softmax and the like on top


def _zeros(tree):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def test_flops_of_a_rollout_by_hand(model):
  one = job(model)
  work = costs.talk(one)
  assert work.steps == 3 * 20  # the opening is given
  assert work.reads == (3 + 1) * 2  # two lanes, one at a time; the prompts
  assert work.read == 37  # two frames, a line, and one token
  each = 2 * 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384)
  logits, heard = 2 * 512 * 128, 4 * 128 * 128 * 2
  assert work.flops_step == 2 * (each + logits + heard)
  assert work.flops_read == 37 * (each + heard)


# Bytes.


def test_state_is_what_real_arrays_take(model):
  one = job(model)
  params = _zeros(jobs.params(one.config, jnp.float32))
  state = learn.init_state(params, jobs.OPTIMIZER)
  assert costs.state(one) == sum(x.nbytes for x in jax.tree.leaves(state))
  assert costs.start(one) == sum(x.nbytes for x in jax.tree.leaves(params))
  assert costs.speakers(one) == 2 * costs.start(one) / 2
  kept = jobs.memory(one)(one.batch, 128)
  assert costs.cache(one) == sum(x.nbytes for x in jax.tree.leaves(kept))


def test_state_is_spread_and_serving_is_not(model):
  alone, spread = job(model), job(model, 'h100:8', batch=8)
  assert costs.state(spread) == pytest.approx(costs.state(alone) / 8, rel=0.02)
  assert costs.serving(spread) == costs.serving(alone)
  both = job(model, 'h100:8', mesh='fsdp=4,tensor=2', batch=8)
  assert costs.serving(both) == pytest.approx(
    costs.serving(alone) / 2, rel=0.02
  )
  assert costs.cache(both) == costs.cache(spread)  # twice the rows, half heads


def test_tokens_that_lie_over_sequence_need_less(model):
  rows = job(model, 'h100:8', mesh='fsdp=4,data=2', batch=8, tokens=512)
  spread = job(model, 'h100:8', mesh='fsdp=4,sequence=2', batch=8, tokens=512)
  assert (rows.slots, spread.slots) == (512, 512)
  again = spread.changed(batch=4)
  assert costs.temporaries(again) < costs.temporaries(spread)
  assert (again.ways, again.slots) == (4, 256)


def test_an_adapter_shares_its_base(model):
  one = job(model, rank=4)
  assert costs.start(one) == 0
  assert costs.serving(one) < costs.speakers(one) < 1.1 * costs.serving(one)
  assert costs.state(one) < costs.state(job(model))


def test_microbatches_and_remat_need_less(model):
  big = dict(batch=64, tokens=512)
  whole = costs.temporaries(job(model, remat='none', **big))
  full = costs.temporaries(job(model, **big))
  parts = costs.temporaries(job(model, microbatches=8, **big))
  assert whole > full > parts


def test_narrow_shards_of_a_tpu():
  one = jobs.make(topology='v5p:4x4x4', model='llama-3.1-8b')
  assert costs.narrow(one) == 64
  assert costs.narrow(one.changed(mesh=one.mesh | {'data': 2, 'fsdp': 32})) == 0
  assert costs.narrow(one.changed(topology='h100:64')) == 0


# Times.


def test_times_are_ranges_around_the_peak(model):
  one = job(model, 'v5p:2x2x2', batch=8)
  found = pace.train(one, [{'sent': 600e9}])  # a second of network
  flops = costs.train_flops(one)['program']
  assert found['parts']['compute'] == flops / 8 / 459e12
  assert found['parts']['network'] == 1 and found['bound'] == 'network'
  low, high = found['seconds']
  assert low == 1 / 0.8 and high > 1 / 0.3
  assert pace.train(one, None)['sent'] == costs.train_sent(one)


def test_reads_and_steps_of_a_rollout_send_apart(model):
  one = job(model, 'v5p:2x2x2', batch=8)
  sent = [{'open': x, 'sent': y} for x, y in ((1, 2.0), (2, 4.0), (3, 8.0))]
  work, found = costs.talk(one), pace.talk(one, sent)
  # One of two speakers.
  assert found['sent'] == (work.steps * 6 + work.reads * 8) / 2


def test_dollars(model):
  one = job(model, 'v5p:2x2x2', batch=8)
  found = pace.dollars(one, (3600.0, 7200.0))
  np.testing.assert_allclose(found['hour'], (8 * 1.89, 8 * 4.20))
  np.testing.assert_allclose(found['step'], (8 * 1.89, 16 * 4.20))
