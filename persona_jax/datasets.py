"""Our words as tensorflow-datasets, without TensorFlow.

Each is prepared once, as array records in the project's cache folder, and read
as a data source: rows by index, which grain shuffles and shards.
"""

import contextlib
import hashlib
import inspect
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from persona_jax import data
from persona_jax.models import source
from persona_jax.text import corpus, judged
from persona_jax.text.examples import Compared

CITATION = """@software{persona_jax,
  title = {persona_jax: a lab for persona drift of chat models},
  author = {{The persona_jax authors}},
  year = {2026},
  license = {Apache-2.0}
}"""
HELDOUT_SHARE = 4  # one persona of so many is held out, by the hash of its text

_TEXT = tfds.features.Text()
_TEXTS = tfds.features.Sequence(_TEXT)
_PERSONA = {
  'name': _TEXT,
  'split': _TEXT,
  'prompt': _TEXT,
  'facts': tfds.features.Sequence({'kind': _TEXT, 'fact': _TEXT}),
}


class Personas(tfds.core.GeneratorBasedBuilder):
  """People to be: a name, a system prompt, and the facts in it.

  Written for persona_jax. Nobody of the split `heldout` shares a name or an
  occupation with somebody of `train`.
  """

  name = 'persona_jax_personas'
  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': '40 people to train on, 24 held out.'}

  def _info(self):
    return _info(self, _PERSONA)

  def _split_generators(self, dl_manager):
    del dl_manager  # everything is in the package
    return {split: self._generate_examples(split) for split in corpus.SPLITS}

  def _generate_examples(self, split):
    for index, row in enumerate(corpus.personas(split)):
      yield index, _persona_row(row)


class Scenarios(tfds.core.GeneratorBasedBuilder):
  """Conversations to hold: a persona, a kind of partner, a first line.

  What `data.scripts` deals by seed 0: every persona of the split meets every
  kind of partner, calm and under pressure. `index` names the random keys.
  """

  name = 'persona_jax_scenarios'
  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': '160 conversations to train on, 96 held out.'}

  def _info(self):
    partner = {
      'kind': _TEXT,
      'prompt': _TEXT,
      'openings': _TEXTS,
    }
    return _info(
      self,
      {
        'index': tfds.features.Scalar(np.int32),
        'persona': _PERSONA,
        'partner': partner,
        'opening': _TEXT,
      },
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {split: self._generate_examples(split) for split in corpus.SPLITS}

  def _generate_examples(self, split):
    count = len(corpus.personas(split)) * len(corpus.partners())
    for script in data.scripts(split, count):
      partner = script.partner._asdict()
      yield (
        script.index,
        {
          'index': script.index,
          'persona': _persona_row(script.persona),
          'partner': partner | {'openings': list(script.partner.openings)},
          'opening': script.opening,
        },
      )


class Pairs(tfds.core.GeneratorBasedBuilder):
  """Preference pairs: a persona, a question, a reply that fits and one not.

  The labelled lines that persona_jax calibrates judges with, two to a
  question; `error` says in what way the rejected one contradicts the persona.
  Splits are by persona, so that nobody of `heldout` was trained on; nor is
  anybody in the splits of the personas. Calibrate a judge that learned from
  `train` on `heldout` alone.
  """

  name = 'persona_jax_pairs'
  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': '51 pairs to train on, 21 held out.'}

  def _info(self):
    names = ('persona', 'question', 'chosen', 'rejected', 'error')
    return _info(self, dict.fromkeys(names, _TEXT))

  def _split_generators(self, dl_manager):
    del dl_manager
    return {split: self._generate_examples(split) for split in corpus.SPLITS}

  def _generate_examples(self, split):
    asked = {}
    for line in corpus.labelled_lines():
      lines = asked.setdefault((line.persona, line.question), {})
      if line.label in lines:
        raise ValueError(_unpaired(line.question, line.persona))
      lines[line.label] = line
    index = 0
    for (persona, question), lines in asked.items():
      if set(lines) != set(data.KINDS):
        raise ValueError(_unpaired(question, persona))
      if split_of(persona) == split:
        chosen, rejected = (lines[kind] for kind in data.KINDS)
        yield (
          index,
          {
            'persona': persona,
            'question': question,
            'chosen': chosen.line,
            'rejected': rejected.line,
            'error': rejected.error,
          },
        )
        index += 1


class Judged(tfds.core.GeneratorBasedBuilder):
  """Dialogues to train judges on: how each line stands to its persona.

  What `text.judged.made` makes by seed 0: of each of the speaker's lines it is
  known by construction whether it supports the persona, contradicts it, or
  does neither, and in what way. `lines` begin with the partner's. Where
  `persona` is empty, lines are judged by those before them. The facts of
  `calibration` are of kinds that `train` has none of.
  """

  name = 'persona_jax_judged'
  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {
    '1.0.0': '30000 dialogues to train on, 4000 to calibrate with.'
  }
  COUNTS = {'train': 30_000, 'calibration': 4_000}

  def _info(self):
    texts = dict.fromkeys(('lines', 'relations', 'kinds'), _TEXTS)
    return _info(self, {'persona': _TEXT, 'task': _TEXT} | texts)

  def _split_generators(self, dl_manager):
    del dl_manager
    return {split: self._generate_examples(split) for split in self.COUNTS}

  def _generate_examples(self, split):
    for index in range(self.COUNTS[split]):
      yield index, judged.made(index, split=split)._asdict()


class Written(tfds.core.GeneratorBasedBuilder):
  """A test set for judges, written by hand: does the last line fit?

  The facts are of kinds that the data set `judged` has none of. Rows of a
  `pair` differ in the last line alone, one of which fits and one fails; `kind`
  says how. Where `persona` is empty, it is judged by the lines before it.
  """

  name = 'persona_jax_written'
  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': '1120 dialogues to test on.'}

  def _info(self):
    features = dict.fromkeys(judged.Written._fields, _TEXT)
    fits, pair = map(tfds.features.Scalar, (np.bool_, np.int32))
    return _info(self, features | {'lines': _TEXTS, 'fits': fits, 'pair': pair})

  def _split_generators(self, dl_manager):
    del dl_manager
    return {'test': self._generate_examples()}

  def _generate_examples(self):
    for index, row in enumerate(judged.written()):
      yield index, row._asdict()


def split_of(persona: str) -> str:
  """The split of somebody who pairs are about, whoever else there is."""
  number = hashlib.sha256(persona.encode()).digest()[0]
  train, heldout = corpus.SPLITS
  return train if number % HELDOUT_SHARE else heldout


class Dataset(NamedTuple):
  """How a data set is made, and what a row of it becomes."""

  builder: type[tfds.core.GeneratorBasedBuilder]
  record: Callable[[dict], Any]


class Rows(Sequence):
  """A prepared split; `rows[i]` is a record."""

  def __init__(self, rows, record: Callable):
    self._rows, self._record = rows, record

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    return self._record(_words(self._rows[range(len(self))[index]]))


def read(name: str, split: str, *, data_dir: str | Path | None = None) -> Rows:
  """The rows of a split, prepared where need be.

  Rows of 'personas' are `corpus.Persona`, of 'scenarios' `data.Script`, of
  'pairs' `text.examples.Compared`: splits 'train' and 'heldout'. Those of
  'judged' are `text.judged.Judged`, splits 'train' and 'calibration'; those of
  'written' `text.judged.Written`, split 'test'.

  Raises:
    ValueError: there is no such data set or split.
  """
  builder = prepare(name, data_dir=data_dir)
  splits = [*builder.info.splits]
  if split not in splits:
    raise ValueError(f'{split!r} is no split of {name!r}; it has {splits}.')
  return Rows(builder.as_data_source(split), DATASETS[name].record)


def prepare(name: str, *, data_dir: str | Path | None = None):
  """The tfds builder of a data set, its files in `data_dir`.

  By default they are in `datasets` of the project's cache folder; what is
  there already is left.

  Raises:
    ValueError: there is no such data set.
  """
  if name not in DATASETS:
    raise ValueError(f'{name!r} is no data set; it is one of {[*DATASETS]}.')
  folder = Path(data_dir or source.cache_folder() / 'datasets')
  make = lambda: DATASETS[name].builder(
    data_dir=folder, file_format='array_record'
  )
  builder, quiet = make(), io.StringIO()
  try:
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
      builder.download_and_prepare()
  except OSError:  # another process may have been faster
    builder = make()
    if not builder.is_prepared():
      raise
  return builder


def _info(builder, features):
  return tfds.core.DatasetInfo(
    builder=builder,
    description=inspect.getdoc(type(builder)),
    features=tfds.features.FeaturesDict(features),
    citation=CITATION,
    license='Apache-2.0',
    disable_shuffling=True,
  )


def _unpaired(question, persona) -> str:
  return (
    f'labelled_lines.json: the lines about {question!r} to {persona[:40]!r} '
    f'are no pair; give one for each label of {data.KINDS}.'
  )


def _persona_row(row: corpus.Persona) -> dict:
  facts = [{'kind': k, 'fact': fact} for k, fact in row.facts.items()]
  return row._asdict() | {'facts': facts}


def _persona(row: dict) -> corpus.Persona:
  facts = dict(zip(row['facts']['kind'], row['facts']['fact'], strict=True))
  return corpus.Persona(**row | {'facts': facts})


def _script(row: dict) -> data.Script:
  partner = row['partner'] | {'openings': tuple(row['partner']['openings'])}
  return data.Script(
    persona=_persona(row['persona']),
    partner=corpus.Partner(**partner),
    opening=row['opening'],
    index=int(row['index']),
  )


def _compared(row: dict) -> Compared:
  return Compared(
    system=row['persona'],
    history=(row['question'],),
    chosen=row['chosen'],
    rejected=row['rejected'],
    where=f'the pair {row["question"]!r}',
  )


def _judged(row: dict) -> judged.Judged:
  texts = {name: tuple(row[name]) for name in ('lines', 'relations', 'kinds')}
  return judged.Judged(**row | texts)


def _written(row: dict) -> judged.Written:
  fits, pair = bool(row['fits']), int(row['pair'])
  lines = tuple(row['lines'])
  return judged.Written(**row | {'lines': lines, 'fits': fits, 'pair': pair})


def _words(value):
  """A row with its bytes as text."""
  if isinstance(value, dict):
    return {name: _words(x) for name, x in value.items()}
  if isinstance(value, (list, np.ndarray)) and np.ndim(value):
    return [_words(x) for x in value]
  return value.decode() if isinstance(value, bytes) else value


DATASETS = {
  'personas': Dataset(Personas, _persona),
  'scenarios': Dataset(Scenarios, _script),
  'pairs': Dataset(Pairs, _compared),
  'judged': Dataset(Judged, _judged),
  'written': Dataset(Written, _written),
}
