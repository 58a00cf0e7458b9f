"""Training of a judge: an adapter that says how a line stands to a persona.

Rows hold dialogues of `text.judged`, side by side; after each of the speaker's
lines the adapter learns to answer by one token.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax import checks, data, metrics, processes, rewards, steps
from persona_jax import workdir as owned
from persona_jax.lab import Lab, open_lab
from persona_jax.learn import Batch, logprobs, packing, sharding
from persona_jax.learner import Learner
from persona_jax.models import adapter_file, lora
from persona_jax.text import judged, wording
from persona_jax.text.chat import Chat
from persona_jax.text.judged import RELATIONS, Judged
from persona_jax.text.labelled import Labelled

SIGNED = 'judge.json'
_HOME = Path(__file__).parent / 'adapters'
SHIPPED = {'smollm2-135m': _HOME / 'judge-smollm2-135m'}  # by model


class Encoded(NamedTuple):
  """A dialogue as tokens, and where a verdict is said of its lines."""

  ids: tuple[int, ...]
  ends: tuple[int, ...]  # slots, of the first token after each own line
  answers: tuple[int, ...]  # numbers of `RELATIONS`


def run(lab: Lab, config, folder: Path, *, advance) -> steps.Result:
  """Trains the adapter of `config.rl.adapter`; continues what `folder` holds.

  Raises:
    FloatingPointError: a loss or gradient is not finite.
  """
  answering = dataclasses.replace(
    lab.model, unembed=logprobs.only(lab.model.unembed, answers(lab.chat))
  )
  learner = Learner(dataclasses.replace(lab, model=answering), config)
  place = Place()

  def resume(record):
    nonlocal place
    kept = record['place']
    place = Place(**{**kept, 'waiting': tuple(kept['waiting'])})

  def begin(step, states):
    nonlocal place
    first = place
    texts, place = _drawn(lab.chat, config, first)
    batch = _laid(texts, config)
    where = sharding.batch_sharding(lab.mesh)
    batch = jax.tree.map(
      lambda x: jax.make_array_from_callback(x.shape, where, x.__getitem__),
      batch,
    )
    told = {
      'judge/verdicts': float(sum(len(text.ends) for text in texts)),
      'judge/dialogues': float(place.next),
      'judge/too_long': float(place.too_long),
    }
    kept = [{'place': x._asdict()} for x in (first, place)]
    return Rows(batch, told, *kept)

  done = steps.run(learner, begin, folder, resume=resume, advance=advance)
  if processes.first():
    sign(folder / 'adapter', lab.chat)
  return done


def train_only(config, workdir, *, quiet: bool = False) -> dict:
  """Trains the judge of a config; returns the metrics of its steps.

  Raises:
    ValueError: the config is out of range, or the workdir is another's.
  """
  checks.check(config)
  workdir = Path(workdir)
  owned.claim(workdir, config)
  lab = open_lab(config)
  with metrics.progress('Judge', config.rl.steps, quiet=quiet) as advance:
    result = run(lab, config, workdir / 'policies' / 'rl', advance=advance)
  return {'steps': result.log}


class Rows(NamedTuple):
  """What one update reads."""

  arrays: Batch
  numbers: dict[str, float]
  before: dict
  after: dict

  def wait(self):
    """It is there."""

  def batch(self, states):
    """It, which is as it was given."""
    del states
    return self.arrays, jnp.ones((), bool)

  def told(self):
    """How many verdicts there are, and dialogues too long for a row."""
    return self.numbers

  def texts(self):
    """None."""
    return []


def answers(chat: Chat) -> tuple[int, ...]:
  """The tokens that mean each of `RELATIONS`.

  Raises:
    ValueError: two of them begin alike in this tokenizer.
  """
  found = tuple(chat.encode(word)[0] for word in wording.ANSWERS)
  if len(set(found)) < len(found):
    raise ValueError(
      f'the answers {wording.ANSWERS} begin with the tokens {found}, which '
      'are not all different; change wording.ANSWERS for this model.'
    )
  return found


def encoded(chat: Chat, example: Judged) -> Encoded:
  """A dialogue as its speaker's model reads it, to the end of the last line."""
  frame = chat.frame()
  ids, ends = list(chat.prompt_ids(example.system)), []
  for n, line in enumerate(example.lines):
    ids += chat.encode(line)
    if n % 2:
      ends.append(len(ids))
    ids += frame.own_to_user if n % 2 else frame.user_to_own
  told = tuple(map(RELATIONS.index, example.relations))
  return Encoded(tuple(ids[: ends[-1] + 1]), tuple(ends), told)


def made(lab: Lab, adapter) -> rewards.Trained:
  """The judge that an adapter makes of a model."""
  ids = lambda x: jnp.asarray(x, jnp.int32)
  return rewards.Trained(
    variables={**lab.model.variables, lora.COLLECTION: adapter},
    frame=lab.frame,
    neutral=ids(lab.chat.prompt_ids(wording.NEUTRAL)),
    apply=lab.uncapped,
    unembed=logprobs.only(lab.model.unembed, answers(lab.chat)),
  )


def sign(folder: str | Path, chat: Chat):
  """Writes beside an adapter how its judge reads and answers: judge.json."""
  metrics.write_json(Path(folder) / SIGNED, _signature(chat))


def adapter(lab: Lab, path: str | Path = ''):
  """The adapter in a folder that `train` or `export` left; '': ours.

  Raises:
    ValueError: none ships for this model, it is no judge's, or the model reads
      texts as other tokens than the judge did.
    CheckpointError: it is damaged, or made for another model.
  """
  path = path or SHIPPED.get(lab.model.name)
  if path is None:
    raise ValueError(
      f'no trained judge ships for {lab.model.name!r}, only for '
      f'{", ".join(SHIPPED)}; train one (persona-jax train --config=judge '
      '--config.model=...) and give its folder, policies/rl/adapter.'
    )
  found = adapter_file.load(path, lab.model)
  file = Path(path) / SIGNED
  if not file.exists():
    raise ValueError(
      f'{path} is the adapter of no judge: it has no {SIGNED}; give the '
      'folder that persona-jax train --config=judge or export leaves.'
    )
  theirs, ours = metrics.read_json(file), _signature(lab.chat)
  if theirs != ours:
    [name, *_] = [k for k, x in ours.items() if theirs.get(k) != x]
    raise ValueError(
      f'{path} was trained with another tokenizer or chat template than that '
      f'of {lab.model.name!r}: {name} is {theirs.get(name)} there and '
      f'{ours[name]} here; use it with the model that it was made for.'
    )
  return found


def _signature(chat: Chat) -> dict:
  return {
    'answers': list(answers(chat)),
    'prompt': list(chat.prompt_ids(wording.PROBE)),
  }


def dialogues(chat: Chat, examples: Iterable[Judged | Labelled]):
  """Examples as dialogues, for judges to score."""
  examples = list(examples)
  most = max(len(x.lines) for x in examples)
  said = [x.lines + ('',) * (most - len(x.lines)) for x in examples]
  prompt = data.padded([chat.prompt_ids(x.system) for x in examples])
  return data.spoken(chat, said, prompt)


class Place(NamedTuple):
  """Where the drawing of dialogues is."""

  next: int = 0
  waiting: tuple[int, ...] = ()  # that did not fit into the rows before
  too_long: int = 0  # for any row, so far


def _drawn(chat, config, place: Place) -> tuple[list[Encoded], Place]:
  """Dialogues that fill the rows of an update, and the place after them."""
  room, count = config.judge.slots, config.rollout.batch
  found, waiting, fresh, long = [], [], place.next, place.too_long
  queue = list(place.waiting)
  while len(waiting) < _WAITING:
    if not queue:
      queue, fresh = [fresh], fresh + 1
    number = queue.pop(0)
    text = encoded(chat, judged.made(number, seed=config.seed))
    lengths = [len(x.ids) for x in (*found, text)]
    if lengths[-1] > room:
      long += 1
    elif len(packing.dealt(lengths, room)) > count:
      waiting.append(number)
    else:
      found.append(text)
  return found, Place(fresh, (*waiting, *queue), long)


_WAITING = 8  # dialogues that do not fit end a batch


def _laid(texts: list[Encoded], config) -> Batch:
  """The arrays of texts, several in a row."""
  tokens, length = data.padded([text.ids for text in texts])
  before, count = data.padded([text.ends for text in texts])
  actions, _ = data.padded([text.answers for text in texts])
  slot, number = np.arange(tokens.shape[1]), np.arange(before.shape[1])
  mask = number < count[:, None]
  blank = jnp.zeros(mask.shape)
  batch = Batch(
    tokens=jnp.asarray(tokens),
    positions=jnp.asarray(np.where(slot < length[:, None], slot, -1)),
    before=jnp.asarray(before),
    actions=jnp.asarray(actions),
    mask=jnp.asarray(mask),
    advantages=blank,
    old_logprobs=blank,
    reference_logprobs=blank,
  )
  size = {'slots': config.judge.slots, 'rows': config.rollout.batch}
  return packing.pack(batch, blank, **size).batch
