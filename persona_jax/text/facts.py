"""Tables of facts about people, and lines of known relation to each of them.

They are written by hand; `text.judged` makes labelled dialogues of them.
"""

import functools
import json
from importlib import resources
from typing import NamedTuple

TABLES = 12  # files of some kinds of fact
BANKS = ('bank.json', 'bank_2.json')
# Kinds that say much of the same: one persona has one of each, and a line that
# is to be about something else is of none of them. Rows may add `touches`.
CLUSTERS = (
  'job workplace_hours years_in_job former_job education subject_studied '
  'commute driving money plan_next_year life_goal award_or_failure '
  'service_past attitude_to_school_subject learning_style age',
  'home_town current_city kind_of_home lives_with neighbours heritage '
  'languages_spoken travel_past',
  'marital_status children siblings parents former_partner best_friend '
  'social_life lives_with age birthday',
  'diet food_allergy favourite_food garden_and_cooking_skill alcohol '
  'coffee_or_tea',
  'sport injury chronic_illness smoking sleep_habit fear team_supported',
  'worry coping_habit feeling_about_therapy fear sleep_habit social_life',
  'music_taste instrument hobby_collecting_or_making phone_and_tech '
  'films_and_games reading',
  'religion_or_belief superstition service_past',
  'pets food_allergy',
  'favourite_season_or_weather birthday',
  'way_of_speaking social_life',
  'childhood_memory home_town parents siblings pets',
)
CALIBRATION = (  # kinds that no judge is trained on
  'birthday',
  'commute',
  'team_supported',
  'smoking',
  'superstition',
  'award_or_failure',
)


class Fact(NamedTuple):
  """One value of a kind of fact, and lines that somebody may say."""

  kind: str
  exclusive: bool  # another value of the kind contradicts it
  asks: tuple[str, ...]  # a partner's questions that lead to it
  fact: tuple[str, ...]  # sentences of a persona, second person
  short: str  # in a list
  states: tuple[str, ...]
  implies: tuple[str, ...]
  denies: tuple[str, ...]
  against: tuple[str, ...]  # contradict by implication
  near: tuple[str, ...]  # neither, with words of the topic


@functools.cache
def facts() -> dict[str, tuple[Fact, ...]]:
  """The values of every kind.

  Raises:
    ValueError: a row lacks a field; names the file, the kind and the field.
  """
  return {
    row['kind']: tuple(_fact(file, row, x) for x in row['values'])
    for file, row in _kinds()
  }


@functools.cache
def bank() -> dict[str, tuple[str, ...]]:
  """Lines that are about no fact, by what they are."""
  found = {}
  for file in BANKS:
    for name, lines in load(file).items():
      found[name] = (*found.get(name, ()), *lines)
  return found


@functools.cache
def apart(kind: str) -> frozenset[str]:
  """Kinds that a line about `kind` may touch on, itself among them."""
  near = {kind}
  for cluster in CLUSTERS:
    kinds = cluster.split()
    if kind in kinds:
      near |= set(kinds)
  for _, row in _kinds():
    touches = row.get('touches', ())
    if kind in touches:
      near.add(row['kind'])
    if kind == row['kind']:
      near |= set(touches)
  return frozenset(near)


@functools.cache
def _kinds() -> tuple[tuple[str, dict], ...]:
  """Every row of the tables, and its file."""
  files = [f'facts_{number}.json' for number in range(1, TABLES + 1)]
  return tuple((file, row) for file in files for row in load(file)['kinds'])


def load(file: str) -> dict:
  """A file of the judges' data."""
  home = resources.files('persona_jax.text') / 'data' / 'judged' / file
  return json.loads(home.read_text(encoding='utf-8'))


def _fact(file, row, value):
  fields = {**row, **value}
  missing = [x for x in Fact._fields if fields.get(x) in (None, '', [])]
  if missing:
    raise ValueError(
      f'{file}, {row.get("kind")!r}: the field {missing[0]!r} is missing or '
      f'empty; a value has {", ".join(Fact._fields)}.'
    )
  kept = {name: fields[name] for name in Fact._fields}
  return Fact(
    **{k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
  )
