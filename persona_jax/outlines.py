"""The shape of a model without its weights: from a name or its config.json."""

from pathlib import Path

from persona_jax.models import (
  DecoderConfig,
  families,
  gguf_file,
  hub,
  shards,
  source,
)

_LLAMA = {  # what config.json of every Llama 3.1 says
  'model_type': 'llama',
  'vocab_size': 128256,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-5,
  'rope_theta': 500000.0,
  'max_position_embeddings': 131072,
  'tie_word_embeddings': False,
}
_8B = _LLAMA | {
  'hidden_size': 4096,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'intermediate_size': 14336,
}
_70B = _LLAMA | {
  'hidden_size': 8192,
  'num_hidden_layers': 80,
  'num_attention_heads': 64,
  'intermediate_size': 28672,
}
NAMED = {  # the hub gives these to nobody who has not accepted their terms
  'llama-3.1-8b': _8B,
  'llama-3.1-70b': _70B,
  'hf:meta-llama/Llama-3.1-8B': _8B,
  'hf:meta-llama/Llama-3.1-8B-Instruct': _8B,
  'hf:meta-llama/Llama-3.1-70B': _70B,
  'hf:meta-llama/Llama-3.1-70B-Instruct': _70B,
}


def outline(place: str) -> DecoderConfig:
  """The shape of a model: a name of `NAMED`, or a source; no weights are read.

  Of a model on the hub only config.json is fetched.

  Raises:
    ValueError: there is no such model, or it is not what we compute.
    OSError: its config.json could not be fetched.
  """
  if place in NAMED:
    return families.from_hf(NAMED[place])
  if place.startswith(hub.PREFIX):
    return _of_file(_fetched(place))
  if place.endswith('config.json'):
    return _of_file(Path(place))
  path = source.find(place)
  if path.is_dir():
    return _of_file(path / 'config.json')
  return gguf_file.read(path).config


def _of_file(path: Path) -> DecoderConfig:
  settings = shards.read_json(path)
  part, _ = families.text_part(settings)
  return families.from_hf(part)


def _fetched(place: str) -> Path:
  try:
    import huggingface_hub
  except ImportError as error:
    raise ImportError(
      f'{place} needs huggingface_hub: pip install "persona_jax[hf]".'
    ) from error
  name, _, revision = place.removeprefix(hub.PREFIX).partition('@')
  try:
    found = huggingface_hub.hf_hub_download(
      name, 'config.json', revision=revision or None
    )
  except Exception as error:  # by version: of requests, httpx or httpx2
    said = str(error).strip().splitlines() or [type(error).__name__]
    raise OSError(
      f'config.json of {place} could not be fetched ({said[0]}); give a folder '
      f'that holds it, or one of {", ".join(list(NAMED)[:2])}.'
    ) from error
  return Path(found)
