"""Batches of rows: who loads what, in which order, and going on exactly."""

import json
import sys
from collections import Counter
from itertools import islice

import pytest

from persona_jax.feed import Feed

ROWS = [f'row {i}' for i in range(23)]


class Watched:
  """Rows that remember which of them were loaded."""

  def __init__(self, rows=ROWS):
    self.rows, self.loaded = rows, []

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, index):
    self.loaded.append(self.rows[index])
    return self.rows[index]


def make(rows=ROWS, **how):
  return Feed(rows, **{'batch': 6, 'seed': 0, 'epochs': 2} | how)


def shares(processes, rows=ROWS, **how):
  """The batches of every process."""
  return [
    list(make(rows, process=p, processes=processes, **how))
    for p in range(processes)
  ]


def flat(batches):
  return [row for batch in batches for row in batch]


def test_every_row_comes_once_an_epoch():
  rows = flat(make())
  assert Counter(rows[:23]) == Counter(rows[23:]) == Counter(ROWS)
  assert len({tuple(ROWS), tuple(rows[:23]), tuple(rows[23:])}) == 3


@pytest.mark.parametrize('epochs', [1, 2, 3, 5])
def test_as_many_epochs_as_asked_for(epochs):
  made = make(epochs=epochs)
  batches = list(made)
  assert len(batches) == made.batches == -(-23 * epochs // 6)
  assert Counter(flat(batches)) == {row: epochs for row in ROWS}
  assert all(len(batch) == 6 for batch in batches[:-1])


def test_more_epochs_begin_with_the_same_batches():
  short, long = list(make(epochs=1)), make(epochs=None)
  assert long.batches is None
  assert list(islice(long, 3)) == short[:3]
  assert flat(short) == flat(make(epochs=3))[:23]
  assert Counter(flat(islice(make(epochs=None), 23))) == {r: 6 for r in ROWS}


def test_the_seed_is_the_order():
  assert list(make()) == list(make())
  assert list(make()) != list(make(seed=1))
  assert flat(make(seed=None)) == ROWS * 2


@pytest.mark.parametrize('processes', [1, 2, 3, 6])
@pytest.mark.parametrize('rows', [ROWS, ROWS[:12], ROWS[:1]], ids=len)
def test_shares_are_disjoint_and_together_everything(processes, rows):
  whole, parts = list(make(rows)), shares(processes, rows)
  assert {len(part) for part in parts} == {len(whole)}
  for batch, *own in zip(whole, *parts, strict=True):
    # row r of a batch is of process r % processes
    dealt = [batch[p::processes] for p in range(processes)]
    assert own == dealt
  once = [flat(part) for part in shares(processes, rows, epochs=1)]
  assert Counter(sum(once, [])) == Counter(rows)


@pytest.mark.parametrize('threads', [0, 2])
def test_a_process_loads_its_own_share(threads):
  whole = list(make(epochs=1))
  for process in range(2):
    rows = Watched()
    made = Feed(
      rows,
      batch=6,
      seed=0,
      epochs=1,
      process=process,
      processes=2,
      threads=threads,
    )
    assert not rows.loaded
    assert flat(made) == flat(batch[process::2] for batch in whole)
    assert Counter(rows.loaded) == Counter(
      flat(batch[process::2] for batch in whole)
    )


@pytest.mark.parametrize('threads', [0, 2])
@pytest.mark.parametrize('seed', [0, None])
@pytest.mark.parametrize('k', [0, 1, 3, 5, 8])
def test_a_stopped_feed_goes_on_exactly(k, seed, threads):
  how = {'process': 1, 'processes': 2, 'seed': seed, 'threads': threads}
  whole = list(make(**how))
  first = make(**how)
  assert list(islice(first, k)) == whole[:k]
  state = json.loads(json.dumps(first.get_state()))
  assert list(first) == whole[k:]  # asking changed nothing
  again = make(**how)
  next(again)
  again.set_state(state)
  assert again.get_state() == state
  assert list(again) == whole[k:]
  assert list(islice(again, 1)) == []


def test_one_without_end_goes_on_too():
  first = make(epochs=None)
  for _ in range(9):
    next(first)
  again = make(epochs=None)
  again.set_state(first.get_state())
  assert list(islice(again, 9)) == list(islice(first, 9))


def test_other_processes_go_on_together():
  whole = list(make())
  first = make()
  next(first), next(first)
  parts = []
  for process in range(3):
    again = make(process=process, processes=3)
    again.set_state(first.get_state())
    parts.append(list(again))
  assert [sorted(sum(own, [])) for own in zip(*parts, strict=True)] == [
    sorted(batch) for batch in whole[2:]
  ]


@pytest.mark.parametrize(
  ('other', 'said'),
  [
    ({'rows': ROWS[:9]}, 'rows=23, and here rows=9'),
    ({'batch': 4}, 'batch=6, and here batch=4'),
    ({'seed': 1}, 'seed=0, and here seed=1'),
    ({'epochs': None}, 'epochs=2, and here epochs=None'),
  ],
)
def test_a_state_of_another_feed_is_refused(other, said):
  with pytest.raises(ValueError, match=said):
    make(**other).set_state(make().get_state())


@pytest.mark.parametrize(
  ('how', 'said'),
  [
    ({'rows': []}, 'there are no rows'),
    ({'batch': 0}, 'a batch of 0 rows'),
    ({'processes': 4}, 'a batch of 6 rows does not divide over 4 processes'),
    ({'process': 1}, 'process 1 is none of 1; give jax.process_index'),
    ({'process': -1, 'processes': 2}, 'process -1 is none of 2'),
    ({'epochs': 0}, 'epochs=0 gives nothing'),
  ],
)
def test_numbers_out_of_range(how, said):
  with pytest.raises(ValueError, match=said):
    make(**how)


def test_grain_is_asked_for_by_name(monkeypatch):
  monkeypatch.setitem(sys.modules, 'grain', None)
  with pytest.raises(ImportError, match=r'pip install "persona_jax\[data\]"'):
    make()
