"""Chats over tokenizers that put a blank before a text, as SentencePiece."""

import pytest
import tokenizers
from chat_test import LINES, framed, messages
from tokenizers import models, normalizers, pre_tokenizers

from persona_jax.text.chat import Chat


def spm(*, prefix='first', merges=(), control=('<s>', '</s>', '<|u|>')):
  """A tokenizer in the manner of SentencePiece, of characters and bytes."""
  said = set('\n!?.,: ZqabcdefMark'.join(LINES))
  letters = ['▁', *filter(str.isascii, sorted(said))]
  joined = [''.join(pair) for pair in merges]
  units = ['<unk>', *(f'<0x{i:02X}>' for i in range(256)), *letters, *joined]
  vocabulary = {unit: i for i, unit in enumerate(units)}
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocabulary,
      merges=list(merges),
      unk_token='<unk>',
      byte_fallback=True,
    )
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
    prepend_scheme=prefix, split=False
  )
  tokenizer.add_special_tokens(list(control))
  return tokenizer


TURNS = "{{ bos_token }}{% for m in messages %}{{ '<|u|>' + m['content'] }}" + (
  "{{ '</s>' }}{% endfor %}{{ '<|u|>' if add_generation_prompt else '' }}"
)


@pytest.mark.parametrize('prefix', ['first', 'always', 'never'])
def test_sentencepiece(prefix):
  chat = Chat(spm(prefix=prefix), TURNS, {'bos': '<s>'})
  talk = messages(['Hi!', 'Bye 再见', 'Hi!'])
  tokens = chat.tokens(talk, True)
  texts = [
    ''.join(chat.tokenizer.id_to_token(i) for i in tokens.ids[a:b])
    for a, b in tokens.spans
  ]
  blank = '▁' if prefix == 'always' else ''
  assert texts[0] == texts[2] == f'{blank}Hi!'
  assert texts[1] == f'{blank}Bye▁' + ''.join(
    f'<0x{byte:02X}>' for byte in '再见'.encode()
  )
  assert framed(chat, '', ['Hi!', 'Bye 再见', 'Hi!']) == list(tokens.ids)


def test_sentencepiece_with_a_blank_normalized_in():
  tokenizer = spm(prefix='never')
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  chat = Chat(
    tokenizer,
    TURNS.replace("'<|u|>' +", "'<|u|>\n' +").replace(
      "'<|u|>' if", "'<|u|>\n' if"
    ),
    {'bos': '<s>'},
  )
  tokens = chat.tokens(messages(LINES[:3]), True)
  assert framed(chat, '', LINES[:3]) == list(tokens.ids)


def test_ends_that_join_the_template_are_reported():
  tokenizer = spm(merges=[('!', '\n')])
  broken = TURNS.replace("'</s>'", "'\n'")
  assert "'!' at the end of the system line joins" in (
    Chat(tokenizer, broken, {'bos': '<s>'}).joined()
  )
  assert Chat(tokenizer, TURNS, {'bos': '<s>'}).joined() is None


def test_a_blank_inside_the_first_token_has_no_frame():
  tokenizer = spm(prefix='never', merges=[('▁', 'Z')])
  blank = TURNS.replace("'<|u|>' +", "'<|u|> ' +")
  with pytest.raises(ValueError, match="'ZqaMark' has the tokens"):
    Chat(tokenizer, blank, {'bos': '<s>'}).frame()
