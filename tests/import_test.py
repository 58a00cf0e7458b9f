"""Checkpoints in and out: numbers, names, and what is said of bad files."""

import json
import subprocess
import sys
from pathlib import Path

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from jax.sharding import Mesh, PartitionSpec
from safetensors import numpy as safetensors_numpy

from persona_jax import models, taps
from persona_jax.models import decoder, source
from persona_jax.models.config import Kind, Rope

GOLDEN = Path(__file__).parent / 'golden'
WEIGHTS = 'model.safetensors'


def golden(name):
  return json.loads((GOLDEN / f'{name}.json').read_text())


def run(model, ids):
  tokens = jnp.asarray(ids, jnp.int32).reshape(1, -1)
  hidden, _ = model.apply(model.variables, tokens, positions(tokens), None)
  return model.unembed(model.variables, hidden)[0]


def positions(tokens):
  return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)


@pytest.fixture
def config():
  return models.DecoderConfig(
    vocab=48,
    features=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    hidden=24,
    kinds=(Kind(Rope(1e4)),),
    norm_eps=1e-6,
  )


@pytest.fixture
def model(config, key):
  return speaker(config, decoder.init(config, key))


def speaker(config, variables):
  """A model of random weights that knows letters and two control tokens."""
  vocabulary = {letter: i for i, letter in enumerate('abcdefgh')}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  tokenizer.add_special_tokens(['<|endoftext|>', '<|im_end|>'])
  apply, unembed = decoder.functions(config)
  return models.LanguageModel(
    name='tiny',
    config=config,
    variables=variables,
    apply=apply,
    unembed=unembed,
    tokenizer=tokenizer,
    template='{{ messages }} é',
    special={'eos': '<|im_end|>'},
    stop_ids=(8, 9),
  )


@pytest.fixture
def folder(model, tmp_path):
  models.save(model, tmp_path / 'tiny')
  return tmp_path / 'tiny'


# The real model, against transformers.


@pytest.mark.parametrize('row', golden('tokens'))
def test_tokens_are_those_of_transformers(smollm, row):
  encoded = smollm.tokenizer.encode(row['text'], add_special_tokens=False)
  assert encoded.ids == row['ids']


def test_blanks_before_digits_stay_together(smollm):
  # As SmolLM2's own tokenizer.json and llama.cpp split them; transformers'
  # reading of a GGUF forgets the split at digits and says 'ĠĠĠ', 'Ġ'.
  encoded = smollm.tokenizer.encode('a    12', add_special_tokens=False)
  assert encoded.tokens == ['a', 'ĠĠĠĠ', '1', '2']


def test_logits_are_those_of_transformers(smollm):
  want = golden('model')['mixed']
  logits = run(smollm, want['ids'])[-3:]
  got = logits[:, np.array(want['vocabulary'])]
  np.testing.assert_allclose(got, want['logits'], atol=1e-3)
  total = jax.nn.logsumexp(logits, axis=-1)
  np.testing.assert_allclose(total, want['logsumexp'], atol=1e-3)


def test_blocks_are_those_of_transformers(smollm):
  want = golden('model')['mixed']
  kept = taps.keep(smollm.apply, lambda tap, x: x[0, -1])
  tokens = jnp.asarray([want['ids']])
  _, last = kept(smollm.variables, tokens, positions(tokens), None)
  norms = np.linalg.norm(last, axis=-1)
  np.testing.assert_allclose(norms, want['block_norms'], rtol=1e-4)
  np.testing.assert_allclose(last[:, :8], want['block_features'], atol=2e-3)


@pytest.mark.parametrize('i', range(5))
def test_greedy_tokens_are_those_of_transformers(smollm, i):
  # One pass over prompt and answer: each token is the most likely next one.
  want = golden('model')['greedy'][i]
  logits = run(smollm, want['ids'] + want['new'])
  start = len(want['ids']) - 1
  assert np.argmax(logits[start:-1], axis=-1).tolist() == want['new']


def test_smollm_ends_its_lines(smollm):
  assert smollm.special['eos'] == '<|im_end|>'
  assert smollm.stop_ids == (0, 2)
  assert smollm.sha256 == source.WHEELS['smollm2-135m'].sha256


# Out and in again.


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  'kind',
  [
    {},
    {'family': 'qwen2', 'qkv_bias': True},
    {'family': 'qwen3', 'qk_norm': 'head'},
  ],
  ids=str,
)
def test_export_and_import_are_exact(config, key, tmp_path, kind, dtype, tied):
  config = models.DecoderConfig(**vars(config) | kind | {'tied': tied})
  variables = jax.tree.map(lambda x: x.astype(dtype), decoder.init(config, key))
  model = speaker(config, variables)
  models.save(model, tmp_path / 'new')
  again = models.load(tmp_path / 'new', dtype=dtype)
  fakes.same(again.variables, variables)
  assert again.config == config
  assert again.template == model.template
  assert again.special == model.special
  assert again.stop_ids == model.stop_ids
  assert again.tokenizer.to_str() == model.tokenizer.to_str()


def test_real_model_survives_export(smollm, tmp_path):
  models.save(smollm, tmp_path / 'smollm')
  again = models.load(tmp_path / 'smollm')
  fakes.same(again.variables, smollm.variables)
  assert again.config == smollm.config
  assert again.stop_ids == smollm.stop_ids


def test_weights_arrive_on_the_mesh(folder, model):
  ways = 4 if jax.device_count() >= 4 else 1
  mesh = Mesh(np.array(jax.devices()[:ways]), ('model',))
  rules = (
    (r'mlp/(gate|up)/kernel', PartitionSpec(None, 'model')),
    (r'', PartitionSpec()),
  )
  loaded = models.load(folder, mesh=mesh, rules=rules)
  fakes.same(loaded.variables, model.variables)
  up = loaded.variables['params']['layers']['mlp']['up']['kernel']
  assert up.sharding.spec == PartitionSpec(None, 'model')
  assert up.addressable_shards[0].data.shape == (2, 24 // ways, 16)


def test_import_is_light():
  heavy = 'gguf safetensors tokenizers jinja2'
  code = (
    'import sys, persona_jax.models, persona_jax.text.chat\n'
    f'print(*set({heavy.split()}) & set(sys.modules))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert not done.stdout.strip()


# Bad input: one sentence that says what, why and how out.


def test_all_problems_of_a_folder_come_at_once(folder):
  tensors = safetensors_numpy.load_file(folder / WEIGHTS)
  del tensors['model.norm.weight']
  name = 'model.layers.1.mlp.up_proj.weight'
  tensors[name] = np.ascontiguousarray(tensors[name].T)
  tensors['model.layers.0.self_attn.surprise'] = np.zeros((3,), np.float32)
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.zeros((2,))
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  safetensors_numpy.save_file(tensors, folder / WEIGHTS)
  with pytest.raises(ValueError) as error:
    models.load(folder)
  said = str(error.value)
  assert '3 problem(s)' in said
  assert 'missing model.norm.weight (16,)' in said
  assert f'{name} is (16, 24), not (24, 16)' in said
  assert 'unexpected model.layers.0.self_attn.surprise (3,)' in said


@pytest.mark.parametrize('share', [0.001, 0.999])
def test_truncated_gguf(gguf_path, tmp_path, share):
  short = tmp_path / 'short.gguf'
  whole = Path(gguf_path).read_bytes()
  short.write_bytes(whole[: int(share * len(whole))])
  with pytest.raises(ValueError, match=r'short\.gguf ends early or is damaged'):
    models.load(short)


def with_tokens(folder, *added):
  """A tokenizer of 48 tokens, all that the embedding has, and more."""
  letters = {chr(0x4E00 + i): i for i in range(48)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
  for token in added:
    special = token.startswith('<|')
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=special)])
  tokenizer.save(str(folder / 'tokenizer.json'))


def test_a_tokenizer_larger_than_the_embedding(folder):
  with_tokens(folder, '<|image|>', 'word')
  with pytest.raises(models.CheckpointError, match='has 50 tokens.* 48 rows'):
    models.load(folder)


def test_a_control_token_without_a_row_is_text(folder):
  with_tokens(folder, '<|image|>')
  tokenizer = models.load(folder).tokenizer
  assert max(tokenizer.get_vocab().values()) == 47
  with_tokens(folder)
  assert models.load(folder).tokenizer.get_vocab_size() == 48


def test_not_a_gguf(tmp_path):
  (tmp_path / 'web.gguf').write_text('<html>')
  with pytest.raises(ValueError, match=r'web\.gguf is not a GGUF'):
    models.load(tmp_path / 'web.gguf')
