"""Adapters in PEFT's layout: numbers, exact round trips, bad folders."""

import dataclasses
import functools
import json
import types
from pathlib import Path

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from persona_jax import models, trees
from persona_jax.models import adapter_file, decoder, lora, peft, stream

CONFIG = fakes.CONFIG
GOLDEN = json.loads(
  (Path(__file__).parent / 'golden' / 'lora.json').read_text()
)


def adapter(seed=1, **options):
  """An adapter whose every number matters, each layer's scale its own."""
  rng = np.random.default_rng(seed)
  options = {'rank': 3, 'alpha': 2.0} | options
  init = functools.partial(lora.init, CONFIG, **options)
  shapes = jax.eval_shape(init, jax.random.key(0))
  draw = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)
  return jax.tree.map(draw, shapes)


def model(config=CONFIG, name='tiny'):
  return types.SimpleNamespace(name=name, config=config)


@pytest.fixture
def saved(tmp_path):
  adapter_file.save(adapter(targets='q|down'), model(), tmp_path / 'saved')
  return tmp_path / 'saved'


def config_of(folder, **changes):
  file = folder / adapter_file.CONFIG
  config = json.loads(file.read_text()) | changes
  file.write_text(json.dumps(config))
  return config


def tensors_of(folder, change=None):
  file = folder / adapter_file.WEIGHTS
  tensors = safetensors_numpy.load_file(file)
  if change:
    change(tensors)
    safetensors_numpy.save_file(tensors, file)
  return tensors


@pytest.mark.parametrize('row', GOLDEN['adapters'], ids=lambda r: r['name'])
def test_logits_are_those_of_peft(tmp_path, row):
  config = models.families.from_hf(GOLDEN['base'])
  params = stream.parameters(fakes.opened(config), jnp.float32)
  (tmp_path / adapter_file.CONFIG).write_text(json.dumps(row['config']))
  safetensors_numpy.save_file(
    {k: fakes.formula(k, shape) for k, shape in row['shapes'].items()},
    tmp_path / adapter_file.WEIGHTS,
  )
  loaded = adapter_file.load(tmp_path, model(config))
  apply, unembed = decoder.functions(config)
  tokens = jnp.asarray([GOLDEN['ids']])
  variables = {'params': params, 'lora': loaded}

  @jax.jit
  def logits(variables):
    hidden, _ = lora.adapted(apply)(variables, tokens, where)
    return unembed(variables, hidden)[0, -2:]

  where = jnp.arange(tokens.shape[1])[None]
  np.testing.assert_allclose(logits(variables), row['logits'], atol=2e-5)
  adapter_file.save(loaded, model(config), tmp_path / 'again')
  fakes.same(adapter_file.load(tmp_path / 'again', model(config)), loaded)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_export_and_import_are_exact(tmp_path, dtype):
  made = adapter(dtype=dtype)
  for name, tree in (
    ('stacked', made),
    ('apart', trees.unstack_layers({'lora': made})['lora']),
  ):
    adapter_file.save(tree, model(), tmp_path / name)
    fakes.same(adapter_file.load(tmp_path / name, model(), dtype=dtype), made)


def test_the_layout_is_that_of_peft(saved):
  config = config_of(saved)
  assert config['target_modules'] == ['down_proj', 'q_proj']
  assert (config['peft_type'], config['r']) == ('LORA', 3)
  shapes = {k: v.shape for k, v in tensors_of(saved).items()}
  name = 'base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight'
  assert len(shapes) == 2 * 2 * CONFIG.layers
  assert shapes[name.format('A')] == (3, CONFIG.hidden)
  assert shapes[name.format('B')] == (CONFIG.features, 3)


def test_a_plain_adapter_has_plain_numbers(tmp_path, key):
  # 16 / 3 is no float32
  made = lora.init(CONFIG, key, rank=3, alpha=16.0, targets='q')
  adapter_file.save(made, model(), tmp_path / 'new')
  config = config_of(tmp_path / 'new')
  assert (config['r'], config['lora_alpha']) == (3, 16)
  assert not config['rank_pattern'] and not config['alpha_pattern']


def test_saving_never_overwrites(saved):
  before = (saved / adapter_file.WEIGHTS).read_bytes()
  with pytest.raises(ValueError, match='exists and is not overwritten'):
    adapter_file.save(adapter(2), model(), saved)
  assert (saved / adapter_file.WEIGHTS).read_bytes() == before


# Bad input: one sentence that says what, why and how out.


def refuses(match, fn, *args):
  with pytest.raises(models.CheckpointError, match=match) as error:
    fn(*args)
  return str(error.value)


@pytest.mark.parametrize(
  'change',
  [
    {'use_dora': True},
    {'bias': 'all'},
    {'modules_to_save': ['lm_head']},
    {'layers_to_transform': [0, 1]},
    {'peft_type': 'LOHA'},
    {'trainable_token_indices': [5]},
    {'fan_in_fan_out': True},
    {'exclude_modules': ['q_proj']},
    {'init_lora_weights': 'pissa'},
    {'of_the_future': {'twist': 2}},
  ],
  ids=lambda change: next(iter(change)),
)
def test_what_is_not_computed_is_refused_by_name(saved, change):
  config_of(saved, **change)
  (field, value), *_ = change.items()
  said = refuses('not supported', adapter_file.load, saved, model())
  assert f'{field}={value!r}' in said


def test_all_that_is_refused_comes_at_once(saved):
  config_of(saved, use_dora=True, bias='all', r=None)
  said = refuses('.', adapter_file.load, saved, model())
  assert all(k in said for k in ('use_dora=True', "bias='all'", 'r is missing'))


def test_all_misfits_come_at_once(saved):
  name = 'base_model.model.model.layers.{}.lora_{}.weight'

  def spoil(tensors):
    del tensors[name.format('0.self_attn.q_proj', 'A')]
    tensors[name.format('1.mlp.up_proj', 'B')] = np.zeros((2, 3))
    down = name.format('1.mlp.down_proj', 'A')
    tensors[down] = np.ascontiguousarray(tensors[down].T)

  tensors_of(saved, spoil)
  said = refuses(r'3 problem\(s\)', adapter_file.load, saved, model())
  assert f'missing {name.format("0.self_attn.q_proj", "A")} (3, 32)' in said
  assert f'unexpected {name.format("1.mlp.up_proj", "B")} (2, 3)' in said
  assert 'down_proj.lora_A.weight is (48, 3), not (3, 48)' in said


def test_an_adapter_for_another_model(saved):
  wide = dataclasses.replace(CONFIG, hidden=64)
  said = refuses('does not fit', adapter_file.load, saved, model(wide, 'wide'))
  assert "'tiny'" in said and "'wide'" in said
  assert '(3, 48), not (3, 64)' in said
  config_of(saved, target_modules=['q_proj', 'qkv_proj', 'lm_head'])
  said = refuses('qkv_proj, lm_head', adapter_file.load, saved, model())
  assert 'down_proj, gate_proj, k_proj' in said
  with pytest.raises(models.CheckpointError, match='belongs to another model'):
    adapter_file.save(adapter(), model(wide), saved / 'new')


def test_damaged_folders(saved, tmp_path):
  refuses('has no adapter_config', adapter_file.load, tmp_path, model())
  weights = saved / adapter_file.WEIGHTS
  weights.write_bytes(weights.read_bytes()[:-50])
  refuses('ends early or is damaged', adapter_file.load, saved, model())
  weights.unlink()
  refuses('has no adapter_model', adapter_file.load, saved, model())
  (saved / adapter_file.CONFIG).write_text('{')
  refuses('is not JSON', adapter_file.load, saved, model())


def test_patterns_match_as_in_peft():
  config = {
    'r': 8,
    'lora_alpha': 16,
    'rank_pattern': {'layers.1.mlp.up_proj': 2, 'up_proj': 4},
    'alpha_pattern': {r'^model\.layers\.\d\.self_attn.*': 9},
    'use_rslora': True,
  }
  assert peft.rank(config, 'model.layers.1.mlp.up_proj') == 2
  assert peft.rank(config, 'model.layers.11.mlp.up_proj') == 4
  assert peft.rank(config, 'model.layers.1.self_attn.q_proj') == 8
  assert peft.scale(config, 'model.layers.1.mlp.up_proj') == 16 / 2**0.5
  assert peft.scale(config, 'model.layers.1.self_attn.q_proj') == 9 / 8**0.5


def test_fused_projections_are_refused(saved, monkeypatch):
  fused = 'model.layers.{layer}.self_attn.qkv_proj.weight'
  monkeypatch.setattr(adapter_file, '_foreign', lambda config, name: fused)
  refuses('qkv_proj is attn/q and attn/k', adapter_file.load, saved, model())


@pytest.mark.parametrize(
  'changes',
  [
    {'lora_alpha': 'x'},
    {'lora_alpha': float('nan')},
    {'target_modules': 5},
    {'target_modules': [5]},
    {'target_modules': '(q_proj'},
    {'alpha_pattern': {'(': 1}},
    {'rank_pattern': [1]},
    {'r': 0},
    {'r': '2'},
  ],
  ids=str,
)
def test_values_of_a_wrong_kind_are_named(saved, changes):
  config_of(saved, **changes)
  (name,) = changes
  with pytest.raises(models.CheckpointError, match=rf'{name}[= ]'):
    adapter_file.load(saved, model())


@pytest.mark.parametrize('bad', [np.nan, np.inf, 'whole'])
def test_adapter_weights_that_are_no_numbers(saved, bad):
  def spoil(tensors):
    name = sorted(tensors)[0]
    if bad == 'whole':
      tensors[name] = tensors[name].astype(np.int32)
    else:
      tensors[name][0, 0] = bad

  tensors_of(saved, spoil)
  with pytest.raises(models.CheckpointError, match='NaN, infinity or whole'):
    adapter_file.load(saved, model())


def test_the_base_is_called_as_the_hub_calls_it(tmp_path):
  base = model(name='hf:org/name@abc')
  adapter_file.save(adapter(), base, tmp_path / 'out')
  config = config_of(tmp_path / 'out')
  assert config['base_model_name_or_path'] == 'org/name'
  assert config['revision'] == 'abc'
