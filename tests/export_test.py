"""A trained policy as a folder, bit for bit as its checkpoint holds it."""

import checkpoint_test
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import study_test

from persona_jax import main, metrics, models, trees
from persona_jax import workdir as owned
from persona_jax.models import adapter_file, lora

pytestmark = checkpoint_test.pytestmark
nothing_is_left = checkpoint_test.nothing_is_left
folder = study_test.folder
config = study_test.config


def trained(config, workdir, rank):
  """A workdir with two steps of training; its lab."""
  config = config.copy_and_resolve_references()
  main.override(config, 'rl.adapter.rank', str(rank))
  main.override(config, 'rl.adapter.targets', 'attn|down')
  main.override(config, 'rl.save_every', '1')
  owned.claim(workdir, config)
  return study_test.trained(config, workdir / 'policies' / 'rl', rank)[0]


@pytest.fixture(scope='module')
def whole(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, trained(config, workdir, 0)


@pytest.fixture(scope='module')
def adapter(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('adapter')
  return workdir, trained(config, workdir, 2)


def on_disk(workdir, step):
  """The policy's parameters, as orbax reads them by itself."""
  path = workdir / 'policies' / 'rl' / str(step) / 'state'
  how = lambda x: ocp.RestoreArgs(restore_type=np.ndarray)
  with ocp.PyTreeCheckpointer() as reader:
    like = reader.metadata(path).item_metadata.tree
    args = ocp.args.PyTreeRestore(restore_args=jax.tree.map(how, like))
    return trees.flatten(reader.restore(path, args)['policy']['params'])


def export(capsys, *argv):
  main.run(['export', *map(str, argv)])
  return capsys.readouterr().out


def fails(capsys, *argv):
  return study_test._fails(capsys, 'export', *map(str, argv))


def same(tree, leaves):
  found = trees.flatten(tree)
  assert set(found) == set(leaves)
  for name, leaf in found.items():
    np.testing.assert_array_equal(leaf, leaves[name], err_msg=name)


def test_each_step_comes_out_as_it_was_saved(whole, tmp_path, capsys):
  workdir, lab = whole
  steps = []
  for step in (1, 2):
    to = tmp_path / str(step)
    said = export(capsys, workdir, f'--to={to}', f'--step={step}')
    assert f'after step {step}' in said
    model = models.load(to)
    steps.append(on_disk(workdir, step))
    same(model.variables['params'], steps[-1])
    assert model.config == lab.model.config
    assert model.template == lab.model.template
    assert model.stop_ids == lab.model.stop_ids
  assert any(np.any(steps[0][k] != x) for k, x in steps[1].items())


def test_the_newest_step_into_an_empty_folder(whole, tmp_path, capsys):
  assert 'after step 2' in export(capsys, whole[0], f'--to={tmp_path}')
  same(models.load(tmp_path).variables['params'], on_disk(whole[0], 2))


def test_an_adapter_comes_out_for_peft(adapter, tmp_path, capsys):
  workdir, lab = adapter
  for step in (1, 2):
    to = tmp_path / str(step)
    export(capsys, workdir, f'--to={to}', f'--step={step}')
    found, scales = lora.split(adapter_file.load(to, lab.model))
    same(found, on_disk(workdir, step))
    assert {float(x) for x in jax.tree.leaves(scales)[0]} == {32.0 / 2}


def test_an_adapter_is_merged(adapter, tmp_path, capsys):
  workdir, lab = adapter
  export(capsys, workdir, f'--to={tmp_path / "x"}')
  export(capsys, workdir, f'--to={tmp_path / "y"}', '--merge')
  separate = adapter_file.load(tmp_path / 'x', lab.model)
  merged = lora.merge({**lab.model.variables, 'lora': separate})
  same(models.load(tmp_path / 'y').variables, trees.flatten(merged))


def test_it_is_written_in_another_dtype(whole, adapter, tmp_path, capsys):
  narrow = '--dtype=bfloat16'
  export(capsys, adapter[0], f'--to={tmp_path / "x"}', narrow)
  to = jax.numpy.bfloat16
  found = adapter_file.load(tmp_path / 'x', adapter[1].model, dtype=to)
  found, scales = lora.split(found)
  want = {k: x.astype(to) for k, x in on_disk(adapter[0], 2).items()}
  same(found, want)
  assert {float(x) for x in jax.tree.leaves(scales)[0]} == {32.0 / 2}
  export(capsys, whole[0], f'--to={tmp_path / "y"}', narrow)
  want = {k: x.astype(to) for k, x in on_disk(whole[0], 2).items()}
  same(models.load(tmp_path / 'y', dtype='bfloat16').variables['params'], want)
  said = fails(capsys, whole[0], f'--to={tmp_path / "z"}', '--dtype=int8')
  assert '--dtype=int8 is not written; give one of float32' in said


def test_what_trained_it_is_not_read(whole, tmp_path, capsys, monkeypatch):
  asked = []
  read = ocp.CheckpointManager.restore

  def seen(self, step, args):
    found = read(self, step, args=args)
    asked.extend(trees.flatten(found.state))
    return found

  monkeypatch.setattr(ocp.CheckpointManager, 'restore', seen)
  export(capsys, whole[0], f'--to={tmp_path}')
  assert asked and all(x.startswith('policy/params/') for x in asked)


def test_what_is_not_there(whole, tmp_path, capsys):
  workdir = whole[0]
  to = f'--to={tmp_path / "new"}'
  assert 'no workdir' in fails(capsys, tmp_path / 'none', to)
  assert 'no step 7; the steps there are [2, 1]' in fails(
    capsys, workdir, to, '--step=7'
  )
  assert "no policy 'shuffled'; those there are ['rl']" in fails(
    capsys, workdir, to, '--policy=shuffled'
  )
  assert 'no adapter to merge' in fails(capsys, workdir, to, '--merge')
  assert 'takes one workdir and --to' in fails(capsys, workdir)
  assert not (tmp_path / 'new').exists()


def test_fused_projections_are_merged(adapter, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(adapter_file, 'fits', lambda config: False)
  to = f'--to={tmp_path / "new"}'
  assert 'fused projections' in fails(capsys, adapter[0], to)
  assert 'after step 2' in export(capsys, adapter[0], to, '--merge')


def test_nothing_is_overwritten(whole, tmp_path, capsys):
  (tmp_path / 'mine').write_text('')
  said = fails(capsys, whole[0], f'--to={tmp_path}')
  assert 'exists and is not empty' in said
  said = fails(capsys, whole[0], f'--to={tmp_path / "mine"}')
  assert 'exists and is not empty' in said


def test_a_broken_checkpoint_is_not_exported(whole, tmp_path, capsys):
  import shutil

  shutil.copytree(whole[0], tmp_path / 'run')
  state = tmp_path / 'run' / 'policies' / 'rl' / '2' / 'state'
  for file in (state / 'd').iterdir():
    file.write_bytes(b'')
  to = tmp_path / 'new'
  said = fails(capsys, tmp_path / 'run', f'--to={to}')
  assert '/rl/2 cannot be read' in said and 'other steps there are [1]' in said
  assert not to.exists()


def test_a_checkpoint_of_another_model(whole, tmp_path, capsys):
  import shutil

  shutil.copytree(whole[0], tmp_path / 'run')
  path = tmp_path / 'run' / 'config.json'
  record = metrics.read_json(path)
  record['rl']['adapter']['rank'] = 3
  metrics.write_json(path, record)
  said = fails(capsys, tmp_path / 'run', f'--to={tmp_path / "new"}')
  assert 'is not in it' in said
