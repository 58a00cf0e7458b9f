"""A workdir belongs to one config, of this version or of another."""

import pytest

from persona_jax import main, metrics, workdir


@pytest.fixture
def config():
  return main.load_config('study:tiny')


def written(path, change, version='0.0.9'):
  """The workdir of a run by another version, its record changed."""
  workdir.claim(path, main.load_config('study:tiny'))
  record = metrics.read_json(path / 'config.json')
  if version is None:
    del record['persona_jax']
  else:
    record['persona_jax'] = version
  change(record)
  metrics.write_json(path / 'config.json', record)
  return path


def refused(path, config):
  with pytest.raises(ValueError) as error:
    workdir.claim(path, config)
  said = str(error.value)
  assert '\n' not in said and 'another --workdir' in said
  return said


def test_the_same_config_goes_on(tmp_path, config):
  workdir.claim(tmp_path, config)
  first = (tmp_path / 'config.json').read_text()
  workdir.claim(tmp_path, config)
  assert (tmp_path / 'config.json').read_text() == first
  assert workdir.read(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize('version', ['0.0.9', None])
def test_fields_that_are_new_and_as_they_ship_are_fine(
  tmp_path, config, version
):
  def older(record):
    del record['rl']['truncate'], record['controls'], record['attend']

  path = written(tmp_path, older, version)
  workdir.claim(path, config)
  assert workdir.read(path).to_dict() == config.to_dict()
  main.override(config, 'rl.truncate', '2.0')
  said = refused(path, config)
  assert 'rl.truncate (absent there, 2.0 here)' in said
  assert 'attend' not in said and 'controls' not in said


def test_what_has_gone_and_what_differs_is_named_with_the_version(
  tmp_path, config
):
  def older(record):
    record['rl']['baseline'] = 'mean'
    record['seed'] = 3

  said = refused(written(tmp_path, older), config)
  assert 'of persona_jax 0.0.9 (this is 0.' in said
  assert 'rl.baseline (mean there, absent here); seed (3 there, 0 he' in said
  assert 'rl.steps' not in said


def test_a_number_that_is_given_now_is_not_new(tmp_path, config):
  workdir.claim(tmp_path, config)
  main.override(config, 'rl.loss.clip', '0.1')
  assert 'rl.loss.clip (absent there, 0.1 here)' in refused(tmp_path, config)


def test_a_version_that_was_not_recorded(tmp_path, config):
  path = written(tmp_path, lambda record: record.update(seed=3), None)
  assert 'seed (3 there, 0 here)' in refused(path, config)


def test_what_is_no_workdir(tmp_path):
  with pytest.raises(ValueError, match='no workdir: it has no config.json'):
    workdir.read(tmp_path)


def test_a_run_goes_on_on_another_mesh(tmp_path, config):
  workdir.claim(tmp_path, config)
  main.override(config, 'mesh', 'fsdp=2,tensor=4')
  main.override(config, 'rl.microbatches', '2')
  workdir.claim(tmp_path, config)
  main.override(config, 'rl.minibatches', '2')
  assert 'rl.minibatches' in refused(tmp_path, config)
