"""Golden numbers of adapters, computed by PEFT: weights by formula.

Needs torch, transformers and peft, none of which the package needs:

  python launch/golden_lora.py --out=tests/golden
"""

import argparse
import json
import tempfile
import zlib
from pathlib import Path

import peft
import safetensors
import torch
import transformers

BASE = {  # sizes that no two axes share
  'vocab_size': 61,
  'hidden_size': 24,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 10,
  'intermediate_size': 44,
  'max_position_embeddings': 64,
  'rope_theta': 500.0,
}
ADAPTERS = {
  'plain': {'r': 4, 'lora_alpha': 8, 'target_modules': ['q_proj', 'down_proj']},
  'rank stabilised': {
    'r': 5,
    'lora_alpha': 4,
    'use_rslora': True,
    'target_modules': 'all-linear',
  },
  'patterns': {
    'r': 4,
    'lora_alpha': 8,
    'target_modules': ['k_proj', 'o_proj', 'gate_proj', 'up_proj'],
    'rank_pattern': {'up_proj': 3, 'model.layers.1.self_attn.o_proj': 6},
    'alpha_pattern': {'layers.[02].self_attn.k_proj': 5},
  },
  'one layer': {
    'r': 2,
    'lora_alpha': 3,
    'target_modules': r'.*layers\.1\.(self_attn\.v_proj|mlp\.up_proj)',
  },
}
IDS = [(7 * i) % BASE['vocab_size'] for i in range(12)]


def main():
  """Writes lora.json."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=Path, required=True)
  flags = parser.parse_args()
  config = transformers.AutoConfig.for_model('llama', **BASE)
  record = {
    'versions': {'torch': torch.__version__, 'peft': peft.__version__},
    'base': json.loads(config.to_json_string(use_diff=False)),
    'ids': IDS,
    'adapters': [adapter(config, *item) for item in ADAPTERS.items()],
  }
  (flags.out / 'lora.json').write_text(json.dumps(record) + '\n')


@torch.inference_mode()
def adapter(config, name, options):
  """What PEFT writes for an adapter, and the logits that it computes."""
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  fill(model.named_parameters())
  options = peft.LoraConfig(task_type='CAUSAL_LM', **options)
  adapted = peft.get_peft_model(model, options).eval()
  fill(
    (key.replace('.default', ''), leaf)
    for key, leaf in adapted.named_parameters()
    if 'lora_' in key
  )
  with tempfile.TemporaryDirectory() as folder:
    adapted.save_pretrained(folder)
    kept = json.loads(Path(folder, 'adapter_config.json').read_text())
    file = Path(folder, 'adapter_model.safetensors')
    with safetensors.safe_open(file, 'pt') as tensors:
      shapes = {k: tensors.get_slice(k).get_shape() for k in tensors.keys()}  # noqa: SIM118
  logits = adapted(torch.tensor([IDS])).logits[0, -2:]
  return {
    'name': name,
    'config': kept,
    'shapes': shapes,
    'logits': logits.tolist(),
  }


def fill(leaves):
  for name, leaf in leaves:
    leaf.copy_(formula(name, leaf.shape))


def formula(name, shape):
  """Weights that anyone can make again, told apart by their names."""
  start = zlib.crc32(name.encode()) % 1000
  wave = torch.sin(start + torch.arange(shape.numel(), dtype=torch.float64))
  around = 1.0 if 'norm' in name else 0.0
  return (around + 0.3 * wave).reshape(shape).float()


if __name__ == '__main__':
  main()
