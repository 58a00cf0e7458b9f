"""A dialogue as a speaker reads it, against lists built by hand."""

import dataclasses

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax import dialogue as dialogues

FRAMES = [fakes.plain(frame) for frame in fakes.FRAMES]


view = jax.jit(dialogues.view, static_argnums=1)
both = pytest.mark.parametrize('who', [dialogues.PARTNER, dialogues.POLICY])


def by_hand(dialogue, row, who, prompt):
  """The tokens that `who` reads, and those read before each token said."""
  frame, read, before = FRAMES[who], list(prompt), {}
  for n, length in enumerate(dialogue.length[row]):
    if n % 2 == who:
      read += frame.heard_to_own.tolist()
    elif n > 0:
      read += frame.own_to_heard.tolist()
    for t in range(length):
      before[n, t] = list(read)
      if t < length - 1 or not dialogue.stopped[row, n]:
        read.append(int(dialogue.tokens[row, n, t]))
  return read, before


def check(seen, row, read, before):
  width = seen.tokens.shape[1]
  assert seen.tokens[row, : len(read)].tolist() == read
  positions = [*range(len(read)), *[-1] * (width - len(read))]
  assert seen.positions[row].tolist() == positions
  for (n, t), want in before.items():
    slot = seen.before[row, n, t]
    assert seen.tokens[row, : slot + 1].tolist() == want, (n, t)


@pytest.mark.parametrize('lines', [2, 5])
@both
def test_view_is_what_is_read(who, lines):
  dialogue = fakes.made_up(lines=lines)
  seen = fakes.plain(view(dialogue, who, fakes.FRAMES[who]))
  said = fakes.plain(dialogue)
  assert said.stopped.any() and not said.stopped[:, 1:].all()
  assert len(set(said.length.flat)) > 2
  for row, size in enumerate(said.prompt_length[:, who]):
    prompt = said.prompts[row, who, :size].tolist()
    check(seen, row, *by_hand(said, row, who, prompt))


@both
def test_another_prompt_takes_the_place_of_the_own(who):
  dialogue = fakes.made_up()
  prompts, length = jnp.array([[7, 8, 9]] * 4), jnp.array([3, 1, 2, 0])
  seen = view(dialogue, who, fakes.FRAMES[who], prompts, length)
  for row, prompt in enumerate([[7, 8, 9], [7], [7, 8], []]):
    read, before = by_hand(fakes.plain(dialogue), row, who, prompt)
    before = {key: want for key, want in before.items() if want}
    check(fakes.plain(seen), row, read, before)


def test_trimmed_keeps_the_first_slots():
  seen = view(fakes.made_up(), 1, fakes.FRAMES[1])
  full = int(np.max(seen.positions)) + 1
  short = seen.trimmed(full)
  assert short.tokens.shape[1] == full < seen.tokens.shape[1]
  np.testing.assert_array_equal(short.positions, seen.positions[:, :full])
  np.testing.assert_array_equal(short.before, seen.before)


def test_masks_by_hand():
  dialogue = dataclasses.replace(
    fakes.made_up(batch=2, lines=2, size=3),
    length=jnp.array([[3, 2], [1, 1]]),
    stopped=jnp.array([[False, True], [False, True]]),
  )
  assert dialogue.body.tolist() == [[3, 1], [1, 0]]
  mask = [[[1, 1, 1], [1, 1, 0]], [[1, 0, 0], [1, 0, 0]]]
  assert dialogue.mask.astype(int).tolist() == mask
  mask = [[[1, 1, 1], [1, 0, 0]], [[1, 0, 0], [0, 0, 0]]]
  assert dialogue.body_mask.astype(int).tolist() == mask
  assert dialogue.spoken(0).tolist() == [[True, False], [True, False]]
  assert dialogue.spoken(1).tolist() == [[False, True], [False, False]]


def test_dead_rows_count_nowhere():
  dialogue = dataclasses.replace(
    fakes.made_up(), live=jnp.array([True, False, True, True])
  )
  masks = dialogue.mask, dialogue.body_mask, dialogue.spoken(0)
  for mask in masks:
    assert not mask[1].any() and mask[0].any() and mask[2].any()


def test_rows_are_chosen_from_every_array_but_who():
  dialogue, some = fakes.made_up(lines=5), np.array([2, 0])
  chosen = fakes.plain(dialogues.rows(dialogue, lambda x: x[some]))
  for name, x in vars(fakes.plain(dialogue)).items():
    want = x if name == 'who' else x[some]
    np.testing.assert_array_equal(getattr(chosen, name), want, name)
