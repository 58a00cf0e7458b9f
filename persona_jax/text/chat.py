"""A model's chat format: its template in text, and as frames of tokens."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from persona_jax.text import spans

Message = Mapping[str, Any]  # {'role': ..., 'content': ...}

# Stand-ins for contents, unlike anything that a template says itself.
_SYSTEM, *_LINES = (f'Zq{letter}Mark' for letter in 'abcdef')
_ROLES = ('user', 'assistant', 'user', 'assistant', 'user')
_ENDINGS = ('.', '!', '?', ')', '"', '*', ':')  # that a line break may join
_OWN = frozenset(('messages', 'add_generation_prompt'))  # variables we set
_SHOWN = 12  # tokens in an error


class Tokens(NamedTuple):
  """A conversation as token ids, and where each message's content is in them.

  `spans[i]` is (start, stop) of the content of message i, without the
  template's own tokens. A token that crosses a border, such as a line break
  joined to the header's, counts to the content.
  """

  ids: tuple[int, ...]
  spans: tuple[tuple[int, int], ...]
  roles: tuple[str, ...]

  def owners(self) -> list[int]:
    """The message that each token belongs to, -1 for the template's own."""
    owners = [-1] * len(self.ids)
    for i, (start, stop) in enumerate(self.spans):
      owners[start:stop] = [i] * (stop - start)
    return owners

  def mask(self, role: str = 'assistant', *, ends: int = 0) -> list[bool]:
    """Which tokens that role said, and `ends` tokens after each message.

    With `ends=1`, what a model learns to say: in the usual formats the token
    after an answer is the one that ends the turn.
    """
    mask = [False] * len(self.ids)
    for (start, stop), its in zip(self.spans, self.roles, strict=True):
      if its == role:
        for slot in range(start, min(stop + ends, len(mask))):
          mask[slot] = True
    return mask


class Frame(NamedTuple):
  """The tokens around the contents of a conversation.

  before_system + S + system_to_user + U1 + user_to_own + A1 + own_to_user + U2
  + user_to_own ... is the rendered conversation, ready for the next own line.
  It holds for contents that begin and end with no blank, which a template may
  trim and a tokenizer join to the template's (`Chat.joined` tells whether it
  joins ends of sentences, too), and for answers without thoughts, which a
  template may cut out (`Chat.unstable` tells for a conversation of yours).
  """

  before_system: tuple[int, ...]
  system_to_user: tuple[int, ...]
  user_to_own: tuple[int, ...]
  own_to_user: tuple[int, ...]
  no_system: tuple[int, ...]  # all before U1 where no system message is given


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
  """A tokenizer and a template that belong together.

  `variables` go to the template: {'enable_thinking': False}, or a fixed date
  by {'strftime_now': lambda form: '1 May 2025'}. A system message stands
  before the first user line, a blank line between, where the template knows
  none (None), always (True), or never (False), as `fold` says.
  """

  tokenizer: Any  # tokenizers.Tokenizer
  template: str | None  # jinja source
  special: Mapping[str, str] = dataclasses.field(default_factory=dict)
  variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  fold: bool | None = None

  def __post_init__(self):
    if taken := sorted(_OWN & set(self.variables)):
      raise ValueError(
        f'{", ".join(taken)} cannot be among the variables of a chat template, '
        'as the conversation sets them; leave them out.'
      )

  def encode(self, text: str, *, control: bool = False) -> list[int]:
    """Token ids of `text`, none added.

    A '<|im_end|>' inside `text` is spelled out as plain characters, so that
    personas and users cannot end a line; with `control` it is that token.
    """
    tokenizer = self._exact if control else self._plain
    return tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int], *, control: bool = False) -> str:
    """The text of `ids`; control tokens are left out unless asked for."""
    return self.tokenizer.decode(list(ids), skip_special_tokens=not control)

  def render(self, messages: Sequence[Message], generate: bool = False) -> str:
    """The conversation as transformers' `apply_chat_template` writes it.

    With `generate`, it ends where the assistant's next line begins.
    """
    first = [message.get('role') for message in messages[:2]]
    if first == ['system', 'user'] and self._folds:
      messages = _folded(messages)
    return self._write(messages, generate)

  def tokens(
    self, messages: Sequence[Message], generate: bool = False
  ) -> Tokens:
    """The ids that transformers gives, with the span of every content.

    Control tokens that a content spells are control tokens here, as there.
    """
    write = functools.partial(self.render, generate=generate)
    places = spans.in_text(write, messages)
    encoding = self._exact.encode(write(messages), add_special_tokens=False)
    within = spans.in_tokens(
      encoding.ids, encoding.offsets, places, self._control
    )
    roles = tuple(message['role'] for message in messages)
    return Tokens(tuple(encoding.ids), tuple(within), roles)

  def frame(self) -> Frame:
    """The token pieces around contents; see `Frame`.

    Raises:
      ValueError: the template changes a conversation as it goes on.
    """
    return self._frame

  def prompt_ids(self, system: str) -> list[int]:
    """Everything before the first user line; '' keeps the template's own."""
    frame = self.frame()
    if not system:
      return list(frame.no_system)
    middle = self.encode(system)
    return [*frame.before_system, *middle, *frame.system_to_user]

  def unstable(
    self, messages: Sequence[Message] | None = None, generate: bool = True
  ) -> str | None:
    """What adding a line changes in the tokens before it; None: nothing.

    Looks at the conversation up to each user line, ready for an answer; or,
    without `generate`, up to every line as it is. By default conversations of
    five lines, with and without a system message.
    """
    talks = [messages] if messages else [_talk(True), _talk(False)]
    found = (self._change(talk, generate) for talk in talks)
    return next((change for change in found if change), None)

  def joined(self) -> str | None:
    """Which ends of lines the tokenizer joins to the template's next token.

    There the tokens of a frame are the same text as transformers' in other
    tokens. None: nowhere.
    """
    pieces = self.frame()
    after = {
      'system': pieces.system_to_user,
      'user': pieces.user_to_own,
      'assistant': pieces.own_to_user,
    }
    for end in _ENDINGS:
      talk = _talk(True, end)
      ids, whole = list(pieces.before_system), self.tokens(talk, True).ids
      for message in talk[:-1]:
        ids += [*self.encode(message['content']), *after[message['role']]]
        if tuple(ids) != whole[: len(ids)]:
          return (
            f'{end!r} at the end of the {message["role"]} line joins what the '
            'template writes after it into one token; a frame keeps them '
            'apart.'
          )
    return None

  def _write(self, messages, generate):
    from persona_jax.text import template

    special = {f'{k}_token': v for k, v in self.special.items()}
    variables = special | dict(self.variables)
    return template.render(self._compiled, messages, generate, variables)

  @functools.cached_property
  def _compiled(self):
    from persona_jax.text import template

    if self.template is None:
      raise ValueError(
        'The model has no chat template; load a chat model, or give the '
        'jinja source as `template`.'
      )
    return template.compiled(self.template)

  @functools.cached_property
  def _folds(self) -> bool:
    """Whether the template knows no system message: fails, or leaves it out."""
    if self.fold is not None:
      return self.fold
    system, *lines = _talk(True)[:2]
    alone = self._tried(lines)
    return alone is not None and self._tried([system, *lines]) in (None, alone)

  def _tried(self, messages) -> str | None:
    try:
      return self._write(messages, True)
    except ValueError:
      return None

  @functools.cached_property
  def _exact(self):
    """The tokenizer as `apply_chat_template` uses it.

    Nothing is cut off or filled up, and offsets are of whole tokens.
    """
    return self._rebuilt({})

  @functools.cached_property
  def _plain(self):
    """The tokenizer without control tokens; runs of blanks stay tokens.

    One that puts a blank before every text does so here if it does inside the
    template, too.
    """
    record = json.loads(self.tokenizer.to_str())
    blanks = [x for x in record['added_tokens'] if x['content'].isspace()]
    steps = {
      name: _without_prefix(record[name])
      for name in ('normalizer', 'pre_tokenizer')
    }
    alone = self._rebuilt({'added_tokens': blanks})
    if self.template is None or steps.items() <= record.items():
      return alone
    inside = self._rebuilt({'added_tokens': blanks} | steps)
    talk = _talk(False)[:1]
    talked = self.tokens(talk, True)
    ids = talked.ids[slice(*talked.spans[0])]
    same = tuple(inside.encode(talk[0]['content']).ids) == ids
    return inside if same else alone

  def _rebuilt(self, changes):
    """The tokenizer with other parts, and as it encodes: no cuts, no tails."""
    import tokenizers

    record = json.loads(self.tokenizer.to_str()) | changes
    none = dict.fromkeys(('truncation', 'padding', 'post_processor'))
    return tokenizers.Tokenizer.from_str(json.dumps(record | none))

  @functools.cached_property
  def _control(self) -> frozenset[int]:
    return frozenset(self.tokenizer.get_added_tokens_decoder())

  @functools.cached_property
  def _frame(self) -> Frame:
    if change := self.unstable():
      raise ValueError(
        f'The chat template has no frame of tokens: {change} Conversations of '
        'many turns need other `variables`, a folded system message '
        '(`fold=True`), or another template.'
      )
    before, first, *turns = self._pieces(_talk(True))
    alone, *same = self._pieces(_talk(False))
    own, user = turns[:2]
    if turns != [own, user, own, user, own] or same != turns:
      texts = [self.decode(piece, control=True) for piece in (*turns, *same)]
      raise ValueError(
        'The chat template is not regular: it wraps lines differently from '
        f'turn to turn ({texts[:5]} with a system message, {texts[5:]} '
        'without). Conversations of many turns need another template.'
      )
    return Frame(before, first, own, user, alone)

  def _pieces(self, talk) -> list[tuple[int, ...]]:
    """The tokens of a conversation of stand-ins, cut at its contents."""
    talked = self.tokens(talk, True)
    pieces, last = [], 0
    for message, (start, stop) in zip(talk, talked.spans, strict=True):
      pieces.append(talked.ids[last:start])
      apart = self.encode(message['content'])
      if start < last or list(talked.ids[start:stop]) != apart:
        raise ValueError(
          f'The {message["role"]} line {message["content"]!r} has the tokens '
          f'{talked.ids[start:stop]} inside the chat template and {apart} '
          'alone, a blank before it or not. Conversations of many turns need '
          'another template.'
        )
      last = stop
    return [*pieces, talked.ids[last:]]

  def _change(self, talk, generate) -> str | None:
    """The first change of a conversation as its lines are added."""
    roles = [message['role'] for message in talk]
    ends = [
      i + 1
      for i, role in enumerate(roles)
      if role == 'user' or (role == 'assistant' and not generate)
    ]
    for end, later in zip(ends, ends[1:], strict=False):
      short = self.tokens(talk[:end], generate)
      long = self.tokens(talk[:later], generate)
      size = len(short.ids)
      begins = long.spans[end][0] if generate else size
      if long.ids[:size] != short.ids or begins != size:
        return self._said(short, long, begins)
    return None

  def _said(self, short: Tokens, long: Tokens, begins: int) -> str:
    """A sentence on how the tokens `short` change in `long`."""
    pairs = zip(short.ids, long.ids, strict=False)
    same = len(short.ids)
    slot = next((i for i, (a, b) in enumerate(pairs) if a != b), same)
    stop = slot + _SHOWN if slot < same else begins
    old, new = short.ids[slot : slot + _SHOWN], long.ids[slot:stop]
    texts = [self.decode(ids, control=True) for ids in (old, new)]
    change = f'{texts[0]!r} becomes {texts[1]!r}'
    if old and texts[1].startswith(texts[0]):  # the text stays
      change = f'{texts[0]!r} is in tokens {old}, then {new[: len(old) + 1]}'
    passed = sum(start <= slot for start, _ in short.spans)
    line = len(long.roles) - (long.roles[0] == 'system')
    where = _name(passed, short.roles)
    return f'Adding line {line} changes what stands after {where}: {change}.'


def _without_prefix(step):
  """A step of a tokenizer.json, without the blank put before a text."""
  if step is None or step['type'] == 'Prepend':
    return None
  kept = dict(step)
  for name in {'normalizers', 'pretokenizers'} & step.keys():
    kept[name] = [x for x in map(_without_prefix, step[name]) if x]
  if 'prepend_scheme' in step:
    kept['prepend_scheme'] = 'never'
  if 'add_prefix_space' in step:
    kept['add_prefix_space'] = False
  return kept


def _name(passed: int, roles: Sequence[str]) -> str:
  """The last of the messages passed, in words."""
  if not passed:
    return 'the beginning'
  if roles[passed - 1] == 'system':
    return 'the system message'
  return f'line {passed - (roles[0] == "system")}'


def _folded(messages):
  """The system message as the beginning of the first user line."""
  system, user, *rest = messages
  both = f'{system["content"]}\n\n{user["content"]}'
  return [{**user, 'content': both}, *rest]


def _talk(system: bool, end: str = '') -> list[dict[str, str]]:
  """Five lines of stand-ins, after a system message if asked for."""
  contents = [line + end for line in (_SYSTEM, *_LINES)]
  roles = ('system', *_ROLES)
  talk = [
    {'role': role, 'content': content}
    for role, content in zip(roles, contents, strict=True)
  ]
  return talk if system else talk[1:]
