"""The Hugging Face hub: only what a model needs, at one commit."""

import re
from collections.abc import Sequence
from pathlib import Path

from persona_jax.models import folder, shards
from persona_jax.models.checkpoint import CheckpointError

PREFIX = 'hf:'
_COMMIT = re.compile(r'/snapshots/([0-9a-f]{40})(/|$)')


def fetch(
  source: str, *, cached_only: bool = False, only: Sequence[str] = ()
) -> Path:
  """The folder or .gguf file of 'hf:org/name[/file.gguf][@revision]'.

  `only`: patterns of the files to fetch, for what is no language model.

  Raises:
    CheckpointError: there is no such model, or it may not be read.
    OSError: it could not be fetched.
  """
  try:
    import huggingface_hub  # noqa: F401, to say how to get it
  except ImportError as error:
    raise ImportError(
      f'{source} needs huggingface_hub: pip install "persona_jax[hf]".'
    ) from error
  place, _, revision = source.removeprefix(PREFIX).partition('@')
  name = '/'.join(place.split('/')[:2])
  file = place.removeprefix(name).lstrip('/')
  if file and not file.endswith('.gguf'):
    raise CheckpointError(
      f'{source} is no .gguf file; write hf:{name} for the whole model.'
    )
  try:
    return _fetch(name, file, revision or None, cached_only, only)
  except CheckpointError:
    raise
  except Exception as error:  # by version: of requests, httpx or httpx2
    raise _explained(source, name, error, cached_only) from error


def commit(path: str | Path) -> str | None:
  """The commit of the hub that a fetched path belongs to, if any."""
  found = _COMMIT.search(Path(path).as_posix())
  return found and found[1]


def _fetch(name, file, revision, cached_only, only) -> Path:
  import huggingface_hub as hub
  from huggingface_hub import errors

  keywords = {'revision': revision, 'local_files_only': cached_only}
  if file:
    return Path(hub.hf_hub_download(name, file, **keywords))
  if only:
    found = hub.snapshot_download(name, allow_patterns=list(only), **keywords)
    return Path(found)
  texts = hub.snapshot_download(
    name, allow_patterns=list(folder.TEXTS), **keywords
  )
  keywords['revision'] = commit(texts)  # the same for the weights
  if Path(texts, shards.INDEX).exists():
    wanted = sorted(set(shards.weight_map(Path(texts)).values()))
    hub.snapshot_download(name, allow_patterns=wanted, **keywords)
    return Path(texts)
  try:
    hub.hf_hub_download(name, shards.WEIGHTS, **keywords)
  except errors.LocalEntryNotFoundError:
    raise
  except errors.EntryNotFoundError as error:
    files = hub.list_repo_files(name, revision=keywords['revision'])
    raise shards.missing(f'hf:{name}', shards.WEIGHTS, files) from error
  return Path(texts)


def _explained(source, name, error, cached_only) -> Exception:
  """An error of the hub in one sentence; a subclass stands before its base."""
  from huggingface_hub import constants, errors

  page = f'{constants.ENDPOINT}/{name}'
  cause = _line(error.__cause__ or error)
  for kind, reason in (
    (
      errors.GatedRepoError,
      f'is gated: accept its terms at {page}, then run "hf auth login" or '
      'set HF_TOKEN.',
    ),
    (
      errors.RepositoryNotFoundError,
      f'is not on the hub, or it is private: check the name at {page}, or '
      'run "hf auth login".',
    ),
    (
      errors.RevisionNotFoundError,
      'names a branch, tag or commit that does not exist; those of the model '
      f'are at {page}/commits/main.',
    ),
    (
      errors.LocalEntryNotFoundError,
      f'is not whole in {constants.HF_HUB_CACHE}; it is fetched when it is '
      'first loaded.'
      if cached_only
      else f'is not whole in {constants.HF_HUB_CACHE}, and the hub could not '
      f'be asked ({cause}). Give a folder or a .gguf file, or try again with '
      'a network.',
    ),
    (
      errors.EntryNotFoundError,
      'names a file that the model does not hold; those that it holds are at '
      f'{page}/tree/main.',
    ),
    (
      errors.HFValidationError,
      'is no address: write "hf:org/name" or "hf:org/name@revision".',
    ),
  ):
    if isinstance(error, kind):
      return CheckpointError(f'{source} {reason}')
  return OSError(
    f'{source} could not be fetched ({cause}); try again later, or give a '
    'folder or a .gguf file.'
  )


def _line(error: BaseException) -> str:
  """The first line of what an error says, or else its kind."""
  said = str(error).strip().splitlines()
  return said[0].rstrip('.') if said else type(error).__name__
