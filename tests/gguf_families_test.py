"""Every family as llama.cpp's converter would write it, against its folder.

What the converter does to a family is written down here once more, from its
side: permuted rows, norms plus one, fused experts, frequencies as tensors.
"""

import json
from pathlib import Path

import fakes
import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_gguf

from persona_jax import models, trees
from persona_jax.models import families, gguf_file, names, rope, stream

GOLDEN = Path(__file__).parent / 'golden' / 'families.json'
ROWS = {row['name']: row['config'] for row in json.loads(GOLDEN.read_text())}
ARCHITECTURES = {
  'llama, tied': 'llama',
  'llama, linear rope': 'llama',
  'llama, yarn rope': 'llama',
  'falcon 3 (llama, wide heads)': 'llama',
  'mistral, window': 'llama',
  'mixtral': 'llama',
  'qwen 2, tied': 'qwen2',
  'qwen 3': 'qwen3',
  'qwen 3 moe': 'qwen3moe',
  'gemma 2': 'gemma2',
  'phi 3, short longrope': 'phi3',
  'phi 4 mini (long longrope, part of a head)': 'phi3',
  'olmo 2': 'olmo2',
  'granite 3': 'granite',
  'smollm 3': 'smollm3',
}
VOCABULARY = {
  'tokenizer.ggml.tokens': [*(f'<t{i}>' for i in range(60)), '<t0><t1>'],
  'tokenizer.ggml.token_type': [1] * 61,
  'tokenizer.ggml.merges': ['<t0> <t1>'],
  'tokenizer.ggml.bos_token_id': 1,
  'tokenizer.ggml.eos_token_id': 2,
}


def metadata(config, hf) -> dict:
  """The converter's numbers of a configuration."""
  rotary = dict(config.kinds[0].rope.scaling)
  found = {
    'block_count': config.layers,
    'context_length': config.max_positions,
    'embedding_length': config.features,
    'feed_forward_length': config.hidden,
    'attention.head_count': config.heads,
    'attention.head_count_kv': config.kv_heads,
    'attention.key_length': config.head_dim,
    'attention.value_length': config.head_dim,
    'attention.layer_norm_rms_epsilon': config.norm_eps,
    'rope.freq_base': config.kinds[0].rope.theta,
    'rope.dimension_count': int(
      config.head_dim * config.kinds[0].rope.fraction
    ),
    'attention.sliding_window': config.kinds[0].window,
    'attn_logit_softcapping': config.attn_softcap,
    'final_logit_softcapping': config.logit_softcap,
    'attention.scale': hf.get('attention_multiplier'),
    'embedding_scale': hf.get('embedding_multiplier'),
    'residual_scale': hf.get('residual_multiplier'),
    'logit_scale': hf.get('logits_scaling'),
    'rope.scaling.original_context_length': rotary.get(
      'original_max_position_embeddings'
    ),
  }
  if config.kinds[0].rope.kind in ('linear', 'yarn'):
    found['rope.scaling.type'] = config.kinds[0].rope.kind
    found['rope.scaling.factor'] = rotary['factor']
  if config.experts is not None:
    found |= {
      'feed_forward_length': 40,
      'expert_feed_forward_length': config.hidden,
      'expert_count': config.experts.count,
      'expert_used_count': config.experts.active,
    }
  return {k: v for k, v in found.items() if v is not None}


def permuted(array, heads):
  """A head's halves side by side: what llama.cpp's rotation expects."""
  halves = array.reshape(heads, 2, -1, *array.shape[1:])
  return halves.swapaxes(1, 2).reshape(array.shape)


def tensors(config, kind) -> dict:
  """Weights by formula under GGUF's names, changed as the converter does."""
  theirs = names.table(config, names.HUGGING_FACE)
  out = {}
  for ours, name in names.table(config, names.GGUF).items():
    for layer in range(config.layers):
      read = lambda expert=0, layer=layer, ours=ours: fakes.formula(
        theirs[ours].format(layer=layer, expert=expert),
        names.foreign(config, theirs)[
          theirs[ours].format(layer=layer, expert=expert)
        ],
      )
      array = read()
      if '_exps' in name:
        array = np.stack([read(i) for i in range(config.experts.count)])
      if kind in ('llama', 'granite', 'smollm3') and 'attn_q.w' in name:
        array = permuted(array, config.heads)
      if kind in ('llama', 'granite', 'smollm3') and 'attn_k.w' in name:
        array = permuted(array, config.kv_heads)
      if kind.startswith('gemma') and name.endswith('norm.weight'):
        array = array + 1
      out[name.format(layer=layer)] = array
  scaling = dict(config.kinds[0].rope.scaling)
  if 'short_factor' in scaling:
    out['rope_factors_short.weight'] = np.float32(scaling['short_factor'])
    out['rope_factors_long.weight'] = np.float32(scaling['long_factor'])
  return out


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_gguf_is_the_folder(name, tmp_path):
  hf, kind = ROWS[name], ARCHITECTURES[name]
  config = families.from_hf(hf)
  path = tmp_path / 'tiny.gguf'
  numbers = {f'{kind}.{k}': v for k, v in metadata(config, hf).items()}
  tiny_gguf.write(path, tensors(config, kind), kind, **(numbers | VOCABULARY))
  opened = gguf_file.read(path)
  assert same_ropes(config, opened.config)
  want = {**vars(config), 'kinds': None}
  if name == 'mistral, window':  # which GGUF calls a llama
    want['family'] = 'llama'
  if kind == 'gemma2':  # llama.cpp knows only the scales of the real sizes
    want['attn_scale'] = config.head_dim**-0.5
  for key, value in ({**vars(opened.config), 'kinds': None}).items():
    near = isinstance(value, float)
    assert value == (pytest.approx(want[key]) if near else want[key]), key
  params = trees.flatten(stream.parameters(opened, jnp.float32))
  folder = stream.parameters(fakes.opened(config), jnp.float32)
  assert params.keys() == trees.flatten(folder).keys()
  for leaf, array in trees.flatten(folder).items():
    np.testing.assert_allclose(params[leaf], array, atol=1e-6, err_msg=leaf)


def same_ropes(left, right) -> bool:
  """Whether two configurations turn alike, however they say it."""
  pairs = list(zip(left.kinds, right.kinds, strict=True))
  for a, b in pairs:
    assert a.window == b.window and (a.rope is None) == (b.rope is None)
    if a.rope is not None:
      one, two = (rope.table(x.rope, left.head_dim) for x in (a, b))
      np.testing.assert_allclose(one.frequencies, two.frequencies, rtol=1e-6)
      assert one.factor == pytest.approx(two.factor, rel=1e-6)
  return bool(pairs)


@pytest.mark.parametrize('original', [8192, 4096])
def test_llama_3_frequencies_become_its_numbers(tmp_path, original):
  scaling = {
    'rope_type': 'llama3',
    'rope_theta': 5e5,
    'factor': 32.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': original,
  }
  hf = ROWS['llama, tied'] | {
    'rope_parameters': scaling,
    'head_dim': 64,
    'max_position_embeddings': 131072,
  }
  config = families.from_hf(hf)
  plain = rope.table(models.config.Rope(5e5), 64).frequencies
  factors = plain / rope.table(config.kinds[0].rope, 64).frequencies
  numbers = metadata(config, hf)
  del numbers['rope.scaling.original_context_length']
  numbers = {f'llama.{k}': v for k, v in numbers.items()}
  weights = tensors(config, 'llama') | {'rope_freqs.weight': factors}
  path = tmp_path / 'tiny.gguf'
  tiny_gguf.write(path, weights, 'llama', **(numbers | VOCABULARY))
  got = gguf_file.read(path).config
  assert same_ropes(config, got)
  # Those of the released models come back by name, others as they are.
  assert (got == config) == (original == 8192)
  again = families.from_hf(families.to_hf(got))
  assert same_ropes(config, again)


def test_gemma_3_has_two_ropes_and_five_windows_of_six(tmp_path):
  hf = ROWS['gemma 3'] | {'num_hidden_layers': 7, 'layer_types': None}
  config = families.from_hf(hf)
  numbers = metadata(config, hf) | {
    'rope.freq_base': 500.0,
    'rope.scaling.type': 'linear',
    'rope.scaling.factor': 2.0,
  }
  numbers = {f'gemma3.{k}': v for k, v in numbers.items()}
  path = tmp_path / 'tiny.gguf'
  weights = tensors(config, 'gemma3')
  tiny_gguf.write(path, weights, 'gemma3', **(numbers | VOCABULARY))
  got = gguf_file.read(path).config
  assert got.layout == config.layout == (0, 0, 0, 0, 0, 1, 0)
  assert [k.window for k in got.kinds] == [7, None]
  assert got.kinds[1] == config.kinds[1]
  assert got.kinds[0].rope == models.config.Rope(10_000.0)


def test_all_kinds_of_a_real_quantisation_load(tmp_path):
  kinds = gguf.GGMLQuantizationType
  weights = {
    k: (gguf.quants.quantize(v, kinds.Q8_0), kinds.Q8_0) if v.ndim == 2 else v
    for k, v in tiny_gguf.weights(features=32, hidden=64, heads=2).items()
  }
  path = tmp_path / 'tiny.gguf'
  tiny_gguf.write(
    path,
    weights,
    **{'llama.embedding_length': 32, 'llama.feed_forward_length': 64},
  )
  model = models.load(path)
  tokens = jnp.zeros((1, 3), jnp.int32)
  where = jnp.arange(3)[None]
  hidden, _ = model.apply(model.variables, tokens, where)
  assert np.isfinite(hidden).all()
