"""The shape of a decoder, as plain numbers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """What a decoder-only transformer needs to know about itself."""

  vocab: int
  features: int  # D, the width of the residual stream
  layers: int
  heads: int
  kv_heads: int  # heads / kv_heads queries share a key
  head_dim: int
  hidden: int  # width of the gated MLP
  rope_theta: float
  norm_eps: float
  tied: bool = True  # unembed with the embedding
  qkv_bias: bool = False  # Qwen 2 and 2.5
  qk_norm: bool = False  # Qwen 3
  max_positions: int = 8192

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(
        f'heads={self.heads} is not a multiple of kv_heads={self.kv_heads}.'
      )
