"""A server that fails in every way: what the rows say of it, and the counts."""

import collections
import contextlib
import email.utils
import json
import math
import re
import socket
import struct
import threading
import time
from http import server as http_server

import pytest

from persona_jax import remote
from persona_jax.remote import Answer, Server, Usage

SECRET = 'sk-secret'


def completion(content, **more):
  """The body of an answer."""
  choice = {'message': {'role': 'assistant', 'content': content}, **more}
  return json.dumps({'choices': [choice]}).encode()


class Failing(http_server.ThreadingHTTPServer):
  """Does what `plan(request, count)` says: the status, headers and the body.

  `count` counts the requests with the same last message, from 0.
  """

  daemon_threads = True
  request_queue_size = 64

  def __init__(self, plan):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.plan, self.lock, self.closing = plan, threading.Lock(), False
    self.asked, self.over = [], threading.Event()
    self.counts = collections.Counter()
    self.now = self.most = 0  # requests at a time

  @property
  def url(self):
    return f'http://127.0.0.1:{self.server_address[1]}/v1'

  def handle_error(self, request, address):
    pass  # clients that went away


class _Handler(http_server.BaseHTTPRequestHandler):
  def do_GET(self):  # where a redirect would lead
    self.server.asked.append('GET')
    self._send(200, {}, completion('Thank you for the key.'))

  def do_POST(self):
    server = self.server
    size = int(self.headers.get('Content-Length') or 0)
    request = json.loads(self.rfile.read(size) or '{}')
    last = request['messages'][-1]['content']
    with server.lock:
      server.asked.append((self.path, dict(self.headers), request))
      count = server.counts[last]
      server.counts[last] += 1
      server.now += 1
      server.most = max(server.most, server.now)
    try:
      answer = server.plan(request, count, self)
      if answer is not None:
        self._send(*answer)
    finally:
      with server.lock:
        server.now -= 1

  def _send(self, status, headers, body):
    self.send_response(status)
    headers = {'Content-Length': len(body), **headers}
    for name, value in headers.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def serving(plan):
  """A server in a thread, up to the end of the context."""
  server = Failing(plan)
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield server
  finally:
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def hang_up(handler):
  """Closes the connection, without an answer and without a goodbye."""
  handler.connection.setsockopt(
    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)
  )
  handler.connection.close()


def trickle(handler):
  """An answer that never ends, a blank at a time."""
  handler.send_response(200)
  handler.end_headers()
  while not handler.server.over.wait(0.05):
    handler.wfile.write(b' ')


def cut_off(handler):
  """Half of what was promised."""
  handler.send_response(200)
  handler.send_header('Content-Length', '1000')
  handler.end_headers()
  handler.wfile.write(b'{"choices": [')


def refuse(status, message='', **headers):
  headers = {k.replace('_', '-'): v for k, v in headers.items()}
  return status, headers, json.dumps({'error': {'message': message}}).encode()


GARBAGE = {  # a body, and what the row says of it
  'html': (b'<html>502</html>', 'no JSON: <html>502</html>'),
  'empty': (b'', 'no JSON: '),
  'bytes': (b'\xff\xfe', 'no JSON: '),
  'deep': (b'[' * 100_000, r'no JSON: \[\['),
  'list': (b'[1]', r'no choices: \[1\]'),
  'number': (b'3', 'no choices: 3'),
  'error': (b'{"error": {"message": "no  GPU"}}', 'no choices: no GPU'),
  'no choices': (b'{"choices": []}', 'no choices: '),
  'choices': (b'{"choices": {"0": 1}}', 'no choices: '),
  'choice': (b'{"choices": ["Hi"]}', 'no choices: '),
  'message': (b'{"choices": [{"message": null}]}', 'no choices: '),
  'null': (
    completion(None, finish_reason='length'),
    "no content, finish_reason 'length'",
  ),
  'nothing': (completion(''), 'no content, finish_reason None'),
  'blank': (completion(' \n'), 'no content but blanks'),
  'int': (completion(7), 'content of type int: '),
  'parts': (completion([{'text': 'Hi'}]), 'content of type list: '),
  'surrogate': (completion('a\ud800'), 'no Unicode text: '),
}


def plan(request, count, handler):
  """What the last message asks for."""
  what = request['messages'][-1]['content']
  if what in GARBAGE:
    return 200, {}, GARBAGE[what][0]
  if what == 'slow':
    handler.server.over.wait()
  if what == 'slow once' and count == 0:
    handler.server.over.wait()
  if what == 'hang up' or what == 'hang up once' and count == 0:
    return hang_up(handler)
  if what == 'trickle':
    return trickle(handler)
  if what == 'cut off':
    return cut_off(handler)
  if what == 'garbage once' and count == 0:
    return 200, {}, b'{'
  if what.startswith('busy') and count < 2:
    return refuse(429, 'slow down', Retry_After=what.removeprefix('busy '))
  if what.startswith('http'):
    return refuse(int(what[5:8]), f'not for {SECRET}\nnor others')
  if what == 'away':
    return refuse(302, Location=f'{handler.server.url}/chat/completions')
  return 200, {}, completion(f'You said: {what}')


@pytest.fixture(scope='module')
def failing():
  with serving(plan) as server:
    yield server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
  monkeypatch.setenv('no_proxy', '*')


def at(failing, **more):
  given = dict(url=failing.url, model='m', timeout=5.0, retries=2)
  return Server(**given | more)


def talk(*lines):
  return [[{'role': 'user', 'content': line}] for line in lines]


def ask(server, *lines, **more):
  """The answers, and how long each wait was, shortest first."""
  waits = []
  answers = remote.complete(server, talk(*lines), sleep=waits.append, **more)
  return answers, sorted(waits)


def test_a_request_is_as_openai_wants_it(failing, monkeypatch):
  monkeypatch.setenv('SOME_KEY', f' {SECRET}\n')
  fields = {'temperature': 0.7, 'max_tokens': 9, 'stop': ['\n'], 'seed': 3}
  server = at(failing, url=failing.url + '/', key='SOME_KEY', fields=fields)
  failing.asked.clear()
  messages = [
    {'role': 'system', 'content': 'Är'},
    {'role': 'user', 'content': 'é'},
  ]
  (answer,) = remote.complete(server, [messages])
  ((path, headers, request),) = failing.asked
  assert path == '/v1/chat/completions'
  assert headers['Authorization'] == f'Bearer {SECRET}'
  assert headers['Content-Type'] == 'application/json'
  assert request == {'model': 'm', 'messages': messages, **fields}
  assert answer == Answer('You said: é', None, 1, (), answer.seconds)
  assert SECRET not in repr(server)
  failing.asked.clear()
  remote.complete(at(failing), talk('Hi'))
  assert 'Authorization' not in failing.asked[0][1]


def test_answers_keep_the_order(failing):
  lines = [f'line {i}' for i in range(40)]
  answers, waits = ask(at(failing, concurrency=7), *lines)
  assert [x.text for x in answers] == [f'You said: {x}' for x in lines]
  assert not waits and remote.complete(at(failing), []) == []


def test_as_many_at_a_time_as_allowed():
  gate = threading.Barrier(3)

  def together(request, count, handler):
    gate.wait(5)  # breaks unless three come at a time
    return 200, {}, completion('Hi')

  with serving(together) as server:
    answers, _ = ask(at(server, concurrency=3), *'abcdef')
    assert [x.text for x in answers] == ['Hi'] * 6
    assert server.most == 3


def test_a_failure_concerns_its_row_alone(failing, monkeypatch):
  monkeypatch.setenv('SOME_KEY', SECRET)
  server = at(failing, timeout=1.0, retries=1, key='SOME_KEY')
  answers, waits = ask(
    server, 'Hi', 'slow', 'hang up', 'http 500', 'int', 'http 400', 'Bye'
  )
  assert [x.text for x in answers] == [
    'You said: Hi',
    *[None] * 5,
    'You said: Bye',
  ]
  assert [x.error for x in answers] == [
    None,
    'no answer in 1 s (request 2 of 2)',
    answers[2].error,
    'http 500 Internal Server Error: not for *** nor others (request 2 of 2)',
    f'content of type int: {completion(7).decode()} (request 2 of 2)',
    'http 400 Bad Request: not for *** nor others (request 1 of 2)',
    None,
  ]
  assert answers[2].error.startswith('no connection: ')
  assert [x.attempts for x in answers] == [1, 2, 2, 2, 2, 1, 1]
  assert remote.summary(answers) == Usage(
    rows=7,
    failed=5,
    requests=11,
    retries=4,
    failures={
      'connection': 2,
      'garbage': 2,
      'http 400': 1,
      'http 500': 2,
      'timeout': 2,
    },
    seconds=sum(x.seconds for x in answers),
  )
  assert len(waits) == 4
  assert answers[1].seconds >= 2 > answers[0].seconds


@pytest.mark.parametrize('what', ['slow once', 'hang up once', 'garbage once'])
def test_what_fails_once_is_tried_again(failing, what):
  failing.counts.clear()
  (answer,), waits = ask(at(failing, timeout=1.0), what)
  kind = {'s': 'timeout', 'h': 'connection', 'g': 'garbage'}[what[0]]
  assert answer.text == f'You said: {what}' and answer.error is None
  assert answer.attempts == 2 and answer.failures == (kind,)
  assert len(waits) == 1


@pytest.mark.parametrize('what', GARBAGE)
def test_garbage_is_tried_again_and_named(failing, what):
  (answer,), waits = ask(at(failing, retries=1), what)
  assert answer.text is None and answer.failures == ('garbage', 'garbage')
  assert re.match(GARBAGE[what][1], answer.error)
  assert len(answer.error) < 300 and '\n' not in answer.error


@pytest.mark.parametrize('status', [400, 401, 404, 422])
def test_refusals_are_not_tried_again(failing, status):
  (answer,), waits = ask(at(failing), f'http {status}')
  assert answer.attempts == 1 and not waits
  assert answer.failures == (f'http {status}',)


@pytest.mark.parametrize('status', [500, 502, 503])
def test_a_server_in_trouble_is_asked_again(failing, status):
  (answer,), waits = ask(at(failing), f'http {status}')
  assert answer.attempts == 3 and len(waits) == 2


def test_a_trickle_ends_with_the_time(failing):
  began = time.monotonic()
  (answer,), _ = ask(at(failing, timeout=0.3, retries=0), 'trickle')
  assert answer.failures == ('timeout',)
  assert time.monotonic() - began < 2


def test_who_does_not_pick_up_is_slow(failing, monkeypatch):
  def connect(*args, **kwargs):
    raise TimeoutError

  monkeypatch.setattr(socket, 'create_connection', connect)
  (answer,), _ = ask(at(failing, retries=0), 'Hi')
  assert answer.failures == ('timeout',)


def test_half_an_answer_is_a_lost_connection(failing):
  (answer,), _ = ask(at(failing, retries=0), 'cut off')
  assert answer.failures == ('connection',)


def test_an_answer_without_end_is_not_kept(failing, monkeypatch):
  monkeypatch.setattr(remote, '_MOST', 1000)
  (answer,), _ = ask(at(failing, retries=0), 'deep')
  assert answer.error.startswith('an answer of over 1000 bytes')


def test_a_redirect_does_not_get_the_key(failing, monkeypatch):
  monkeypatch.setenv('SOME_KEY', SECRET)
  failing.asked.clear()
  (answer,), waits = ask(at(failing, key='SOME_KEY'), 'away')
  assert answer.error.startswith('http 302 Found to http://')
  assert 'which is not followed' in answer.error
  assert not waits and len(failing.asked) == 1


def test_nobody_listens(failing):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{free.getsockname()[1]}'
  (answer,), waits = ask(at(failing, url=url), 'Hi')
  assert 'Connection refused' in answer.error and len(waits) == 2


def test_waits_double_up_to_the_longest(failing):
  server = at(failing, retries=6, wait=1.0, longest=5.0)
  (first, second), waits = ask(server, 'http 500', 'http 502')
  assert first.attempts == second.attempts == 7
  for i, full in enumerate([1, 2, 4, 5, 5, 5]):
    pair = waits[2 * i : 2 * i + 2]
    low = min(full, 5) / 2
    assert all(low <= x <= 5 for x in pair), waits
  assert len(set(waits)) == 12  # rows do not come back together
  again = ask(server, 'http 500', 'http 502')[1]
  other = ask(server, 'http 500', 'http 502', jitter=1)[1]
  assert waits == again != other


def test_a_server_that_is_busy_names_the_wait(failing):
  failing.counts.clear()
  date = email.utils.formatdate(time.time() + 30, usegmt=True)
  lines = ('busy 17', f'busy {date}', 'busy soon', 'busy inf', 'busy -3')
  for line in lines:
    (answer,), waits = ask(at(failing), line)
    assert answer.text == f'You said: {line}', answer
    assert answer.failures == ('http 429',) * 2
    if line == lines[0]:
      assert waits == [17, 17]
    elif line == lines[1]:
      assert all(25 < x <= 30 for x in waits)
    else:
      assert all(0.5 <= x <= 2 for x in waits)


def test_a_wait_that_is_too_long_ends_the_row(failing):
  failing.counts.clear()
  (answer,), waits = ask(at(failing), 'busy 3600')
  assert not waits and answer.attempts == 1
  assert answer.error == (
    'http 429 Too Many Requests: slow down (request 1 of 3); it asks to wait '
    '3600 s, over 60'
  )


def test_each_row_has_its_seed(failing):
  failing.asked.clear()
  server = at(failing, fields={'seed': 5}, concurrency=1)
  ask(server, 'a', 'b', seeds=[8, 9])
  assert [x[2]['seed'] for x in failing.asked] == [8, 9]
  with pytest.raises(ValueError, match='1 seeds for 2 conversations'):
    ask(server, 'a', 'b', seeds=[8])


@pytest.mark.parametrize(
  ('url', 'why'),
  [
    ('localhost:8000/v1', 'begins with neither'),
    ('ftp://a/v1', 'begins with neither'),
    ('', 'begins with neither'),
    ('http:///v1', 'names no host'),
    ('http://a b/v1', 'holds characters'),
    ('http://a\n/v1', 'holds characters'),
    ('http://a:port/v1', 'is no url'),
    ('http://[::1/v1', 'is no url'),
    ('http://a..b/v1', 'is no url'),
    ('http://me:word@a/v1', 'has more than'),
    ('http://a/v1?x=1', 'has more than'),
    ('http://a/v1/chat/completions', 'ends with what every request adds'),
  ],
)
def test_a_wrong_url_is_refused_at_once(url, why):
  with pytest.raises(ValueError, match=f'url=.* {why}.*; give one such as'):
    Server(url, 'm')


@pytest.mark.parametrize(
  'more',
  [
    dict(retries=-1),
    dict(concurrency=0),
    dict(timeout=0.0),
    dict(wait=-1.0),
    dict(fields={'stream': True}),
  ],
)
def test_wrong_settings_are_refused_at_once(more):
  with pytest.raises(ValueError, match=next(iter(more.get('fields', more)))):
    Server('http://a/v1', 'm', **more)


@pytest.mark.parametrize('value', [None, '', ' \n', 'sk-\u20ac', 'a\nb: c'])
def test_a_missing_key_is_one_sentence_at_once(failing, monkeypatch, value):
  monkeypatch.delenv('SOME_KEY', raising=False)
  if value is not None:
    monkeypatch.setenv('SOME_KEY', value)
  failing.asked.clear()
  with pytest.raises(ValueError, match='variable SOME_KEY .*; export|; export'):
    remote.complete(at(failing, key='SOME_KEY'), talk('Hi'))
  assert not failing.asked


def test_what_no_json_holds_is_the_callers_fault(failing):
  with pytest.raises(TypeError, match='not JSON serializable'):
    remote.complete(at(failing, fields={'seed': 1j}), talk('Hi'))


# The pace.


class Clock:
  """A time that passes while somebody sleeps."""

  def __init__(self):
    self.now, self.slept = 100.0, []

  def sleep(self, seconds):
    self.slept.append(seconds)
    self.now += seconds

  def limit(self, per_minute):
    return remote.Limit(per_minute, sleep=self.sleep, clock=lambda: self.now)


def test_requests_begin_at_an_even_pace():
  clock = Clock()
  limit, began = clock.limit(30.0), []
  for spent in (0, 0.5, 5, 0):  # seconds of the request itself
    limit()
    began.append(clock.now)
    clock.now += spent
  assert began == [100, 102, 104, 109] and clock.slept == [2, 1.5]


def test_threads_wait_in_line():
  sleeping, lock = [], threading.Lock()

  def sleep(seconds):
    with lock:
      sleeping.append(seconds)

  limit = remote.Limit(60.0, sleep=sleep, clock=lambda: 0.0)
  threads = [threading.Thread(target=limit) for _ in range(20)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(sleeping) == list(range(1, 20))  # the first does not wait


def test_every_request_keeps_the_pace():
  clock = Clock()

  def busy(request, count, handler):
    if count == 0:
      return refuse(429, 'slow', Retry_After='0')
    return 200, {}, completion('Hi')

  with serving(busy) as failing:
    server = Server(failing.url, 'm', retries=1, wait=0.0, concurrency=1)
    talks = talk('a', 'b')
    answers = remote.complete(
      server, talks, limit=clock.limit(6.0), sleep=lambda seconds: None
    )
  assert [x.text for x in answers] == ['Hi'] * 2
  assert clock.slept == [10, 10, 10]  # four requests


@pytest.mark.parametrize('number', [0.0, -1.0, math.nan, math.inf])
def test_a_pace_is_a_number(number):
  with pytest.raises(ValueError, match='per_minute=.*; give more than 0'):
    remote.Limit(number)
