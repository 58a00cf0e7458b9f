"""What a plan is asked for, and the arrays that this means, as shapes."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType

from persona_jax import chips, learn, outlines, rollout
from persona_jax.learn import sharding
from persona_jax.learn.step import clip
from persona_jax.models import attention, cache, decoder, lora, names

OPTIMIZER = optax.chain(  # as the learner's
  clip(1.0), optax.adamw(1e-6, b2=0.95, weight_decay=0.0)
)
FRAME = 8  # tokens between two lines, about what chat templates put there
HELD = 1 << 24  # logits that exist at a time on a chip


@dataclasses.dataclass(frozen=True)
class Job:
  """What is planned; fields up to `rank` are flags of `plan`."""

  topology: str
  model: str
  mesh: dict[str, int]
  batch: int  # dialogues of a step
  tokens: int = 4096  # slots of a dialogue, its prompt and frames with them
  lines: int = 16
  microbatches: int = 1
  remat: str = 'full'
  attend: str = 'xla'
  rank: int = 0  # of an adapter; 0: all parameters
  layers: int = 0  # of the model; 0: all that it has
  dtype: str = 'bfloat16'  # of the computation

  @functools.cached_property
  def config(self):
    """The shape of the model."""
    config = outlines.outline(self.model)
    if not self.layers:
      return config
    layout = config.layout[: self.layers]
    return dataclasses.replace(config, layers=self.layers, layout=layout)

  @functools.cached_property
  def place(self) -> chips.Topology:
    """The chips."""
    return chips.topology(self.topology)

  @property
  def abstract(self) -> AbstractMesh:
    """The mesh without its devices."""
    types = (AxisType.Auto,) * len(self.mesh)
    sizes = tuple(self.mesh[axis] for axis in sharding.AXES)
    return AbstractMesh(sizes, sharding.AXES, axis_types=types)

  @property
  def width(self) -> int:
    """Bytes of a number that is computed with."""
    return jnp.dtype(self.dtype).itemsize

  @property
  def ways(self) -> int:
    """That rows are spread over."""
    return math.prod(self.mesh[axis] for axis in sharding.ROWS)

  @property
  def slots(self) -> float:
    """Tokens of a step that a chip reads."""
    return self.batch / self.ways * self.tokens / self.mesh['sequence']

  @property
  def prompt(self) -> int:
    """Slots of the prompt."""
    return self.tokens // 8

  @property
  def line(self) -> int:
    """Most tokens of a line."""
    return (self.tokens - self.prompt) // self.lines - FRAME

  @property
  def said(self) -> int:
    """Tokens of a dialogue that are learned from: the policy's lines."""
    return self.line * (self.lines // 2)

  @property
  def held(self) -> int:
    """Logits that exist at a time, over all chips."""
    return HELD * self.place.count

  def changed(self, **fields) -> 'Job':
    """Another job."""
    return dataclasses.replace(self, **fields)


def make(*, mesh: str = '', batch: int = 0, **fields) -> Job:
  """A job from the words of the command line, checked.

  Raises:
    ValueError: names the value, the rule and the way out.
  """
  place = chips.topology(fields['topology'])
  if not mesh:
    mesh = f'fsdp={place.count}'
  sizes = sharding.mesh_shape(mesh)
  job = Job(mesh=sizes, batch=batch, **fields)
  if job.abstract.size != place.count:
    raise ValueError(
      f'--mesh={mesh} has {job.abstract.size} places and {place} has '
      f'{place.count} chips; give sizes whose product is {place.count}.'
    )
  job = job.changed(batch=batch or job.ways * job.microbatches)
  check(job)
  return job


def check(job: Job):
  """Raises a ValueError where the numbers of a job do not fit together."""
  least = job.ways * job.microbatches
  if min(job.batch, job.microbatches) < 1 or job.batch % least:
    raise ValueError(
      f'--batch={job.batch} does not divide over the {job.ways} ways of '
      f'{", ".join(sharding.ROWS)} in {job.microbatches} microbatches; give a '
      f'multiple of {max(least, 1)}, or change --mesh or --microbatches.'
    )
  if job.lines < 2 or job.line < 1:
    raise ValueError(
      f'--tokens={job.tokens} leave {job.line} tokens to each of --lines='
      f'{job.lines}; give 2 lines or more, and {FRAME + 2} tokens for each.'
    )
  if job.attend not in attention.KERNELS:
    raise ValueError(
      f'--attend={job.attend} is none of {", ".join(attention.KERNELS)}.'
    )
  if job.rank < 0:
    raise ValueError(f'--rank={job.rank} is below 0; 0 trains all parameters.')
  _trace(job)


def _trace(job):
  """Traces the model, which knows the ways of remat."""
  apply, _ = decoder.functions(job.config, remat=job.remat)
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  variables = {'params': params(job.config, jnp.float32)}
  jax.eval_shape(apply, variables, tokens, tokens)


# Shapes.


def state(job: Job):
  """Shapes of the train state, and of what the step reads beside it."""
  begin = functools.partial(learn.init_state, optimizer=OPTIMIZER)
  if not job.rank:
    return jax.eval_shape(begin, params(job.config, jnp.float32)), {}
  weights, scales = lora.split(adapter(job))
  base = {'params': params(job.config, jnp.dtype(job.dtype)), 'lora': scales}
  return jax.eval_shape(begin, weights), base


def params(config, dtype):
  """Shapes of the parameters, layers stacked."""
  shapes = names.shapes(config).items()
  return names.nested({k: jax.ShapeDtypeStruct(v, dtype) for k, v in shapes})


def adapter(job: Job):
  """Shapes of the adapter."""
  make = functools.partial(
    lora.init, job.config, rank=job.rank, alpha=2.0 * job.rank
  )
  return jax.eval_shape(make, jax.random.key(0))


def batch(job: Job, make: Callable = jax.ShapeDtypeStruct) -> learn.Batch:
  """A batch of dialogues: shapes, or what else `make(shape, dtype)` gives."""
  shape = lambda width, dtype: make((job.batch, width), dtype)
  some = functools.partial(shape, job.said)
  return learn.Batch(
    tokens=shape(job.tokens, jnp.int32),
    positions=shape(job.tokens, jnp.int32),
    before=some(jnp.int32),
    actions=some(jnp.int32),
    mask=some(bool),
    advantages=some(jnp.float32),
    old_logprobs=some(jnp.float32),
    reference_logprobs=some(jnp.float32),
    line=some(jnp.int32),
  )


def scenario(job: Job) -> rollout.Scenario:
  """Shapes of the beginnings of a batch of dialogues."""
  ints = lambda *shape: jax.ShapeDtypeStruct((job.batch, *shape), jnp.int32)
  return rollout.Scenario(
    ids=ints(),
    samples=ints(),
    prompts=ints(2, job.prompt),
    prompt_length=ints(2),
    opening=ints(job.line),
    opening_length=ints(),
    live=jax.ShapeDtypeStruct((job.batch,), bool),
  )


def memory(job: Job):
  """`(batch, size) -> Cache` of one speaker."""
  return functools.partial(
    cache.empty, job.config, dtype=jnp.dtype(job.dtype), blocked=False
  )
