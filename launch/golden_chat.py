"""Golden renderings of the chat formats of many families, by transformers.

The templates are ours: short ones, each with the format and the habits of a
family. Needs transformers and gguf, which the package does not need:

  python launch/golden_chat.py --folder=DIR_OF_THE_GGUF --out=tests/golden
"""

import argparse
import json
import re
from pathlib import Path

import transformers

FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
CONTROL = re.compile(r'<\|\w+\|>|\[/?[A-Z_]+\]|</?s>|</?bos>|<\w+_of_turn>')
CHATML = (
  "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}",
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
)
ALTERNATE = (
  "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('Roles must alternate user/assistant.') }}{% endif %}"
)
TEMPLATES = {
  # Trims; always has a system message, with a date in it.
  'llama3': (
    '{{ bos_token }}{% set first = messages[0] %}'
    "{% set has = first['role'] == 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' }}"
    "{{ date_string | default('26 Jul 2024') }}{{ '\\n\\n' }}"
    "{{ (first['content'] if has else '') | trim }}{{ '<|eot_id|>' }}"
    '{% for m in messages[1:] if has %}{{ turn(m) }}{% endfor %}'
  ),
  # A default system prompt.
  'qwen2': (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
    '{% for m in messages %}' + CHATML[0] + '{% endfor %}' + CHATML[1]
  ),
  # Thoughts only in answers after the last question.
  'qwen3': (
    '{% set ns = namespace(last=0) %}{% for m in messages %}'
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    '{% endfor %}{% for m in messages %}'
    "{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% set thought = m.content.split('</think>')[0] if '</think>' in m.content"
    " else '' %}{{ '<|im_start|>assistant\\n' }}"
    '{% if loop.index0 > ns.last %}'
    "{{ '<think>\\n' + thought.split('<think>')[-1].strip('\\n') }}"
    "{{ '\\n</think>\\n\\n' }}{% endif %}{{ said + '<|im_end|>\\n' }}"
    '{% else %}' + CHATML[0] + '{% endif %}{% endfor %}'
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    '{% if enable_thinking is defined and not enable_thinking %}'
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
  ),
  # Knows no system role, trims, calls the assistant a model.
  'gemma2': (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    + ALTERNATE
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}"
    "{{ '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{{ '<start_of_turn>model\\n' if add_generation_prompt else '' }}"
  ),
  # Puts the system message before the first user line.
  'gemma3': (
    "{{ bos_token }}{% set has = messages[0].role == 'system' %}"
    "{% set begin = messages[0].content + '\\n\\n' if has else '' %}"
    '{% for m in (messages[1:] if has else messages) %}'
    + ALTERNATE
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}"
    "{{ '\\n' + (begin if loop.first else '') + m.content | trim }}"
    "{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{{ '<start_of_turn>model\\n' if add_generation_prompt else '' }}"
  ),
  # Puts the system message before the last user line, wherever that is.
  'mistral3': (
    "{{ bos_token }}{% set has = messages[0].role == 'system' %}"
    '{% for m in (messages[1:] if has else messages) %}'
    + ALTERNATE
    + "{% if m.role == 'user' %}{{ '[INST]' }}"
    "{{ messages[0].content + '\\n\\n' if has and loop.last else '' }}"
    "{{ m.content + '[/INST]' }}"
    '{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}'
  ),
  'mistral7': (
    '{{ bos_token }}{% for m in messages %}'
    "{% if m.role == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    '{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}'
  ),
  # Ends in an end token unless an answer is asked for.
  'phi3': (
    '{% for m in messages %}'
    "{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
  ),
  'phi4': (
    '{% for m in messages %}{{ "<|im_start|>" + m.role + "<|im_sep|>" }}'
    '{{ m.content + "<|im_end|>" }}{% endfor %}'
    '{% if add_generation_prompt %}{{ "<|im_start|>assistant<|im_sep|>" }}'
    '{% endif %}'
  ),
  # Headers are plain words; no line break after the last answer.
  'olmo2': (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}"
    "{{ m.content + (eos_token if m.role == 'assistant' else '') }}"
    "{{ '' if loop.last and m.role == 'assistant' else '\\n' }}"
    "{{ '<|assistant|>\\n' if loop.last and add_generation_prompt else '' }}"
    '{% endfor %}'
  ),
  # A default system prompt that names the day.
  'granite3': (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|start_of_role|>system<|end_of_role|>Today is ' + (day | default("
    "'Monday')) + '.<|end_of_text|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role }}"
    "{{ '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}{% endfor %}"
    "{{ '<|start_of_role|>assistant<|end_of_role|>' if add_generation_prompt"
    " else '' }}"
  ),
  # A switch in the system message, and marks around what is generated.
  'smollm3': (
    "{% set has = messages[0].role == 'system' %}"
    "{% set told = messages[0].content if has else 'Be kind.' %}"
    "{% set quick = '/no_think' in told or not enable_thinking | default(true)"
    ' %}{% set blank = "<think>\\n\\n</think>\\n" if quick else "" %}'
    "{{ '<|im_start|>system\\nMode: ' + ('fast' if quick else 'slow') }}"
    "{{ '\\n\\n' + told.replace('/no_think', '').rstrip() + '<|im_end|>\\n' }}"
    '{% for m in (messages[1:] if has else messages) %}'
    "{% if m.role == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\\n' + blank + m.content.lstrip('\\n') }}"
    "{{ '<|im_end|>\\n' }}{% endgeneration %}{% else %}"
    + CHATML[0]
    + '{% endif %}{% endfor %}'
    "{{ '<|im_start|>assistant\\n' + blank if add_generation_prompt else '' }}"
  ),
}
LLAMA_TURN = (
  '{% macro turn(m) %}'
  "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
  "{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endmacro %}"
)
TEMPLATES['llama3'] = (
  LLAMA_TURN
  + TEMPLATES['llama3'].replace('[1:] if has', '[(1 if has else 0):]')
  + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n'"
  " if add_generation_prompt else '' }}"
)
SPECIAL = {  # the beginning and the end that templates may name
  'llama3': {'bos': '<|begin_of_text|>', 'eos': '<|eot_id|>'},
  'gemma2': {'bos': '<bos>', 'eos': '<eos>'},
  'gemma3': {'bos': '<bos>', 'eos': '<eos>'},
  'mistral3': {'bos': '<s>', 'eos': '</s>'},
  'mistral7': {'bos': '<s>', 'eos': '</s>'},
  'phi3': {'eos': '<|endoftext|>'},
  'olmo2': {'bos': '<|endoftext|>', 'eos': '<|endoftext|>'},
}
SWITCHES = {  # what else a template is told
  'llama3': [{}, {'date_string': '1 May 2025'}],
  'qwen3': [{}, {'enable_thinking': False}],
  'smollm3': [{}, {'enable_thinking': False}],
}
CONVERSATIONS = (  # roles by their first letters; contents
  ('su', 'You are Ada, 36. /no_think|Is it 5 €?'),
  ('uau', 'Hi!| Hello\nyou |Hi!'),
  ('ua', 'Bye 再见|<think>\nwell\n</think>\n\nHi! 🙂'),
  ('suaua', 'Be Ada.|Hi!|Hi!||<|im_end|> <end_of_turn>'),
)
ROLES = {'s': 'system', 'u': 'user', 'a': 'assistant'}


def main():
  """Writes chat_families.json."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--folder', type=Path, required=True)
  parser.add_argument('--out', type=Path, required=True)
  flags = parser.parse_args()
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    flags.folder, gguf_file=FILE
  )
  known = set(tokenizer.get_added_vocab())
  texts = ' '.join([*TEMPLATES.values(), str(SPECIAL)])
  control = sorted(set(CONTROL.findall(texts)) - known)
  tokenizer.add_special_tokens({'additional_special_tokens': control})
  families = [
    family(tokenizer, name, variables)
    for name in TEMPLATES
    for variables in SWITCHES.get(name, [{}])
  ]
  record = {
    'version': transformers.__version__,
    'control': control,
    'families': families,
  }
  text = json.dumps(record, ensure_ascii=True)
  (flags.out / 'chat_families.json').write_text(text + '\n')


def family(tokenizer, name, variables):
  """One template, and what transformers makes of every conversation."""
  special = SPECIAL.get(name, {})
  tokenizer.bos_token = special.get('bos')
  tokenizer.eos_token = special.get('eos')
  tokenizer.chat_template = TEMPLATES[name]
  return {
    'name': name,
    'template': TEMPLATES[name],
    'special': special,
    'variables': variables,
    'rows': [
      row(tokenizer, roles, contents.split('|', len(roles) - 1), variables)
      for roles, contents in CONVERSATIONS
    ],
  }


def row(tokenizer, roles, contents, variables):
  """A conversation; None for text and ids where the template refuses it."""
  messages = [
    {'role': ROLES[role], 'content': content}
    for role, content in zip(roles, contents, strict=True)
  ]
  options = {'add_generation_prompt': roles[-1] == 'u'} | variables
  apply = tokenizer.apply_chat_template
  try:
    text = apply(messages, tokenize=False, **options)
    ids = apply(messages, return_dict=False, **options)
  except Exception:  # jinja's, from the template
    text = ids = None
  about = {'messages': messages, 'generate': roles[-1] == 'u'}
  return about | {'text': text, 'ids': ids}


if __name__ == '__main__':
  main()
