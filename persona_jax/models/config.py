"""The shape of a decoder, as plain numbers."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions: a base, and how its frequencies are stretched.

  `scaling` holds the numbers of `kind` under Hugging Face's names, as sorted
  pairs; models.rope.FREQUENCIES says what each kind does with them.
  """

  theta: float
  kind: str = 'default'
  scaling: tuple[tuple[str, Any], ...] = ()
  fraction: float = 1.0  # of a head's features that turn (Phi-4 mini)
  long: bool = False  # longrope: for more positions than it began with


@dataclasses.dataclass(frozen=True)
class Kind:
  """What layers of a decoder differ in; arrays never do."""

  rope: Rope | None  # None: no positions at all (SmolLM3)
  window: int | None = None  # a token sees this many, itself included


@dataclasses.dataclass(frozen=True)
class Experts:
  """A mixture of experts in place of the MLP."""

  count: int
  active: int  # experts that a token visits
  normalised: bool  # their weights sum to one


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """What a decoder-only transformer needs to know about itself.

  The defaults are a Llama; each other family sets what it does differently.
  """

  vocab: int
  features: int  # D, the width of the residual stream
  layers: int
  heads: int
  kv_heads: int  # heads / kv_heads queries share a key
  head_dim: int
  hidden: int  # width of the gated MLP, or of an expert
  kinds: tuple[Kind, ...]
  layout: tuple[int, ...] = ()  # the kind of each layer; (): all the first
  family: str = 'llama'  # a row of models.family.FAMILIES
  norm_eps: float = 1e-6
  max_positions: int = 8192
  tied: bool = True  # unembed with the embedding
  activation: str = 'silu'  # of the MLP's gate; a row of decoder.ACTIVATIONS
  qkv_bias: bool = False
  qk_norm: str | None = None  # 'head', or 'whole': all heads in one norm
  norm_before: bool = True  # of attention and MLP
  norm_after: bool = False  # before their residual sum
  norm_offset: float = 0.0  # added to the scale of a norm
  embed_scale: float = 1.0
  attn_scale: float | None = None  # None: 1 / sqrt(head_dim)
  attn_softcap: float | None = None  # c tanh(scores / c)
  residual_scale: float = 1.0  # of what attention and MLP add
  logit_divisor: float = 1.0
  logit_softcap: float | None = None
  experts: Experts | None = None

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(
        f'heads={self.heads} is not a multiple of kv_heads={self.kv_heads}.'
      )
    if self.experts and self.experts.active > self.experts.count:
      raise ValueError(
        f'a token visits {self.experts.active} of {self.experts.count} experts.'
      )
    if self.layout and len(self.layout) != self.layers:
      raise ValueError(
        f'layout names {len(self.layout)} layers, the model has {self.layers}.'
      )

  @property
  def kind_of(self) -> tuple[int, ...]:
    """The kind of each layer, as an index into `kinds`."""
    return self.layout or (0,) * self.layers

  @property
  def slides(self) -> tuple[bool, ...]:
    """Whether each layer has a window."""
    return tuple(self.kinds[k].window is not None for k in self.kind_of)
