"""Numbers on disk: whole files, and the metrics of each step."""

import json
import sys

import pytest

from persona_jax.metrics import Scribe


def steps(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_each_step_is_a_line_and_events(tmp_path):
  with Scribe(tmp_path) as scribe:
    scribe.write({'step': 1, 'loss': 0.5}, [['hello', 'who are you?']])
    scribe.write({'step': 2, 'loss': float('nan')})
  assert steps(tmp_path) == [
    {'step': 1, 'loss': 0.5},
    {'step': 2, 'loss': None},
  ]
  [events] = (tmp_path / 'events').iterdir()
  told = events.read_bytes()
  assert b'loss' in told and b'who are you?' in told


def test_steps_that_are_taken_again_are_dropped(tmp_path):
  with Scribe(tmp_path) as scribe:
    for step in (1, 2, 3):
      scribe.write({'step': step, 'loss': 1.0})
  with Scribe(tmp_path, [{'step': 1, 'loss': 1.0}]) as scribe:
    scribe.write({'step': 2, 'loss': 2.0})
  assert steps(tmp_path) == [{'step': 1, 'loss': 1.0}, {'step': 2, 'loss': 2.0}]


def test_steps_that_were_never_told_are_written_later(tmp_path):
  # A run that is told to end saves a step before it writes its line.
  log = [{'step': i, 'loss': i / 8} for i in (1, 2, 3)]
  with Scribe(tmp_path) as scribe:
    scribe.write(log[0])
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 2, "lo')  # cut short
  with Scribe(tmp_path, log) as scribe:
    scribe.write({'step': 4, 'loss': 0.5})
  assert steps(tmp_path) == [*log, {'step': 4, 'loss': 0.5}]
  events = b''.join(x.read_bytes() for x in (tmp_path / 'events').iterdir())
  assert events.count(b'loss') >= 3  # of one second, a file is written over


def test_wandb_is_asked_for_and_missing(tmp_path, monkeypatch):
  monkeypatch.setenv('PERSONA_JAX_METRICS', 'wandb')
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ImportError, match='pip install wandb'):
    Scribe(tmp_path).__enter__()
