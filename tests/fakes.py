"""What the tests share: a tiny model, frames, beginnings of dialogues."""

import dataclasses
import functools
import types
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax import cache as caches
from persona_jax import dialogue, taps, trees
from persona_jax.activations import edits
from persona_jax.models import cache, checkpoint, config, decoder, names
from persona_jax.models.config import Kind, Rope
from persona_jax.rollout import Sampling, Scenario, Speaker, converse

CONFIG = config.DecoderConfig(
  vocab=301,  # a size that nothing else has
  features=32,
  layers=2,
  heads=6,
  kv_heads=2,
  head_dim=6,
  hidden=48,
  kinds=(Kind(Rope(500.0)),),
  norm_eps=1e-6,
)
FRAMES = (  # of different sizes, in tokens that no prompt holds
  dialogue.Frame(jnp.array([290, 291, 292]), jnp.array([293, 294])),
  dialogue.Frame(jnp.array([295]), jnp.array([296, 297, 298, 299])),
)
STOPS = 300  # ids in `Sampling.stop`, so that any choice has one shape


class Tiny(NamedTuple):
  """A decoder with random weights, stacked and unstacked."""

  config: config.DecoderConfig
  stacked: Any
  unstacked: Any
  apply: Callable
  edited: Callable  # with the stored edits
  run: Callable  # that, jitted once for all tests
  unembed: Callable
  memory: Callable  # (batch, size) -> an empty cache


@functools.cache
def tiny(config=CONFIG, seed=0):
  """The same tiny model, built once a session: its functions are static."""
  stacked = variables(config, seed)
  return Tiny(config, stacked, trees.unstack_layers(stacked), *_fns(config))


@functools.cache
def _fns(config):
  apply, unembed = decoder.functions(config)
  edited = taps.edited(apply, edits.stored)
  memory = functools.partial(cache.empty, config)
  return apply, edited, jax.jit(edited), unembed, memory


def variables(config, seed=0):
  """Variables of the shapes of `init`, large enough that all parts matter.

  As `init` draws them, the layers hardly move the residual stream, biases are
  zero and norms one: a test would not see them missing.
  """
  rng = np.random.default_rng(seed)

  def leaf(path, shape):
    noise = 0.2 * rng.standard_normal(shape.shape)
    around = 1.0 if trees.name(path).endswith('scale') else 0.0
    return jnp.asarray(around + noise, jnp.float32)

  init = functools.partial(decoder.init, config)
  shapes = jax.eval_shape(init, jax.random.key(0))
  return jax.tree_util.tree_map_with_path(leaf, shapes)


def formula(name, shape):
  """Weights told by their name, as the makers of golden files make them."""
  start = zlib.crc32(name.encode()) % 1000
  wave = np.sin(start + np.arange(np.prod(shape), dtype=np.float64))
  around = 1.0 if 'norm' in name else 0.0
  return (around + 0.3 * wave).reshape(shape).astype(np.float32)


def opened(config, where='tiny'):
  """A Hugging Face checkpoint of weights by formula, without its files."""
  table = names.table(config, names.HUGGING_FACE)
  shapes = names.foreign(config, table)
  return checkpoint.Checkpoint(
    where=where,
    files=(),
    config=config,
    names=table,
    shapes=shapes,
    read=lambda name: formula(name, shapes[name]),
    tokenizer=None,
    template=None,
    special={},
  )


def same(left, right):
  """Asserts that two trees have the same names, dtypes and numbers."""
  left, right = trees.flatten(left), trees.flatten(right)
  assert left.keys() == right.keys()
  for name, leaf in left.items():
    assert leaf.dtype == right[name].dtype, name
    np.testing.assert_array_equal(leaf, right[name], err_msg=name)


def text(batch=3, length=12, vocab=300, seed=0):
  """Random tokens and their positions, without padding."""
  tokens = np.random.default_rng(seed).integers(0, vocab, (batch, length))
  positions = np.broadcast_to(np.arange(length), (batch, length))
  return jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32)


def ragged(valid):
  """Positions that count the valid slots; -1 elsewhere."""
  valid = np.asarray(valid, bool)
  return jnp.asarray(
    np.where(valid, np.cumsum(valid, 1) - 1, -1), dtype=jnp.int32
  )


def axes(config=CONFIG, seed=0):
  """A unit vector a layer, `[L, D]`."""
  shape = (config.layers, config.features)
  axes = np.random.default_rng(seed).standard_normal(shape)
  axes /= np.linalg.norm(axes, axis=1, keepdims=True)
  return np.asarray(axes, np.float32)


def memory(batch, size, blank=0):
  """A cache of tokens, for speakers that are no decoder."""
  size = -(-size // caches.BLOCK) * caches.BLOCK
  slots = jnp.full((batch, 1, size, 1), blank, jnp.float32)
  return caches.Cache(keys=(slots,), values=(slots,))


def remember(memory, tokens, positions):
  """The tokens so far, `[B S]`, and the cache with those that are new."""
  new = tokens[:, :, None, None].astype(jnp.float32)
  keys, values = caches.write(
    *memory.keys, *memory.values, new, new, positions, memory.rows
  )
  slots = caches.pick(values, memory.rows)[:, 0, :, 0]
  return slots.astype(jnp.int32), memory.replace(keys=(keys,), values=(values,))


def caps(config=CONFIG, seed=0, low=0.3, high=0.6, first=0):
  """Caps that act nearly everywhere."""
  full = lambda bound: jnp.full(config.layers, bound, jnp.float32)
  axis = jnp.asarray(axes(config, seed))
  return edits.caps(axis, full(low), full(high), first=first)


def no_caps(config=CONFIG):
  """Caps of the same shapes that never act."""
  return edits.no_caps(config.layers, config.features)


def with_edits(variables, collection):
  """The variables with the collection `edits`, stacked as they are."""
  if 'layers' not in variables['params']:
    collection = trees.unstack_layers({'edits': collection})['edits']
  return {**variables, 'edits': collection}


def stops(ids):
  """Any number of stop ids as an array of one shape."""
  return np.resize(np.asarray(ids, np.int32), STOPS)


def speaker(model, collection, batch, stop, **sampling):
  """A speaker whose edits act."""
  return Speaker(
    variables=with_edits(model.unstacked, collection),
    sampling=Sampling.of(batch, stops(stop), **sampling),
    apply=model.edited,
    unembed=model.unembed,
    memory=model.memory,
  )


def scenario(batch=5, seed=0):
  """Ragged beginnings of dialogues, ids counting from 10."""
  rng = np.random.default_rng(seed)
  ints = lambda *a: jnp.asarray(rng.integers(*a), jnp.int32)
  return Scenario(
    ids=jnp.arange(10, 10 + batch, dtype=jnp.int32),
    samples=ints(0, 9, batch),
    prompts=ints(40, 290, (batch, 2, 7)),
    prompt_length=ints(2, 8, (batch, 2)),
    opening=ints(40, 290, (batch, 4)),
    opening_length=ints(1, 5, batch),
    live=jnp.ones(batch, bool),
  )


def made_up(batch=4, lines=4, size=5, seed=0):
  """A dialogue of random tokens and lengths, some lines stopped."""
  rng = np.random.default_rng(seed)
  ints = lambda *a: jnp.asarray(rng.integers(*a), jnp.int32)
  length = ints(1, size + 1, (batch, lines))
  odd = np.add.outer(np.arange(batch), np.arange(lines)) % 2 == 1
  blank = jnp.zeros((batch, lines, size), jnp.float32)
  return dialogue.Dialogue(
    tokens=ints(100, 200, (batch, lines, size)),
    length=length,
    stopped=jnp.asarray(odd & (np.arange(lines) > 0)) & (length > 1),
    logprobs=blank,
    raw_logprobs=blank,
    who=jnp.arange(lines, dtype=jnp.int32) % 2,
    prompts=ints(40, 90, (batch, 2, 6)),
    prompt_length=ints(1, 7, (batch, 2)),
    scenario=jnp.arange(batch, dtype=jnp.int32),
    sample=jnp.zeros(batch, jnp.int32),
    live=jnp.ones(batch, bool),
  )


def timeless(metrics):
  """The metrics of a step that are the same in every run."""
  return {k: v for k, v in metrics.items() if not k.startswith('pace/')}


def plain(record):
  """The fields of a record as numpy arrays, for loops in Python."""
  fields = {x.name: getattr(record, x.name) for x in dataclasses.fields(record)}
  arrays = {k: np.asarray(x) for k, x in fields.items() if hasattr(x, 'shape')}
  return types.SimpleNamespace(**arrays)


class Counted:
  """A function that counts how often it is traced; jit it once."""

  def __init__(self, fn):
    self.fn, self.traces = fn, 0

  def __call__(self, *args, **kwargs):
    self.traces += 1
    return self.fn(*args, **kwargs)


conversing = Counted(converse)


@functools.partial(jax.jit, static_argnames=('lines', 'tokens'))
def talk(key, speakers, scenario, *, lines=5, tokens=6):
  """A conversation in these frames, compiled once for all tests."""
  return conversing(key, speakers, FRAMES, scenario, lines=lines, tokens=tokens)
