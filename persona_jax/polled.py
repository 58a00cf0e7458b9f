"""A judge behind a server: any chat model, asked for a verdict in words."""

import collections
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from persona_jax import remote
from persona_jax.asked import Asked
from persona_jax.text import wording


class _Question(NamedTuple):
  """What the server is asked; each sample is an answer of its own."""

  text: str
  sample: int


class Remote:
  """A judge behind a server: a sentence of reason, then YES or NO.

  Each line is asked about in two wordings, `samples` times each. The log-odds
  are those of the votes of a wording, half a vote added to each side, as a
  mean over the wordings. An answer without a verdict is no vote; without any,
  the score is NaN. With neither a persona nor a line of the speaker before,
  there is nothing to contradict: every vote is for the line, unasked.

  Answers are kept in `folder`, by all that they depend on, as they come;
  failures are not. A seed among the server's fields is that of the first
  sample. `usage` counts lines (and those with no_verdict), answers (cached,
  those with votes, with no_vote), files of the cache that are corrupt and asked
  anew, and what was sent: asked, failed, requests, retries, and failures by
  kind.
  """

  def __init__(
    self,
    server: remote.Server,
    folder: Path | str | None = None,
    *,
    samples: int = 1,
    context: int = 1,
    per_minute: float | None = None,
    complete: Callable[..., list[remote.Answer]] = remote.complete,
  ):
    """A judge of `server`.

    Args:
      server: who is asked.
      folder: of the cache; None for none.
      samples: answers to each wording.
      context: how many lines before are shown where there is a persona; where
        there is none, all are.
      per_minute: requests that may begin in a minute, retries with them.
      complete: as `remote.complete`.

    Raises:
      ValueError: no API key, or a number is out of range.
    """
    for name, value, least in ('samples', samples, 1), ('context', context, 0):
      if value < least:
        raise ValueError(f'{name}={value}; give a number of at least {least}.')
    server.secret()
    self.server, self.samples, self.context = server, samples, context
    self.folder = None if folder is None else Path(folder)
    self.usage: collections.Counter[str] = collections.Counter()
    self._limit = None if per_minute is None else remote.Limit(per_minute)
    self._complete, self._lock = complete, threading.Lock()

  def __call__(self, asked: list[Asked]) -> list[float]:
    """Log-odds that each line is consistent; NaN for no verdict.

    Raises:
      ValueError: the server answers nothing.
    """
    with self._lock:
      polls = [self._polls(line) for line in asked]
      wanted = [x for poll in polls for questions, _ in poll for x in questions]
      answers = self._answers(list(dict.fromkeys(wanted)))
      votes = {x: verdict(text) for x, text in answers.items()}
      scores = [self._score(poll, votes) for poll in polls]
      self.usage.update(
        lines=len(scores),
        no_verdict=sum(map(math.isnan, scores)),
        votes=sum(vote is not None for vote in votes.values()),
        no_vote=sum(vote is None for vote in votes.values()),
      )
      return scores

  def _polls(self, line: Asked):
    """For each wording its questions, and the verdict in favour."""
    if not (line.persona or line.earlier):
      return []
    ask = wording.FITS if line.persona else wording.AGREES
    shown = self.context if line.persona else len(line.history)
    texts = [prompt(line, question, shown) for question in ask.questions]
    return [
      ([_Question(text, i) for i in range(self.samples)], good)
      for text, good in zip(texts, ask.good, strict=True)
    ]

  def _score(self, polls, votes) -> float:
    if not polls:
      return _log_odds(self.samples, 0)
    odds = []
    for questions, good in polls:
      given = [votes.get(x) for x in questions]
      cast = [vote == good for vote in given if vote is not None]
      if cast:
        odds.append(_log_odds(sum(cast), len(cast) - sum(cast)))
    return math.fsum(odds) / len(odds) if odds else math.nan

  def _answers(self, questions: list[_Question]) -> dict[_Question, str]:
    """The answers to all questions that got one, kept or new."""
    kept = {x: self._kept(x) for x in questions}
    found = {x: text for x, text in kept.items() if text is not None}
    self.usage['cached'] += len(found)
    missing = [x for x in questions if x not in found]
    size = _BLOCK * self.server.concurrency
    for start in range(0, len(missing), size):
      some = missing[start : start + size]
      answers = self._sent(some)
      for question, answer in zip(some, answers, strict=True):
        if answer.text is not None:
          found[question] = answer.text
          self._keep(question, answer.text)
      self._check(answers, nothing=not found)
    return found

  def _sent(self, questions) -> list[remote.Answer]:
    seeds = None
    if 'seed' in self.server.fields:
      seeds = [self.server.fields['seed'] + x.sample for x in questions]
    talks = [_messages(x) for x in questions]
    answers = self._complete(self.server, talks, seeds=seeds, limit=self._limit)
    usage = remote.summary(answers)
    self.usage.update(
      asked=usage.rows,
      failed=usage.failed,
      requests=usage.requests,
      retries=usage.retries,
      **{f'failures/{kind}': n for kind, n in usage.failures.items()},
    )
    return answers

  def _check(self, answers, nothing):
    """Ends where the server itself fails, not some question."""
    gone = all(x.failures[-1:] == ('connection',) for x in answers)
    if all(x.text is None for x in answers) and (nothing or gone):
      raise ValueError(
        f'{self.server.model} at {self.server.url} answered none of '
        f'{len(answers)} questions: {answers[0].error}; start that server, or '
        'correct its url, model, key or fields.'
      )

  def _record(self, question: _Question) -> str:
    """All that an answer depends on."""
    record = {
      'url': self.server.url.rstrip('/'),
      'model': self.server.model,
      'fields': dict(self.server.fields),
      'messages': _messages(question),
      'sample': question.sample,
    }
    return json.dumps(record, sort_keys=True)

  def _path(self, record: str) -> Path:
    return self.folder / f'{hashlib.sha256(record.encode()).hexdigest()}.json'

  def _kept(self, question) -> str | None:
    if self.folder is None:
      return None
    record = self._record(question)
    try:
      found = json.loads(self._path(record).read_text(encoding='utf-8'))
      text = found['text']
      if found['asked'] == json.loads(record) and isinstance(text, str):
        return text
    except FileNotFoundError:
      return None
    except (ValueError, KeyError, TypeError, RecursionError):
      pass
    self.usage['corrupt'] += 1
    return None

  def _keep(self, question, text):
    if self.folder is None:
      return
    record = self._record(question)
    path = self._path(record)
    self.folder.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f'.{os.getpid()}.{threading.get_ident()}')
    kept = {'asked': json.loads(record), 'text': text}
    fresh.write_text(json.dumps(kept, indent=1), encoding='utf-8')
    os.replace(fresh, path)


_BLOCK = 4  # questions at a time, in units of the server's concurrency


def prompt(asked: Asked, question: str, shown: int) -> str:
  """What is asked about a line, the last `shown` lines before it with it.

  Words are quoted as JSON: none of them can end its quotation.
  """
  speaker = lambda n: wording.SPEAKERS[(len(asked.history) - n) % 2 == 0]
  quoted = lambda text: json.dumps(text, ensure_ascii=False)
  parts = [wording.TALK]
  if asked.persona:
    parts.append(f'{wording.DESCRIBED} {quoted(asked.persona)}')
  before = list(enumerate(asked.history))[len(asked.history) - shown :]
  lines = [f'{speaker(n)}: {quoted(line)}' for n, line in before if line]
  if lines:
    parts.append('\n'.join([wording.SO_FAR, *lines]))
  parts.append(f'{wording.TO_JUDGE} {quoted(asked.line)}')
  parts.append(wording.REASONED.format(question=question))
  return '\n\n'.join(parts)


def verdict(answer: str) -> str | None:
  """YES or NO, if the last line of an answer is a verdict and nothing else."""
  *_, last = answer.strip().split('\n')
  found = _VERDICT.fullmatch(last)
  return found and found[1].upper()


_VERDICT = re.compile(r'[\W_]*verdict[\W_]+(yes|no)[\W_]*', re.IGNORECASE)


def _messages(question: _Question) -> list[dict[str, str]]:
  return [{'role': 'user', 'content': question.text}]


def _log_odds(good: int, bad: int) -> float:
  return math.log((good + 0.5) / (bad + 0.5))
