"""The whole program: a small random model, the real words, every phase."""

import dataclasses
import functools
import json
import subprocess
import sys
import time

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import (
  checks,
  evaluate,
  lab,
  learn,
  main,
  metrics,
  models,
  prefer,
  study,
  train,
  trees,
)
from persona_jax.analysis import calibration
from persona_jax.batches import Encoded
from persona_jax.models import adapter_file, decoder, experts
from persona_jax.models.config import DecoderConfig, Experts, Kind, Rope

PHASES = ('model', 'space', 'judges', 'baseline', 'rl', 'cap', 'answer')


@pytest.fixture(scope='module')
def folder(smollm, tmp_path_factory):
  """A folder with the real tokenizer and a tiny random decoder."""
  config = DecoderConfig(
    vocab=smollm.config.vocab,
    features=16,
    layers=4,
    heads=2,
    kv_heads=1,
    head_dim=8,
    hidden=24,
    kinds=(Kind(Rope(1e4)),),
    norm_eps=1e-5,
  )
  apply, unembed = decoder.functions(config)
  small = dataclasses.replace(
    smollm,
    config=config,
    variables=jax.jit(decoder.init, static_argnums=0)(
      config, jax.random.key(0)
    ),
    apply=apply,
    unembed=unembed,
  )
  path = tmp_path_factory.mktemp('model') / 'small'
  models.save(small, path)
  return path


@pytest.fixture(scope='module')
def mixture(smollm, tmp_path_factory):
  """As `folder`, with four experts in each layer."""
  config = dataclasses.replace(
    fakes.CONFIG,
    vocab=smollm.config.vocab,
    features=16,
    hidden=8,
    family='mixtral',
    experts=Experts(count=4, active=2, normalised=True),
  )
  apply, unembed = decoder.functions(config)
  start = jax.jit(decoder.init, static_argnums=0)
  small = dataclasses.replace(
    smollm,
    config=config,
    variables=start(config, jax.random.key(0)),
    apply=apply,
    unembed=unembed,
  )
  path = tmp_path_factory.mktemp('model') / 'mixture'
  models.save(small, path)
  return path


@pytest.fixture(scope='module')
def config(folder):
  config = main.load_config('study:tiny')
  main.override(config, 'model', str(folder))
  return config


@pytest.fixture(scope='module')
def finished(config, tmp_path_factory):
  """A workdir with a whole study in it, and its results."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  return workdir, study.run(config, workdir, quiet=True)


def test_a_study_answers(finished):
  workdir, results = finished
  assert set(results['times']) == set(PHASES)
  assert set(results['arms']) == {
    'base/free', 'base/capped', 'base/random', 'rl/free', 'rl/capped',
  }  # fmt: skip
  assert results['answer']['headline']
  page = (workdir / 'report.html').read_text()
  assert results['answer']['headline'] in page
  assert json.loads((workdir / 'results.json').read_text()) == results


def test_free_arms_never_cap_and_capped_arms_do(finished):
  arms = finished[1]['arms']
  for name, arm in arms.items():
    fired = arm['summary']['fired']['mean']
    assert (fired == 0) == name.endswith('free'), name


def test_a_ceiling_lowers_the_projection(finished):
  effects = {
    (e['name'], e['metric']): e['difference']['mean']
    for e in finished[1]['effects']
  }
  assert effects['cap', 'projection'] < 0


def trained(config, folder, rank):
  """The lab, and a run of RL that likes some tokens more than others."""
  config = config.copy_and_resolve_references()
  main.override(config, 'rl.adapter.rank', str(rank))
  main.override(config, 'rl.adapter.targets', 'attn|down')
  opened = lab.open_lab(config)
  taste = lambda dialogue: jnp.mean(dialogue.tokens % 7, axis=2)
  terms = {'taste': (1.0, jax.tree_util.Partial(taste))}
  run = functools.partial(train.run, opened, config, terms, folder)
  return opened, run(advance=lambda count: None)


def test_an_adapter_is_trained_and_left_for_peft(config, tmp_path):
  opened, result = trained(config, tmp_path, rank=2)
  assert result.policy['params'] is opened.model.variables['params']
  adapter = trees.flatten(result.policy['lora'])
  assert {k for k in adapter if k.endswith('/b')} == {
    f'layers/{k}/b'
    for k in ('attn/q', 'attn/k', 'attn/v', 'attn/o', 'mlp/down')
  }
  for name, leaf in adapter.items():
    assert np.abs(leaf).min(axis=0).max() > 0, name
  left = adapter_file.load(tmp_path / 'adapter', opened.model)
  for name, leaf in trees.flatten(left).items():
    np.testing.assert_array_equal(leaf, adapter[name], err_msg=name)
  assert result.log[1]['policy/ratio'] == pytest.approx(1, abs=0.02)
  again = trained(config, tmp_path, rank=2)[1]  # from its last checkpoint
  assert again.log == result.log
  for name, leaf in trees.flatten(again.policy['lora']).items():
    np.testing.assert_array_equal(leaf, adapter[name], err_msg=name)


@pytest.mark.devices
@pytest.mark.parametrize(
  ('rank', 'mesh'), [(0, ''), (2, ''), (0, 'fsdp=2,sequence=2,tensor=2')]
)
def test_rl_runs_on_all_devices(config, tmp_path, rank, mesh):
  config = config.copy_and_resolve_references()
  config.mesh = mesh
  main.override(config, 'rollout.batch', str(jax.device_count()))
  _, result = trained(config, tmp_path, rank=rank)
  leaf = jax.tree.leaves(result.policy['lora' if rank else 'params'])[0]
  assert len(leaf.sharding.device_set) == jax.device_count() > 1
  assert len(result.log) == config.rl.steps


@pytest.mark.devices
def test_experts_are_trained_where_they_lie(config, mixture, tmp_path):
  logs = []
  for mesh in ('fsdp=8', 'fsdp=2,expert=4'):
    again = config.copy_and_resolve_references()
    again.model, again.mesh = str(mixture), mesh
    again.rollout.batch = 8
    opened, result = trained(again, tmp_path / mesh, rank=0)
    assert opened.model.mix is not experts.grouped
    [gate] = [
      leaf
      for name, leaf in trees.flatten(result.policy['params']).items()
      if name.endswith('experts/gate/kernel')
    ]
    ways = opened.mesh.shape['expert']
    assert gate.addressable_shards[0].data.shape[1] == gate.shape[1] // ways
    logs.append(result.log)
  for left, right in zip(*logs, strict=True):
    assert left.keys() == right.keys() and left['norm/grads'] > 0
    for name in ('loss', 'norm/grads', 'policy/entropy'):
      np.testing.assert_allclose(
        left[name], right[name], rtol=1e-3, atol=1e-6, err_msg=name
      )


_EACH_TAKES_A_MINUTE = [
  pytest.param(phase, marks=[] if phase == 'answer' else pytest.mark.slow)
  for phase in PHASES
]


@pytest.mark.parametrize('phase', _EACH_TAKES_A_MINUTE)
def test_a_killed_study_goes_on(config, finished, tmp_path, phase, monkeypatch):
  """Files up to a phase are there, that phase dies once, then all is well."""
  import shutil

  workdir, results = finished
  again = tmp_path / 'again'
  shutil.copytree(workdir, again)
  for later in PHASES[PHASES.index(phase) :]:
    (again / f'{later}.json').unlink()
  if phase in PHASES[:5]:
    shutil.rmtree(again / 'policies', ignore_errors=True)
  if phase in PHASES[:4]:
    shutil.rmtree(again / 'arms', ignore_errors=True)
  if phase == 'cap':
    (again / 'arms' / 'rl-free.npz').unlink()
  (again / 'results.json').unlink()
  whole = getattr(study.Study, phase)

  def dies(self):
    whole(self)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(study.Study, phase, dies)
    study.run(config, again, quiet=True)
  assert not (again / f'{phase}.json').exists()
  assert not (again / 'results.json').exists()
  assert not list(again.rglob('*.partial'))
  same = study.run(config, again, quiet=True)
  assert _numbers(same) == _numbers(results)


@pytest.mark.slow
def test_kill_minus_nine_in_every_phase(config, folder, finished, tmp_path):
  """The real program, killed once in each phase, ends with the same numbers."""
  workdir = tmp_path / 'killed'
  command = [
    sys.executable, '-m', 'persona_jax.main', 'study', '--config=study:tiny',
    f'--config.model={folder}', f'--workdir={workdir}', '--quiet',
  ]  # fmt: skip
  for before, phase in zip((None, *PHASES), PHASES, strict=False):
    process = subprocess.Popen(command)
    while before and not (workdir / f'{before}.json').exists():
      assert process.poll() is None
      time.sleep(0.05)
    time.sleep(0.3)  # now the phase is under way
    process.kill()
    process.wait()
    assert not (workdir / f'{phase}.json').exists(), phase
  subprocess.run(command, check=True)
  same = metrics.read_json(workdir / 'results.json')
  assert _numbers(same) == _numbers(finished[1])


def _numbers(results):
  """What must not depend on when the run was killed."""
  kept = {k: v for k, v in results.items() if k not in ('times', 'about')}
  log = [fakes.timeless(step) for step in kept['rl']['steps']]
  return kept | {'rl': kept['rl'] | {'steps': log}}


def test_a_workdir_belongs_to_one_config(finished, folder, capsys):
  said = _fails(
    capsys,
    'study', '--config=study:tiny', f'--config.model={folder}',
    '--config.seed=1', f'--workdir={finished[0]}',
  )  # fmt: skip
  assert 'seed (0 there, 1 here)' in said and 'another --workdir' in said


@pytest.mark.parametrize(
  'override, words',
  [
    ('rollout.lnes=8', ('rollout.lnes', "'rollout.lines'")),
    ('rollout.lines=0', ('rollout.lines=0', '2 or more')),
    ('rollout.lines=many', ("'many'", 'int')),
    ('rollout=3', ('is a group',)),
    ('rl.group=3', ('rollout.batch=4', 'rl.group=3')),
    ('rollout.prompt_tokens=40', ('prompt_tokens=40', 'raise the limit')),
    ('cap.hold=nobody', ("'nobody'", "'persona'")),
    ('model=nothing-here', ('nothing-here',)),
    ('attend=flash', ("'flash'", "'xla'")),
    ('evaluation.personas=/no/such/file.json', ('/no/such/file.json',)),
  ],
)
def test_bad_fields_get_one_sentence(override, words, folder, tmp_path, capsys):
  workdir = tmp_path / 'run'
  said = _fails(
    capsys,
    'study', '--config=study:tiny', f'--config.model={folder}',
    f'--config.{override}', f'--workdir={workdir}', '--quiet',
  )  # fmt: skip
  for word in words:
    assert word in said
  assert not (workdir / 'space.json').exists()


def test_an_empty_persona_file(folder, tmp_path, capsys):
  empty = tmp_path / 'empty.json'
  empty.write_text('')
  said = _fails(
    capsys,
    'study', '--config=study:tiny', f'--config.model={folder}',
    f'--config.evaluation.personas={empty}',
    f'--workdir={tmp_path / "run"}', '--quiet',
  )  # fmt: skip
  assert 'empty.json' in said and 'empty or cut short' in said


def test_unknown_words_on_the_command_line(capsys):
  assert "'study'" in _fails(capsys, 'studdy')
  assert 'study:huge' in _fails(capsys, 'study', '--config=study:huge')
  assert '--workdir' not in _fails(capsys, 'study', '--config=stuy')
  assert "'workdir'" in _fails(capsys, 'study', '--wrkdir=x')


def test_help_names_programs_and_configs(capsys):
  with pytest.raises(SystemExit) as stop:
    main.run(['--help'])
  assert stop.value.code == 0
  said = capsys.readouterr().out
  assert 'study' in said and '--config.rollout.lines=8' in said


def test_json_is_whole_or_absent(tmp_path):
  path = tmp_path / 'x.json'
  metrics.write_json(path, {'a': float('nan')})
  assert metrics.read_json(path) == {'a': None}
  with pytest.raises(TypeError):
    metrics.write_json(path, {'a': object()})
  assert metrics.read_json(path) == {'a': None}
  assert not path.with_name('x.json.partial').exists()


def _fails(capsys, *argv) -> str:
  with pytest.raises(SystemExit) as stop:
    main.run(list(argv))
  assert stop.value.code == 1
  said = capsys.readouterr().err.strip()
  assert '\n' not in said and 'Traceback' not in said
  return said


@pytest.mark.parametrize(
  'name',
  [
    name if name == 'ppo' else pytest.param(name, marks=pytest.mark.slow)
    for name in learn.ALGORITHMS
  ],
)
def test_every_algorithm_trains_all_parameters(config, tmp_path, name):
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.rl.loss = {}
    config.rl.update(algorithm=name, epochs=2, minibatches=2, steps=1)
  opened, result = trained(config, tmp_path, rank=0)
  [told] = result.log
  assert all(np.isfinite(list(told.values()))), told
  before = trees.flatten(opened.model.variables['params'])
  for name, leaf in trees.flatten(result.policy['params']).items():
    assert np.any(leaf != before[name]), name


@pytest.mark.parametrize(
  'name',
  [
    name if name == 'kto' else pytest.param(name, marks=pytest.mark.slow)
    for name in learn.PREFERENCES
  ],
)
def test_every_preference_trains_all_parameters(config, tmp_path, name):
  config = config.copy_and_resolve_references()
  main.override(config, 'rl.algorithm', name)
  main.override(config, 'rl.learning_rate', '0.01')
  opened = lab.open_lab(config)
  silent = lambda count=1: None
  result = prefer.run(opened, config, tmp_path, advance=silent)
  assert [x['step'] for x in result.log] == [1, 2]
  for told in result.log:
    assert all(np.isfinite(list(told.values()))), told
  before = trees.flatten(opened.model.variables['params'])
  for name, leaf in trees.flatten(result.policy['params']).items():
    assert np.any(leaf != before[name]), name
  main.override(config, 'rl.steps', '3')
  longer = prefer.run(opened, config, tmp_path, advance=silent)
  assert longer.log[:2] == result.log and len(longer.log) == 3


@pytest.mark.slow
def test_a_study_of_given_replies_answers(config, tmp_path):
  config = config.copy_and_resolve_references()
  main.override(config, 'rl.algorithm', 'dpo')
  results = study.run(config, tmp_path / 'dpo', quiet=True)
  assert results['rl']['loss'] == {'beta': 0.1, 'smoothing': 0.0}
  assert 'dpo' in (tmp_path / 'dpo' / 'report.html').read_text()


@pytest.mark.parametrize('name', ['dpo', 'kto', 'sft'])
def test_a_control_is_wrong_about_half_of_the_time(name):
  rng = np.random.default_rng(0)
  ids = lambda: tuple(rng.integers(0, 9, 5).tolist())
  replies = 2 if name == 'dpo' else 1
  label = True if name == 'kto' else None
  rows = [
    Encoded(ids(), tuple(ids() for _ in range(replies)), label)
    for _ in range(200)
  ]
  spoilt = prefer._spoilt(rows, 0)
  changed = [a != b for a, b in zip(spoilt, rows, strict=True)]
  assert 70 < sum(changed) < 130
  assert all(a.prompt == b.prompt for a, b in zip(spoilt, rows, strict=True))
  for new, old in zip(spoilt, rows, strict=True):
    if name == 'dpo' and new != old:
      assert new.replies == old.replies[::-1]
    if name == 'kto':
      assert new.replies == old.replies


@pytest.mark.parametrize(
  ('field', 'value', 'match'),
  [
    ('rl.loss.clipp', '3', "clipped_loss has no number 'clipp'; its numbers"),
    ('rl.advantage.clip', '3', "group_relative has no number 'clip'"),
    ('rl.algorithm', 'pp', "'pp' is unknown; give one of"),
    ('rl.group', '1', 'rl.group=1 is too small'),
  ],
)
def test_numbers_that_an_algorithm_does_not_have(field, value, match):
  config = main.load_config('study:tiny')
  with pytest.raises(ValueError, match=match):
    main.override(config, field, value)
    checks.check(config)


def test_numbers_of_an_algorithm_are_read_as_numbers():
  config = main.load_config('study:tiny')
  main.override(config, 'rl.loss.clip_high', '0.3')
  main.override(config, 'rl.advantage.whole', 'true')
  checks.check(config)
  assert config.rl.loss.clip_high == 0.3 and config.rl.advantage.whole is True
  with pytest.raises(ValueError, match="'abc' is no number; give one, or true"):
    main.override(config, 'rl.loss.clip_low', 'abc')


def test_a_judge_that_tells_nothing_apart_is_refused():
  rows = np.arange(12)
  fit = lambda scores: calibration.calibrate(
    scores.astype(float), rows % 2 == 0, ['none'] * 12, rows // 2
  )
  good, same, wrong = fit(-(rows % 2)), fit(0 * rows), fit(rows % 2)
  trust = lambda line, pair: evaluate.Trust(
    {'likelihood': line}, {'likelihood': pair}
  )
  weights = {'prompt_to_line': 1.0, 'line_to_line': 0.5}
  evaluate.refuse(trust(good, good), weights)
  for poor in (same, wrong):
    with pytest.raises(ValueError, match='prompt_to_line would pay the same'):
      evaluate.refuse(trust(poor, good), weights)
    with pytest.raises(ValueError, match='rl.force=true'):
      evaluate.refuse(trust(good, poor), weights)
    evaluate.refuse(trust(good, poor), weights | {'line_to_line': 0.0})
