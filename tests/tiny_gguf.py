"""Small GGUF files for tests: a llama with weights that tell where they lie."""

import gguf
import numpy as np

BYTES = [chr(i) if 33 <= i < 127 else f'<{i}>' for i in range(256)]
TOKENS = [*BYTES, '<s>', '</s>', 'he']
TYPES = [1] * 256 + [3, 3, 1]  # normal and control
NUMBERS = {
  'block_count': 1,
  'context_length': 64,
  'embedding_length': 8,
  'feed_forward_length': 12,
  'attention.head_count': 2,
  'attention.head_count_kv': 1,
  'attention.layer_norm_rms_epsilon': 1e-5,
}
VOCABULARY = {
  'tokenizer.ggml.model': 'gpt2',
  'tokenizer.ggml.pre': 'smollm',
  'tokenizer.ggml.tokens': TOKENS,
  'tokenizer.ggml.token_type': TYPES,
  'tokenizer.ggml.merges': ['h e'],
  'tokenizer.ggml.bos_token_id': 256,
  'tokenizer.ggml.eos_token_id': 257,
  'tokenizer.chat_template': '{{ messages }}',
}


def shapes(vocab=259, features=8, heads=2, kv_heads=1, hidden=12):
  head = features // heads
  layer = {
    'attn_norm.weight': (features,),
    'attn_q.weight': (features, features),
    'attn_k.weight': (kv_heads * head, features),
    'attn_v.weight': (kv_heads * head, features),
    'attn_output.weight': (features, features),
    'ffn_norm.weight': (features,),
    'ffn_gate.weight': (hidden, features),
    'ffn_up.weight': (hidden, features),
    'ffn_down.weight': (features, hidden),
  }
  whole = {
    'token_embd.weight': (vocab, features),
    'output_norm.weight': (features,),
  }
  return whole | {f'blk.0.{name}': shape for name, shape in layer.items()}


def weights(**sizes):
  draw = np.random.default_rng(0).normal
  return {
    k: draw(size=v).astype(np.float32) for k, v in shapes(**sizes).items()
  }


def write(path, tensors=None, architecture='llama', **changes):
  """Writes a llama of one layer; changes replace or add metadata."""
  writer = gguf.GGUFWriter(path, architecture)
  numbers = {f'{architecture}.{k}': v for k, v in NUMBERS.items()}
  for key, value in (numbers | VOCABULARY | changes).items():
    add(writer, key, value)
  for name, tensor in (weights() if tensors is None else tensors).items():
    kind = None
    if isinstance(tensor, tuple):
      tensor, kind = tensor
    writer.add_tensor(name, tensor, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def add(writer, key, value):
  if isinstance(value, bool):
    writer.add_bool(key, value)
  elif isinstance(value, str):
    writer.add_string(key, value)
  elif isinstance(value, int):
    writer.add_uint32(key, value)
  elif isinstance(value, float):
    writer.add_float32(key, value)
  elif isinstance(value, list):
    writer.add_array(key, value)
