"""A small NLI model for tests: logits are sums over the words of a pair.

The graph is written field by field, as protobuf does, for want of `onnx`.
"""

import json

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers, processors

LABELS = ('entailment', 'neutral', 'Contradiction')
WORDS = (
  '[PAD] [CLS] [SEP] [UNK] vegetarian sister steak Oslo fish child'.split()
)
TABLE = np.zeros((len(WORDS), 3), np.float32)
TABLE[4:, 2] = [2.0, 1.0, 4.0, -1.0, 0.5, 8.0]
INPUTS = ('input_ids', 'attention_mask', 'token_type_ids')
FLOAT, INT64 = 1, 7


def tokenizer():
  """Words, as '[CLS] premise [SEP] line [SEP]'."""
  made = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(
      {word: i for i, word in enumerate(WORDS)}, unk_token='[UNK]'
    )
  )
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  made.post_processor = processors.BertProcessing(('[SEP]', 2), ('[CLS]', 1))
  made.enable_padding(length=40)  # as saved; a judge must not heed it
  made.enable_truncation(7)
  return made


def write(
  folder, *, graph='model.onnx', inputs=INPUTS, size='tokens', **config
):
  """A folder as the hub has them."""
  (folder / graph).parent.mkdir(parents=True, exist_ok=True)
  (folder / graph).write_bytes(model(inputs, size))
  tokenizer().save(str(folder / 'tokenizer.json'))
  labels = {'id2label': {str(i): x for i, x in enumerate(LABELS)}}
  (folder / 'config.json').write_text(json.dumps(labels | config))
  return folder


def model(inputs, size) -> bytes:
  """The bytes of a graph of pairs of `size` tokens: a number, or a name."""
  gather = _node('Gather', 'table', 'input_ids', 'each')
  keepdims = _text(1, 'keepdims') + _number(3, 0) + _number(20, 2)
  add = _node('ReduceSum', 'each', 'axes', 'logits') + _field(5, keepdims)
  graph = _field(1, gather) + _field(1, add) + _text(2, 'nli')
  graph += _field(5, _tensor('table', TABLE, FLOAT))
  graph += _field(5, _tensor('axes', np.array([1]), INT64))
  for name in inputs:
    graph += _field(11, _value(name, INT64, ('pairs', size)))
  graph += _field(12, _value('logits', FLOAT, ('pairs', 3)))
  return _number(1, 8) + _field(8, _number(2, 13)) + _field(7, graph)


def _node(kind, *names) -> bytes:
  *ins, out = names
  named = b''.join(_text(1, name) for name in ins)
  return named + _text(2, out) + _text(4, kind)


def _tensor(name, array, kind) -> bytes:
  dims = b''.join(_number(1, size) for size in array.shape)
  return dims + _number(2, kind) + _text(8, name) + _field(9, array.tobytes())


def _value(name, kind, shape) -> bytes:
  dims = b''.join(
    _field(1, _number(1, x) if isinstance(x, int) else _text(2, x))
    for x in shape
  )
  tensor = _number(1, kind) + _field(2, dims)
  return _text(1, name) + _field(2, _field(1, tensor))


def _varint(number) -> bytes:
  low, high = number & 127, number >> 7
  return bytes([low | 128]) + _varint(high) if high else bytes([low])


def _number(tag, number) -> bytes:
  return _varint(tag << 3) + _varint(number)


def _field(tag, data) -> bytes:
  return _varint(tag << 3 | 2) + _varint(len(data)) + data


def _text(tag, text) -> bytes:
  return _field(tag, text.encode())
