"""Our data sets: what is in them, whose they are, and without TensorFlow."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import persona_jax
from persona_jax import data, datasets
from persona_jax.feed import Feed
from persona_jax.models import source
from persona_jax.text import corpus, facts, judged
from persona_jax.text.examples import Compared

ROOT = Path(persona_jax.__file__).parent
SPLITS = dict.fromkeys(('personas', 'scenarios', 'pairs'), corpus.SPLITS) | {
  'judged': judged.SPLITS,
  'written': ('test',),
}
WHOLE = datasets.Judged.COUNTS
SOME = {'train': 600, 'calibration': 100}  # as many are made for these tests


@pytest.fixture(scope='module', autouse=True)
def few_rows():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(datasets.Judged, 'COUNTS', SOME)
    yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('datasets')


@pytest.fixture(scope='module')
def read(folder):
  return lambda name, split: datasets.read(name, split, data_dir=folder)


@pytest.mark.parametrize('split', corpus.SPLITS)
def test_rows_are_the_words_of_the_package(read, split):
  people = corpus.personas(split)
  assert tuple(read('personas', split)) == people
  count = len(people) * len(corpus.partners())
  dealt = data.scripts(split, count)
  assert list(read('scenarios', split)) == dealt
  # nobody is dealt a conversation twice, and more would be the same again
  names = {(s.persona.name, s.partner.kind) for s in dealt}
  assert len(names) == count
  more = data.scripts(split, 2 * count)[count:]
  assert {s[:3] for s in map(_named, more)} == {
    s[:3] for s in map(_named, dealt)
  }


def _named(script):
  return script.persona.name, script.partner.kind, script.opening


def test_pairs_are_the_labelled_lines(read):
  lines = {(x.persona, x.question, x.line): x for x in corpus.labelled_lines()}
  found = [x for split in corpus.SPLITS for x in read('pairs', split)]
  for pair in found:
    assert isinstance(pair, Compared)
    (question,) = pair.history
    chosen = lines.pop((pair.system, question, pair.chosen))
    rejected = lines.pop((pair.system, question, pair.rejected))
    assert (chosen.label, rejected.label) == data.KINDS
  assert not lines  # every line is in one pair


@pytest.mark.parametrize('split', judged.SPLITS)
def test_judged_rows_are_those_that_are_made(read, split):
  rows = read('judged', split)
  assert [*rows] == [judged.made(i, split=split) for i in range(SOME[split])]
  assert any(not row.persona for row in rows)


def test_written_rows_are_the_test_set(read):
  rows = read('written', 'test')
  assert tuple(rows) == judged.written()
  assert {type(rows[1].fits), type(rows[1].pair)} == {bool, int}


def test_nobody_is_in_two_splits(read):
  train, heldout = (
    {pair.system for pair in read('pairs', split)} for split in corpus.SPLITS
  )
  assert not train & heldout
  assert len(train) >= 15 and len(heldout) >= 6
  prompts = {
    p.prompt for split in corpus.SPLITS for p in corpus.personas(split)
  }
  assert not prompts & (train | heldout)
  # a new persona moves nobody
  assert all(datasets.split_of(who) == 'heldout' for who in heldout)


# Files that are prepared already are read as they are: other rows need another
# VERSION, then their digest here.
DIGESTS = {
  'personas 1.0.0': 'adb2073bdde6ba25',
  'scenarios 1.0.0': 'e0c8b0c86c2e370d',
  'pairs 1.0.0': '2b3cca49a2f42e9a',
  'judged 1.0.0': 'cdcdc4db2d3513b0',
  'written 1.0.0': '50a63ad45b88ea68',
}


@pytest.mark.parametrize('name', datasets.DATASETS)
def test_rows_belong_to_their_version(read, name):
  rows = [[*read(name, split)] for split in SPLITS[name]]
  if name == 'judged':  # of which few are read here
    rows += [facts.facts(), facts.bank()]
  digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
  version = datasets.DATASETS[name].builder.VERSION
  assert DIGESTS[f'{name} {version}'] == digest, 'Raise its VERSION.'


@pytest.mark.parametrize('name', datasets.DATASETS)
def test_a_data_set_says_what_it_is(folder, name):
  builder = datasets.prepare(name, data_dir=folder)
  info = builder.info
  assert len(info.description) > 100 and '  ' not in info.description
  assert 'persona_jax' in info.citation
  assert info.redistribution_info.license == 'Apache-2.0'
  assert str(builder.version) in builder.RELEASE_NOTES
  assert info.file_format.value == 'array_record'
  assert set(info.splits) == set(SPLITS[name])
  note = builder.RELEASE_NOTES[str(builder.version)]
  counts = {split: row.num_examples for split, row in info.splits.items()}
  if name == 'judged':
    assert counts == SOME
    counts = WHOLE
  for count in counts.values():
    assert f'{count} ' in note


def test_rows_are_a_sequence(read):
  rows = read('pairs', 'heldout')
  assert rows[-1] == rows[len(rows) - 1] == [*rows][-1]
  assert rows[1:3] == [rows[1], rows[2]]
  assert rows[np.int64(2)] == rows[2]
  with pytest.raises(IndexError):
    rows[len(rows)]


def test_rows_feed_a_learner(read):
  rows = read('pairs', 'train')
  feed = Feed(rows, batch=8, seed=0, epochs=1)
  seen = [pair for batch in feed for pair in batch]
  assert sorted(seen) == sorted(rows) and seen != list(rows)


def test_other_names(read):
  with pytest.raises(ValueError, match="'pears' is no data set; it is one of"):
    read('pears', 'train')
  for name, other in (('pairs', 'test'), ('written', 'train')):
    said = f'{other!r} is no split of {name!r}; it has .*{SPLITS[name][0]!r}'
    with pytest.raises(ValueError, match=said):
      read(name, other)


def test_prepared_in_the_cache_folder_once(tmp_path, monkeypatch):
  monkeypatch.setenv('PERSONA_JAX_CACHE', str(tmp_path))
  datasets.read('pairs', 'train')
  home = source.cache_folder() / 'datasets' / 'persona_jax_pairs' / '1.0.0'
  before = {path: path.stat().st_mtime_ns for path in home.iterdir()}
  assert any(path.suffix != '.json' for path in before)
  datasets.read('pairs', 'heldout')
  after = {path: path.stat().st_mtime_ns for path in home.iterdir()}
  assert after == before


def test_another_process_may_be_faster(tmp_path, monkeypatch):
  builder = datasets.Pairs
  prepare = builder.download_and_prepare

  def late(self, **how):
    prepare(builder(data_dir=tmp_path, file_format='array_record'), **how)
    raise FileExistsError('Destination already exists.')

  monkeypatch.setattr(builder, 'download_and_prepare', late)
  assert len(datasets.read('pairs', 'train', data_dir=tmp_path)) > 40


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError):
    datasets.read('pairs', 'train', data_dir=tmp_path / 'file')


WITHOUT_TENSORFLOW = """
import sys
from persona_jax import datasets
from persona_jax.feed import Feed

rows = datasets.read('pairs', 'train', data_dir={folder!r})
count = sum(len(batch) for batch in Feed(rows, batch=8, seed=0, epochs=1))
assert count == len(rows) > 40, count
print('tensorflow' in sys.modules)
"""


def test_tensorflow_is_not_imported(tmp_path):
  # One that may be imported, and says so.
  fake = tmp_path / 'path' / 'tensorflow'
  fake.mkdir(parents=True)
  (fake / '__init__.py').write_text('raise SystemExit("imported")')
  done = python(
    WITHOUT_TENSORFLOW.format(folder=str(tmp_path / 'data')), fake.parent
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == ['False']  # and nothing else was printed
  assert python('import tensorflow', fake.parent).stderr.strip() == 'imported'


def python(code, *paths):
  path = os.pathsep.join(map(str, [*paths, ROOT.parent]))
  return subprocess.run(
    [sys.executable, '-W', 'error', '-c', code],
    capture_output=True,
    text=True,
    env=os.environ | {'PYTHONPATH': path},
  )


def test_what_is_heavy_is_imported_where_it_is_used():
  done = python(
    'import sys, persona_jax.batches, persona_jax.feed, persona_jax.data\n'
    'print({"grain", "tensorflow_datasets"} & set(sys.modules))'
  )
  assert done.stdout.strip() == 'set()', done.stderr
