"""Foreign names of our parameters, and trees built from foreign tensors."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from persona_jax.models import config as config_lib

DecoderConfig = config_lib.DecoderConfig
Shape = tuple[int, ...]

# ours -> (Hugging Face, GGUF); `{layer}` counts from 0, and ours are stacked.
NAMES = {
  'embed/embedding': ('model.embed_tokens.weight', 'token_embd.weight'),
  'norm/scale': ('model.norm.weight', 'output_norm.weight'),
  'unembed/kernel': ('lm_head.weight', 'output.weight'),
} | {
  f'layers/{ours}': (f'model.layers.{{layer}}.{hf}', f'blk.{{layer}}.{gguf}')
  for ours, hf, gguf in (
    ('attn_norm/scale', 'input_layernorm.weight', 'attn_norm.weight'),
    ('attn/q/kernel', 'self_attn.q_proj.weight', 'attn_q.weight'),
    ('attn/k/kernel', 'self_attn.k_proj.weight', 'attn_k.weight'),
    ('attn/v/kernel', 'self_attn.v_proj.weight', 'attn_v.weight'),
    ('attn/o/kernel', 'self_attn.o_proj.weight', 'attn_output.weight'),
    ('attn/q/bias', 'self_attn.q_proj.bias', 'attn_q.bias'),
    ('attn/k/bias', 'self_attn.k_proj.bias', 'attn_k.bias'),
    ('attn/v/bias', 'self_attn.v_proj.bias', 'attn_v.bias'),
    ('attn/q_norm/scale', 'self_attn.q_norm.weight', 'attn_q_norm.weight'),
    ('attn/k_norm/scale', 'self_attn.k_norm.weight', 'attn_k_norm.weight'),
    ('mlp_norm/scale', 'post_attention_layernorm.weight', 'ffn_norm.weight'),
    ('mlp/gate/kernel', 'mlp.gate_proj.weight', 'ffn_gate.weight'),
    ('mlp/up/kernel', 'mlp.up_proj.weight', 'ffn_up.weight'),
    ('mlp/down/kernel', 'mlp.down_proj.weight', 'ffn_down.weight'),
  )
}
HUGGING_FACE = {ours: row[0] for ours, row in NAMES.items()}
GGUF = {ours: row[1] for ours, row in NAMES.items()}

# Buffers that some exporters keep: recomputed from the configuration.
IGNORED = (r'rotary_emb\.inv_freq$', r'self_attn\.(masked_)?bias$')


def shapes(config: DecoderConfig) -> dict[str, Shape]:
  """The shape of every parameter by our name; layers are stacked in front."""
  c = config
  d, q, kv = c.features, c.heads * c.head_dim, c.kv_heads * c.head_dim
  layer = {
    'attn_norm/scale': (d,),
    'attn/q/kernel': (q, d),
    'attn/k/kernel': (kv, d),
    'attn/v/kernel': (kv, d),
    'attn/o/kernel': (d, q),
    'mlp_norm/scale': (d,),
    'mlp/gate/kernel': (c.hidden, d),
    'mlp/up/kernel': (c.hidden, d),
    'mlp/down/kernel': (d, c.hidden),
  }
  if c.qkv_bias:
    layer |= {
      f'attn/{x}/bias': (n,) for x, n in zip('qkv', (q, kv, kv), strict=True)
    }
  if c.qk_norm:
    layer |= {f'attn/{x}_norm/scale': (c.head_dim,) for x in 'qk'}
  whole = {'embed/embedding': (c.vocab, d), 'norm/scale': (d,)}
  if not c.tied:
    whole['unembed/kernel'] = (c.vocab, d)
  return whole | {f'layers/{k}': (c.layers, *v) for k, v in layer.items()}


def foreign(
  config: DecoderConfig, names: Mapping[str, str]
) -> dict[str, Shape]:
  """The tensors that a checkpoint of `config` holds, by their foreign name."""
  out = {}
  for ours, shape in shapes(config).items():
    if ours.startswith('layers/'):
      for layer in range(config.layers):
        out[names[ours].format(layer=layer)] = shape[1:]
    else:
      out[names[ours]] = shape
  return out


def check(
  available: Mapping[str, Shape],
  config: DecoderConfig,
  names: Mapping[str, str],
  where: str = 'the checkpoint',
):
  """Raises one ValueError that lists every tensor that does not fit."""
  wanted = foreign(config, names)
  ignored = {k for k in available if any(re.search(p, k) for p in IGNORED)}
  if config.tied:
    ignored.add(names['unembed/kernel'])  # a copy of the embedding
  problems = [
    f'missing {k} {v}' for k, v in wanted.items() if k not in available
  ]
  problems += [
    f'unexpected {k} {tuple(v)}'
    for k, v in available.items()
    if k not in wanted and k not in ignored
  ]
  problems += [
    f'{k} is {tuple(available[k])}, not {v}'
    for k, v in wanted.items()
    if k in available and tuple(available[k]) != v
  ]
  if problems:
    raise ValueError(
      f'{where} does not fit its configuration; {len(problems)} problem(s): '
      f'{"; ".join(problems)}. Add rows to models.names.NAMES or IGNORED, or '
      'fix the file.'
    )


def build(
  read: Callable[[str], Any],
  available: Mapping[str, Shape],
  config: DecoderConfig,
  names: Mapping[str, str],
  *,
  put: Callable[[str, Shape, Callable], Any] | None = None,
  where: str = 'the checkpoint',
) -> dict[str, Any]:
  """The nested parameters, layers stacked, all tensors checked beforehand.

  Args:
    read: a foreign name -> something that numpy slices read from.
    available: shapes by foreign name.
    config: what the shapes must be.
    names: our name -> foreign name, `HUGGING_FACE` or `GGUF`.
    put: (our name, shape, fetch) -> leaf, where fetch(index) reads only the
      slices of `index`; by default the whole leaf as numpy.
    where: the name of the checkpoint in an error.
  """
  check(available, config, names, where)
  put = put or (lambda name, shape, fetch: fetch((slice(None),) * len(shape)))
  return nested(
    {
      ours: put(ours, shape, _fetch(read, names[ours], ours, config))
      for ours, shape in shapes(config).items()
    }
  )


def split(
  params: Mapping[str, Any], config: DecoderConfig, names: Mapping[str, str]
) -> dict[str, np.ndarray]:
  """The inverse of `build`: arrays by foreign name."""
  out = {}
  for ours in shapes(config):
    array = np.asarray(leaf(params, ours))
    if ours.startswith('layers/'):
      for layer in range(config.layers):
        out[names[ours].format(layer=layer)] = array[layer]
    else:
      out[names[ours]] = array
  return out


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """A tree from leaves by name: {'a/b': x} as {'a': {'b': x}}."""
  tree = {}
  for name, value in leaves.items():
    *parents, last = name.split('/')
    room = tree
    for parent in parents:
      room = room.setdefault(parent, {})
    room[last] = value
  return tree


def leaf(tree: Mapping[str, Any], name: str) -> Any:
  """The leaf that `name` ('a/b') leads to."""
  for part in name.split('/'):
    tree = tree[part]
  return tree


def _fetch(read, theirs, ours, config):
  def whole(index):
    return np.asarray(read(theirs)[index])

  def stacked(index):
    layers = range(config.layers)[index[0]]
    parts = [read(theirs.format(layer=i))[index[1:]] for i in layers]
    return np.stack(parts)

  return stacked if ours.startswith('layers/') else whole
