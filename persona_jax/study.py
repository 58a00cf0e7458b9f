"""The study: what RL changes on the surface, what stays underneath.

Phases run in order, each leaves a file, and a second start goes on after the
last whole file. A workdir belongs to one config.
"""

import datetime
import functools
import os
import platform
import time
from importlib import metadata
from pathlib import Path

import jax

from persona_jax import (
  answer,
  axis,
  checks,
  data,
  evaluate,
  lab,
  learn,
  metrics,
  prefer,
  processes,
  report,
  steps,
  train,
)
from persona_jax import workdir as owned
from persona_jax.activations import Directions
from persona_jax.analysis.calibration import Calibration
from persona_jax.analysis.statistics import Interval
from persona_jax.learn.algorithms import numbered, settings
from persona_jax.text import corpus


def run(config, workdir, *, quiet: bool = False) -> dict:
  """Runs every phase that `workdir` does not hold yet; returns the results.

  Raises:
    ValueError: the config is out of range, the workdir is another's, or there
      are several processes.
  """
  if jax.process_count() > 1:
    raise ValueError(
      f'a study runs in one process, and here are {jax.process_count()}; '
      'train by persona-jax train --distributed, then run the study of the '
      'same workdir on one host.'
    )
  study = _opened(config, workdir, quiet)
  for phase in study.phases:
    study.done(phase)
  return study.results()


def train_only(config, workdir, *, quiet: bool = False) -> dict:
  """The phases that training needs, and training; returns its record.

  Raises:
    ValueError: the config is out of range, or the workdir is another's.
  """
  study = _opened(config, workdir, quiet)
  for phase in ('model', 'judges', 'rl'):
    study.done(phase)
  return study.done('rl')


def _opened(config, workdir, quiet):
  """The study of a workdir, the config checked and the folder its own."""
  checks.check(config)
  workdir = Path(workdir)
  owned.claim(workdir, config)
  return Study(config, workdir, quiet)


class Study:
  """The phases of one study, and what they share."""

  def __init__(self, config, workdir: Path, quiet: bool):
    self.config, self.workdir, self.quiet = config, workdir, quiet
    self._policies = {}
    self.phases = {
      'model': self.model,
      'space': self.space,
      'judges': self.judges,
      'baseline': self.baseline,
      'rl': self.rl,
      'cap': self.cap,
      'answer': self.answer,
    }

  def done(self, phase: str) -> dict:
    """The record of a phase, from disk or by running it now."""
    path = self.workdir / f'{phase}.json'
    read = lambda: metrics.read_json(path) if path.exists() else None
    record = processes.told(read)
    if record is None:
      began = time.monotonic()
      record = self.phases[phase]()
      record['seconds'] = time.monotonic() - began
      if processes.first():
        metrics.write_json(path, record)
    return metrics.plain(record)

  def bar(self, title, total):
    return metrics.progress(title, total, quiet=self.quiet)

  @functools.cached_property
  def lab(self) -> lab.Lab:
    """The model; loaded when the first phase needs it."""
    return lab.open_lab(self.config)

  @functools.cached_property
  def judging(self) -> data.Judges:
    """The judges; the untrained, free model asks."""
    return data.judges(self.lab.model, self.lab.chat)

  @functools.cached_property
  def trust(self) -> evaluate.Trust:
    """The calibration of the judges, from the phase's record."""
    record = self.done('judges')

    def read(task):
      found = {name: record[task][name] for name in evaluate.JUDGES}
      return {
        name: Calibration(**{**x, 'auc': Interval(**x['auc'])})
        for name, x in found.items()
      }

    return evaluate.Trust(read('prompt_to_line'), read('line_to_line'))

  @functools.cached_property
  def scripts(self) -> list[data.Script]:
    """The held-out dialogues, the same for every arm."""
    return data.scripts(
      'heldout',
      self.config.evaluation.dialogues,
      personas=self.config.evaluation.personas or None,
      seed=self.config.seed,
    )

  def model(self) -> dict:
    with self.bar('Model', 1) as advance:
      model = self.lab.model
      self._check_words()
      advance()
    leaves = jax.tree.leaves(model.variables)
    return {
      'name': model.name,
      'sha256': model.sha256,
      'layers': model.config.layers,
      'features': model.config.features,
      'parameters': sum(x.size for x in leaves),
    }

  def space(self) -> dict:
    _, wanted = axis.asked(self.config.space, self.config.seed)
    with self.bar('Persona space', len(wanted)) as advance:
      found = axis.measure(self.lab, self.config, advance=advance)
    for name in ('directions', 'control'):
      directions = getattr(found, name)
      directions.save(self.workdir / f'{name}.safetensors')
    return axis.summary(found, self.lab.layers // 2)

  def judges(self) -> dict:
    size = self.config.judges
    lines = min(size.lines, len(corpus.labelled_lines()))
    pairs = min(size.pairs, len(corpus.labelled_pairs()))
    with self.bar('Judges', 2 * (lines + pairs)) as advance:
      trust = evaluate.calibrate(
        self.lab, self.judging, self.config, advance=advance
      )
    return {'prompt_to_line': trust.to_line, 'line_to_line': trust.between}

  def baseline(self) -> dict:
    return self._arms('Baseline', ['base/free'])

  def rl(self) -> dict:
    names = self._trained()
    rl = self.config.rl
    with self.bar('RL', len(names) * rl.steps) as advance:
      logs = {name: self._train(name, advance).log for name in names}
    return {
      'algorithm': rl.algorithm,
      'learning_rate': rl.learning_rate,
      'loss': self._numbers('loss'),
      'advantage': self._numbers('advantage'),
      'dialogues_per_step': self.config.rollout.batch,
      'steps': logs['rl'],
      'shuffled_steps': logs.get('shuffled', []),
    }

  def _numbers(self, part) -> dict:
    """The numbers of a part of the algorithm, those of the config in them."""
    row = (learn.ALGORITHMS | learn.PREFERENCES)[self.config.rl.algorithm]
    given = self.config.rl[part].to_dict()
    fn = getattr(row, part, None)
    return settings(numbered(fn, given)) if fn else {}

  def cap(self) -> dict:
    return self._arms('Arms', [arm for arm in self.arms if arm != 'base/free'])

  @property
  def arms(self) -> list[str]:
    """The arms of this study: policy/cap."""
    names = ['base/free', 'base/capped', 'rl/free', 'rl/capped']
    if self.config.controls.random_cap:
      names.append('base/random')
    if self.config.controls.shuffled_rl:
      names.append('shuffled/free')
    return names

  def answer(self) -> dict:
    """All numbers, and the sentences that they allow."""
    space, judges = self.done('space'), self.done('judges')
    kinds = [script.partner.kind for script in self.scripts]
    arms, abilities, texts = {}, {}, {}
    for name in self.arms:
      arm, abilities[name] = evaluate.load_arm(self._arm_path(name))
      arms[name] = evaluate.settle(
        arm, space['centre'], space['default_at'], space['layer'], space['band']
      )
      texts[name] = arm.texts
    found = answer.effects(arms)
    gap = answer.gap(arms)
    with self.bar('Answer', len(arms)) as advance:
      summaries = {}
      for name, arm in arms.items():
        summaries[name] = answer.summarise(arm, kinds, abilities[name])
        summaries[name]['examples'] = self._examples(texts[name])
        advance()
    return {
      'arms': summaries,
      'effects': found,
      'answer': answer.words(found, gap, judges, self.config.cap.hold),
    }

  def results(self) -> dict:
    """Everything as one record, and the report that shows it."""
    records = {phase: self.done(phase) for phase in self.phases}
    times = {name: record.pop('seconds') for name, record in records.items()}
    results = metrics.plain(
      {
        'about': _about(self.config, records['model']),
        'times': times,
        'space': records['space'],
        'judges': records['judges'],
        'rl': records['rl'],
        **records['answer'],
      }
    )
    metrics.write_json(self.workdir / 'results.json', results)
    report.write(results, self.workdir / 'report.html')
    return results

  def _check_words(self):
    """Turns every prompt into tokens: what does not fit fails at once."""
    size = self.config.rollout
    trained = len(corpus.personas('train'))
    for scripts in (self.scripts, data.scripts('train', trained)):
      data.scenario(
        self.lab.chat,
        scripts,
        prompt_tokens=size.prompt_tokens,
        line_tokens=size.tokens,
      )

  def _arms(self, title, names) -> dict:
    rows = len(self.scripts) + 2  # two advances for capability
    with self.bar(title, rows * len(names)) as advance:
      for name in names:
        if not self._arm_path(name).exists():
          self._run_arm(name, advance)
        else:
          advance(rows)
    return {'arms': names}

  def _run_arm(self, name, advance):
    policy, cap = self._policy(name), self._cap(name)
    probe = Directions.load(self.workdir / 'directions.safetensors')
    said = evaluate.run_arm(
      self.lab,
      self.scripts,
      policy,
      cap,
      probe.toward_assistant(),
      evaluate.consistency(self.judging, self.trust),
      self.config,
      advance=advance,
    )
    ability = evaluate.capability(
      self.lab, policy, cap, self.config, advance=advance
    )
    evaluate.save_arm(self._arm_path(name), said, ability)

  def _arm_path(self, name) -> Path:
    return self.workdir / 'arms' / f'{name.replace("/", "-")}.npz'

  def _policy(self, arm):
    name = arm.split('/')[0]
    if name == 'base':
      return self.lab.model.variables
    return self._train(name, lambda count=1: None).policy

  def _cap(self, arm):
    file = {'free': None, 'capped': 'directions', 'random': 'control'}[
      arm.split('/')[1]
    ]
    if file is None:
      return self.lab.free
    return axis.caps(Directions.load(self.workdir / f'{file}.safetensors'))

  def _trained(self) -> list[str]:
    shuffled = ['shuffled'] if self.config.controls.shuffled_rl else []
    return ['rl', *shuffled]

  def _train(self, name, advance) -> steps.Result:
    """A trained policy; from its last checkpoint if that is the end."""
    if name not in self._policies:
      folder = self.workdir / 'policies' / name
      how = {'shuffle': name == 'shuffled', 'advance': advance}
      if self.config.rl.algorithm in learn.PREFERENCES:
        result = prefer.run(self.lab, self.config, folder, **how)
      else:
        terms = self._terms()
        result = train.run(self.lab, self.config, terms, folder, **how)
      self._policies[name] = result
    return self._policies[name]

  def _terms(self):
    rewards = evaluate.consistency(self.judging, self.trust)
    weights = self.config.rl.rewards
    if not self.config.rl.force:
      evaluate.refuse(self.trust, weights)
    return {
      'prompt_to_line': (weights.prompt_to_line, rewards['global/likelihood']),
      'line_to_line': (weights.line_to_line, rewards['local/likelihood']),
    }

  def _examples(self, texts):
    """One dialogue of each kind of partner."""
    first = {}
    for script, lines in zip(self.scripts, texts, strict=True):
      first.setdefault(
        script.partner.kind,
        {
          'persona': script.persona.prompt,
          'kind': script.partner.kind,
          'lines': lines,
        },
      )
    return list(first.values())


def _about(config, model) -> dict:
  return {
    'version': metadata.version('persona_jax'),
    'date': datetime.date.today().isoformat(),
    'config': config.to_dict(),
    'config_name': config.name,
    'model': model,
    'machine': {
      'platform': platform.platform(),
      'cores': os.cpu_count(),
      'python': platform.python_version(),
      'jax': jax.__version__,
      'device': jax.devices()[0].device_kind,
    },
  }
