"""The command line: flags and one call."""

import difflib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Program(NamedTuple):
  """A row of `persona-jax --help`: how it reads its words, what it does."""

  about: str
  flags: tuple[str, ...]  # lines that show them
  parse: Callable[[list[str]], Any]
  run: Callable[[Any], None]


_USAGE = """usage: persona-jax PROGRAM ...

{programs}

A config is a file or a name among {configs}; any field can be overridden,
as in --config.rollout.lines=8. A source is a name that `persona-jax models`
lists, hf:org/name, a Hugging Face folder or a .gguf file."""


def run(argv: list[str] | None = None):
  """Runs a program and exits: 0 if it went well, 1 with one sentence if not."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] == 'help' or {'-h', '--help'} & set(argv):
    print(usage())
    raise SystemExit(0 if argv else 2)
  name, *words = argv
  try:
    if name not in PROGRAMS:
      raise ValueError(f'unknown program {name!r}{_near(name, PROGRAMS)}.')
    program = PROGRAMS[name]
    program.run(program.parse(words))
  except _KNOWN as error:
    print(f'persona-jax: {error}', file=sys.stderr)
    raise SystemExit(1) from (error if os.environ.get(_DEBUG) else None)
  except KeyboardInterrupt:
    print('persona-jax: stopped; start again to go on.', file=sys.stderr)
    raise SystemExit(130) from None


def usage() -> str:
  """What `persona-jax --help` prints."""
  lines = []
  for name, program in PROGRAMS.items():
    lines.append(f'  {name:<8} {program.about}')
    lines += [f'           {flags}' for flags in program.flags]
  return _USAGE.format(
    programs='\n'.join(lines), configs=', '.join(config_names())
  )


def read_words(
  words: Iterable[str], defaults: Mapping[str, Any], free: str | None = None
) -> tuple[list[str], dict[str, Any], list[tuple[str, str]]]:
  """`(plain words, options, fields)` of `name --flag=value --quiet ...`.

  Args:
    words: what follows the program's name.
    defaults: of every flag; it is read as the type of its default, and one
      that is False takes no value.
    free: flags that start with this are fields of some record: pairs.

  Raises:
    ValueError: names what is unknown and the nearest that exists.
  """
  plain, options, fields = [], dict(defaults), []
  words = iter(words)
  for word in words:
    if not word.startswith('--'):
      plain.append(word)
      continue
    name, given, value = word.removeprefix('--').partition('=')
    is_field = free is not None and name.startswith(free)
    if name not in defaults and not is_field:
      raise ValueError(f'unknown flag --{name}{_near(name, defaults)}.')
    if not given and defaults.get(name) is False:
      options[name] = True
      continue
    if not given and (value := next(words, None)) is None:
      raise ValueError(f'{word} needs a value: {word}=...')
    if is_field:
      fields.append((name.removeprefix(free), value))
    else:
      options[name] = _read(f'--{name}', value, defaults[name])
  return plain, options, fields


def parse_study(words: list[str]):
  """`(config, options)` of the words that follow `study`."""
  return _parse_run(
    words, {'config': 'study', 'workdir': 'runs/study', 'quiet': False}
  )


def parse_train(words: list[str]):
  """`(config, options)` of the words that follow `train`."""
  defaults = {'config': 'study', 'workdir': 'runs/train', 'quiet': False}
  return _parse_run(words, defaults | {'distributed': False})


def _parse_run(words, defaults):
  plain, options, fields = read_words(words, defaults, free='config.')
  if plain:
    raise ValueError(f'unexpected {plain[0]!r}; flags look like --name=value.')
  config = load_config(options['config'])
  for field, value in fields:
    override(config, field, value)
  return config, options


def parse_models(words: list[str]):
  """`(sources, options)` of the words that follow `models`."""
  defaults = {
    'mesh': '',
    'dtype': 'bfloat16',
    'batch': 0,
    'tokens': 4096,
    'rank': 16,
    'check': False,
    'json': False,
  }
  sources, options, _ = read_words(words, defaults)
  return sources, options


def parse_plan(words: list[str]):
  """`(topology, options)` of the words that follow `plan`."""
  defaults = {
    'model': 'llama-3.1-8b',
    'mesh': '',
    'batch': 0,
    'tokens': 4096,
    'lines': 16,
    'microbatches': 1,
    'remat': 'full',
    'attend': 'xla',
    'rank': 0,
    'quick': False,
    'json': False,
  }
  plain, options, _ = read_words(words, defaults)
  if len(plain) != 1:
    raise ValueError(
      f'plan takes one topology and was given {plain}; write one, as in '
      'persona-jax plan v5p:4x4x4 --mesh=fsdp=64.'
    )
  return plain[0], options


def parse_export(words: list[str]):
  """`(workdir, options)` of the words that follow `export`."""
  defaults = {'to': '', 'step': 0, 'policy': 'rl', 'merge': False}
  plain, options, _ = read_words(words, defaults)
  if len(plain) != 1 or not options['to']:
    raise ValueError(
      f'export takes one workdir and --to and was given {words}; write '
      'persona-jax export runs/train --to=my-model.'
    )
  return plain[0], options


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
  if field not in fields and field.rpartition('.')[0] in FREE:
    with config.unlocked():
      config.update_from_flattened_dict({field: _number(field, value)})
    return
  if field not in fields:
    raise ValueError(f'unknown field config.{field}{_near(field, fields)}.')
  now = fields[field]
  if isinstance(now, ConfigDict):
    raise ValueError(f'config.{field} is a group; set one of its fields.')
  with config.unlocked():
    value = _read(f'config.{field}', value, now)
    config.update_from_flattened_dict({field: value})


FREE = ('rl.advantage', 'rl.loss')  # groups of numbers that an algorithm knows


def _number(field, value):
  for read in (int, float, {'true': True, 'false': False}.__getitem__):
    try:
      return read(value)
    except (ValueError, KeyError):
      continue
  raise ValueError(
    f'config.{field}={value!r} is no number; give one, or true or false.'
  )


def config_names() -> list[str]:
  """The configs that ship."""
  return sorted(path.stem for path in _config_folder().glob('*.py'))


def _study(job):
  from rich.console import Console

  from persona_jax import report, study

  config, options = job
  _compile_cache()
  console = Console()
  results = study.run(config, options['workdir'], quiet=options['quiet'])
  console.print(report.answer_panel(results))
  workdir = Path(options['workdir'])
  console.print(f'{workdir / "report.html"}\n{workdir / "results.json"}')


def _train(job):
  from rich.console import Console

  from persona_jax import processes

  config, options = job
  with processes.joined(_tell, when=options['distributed']):
    from persona_jax import judge, study

    _compile_cache()
    program = judge if 'judge' in config else study
    workdir, quiet = options['workdir'], options['quiet']
    done = program.train_only(config, workdir, quiet=quiet)
  if not processes.first():
    return
  last = done['steps'][-1]
  console = Console()
  for name, value in last.items():
    shown = 'not finite' if value is None else f'{value:.4g}'
    console.print(f'{name:<28} {shown}')
  console.print(f'{Path(options["workdir"]) / "policies" / "rl"}')


def _export(job):
  from persona_jax import export

  workdir, options = job
  step = export.run(workdir, **options)
  print(f'{options["to"]}: {options["policy"]} after step {step}')


def _models(job):
  from persona_jax import inventory

  sources, options = job
  inventory.run(sources, **options)


def _plan(job):
  import jax

  from persona_jax import plan

  jax.config.update('jax_platforms', 'cpu')  # no device is looked for
  topology, options = job
  plan.run(topology, **options)


PROGRAMS = {
  'study': Program(
    'the whole question, from weights to a report',
    (
      '[--config=FILE[:arg]] [--workdir=DIR] [--quiet]',
      '[--config.field=value ...]',
    ),
    parse_study,
    _study,
  ),
  'train': Program(
    'multi-turn RL alone, by any row of learn.ALGORITHMS',
    (
      '[--config=FILE[:arg]] [--workdir=DIR] [--quiet]',
      '[--config.rl.algorithm=ppo] [--config.rl.loss.clip=0.1 ...]',
      '[--distributed]',
    ),
    parse_train,
    _train,
  ),
  'export': Program(
    'a trained policy as a Hugging Face folder, or an adapter of PEFT',
    ('WORKDIR --to=FOLDER [--step=N] [--policy=rl] [--merge]',),
    parse_export,
    _export,
  ),
  'models': Program(
    'what can be loaded, what is cached, and what fits on a mesh',
    (
      '[SOURCE ...] [--mesh=fsdp=8,tensor=2] [--dtype=bfloat16]',
      '[--batch=ROWS] [--tokens=4096] [--rank=16] [--check] [--json]',
    ),
    parse_models,
    _models,
  ),
  'plan': Program(
    'whether a run fits some chips, how long a step takes, what it costs',
    (
      'TOPOLOGY [--model=SOURCE] [--mesh=fsdp=32,tensor=2] [--batch=ROWS]',
      '[--tokens=4096] [--lines=16] [--microbatches=1] [--remat=full]',
      '[--attend=xla] [--rank=0] [--quick] [--json]',
    ),
    parse_plan,
    _plan,
  ),
}
_KNOWN = (ValueError, FloatingPointError, OSError, ImportError)
_DEBUG = 'PERSONA_JAX_DEBUG'  # set it to see where an error came from


def _tell(error: Exception):
  if isinstance(error, _KNOWN) and not os.environ.get(_DEBUG):
    print(f'persona-jax: {error}', file=sys.stderr)
  else:
    traceback.print_exception(error)


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


def _read(label, value, now):
  kind = type(now)
  try:
    if kind is bool:
      return {'true': True, 'false': False}[value.lower()]
    return kind(value)
  except (ValueError, KeyError):
    raise ValueError(
      f'{label}={value!r} is no {kind.__name__}; it is {now!r} now.'
    ) from None


def _near(name, names):
  nearest = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
  return f'; the nearest is {nearest[0]!r}' if nearest else ''


if __name__ == '__main__':
  run()
