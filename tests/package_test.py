"""What an installed package holds."""

import tomllib
from pathlib import Path

import persona_jax

ROOT = Path(persona_jax.__file__).parent


def test_a_wheel_holds_all_of_the_package():
  project = ROOT.parent / 'pyproject.toml'
  tools = tomllib.loads(project.read_text())['tool']['setuptools']
  folders = {path.parent for path in ROOT.rglob('*.py')}
  names = {
    '.'.join(['persona_jax', *folder.relative_to(ROOT).parts])
    for folder in folders
  }
  assert names == set(tools['packages']) - {'persona_jax.configs'}
  for path in ROOT.rglob('*'):
    home = next(x for x in path.parents if x in folders)
    if path.is_file() and path.suffix not in ('.py', '.pyc'):
      package = '.'.join(['persona_jax', *home.relative_to(ROOT).parts])
      patterns = tools['package-data'].get(package, [])
      found = {x for pattern in patterns for x in home.glob(pattern)}
      assert path in found, f'{path.name} is in no wheel; list it.'
