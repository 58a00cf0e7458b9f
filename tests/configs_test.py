"""Configurations of published models, and what transformers makes of them.

golden/configs.json holds the numbers of each config.json that matter, beside
facts that transformers 5.23 derives from it: of every rope the number of
frequencies, the middle and the last one, and what scales cosine and sine.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from persona_jax.models import families, gguf_fields, names, rope
from persona_jax.models.checkpoint import CheckpointError
from persona_jax.models.fields import Fields

GOLDEN = Path(__file__).parent / 'golden' / 'configs.json'
ROWS = {row['name']: row for row in json.loads(GOLDEN.read_text())}
every_model = pytest.mark.parametrize('name', ROWS)


def read(name, **changes):
  part, _ = families.text_part(ROWS[name]['config'] | changes)
  return families.from_hf(part)


def same_rope(one, head_dim, want):
  if want is None:
    assert one is None
    return
  frequencies, factor = rope.table(one, head_dim)
  assert len(frequencies) == want['pairs']
  picked = frequencies[[want['pairs'] // 2, -1]]
  np.testing.assert_allclose(picked, [want['middle'], want['last']], rtol=1e-5)
  np.testing.assert_allclose(factor, want['factor'], rtol=1e-6)


@every_model
def test_sizes_and_scales(name):
  config, want = read(name), ROWS[name]['want']
  assert names.parameters(config) == want['parameters']
  assert config.head_dim == want['head_dim']
  assert config.max_positions == want['positions']
  assert (config.tied, config.norm_eps) == (want['tied'], want['eps'])
  assert [config.attn_softcap, config.logit_softcap] == want['caps']
  experts = config.experts and list(dataclasses.astuple(config.experts))
  assert experts == want['experts']
  scale = config.attn_scale or config.head_dim**-0.5
  np.testing.assert_allclose(scale, want['scale'], rtol=1e-6)
  scales = config.embed_scale, config.residual_scale, config.logit_divisor
  np.testing.assert_allclose(scales, want['scales'], rtol=1e-6)


@every_model
def test_windows_and_ropes_of_every_layer(name):
  config, want = read(name), ROWS[name]['want']
  assert ''.join(map(str, config.kind_of)) == want['layout']
  for kind, facts in zip(config.kinds, want['kinds'], strict=True):
    assert kind.window == facts['window']
    same_rope(kind.rope, config.head_dim, facts['rope'])
    if 'long' in facts:
      long = dataclasses.replace(kind.rope, long=True)
      same_rope(long, config.head_dim, facts['long'])


@every_model
def test_survives_the_way_out_and_in(name):
  config = read(name)
  assert families.from_hf(families.to_hf(config)) == config


@pytest.mark.parametrize(
  ('name', 'field', 'value'),
  [
    ('Mixtral-8x7B-Instruct-v0.1', 'rms_norm_eps', 1e-5),
    ('Mixtral-8x7B-Instruct-v0.1', 'rope_theta', 1e6),
    ('Phi-3-mini-4k-instruct', 'rms_norm_eps', 1e-5),
    ('Phi-4-mini-instruct', 'original_max_position_embeddings', 4096),
    ('OLMo-2-0425-1B-Instruct', 'rms_norm_eps', 1e-5),
    ('gemma-2-27b-it', 'hidden_activation', 'gelu_pytorch_tanh'),
  ],
)
def test_a_field_left_out_is_the_default_of_its_class(name, field, value):
  row = ROWS[name]['config']
  without = {k: v for k, v in row.items() if k != field}
  want = families.from_hf(row | {field: value})
  assert families.from_hf(without) == want
  if field == 'hidden_activation':
    assert families.from_hf(row | {field: None}) == want


REFUSED = {
  'activation=.geglu. is not supported': ('Falcon3-1B', 'activation', 'geglu'),
  'lm_head_bias=True is not': ('Phi-4-mini', 'lm_head_bias', True),
  'full_attn_mod=2 is not': ('Phi-4-mini', 'full_attn_mod', 2),
  'interpolate_factor=4 is not': ('Phi-4-mini', 'interpolate_factor', 4),
  'sliding_window_size=9 is not': ('gemma-2-27b', 'sliding_window_size', 9),
  'quantization_config=.* is not': (
    'gemma-3-27b',
    'quantization_config',
    {'bits': 4},
  ),
  'chunk_size must be above': (
    'Qwen2.5-7B-Instruct-1M',
    'dual_chunk_attention_config',
    {'chunk_size': 8, 'local_size': 8},
  ),
  r'unknown field\(s\) output_scale=2': ('Llama-3.2-1B', 'output_scale', 2),
}


@pytest.mark.parametrize('said', REFUSED)
def test_what_would_change_the_numbers_is_refused(said):
  start, field, value = REFUSED[said]
  name = next(name for name in ROWS if name.startswith(start))
  with pytest.raises(CheckpointError, match=said):
    read(name, **{field: value})


def test_leftovers_of_training_change_nothing():
  left = {'gradient_checkpointing': False, 'neftune_noise_alpha': 5}
  left |= {'unsloth_fixed': True, 'max_sequence_length': 2048}
  left |= {'head_dim': 64, 'sliding_window': None, 'quantization_config': None}
  name = 'Llama-3.2-1B-Instruct'
  assert read(name, **left) == read(name)


def test_an_unknown_field_of_a_rope_can_be_called_inert():
  # DeepSeek-R1-0528-Qwen3-8B: a name of vLLM's, which transformers ignores.
  row = ROWS['Qwen3-8B']['config']
  scaling = row['rope_scaling'] | {'attn_factor': 0.878}
  changed = row | {'rope_scaling': scaling}
  with pytest.raises(CheckpointError, match="with inert=.'attn_factor',"):
    families.from_hf(changed)
  got = families.from_hf(changed, inert=('attn_factor',))
  assert got == families.from_hf(row)


def test_yarn_of_a_gguf():
  name = 'rope.scaling.'
  fields = {f'{name}yarn_beta_fast': 16.0, f'{name}yarn_ext_factor': 1.0}
  got = gguf_fields._yarn(Fields(fields, 'the GGUF'))
  assert got == {'beta_fast': 16.0, 'beta_slow': None}
  with pytest.raises(CheckpointError, match='attn_factor=0.5 is not supported'):
    gguf_fields._yarn(Fields({f'{name}attn_factor': 0.5}, 'the GGUF'))
