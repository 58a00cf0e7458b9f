"""Chat completions of a server that speaks OpenAI's protocol.

vLLM, SGLang, llama.cpp and OpenAI do. What fails concerns its own row alone.
"""

import collections
import dataclasses
import email.utils
import functools
import http.client
import json
import math
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

Conversation = Sequence[Mapping[str, str]]  # {'role': ..., 'content': ...}

_OWN = frozenset(('model', 'messages', 'stream'))  # fields that we set
_MOST = 1 << 24  # bytes of an answer
_SHOWN = 200  # characters of an answer in an error


@dataclasses.dataclass(frozen=True)
class Server:
  """A model behind a url, and how it is asked.

  `fields` go into every request: temperature, max_tokens, seed, stop. The API
  key is read when it is used and kept nowhere.
  """

  url: str  # up to /v1
  model: str
  key: str | None = None  # the environment variable that holds the API key
  timeout: float = 120.0  # seconds of a request
  retries: int = 5
  wait: float = 1.0  # seconds before the first retry, doubled each time
  longest: float = 60.0  # seconds of a wait at most
  concurrency: int = 16
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if wrong := _wrong(self.url):
      raise ValueError(
        f'url={self.url!r} {wrong}; give one such as http://localhost:8000/v1.'
      )
    for name, least in (
      ('retries', 0),
      ('wait', 0),
      ('longest', 0),
      ('concurrency', 1),
    ):
      if getattr(self, name) < least:
        raise ValueError(
          f'{name}={getattr(self, name)}; give a number of at least {least}.'
        )
    if not self.timeout > 0:
      raise ValueError(f'timeout={self.timeout}; give more than 0 seconds.')
    if taken := sorted(_OWN & set(self.fields)):
      raise ValueError(
        f'{", ".join(taken)} cannot be among the fields of a request, which '
        'sets them itself; leave them out.'
      )

  def secret(self) -> str | None:
    """The API key.

    Raises:
      ValueError: its environment variable is not set, or holds no key.
    """
    if self.key is None:
      return None
    secret = os.environ.get(self.key, '').strip()
    if not secret:
      raise ValueError(
        f'the environment variable {self.key} with the API key of {self.url} '
        'is not set; export it, or give key=None for a server without.'
      )
    if not (secret.isascii() and secret.isprintable()):
      raise ValueError(
        f'the environment variable {self.key} holds characters that no API key '
        'has; export the key alone.'
      )
    return secret


@dataclasses.dataclass(frozen=True)
class Answer:
  """What was said to a conversation, or why nothing was."""

  text: str | None
  error: str | None = None
  attempts: int = 0  # requests
  failures: tuple[str, ...] = ()  # the kind of each request that failed
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Usage:
  """Counts of many answers."""

  rows: int
  failed: int  # rows without a text
  requests: int
  retries: int
  failures: Mapping[str, int]  # requests that failed, by kind
  seconds: float  # of all rows, which wait side by side


class Limit:
  """Called before a request, waits until that may begin: an even pace."""

  def __init__(
    self,
    per_minute: float,
    *,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
  ):
    if not 0 < per_minute < math.inf:
      raise ValueError(f'per_minute={per_minute}; give more than 0 requests.')
    self._gap, self._next = 60 / per_minute, -math.inf
    self._sleep, self._clock = sleep, clock
    self._lock = threading.Lock()

  def __call__(self):
    with self._lock:
      now = self._clock()
      begin = max(now, self._next)
      self._next = begin + self._gap
    if begin > now:
      self._sleep(begin - now)


def summary(answers: Sequence[Answer]) -> Usage:
  """What `answers` took."""
  kinds = collections.Counter(x for answer in answers for x in answer.failures)
  return Usage(
    rows=len(answers),
    failed=sum(answer.text is None for answer in answers),
    requests=sum(answer.attempts for answer in answers),
    retries=sum(max(answer.attempts - 1, 0) for answer in answers),
    failures=dict(sorted(kinds.items())),
    seconds=math.fsum(answer.seconds for answer in answers),
  )


def complete(
  server: Server,
  conversations: Sequence[Conversation],
  *,
  seeds: Sequence[int] | None = None,
  limit: Callable[[], object] | None = None,
  jitter: int = 0,
  sleep: Callable[[float], object] = time.sleep,
  clock: Callable[[], float] = time.monotonic,
) -> list[Answer]:
  """The next message of each conversation, in their order.

  Timeouts, lost connections, 429, 5xx and answers without a text are tried
  again, later each time; other refusals are not.

  Args:
    server: who answers.
    conversations: messages from the first to the last.
    seeds: the field `seed` of each request, in place of one for all.
    limit: called before every request (`Limit`).
    jitter: names the random part of the waits.
    sleep: waits some seconds.
    clock: the time in seconds.

  Raises:
    ValueError: no API key, or not one seed for each conversation.
    TypeError: a conversation or a field cannot be written as JSON.
  """
  secret = server.secret()
  if seeds is not None and len(seeds) != len(conversations):
    raise ValueError(
      f'{len(seeds)} seeds for {len(conversations)} conversations; give one '
      'for each.'
    )
  requests = []
  for row, messages in enumerate(conversations):
    fields = {'model': server.model, **server.fields}
    if seeds is not None:
      fields['seed'] = seeds[row]
    fields['messages'] = [dict(message) for message in messages]
    requests.append(_request(server, secret, fields))
  if not requests:
    return []
  ask = functools.partial(
    _ask,
    server,
    urllib.request.build_opener(_NoRedirects),
    secret,
    limit,
    sleep,
    clock,
  )
  chances = [random.Random(f'{jitter} {row}') for row in range(len(requests))]
  with futures.ThreadPoolExecutor(
    min(server.concurrency, len(requests))
  ) as pool:
    return list(pool.map(ask, requests, chances))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
  """A redirect is an error: following it would hand on the API key."""

  def redirect_request(self, *args, **kwargs):
    return None


class _Failed(Exception):
  """A request without a text: its kind, and whether to try again."""

  def __init__(self, kind, why, again=True, after=0.0):
    super().__init__(why)
    self.kind, self.again, self.after = kind, again, after


def _request(server, secret, fields):
  headers = {'Content-Type': 'application/json', 'User-Agent': 'persona_jax'}
  if secret is not None:
    headers['Authorization'] = f'Bearer {secret}'
  return urllib.request.Request(
    f'{server.url.rstrip("/")}/chat/completions',
    json.dumps(fields).encode(),
    headers,
    method='POST',
  )


def _ask(
  server, opener, secret, limit, sleep, clock, request, chance
) -> Answer:
  """One row: requests until one has a text, or none is left."""
  start, kinds = clock(), []
  for attempt in range(1, server.retries + 2):
    if limit is not None:
      limit()
    try:
      text = _text(_sent(server, opener, clock, request))
      return Answer(text, None, attempt, tuple(kinds), clock() - start)
    except _Failed as failed:
      kinds.append(failed.kind)
      why = f'{failed} (request {attempt} of {server.retries + 1})'
      if not failed.again or attempt > server.retries:
        break
      if failed.after > server.longest:
        why += f'; it asks to wait {failed.after:g} s, over {server.longest:g}'
        break
      wait = min(server.wait * 2 ** (attempt - 1), server.longest)
      sleep(max(wait * (0.5 + 0.5 * chance.random()), failed.after))
  if secret is not None:
    why = why.replace(secret, '***')
  return Answer(None, why, attempt, tuple(kinds), clock() - start)


def _sent(server, opener, clock, request) -> bytes:
  """The body of the answer to one request."""
  end = clock() + server.timeout
  try:
    with opener.open(request, timeout=server.timeout) as response:
      return _body(response, end, clock)
  except urllib.error.HTTPError as error:
    with error:
      raise _refusal(error) from None
  except (OSError, http.client.HTTPException) as error:
    reason = getattr(error, 'reason', error)
    if isinstance(reason, TimeoutError):
      why = f'no answer in {server.timeout:g} s'
      raise _Failed('timeout', why) from None
    why = f'no connection: {str(reason) or type(reason).__name__}'
    raise _Failed('connection', why) from None


def _body(response, end, clock):
  """All that comes before the time is up; a trickle keeps no row for ever."""
  parts, size = [], 0
  while part := response.read1(1 << 16):
    parts.append(part)
    size += len(part)
    if size > _MOST:
      raise _Failed('garbage', f'an answer of over {_MOST} bytes')
    if clock() > end:
      raise TimeoutError
  if response.length:  # bytes that were promised
    raise http.client.IncompleteRead(b'', response.length)
  return b''.join(parts)


def _refusal(error):
  """What a status other than 200 means."""
  try:
    shown = _shown(error.read(_MOST))
  except (OSError, http.client.HTTPException):
    shown = ''
  why = f'http {error.code} {error.reason}'
  if 300 <= error.code < 400:
    why += f' to {error.headers.get("Location")}, which is not followed'
  again = error.code == 429 or error.code >= 500
  after = _after(error.headers.get('Retry-After')) if again else 0.0
  return _Failed(f'http {error.code}', f'{why}: {shown}', again, after)


def _after(value) -> float:
  """Seconds of a Retry-After, a number or a date; 0 for nonsense."""
  try:
    seconds = float(value)
  except (TypeError, ValueError):
    try:
      date = email.utils.parsedate_to_datetime(value)
      seconds = date.timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
      return 0.0
  return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _text(body: bytes) -> str:
  """The text of an answer."""
  try:
    answer = json.loads(body)
  except (ValueError, RecursionError):
    raise _Failed('garbage', f'no JSON: {_shown(body)}') from None
  try:
    choice = answer['choices'][0]
    text = choice['message']['content']
  except (KeyError, IndexError, TypeError):
    raise _Failed('garbage', f'no choices: {_shown(body)}') from None
  if text is None or text == '':
    why = f'no content, finish_reason {choice.get("finish_reason")!r}'
    raise _Failed('garbage', why)
  if not isinstance(text, str):
    why = f'content of type {type(text).__name__}: {_shown(body)}'
    raise _Failed('garbage', why)
  if not text.strip():
    raise _Failed('garbage', 'no content but blanks')
  try:
    text.encode()
  except UnicodeEncodeError:  # half of a surrogate pair
    why = f'no Unicode text: {_shown(body)}'
    raise _Failed('garbage', why) from None
  return text


def _shown(body):
  """The beginning of an answer, or its message, on one line."""
  text = body.decode(errors='replace')
  try:
    error = json.loads(body)['error']
    text = error if isinstance(error, str) else error['message']
  except (ValueError, RecursionError, KeyError, IndexError, TypeError):
    pass
  text = ' '.join(str(text).split())
  return text if len(text) <= _SHOWN else text[:_SHOWN] + '...'


def _wrong(url) -> str | None:
  """What keeps `url` from being the base of a server."""
  if not (url.isascii() and url.isprintable()) or ' ' in url:
    return 'holds characters that no url has'
  try:
    parts = urllib.parse.urlsplit(url)
    host, _ = (parts.hostname or ''), parts.port
    host.encode('idna')
  except ValueError as error:  # UnicodeError too
    return f'is no url ({error})'
  if parts.scheme not in ('http', 'https'):
    return 'begins with neither http:// nor https://'
  if not host:
    return 'names no host'
  if parts.query or parts.fragment or parts.username is not None:
    return 'has more than a host and a path'
  if parts.path.rstrip('/').endswith('/completions'):
    return 'ends with what every request adds, /chat/completions'
  return None
