"""A judge that is an NLI cross-encoder, run with onnxruntime on the host."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from persona_jax.models import CheckpointError, hub
from persona_jax.text import judged

GRAPHS = ('model.onnx', 'onnx/model.onnx')  # the first that is there
TEXTS = ('config.json', 'tokenizer.json')
FETCHED = (*TEXTS, *(f'{graph}*' for graph in GRAPHS))  # and graphs' weights
ROOM = 512  # tokens of a pair, for models that could read more too
CONTRADICTION = 'contradiction'  # the label, in any case
_END = re.compile(  # of a sentence, not of 'J.', 'Dr.' or 'Mrs.'
  r'(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b[A-Z][a-z]\.)(?<!\bMrs\.)\s+'
  r'|(?<=[.!?]["\')])\s+(?=[A-Z])'
)
_ITEM = re.compile(r'^\s*(?:[-*•]|\d+[.)])\s+')  # what begins an item of a list


class Entailment:
  """Log-odds that a line does not contradict what is known of its speaker.

  The line is the hypothesis. Premises are the sentences of the persona or,
  where that is blank, the speaker's earlier lines; of them the worst counts:

    min over premises of log(1 - p) - log(p),  p = P(contradiction).

  The model sees one premise and the line: no question that the line answers,
  and nothing that follows from two premises. The graph of a model in int8 may
  take its scales from a whole batch; `batch=1` then gives each pair its own.
  """

  def __init__(
    self,
    session: Any,
    tokenizer: Any,
    *,
    contradiction: int,
    pad: int | None = None,
    pad_id: int = 0,
    room: int = ROOM,
    batch: int = 16,
  ):
    """Of an onnxruntime session and a tokenizer, which it sets up.

    Args:
      session: gives logits of the classes, [B K].
      tokenizer: of the `tokenizers` package.
      contradiction: the class that means it.
      pad: tokens of every pair; else of the longest in the batch.
      pad_id: the token that fills a pair up.
      room: tokens that a pair may have, where `pad` does not say it.
      batch: pairs at a time, of nearly one length.

    Raises:
      ValueError: the graph has other inputs than a cross-encoder.
    """
    self._session, self._tokenizer = session, tokenizer
    self._contradiction, self._batch = contradiction, batch
    self._pad, self._pad_id, self._room = pad, pad_id, pad or room
    self._names = [x.name for x in session.get_inputs()]
    unknown = set(self._names) - {*_inputs([])}
    if unknown:
      raise ValueError(
        f'The graph asks for {sorted(unknown)}; a cross-encoder is given '
        f'{[*_inputs([])]} at most.'
      )
    tokenizer.no_padding()
    tokenizer.enable_truncation(self._room, strategy='only_first')
    self.cut = 0  # pairs so far whose premise, or line, was too long

  @classmethod
  def load(
    cls,
    source: str | Path,
    *,
    contradiction: int | None = None,
    pad: int | None = None,
    batch: int = 16,
  ) -> 'Entailment':
    """The model of a folder, or of 'hf:org/name', fetched where need be.

    `contradiction` is for models whose labels do not tell, `pad` for graphs
    that want all pairs of one length and do not say which.

    Raises:
      CheckpointError: a file is not there, or no label is called so.
      ImportError: onnxruntime is not installed.
      OSError: it could not be fetched.
    """
    folder = _folder(source)
    config = json.loads((folder / 'config.json').read_text('utf-8'))
    if contradiction is None:
      contradiction = _contradiction(config, folder)
    session = _session(
      next(folder / x for x in GRAPHS if (folder / x).exists())
    )
    size = session.get_inputs()[0].shape[1]
    return cls(
      session,
      _tokenizer(folder / 'tokenizer.json'),
      contradiction=contradiction,
      pad=pad or (size if isinstance(size, int) else None),
      pad_id=config.get('pad_token_id') or 0,
      room=min(ROOM, config.get('max_position_embeddings') or ROOM),
      batch=batch,
    )

  def __call__(self, asked: Sequence[Any]) -> list[float]:
    """The log-odds of each `line` after `history`, given `persona`.

    They are NaN where there is no verdict: an empty line, one that fills the
    model's room by itself, nothing that it could contradict.
    """
    encoded, rows = [], []
    for row, one in enumerate(asked):
      found = self._pairs(one)
      encoded += found
      rows += [row] * len(found)
    least = np.full(len(asked), np.nan)
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i].ids))
    for start in range(0, len(order), self._batch):
      some = order[start : start + self._batch]
      odds = self._odds([encoded[i] for i in some])
      np.fmin.at(least, [rows[i] for i in some], odds)
    return least.tolist()

  def _pairs(self, one) -> list:
    """A line with each of its premises, as tokens."""
    if not one.line.strip():
      return []
    known = list(premises(one.persona, one.history))
    line = self._tokenizer.encode(one.line, add_special_tokens=False)
    taken = len(line.ids) + self._tokenizer.num_special_tokens_to_add(True)
    if taken >= self._room:
      self.cut += len(known)
      return []
    pairs = self._tokenizer.encode_batch([(x, one.line) for x in known])
    self.cut += sum(bool(pair.overflowing) for pair in pairs)
    return pairs

  def _odds(self, pairs):
    width = self._pad or max(len(pair.ids) for pair in pairs)
    for pair in pairs:
      pair.pad(width, pad_id=self._pad_id)
    inputs = _inputs(pairs)
    logits, *_ = self._session.run(None, {x: inputs[x] for x in self._names})
    others = np.delete(logits, self._contradiction, axis=-1)
    return np.logaddexp.reduce(others, -1) - logits[:, self._contradiction]


def premises(persona: str, history: Sequence[str]) -> Iterator[str]:
  """What a line is held against: a persona by itself, or else earlier lines."""
  if persona.strip():
    return sentences(judged.first_person(persona))
  return (line for line in history[1::2] if line.strip())


def sentences(text: str) -> Iterator[str]:
  """The sentences of a text and the items of its lists, one by one."""
  for line in text.splitlines():
    for sentence in _END.split(_ITEM.sub('', line)):
      if re.search(r'\w', sentence):
        yield sentence.strip()


def _inputs(pairs) -> dict:
  rows = {
    'input_ids': [x.ids for x in pairs],
    'attention_mask': [x.attention_mask for x in pairs],
    'token_type_ids': [x.type_ids for x in pairs],
  }
  return {name: np.array(row, np.int64) for name, row in rows.items()}


def _folder(source) -> Path:
  if str(source).startswith(hub.PREFIX):
    folder = hub.fetch(str(source), only=FETCHED)
  else:
    folder = Path(source).expanduser()
  lacks = [x for x in TEXTS if not (folder / x).exists()]
  if not any((folder / x).exists() for x in GRAPHS):
    lacks += [' or '.join(GRAPHS)]
  if lacks:
    raise CheckpointError(
      f'{source} is no cross-encoder in ONNX: it lacks {", ".join(lacks)}. '
      'Give a folder or "hf:org/name" that has them.'
    )
  return folder


def _contradiction(config, folder) -> int:
  labels = config.get('id2label') or {}
  for index, label in labels.items():
    if label.lower() == CONTRADICTION:
      return int(index)
  raise CheckpointError(
    f'{folder / "config.json"}: none of the labels {[*labels.values()]} is '
    f'{CONTRADICTION!r}; give the class that means it as contradiction=.'
  )


def _session(graph):
  try:
    import onnxruntime
  except ImportError as error:
    raise ImportError(
      f'{graph} needs onnxruntime: pip install "persona_jax[entailment]".'
    ) from error
  return onnxruntime.InferenceSession(graph, providers=['CPUExecutionProvider'])


def _tokenizer(path):
  import tokenizers

  return tokenizers.Tokenizer.from_file(str(path))
