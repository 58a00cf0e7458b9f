"""Arms of the study: dialogues under a policy and a cap, and their measures."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax import data, metrics, processes, rewards
from persona_jax import dialogue as dialogues
from persona_jax.activations import edits
from persona_jax.analysis import calibration, health
from persona_jax.analysis.calibration import Calibration
from persona_jax.dialogue import POLICY, Dialogue
from persona_jax.lab import Lab, batches, fill
from persona_jax.text import corpus

_VALUES = 'values/'  # of an arm's arrays, in its file
JUDGES = ('likelihood', 'verdict')  # the first trains, the second does not


class Trust(NamedTuple):
  """How far each judge can be believed, by task."""

  to_line: dict[str, Calibration]  # by name of the judge
  between: dict[str, Calibration]


def calibrate(lab: Lab, judges: data.Judges, config, *, advance) -> Trust:
  """Scores the labelled lines and pairs that ship with the package."""
  lines = corpus.labelled_lines()[: config.judges.lines]
  pairs = corpus.labelled_pairs()[: config.judges.pairs]
  as_lines = data.labelled(lab.chat, lines)
  as_pairs = data.labelled_pairs(lab.chat, pairs)
  persona = np.unique([x.persona for x in lines], return_inverse=True)[1]
  first = np.unique([x.first for x in pairs], return_inverse=True)[1]

  def fit(judge, dialogue, at, rows, errors, cluster):
    scores = _scored(lab, judge, dialogue, advance)[(slice(None), *at)]
    good = np.array([row.label == data.KINDS[0] for row in rows])
    return calibration.calibrate(scores, good, errors, cluster)

  errors = [line.error for line in lines]
  none = ['none'] * len(pairs)
  return Trust(
    to_line={
      name: fit(judge, as_lines, (1,), lines, errors, persona)
      for name, judge in zip(JUDGES, judges[:2], strict=True)
    },
    between={
      name: fit(judge, as_pairs, (3, 1), pairs, none, first)
      for name, judge in zip(JUDGES, judges[2:], strict=True)
    },
  )


def consistency(judges: data.Judges, trust: Trust) -> dict:
  """Every consistency reward, calibrated: `Dialogue -> [B N]` by metric."""
  found = {}
  for i, name in enumerate(JUDGES):
    fit = trust.to_line[name]
    found[f'global/{name}'] = rewards.prompt_to_line(
      judges[i], slope=fit.slope, offset=fit.offset
    )
    fit = trust.between[name]
    found[f'local/{name}'] = rewards.line_to_line(
      judges[i + 2], slope=fit.slope, offset=fit.offset
    )
  return found


def refuse(trust: Trust, weights):
  """Raises where a reward would be the same whatever is said.

  Raises:
    ValueError: a judge with a weight does not tell labelled lines apart.
  """
  for task, fits in (
    ('prompt_to_line', trust.to_line),
    ('line_to_line', trust.between),
  ):
    fit = fits[JUDGES[0]]
    if weights[task] and not fit.slope:
      raise ValueError(
        f'the judge {JUDGES[0]} does not tell labelled lines apart (AUC '
        f'{fit.auc.mean:.2f} of {fit.labelled}), so rl.rewards.{task} would '
        'pay the same whatever is said; take another model or judge, set that '
        'weight to 0, or set rl.force=true.'
      )


class Arm(NamedTuple):
  """What one policy under one cap said, and what was measured of it.

  Arrays over live dialogues and the persona speaker's lines.
  """

  texts: list[list[str]]  # every line of every dialogue
  mask: np.ndarray  # [B K] lines that hold words
  values: dict[str, np.ndarray]  # metric -> [B K]


def run_arm(
  lab: Lab, scripts, policy, caps, axis, judging, config, *, advance
) -> Arm:
  """Holds every script's dialogue with `policy` under `caps`, measures it.

  The partner is always the untrained, free model. Keys come from the scripts,
  so arms differ in the policy and the cap alone.
  """
  key = jax.random.fold_in(jax.random.key(config.seed), 2)
  variables = lab.variables(policy, caps)
  speakers = lab.cast(variables)
  probes = edits.probes(jnp.asarray(axis))
  probed = lab.variables(policy, edits.merged(caps, probes))
  parts = []
  for rows in batches(len(scripts), lab.batch):
    scenario = data.scenario(
      lab.chat,
      scripts[rows],
      prompt_tokens=config.rollout.prompt_tokens,
      line_tokens=config.rollout.tokens,
      rows=lab.batch,
    )
    said = lab.talk(
      key,
      speakers,
      scenario,
      lines=config.rollout.lines,
      tokens=config.rollout.tokens,
    )
    parts.append(_measured(lab, said, probed, judging))
    advance(rows.stop - rows.start)
  return _joined(parts)


def _measured(lab, said: Dialogue, probed, judging) -> Arm:
  live = np.asarray(said.live)
  own = lambda x: np.asarray(x)[live][:, POLICY::2]
  texts = data.texts(lab.chat, said)
  projection, fired = map(np.asarray, lab.read_lines(probed, said))
  values = {
    f'inconsistency/{name}': 1 - own(lab.score(reward, said))
    for name, reward in judging.items()
  }
  values['projection/layers'] = own(np.moveaxis(projection, 0, -1))
  values['fired/layers'] = own(np.moveaxis(fired, 0, -1))
  values['length'] = own(said.length).astype(np.float32)
  values['degenerate'] = degenerate(texts)
  return Arm(texts, own(said.spoken(POLICY)), values)


def degenerate(texts: list[list[str]]) -> np.ndarray:
  """`[B K]`: one where the speaker's line is empty, looping or repeated."""
  return np.array(
    [
      [
        health.degenerate(line, lines[POLICY:n:2]) is not None
        for n, line in enumerate(lines)
        if n % 2 == POLICY
      ]
      for lines in texts
    ],
    np.float32,
  )


def _joined(parts: list[Arm]) -> Arm:
  names = parts[0].values
  return Arm(
    texts=[lines for part in parts for lines in part.texts],
    mask=np.concatenate([part.mask for part in parts]),
    values={n: np.concatenate([p.values[n] for p in parts]) for n in names},
  )


def settle(arm: Arm, centre: float, default: float, layer: int, band) -> Arm:
  """Layers reduced to what the report shows.

  The projection at `layer` is put on the scale where the mean of roles is 0
  and the default Assistant is 1; the cap's share is over the `band`.
  """
  values = dict(arm.values)
  raw = values.pop('projection/layers')[..., layer]
  fired = values.pop('fired/layers')[..., slice(*band)]
  values['projection'] = (raw - centre) / (default - centre)
  values['fired'] = fired.mean(-1)
  return arm._replace(values=values)


class Capability(NamedTuple):
  """What a policy still can do besides being somebody."""

  nats: np.ndarray  # [C] per token of each stretch of the neutral text
  right: np.ndarray  # [Q] whether each question was answered rightly


def capability(lab: Lab, policy, caps, config, *, advance) -> Capability:
  """Perplexity of plain prose and accuracy on easy questions.

  An option's score is its mean log-probability after the question.
  """
  variables = lab.variables(policy, caps)
  text = lab.chat.encode(corpus.neutral_text())
  size = config.capability.stretch
  chunks = [text[i : i + size] for i in range(0, len(text) - size + 1, size)]
  prose = _mean_logprobs(lab, variables, [([], chunk) for chunk in chunks])
  advance(1)
  asked = corpus.choices()[: config.capability.questions]
  rows = [
    (
      lab.chat.encode(f'Question: {item.question}\nAnswer:'),
      lab.chat.encode(f' {option}'),
    )
    for item in asked
    for option in item.options
  ]
  scores = _mean_logprobs(lab, variables, rows)
  best = scores.reshape(len(asked), -1).argmax(1)
  advance(1)
  return Capability(-prose, best == [item.answer for item in asked])


def save_arm(path: Path, arm: Arm, ability: Capability):
  """Writes an arm: words as JSON, then numbers as `path`, an .npz."""
  metrics.write_json(path.with_suffix('.json'), arm.texts)
  values = {f'{_VALUES}{name}': x for name, x in arm.values.items()}
  metrics.write_arrays(path, {'mask': arm.mask, **ability._asdict(), **values})


def load_arm(path: Path) -> tuple[Arm, Capability]:
  """What `save_arm` wrote."""
  arrays = metrics.read_arrays(path)
  values = {
    name.removeprefix(_VALUES): x
    for name, x in arrays.items()
    if name.startswith(_VALUES)
  }
  texts = metrics.read_json(path.with_suffix('.json'))
  ability = Capability(arrays['nats'], arrays['right'])
  return Arm(texts, arrays['mask'], values), ability


def _mean_logprobs(lab, variables, rows):
  """Mean log-probability of each continuation after its context."""
  texts = [[*context, *text] for context, text in rows]
  tokens, length = data.padded(texts)
  start = np.array([max(1, len(context)) for context, _ in rows])
  found = []
  for part in batches(len(rows), lab.batch):
    scores = lab.continuation(
      variables,
      *(fill(x[part], lab.batch) for x in (tokens, length, start)),
    )
    found.append(np.asarray(scores)[: part.stop - part.start])
  return np.concatenate(found)


def _scored(lab, judge, dialogue: Dialogue, advance):
  found = []
  rows = dialogue.tokens.shape[0]
  for part in batches(rows, lab.batch):
    some = dialogues.rows(dialogue, lambda x, p=part: fill(x[p], lab.batch))
    scores = np.asarray(processes.here(lab.score(judge, some)))
    found.append(scores[: part.stop - part.start])
    advance(part.stop - part.start)
  return np.concatenate(found)
