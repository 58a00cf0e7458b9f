"""The command line: flags and one call."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from persona_jax.flags import near, override, read_words


class Program(NamedTuple):
  """A row of `persona-jax --help`: how it reads its words, what it does."""

  about: str
  flags: tuple[str, ...]  # lines that show them
  parse: Callable[[list[str]], Any]
  run: Callable[[Any], None]


_USAGE = """usage: persona-jax PROGRAM ...

{programs}

A config is a file or a name among {configs}; any field can be
overridden, as in --config.rollout.lines=8. A source is a name that
`persona-jax models` lists, hf:org/name, a Hugging Face folder or a .gguf
file."""


def run(argv: list[str] | None = None):
  """Runs a program and exits: 0 if it went well, 1 with one sentence if not."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] == 'help' or {'-h', '--help'} & set(argv):
    print(usage())
    raise SystemExit(0 if argv else 2)
  name, *words = argv
  try:
    if name not in PROGRAMS:
      raise ValueError(f'unknown program {name!r}{near(name, PROGRAMS)}.')
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


def parse_study(words: list[str]):
  """`(config, options)` of the words that follow `study`."""
  return _parse_run(
    words, {'config': 'study', 'workdir': 'runs/study', 'quiet': False}
  )


def parse_train(words: list[str]):
  """`(config, options)` of the words that follow `train`."""
  defaults = {'config': 'study', 'workdir': 'runs/train', 'quiet': False}
  return _parse_run(words, defaults | {'distributed': False})


def parse_evaluate(words: list[str]):
  """`(config, options)` of the words that follow `evaluate`."""
  return _parse_run(
    words, {'config': 'judges', 'workdir': 'runs/judges', 'quiet': False}
  )


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
  defaults = {
    'to': '',
    'step': 0,
    'policy': 'rl',
    'merge': False,
    'dtype': '',
  }
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
    train = (judge if 'judge' in config else study).train_only
    done = train(config, options['workdir'], quiet=options['quiet'])
  if not processes.first():
    return
  last = done['steps'][-1]
  console = Console()
  for name, value in last.items():
    shown = 'not finite' if value is None else f'{value:.4g}'
    console.print(f'{name:<28} {shown}')
  console.print(f'{Path(options["workdir"]) / "policies" / "rl"}')


def _evaluate(job):
  from rich.console import Console

  from persona_jax import judges_report, validate

  config, options = job
  _compile_cache()
  workdir = Path(options['workdir'])
  results = validate.run(config, workdir, quiet=options['quiet'])
  console = Console()
  if not console.is_terminal:
    console = Console(width=120)
  console.print(judges_report.panel(results))
  console.print(f'{workdir / "judges.html"}\n{workdir / "judges.json"}')


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
  'evaluate': Program(
    'which judges can be believed, on lines with known labels',
    (
      '[--config=judges[:arg]] [--workdir=DIR] [--quiet]',
      '[--config.jury.names=trained,verdict ...]',
      '[--config.jury.labels=FILE]',
    ),
    parse_evaluate,
    _evaluate,
  ),
  'export': Program(
    'a trained policy as a Hugging Face folder, or an adapter of PEFT',
    (
      'WORKDIR --to=FOLDER [--step=N] [--policy=rl] [--merge]',
      '[--dtype=bfloat16]',
    ),
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
    f'unknown config {name!r}{near(name, names)}; give a file or one of '
    f'{", ".join(names)}.'
  )


if __name__ == '__main__':
  run()
