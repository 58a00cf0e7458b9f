"""Dialogues whose lines have a known relation to the persona, by construction.

A persona is put together from `text.facts`; each of its lines states a fact,
implies one, is about something else, or contradicts in a known way.
"""

import re
from typing import NamedTuple

import numpy as np

from persona_jax.text import facts as tables
from persona_jax.text import wording
from persona_jax.text.facts import Fact

RELATIONS = ('supports', 'neutral', 'contradicts')
TASKS = ('chat', 'education', 'therapy')
SPLITS = ('train', 'calibration')
KINDS = {  # of lines: their relation, and how often they are drawn
  'states': ('supports', 12),
  'implies': ('supports', 18),
  'near': ('neutral', 8),
  'small_talk': ('neutral', 8),
  'elsewhere': ('neutral', 12),
  'twin': ('neutral', 5),
  'denies': ('contradicts', 9),
  'against': ('contradicts', 18),
  'other_value': ('contradicts', 4),
  'role_break': ('contradicts', 4),
  'other_party': ('contradicts', 4),
  'third_person': ('contradicts', 5),
  'intention': ('contradicts', 4),
}
BETWEEN = ('states', 'implies', 'near', 'small_talk', 'denies', 'against')
WOMEN = (
  'Ada Amira Anneke Bea Carmen Dagny Elif Farah Greta Hana Ines Joyce Kavya '
  'Lena Marisol Nadia Oona Petra Rosalind Sina Tamsin Uma Vera Wanda Yuki Zofia'
).split()
MEN = (
  'Aaron Bruno Cyril Dmitri Edgar Felix Goran Henrik Ivo Jasper Kofi Luis '
  'Magnus Nikhil Otis Pavel Quentin Rafael Samir Tobias Viktor Walt Yusuf'
).split()


class Judged(NamedTuple):
  """A dialogue, the partner first, and what is known of the speaker's lines."""

  persona: str  # '': none is told, and a line is judged by those before it
  task: str  # one of TASKS
  lines: tuple[str, ...]
  relations: tuple[str, ...]  # of the speaker's lines, each one of RELATIONS
  kinds: tuple[str, ...]  # how each of them was made, of KINDS

  @property
  def system(self) -> str:
    """What the judge is told of the speaker."""
    return self.persona or wording.NEUTRAL


class Written(NamedTuple):
  """A dialogue of the test set, whose last line fits its speaker or fails."""

  persona: str  # '': none is told, and the line is judged by those before it
  task: str  # one of TASKS, 'between' lines, or 'answers'
  lines: tuple[str, ...]  # the partner first
  fits: bool
  kind: str  # how it fits or fails: 'implies', 'role_break'
  about: str  # the kind of fact, which no training example is about
  pair: int  # rows of a pair differ in the last line, of nearly one length

  @property
  def system(self) -> str:
    """What the judge is told of the speaker."""
    return self.persona or wording.NEUTRAL


def written() -> tuple[Written, ...]:
  """The test set, written by hand: kinds of fact that training never sees.

  Raises:
    ValueError: a row lacks a field; names the file and the row.
  """
  found = []
  for file in ('test_a.json', 'test_b.json'):
    parts = tables.load(file)
    for part in ('lines', 'between', 'answers'):
      for index, row in enumerate(parts[part]):
        try:
          found += _pair(part, row, len(found) // 2)
        except (KeyError, TypeError) as error:
          raise ValueError(
            f'{file}, {part}, row {index}: the field {error} is missing or is '
            'not what it should be.'
          ) from error
  return tuple(found)


def _pair(part, row, number):
  if part == 'lines':
    before = row['persona'], row['task'], tuple(row['history'])
    about = row['kind']
    ends = [(row[x]['line'], row[x]['relation']) for x in ('fits', 'fails')]
  elif part == 'between':
    before = '', part, (wording.ANY_LINE, row['first'], row['question'])
    about = part
    ends = [(row['fits'], 'agrees'), (row['fails'], 'conflicts')]
  else:
    before = row['persona'], part, (row['question'],)
    about = part
    ends = [(row['fits'], 'right'), (row['fails'], 'wrong')]
  persona, task, history = before
  return [
    Written(persona, task, (*history, line), not i, kind, about, number)
    for i, (line, kind) in enumerate(ends)
  ]


def made(index: int, *, split: str = 'train', seed: int = 0) -> Judged:
  """Example `index` of a split, the same for ever.

  The kinds of fact of `calibration` are in no example of `train`.
  """
  rng = np.random.default_rng([seed, SPLITS.index(split), index])
  return _Maker(rng, split).example()


class _Maker:
  """One example in the making."""

  def __init__(self, rng, split):
    self._rng, self._bank = rng, tables.bank()
    held = set(tables.CALIBRATION)
    wanted = held if split == 'calibration' else set(tables.facts()) - held
    self._facts = {k: x for k, x in tables.facts().items() if k in wanted}
    self._task = TASKS[rng.choice(3, p=(0.5, 0.25, 0.25))]
    self._name = (WOMEN + MEN)[rng.integers(len(WOMEN + MEN))]
    self._said = set()

  def example(self) -> Judged:
    rng = self._rng
    chosen = self._chosen(1 + int(rng.geometric(0.28)))
    style = str(rng.choice(list(_STYLES), p=list(_STYLES.values())))
    count = int(rng.choice((1, 2, 3, 5, 8), p=(0.1, 0.15, 0.2, 0.25, 0.3)))
    if rng.random() < 0.22:
      return self._untold(chosen, max(count, 2))
    if style == 'long':
      chosen = self._filled(chosen)
    lines, kinds = [], []
    for _ in range(count):
      kind = self._kind(KINDS)
      fact = chosen[rng.integers(len(chosen))]
      kinds.append(self._say(lines, kind, fact, chosen))
    relations = tuple(KINDS[kind][0] for kind in kinds)
    placed = bool(_ASKS_ROLE & set(kinds))
    persona = self._persona(chosen, style, placed=placed)
    return Judged(persona, self._task, tuple(lines), relations, tuple(kinds))

  def _untold(self, chosen, count) -> Judged:
    """Of somebody of whom nothing is told but what was said before."""
    lines, kinds, relations, known = [], [], [], []
    for _ in range(count):
      kind = self._kind(BETWEEN)
      if not known and kind != 'small_talk':
        kind = 'states'  # what was only implied may not contradict a line
      new = (
        kind == 'states' and chosen and (not known or self._rng.random() < 0.3)
      )
      fact = chosen.pop() if new else None
      if fact is None and known:
        fact = known[self._rng.integers(len(known))]
      if fact is None:
        kind = 'small_talk'
      kinds.append(self._say(lines, kind, fact, chosen))
      relation = KINDS[kinds[-1]][0]
      relations.append('neutral' if new else relation)
      if new and kinds[-1] != 'small_talk':
        known.append(fact)
      if relation == 'contradicts':
        known.remove(fact)  # what fits one of the two lines breaks the other
    return Judged('', self._task, tuple(lines), tuple(relations), tuple(kinds))

  def _say(self, lines, kind, fact, chosen) -> str:
    """Adds the partner's line and an own one; what it came to be."""
    line = self._line(kind, fact, chosen)
    if line is None:  # all of its sort are said
      kind = 'small_talk'
      line = self._line(kind, fact, chosen)
    lines += [self._partner(fact if kind in _ABOUT else None), line]
    return kind

  def _kind(self, names):
    names = list(names)
    weights = np.array([KINDS[name][1] for name in names], float)
    return names[self._rng.choice(len(names), p=weights / weights.sum())]

  def _chosen(self, count) -> list[Fact]:
    """Facts that do not touch on each other."""
    found, near = [], set()
    kinds = list(self._facts)
    first = {'education': _STUDENT, 'therapy': _PATIENT}.get(self._task, ())
    first = [kind for kind in first if kind in self._facts]
    if first and self._rng.random() < 0.7:
      found.append(self._value(first[self._rng.integers(len(first))]))
      near |= tables.apart(found[0].kind)
    for kind in self._rng.permutation(kinds):
      if len(found) >= count:
        break
      if kind not in near:
        found.append(self._value(str(kind)))
        near |= tables.apart(str(kind))
    return found

  def _value(self, kind):
    values = self._facts[kind]
    return values[self._rng.integers(len(values))]

  def _one(self, lines):
    """One that was not said yet; None if all were."""
    left = [line for line in lines if line not in self._said]
    if not left:
      return None
    line = left[self._rng.integers(len(left))]
    self._said.add(line)
    return line

  def _line(self, kind, fact, chosen):
    if kind in ('states', 'implies', 'denies', 'against', 'near'):
      return self._one(getattr(fact, kind))
    if kind == 'elsewhere':
      return self._elsewhere(chosen)
    if kind == 'other_value':
      others = [x for x in self._facts[fact.kind] if x.short != fact.short]
      if not fact.exclusive or not others:
        return self._one(fact.denies)
      other = others[self._rng.integers(len(others))]
      return self._one(other.states)
    return self._banked(kind)

  def _banked(self, kind):
    role = _ROLES[self._task]
    name = {
      'small_talk': 'small_talk',
      'twin': 'first_person_twins',
      'third_person': 'third_person',
    }.get(kind, f'{kind}_{role}')
    if kind == 'small_talk' and role != 'chat' and self._rng.random() < 0.5:
      name = f'role_fit_{role}'
    line = self._one(self._bank[name])
    they, their = ('she', 'her') if self._name in WOMEN else ('he', 'his')
    holes = {'{name}': self._name, '{they}': they, '{their}': their}
    for hole, word in holes.items():
      line = line and line.replace(hole, word)
    return line

  def _elsewhere(self, chosen):
    """A line about a fact of which the persona says nothing."""
    near = set().union(*(tables.apart(fact.kind) for fact in chosen))
    kinds = [kind for kind in self._facts if kind not in near]
    if not kinds:
      return None
    fact = self._value(kinds[self._rng.integers(len(kinds))])
    return self._one(fact.states if self._rng.random() < 0.5 else fact.implies)

  def _partner(self, about):
    rng, bank = self._rng, self._bank
    if about is not None and rng.random() < 0.5:
      return about.asks[rng.integers(len(about.asks))]
    if rng.random() < 0.12:  # the partner's own life, which is no fact here
      kinds = list(self._facts)
      fact = self._value(kinds[rng.integers(len(kinds))])
      return fact.states[rng.integers(len(fact.states))]
    lines = bank[f'partner_{_PARTNERS[self._task]}']
    return lines[rng.integers(len(lines))]

  def _persona(self, chosen, style, *, placed):
    """Facts in words; if `placed`, it is told who the speaker is there."""
    rng, role = self._rng, _ROLES[self._task]
    order = [chosen[i] for i in rng.permutation(len(chosen))]
    known = role != 'chat' and (placed or rng.random() < 0.8)
    if style == 'list':
      head = [f'Name: {self._name}', *([f'Role: {role}'] if known else [])]
      rows = [f'- {x.kind.replace("_", " ")}: {x.short}' for x in order]
      return '\n'.join(head + rows)
    words = []
    if known:
      words.append(f'You are {self._name}, a {role}.')
    elif rng.random() < 0.8:
      words.append(f'You are {self._name}.')
    words += [fact.fact[rng.integers(len(fact.fact))] for fact in order]
    if rng.random() < 0.4:
      words.append(_SCENES[self._task])
    text = ' '.join(words)
    return first_person(text) if style == 'own' else text

  def _filled(self, chosen):
    """With more facts, up to some hundred words."""
    near = set().union(*(tables.apart(fact.kind) for fact in chosen))
    more, count = list(chosen), int(self._rng.integers(4, 12))
    for kind in self._rng.permutation(list(self._facts)):
      if len(more) >= len(chosen) + count:
        break
      if kind not in near:
        more.append(self._value(str(kind)))
        near |= tables.apart(str(kind))
    return more


def first_person(text: str) -> str:
  """A persona's sentences, told by itself."""
  for pattern, word in _PERSON:
    text = re.sub(pattern, word, text)
  return text


_ROLES = {'chat': 'chat', 'education': 'student', 'therapy': 'patient'}
_PARTNERS = {'chat': 'chat', 'education': 'teacher', 'therapy': 'therapist'}
_SCENES = {
  'chat': 'You chat with somebody you have just met.',
  'education': 'You talk with your teacher.',
  'therapy': 'You talk with your therapist.',
}
_ASKS_ROLE = {'role_break', 'other_party', 'intention'}
_STYLES = {'told': 0.5, 'list': 0.15, 'own': 0.2, 'long': 0.15}
_ABOUT = ('states', 'implies', 'denies', 'against', 'near', 'other_value')
_STUDENT = ('learning_style', 'attitude_to_school_subject')
_PATIENT = ('worry', 'coping_habit', 'feeling_about_therapy')
_PERSON = (
  (r"\b[Yy]ou're\b", "I'm"),
  (r"\b[Yy]ou've\b", "I've"),
  (r"\b[Yy]ou'd\b", "I'd"),
  (r"\b[Yy]ou'll\b", "I'll"),
  (r'\b[Yy]ou are\b', 'I am'),
  (r'\b[Yy]ou were\b', 'I was'),
  (r'\bare you\b', 'am I'),
  (r'\bwere you\b', 'was I'),
  (r'\b[Yy]ourself\b', 'myself'),
  (r'\bYour\b', 'My'),
  (r'\byour\b', 'my'),
  (r'\b[Yy]ours\b', 'mine'),
  (
    r'\b(to|for|with|of|from|at|by|about|on|in|near|after|behind|beside|around|'
    r'gave|give|gives|made|make|makes|keep|keeps|kept|let|lets|tell|tells|told|'
    r'taught|left|raised|calls|call|called|help|helps|helped|see|suits|like|'
    r'bores|calms|wakes|woke|scares|hurts|bother|bothers|remind|reminds) you\b',
    r'\1 me',
  ),
  (r'\b[Yy]ou\b', 'I'),
)
