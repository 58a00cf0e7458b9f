"""Steps are told of late, in order; what is not finite changes nothing."""

import json

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from study_test import config, folder  # noqa: F401 (fixtures)

from persona_jax import chips, lab, main, meter, train, trees
from persona_jax.checkpoint import Checkpoints, Guard
from persona_jax.learn import Batch
from persona_jax.learner import Learner
from persona_jax.meter import Meter, Passes, Work


@pytest.fixture(scope='module')
def opened(config):  # noqa: F811
  return lab.open_lab(_config(config))


def _config(config, **fields):  # noqa: F811
  config = config.copy_and_resolve_references()
  fields = {'adapter.rank': 2, 'steps': 3, 'save_every': 9} | fields
  for name, value in fields.items():
    main.override(config, f'rl.{name}', str(value).lower())
  return config


def _train(opened, config, place, reward=None):  # noqa: F811
  taste = lambda dialogue: jnp.mean(dialogue.tokens % 7, axis=2)
  terms = {'taste': (1.0, jax.tree_util.Partial(reward or taste))}
  silent = lambda count=1: None
  return train.run(opened, config, terms, place, advance=silent)


def _saved(place):
  return sorted(int(x.name) for x in place.iterdir() if x.name.isdigit())


def _spoil(monkeypatch, which):
  """Advantages of the `which`-th prepared batch that are not finite."""
  prepare, calls = Learner.prepare, []

  def spoilt(self, *args):
    batch, told = prepare(self, *args)
    calls.append(len(calls))
    factor = jnp.where(len(calls) == which, jnp.nan, 1.0)
    return batch.replace(advantages=factor * batch.advantages), told

  monkeypatch.setattr(Learner, 'prepare', spoilt)
  return calls


def test_a_step_is_told_of_when_the_next_is_begun(
  config,  # noqa: F811
  opened,
  tmp_path,
  monkeypatch,
):
  events = []

  def heard(owner, name, what):
    real = getattr(owner, name)

    def fn(*args):
      events.append(what)
      return real(*args)

    monkeypatch.setattr(owner, name, fn)

  heard(train, '_rollout', 'begun')
  heard(Learner, 'learn', 'learned')
  heard(Learner, 'told', 'told')
  heard(Checkpoints, 'save', 'saved')
  _train(opened, _config(config, save_every=2), tmp_path)
  first, middle = ['begun', 'learned'], ['begun', 'told']
  assert events == [
    *[*first, *middle],
    *['learned', *middle, 'saved'],
    *['learned', 'told', 'saved'],
  ]
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(x)['step'] for x in lines] == [1, 2, 3]


def test_a_broken_update_stops_and_leaves_the_state_of_before(
  config,  # noqa: F811
  opened,
  tmp_path,
  monkeypatch,
):
  calls = _spoil(monkeypatch, 2)
  with pytest.raises(FloatingPointError, match='loss of the policy .* step 2'):
    _train(opened, _config(config), tmp_path / 'stops')
  assert _saved(tmp_path / 'stops') == [1]
  calls.clear()
  result = _train(opened, _config(config, skip=True), tmp_path / 'skips')
  assert [x['step/skipped'] for x in result.log] == [0, 1, 0]
  assert ['loss' in x for x in result.log] == [True, False, True]


def test_what_follows_a_broken_update_changes_nothing(
  config,  # noqa: F811
  opened,
):
  config = _config(config)  # noqa: F811
  learner = Learner(opened, config)
  said = train._rollout(
    opened, config, learner, 0, learner.init().policy.params
  )
  rewards = jnp.mean(said.tokens % 7, axis=2)
  batch, _ = learner.prepare(learner.init(), said, rewards)
  bad = batch.replace(advantages=batch.advantages * jnp.nan)
  yes, no = jnp.array(True), jnp.array(False)
  before = trees.flatten(learner.init().policy.params)
  states, learned = learner.learn(learner.init(), batch, 0, no)
  assert not learned.changed
  same = trees.flatten(states.policy.params)
  for name, leaf in before.items():
    np.testing.assert_array_equal(same[name], leaf, err_msg=name)
  states, learned = learner.learn(learner.init(), bad, 0, yes)
  _, after = learner.learn(states, batch, 1, learned.found[-1]['step/fine'])
  assert not after.changed
  _, learned = learner.learn(learner.init(), batch, 0, yes)
  assert learned.changed


def test_a_later_update_that_breaks_keeps_the_checkpoint_of_before(
  config,  # noqa: F811
  opened,
  tmp_path,
  monkeypatch,
):
  update, calls = Learner._compiled_update, []

  def spoilt(self, states):
    def fn(states, base, batch, rows, fine):
      calls.append(len(calls))
      bad = batch.replace(advantages=batch.advantages * jnp.nan)
      batch = bad if len(calls) == 4 else batch
      return update(self, states)(states, base, batch, rows, fine)

    return fn

  monkeypatch.setattr(Learner, '_compiled_update', spoilt)
  config = _config(config, epochs=2, save_every=1)  # noqa: F811
  with pytest.raises(FloatingPointError, match='step 2, update 2 of 2'):
    _train(opened, config, tmp_path)
  assert _saved(tmp_path) == [1]


def test_a_reward_that_is_not_finite_is_named(
  config,  # noqa: F811
  opened,
  tmp_path,
):
  def odd(dialogue):
    rewards = jnp.mean(dialogue.tokens % 7, axis=2)
    return rewards.at[1, 2].set(jnp.inf)

  with pytest.raises(FloatingPointError, match='dialogue 1, line 2 .* step 1'):
    _train(opened, _config(config), tmp_path / 'stops', odd)
  assert _saved(tmp_path / 'stops') == [0]
  skips = _config(config, skip=True)
  result = _train(opened, skips, tmp_path / 'skips', odd)
  assert [x['step/skipped'] for x in result.log] == [1, 1, 1]
  before = trees.flatten(Learner(opened, skips).init().policy.params)
  after = trees.flatten(result.policy['lora'])
  for name, leaf in before.items():
    np.testing.assert_array_equal(after[name], leaf, err_msg=name)


def test_a_run_that_is_told_to_end_tells_of_its_step_later(
  config,  # noqa: F811
  opened,
  tmp_path,
  monkeypatch,
):
  config = _config(config, steps=4)  # noqa: F811
  whole = _train(opened, config, tmp_path / 'whole')
  place, real, calls = tmp_path / 'ended', Guard.heed, []

  def heed(self):
    calls.append(len(calls))
    if len(calls) == 5:  # before the third step, the second not yet told of
      self.save()
      raise SystemExit
    real(self)

  monkeypatch.setattr(Guard, 'heed', heed)
  with pytest.raises(SystemExit):
    _train(opened, config, place)
  assert _saved(place) == [2]
  again = _train(opened, config, place)
  timeless = lambda log: list(map(fakes.timeless, log))
  assert timeless(again.log) == timeless(whole.log)
  lines = (place / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(x)['step'] for x in lines] == [1, 2, 3, 4]


# The pace of a step.


def test_work_is_counted_without_padding():
  positions = jnp.array([[0, 1, 2, -1, -1], [0, 1, 2, 0, 1]])  # two in a row
  blank = jnp.zeros((2, 3))
  batch = Batch(
    tokens=positions,
    positions=positions,
    before=blank.astype(jnp.int32),
    actions=blank.astype(jnp.int32),
    mask=jnp.array([[True, True, False], [True, False, False]]),
    advantages=blank,
    old_logprobs=blank,
    reference_logprobs=blank,
  )
  seen = [range(p + 1) for row in positions.tolist() for p in row if p >= 0]
  assert meter.work(batch) == (8, sum(map(len, seen)), 3)


def test_utilisation_is_of_the_peak_of_all_chips(opened, monkeypatch):
  clock = iter([100.0, 102.0, 106.0])
  monkeypatch.setattr(meter.time, 'monotonic', lambda: next(clock))
  monkeypatch.setattr(meter.chips, 'of', lambda kind: chips.CHIPS['v5p'])
  model = opened.model.config
  ruler = Meter(model, Passes(once=3, learned=3, logits=7), epochs=2)
  told = ruler.read(Work(tokens=20.0, pairs=0.0, learned=0.0))
  assert told['pace/seconds'] == 2.0 and told['pace/tokens'] == 5.0
  leaves = trees.flatten(opened.model.variables['params'])
  weights = sum(
    leaf.size
    for name, leaf in leaves.items()
    if name.startswith('layers/') and name.endswith('kernel')
  )
  flops = 2 * weights * (10 * 3 + 20 * 3) / 2.0
  assert told['pace/tflops'] == pytest.approx(flops / 1e12)
  peak = 459e12 * jax.device_count()
  assert told['pace/mfu'] == pytest.approx(flops / peak)
  heard = ruler.read(Work(tokens=0.0, pairs=6.0, learned=4.0))
  width = model.heads * model.head_dim
  logits = 4 * 2 * 7 * model.features
  pairs = 6 * model.layers * (2 * width + 2 * width)
  assert heard['pace/seconds'] == 4.0
  assert heard['pace/tflops'] * 1e12 == pytest.approx(
    (3 / 2 + 3) * (logits + pairs) / 4.0
  )
  assert 0.01 < heard['pace/memory_gib'] < 1000


@pytest.mark.parametrize(
  ('kind', 'name'),
  [
    ('TPU v5 lite', 'v5e'),
    ('TPU v5p', 'v5p'),
    ('TPU v5', 'v5p'),
    ('TPU v6 lite', 'v6e'),
    ('NVIDIA H100 80GB HBM3', 'h100'),
    ('NVIDIA H200', 'h200'),
  ],
)
def test_a_chip_is_known_by_what_jax_calls_it(kind, name):
  assert chips.of(kind) is chips.CHIPS[name]
  assert chips.of('cpu') is None and chips.of('NVIDIA H100 PCIe') is None
