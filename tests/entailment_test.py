"""The judge that is an NLI model, on one whose logits are summed by hand."""

import math
import sys
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import tiny_onnx

from persona_jax import entailment
from persona_jax.entailment import Entailment
from persona_jax.models import CheckpointError, hub


class Asked(NamedTuple):
  persona: str
  line: str
  history: tuple[str, ...] = ('Hello.',)


class Session:
  """The graph in NumPy; it keeps what it is given."""

  def __init__(self, inputs=tiny_onnx.INPUTS):
    self.inputs, self.fed = inputs, []

  def get_inputs(self):
    return [SimpleNamespace(name=name) for name in self.inputs]

  def run(self, names, feeds):
    assert names is None
    self.fed.append(feeds)
    return [tiny_onnx.TABLE[feeds['input_ids']].sum(1)]


def judge(session=None, **options):
  return Entailment(
    session or Session(), tiny_onnx.tokenizer(), contradiction=2, **options
  )


PERSONA = 'You are a vegetarian. You live in Oslo.'
ASKED = (
  Asked(PERSONA, 'I eat steak .'),
  Asked(PERSONA, 'I eat.'),
  Asked(
    '', 'A child .', ('Hi.', 'My sister .', 'Steak?', 'No steak .', 'Why?')
  ),
)
# Logits of the two other classes are 0, log(e^0 + e^0) = log 2. The worst
# premises: vegetarian 2 + steak 4; vegetarian 2; steak 4 + child 8.
ODDS = [math.log(2) - worst for worst in (6.0, 2.0, 12.0)]


@pytest.mark.parametrize('options', [{}, {'batch': 1}, {'pad': 12}], ids=str)
def test_the_worst_premise_counts(options):
  np.testing.assert_allclose(judge(**options)(ASKED), ODDS, rtol=1e-6)


def test_odds_are_of_the_probability():
  (found,) = judge()([Asked('Vegetarian', 'Oslo fish')])
  logits = tiny_onnx.TABLE[[3, 7, 8]].sum(0)  # 'Vegetarian' is no word of it
  p = np.exp(logits[2]) / np.exp(logits).sum()
  np.testing.assert_allclose(found, np.log(1 - p) - np.log(p), rtol=1e-6)


@pytest.mark.parametrize(
  'asked',
  [
    Asked(PERSONA, ''),
    Asked(PERSONA, ' \n'),
    Asked('', 'I eat steak.'),
    Asked(' \n', 'I eat steak.', ('Hi.', ' ', 'Well?')),
    Asked('...', 'I eat steak.'),
  ],
)
def test_no_verdict(asked):
  alone, among, after = judge()([asked, ASKED[0], asked])
  assert math.isnan(alone) and math.isnan(after)
  np.testing.assert_allclose(among, ODDS[0], rtol=1e-6)
  assert judge()([]) == []


def test_pairs_of_a_length_go_together():
  session = Session()
  long = Asked('You like ' + 'fish ' * 20, 'Yes.')
  judge(session, batch=2)([ASKED[0], long, ASKED[1]])
  sizes = [feeds['input_ids'].shape for feeds in session.fed]
  # [CLS] I am a vegetarian . [SEP] I eat . [SEP], and without "eat"; 22 + 5
  assert sizes == [(2, 11), (2, 12), (1, 27)]
  for feeds in session.fed:
    assert {x.dtype for x in feeds.values()} == {np.dtype(np.int64)}
    assert feeds['attention_mask'].sum(1).max() == feeds['input_ids'].shape[1]
    assert ((feeds['input_ids'] != 0) == feeds['attention_mask']).all()
    last = feeds['token_type_ids'][-1]
    assert sorted(last) == list(last) and set(last) == {0, 1}


def test_a_graph_gets_the_inputs_that_it_has():
  session = Session(('attention_mask', 'input_ids'))
  judge(session)(ASKED)
  assert set(session.fed[0]) == {'attention_mask', 'input_ids'}
  with pytest.raises(ValueError, match=r"asks for \['position_ids'\]; a cross"):
    judge(Session(('input_ids', 'position_ids')))


def test_pads_to_one_size():
  session = Session()
  judge(session, pad=20, pad_id=3, batch=2)(ASKED)
  assert {feeds['input_ids'].shape[1] for feeds in session.fed} == {20}
  assert session.fed[0]['input_ids'][0, -1] == 3
  assert session.fed[0]['attention_mask'][0, -1] == 0


def test_a_long_premise_is_cut_and_counted():
  session = Session()
  score = judge(session, room=9)
  asked = Asked('You are a vegetarian and more.', 'child child child')
  (found,) = score([asked, asked])[:1]
  # [CLS] I am a [SEP] child child child [SEP]: the line is whole
  np.testing.assert_allclose(found, math.log(2) - 24.0, rtol=1e-6)
  assert session.fed[0]['input_ids'][0].tolist() == [1, 3, 3, 3, 2, 9, 9, 9, 2]
  assert score.cut == 2
  score([Asked('You eat.', 'child')])
  assert score.cut == 2


def test_a_line_that_fills_the_room_has_no_verdict():
  score = judge(pad=9)
  (found,) = score([Asked(PERSONA, 'child ' * 6)])
  assert math.isnan(found) and score.cut == 2  # its two premises
  (found,) = score([Asked(PERSONA, 'child ' * 5)])
  np.testing.assert_allclose(found, math.log(2) - 40.0)


@pytest.mark.parametrize(
  ('text', 'found'),
  [
    ('One. Two!  Three? four', ['One.', 'Two!', 'Three?', 'four']),
    (
      'Mrs. Ada J. King, to Dr. Hay: Yes.',
      ['Mrs. Ada J. King, to Dr. Hay: Yes.'],
    ),
    ('She says "no." Then 3.5 more.', ['She says "no."', 'Then 3.5 more.']),
    ('He cried "Stop!" and left.', ['He cried "Stop!" and left.']),
    (
      'Name: Ada\n- diet: vegan\n* job: baker. Well paid.\n\n  2) from Oslo\n',
      ['Name: Ada', 'diet: vegan', 'job: baker.', 'Well paid.', 'from Oslo'],
    ),
    ('I sing.\nI dance - a lot', ['I sing.', 'I dance - a lot']),
    (' \n-\n... !', []),
  ],
)
def test_sentences(text, found):
  assert [*entailment.sentences(text)] == found


def test_premises():
  history = ('Hello.', 'I sing. I dance.', 'Really?', ' ', 'Why?')
  said = 'You are Ada. Your cat wakes you.'
  assert [*entailment.premises(said, history)] == [
    'I am Ada.',
    'My cat wakes me.',
  ]
  assert [*entailment.premises(' ', history)] == ['I sing. I dance.']
  assert not [*entailment.premises('', ('Hello.',))]


# Folders, and the graph in onnxruntime.


@pytest.mark.parametrize('graph', entailment.GRAPHS)
@pytest.mark.parametrize('inputs', [tiny_onnx.INPUTS, tiny_onnx.INPUTS[:2]])
def test_load_gives_what_is_summed_by_hand(tmp_path, graph, inputs):
  pytest.importorskip('onnxruntime')
  score = Entailment.load(
    tiny_onnx.write(tmp_path, graph=graph, inputs=inputs), batch=2
  )
  np.testing.assert_allclose(score(ASKED), ODDS, rtol=1e-6)
  assert score.cut == 0  # what the tokenizer was saved with is not heeded


def test_a_graph_of_one_size_says_it(tmp_path):
  pytest.importorskip('onnxruntime')
  score = Entailment.load(tiny_onnx.write(tmp_path, size=14))
  np.testing.assert_allclose(score(ASKED), ODDS, rtol=1e-6)
  long = Asked('You like ' + 'steak ' * 20, 'fish')
  np.testing.assert_allclose(score([long]), math.log(2) - 8 * 4 - 0.5)
  assert score.cut == 1  # [CLS] I like, 8 of steak, [SEP] fish [SEP]


def test_the_room_of_a_model_is_that_of_its_config(tmp_path):
  pytest.importorskip('onnxruntime')
  folder = tiny_onnx.write(tmp_path, max_position_embeddings=9)
  score = Entailment.load(folder)
  score(ASKED[:1])
  assert score.cut == 2


def test_labels_that_do_not_tell(tmp_path):
  pytest.importorskip('onnxruntime')
  labels = {'0': 'LABEL_0', '1': 'LABEL_1', '2': 'LABEL_2'}
  tiny_onnx.write(tmp_path, id2label=labels)
  with pytest.raises(
    CheckpointError,
    match=r"config.json: none of the labels \['LABEL_0', 'LABEL_1', 'LABEL_2'\]"
    r" is 'contradiction'; .* as contradiction=\.",
  ):
    Entailment.load(tmp_path)
  score = Entailment.load(tmp_path, contradiction=2)
  np.testing.assert_allclose(score(ASKED), ODDS, rtol=1e-6)


def test_without_onnxruntime(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'onnxruntime', None)
  with pytest.raises(ImportError, match=r'install "persona_jax\[entailment\]"'):
    Entailment.load(tiny_onnx.write(tmp_path))


@pytest.mark.parametrize('lost', ['model.onnx', *entailment.TEXTS])
def test_a_file_that_is_not_there(tmp_path, lost):
  (tiny_onnx.write(tmp_path) / lost).unlink()
  with pytest.raises(CheckpointError, match=f'in ONNX: it lacks {lost}'):
    Entailment.load(tmp_path)


def test_a_name_is_fetched_from_the_hub(tmp_path, monkeypatch):
  pytest.importorskip('onnxruntime')
  folder, asked = tiny_onnx.write(tmp_path), []

  def fetch(source, *, only):
    asked.append((source, only))
    return folder

  monkeypatch.setattr(hub, 'fetch', fetch)
  score = Entailment.load('hf:tiny/nli')
  np.testing.assert_allclose(score(ASKED), ODDS, rtol=1e-6)
  assert asked == [('hf:tiny/nli', entailment.FETCHED)]
