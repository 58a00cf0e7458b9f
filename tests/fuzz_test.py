"""Readers of damaged checkpoints: one kind of error, and soon.

Files are damaged by bytes (headers) and by values (JSON). What is then read
must either open with the shapes that it announces, or raise CheckpointError.
"""

import contextlib
import copy
import functools
import json
import math
import resource
import struct
import tempfile
import warnings
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import tiny_gguf
import tokenizers
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy

from persona_jax import models
from persona_jax.models import folder, gguf_file, shards

FEW, MANY = 120, 2500  # examples of each test, by default and when slow
SETTINGS = dict(
  derandomize=True,
  deadline=5000,  # ms: on a busy machine; one example takes about 10
  database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
)
GIBIBYTE = 2**30
HUGE = (0, 1, 2**31 - 1, 2**32, 2**61, 2**63 - 1, 2**63, 2**64 - 1)


def run(strategy, check, count):
  """Runs `check` on so many draws, the same ones every time."""
  test = hypothesis.given(strategy)(lambda x: check(x))
  with little_memory():
    hypothesis.settings(max_examples=count, **SETTINGS)(test)()


@contextlib.contextmanager
def little_memory():
  """Half a GiB more than now, or a MemoryError."""
  pages = int(Path('/proc/self/statm').read_text().split()[0])
  before = resource.getrlimit(resource.RLIMIT_AS)
  limit = pages * resource.getpagesize() + GIBIBYTE // 2
  resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_AS, before)


COUNTS = pytest.mark.parametrize(
  'count', [FEW, pytest.param(MANY, marks=pytest.mark.slow)]
)


# The files that are damaged.


@functools.cache
def gguf_bytes(model='gpt2'):
  tokens = ['<unk>', '<s>', *'abcdeh▁', '<0x0A>', 'ab', 'he']
  kinds = [2, 3] + [1] * 7 + [6, 1, 1]
  changes = {
    'tokenizer.ggml.model': model,
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': kinds,
    'tokenizer.ggml.scores': [-float(i) for i in range(len(tokens))],
    'tokenizer.ggml.merges': ['a b', 'h e'],
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 1,
    'tokenizer.ggml.add_bos_token': True,
    'general.alignment': 32,
  }
  with tempfile.TemporaryDirectory() as room:
    path = Path(room, 'x.gguf')
    tiny_gguf.write(path, tiny_gguf.weights(vocab=len(tokens)), **changes)
    return path.read_bytes()


def header_of_gguf(data):
  shapes = tiny_gguf.shapes(vocab=12).values()
  return len(data) - 4 * sum(math.prod(shape) for shape in shapes)


SHARD = 'model-00001-of-00001.safetensors'
CONFIG = {
  'model_type': 'llama',
  'architectures': ['LlamaForCausalLM'],
  'vocab_size': 12,
  'hidden_size': 8,
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'num_key_value_heads': 1,
  'head_dim': 4,
  'intermediate_size': 12,
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-6,
  'rope_theta': 1e4,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4},
  'rope_scaling': None,
  'layer_types': ['full_attention'],
  'tie_word_embeddings': True,
  'max_position_embeddings': 64,
  'eos_token_id': [1, 2],
  'quantization_config': None,
}


@functools.cache
def folder_files():
  """A small folder by file name: bytes, or a record that JSON can hold."""
  layer = 'model.layers.0.'
  names = {
    'self_attn.q_proj': (8, 8),
    'self_attn.k_proj': (4, 8),
    'self_attn.v_proj': (4, 8),
    'self_attn.o_proj': (8, 8),
    'mlp.gate_proj': (12, 8),
    'mlp.up_proj': (12, 8),
    'mlp.down_proj': (8, 12),
    'input_layernorm': (8,),
    'post_attention_layernorm': (8,),
  }
  shapes = {f'{layer}{k}.weight': v for k, v in names.items()}
  shapes |= {'model.embed_tokens.weight': (12, 8), 'model.norm.weight': (8,)}
  tensors = {k: np.zeros(v, np.float32) for k, v in shapes.items()}
  vocabulary = {letter: i for i, letter in enumerate('abcdefghij')}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  tokenizer.add_special_tokens(['<s>', '</s>'])
  tokenizer.normalizer = tokenizers.normalizers.NFC()
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return {
    SHARD: safetensors_numpy.save(tensors, {'format': 'pt'}),
    shards.INDEX: {
      'metadata': {'total_size': 1},
      'weight_map': {name: SHARD for name in shapes},
    },
    'config.json': CONFIG,
    'generation_config.json': {'eos_token_id': [1], 'do_sample': True},
    'tokenizer.json': json.loads(tokenizer.to_str()),
    'tokenizer_config.json': {
      'bos_token': '<s>',
      'eos_token': {'content': '</s>', 'special': True},
      'chat_template': [{'name': 'default', 'template': '{{ messages }}'}],
    },
    'special_tokens_map.json': {'unk_token': '<s>', 'pad_token': None},
  }


JSON = sorted(k for k, v in folder_files().items() if isinstance(v, dict))


def written(room, **changes):
  """The folder, with some files replaced by bytes."""
  for name, content in (folder_files() | changes).items():
    if not isinstance(content, bytes):
      content = json.dumps(content).encode()
    deep = b'[' * 10**5 + b']' * 10**5
    content = content.replace(f'"{DEEP}"'.encode(), deep)
    Path(room, name).write_bytes(content)


# Damage.

DEEP = '@'  # stands for lists in lists, a hundred thousand deep
JUNK = (
  *(None, True, False, -1, 0, 1, 7, 2**31, 2**63, 10**40, -(2**63)),
  *(0.5, -0.0, 1e308, math.nan, math.inf, '', 'x', '\ud800', DEEP),
  *([], [None], [1, 'x'], [[[]]], {}, {'x': {}}, {'type': 'x'}, {'content': 1}),
)


@st.composite
def damaged(draw, data, header):
  """`data` with up to four changes among its first `header` bytes."""
  out = bytearray(data)
  for _ in range(draw(st.integers(1, 4))):
    at = draw(st.integers(0, min(header, len(out))))
    how = draw(st.sampled_from(('flip', 'insert', 'delete', 'cut', 'count')))
    if how == 'flip' and at < len(out):
      out[at] ^= draw(st.integers(1, 255))
    elif how == 'insert':
      out[at:at] = draw(st.binary(min_size=1, max_size=9))
    elif how == 'delete':
      del out[at : at + draw(st.integers(1, 9))]
    elif how == 'cut':
      del out[at:]
    else:
      out[at : at + 8] = struct.pack('<Q', draw(st.sampled_from(HUGE)))
  return bytes(out)


def places(value, at=()):
  """The ways into a JSON value, itself included."""
  yield at
  rows = value.items() if isinstance(value, dict) else ()
  rows = enumerate(value[:3]) if isinstance(value, list) else rows
  for key, inner in rows:
    yield from places(inner, (*at, key))


@st.composite
def garbled(draw, record):
  """The text of a JSON record with up to three values changed."""
  out = copy.deepcopy(record)
  for _ in range(draw(st.integers(1, 3))):
    *way, last = ('root', *draw(st.sampled_from(list(places(out)))))
    box = {'root': out}
    room = functools.reduce(lambda room, key: room[key], way, box)
    if last != 'root' and draw(st.integers(0, 3)) == 0:
      del room[last]
    else:
      room[last] = copy.deepcopy(draw(st.sampled_from(JUNK)))
    out = box['root']
  return json.dumps(out).encode()


# What must hold.


def check(read, path):
  """Opens `path`, or sees CheckpointError; nothing is warned of."""
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    try:
      opened = read(path)
      arrays = {
        name: opened.read(name)[(slice(None),) * len(shape)]
        for name, shape in opened.shapes.items()
      }
    except models.CheckpointError as error:
      assert str(error)
      return
  assert {k: v.shape for k, v in arrays.items()} == dict(opened.shapes)
  assert opened.template is None or isinstance(opened.template, str)
  assert all(isinstance(text, str) for text in opened.special.values())
  assert all(isinstance(i, int) for i in opened.stop_ids)


def check_gguf(data):
  with tempfile.TemporaryDirectory() as room:
    path = Path(room, 'x.gguf')
    path.write_bytes(data)
    check(gguf_file.read, path)


def check_folder(**changes):
  with tempfile.TemporaryDirectory() as room:
    written(room, **changes)
    check(folder.read, Path(room))


def test_undamaged_files_open(tmp_path):
  for model in ('gpt2', 'llama'):
    (tmp_path / 'x.gguf').write_bytes(gguf_bytes(model))
    assert len(gguf_file.read(tmp_path / 'x.gguf').shapes) == 11
  written(tmp_path)
  opened = folder.read(tmp_path)
  assert len(opened.shapes) == 11
  assert opened.special == {'bos': '<s>', 'eos': '</s>', 'unk': '<s>'}


@pytest.mark.parametrize('model', ['gpt2', 'llama'])
@COUNTS
def test_gguf(model, count):
  data = gguf_bytes(model)
  run(damaged(data, header_of_gguf(data)), check_gguf, count)


@COUNTS
def test_safetensors(count):
  data = folder_files()[SHARD]
  header = 8 + struct.unpack('<Q', data[:8])[0]
  run(damaged(data, header), lambda x: check_folder(**{SHARD: x}), count)


@pytest.mark.parametrize('name', JSON)
@COUNTS
def test_json(name, count):
  record = folder_files()[name]
  text = json.dumps(record).encode()
  rarely = damaged(text, len(text))
  either = st.one_of(garbled(record), garbled(record), rarely)
  run(either, lambda x: check_folder(**{name: x}), count)


# One value after the other, whatever the draws above have missed.


@pytest.mark.parametrize('field', CONFIG)
def test_every_field_of_a_config(field):
  with little_memory():
    for junk in JUNK:
      check_folder(**{'config.json': CONFIG | {field: junk}})


@pytest.mark.parametrize('field', tiny_gguf.NUMBERS)
def test_every_number_of_a_gguf(tmp_path, field):
  with little_memory():
    for number in (0, 1, 3, 7, 2**20, 2**31, 2**32 - 1):
      tiny_gguf.write(tmp_path / 'x.gguf', **{f'llama.{field}': number})
      check(gguf_file.read, tmp_path / 'x.gguf')


# Numbers that are too large, wherever a number may stand: no allocation.


def sweep(step):
  """Every so many bytes of the headers, made huge, in half a GiB."""
  for start, huge in enumerate(HUGE[2:]):
    number = struct.pack('<Q', huge)
    for model in ('gpt2', 'llama'):
      data = gguf_bytes(model)
      for at in range(start, header_of_gguf(data), step):
        check_gguf(data[:at] + number + data[at + 8 :])
    check_folder(**{SHARD: number + folder_files()[SHARD][8:]})


@pytest.mark.parametrize('step', [29, pytest.param(1, marks=pytest.mark.slow)])
def test_huge_counts_cost_nothing(step):
  with little_memory():
    sweep(step)
