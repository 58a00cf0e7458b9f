"""What every test shares: a strict JAX, a key, the real model."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)


@pytest.fixture
def key():
  return jax.random.key(0)


@pytest.fixture(scope='session')
def gguf_path():
  from persona_jax.models import source

  return source.resolve('smollm2-135m')


@pytest.fixture(scope='session')
def smollm(gguf_path):
  from persona_jax import models

  return models.load(gguf_path)
