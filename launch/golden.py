"""Golden numbers, computed by transformers: SmolLM2-135M.

Needs torch, transformers and gguf, none of which the package needs:

  python launch/golden.py --folder=DIR_OF_THE_GGUF --out=tests/golden
"""

import argparse
import json
from pathlib import Path

import torch
import transformers

FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
PROMPTS = (
  'The capital of France is',
  'Once upon a time, an old lighthouse keeper',
  'import numpy as np\n\ndef mean(values):\n  ',
  '<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\n'
  'Who are you?<|im_end|>\n<|im_start|>assistant\n',
  '1, 1, 2, 3, 5, 8,',
)
NEW_TOKENS = 64
MIXED = (
  'Zoë paid 1234.50 € in Zürich; 東京は雨です 🌧️👍🏽.\r\nfor i in range(10):\n'
  '\tprint(f"{i:>4}")  # x  y\n\n  <|im_start|>user\nOui, ça va? <|im_end|>'
)
TEXTS = (
  MIXED,
  'Plain words, nothing else.',
  "I'll say it's they've we're I'd can't",
  '2024-05-17 3.14159 007 1,000,000',
  'tabs\t\tand\ttabs, runs    of     blanks   \n\n\n  lines\r\n\r\nCRLF ',
  ' leading and trailing  ',
  'naïve façade São Paulo Łódź ñandú e\u0301 \u00e9',
  '你好，世界。こんにちは 안녕하세요 Привет мир سلام',
  '🙂🙃 👩‍👩‍👧‍👦 🏳️‍🌈 ✨',
  'class A:\n    def f(self, x): return {x: [1, 2]} if x != 0 else None',
  '<|endoftext|>a<|im_end|>\n<|im_start|>b<file_sep><|im_start',
  '\u00a0nbsp\u200bzero\ufeffwidth \u2028line',
  '',
)
CONVERSATIONS = (
  ('system', 'user', 'assistant', 'user', 'assistant'),
  ('user', 'assistant', 'user'),
  ('system', 'user'),
  ('user',),
)
LINES = ('You are Ada, 36.', 'Hi!', ' Hello\nyou ', 'Is it 5 €?', 'No.')


def main():
  """Writes model.json, tokens.json and chat.json."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--folder', type=Path, required=True)
  parser.add_argument('--out', type=Path, required=True)
  flags = parser.parse_args()
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    flags.folder, gguf_file=FILE
  )
  model = transformers.LlamaForCausalLM.from_pretrained(
    flags.folder, gguf_file=FILE, dtype=torch.float32
  ).eval()
  flags.out.mkdir(parents=True, exist_ok=True)
  with torch.inference_mode():
    numbers = {
      'versions': {'torch': torch.__version__}
      | {'transformers': transformers.__version__},
      'greedy': [greedy(model, tokenizer, text) for text in PROMPTS],
      'mixed': mixed(model, tokenizer),
    }
  records = {
    'model': numbers,
    'tokens': [{'text': t, 'ids': encode(tokenizer, t)} for t in TEXTS],
    'chat': chats(tokenizer),
  }
  for name, record in records.items():
    text = json.dumps(record, ensure_ascii=True)
    (flags.out / f'{name}.json').write_text(text + '\n')


def encode(tokenizer, text) -> list[int]:
  """Ids, special tokens in the text recognised, none added."""
  return tokenizer.encode(text, add_special_tokens=False)


def greedy(model, tokenizer, text):
  """The most likely continuation, without stopping at the end token.

  `margin` is the smallest gap between the first and second logit on the way:
  where it is large, other arithmetic must choose the same tokens.
  """
  ids = encode(tokenizer, text)
  tokens, past, margins, out = torch.tensor([ids]), None, [], []
  for _ in range(NEW_TOKENS):
    result = model(tokens, past_key_values=past, use_cache=True)
    best = result.logits[0, -1].topk(2)
    past, tokens = result.past_key_values, best.indices[None, :1]
    out.append(int(tokens))
    margins.append(float(best.values[0] - best.values[1]))
  return {'text': text, 'ids': ids, 'new': out, 'margin': min(margins)}


def mixed(model, tokenizer):
  """Logits and block outputs of one forward pass over `MIXED`."""
  ids = encode(tokenizer, MIXED)
  blocks = []
  hooks = [
    layer.register_forward_hook(
      lambda module, args, out: blocks.append(
        out[0] if isinstance(out, tuple) else out
      )
    )
    for layer in model.model.layers
  ]
  logits = model(torch.tensor([ids])).logits[0, -3:]
  for hook in hooks:
    hook.remove()
  vocabulary = list(range(0, logits.shape[1], logits.shape[1] // 200))[:200]
  last = torch.stack(
    [block.reshape(-1, block.shape[-1])[-1] for block in blocks]
  )
  return {
    'text': MIXED,
    'ids': ids,
    'vocabulary': vocabulary,
    'logits': logits[:, vocabulary].tolist(),
    'logsumexp': logits.logsumexp(-1).tolist(),
    'argmax': logits.argmax(-1).tolist(),
    'block_norms': last.norm(dim=-1).tolist(),
    'block_features': last[:, :8].tolist(),
  }


def chats(tokenizer):
  """Conversations as the template renders them."""
  out = []
  for roles in CONVERSATIONS:
    lines = LINES if roles[0] == 'system' else LINES[1:]
    messages = [
      {'role': role, 'content': line}
      for role, line in zip(roles, lines, strict=False)
    ]
    for generate in (False, True):
      text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generate
      )
      ids = encode(tokenizer, text)
      row = {'messages': messages, 'generate': generate}
      out.append(row | {'text': text, 'ids': ids})
  return out


if __name__ == '__main__':
  main()
