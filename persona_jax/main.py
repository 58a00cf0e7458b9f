"""The command line: flags and one call."""

import difflib
import os
import sys
from pathlib import Path

PROGRAMS = {'study': 'the whole question, from weights to a report'}
_USAGE = """usage: persona-jax PROGRAM [--config=FILE[:arg]] [--workdir=DIR]
                   [--config.field=value ...] [--quiet]

programs:
{programs}

A config is a file or a name among {configs}; any field can be overridden,
as in --config.rollout.lines=8."""


def run(argv: list[str] | None = None):
  """Runs a program and exits: 0 if it went well, 1 with one sentence if not."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(usage())
    raise SystemExit(0 if argv else 2)
  try:
    program, config, options = parse(argv)
    _PROGRAMS[program](config, options)
  except (ValueError, FloatingPointError, OSError, ImportError) as error:
    print(f'persona-jax: {error}', file=sys.stderr)
    raise SystemExit(1) from (error if os.environ.get(_DEBUG) else None)
  except KeyboardInterrupt:
    print('persona-jax: stopped; start again to go on.', file=sys.stderr)
    raise SystemExit(130) from None


def usage() -> str:
  """What `persona-jax --help` prints."""
  programs = '\n'.join(f'  {n:<8} {text}' for n, text in PROGRAMS.items())
  return _USAGE.format(programs=programs, configs=', '.join(config_names()))


def parse(argv: list[str]):
  """`(program, config, options)` of a command line.

  Raises:
    ValueError: names what is unknown and the nearest that exists.
  """
  program, *rest = argv
  if program not in PROGRAMS:
    raise ValueError(f'unknown program {program!r}{_near(program, PROGRAMS)}.')
  options = {'config': program, 'workdir': f'runs/{program}', 'quiet': False}
  overrides = []
  words = iter(rest)
  for word in words:
    if word == '--quiet':
      options['quiet'] = True
      continue
    name, given, value = word.removeprefix('--').partition('=')
    if not word.startswith('--'):
      raise ValueError(f'unexpected {word!r}; flags look like --name=value.')
    if not given and (value := next(words, None)) is None:
      raise ValueError(f'{word} needs a value: {word}=...')
    if name.startswith('config.'):
      overrides.append((name.removeprefix('config.'), value))
    elif name in ('config', 'workdir'):
      options[name] = value
    else:
      raise ValueError(f'unknown flag --{name}{_near(name, options)}.')
  config = load_config(options['config'])
  for field, value in overrides:
    override(config, field, value)
  return program, config, options


def load_config(name: str):
  """A config by file or by name, with its argument: 'study:full'."""
  import importlib.util

  path, _, arg = name.partition(':')
  file = _config_file(path)
  spec = importlib.util.spec_from_file_location(file.stem, file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg) if arg else module.get_config()


def override(config, field: str, value: str):
  """Sets `a.b.c` of a config to `value`, read as the type that stands there.

  Raises:
    ValueError: no such field, with the nearest one; or an unreadable value.
  """
  from ml_collections import ConfigDict

  fields = _fields(config)
  if field not in fields:
    raise ValueError(f'unknown field config.{field}{_near(field, fields)}.')
  now = fields[field]
  if isinstance(now, ConfigDict):
    raise ValueError(f'config.{field} is a group; set one of its fields.')
  with config.unlocked():
    config.update_from_flattened_dict({field: _read(field, value, now)})


def config_names() -> list[str]:
  """The configs that ship."""
  return sorted(path.stem for path in _config_folder().glob('*.py'))


def _study(config, options):
  from rich.console import Console

  from persona_jax import report, study

  _compile_cache()
  console = Console()
  results = study.run(config, options['workdir'], quiet=options['quiet'])
  console.print(report.answer_panel(results))
  workdir = Path(options['workdir'])
  console.print(f'{workdir / "report.html"}\n{workdir / "results.json"}')


_PROGRAMS = {'study': _study}
_DEBUG = 'PERSONA_JAX_DEBUG'  # set it to see where an error came from


def _compile_cache():
  import jax

  from persona_jax.models.source import cache_folder

  jax.config.update('jax_compilation_cache_dir', str(cache_folder() / 'xla'))


def _config_folder() -> Path:
  """`configs` of an installed wheel, or of the checkout."""
  package = Path(__file__).parent
  installed = package / 'configs'
  return installed if installed.is_dir() else package.parent / 'configs'


def _config_file(name: str) -> Path:
  for path in (Path(name), _config_folder() / f'{name}.py'):
    if path.is_file():
      return path
  names = config_names()
  raise ValueError(
    f'unknown config {name!r}{_near(name, names)}; give a file or one of '
    f'{", ".join(names)}.'
  )


def _fields(config, prefix=''):
  from ml_collections import ConfigDict

  found = {}
  for key in config:
    value, name = config[key], f'{prefix}{key}'
    found[name] = value
    if isinstance(value, ConfigDict):
      found |= _fields(value, f'{name}.')
  return found


def _read(field, value, now):
  kind = type(now)
  try:
    if kind is bool:
      return {'true': True, 'false': False}[value.lower()]
    return kind(value)
  except (ValueError, KeyError):
    raise ValueError(
      f'config.{field}={value!r} is no {kind.__name__}; it is {now!r} now.'
    ) from None


def _near(name, names):
  nearest = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
  return f'; the nearest is {nearest[0]!r}' if nearest else ''


if __name__ == '__main__':
  run()
