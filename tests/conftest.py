"""What every test shares: a strict JAX, a key, the real model."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)
# Many tests compile the same programs, in two workers.
_programs = Path(tempfile.gettempdir(), f'persona_jax_tests_{os.getuid()}')
jax.config.update('jax_compilation_cache_dir', str(_programs))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


@pytest.fixture
def key():
  return jax.random.key(0)


@pytest.fixture
def fake_devices():
  """An environment in which a process has eight devices."""
  flags = '--xla_force_host_platform_device_count=8'
  return os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}


@pytest.fixture(scope='session')
def gguf_path():
  from persona_jax.models import source

  return source.resolve('smollm2-135m')


@pytest.fixture(scope='session')
def smollm(gguf_path):
  from persona_jax import models

  return models.load(gguf_path)
