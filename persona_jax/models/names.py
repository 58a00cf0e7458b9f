"""Foreign names of our parameters, and trees built from foreign tensors.

Ours are stacked over layers and experts; theirs may be one a layer, one an
expert, or several side by side. A `Piece` says which part is which.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from persona_jax import trees
from persona_jax.models.checkpoint import CheckpointError, listed
from persona_jax.models.config import DecoderConfig

Shape = tuple[int, ...]

# ours -> (Hugging Face, GGUF); {layer} and {expert} count from 0.
_WHOLE = {
  'embed/embedding': ('model.embed_tokens.weight', 'token_embd.weight'),
  'norm/scale': ('model.norm.weight', 'output_norm.weight'),
  'unembed/kernel': ('lm_head.weight', 'output.weight'),
}
_LAYER = {
  'attn_norm/scale': ('input_layernorm.weight', 'attn_norm.weight'),
  'attn/q/kernel': ('self_attn.q_proj.weight', 'attn_q.weight'),
  'attn/k/kernel': ('self_attn.k_proj.weight', 'attn_k.weight'),
  'attn/v/kernel': ('self_attn.v_proj.weight', 'attn_v.weight'),
  'attn/o/kernel': ('self_attn.o_proj.weight', 'attn_output.weight'),
  'attn/q/bias': ('self_attn.q_proj.bias', 'attn_q.bias'),
  'attn/k/bias': ('self_attn.k_proj.bias', 'attn_k.bias'),
  'attn/v/bias': ('self_attn.v_proj.bias', 'attn_v.bias'),
  'attn/q_norm/scale': ('self_attn.q_norm.weight', 'attn_q_norm.weight'),
  'attn/k_norm/scale': ('self_attn.k_norm.weight', 'attn_k_norm.weight'),
  'mlp_norm/scale': ('post_attention_layernorm.weight', 'ffn_norm.weight'),
  'mlp/gate/kernel': ('mlp.gate_proj.weight', 'ffn_gate.weight'),
  'mlp/up/kernel': ('mlp.up_proj.weight', 'ffn_up.weight'),
  'mlp/down/kernel': ('mlp.down_proj.weight', 'ffn_down.weight'),
}
_NORM_AFTER = {  # then Hugging Face's post_attention is what it says
  'attn_post_norm/scale': (
    'post_attention_layernorm.weight',
    'post_attention_norm.weight',
  ),
  'mlp_norm/scale': ('pre_feedforward_layernorm.weight', 'ffn_norm.weight'),
  'mlp_post_norm/scale': (
    'post_feedforward_layernorm.weight',
    'post_ffw_norm.weight',
  ),
}
_FUSED = {  # rows in this order: q, k, v and gate, up
  f'attn/{x}/kernel': ('self_attn.qkv_proj.weight', 'attn_qkv.weight')
  for x in 'qkv'
} | {
  f'mlp/{x}/kernel': ('mlp.gate_up_proj.weight', 'ffn_up.weight')
  for x in ('gate', 'up')
}
_EXPERTS = {
  'mlp/router/kernel': ('mlp.gate.weight', 'ffn_gate_inp.weight'),
} | {
  f'mlp/experts/{x}/kernel': (
    f'mlp.experts.{{expert}}.{x}_proj.weight',
    f'ffn_{x}_exps.weight',
  )
  for x in ('gate', 'up', 'down')
}
_MIXTRAL = {
  'mlp/router/kernel': ('block_sparse_moe.gate.weight', 'ffn_gate_inp.weight'),
} | {
  f'mlp/experts/{x}/kernel': (
    f'block_sparse_moe.experts.{{expert}}.{w}.weight',
    f'ffn_{x}_exps.weight',
  )
  for x, w in (('gate', 'w1'), ('up', 'w3'), ('down', 'w2'))
}
_OF_FAMILY = {
  'phi3': _FUSED,
  'qwen3_moe': _EXPERTS,
  'mixtral': _MIXTRAL,
}

# The configuration holds what these say.
IGNORED = (
  r'rotary_emb\.inv_freq$',
  r'self_attn\.(masked_)?bias$',
  r'^rope_(freqs|factors_short|factors_long)\.weight$',
)
UNEMBED = 'lm_head.weight'  # of Hugging Face
EXPERTS = 'layers/mlp/experts/gate/kernel'  # spread as all of them are
HUGGING_FACE, GGUF = 0, 1  # columns of the tables above


class Piece(NamedTuple):
  """`ours[index]` is `theirs[rows]`."""

  ours: str
  index: tuple[int, ...]  # of layer and expert, as far as theirs are apart
  theirs: str
  rows: slice
  shape: Shape


class Tensor(NamedTuple):
  """One of their tensors, made from ours when it is fetched."""

  name: str
  shape: Shape
  dtype: Any
  fetch: Callable[[], np.ndarray]


def shapes(config: DecoderConfig) -> dict[str, Shape]:
  """The shape of every parameter by our name; layers are stacked in front."""
  c = config
  d, q, kv = c.features, c.heads * c.head_dim, c.kv_heads * c.head_dim
  layer = {
    'attn/q/kernel': (q, d),
    'attn/k/kernel': (kv, d),
    'attn/v/kernel': (kv, d),
    'attn/o/kernel': (d, q),
  } | _mlp_shapes(c)
  if c.qkv_bias:
    layer |= {
      f'attn/{x}/bias': (n,) for x, n in zip('qkv', (q, kv, kv), strict=True)
    }
  if c.qk_norm:
    sizes = (c.head_dim, c.head_dim) if c.qk_norm == 'head' else (q, kv)
    for x, n in zip('qk', sizes, strict=True):
      layer[f'attn/{x}_norm/scale'] = (n,)
  if c.norm_before:
    layer |= {'attn_norm/scale': (d,), 'mlp_norm/scale': (d,)}
  if c.norm_after:
    layer |= {'attn_post_norm/scale': (d,), 'mlp_post_norm/scale': (d,)}
  whole = {'embed/embedding': (c.vocab, d), 'norm/scale': (d,)}
  if not c.tied:
    whole['unembed/kernel'] = (c.vocab, d)
  return whole | {f'layers/{k}': (c.layers, *v) for k, v in layer.items()}


def _mlp_shapes(c) -> dict[str, Shape]:
  sizes = {
    'gate': (c.hidden, c.features),
    'up': (c.hidden, c.features),
    'down': (c.features, c.hidden),
  }
  if c.experts is None:
    return {f'mlp/{k}/kernel': v for k, v in sizes.items()}
  count = c.experts.count
  return {'mlp/router/kernel': (count, c.features)} | {
    f'mlp/experts/{k}/kernel': (count, *v) for k, v in sizes.items()
  }


def table(config: DecoderConfig, column: int) -> dict[str, str]:
  """Our name -> the foreign one, for the family of `config`."""
  prefix = ('model.layers.{layer}.', 'blk.{layer}.')[column]
  rows = _LAYER | (_NORM_AFTER if config.norm_after else {})
  rows |= _OF_FAMILY.get(config.family, {})
  named = {f'layers/{k}': prefix + row[column] for k, row in rows.items()}
  named |= {k: row[column] for k, row in _WHOLE.items()}
  return {k: named[k] for k in shapes(config)}


def pieces(config: DecoderConfig, table: Mapping[str, str]) -> list[Piece]:
  """What goes where, in the order of our parameters."""
  found, used = [], {}
  for ours, shape in shapes(config).items():
    apart = [x for x in ('{layer}', '{expert}') if x in table[ours]]
    rest = shape[len(apart) :]
    for index in itertools.product(*map(range, shape[: len(apart)])):
      words = dict(zip((x[1:-1] for x in apart), index, strict=True))
      theirs = table[ours].format(**words)
      start = used.get(theirs, 0)
      used[theirs] = stop = start + rest[0]
      found.append(Piece(ours, index, theirs, slice(start, stop), rest))
  return found


def foreign(
  config: DecoderConfig, table: Mapping[str, str]
) -> dict[str, Shape]:
  """The tensors that a checkpoint of `config` holds, by their foreign name."""
  out = {}
  for piece in pieces(config, table):
    out[piece.theirs] = (piece.rows.stop, *piece.shape[1:])
  return out


def check(
  available: Mapping[str, Shape],
  config: DecoderConfig,
  table: Mapping[str, str],
  where: str = 'the checkpoint',
):
  """Raises one CheckpointError that lists every tensor that does not fit."""
  wanted = foreign(config, table)
  ignored = {k for k in available if any(re.search(p, k) for p in IGNORED)}
  if config.tied:
    ignored |= set(_WHOLE['unembed/kernel'])  # a copy of the embedding
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
    raise CheckpointError(
      f'{where} does not fit its configuration; {len(problems)} problem(s): '
      f'{listed(problems)}. Add rows to models.names or fix the file.'
    )


def tensors(
  params: Mapping[str, Any],
  config: DecoderConfig,
  table: Mapping[str, str],
  gather: Callable[[Any], np.ndarray] = np.asarray,
) -> Iterator[Tensor]:
  """Their tensors from our parameters, stacked or not, one at a time.

  `gather` brings a part of a parameter to the host when it is fetched.
  """
  leaves = trees.flatten(params)
  by_name = {}
  for piece in pieces(config, table):
    by_name.setdefault(piece.theirs, []).append(piece)

  def fetch(group):
    parts = [gather(_part(leaves, piece)) for piece in group]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

  for name, group in by_name.items():
    shape = (group[-1].rows.stop, *group[-1].shape[1:])
    dtype = _leaf(leaves, group[0])[0].dtype
    yield Tensor(name, shape, dtype, functools.partial(fetch, group))


def _part(leaves, piece):
  leaf, index = _leaf(leaves, piece)
  return leaf[index] if index else leaf


def _leaf(leaves, piece):
  """The leaf that holds a piece, and the piece's index in it."""
  if piece.ours in leaves:
    return leaves[piece.ours], piece.index
  name = piece.ours.replace('layers/', f'layers_{piece.index[0]}/')
  return leaves[name], piece.index[1:]


def parameters(config: DecoderConfig) -> int:
  """How many numbers the model has."""
  return sum(math.prod(shape) for shape in shapes(config).values())


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
