"""Persona space: roles answer questions, and an axis is drawn from them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax import data
from persona_jax.activations import Directions, calibration, edits, space
from persona_jax.lab import Lab, band, batches, fill
from persona_jax.text import corpus

DEFAULT = -1  # the role index of the default Assistant


class Asked(NamedTuple):
  """One prompt of persona space: a question put to a role."""

  role: int
  prompt: str
  question: str


def asked(config, seed: int) -> tuple[list[str], list[Asked]]:
  """Names of roles, and every question that is put to whom.

  Each prompt gets `config.questions` of the shared questions; the default
  gets them under each of its prompts, `config.default_questions` times.
  """
  roles, default = corpus.archetypes()
  spread = np.linspace(0, len(roles) - 1, min(config.roles, len(roles)))
  roles = [roles[round(i)] for i in spread]  # of every group
  questions = corpus.questions()
  rng = np.random.default_rng(seed)

  def some(count):
    return rng.choice(len(questions), count, replace=count > len(questions))

  wanted = []
  for index, role in enumerate(roles):
    for prompt in role.prompts[: config.prompts]:
      for q in some(config.questions):
        wanted.append(Asked(index, prompt, questions[q]))
  for prompt in default:
    for q in some(config.default_questions):
      wanted.append(Asked(DEFAULT, prompt, questions[q]))
  return [role.name for role in roles], wanted


def answers(lab: Lab, wanted: list[Asked], config, key, advance):
  """Replies to `wanted` and their pooled activations `[N L D]`."""
  chat = lab.chat
  header = chat.frame().user_to_own
  ids = [
    [*chat.prompt_ids(a.prompt), *chat.encode(a.question), *header]
    for a in wanted
  ]
  prompt, length = data.padded(ids)
  pooled, replies = [], []
  for rows in batches(len(wanted), lab.batch):
    count = rows.stop - rows.start
    said = lab.reply(
      key,
      lab.partner,
      fill(prompt[rows], lab.batch),
      fill(length[rows], lab.batch),
      fill(np.arange(rows.start, rows.stop), lab.batch),
      jnp.arange(lab.batch) < count,
      tokens=config.tokens,
      **lab.plan,
    )
    means = lab.pooled(lab.base, *said.joined())
    pooled.append(np.moveaxis(np.asarray(means), 0, 1)[:count])
    body = np.asarray(said.body)
    tokens = np.asarray(said.tokens)
    replies += [
      chat.decode(tokens[i, : body[i]].tolist()) for i in range(count)
    ]
    advance(count)
  return replies, np.concatenate(pooled)


class Persona(NamedTuple):
  """Persona space as the study uses it."""

  space: space.Space
  groups: tuple[str, ...]  # of each role
  directions: Directions  # the axis and the bounds of the cap
  control: Directions  # a random direction, bounded in the same way
  replies: list[dict]
  projections: np.ndarray  # [N L] of all replies, toward the Assistant


def measure(lab: Lab, config, *, advance) -> Persona:
  """Runs the pipeline: rollouts, pooling, axis, calibrated bounds.

  No role-play filter is applied: every reply counts.
  """
  names, wanted = asked(config.space, config.seed)
  key = jax.random.fold_in(jax.random.key(config.seed), 1)
  replies, pooled = answers(lab, wanted, config.space, key, advance)
  role = np.array([a.role for a in wanted])
  found = space.space(names, pooled, role)
  groups = {role.name: role.group for role in corpus.archetypes().roles}
  control = calibration.random_axis(config.seed, found.axis)
  return Persona(
    space=found,
    groups=tuple(groups[name] for name in names),
    directions=_bounded(lab, config, pooled, found.axis, 'axis'),
    control=_bounded(lab, config, pooled, control, 'random direction'),
    replies=[
      a._asdict() | {'reply': r} for a, r in zip(wanted, replies, strict=True)
    ],
    projections=_along(pooled, found.axis),
  )


def _along(pooled, axis):
  length = np.linalg.norm(axis, axis=1, keepdims=True)
  return np.einsum('nld,ld->nl', pooled, axis / np.maximum(length, 1e-8))


def _bounded(lab, config, pooled, axis, name) -> Directions:
  layers = band(config, lab.layers)
  low, high = calibration.bounds(
    _along(pooled, axis),
    hold=config.cap.hold,
    band=layers,
    percentile=config.cap.percentile,
  )
  return Directions(
    vectors=np.asarray(axis, np.float32),
    model=lab.model.name,
    sha256=lab.model.sha256,
    low=low,
    high=high,
    first_position=config.cap.first_position,
    calibration=(
      f'{name}; hold={config.cap.hold}, percentile {config.cap.percentile} '
      f'of response means of all {pooled.shape[0]} role and default replies; '
      f'layers [{layers[0]}, {layers[1]}), from position '
      f'{config.cap.first_position} on'
    ),
  )


def caps(directions: Directions):
  """The `edits` that hold activations within the bounds of `directions`."""
  return edits.caps(
    jnp.asarray(directions.vectors),
    jnp.asarray(directions.low),
    jnp.asarray(directions.high),
    first=directions.first_position,
  )


def summary(persona: Persona, layer: int) -> dict:
  """The numbers of the report's section on persona space."""
  found = persona.space
  parts = found.components(layer)
  along = found.along(layer)
  axis = found.axis[layer] / np.linalg.norm(found.axis[layer])
  centre = found.roles[:, layer].mean(0)
  xy = parts.coordinates(found.roles[:, layer])
  cosines = [
    found.cosine_with_first_component(i) for i in range(found.axis.shape[0])
  ]
  explained = parts.explained
  return {
    'layer': layer,
    'roles': [
      {
        'name': name,
        'group': group,
        'projection': float(p),
        'pc': [float(x), float(y)],
      }
      for name, group, p, (x, y) in zip(
        found.names, persona.groups, along, xy, strict=True
      )
    ],
    'default': {
      'projection': float((found.default[layer] - centre) @ axis),
      'pc': [float(v) for v in parts.coordinates(found.default[layer])],
    },
    'centre': float(centre @ axis),  # where 0 and 1 of the report's scale lie
    'default_at': float(found.default[layer] @ axis),
    'explained': [float(v) for v in explained[:20]],
    'components_for_70_percent': int(
      np.searchsorted(np.cumsum(explained), 0.7) + 1
    ),
    'cosine_by_layer': cosines,
    'norm_by_layer': [float(n) for n in np.linalg.norm(found.axis, axis=1)],
    'responses': len(persona.replies),
    'examples': persona.replies[:: max(1, len(persona.replies) // 6)][:6],
    'calibration': persona.directions.calibration,
    'band': _band(persona.directions),
    'bounds': {
      'low': _finite(persona.directions.low),
      'high': _finite(persona.directions.high),
    },
  }


def _band(directions):
  bounded = np.isfinite(directions.low) | np.isfinite(directions.high)
  where = np.flatnonzero(bounded)
  return [int(where[0]), int(where[-1]) + 1]


def _finite(bound):
  return [float(b) if np.isfinite(b) else None for b in bound]
