"""Every family against transformers, and configurations in and out."""

import dataclasses
import functools
import json
from pathlib import Path

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import taps, trees
from persona_jax.learn import sharding
from persona_jax.models import cache as caches
from persona_jax.models import decoder, experts, families, names, stream
from persona_jax.models.checkpoint import CheckpointError

GOLDEN = Path(__file__).parent / 'golden' / 'families.json'
ROWS = {row['name']: row for row in json.loads(GOLDEN.read_text())}
CACHED = (  # one of each way to differ, the rest are slow
  'mixtral',
  'gemma 3',
  'phi 4 mini (long longrope, part of a head)',
  'smollm 3',
)
every_family = pytest.mark.parametrize('name', ROWS)


def opened(row):
  """The checkpoint that golden_families.py made, without its files."""
  config = families.from_hf(row['config'])
  if 'long longrope' in row['name']:
    kinds = [
      dataclasses.replace(k, rope=dataclasses.replace(k.rope, long=True))
      for k in config.kinds
    ]
    config = dataclasses.replace(config, kinds=tuple(kinds))
  return fakes.opened(config, row['name'])


def made(row):
  """The configuration and the stacked variables."""
  checkpoint = opened(row)
  params = stream.parameters(checkpoint, jnp.float32)
  return checkpoint.config, {'params': params}


def batch(row):
  """Three copies of the text: whole, cut short, and padded on the left."""
  ids, size = np.array(row['ids']), len(row['ids'])
  positions = np.tile(np.arange(size), (3, 1))
  positions[1, -5:] = -1
  positions[2] -= 5
  positions = np.maximum(positions, -1)
  tokens = np.stack([ids, ids, np.roll(ids, 5)])
  return jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32)


@functools.cache
def computed(name):
  """Logits, the last token's block outputs, and the loss with its gradient."""
  row = ROWS[name]
  config, variables = made(row)
  apply, unembed = decoder.functions(config, remat='full')
  kept = taps.keep(apply, lambda tap, x: x[0, -1])
  tokens, positions = batch(row)

  def loss(variables):
    (hidden, _), blocks = kept(variables, tokens, positions)
    logits = unembed(variables, hidden)
    scores = jax.nn.log_softmax(logits[0, :-1])
    nll = -jnp.mean(jnp.take_along_axis(scores, tokens[0, 1:, None], 1))
    return nll, (logits, blocks)

  (value, (logits, blocks)), grads = jax.jit(
    jax.value_and_grad(loss, has_aux=True)
  )(variables)
  return config, logits, blocks, value, grads


@every_family
def test_logits_and_blocks_are_those_of_transformers(name):
  row = ROWS[name]
  _, logits, blocks, _, _ = computed(name)
  np.testing.assert_allclose(logits[0, -2:], row['logits'], atol=1e-4)
  np.testing.assert_allclose(blocks[:, :6], row['blocks'], atol=1e-4)
  np.testing.assert_allclose(logits[1, :-5], logits[0, :-5], atol=1e-4)
  np.testing.assert_allclose(logits[2, 5:], logits[0, :-5], atol=1e-4)


@every_family
def test_gradients_are_those_of_transformers(name):
  row = ROWS[name]
  config, _, _, value, grads = computed(name)
  np.testing.assert_allclose(value, row['loss'], rtol=1e-5)
  table = names.table(config, names.HUGGING_FACE)
  got = {
    t.name: np.sum(t.fetch() * fakes.formula(f'grad of {t.name}', t.shape))
    for t in names.tensors(grads['params'], config, table)
  }
  scale = max(map(abs, row['grads'].values()))
  assert got.keys() == row['grads'].keys()
  for name, want in row['grads'].items():
    np.testing.assert_allclose(got[name], want, atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize(
  'name',
  [
    name if name in CACHED else pytest.param(name, marks=pytest.mark.slow)
    for name in ROWS
  ],
)
def test_cached_decoding_is_the_full_pass(name):
  row = ROWS[name]
  config, variables = made(row)
  apply, _ = decoder.functions(config)
  tokens, positions = batch(row)
  full, _ = jax.jit(apply)(variables, tokens, positions)
  apart = trees.unstack_layers(variables)
  step = jax.jit(apply)
  first, cache = step(
    apart,
    tokens[:, :10],
    positions[:, :10],
    caches.empty(config, 3, tokens.shape[1]),
  )
  parts = [first]
  for t in range(10, tokens.shape[1]):
    here = slice(t, t + 1)
    hidden, cache = step(apart, tokens[:, here], positions[:, here], cache)
    parts.append(hidden)
  real = np.asarray(positions >= 0)
  got = np.concatenate(parts, axis=1)[real]
  np.testing.assert_allclose(got, full[real], atol=1e-4)


@every_family
def test_configurations_survive_the_way_out_and_in(name):
  config = opened(ROWS[name]).config
  again = families.from_hf(families.to_hf(config))
  assert again == families.from_hf(ROWS[name]['config'])


@every_family
def test_tensors_survive_the_way_out_and_in(name):
  config, variables = made(ROWS[name])
  table = names.table(config, names.HUGGING_FACE)
  for tree in (variables, trees.unstack_layers(variables)):
    out = {t.name: t for t in names.tensors(tree['params'], config, table)}
    assert {k: t.shape for k, t in out.items()} == names.foreign(config, table)
    for k, tensor in out.items():
      np.testing.assert_array_equal(
        tensor.fetch(), fakes.formula(k, tensor.shape)
      )


@every_family
def test_init_has_the_shapes_of_the_checkpoint(name):
  config = opened(ROWS[name]).config
  made = jax.eval_shape(
    lambda key: decoder.init(config, key), jax.random.key(0)
  )
  shapes = {k: x.shape for k, x in trees.flatten(made['params']).items()}
  assert shapes == names.shapes(config)


# Configurations that are refused, with a sentence that says why.


def hf(name='llama, tied', **changes):
  return ROWS[name]['config'] | changes


def test_unknown_architecture():
  with pytest.raises(CheckpointError, match="'mamba'.*known are llama, mistr"):
    families.from_hf(hf(model_type='mamba'))


REFUSED = {
  'attention_bias=True is not supported, only False': {'attention_bias': True},
  'mlp_bias=True is not supported': {'mlp_bias': True},
  "quantization_config=.'bits': 4. is not supported, only null": {
    'quantization_config': {'bits': 4}
  },
  "hidden_act='relu' is not supported, only 'silu' or": {'hidden_act': 'relu'},
  "rope_type 'dynamic' is not supported, only default, linear": {
    'rope_parameters': {'rope_type': 'dynamic', 'rope_theta': 500.0}
  },
  'factor is missing from config.json, rope_parameters': {
    'rope_parameters': {'rope_type': 'linear', 'rope_theta': 500.0}
  },
  'factor is missing from config.json, rope_parameters; add': {
    'rope_parameters': {
      'rope_type': 'llama3',
      'rope_theta': 500.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 32,
    }
  },
  'rope_theta is 100.0 and 500.0; .* must agree': {'rope_theta': 100},
  "rope_type is 'linear' and 'default'; .* must agree": {
    'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}
  },
  r"unknown field\(s\) depth_scale=2, sparse=True .*\('depth_scale', 'sp": {
    'depth_scale': 2,
    'sparse': True,
  },
  'num_hidden_layers=0 is not a whole number from 1 to 1000': {
    'num_hidden_layers': 0
  },
  "vocab_size='61' is not a whole number": {'vocab_size': '61'},
  'hidden_size is missing from config.json; add it': {'hidden_size': None},
  'hidden_size=25 is not a multiple of num_attention_heads=4': {
    'hidden_size': 25,
    'head_dim': None,
  },
  'heads=4 is not a multiple of kv_heads=3': {'num_key_value_heads': 3},
  'LlamaForCausalLM does not choose its windows by it': {
    'layer_types': ['full_attention', 'sliding_attention']
  },
  'conversion_factor=2 may change the numbers': {'conversion_factor': 2},
  'head_dim=7; 7 is odd': {'head_dim': 7},
  '3 of 6 features is no even number': {
    'rope_parameters': {'rope_theta': 500.0, 'partial_rotary_factor': 0.5}
  },
  '18 of 6 features is no even number': {
    'rope_parameters': {'rope_theta': 500.0, 'partial_rotary_factor': 3.0}
  },
  "layer_types=.'full_attention'.; it needs 2 entries": {
    'layer_types': ['full_attention']
  },
  'rms_norm_eps=nan is not a number above zero': {'rms_norm_eps': float('nan')},
}


@pytest.mark.parametrize('said', REFUSED)
def test_what_would_change_the_numbers_is_refused(said):
  with pytest.raises(CheckpointError, match=said):
    families.from_hf(hf(**REFUSED[said]))


def test_windows_that_contradict_themselves():
  row = 'qwen 2, some windows'
  with pytest.raises(CheckpointError, match='layer_types=.*does not choose'):
    families.from_hf(hf(row, use_sliding_window=False))
  with pytest.raises(CheckpointError, match='slide, but sliding_window is nul'):
    families.from_hf(hf(row, sliding_window=None))


def test_a_token_cannot_visit_more_experts_than_there_are():
  with pytest.raises(CheckpointError, match='visits 7 of 5 experts'):
    families.from_hf(hf('mixtral', num_experts_per_tok=7))


def test_parameters_may_go_anywhere_unless_they_were_put():
  params = made(ROWS['llama, tied'])[1]
  assert not any(leaf.committed for leaf in jax.tree.leaves(params))


def test_unknown_fields_can_be_called_inert():
  changed = hf(depth_scale=2, unsloth_version='2', attn_dropout=0.1, spare=None)
  with pytest.raises(CheckpointError, match='depth_scale=2 may change'):
    families.from_hf(changed)
  got = families.from_hf(changed, inert=('depth_scale',))
  assert got == families.from_hf(hf())


def test_old_and_new_ways_to_write_a_rope():
  for name, row in ROWS.items():
    new = row['config']
    old = families.to_hf(families.from_hf(new)) | {'rope_parameters': None}
    assert families.from_hf(old) == families.from_hf(new), name


def test_short_longrope_refuses_long_texts():
  row = ROWS['phi 3, short longrope']
  config, variables = made(row)
  apply, _ = decoder.functions(config)
  tokens = jnp.zeros((1, 33), jnp.int32)
  with pytest.raises(ValueError, match='33 slots are more than the 32 posit'):
    apply(variables, tokens, tokens)
  with pytest.raises(ValueError, match='64 slots are more than the 32 posit'):
    cache = caches.empty_stacked(config, 1, 40, blocked=False)
    apply(variables, tokens[:, :1], tokens[:, :1], cache)


# What does not fit, and what is not a number.


def test_all_tensors_that_do_not_fit_come_at_once():
  checkpoint = opened(ROWS['phi 3'])
  shapes = dict(checkpoint.shapes)
  del shapes['model.norm.weight']
  shapes['model.layers.0.self_attn.qkv_proj.weight'] = (24, 48)
  shapes['surprise'] = (3,)
  checkpoint = dataclasses.replace(checkpoint, shapes=shapes)
  with pytest.raises(CheckpointError) as error:
    stream.parameters(checkpoint, jnp.float32)
  said = str(error.value)
  assert '3 problem(s)' in said
  assert 'missing model.norm.weight (24,)' in said
  assert 'qkv_proj.weight is (24, 48), not (48, 24)' in said
  assert 'unexpected surprise (3,)' in said


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(bad):
  checkpoint = opened(ROWS['qwen 3 moe'])
  name = 'model.layers.1.mlp.experts.4.up_proj.weight'

  def read(theirs):
    array = checkpoint.read(theirs)
    if theirs == name:
      array[3, 5] = bad
    return array

  with pytest.raises(CheckpointError, match=rf'1 tensor.*infinity: {name}\.'):
    stream.parameters(dataclasses.replace(checkpoint, read=read), jnp.float32)


@pytest.mark.parametrize('same', [True, False])
def test_a_copy_of_the_embedding_must_be_one(same):
  checkpoint = opened(ROWS['llama, tied'])
  source = checkpoint.read
  embed, copy = 'model.embed_tokens.weight', 'lm_head.weight'
  shapes = checkpoint.shapes | {copy: checkpoint.shapes[embed]}

  def read(name):
    array = source(embed if name == copy else name)
    if name == copy and not same:
      array[60, 3] += 1
    return array

  checkpoint = dataclasses.replace(checkpoint, shapes=shapes, read=read)
  if same:
    stream.parameters(checkpoint, jnp.float32)
    return
  with pytest.raises(CheckpointError, match='lm_head.weight is another matrix'):
    stream.parameters(checkpoint, jnp.float32)


def test_blocks_of_rows_are_put_together(monkeypatch):
  whole = made(ROWS['phi 3'])[1]
  monkeypatch.setattr(stream, 'BLOCK', 7 * 4 * 24)  # seven rows of D
  again = made(ROWS['phi 3'])[1]
  jax.tree.map(np.testing.assert_array_equal, whole, again)


# On a mesh.


def wide(name):
  """A configuration of a family whose axes divide over any small mesh."""
  config = families.from_hf(ROWS[name]['config'])
  sizes = {'vocab': 64, 'features': 32, 'heads': 4, 'kv_heads': 4}
  sizes |= {'head_dim': 8, 'hidden': 16, 'attn_scale': None}
  if config.experts is not None:
    experts = dataclasses.replace(config.experts, count=8)
    sizes['experts'] = experts
  return dataclasses.replace(config, **sizes)


@pytest.mark.devices
@pytest.mark.parametrize('name', ['phi 3', 'gemma 3', 'qwen 3 moe', 'mixtral'])
@pytest.mark.parametrize(
  'shape',
  [{'fsdp': 8}, {'fsdp': 2, 'tensor': 4}, {'expert': 4, 'tensor': 2}],
  ids=str,
)
def test_weights_stream_to_their_places_on_a_mesh(name, shape):
  config = wide(name)
  checkpoint = fakes.opened(config)
  mesh = sharding.make_mesh(shape)
  places = stream.shardings(config, jnp.float32, mesh, sharding.RULES)
  params = stream.parameters(checkpoint, jnp.float32, places)
  plain = stream.parameters(checkpoint, jnp.float32)
  jax.tree.map(np.testing.assert_array_equal, params, plain)
  got = jax.tree.map(lambda x: x.sharding, params)
  assert jax.tree.all(jax.tree.map(lambda a, b: a == b, got, places))
  tokens, positions = fakes.text(batch=8, vocab=60)
  apply = decoder.functions(config).apply
  want, _ = jax.jit(apply)({'params': plain}, tokens, positions)
  place = names.leaf(places, names.EXPERTS) if config.experts else None
  mix = experts.placed(place)
  assert (mix is experts.grouped) == (config.experts is None)
  spread = sharding.by_rows(decoder.functions(config, mix=mix).apply, mesh)
  hidden, _ = jax.jit(spread)({'params': params}, tokens, positions)
  np.testing.assert_allclose(hidden, want, atol=1e-4)
