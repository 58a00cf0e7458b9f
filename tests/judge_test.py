"""Training of a judge: what it reads, where it answers, and going on."""

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from study_test import folder  # noqa: F401 (a fixture)

from persona_jax import (
  checks,
  judge,
  lab,
  learner,
  main,
  metrics,
  rewards,
  trained,
  trees,
)
from persona_jax import dialogue as dialogues
from persona_jax.dialogue import POLICY
from persona_jax.models import adapter_file, lora
from persona_jax.text import judged


@pytest.fixture(scope='module')
def config(folder):  # noqa: F811
  config = main.load_config('judge')
  for field, value in {
    'model': folder,
    'judge.slots': 384,
    'rollout.batch': 2,
    'rl.steps': 3,
    'rl.save_every': 2,
    'rl.adapter.rank': 2,
    'rl.learning_rate': 0.01,
  }.items():
    main.override(config, field, str(value))
  return config


@pytest.fixture(scope='module')
def opened(config):
  return lab.open_lab(config)


def _train(opened, config, place):
  silent = lambda count=1: None
  return judge.run(opened, config, place, advance=silent)


def test_it_is_trained_on_what_it_will_read(opened):
  examples = [judged.made(i) for i in range(12)]
  said = judge.dialogues(opened.chat, examples)
  view = dialogues.view(said, POLICY, opened.frame)
  for b, example in enumerate(examples):
    text = judge.encoded(opened.chat, example)
    size = len(text.ids) - 1  # the view has nothing after the last line
    assert view.tokens[b, :size].tolist() == list(text.ids[:size])
    ends = view.before[b, 1::2, 0] + 1 + said.body[b, 1::2]
    assert ends.tolist()[: len(text.ends)] == list(text.ends)
    told = [judged.RELATIONS[answer] for answer in text.answers]
    assert told == list(example.relations)


def test_rows_hold_whole_dialogues(opened, config):
  place, seen = judge.Place(), []
  for _ in range(3):
    texts, place = judge._drawn(opened.chat, config, place)
    batch = judge._laid(texts, config)
    assert batch.tokens.shape == (2, 384)
    assert batch.mask.sum() == sum(len(text.ends) for text in texts)
    assert (batch.positions >= 0).sum() == sum(len(x.ids) for x in texts)
    seen += texts
    end = opened.chat.frame().own_to_user[0]
    for row in range(2):
      at = batch.before[row][batch.mask[row]]
      assert (batch.tokens[row][at] == end).all()
      starts = np.flatnonzero(np.asarray(batch.positions[row]) == 0)
      for start, stop in zip(starts, [*starts[1:], 384], strict=True):
        ids = batch.tokens[row, start:stop].tolist()
        [text] = [x for x in texts if list(x.ids) == ids[: len(x.ids)]]
        inside = batch.mask[row] & (start <= batch.before[row])
        inside &= batch.before[row] < stop
        assert batch.actions[row][inside].tolist() == list(text.answers)
  assert len(set(seen)) == len(seen)  # none twice
  assert len(seen) + len(place.waiting) + place.too_long == place.next


def test_it_learns_what_it_is_shown(opened, config, tmp_path, monkeypatch):
  config = config.copy_and_resolve_references()
  for field, value in {'steps': 20, 'warmup': 0, 'learning_rate': 0.03}.items():
    main.override(config, f'rl.{field}', str(value))
  made = judged.made
  again = lambda index, seed: made(index % 3, seed=seed)
  monkeypatch.setattr(judge.judged, 'made', again)
  found = _train(opened, config, tmp_path)
  assert found.log[-1]['loss'] < found.log[0]['loss'] - 0.1


def test_it_goes_on_where_it_was(opened, config, tmp_path):
  whole = _train(opened, config, tmp_path / 'whole')
  assert all(x['judge/verdicts'] > 0 for x in whole.log)
  place = tmp_path / 'parts'
  stopped = []

  def stop(count=1):
    stopped.append(count)
    if len(stopped) == 2:  # the second step was told of and saved
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    judge.run(opened, config, place, advance=stop)
  again = _train(opened, config, place)
  same = [list(map(fakes.timeless, x.log)) for x in (again, whole)]
  assert same[0] == same[1]
  for name, leaf in trees.flatten(whole.policy['lora']).items():
    other = trees.flatten(again.policy['lora'])[name]
    np.testing.assert_array_equal(other, leaf, err_msg=name)
  adapter = judge.adapter(opened, place / 'adapter')
  said = judge.dialogues(opened.chat, [judged.made(i) for i in range(3)])
  odds = rewards.trained(judge.made(opened, adapter))(said)
  assert np.isfinite(odds).all() and np.asarray(odds)[:, 1].all()


def test_an_adapter_is_taken_by_its_own_model_alone(opened, tmp_path):
  with pytest.raises(ValueError, match='no trained judge ships for'):
    judge.adapter(opened)
  made = lora.init(opened.model.config, jax.random.key(0), rank=2, alpha=4.0)
  adapter_file.save(made, opened.model, tmp_path / 'a')
  with pytest.raises(ValueError, match='the adapter of no judge'):
    judge.adapter(opened, tmp_path / 'a')
  judge.sign(tmp_path / 'a', opened.chat)
  fakes.same(judge.adapter(opened, tmp_path / 'a'), made)
  file = tmp_path / 'a' / judge.SIGNED
  record = metrics.read_json(file)
  record['prompt'][3] += 1
  metrics.write_json(file, record)
  with pytest.raises(ValueError, match='another tokenizer or chat template'):
    judge.adapter(opened, tmp_path / 'a')


def test_training_goes_on_from_an_adapter(opened, config, tmp_path):
  key = jax.random.key(3)
  made = lora.init(opened.model.config, key, rank=2, alpha=4.0)
  made = jax.tree.map(lambda x: x + 0.01, made)
  adapter_file.save(made, opened.model, tmp_path / 'a')
  config = config.copy_and_resolve_references()
  main.override(config, 'rl.adapter.start', str(tmp_path / 'a'))
  begun = trained.of(opened.model, config)
  fakes.same(begun.policy(begun.start)['lora'], made)
  main.override(config, 'rl.adapter.rank', '3')
  with pytest.raises(
    ValueError, match='has the rank 2 and rl.adapter.rank is 3'
  ):
    trained.of(opened.model, config)
  main.override(config, 'rl.adapter.rank', '0')
  with pytest.raises(ValueError, match='give the rank of that adapter'):
    checks.check(config)


def test_the_judge_that_ships_is_of_some_use():
  opened = lab.open_lab(main.load_config('judge'))
  home = judge.SHIPPED[opened.model.name]
  size = sum(file.stat().st_size for file in home.iterdir())
  assert size <= 4 << 20 and (home / 'README.md').exists()
  score = rewards.trained(judge.made(opened, judge.adapter(opened)))
  pairs = {x.pair for x in judged.written() if x.kind == 'role_break'}
  some = sorted(pairs)[:16]
  rows = [x for x in judged.written() if x.pair in some and len(x.lines) == 2]
  rows = [judged.Judged(x.persona, x.task, x.lines, (), ()) for x in rows]
  odds = np.asarray(score(judge.dialogues(opened.chat, rows)))[:, 1]
  assert len(rows) >= 12
  assert np.mean(odds[::2] > odds[1::2]) > 0.7  # of a pair, the first fits


def test_answers_must_differ(opened, monkeypatch):
  monkeypatch.setattr(judge.wording, 'ANSWERS', ('Yes', 'Yes!', 'No'))
  with pytest.raises(ValueError, match='not all different'):
    judge.answers(opened.chat)


def test_a_rate_rises_and_falls(config):
  rl = config.copy_and_resolve_references().rl
  with rl.unlocked():
    rl.update(warmup=4, decay=True)
  at = jax.vmap(learner._schedule(2.0, rl, 10))(jnp.arange(11))
  risen = [0.25, 0.5, 0.75, *[1.0] * 8]
  want = 2.0 * np.array(risen) * np.linspace(1, 0, 11)
  np.testing.assert_allclose(at, want, rtol=1e-6)
  with rl.unlocked():
    rl.update(warmup=0, decay=False)
  assert learner._schedule(2.0, rl, 10) == 2.0


def test_an_unknown_size_is_named():
  with pytest.raises(ValueError, match='judge:tiny is no size'):
    main.load_config('judge:tiny')
