"""Hugging Face folders: bytes, records, and what is said of bad ones.

Those that need eight fake devices run in a process of their own:
XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest -m devices
"""

import json
import resource
import socket
import struct
import subprocess
import sys
import types
import weakref

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import tokenizers
from flax import traverse_util
from safetensors import numpy as safetensors_numpy

from persona_jax import models, trees
from persona_jax.learn import sharding
from persona_jax.models import families, folder, names, shards

WEIGHTS, INDEX = shards.WEIGHTS, shards.INDEX
FIRST = 'model-00001-of-00003.safetensors'
SETTINGS = {
  'model_type': 'llama',
  'vocab_size': 48,
  'hidden_size': 16,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'intermediate_size': 24,
  'max_position_embeddings': 64,
}
TEMPLATE = "{% for m in messages %}\r\n  {{ m['content'] }} é\n\n{% endfor %}\n"


def speaker(dtype=jnp.float32, **settings):
  """What is exported of a model: random weights and a small tokenizer."""
  config = families.from_hf(SETTINGS | settings)
  random = np.random.default_rng(0)
  params = {
    tuple(name.split('/')): jnp.asarray(random.normal(size=shape), dtype)
    for name, shape in names.shapes(config).items()
  }
  letters = {letter: i for i, letter in enumerate('abcdefgh')}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
  tokenizer.add_special_tokens(['<|endoftext|>', '<|im_end|>'])
  return types.SimpleNamespace(
    config=config,
    variables={'params': traverse_util.unflatten_dict(params)},
    tokenizer=tokenizer,
    template=TEMPLATE,
    special={'bos': 'a', 'eos': '<|im_end|>'},
    stop_ids=(8, 9),
  )


@pytest.fixture(scope='module')
def model():
  return speaker()


@pytest.fixture
def whole(model, tmp_path):
  """An export in one file."""
  folder.write(model, tmp_path / 'whole')
  return tmp_path / 'whole'


@pytest.fixture
def parts(model, tmp_path):
  """The same export in three shards."""
  folder.write(model, tmp_path / 'parts', shard_bytes=10_000)
  return tmp_path / 'parts'


def change(file, **fields):
  """Sets fields of a JSON file."""
  record = json.loads(file.read_text()) if file.exists() else {}
  file.write_text(json.dumps(record | fields))


# Out and in again.


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('shard_bytes', [10**9, 10_000, 1])
def test_exports_come_back_bit_for_bit(tmp_path, dtype, shard_bytes):
  model = speaker(dtype, tie_word_embeddings=True)
  folder.write(model, tmp_path / 'new', shard_bytes=shard_bytes)
  again = models.load(tmp_path / 'new', dtype=dtype)
  fakes.same(again.variables, model.variables)
  assert again.config == model.config
  assert again.template == model.template
  assert again.special == model.special
  assert again.stop_ids == model.stop_ids
  assert again.tokenizer.to_str() == model.tokenizer.to_str()


def test_attention_is_computed_as_asked(whole):
  with pytest.raises(ValueError, match="by 'flash'"):
    models.load(whole, attend='flash')


def test_one_file_needs_no_index(whole, model):
  assert not (whole / INDEX).exists()
  loaded = safetensors_numpy.load_file(whole / WEIGHTS)
  up = model.variables['params']['layers']['mlp']['up']['kernel']
  np.testing.assert_array_equal(
    loaded['model.layers.1.mlp.up_proj.weight'], up[1]
  )
  with safetensors.safe_open(whole / WEIGHTS, 'numpy') as file:
    assert file.metadata() == {'format': 'pt'}
  (length,) = struct.unpack('<Q', (whole / WEIGHTS).read_bytes()[:8])
  assert length % 8 == 0
  assert (whole / WEIGHTS).stat().st_mode & 0o444 == 0o444


def test_shards_are_full_and_indexed(parts, whole):
  index = json.loads((parts / INDEX).read_text())
  files = sorted(file.name for file in parts.glob('*.safetensors'))
  assert files == [f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3)]
  found, total = {}, 0
  for file in files:
    tensors = safetensors_numpy.load_file(parts / file)
    assert {k: file for k in tensors}.items() <= index['weight_map'].items()
    assert sum(x.nbytes for x in tensors.values()) <= 10_000
    total += sum(x.nbytes for x in tensors.values())
    found |= tensors
  assert found.keys() == index['weight_map'].keys()
  assert index['metadata']['total_size'] == total
  fakes.same(found, safetensors_numpy.load_file(whole / WEIGHTS))


def test_a_tensor_larger_than_a_shard_is_alone_in_its_own():
  sizes = [1, 1, 5, 1, 2]  # in float32s; a shard holds two
  rows = [shards.Tensor(str(n), (n,), np.float32, None) for n in sizes]
  lengths = [[t.shape[0] for t in shard] for shard in shards.split(rows, 8)]
  assert lengths == [[1, 1], [5], [1], [2]]


def test_one_tensor_is_held_at_a_time(tmp_path):
  fetched = []

  def fetch():
    assert all(array() is None for array in fetched)
    fetched.append(weakref.ref(array := np.ones((3, 2), np.float32)))
    return array.T  # not contiguous either

  rows = [shards.Tensor(n, (2, 3), np.float32, fetch) for n in 'abc']
  shards.write(tmp_path, rows, 10**9)
  assert len(fetched) == 3
  fakes.same(
    safetensors_numpy.load_file(tmp_path / WEIGHTS),
    {n: np.ones((2, 3), np.float32) for n in 'abc'},
  )


@pytest.mark.parametrize(
  'view', [lambda x: x[::2], lambda x: x.reshape(2, 3).T, lambda x: x[0]]
)
def test_views_are_written_in_order(tmp_path, view):
  want = view(np.arange(6, dtype=np.float32))
  row = shards.Tensor('a', want.shape, want.dtype, lambda: want)
  shards.write(tmp_path, [row], 10**9)
  fakes.same(safetensors_numpy.load_file(tmp_path / WEIGHTS), {'a': want})


def test_unstacked_layers_are_exported_alike(model, whole, tmp_path):
  apart = types.SimpleNamespace(**vars(model))
  apart.variables = trees.unstack_layers(model.variables)
  folder.write(apart, tmp_path / 'apart')
  assert (tmp_path / 'apart' / WEIGHTS).read_bytes() == (
    whole / WEIGHTS
  ).read_bytes()


def test_transfers_are_meant(model, tmp_path):
  with jax.transfer_guard('disallow'):
    folder.write(model, tmp_path / 'new')


def test_hundreds_of_shards_need_few_descriptors(tmp_path):
  model = speaker(num_hidden_layers=30)
  folder.write(model, tmp_path / 'many', shard_bytes=1)
  assert len(list(tmp_path.glob('many/*.safetensors'))) == 30 * 9 + 3
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
  try:
    loaded = models.load(tmp_path / 'many')
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
  fakes.same(loaded.variables, model.variables)


@pytest.mark.parametrize('name', ['whole', 'parts'])
def test_nothing_is_overwritten(model, request, name):
  path = request.getfixturevalue(name)
  before = (path / 'config.json').stat().st_mtime_ns
  with pytest.raises(ValueError, match='choose another folder'):
    folder.write(model, path)
  assert (path / 'config.json').stat().st_mtime_ns == before


def test_a_failed_export_leaves_nothing(model, tmp_path):
  broken = types.SimpleNamespace(**vars(model))
  broken.tokenizer = None
  with pytest.raises(AttributeError):
    folder.write(broken, tmp_path / 'new')
  assert not list(tmp_path.iterdir())


def test_integers_are_not_exported(model, tmp_path):
  broken = types.SimpleNamespace(**vars(model))
  whole = lambda x: x.astype(jnp.int32)
  broken.variables = jax.tree.map(whole, model.variables)
  with pytest.raises(ValueError, match='is int32; only float32, float16'):
    folder.write(broken, tmp_path / 'new')


@pytest.mark.devices
@pytest.mark.parametrize('shape', [{'fsdp': 8}, {'fsdp': 4, 'tensor': 2}])
def test_sharded_parameters_are_exported_alike(model, whole, tmp_path, shape):
  mesh = sharding.make_mesh(shape)
  settings = {'mesh': mesh, 'rules': sharding.RULES}
  loaded = models.load(whole, **settings)
  up = loaded.variables['params']['layers']['mlp']['up']['kernel']
  assert not up.sharding.is_fully_replicated
  folder.write(loaded, tmp_path / 'again', shard_bytes=10_000)
  again = models.load(tmp_path / 'again', **settings)
  fakes.same(again.variables, model.variables)


TWO = """
import sys, types, jax, numpy as np
rank, address, source, target = sys.argv[1:]
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(address, 2, int(rank))
from persona_jax import models
from persona_jax.learn import sharding
from persona_jax.models import folder
mesh = sharding.make_mesh({'fsdp': jax.device_count()})
model = models.load(source, mesh=mesh, rules=sharding.RULES)
up = model.variables['params']['layers']['mlp']['up']['kernel']
assert not up.is_fully_addressable
folder.write(model, target, shard_bytes=10_000)
try:
  folder.write(model, target)
except ValueError as error:
  assert 'choose another' in str(error)
else:
  raise SystemExit('written twice')
"""


@pytest.mark.devices
def test_two_processes_write_one_folder(parts, tmp_path):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  words = [sys.executable, '-c', TWO]
  rest = [address, str(parts), str(tmp_path / 'again')]
  pair = [
    subprocess.Popen([*words, str(rank), *rest], stderr=subprocess.PIPE)
    for rank in range(2)
  ]
  for process in pair:
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said.decode()
  for file in parts.iterdir():
    assert file.read_bytes() == (tmp_path / 'again' / file.name).read_bytes()


# Records.


def test_the_template_stands_where_old_and_new_readers_look(whole):
  assert (whole / 'chat_template.jinja').read_bytes() == TEMPLATE.encode()
  about = json.loads((whole / 'tokenizer_config.json').read_text())
  assert about['chat_template'] == TEMPLATE
  (whole / 'chat_template.jinja').write_text('newer')
  assert folder.read(whole).template == 'newer'
  (whole / 'chat_template.jinja').unlink()
  assert folder.read(whole).template == TEMPLATE


@pytest.mark.parametrize(
  ('given', 'read'),
  [
    ([('tool_use', 'x'), ('default', 'y')], 'y'),
    ([('rag', 'x')], 'x'),
    ([], None),
  ],
)
def test_named_templates(whole, given, read):
  (whole / 'chat_template.jinja').unlink()
  rows = [{'name': name, 'template': text} for name, text in given]
  change(whole / 'tokenizer_config.json', chat_template=rows)
  assert folder.read(whole).template == read


def test_no_template(model, tmp_path):
  silent = types.SimpleNamespace(**vars(model) | {'template': None})
  folder.write(silent, tmp_path / 'new')
  assert not (tmp_path / 'new' / 'chat_template.jinja').exists()
  assert folder.read(tmp_path / 'new').template is None


def test_special_tokens_as_records_and_in_their_old_file(whole):
  change(
    whole / 'tokenizer_config.json',
    eos_token={'content': '<|endoftext|>', 'lstrip': False},
    bos_token=None,
  )
  change(whole / 'special_tokens_map.json', bos_token='b', eos_token='no')
  assert folder.read(whole).special == {'bos': 'b', 'eos': '<|endoftext|>'}


def test_ids_of_the_records(whole):
  config = json.loads((whole / 'config.json').read_text())
  assert config['torch_dtype'] == 'float32'
  # Fields left out would be Llama's own: 1, 2.
  fields = ('bos_token_id', 'eos_token_id', 'pad_token_id')
  assert [config[field] for field in fields] == [0, 9, None]
  said = json.loads((whole / 'generation_config.json').read_text())
  assert said == {'bos_token_id': 0, 'eos_token_id': [8, 9]}
  change(whole / 'generation_config.json', eos_token_id=[0, 5])
  assert folder.read(whole).stop_ids == (0, 5, 8, 9)


# Bad folders: one sentence that says what, why and how out.


def refused(path, *said):
  with pytest.raises(models.CheckpointError) as error:
    models.load(path)
  for part in said:
    assert part in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json', WEIGHTS])
def test_folder_without_a_file(whole, name):
  (whole / name).unlink()
  refused(whole, f'has no {name}', 'needs config.json, tokenizer.json and')


def test_folders_of_other_kinds(whole):
  (whole / WEIGHTS).rename(whole / 'pytorch_model.bin')
  refused(whole, 'pytorch_model.bin would run code', 'save_pretrained')
  (whole / 'x.gguf').touch()
  (whole / 'config.json').unlink()
  refused(whole, f'of its GGUF files give one: {whole / "x.gguf"}.')


def test_a_tokenizer_that_is_not_read(whole):
  (whole / 'tokenizer.json').rename(whole / 'tokenizer.model')
  refused(whole, 'tokenizer.model is not read', 'AutoTokenizer')


def test_all_missing_shards_are_named(parts):
  for i in (1, 3):
    (parts / f'model-0000{i}-of-00003.safetensors').unlink()
  refused(parts, 'lacks 2 of the 3 shards', FIRST, 'model-00003-of-00003')


def test_all_problems_of_an_index_come_at_once(parts):
  mapped = json.loads((parts / INDEX).read_text())['weight_map']
  tensors = safetensors_numpy.load_file(parts / FIRST)
  gone, double, *_ = tensors
  unnamed = 'model.layers.1.mlp.down_proj.weight'
  del mapped[unnamed]
  second = parts / FIRST.replace('1', '2', 1)
  other = safetensors_numpy.load_file(second)
  other['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.zeros(2)
  safetensors_numpy.save_file(other | {double: tensors[double]}, second)
  del tensors[gone]
  safetensors_numpy.save_file(tensors, parts / FIRST)
  change(parts / INDEX, weight_map=mapped)
  refused(
    parts,
    'does not fit its shards; 3 problem(s)',
    f'{gone} is not in {FIRST}',
    f'{double} is in {FIRST} and {second.name}',
    f'{unnamed} of model-00003-of-00003.safetensors is not in the index',
  )


def test_long_lists_are_cut(parts):
  change(parts / INDEX, weight_map={str(i): FIRST for i in range(90)})
  count = 90 + len(safetensors_numpy.load_file(parts / FIRST))
  refused(parts, f'{count} problem(s)', f' and {count - 20} more. Fetch')


@pytest.mark.parametrize('mapped', [None, [], {}, 'x'])
def test_an_index_without_a_map(parts, mapped):
  change(parts / INDEX, weight_map=mapped)
  refused(parts, 'weight_map is no table')


@pytest.mark.parametrize(
  'shard',
  ['../x.safetensors', '/etc/x.safetensors', 'a\\x.safetensors', 'x.bin', 3],
)
def test_shards_outside_the_folder_are_not_opened(parts, shard):
  change(parts / INDEX, weight_map={'model.norm.weight': shard})
  refused(parts, f'{shard!r} is not the name of a file in this folder')


@pytest.mark.parametrize('name', [WEIGHTS, FIRST])
@pytest.mark.parametrize(
  'damage',
  [
    lambda data: data[:-100],
    lambda data: data[:50],
    lambda data: b'',
    lambda data: b'\xff' * 64 + data[64:],
    lambda data: data.replace(b'"F32"', b'"F99"', 1),
  ],
  ids=['tail', 'head', 'empty', 'length', 'type'],
)
def test_damaged_weights(request, name, damage):
  path = request.getfixturevalue('whole' if name == WEIGHTS else 'parts')
  file = path / name
  file.write_bytes(damage(file.read_bytes()))
  refused(path, f'{file} ends early or is damaged', 'fetch it again')


def test_git_lfs_pointers_are_known(whole):
  pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n'
  (whole / WEIGHTS).write_text(pointer)
  refused(whole, 'is a git-lfs pointer', 'git lfs pull')


@pytest.mark.parametrize(
  ('kind', 'size'), [('F8_E4M3', 1), ('I8', 1), ('BOOL', 1), ('I32', 4)]
)
def test_quantised_weights_are_refused_by_name(whole, kind, size):
  header = {
    'model.norm.weight': {
      'dtype': kind,
      'shape': [16],
      'data_offsets': [0, 16 * size],
    }
  }
  text = json.dumps(header).encode()
  data = struct.pack('<Q', len(text)) + text + bytes(16 * size)
  (whole / WEIGHTS).write_bytes(data)
  refused(whole, f'model.norm.weight is {kind}', 'Only F32, F16', 'or a GGUF')


@pytest.mark.parametrize('text', [b'[]', b'{', b'\xff\xfe{}', b'3'])
@pytest.mark.parametrize('name', ['config.json', 'tokenizer_config.json'])
def test_records_that_are_not_records(whole, name, text):
  (whole / name).write_bytes(text)
  refused(whole, f'{whole / name} ', 'fetch it again')


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'chat_template': ['x']}, 'neither a text nor a list of names'),
    ({'chat_template': {'a': 'b'}}, 'neither a text nor a list of names'),
    ({'eos_token': {'id': 3}}, "eos_token={'id': 3} is neither a text"),
    ({'eos_token': 3}, 'eos_token=3 is neither a text'),
    (
      {'chat_template': [{'name': n, 'template': n} for n in ('rag', 'tool')]},
      'the chat templates rag, tool, none of them called default',
    ),
  ],
)
def test_odd_records_of_a_tokenizer(whole, fields, said):
  (whole / 'chat_template.jinja').unlink()
  change(whole / 'tokenizer_config.json', **fields)
  refused(whole, said)


def test_a_template_in_another_encoding(whole):
  (whole / 'chat_template.jinja').write_bytes('é'.encode('latin-1'))
  refused(whole, 'chat_template.jinja is not UTF-8')


@pytest.mark.parametrize('ids', ['</s>', [1, '2'], [[3]]])
def test_odd_ids(whole, ids):
  change(whole / 'generation_config.json', eos_token_id=ids)
  refused(whole, 'is no token id')


def test_of_a_model_that_also_sees_the_text_is_read(tmp_path):
  model = speaker(
    model_type='gemma3_text',
    head_dim=4,
    hidden_activation='gelu_pytorch_tanh',
    sliding_window=8,
    tie_word_embeddings=True,
  )
  path = tmp_path / 'seeing'
  folder.write(model, path)
  tensors = safetensors_numpy.load_file(path / WEIGHTS)
  tensors = {f'language_model.{k}': v for k, v in tensors.items()}
  tensors['vision_tower.embeddings.weight'] = np.ones((3, 3), np.float32)
  tensors['multi_modal_projector.weight'] = np.ones((3, 3), np.float32)
  safetensors_numpy.save_file(tensors, path / WEIGHTS)
  inner = json.loads((path / 'config.json').read_text())
  whole = {'model_type': 'gemma3', 'vision_config': {}, 'text_config': inner}
  (path / 'config.json').write_text(json.dumps(whole))
  loaded = models.load(path)
  assert loaded.config == model.config
  fakes.same(loaded.variables, model.variables)
