"""`persona-jax plan`: what it says, what it suggests, how it fails."""

import importlib.util
import json
import re

import costs_test
import jax
import jax.numpy as jnp
import pytest

from persona_jax import chips, costs, main, plan, plan_tables, planned
from persona_jax import job as jobs
from persona_jax.chips import GIB
from persona_jax.learn import sharding

model = costs_test.model
EIGHT = ('h100:8', '--mesh=fsdp=4,tensor=2', '--batch=16', '--tokens=128')


def said(capsys, *argv):
  main.run(['plan', *argv])
  return capsys.readouterr().out


def fails(capsys, *argv):
  with pytest.raises(SystemExit) as stop:
    main.run(['plan', *argv])
  assert stop.value.code == 1
  sentence = capsys.readouterr().err.strip().splitlines()[-1]
  assert 'Traceback' not in sentence
  return sentence


# What is compiled.


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  """A job of eight GPUs, and what was compiled of it."""
  path = tmp_path_factory.mktemp('model') / 'config.json'
  path.write_text(json.dumps(costs_test.SETTINGS))
  job = jobs.make(
    topology='h100:8',
    model=str(path),
    mesh='fsdp=4,tensor=2',
    batch=16,
    tokens=128,
    lines=4,
    microbatches=2,
    layers=1,
  )
  return job, {x: plan.compiled(job, x) for x in plan.PROGRAMS}


def test_the_step_holds_its_state_and_batch(found):
  job, programs = found
  batch = _batch(job).replace(line=None)  # which this loss does not read
  batch = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch))
  state = costs.state(job)
  assert programs['train']['arguments'] == state + batch / job.ways


def _batch(job):
  return jobs.batch(job, jnp.zeros)


def test_how_far_off_the_count_by_hand_was(found):
  job, programs = found
  by_hand = costs.state(job) + costs.temporaries(job)
  train = programs['train']
  peak = train['arguments'] + train['temporaries']
  shown = plan.memory(job, 'train', train)['off']
  assert shown == pytest.approx(peak / by_hand)
  assert plan.memory(job, 'talk', programs['talk'])['off'] > 0


def test_the_rollout_holds_both_speakers_and_caches(found):
  job, programs = found
  talk = programs['talk']
  beside = talk['arguments'] - costs.speakers(job)
  # prompts of 2 x 16, an opening of 20, four numbers and a flag: int32
  assert beside == (16 // 4) * (4 * (2 * 16 + 20 + 5) + 1)
  assert talk['temporaries'] > 2 * costs.cache(job)


def test_the_step_sends_sums_over_tensor_in_every_layer(found):
  job, programs = found
  sent = programs['train']['collectives']
  assert {'all-reduce', 'all-gather'} <= {x['kind'] for x in sent}
  assert all(x['open'] == 0 for x in sent)
  total = sum(x['sent'] for x in sent)
  by_hand = costs.train_sent(job)  # in bfloat16; a CPU sends float32
  assert by_hand < total < 4 * by_hand


def test_what_a_person_sees(found, capsys, monkeypatch):
  job, programs = found
  monkeypatch.setattr(plan, 'compiled', lambda job, x: programs[x])
  for width in ('100', '60'):
    monkeypatch.setenv('COLUMNS', width)
    shown = said(
      capsys, *EIGHT, f'--model={job.model}', '--lines=4', '--microbatches=2'
    )
    assert max(map(len, shown.splitlines())) <= int(width)
    for part in (
      'fsdp=4, tensor=2', '16 dialogues of 128', 'an estimate', 'in all',
      'all-reduce', 'bound by', 'an hour 16 to 56 $', 'assumption',
      'compiled / counted by hand',
    ):  # fmt: skip
      assert part in ' '.join(shown.split())
    assert 'does not fit' not in shown


def test_what_a_machine_reads(model, capsys):
  record = json.loads(
    said(capsys, *EIGHT, f'--model={model}', '--lines=4', '--quick', '--json')
  )
  assert record['job']['mesh'] == sharding.mesh_shape('fsdp=4,tensor=2')
  assert record['chips'] == 8 and record['suggestion'] is None
  train = record['train']
  assert train['fits'] and train['collectives'] is None
  parts = ('held', 'cache', 'kept', 'temporaries')
  assert train['total'] == sum(train[x] for x in parts)
  assert train['off'] is None  # nothing was compiled
  low, high = record['seconds']
  assert 0 < low < high


# What is suggested.


def tight(monkeypatch, name, memory):
  """The chip with less memory."""
  chip = chips.CHIPS[name]._replace(memory=memory)
  monkeypatch.setitem(chips.CHIPS, name, chip)


def llama(**fields):
  given = {'topology': 'v5p:4x4x4', 'model': 'llama-3.1-8b', 'batch': 256}
  return jobs.make(**(given | fields))


def by_hand(job, program):
  """A compiler that finds what is counted by hand."""
  found = plan.memory(job, program, None)
  return {
    'arguments': found['held'],
    'temporaries': found['temporaries'] + found['cache'],
    'collectives': [],
    'seconds': 1.0,
  }


def test_what_fits_needs_no_suggestion():
  assert plan.plan(llama(), None)['suggestion'] is None


def test_more_microbatches_come_first(monkeypatch):
  tight(monkeypatch, 'v5p', 45 * GIB)
  found = plan.plan(llama(), None)
  assert not found['train']['fits'] and found['talk']['fits']
  assert found['suggestion']['words'] == '--microbatches=2'
  assert not found['suggestion']['verified']


def test_full_remat_before_more_chips(monkeypatch):
  tight(monkeypatch, 'v5p', 40 * GIB)
  found = plan.plan(llama(remat='none', batch=64), None)
  assert found['suggestion']['words'] == '--remat=full'


def test_weights_that_are_too_large_to_talk_are_spread(monkeypatch):
  found = plan.plan(llama(topology='v6e:4x4', batch=16), by_hand)
  assert not found['talk']['fits']
  suggestion = found['suggestion']
  assert suggestion['verified']
  assert suggestion['words'].startswith('--mesh=fsdp=8,tensor=2')
  limit = chips.CHIPS['v6e'].memory
  assert all(x <= limit for x in suggestion['totals'].values())


def test_a_suggestion_that_the_compiler_refuses_is_not_made(monkeypatch):
  tight(monkeypatch, 'v5p', 45 * GIB)

  def compiler(job, program):
    found = by_hand(job, program)
    if program == 'train' and job.microbatches < 4:
      return {'used': 47 * GIB, 'limit': 45 * GIB, 'seconds': 1.0}
    return found

  found = plan.plan(llama(), compiler)
  train = found['train']
  assert not train['fits'] and train['limit'] == 45 * GIB
  assert train['total'] == 47 * GIB + train['kept']
  suggestion = found['suggestion']
  assert suggestion['verified'] and suggestion['words'] == '--microbatches=4'
  assert [x['words'] for x in suggestion['tried']] in (
    [], ['--microbatches=2']
  )  # fmt: skip


def test_nothing_that_was_tried_fits(monkeypatch):
  tight(monkeypatch, 'v5p', GIB)
  found = plan.plan(llama(batch=64), None)['suggestion']
  assert found['words'] is None
  shown = [x.plain for x in plan_tables._suggested(found)]
  assert shown == ['It does not fit; no change that was tried makes it fit.']


def test_more_chips_are_named_with_their_mesh(monkeypatch):
  one = llama(topology='v6e:2x2', batch=4)
  other = plan._on(one, 'v6e:4x2', one.mesh | {'fsdp': 8})
  words = plan.difference(one, other)
  assert words == 'v6e:4x2 --mesh=fsdp=8 --batch=8'


@pytest.mark.parametrize(
  ('message', 'found'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
      'for HLO temporaries (25.80G) exceeds available HBM (15.75G).',
      {'temporaries': 25.80 * GIB, 'limit': 15.75 * GIB},
    ),
    (
      'Ran out of memory in memory space hbm. Used 96.5G of 95.74G hbm.',
      {'used': 96.5 * GIB, 'limit': 95.74 * GIB},
    ),
    ('INTERNAL: something else', None),
  ],
)
def test_what_a_compiler_says_of_too_large_programs(message, found):
  assert planned.too_large(message) == found


def test_a_program_that_is_too_large_alone():
  job = llama(topology='v6e:4x4', batch=16)
  found = plan.memory(
    job, 'train', {'temporaries': 40 * GIB, 'limit': 31 * GIB, 'seconds': 1.0}
  )
  assert found['held'] == costs.state(job) and found['limit'] == 31 * GIB
  assert found['total'] == found['held'] + found['kept'] + 40 * GIB


def test_more_chips_may_spread_features_too():
  one = llama(topology='v5p:2x2x2', model='llama-3.1-70b', batch=8)
  found = plan.plan(one, None)['suggestion']['words'].split()
  assert found[0] in ('v5p:4x2x2', 'v5p:4x4x2')
  assert re.fullmatch('--mesh=fsdp=[248],tensor=[48]', found[1])


# How it fails.


@pytest.mark.parametrize(
  ('argv', 'match'),
  [
    ((), 'plan takes one topology and was given []'),
    (('v5p:4x4x4', 'v6e:8x8'), 'plan takes one topology'),
    (('tpu:8',), "'tpu:8' names no chip that is known"),
    (('v5p:4x4x4', '--mesh=fsdp=63'), 'has 63 places and v5p:4x4x4 has 64'),
    (('h100:6', '--mesh=fsdp=6', '--quick'), 'does not divide over P('),
    (('v5p:4x4x4', '--microbatch=2'), "nearest is 'microbatches'"),
    (('v5p:4x4x4', '--batch=many'), '--batch=\'many\' is no int'),
  ],
)  # fmt: skip
def test_errors_are_sentences(capsys, argv, match):
  assert match in fails(capsys, *argv)


def test_without_libtpu(capsys, monkeypatch):
  monkeypatch.setattr(plan, '_libtpu', lambda: None)
  sentence = fails(capsys, 'v5p:4x4x4')
  assert 'pip install "persona_jax[tpu]"' in sentence
  assert '--quick' in sentence
  assert 'fits' in said(capsys, 'v5p:4x4x4', '--quick')


def test_what_the_compiler_says_is_passed_on(model, capsys):
  sentence = fails(
    capsys, *EIGHT, f'--model={model}', '--lines=4', '--attend=cudnn'
  )
  assert 'train could not be compiled for h100:8: ' in sentence
  assert 'cuDNN' in sentence


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='needs libtpu'
)
def test_a_real_compiler_for_tpus(model):
  job = jobs.make(
    topology='v5p:2x2x1', model=model, mesh='fsdp=2,tensor=2', batch=4, lines=4
  )
  found = plan.plan(job, plan.compiled)
  assert found['train']['fits'] and found['talk']['fits']
  assert found['train']['held'] >= costs.state(job)
  assert all(x['open'] == 0 for x in found['train']['collectives'])
