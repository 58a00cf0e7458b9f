"""What a job costs, counted by hand: FLOPs, bytes moved, bytes held.

XLA's own count reads a scanned layer once; these sums do not. `ways` of rows
and `tensor` of features divide the work; all else is named where it counts.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from persona_jax import chips, trees
from persona_jax import job as jobs
from persona_jax.job import Job
from persona_jax.learn import sharding

_HALF = ('pallas', 'cudnn')  # kernels that skip what a token may not see
_F32 = 4  # bytes


class Products(NamedTuple):
  """Multiply-adds of a token in the products of one layer."""

  qkv: int
  o: int
  up: int  # with the gate, and the router of experts
  down: int

  @property
  def all(self) -> int:
    return sum(self)


def products(config) -> Products:
  """The products of weights and one token, a layer."""
  q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
  mlp, router = config.features * config.hidden, 0
  if config.experts is not None:
    router = config.features * config.experts.count
    mlp *= config.experts.active
  return Products(
    qkv=config.features * (q + 2 * kv),
    o=q * config.features,
    up=2 * mlp + router,
    down=mlp,
  )


# FLOPs, over all chips.


def train_flops(job: Job) -> dict[str, float]:
  """FLOPs of a step: what the model needs, and what the program computes.

  The model needs the products of the forward pass once and of the backward
  pass twice, and the visible half of attention. The program computes masked
  attention too, and again what it did not keep.
  """
  config, layers = job.config, job.config.layers
  slots = job.batch * job.tokens
  weights = 2.0 * slots * layers * products(config).all
  heard = attention(job, job.batch * job.tokens, job.tokens)
  whole = heard * (0.5 if job.attend in _HALF else 1.0)
  logits = 2.0 * job.batch * job.said * config.vocab * config.features
  back = 1 if job.rank else 2  # an adapter's base has no gradient of its own
  added = _adapter(job) * slots
  return {
    'model': (1 + back) * (weights + logits) + 3 * (heard / 2 + added),
    'program': (1 + back) * (weights + logits)
    + 3 * (whole + added)
    + _again(job, weights, whole, logits, added),
  }


def attention(job: Job, tokens: int, slots: int) -> float:
  """FLOPs of tokens that attend to all of their slots, in all layers."""
  config = job.config
  width = config.heads * config.head_dim
  return 4.0 * tokens * slots * width * config.layers


def _again(job, weights, heard, logits, added):
  """What the backward pass computes a second time."""
  each = products(job.config)
  blocks = job.batch // job.microbatches * job.said * job.config.vocab
  again = logits if blocks > job.held else 0.0
  way, _, names = job.remat.partition(':')
  if way == 'none':
    return again
  if way == 'dots':
    return again + heard
  # Nothing reads the layer's sum again: its last product is left out.
  skipped = each.down + (each.o if 'attn_out' in names.split(',') else 0)
  again += weights * (1 - skipped / each.all) + added
  return again + heard * (0.5 if 'attn_weights' in names else 1.0)


def _adapter(job):
  """FLOPs that an adapter adds to a token's forward pass."""
  if not job.rank:
    return 0
  leaves = trees.flatten(jobs.adapter(job))
  return sum(
    2 * math.prod(leaf.shape)
    for name, leaf in leaves.items()
    if not name.endswith('scale')
  )


class Talk(NamedTuple):
  """A rollout in which every line has its full length."""

  steps: int  # tokens that every lane says, one after the other
  reads: int  # passes over a chunk
  read: int  # tokens that are read in each, over all chips
  flops_step: float  # of one speaker, over all chips
  flops_read: float


def talk(job: Job) -> Talk:
  """Steps and reads of a rollout; each speaker reads all that is said."""
  config, lines = job.config, job.lines - 1  # the opening is given
  each = 2.0 * products(config).all * config.layers
  logits = 2.0 * config.vocab * config.features
  lanes = job.batch // job.ways
  width = max(1, lanes // 4)
  chunk = 2 * jobs.FRAME + job.line + 1
  turns = lines + math.ceil(2 * job.prompt / chunk)
  read = job.ways * width * chunk
  return Talk(
    steps=lines * job.line,
    reads=turns * math.ceil(lanes / width),
    read=read,
    flops_step=job.batch * (each + logits)
    + attention(job, job.batch, job.tokens),
    flops_read=read * each + attention(job, read, job.tokens),
  )


# Bytes that a chip reads and writes in its own memory.


def train_bytes(job: Job) -> float:
  """Bytes of a step: every array that is made is written and read once."""
  config, tensor = job.config, job.mesh['tensor']
  passes = 3 if job.remat == 'none' else 4  # forward, again, backward twice
  weights = 2 * passes * job.microbatches * serving(job)  # gathered, read
  slots = job.slots
  wide = (config.heads + 2 * config.kv_heads) * config.head_dim
  wide = (wide + 4 * config.hidden) / tensor + 8 * config.features
  made = 2 * job.width * passes * slots * config.layers * wide
  trained, _ = jobs.state(job)
  moved = 2 * held(trained, job) * (1 + 1 / 3)  # and the gradient
  return weights + made + passes * _scores(job) + moved


def _scores(job):
  """Attention weights: float32 before the softmax, bfloat16 after it."""
  if job.attend in _HALF:
    return 0.0
  config = job.config
  pairs = job.slots * job.tokens
  heads = config.heads / job.mesh['tensor']
  return 2 * (_F32 + job.width) * pairs * heads * config.layers


def talk_bytes(job: Job) -> int:
  """Bytes of a step of a rollout, of one speaker: weights and cache."""
  return serving(job) + cache(job)


# Bytes that a chip sends, where no compiler was asked.


def train_sent(job: Job) -> float:
  """Bytes of a step: weights gathered twice, sums of halves and gradients."""
  share = lambda axis: 1 - 1 / job.mesh[axis]
  weights = job.microbatches * serving(job)
  trained, _ = jobs.state(job)
  grads = held(trained.params, job)
  slots = job.slots
  sums = 6 * 2 * job.width * slots * job.config.features * job.config.layers
  return (
    (2 + (not job.rank)) * weights * share('fsdp')
    + 2 * grads * share('data')
    + sums * share('tensor')
  )


def step_sent(job: Job) -> float:
  """Bytes of a token of the rollout, by one speaker."""
  rows = job.batch // job.ways
  sums = 2 * 2 * job.width * rows * job.config.features * job.config.layers
  return sums * (1 - 1 / job.mesh['tensor'])


def narrow(job: Job) -> int:
  """Features of a weight on one chip, if fewer than a TPU's lanes; or 0.

  XLA then adds up padded arrays where it would gather, and sends twice as much.
  """
  wide = job.config.features // job.mesh['fsdp']
  tpu = job.place.chip.platform == 'tpu'
  return wide if tpu and wide < chips.LANES else 0


# Bytes that a chip holds.


def held(tree: Any, job: Job, rules=sharding.RULES) -> int:
  """Bytes of a tree of shapes on one chip, by the rules of sharding."""
  places = jax.tree.leaves(trees.shardings(tree, job.abstract, rules))
  return sum(
    math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, place in zip(jax.tree.leaves(tree), places, strict=True)
  )


def state(job: Job) -> int:
  """The train state, and the frozen weights of an adapter."""
  trained, rest = jobs.state(job)
  return held(trained, job) + held(rest, job)


def start(job: Job) -> int:
  """The parameters before training, which the reference is read with."""
  if job.rank:
    return 0  # they are the adapter's base
  return held(jobs.params(job.config, jnp.float32), job)


def serving(job: Job) -> int:
  """One speaker's weights, whole on every chip but over `tensor`."""
  rules = sharding.gathered(sharding.RULES)
  return held(jobs.params(job.config, jnp.dtype(job.dtype)), job, rules)


def speakers(job: Job) -> int:
  """The partner's and the policy's weights; an adapter shares its base."""
  if not job.rank:
    return 2 * serving(job)
  rules = sharding.gathered(sharding.RULES)
  return serving(job) + held(jobs.adapter(job), job, rules)


def cache(job: Job) -> int:
  """One speaker's keys and values: rows over ways, heads over tensor."""
  slots = job.prompt + job.lines * (jobs.FRAME + job.line)
  made = jax.eval_shape(lambda: jobs.memory(job)(job.batch, slots))
  total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made))
  tensor = job.mesh['tensor']
  heads = tensor if job.config.kv_heads % tensor == 0 else 1
  return total // (job.ways * heads)


def temporaries(job: Job) -> float:
  """What a step holds beside its state, about: no compiler was asked.

  The inputs of all layers, the largest arrays of one layer and its scores,
  the gradient (twice where microbatches add up), and a block of logits; or,
  when they are gone, the gradient and the update that it makes.
  """
  config, tensor = job.config, job.mesh['tensor']
  slots = job.slots / job.microbatches
  trained, _ = jobs.state(job)
  grads = held(trained.params, job)
  update = 2.0 * grads
  grads *= 1 + (job.microbatches > 1)
  heads, whole = config.heads * config.head_dim, config.features
  if job.remat == 'none':  # each array that some product or norm reads again
    wide, whole = 3 * heads + 6 * config.hidden, 7 * whole
  elif job.remat == 'full':
    wide = 0
  else:
    wide = 2 * heads + 3 * config.hidden
  kept = job.width * slots * config.layers * (whole + wide / tensor)
  layer = job.width * slots * (6 * config.features + 4 * config.hidden / tensor)
  scores = 0.0
  if job.attend not in _HALF:
    pairs = slots * job.tokens * config.heads / tensor
    scores = (2 * _F32 + job.width) * pairs
    if job.remat == 'none':
      scores = (_F32 + job.width) * pairs * config.layers
  gathered = 3 * job.width * products(config).all / tensor
  logits = 3 * _F32 * jobs.HELD
  return max(grads + kept + layer + scores + gathered + logits, update)
