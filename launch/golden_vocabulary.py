"""Writes tests/golden/vocabulary.json with sentencepiece, our reference.

Two small models are trained on the README, as Llama and Gemma were: BPE with
bytes for unknown characters, with and without a blank before the text.

  pip install sentencepiece && python launch/golden_vocabulary.py
"""

import io
import json
from pathlib import Path

import sentencepiece

ROOT = Path(__file__).parent.parent
TEXTS = (
  'Hello, world!',
  ' leading',
  '   three  and two ',
  'The persona of 2,048 tokens is kept: 3.5%.',
  'é 再见 🙂 ñ',
  'a\nb\n\nc\n\n\n\n\nd\te',
  'aaaaaaaaa eeeeeee tttttt ------- .......',
  '<turn>user\n<b>bold</b><turn>',
  '<s>not control</s><unk>',
  '<0x41>▁x',
  'uninterruptibly personaspersonas activationactivations',
)


def trained(prefix, user=(), control=()):
  """The arrays that a GGUF keeps of a new model, and what it does."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter((ROOT / 'README.md').read_text().splitlines()),
    model_writer=model,
    vocab_size=700,
    model_type='bpe',
    byte_fallback=True,
    split_digits=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    add_dummy_prefix=prefix,
    user_defined_symbols=list(user),
    control_symbols=list(control),
    minloglevel=2,
  )
  processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

  def kind(i):  # as GGUF numbers them
    asked = (processor.is_unknown(i), processor.is_control(i))
    piece = processor.id_to_piece(i)
    asked += (piece in user, processor.is_unused(i), processor.is_byte(i))
    return 2 + asked.index(True) if any(asked) else 1

  ids = range(processor.get_piece_size())
  types = [kind(i) for i in ids]
  pieces = [processor.id_to_piece(i) for i in ids]
  return {
    'prefix': prefix,
    'tokens': [  # convert_hf_to_gguf writes user-defined blanks as blanks
      piece.replace('▁', ' ') if piece in user else piece for piece in pieces
    ],
    'scores': [processor.get_score(i) for i in ids],
    'types': types,
    'rows': [{'text': text, 'ids': processor.encode(text)} for text in TEXTS],
  }


def main():
  blanks = [n * '▁' for n in range(2, 6)] + [n * '\n' for n in range(1, 5)]
  user = (*blanks, '<b>', '</b>')
  models = [trained(True), trained(False, user, ('<turn>',))]
  text = json.dumps(models, ensure_ascii=False)
  (ROOT / 'tests/golden/vocabulary.json').write_text(text + '\n')


if __name__ == '__main__':
  main()
