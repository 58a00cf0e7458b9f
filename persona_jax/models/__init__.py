"""Language models: decoders, their checkpoints and their tokenizers."""

from persona_jax.models import adapter_file, lora
from persona_jax.models.checkpoint import CheckpointError
from persona_jax.models.config import DecoderConfig
from persona_jax.models.load import LanguageModel, load, save

__all__ = [
  'CheckpointError',
  'DecoderConfig',
  'LanguageModel',
  'adapter_file',
  'load',
  'lora',
  'save',
]
