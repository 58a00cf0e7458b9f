"""A model with everything compiled around it: what the programs share."""

import dataclasses
import datetime
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax import data, masked, models, rollout, taps, trees
from persona_jax.activations import edits, space
from persona_jax.dialogue import PARTNER, POLICY, Dialogue, view
from persona_jax.learn import sharding
from persona_jax.learn.logprobs import token_logprobs
from persona_jax.models import cache as caches
from persona_jax.models import decoder, lora
from persona_jax.rollout import Sampling, Scenario, Speaker
from persona_jax.text.chat import Chat


@dataclasses.dataclass(frozen=True, eq=False)
class Lab:
  """One chat model, and the programs that are compiled once for it."""

  model: models.LanguageModel
  chat: Chat
  batch: int  # rows of every program; the rest of a batch idles
  temperature: float
  dtype: Any  # of the computation; parameters stay as they were loaded
  mesh: jax.sharding.Mesh

  @property
  def layers(self) -> int:
    return self.model.config.layers

  @functools.cached_property
  def apply(self):
    """The model with whatever adapter and caps its variables hold."""
    return taps.edited(self.uncapped, edits.stored)

  @functools.cached_property
  def uncapped(self):
    """The model with whatever adapter its variables hold."""
    return lora.adapted(self.model.apply)

  @functools.cached_property
  def free(self) -> Any:
    """Caps that never act."""
    return edits.no_caps(self.layers, self.model.config.features)

  @functools.cached_property
  def frame(self):
    return data.frame(self.chat)

  @functools.cached_property
  def base(self) -> Any:
    """The untrained model's variables, free, as `apply` takes them."""
    return self.variables(self.model.variables, self.free)

  def variables(self, policy, caps) -> Any:
    """Stacked variables, for whole passes.

    A policy is parameters and, where one was trained, an adapter: `{'params':
    ..., 'lora': ...}`, never merged, or bfloat16 would round it away.
    """
    return {**policy, 'edits': caps}

  def speaker(self, variables) -> Speaker:
    """Unstacked variables, for decoding.

    A copy of the weights, but the partner's own where they are the model's.
    """
    rest = {k: v for k, v in variables.items() if k != 'params'}
    if variables['params'] is self.model.variables['params']:
      params = self._weights
    else:
      params = self._unstack(variables['params'])
    return Speaker(
      variables={**self._apart(rest), 'params': params},
      sampling=Sampling.of(
        self.batch, self.model.stop_ids, temperature=self.temperature
      ),
      apply=self.apply,
      unembed=self.model.unembed,
      memory=self._memory,
    )

  @functools.cached_property
  def _weights(self):
    return self._unstack(self.model.variables['params'])

  def _unstack(self, params):
    """Weights as decoding reads them."""
    return self._served({'params': params})['params']

  @functools.cached_property
  def _served(self):
    """Layers apart, in the dtype of the computation, gathered over fsdp."""

    def serve(variables):
      cast = jax.tree.map(lambda x: x.astype(self.dtype), variables)
      return trees.unstack_layers(self._gathered(cast))

    return jax.jit(serve)

  @functools.cached_property
  def _apart(self):
    """What goes with the weights, in its own dtype."""
    return jax.jit(lambda rest: trees.unstack_layers(self._gathered(rest)))

  def _gathered(self, tree):
    if self.mesh.size == 1:
      return tree
    rules = sharding.gathered(sharding.RULES)
    places = trees.shardings(tree, self.mesh, rules)
    return jax.lax.with_sharding_constraint(tree, places)

  @functools.cached_property
  def partner(self) -> Speaker:
    """The untrained, free model as a speaker."""
    return self.speaker(self.base)

  def cast(self, variables) -> tuple[Speaker, ...]:
    """The partner and a policy with `variables`, as `converse` takes them.

    If their caps alone differ, one speaker has both seats: each pass over the
    weights serves both.
    """
    ours = variables['params'] is self.model.variables['params']
    if not ours or 'lora' in variables:
      return self.partner, self.speaker(variables)
    apart = [
      self._apart({'edits': x})['edits']
      for x in (self.free, variables['edits'])
    ]
    speaker = self.partner.replace(
      variables={'params': self._weights},
      own=edits.by_seat(*apart),
      who=(PARTNER, POLICY),
    )
    return (speaker,)

  @functools.cached_property
  def _memory(self):
    return functools.partial(caches.empty, self.model.config, dtype=self.dtype)

  @functools.cached_property
  def converse(self):
    """`rollout.converse`, compiled; `lines` and `tokens` are static."""
    return jax.jit(rollout.converse, static_argnames=rollout.STATIC)

  @functools.cached_property
  def reply(self):
    """`rollout.reply`, compiled; `tokens` is static."""
    return jax.jit(rollout.reply, static_argnames=rollout.STATIC)

  @property
  def plan(self) -> dict:
    """How rollouts are computed: on a mesh, each way has its own dialogues."""
    return {'groups': sharding.row_ways(self.mesh)}

  @functools.cached_property
  def pooled(self):
    """`(variables, tokens, positions, mask) -> [L B D]`, compiled."""
    return jax.jit(functools.partial(space.pooled, self.apply))

  @functools.cached_property
  def read_lines(self):
    """`(variables, dialogue) -> ([L B N], [L B N])`, compiled.

    Means over each line of the projection on the stored probe, and of the
    share of tokens at which a cap acted.
    """

    def read(variables, dialogue):
      seen = view(dialogue, POLICY, self.frame)
      reading = space.read_axis(
        self.uncapped, variables, seen.tokens, seen.positions
      )
      return tuple(_by_line(x, seen, dialogue) for x in reading)

    return jax.jit(read)

  @functools.cached_property
  def continuation(self):
    """`(variables, tokens, length, start) -> [B]`, compiled.

    Mean log-probability of each text from its token `start` on.
    """

    def score(variables, tokens, length, start):
      slots = jnp.arange(tokens.shape[1])[None]
      inside = slots < length[:, None]
      positions = jnp.where(inside, slots, -1)
      hidden, _ = self.apply(variables, tokens, positions)
      before = jnp.broadcast_to(slots[:, :-1], tokens[:, 1:].shape)
      logprobs = token_logprobs(
        self.model.unembed, variables, hidden, before, tokens[:, 1:]
      )
      mask = inside[:, 1:] & (slots[:, 1:] >= start[:, None])
      return masked.mean(logprobs, mask, axis=1)

    return jax.jit(score)

  @functools.cached_property
  def score(self):
    """`(judge or reward, dialogue) -> array`, compiled."""
    return jax.jit(lambda judge, dialogue: judge(dialogue))

  def talk(
    self, key, speakers, scenario: Scenario, *, lines: int, tokens: int
  ) -> Dialogue:
    """A conversation; both speakers use this model's chat template."""
    return self.converse(
      key,
      speakers,
      (self.frame, self.frame),
      scenario,
      lines=lines,
      tokens=tokens,
      **self.plan,
    )


def open_lab(config, *, progress=None) -> Lab:
  """The lab of a config, computing in `config.dtype`, on all devices.

  Parameters that are trained are float32; under an adapter they are not.

  Raises:
    ValueError: the mesh does not fit the devices, or the batch the mesh.
  """
  mesh = sharding.make_mesh(
    sharding.mesh_shape(config.mesh) if config.mesh else None
  )
  ways = sharding.row_ways(mesh)
  if config.rollout.batch % ways:
    raise ValueError(
      f'rollout.batch={config.rollout.batch} does not divide over the {ways} '
      f'ways of {", ".join(sharding.ROWS)}; change it or config.mesh.'
    )
  dtype = jnp.dtype(config.dtype)
  kept = dtype if config.rl.adapter.rank else jnp.float32
  spread = mesh.size > 1
  loaded = models.load(
    config.model,
    dtype=kept,
    mesh=mesh if spread else None,
    rules=sharding.RULES if spread else None,
    context=config.context or None,
    inert=tuple(config.inert.split(',')),
    progress=progress,
  )
  apply, unembed = decoder.functions(
    loaded.config,
    dtype=dtype,
    mix=loaded.mix,
    attend=config.attend or None,
  )
  apply = sharding.by_rows(apply, mesh)
  model = dataclasses.replace(loaded, apply=apply, unembed=unembed)
  size = config.rollout
  chat = chat_of(model, config)
  return Lab(model, chat, size.batch, size.temperature, dtype, mesh)


def chat_of(model: models.LanguageModel, config) -> Chat:
  """How a model is talked to, on the config's day."""
  today = datetime.date.fromisoformat(config.today)
  return Chat(
    model.tokenizer,
    model.template,
    model.special,
    variables={'strftime_now': today.strftime},
  )


def band(config, layers: int) -> tuple[int, int]:
  """The capped layers, from shares of the depth."""
  return round(config.cap.first * layers), round(config.cap.last * layers)


def _by_line(values, seen, dialogue):
  """Means `[L B N]` over the body of each line of `values` `[L B S]`.

  Token t of a line lies one slot after the one that predicts it.
  """
  layers, batch, _ = values.shape
  slots = jnp.minimum(seen.before + 1, values.shape[2] - 1)
  flat = jnp.broadcast_to(
    slots.reshape(1, batch, -1), (layers, batch, slots[0].size)
  )
  tokens = jnp.take_along_axis(values.astype(jnp.float32), flat, axis=2)
  tokens = tokens.reshape(layers, *slots.shape)
  mask = dialogue.body_mask
  count = jnp.maximum(jnp.sum(mask, 2), 1)
  total = jnp.einsum('lbnt,bnt->lbn', tokens, mask.astype(jnp.float32))
  return total / jnp.broadcast_to(count, total.shape)


def batches(count: int, size: int):
  """Slices of `size` rows that cover `count`."""
  return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def fill(x: np.ndarray | jax.Array, rows: int) -> jax.Array:
  """`x` with its first row repeated until it has `rows` rows."""
  missing = rows - x.shape[0]
  return jnp.concatenate([x, jnp.repeat(x[:1], missing, axis=0)])
