"""Golden numbers of every family: tiny decoders, computed by transformers.

Needs torch and transformers (the extra `parity`):

  python launch/golden_families.py --out=tests/golden
"""

import argparse
import copy
import json
import tempfile
import zlib
from pathlib import Path

import safetensors.torch
import torch
import transformers

TINY = {  # of each family, sizes that no two axes share
  'vocab_size': 61,
  'hidden_size': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'intermediate_size': 40,
  'max_position_embeddings': 64,
  'rope_theta': 500.0,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'pad_token_id': 0,
}
WINDOW = 7  # shorter than the text
THETA = {'rope_theta': 500.0}
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
YARN = {
  'rope_type': 'yarn',
  'factor': 4.0,
  'original_max_position_embeddings': 16,
}
LINEAR = {'rope_type': 'linear', 'factor': 2.0}


def longrope(pairs):
  return {
    'rope_type': 'longrope',
    'short_factor': [1.0 + 0.1 * i for i in range(pairs)],
    'long_factor': [1.5 + 0.7 * i for i in range(pairs)],
  }


FAMILIES = {  # name -> (model_type, sizes)
  'llama, tied': ('llama', {'tie_word_embeddings': True}),
  'llama 3 (llama3 rope)': ('llama', {'rope_parameters': LLAMA3 | THETA}),
  'llama, linear rope': ('llama', {'rope_parameters': LINEAR | THETA}),
  'llama, yarn rope': ('llama', {'rope_parameters': YARN | THETA}),
  'falcon 3 (llama, wide heads)': ('llama', {'head_dim': 10}),
  'mistral, window': ('mistral', {'sliding_window': WINDOW}),
  'mistral, no window': ('mistral', {'sliding_window': None}),
  'mixtral': ('mixtral', {'num_local_experts': 5, 'num_experts_per_tok': 2}),
  'qwen 2, tied': ('qwen2', {'tie_word_embeddings': True}),
  'qwen 2, some windows': (
    'qwen2',
    {
      'use_sliding_window': True,
      'sliding_window': WINDOW,
      'max_window_layers': 1,
      'num_hidden_layers': 3,
    },
  ),
  'qwen 3': ('qwen3', {'head_dim': 8, 'tie_word_embeddings': True}),
  'qwen 3 moe': (
    'qwen3_moe',
    {
      'head_dim': 8,
      'moe_intermediate_size': 14,
      'num_experts': 6,
      'num_experts_per_tok': 3,
      'norm_topk_prob': True,
    },
  ),
  'qwen 3 moe, weights as they are': (
    'qwen3_moe',
    {
      'head_dim': 8,
      'moe_intermediate_size': 14,
      'num_experts': 6,
      'num_experts_per_tok': 3,
      'norm_topk_prob': False,
    },
  ),
  'gemma 2': (
    'gemma2',
    {
      'head_dim': 8,
      'query_pre_attn_scalar': 11,
      'sliding_window': WINDOW,
      'num_hidden_layers': 4,
      'attn_logit_softcapping': 2.0,
      'final_logit_softcapping': 1.5,
    },
  ),
  'gemma 3': (
    'gemma3_text',
    {
      'head_dim': 8,
      'query_pre_attn_scalar': 11,
      'sliding_window': WINDOW,
      'num_hidden_layers': 7,
      'rope_parameters': {
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 50.0},
        'full_attention': LINEAR | THETA,
      },
    },
  ),
  'phi 3': ('phi3', {'sliding_window': WINDOW}),
  'phi 3, short longrope': (
    'phi3',
    {
      'original_max_position_embeddings': 32,
      'rope_parameters': longrope(3) | THETA,
    },
  ),
  'phi 4 mini (long longrope, part of a head)': (
    'phi3',
    {
      'hidden_size': 32,
      'original_max_position_embeddings': 16,
      'rope_parameters': longrope(3) | THETA | {'partial_rotary_factor': 0.75},
      'tie_word_embeddings': True,
    },
  ),
  'olmo 2': ('olmo2', {}),
  'granite 3': (
    'granite',
    {
      'embedding_multiplier': 3.0,
      'residual_multiplier': 0.4,
      'attention_multiplier': 0.3,
      'logits_scaling': 1.7,
      'tie_word_embeddings': True,
    },
  ),
  'smollm 3': ('smollm3', {'num_hidden_layers': 5}),
}


def main():
  """Writes families.json."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=Path, required=True)
  flags = parser.parse_args()
  text = json.dumps([tiny(name) for name in FAMILIES])
  (flags.out / 'families.json').write_text(text + '\n')


def tiny(name):
  """A tiny decoder with weights by formula, and what it computes.

  Gradients are kept as one number a tensor, their product with the formula.
  """
  model = tiny_model(name)
  ids = [1 + (7 * i) % 60 for i in range(24)]  # 0 is padding: no gradient
  blocks = []
  hooks = [
    layer.register_forward_hook(
      lambda module, args, out: blocks.append(
        (out[0] if isinstance(out, tuple) else out).reshape(24, -1)[-1]
      )
    )
    for layer in model.model.layers
  ]
  logits = model(torch.tensor([ids])).logits[0]
  for hook in hooks:
    hook.remove()
  scores = logits[:-1].log_softmax(-1)
  loss = -scores[torch.arange(23), torch.tensor(ids[1:])].mean()
  loss.backward()
  config = json.loads(model.config.to_json_string(use_diff=False))
  kept = {k: v for k, v in config.items() if k not in INERT}
  return {
    'name': name,
    'config': kept,
    'ids': ids,
    'logits': rounded(logits[-2:]),
    'blocks': rounded(torch.stack(blocks)[:, :6]),
    'loss': float(loss),
    'grads': {
      name: float((grad * formula(f'grad of {name}', grad.shape)).sum())
      for name, grad in saved(model, lambda x: x.grad).items()
    },
  }


def tiny_model(name):
  """A tiny decoder of transformers with weights by formula."""
  kind, sizes = FAMILIES[name]
  sizes = TINY | sizes
  if 'rope_parameters' in sizes:
    del sizes['rope_theta']
  config = transformers.AutoConfig.for_model(kind, **sizes)
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.copy_(formula(name, parameter.shape))
    # By the names on disk: transformers keeps some tensors fused in memory.
    with tempfile.TemporaryDirectory() as folder:
      named = saved(model, lambda x: x)
      named = {k: formula(k, v.shape) for k, v in named.items()}
      model.save_pretrained(folder)
      safetensors.torch.save_file(
        named, Path(folder, 'model.safetensors'), metadata={'format': 'pt'}
      )
      model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation='eager',
        experts_implementation='eager',
        dtype=torch.float32,
      )
  return model.eval()


def saved(model, pick):
  """`pick(parameter)` of every parameter, under the names on disk."""
  copy_ = copy.deepcopy(model)
  with torch.no_grad():
    for new, old in zip(copy_.parameters(), model.parameters(), strict=True):
      new.copy_(pick(old))
  with tempfile.TemporaryDirectory() as folder:
    copy_.save_pretrained(folder)
    return safetensors.torch.load_file(Path(folder, 'model.safetensors'))


def rounded(x):
  return [[round(float(y), 6) for y in row] for row in x]


INERT = ('id2label', 'label2id', 'transformers_version', '_name_or_path')


def formula(name, shape):
  """Weights that anyone can make again, told apart by their names."""
  start = zlib.crc32(name.encode()) % 1000
  wave = torch.sin(start + torch.arange(shape.numel(), dtype=torch.float64))
  around = 1.0 if 'norm' in name else 0.0
  return (around + 0.3 * wave).reshape(shape).float()


if __name__ == '__main__':
  main()
