"""A model's chat format: its template in text, and as frames of tokens."""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Message = Mapping[str, str]  # {'role': ..., 'content': ...}

# Stand-ins for contents, unlike anything that a template says itself.
_SYSTEM, *_MARKS = (f'Zq{letter}xMark' for letter in 'abcdef')
_ROLES = ('user', 'assistant', 'user', 'assistant', 'user')


class Frame(NamedTuple):
  """The tokens around the contents of a conversation.

  before_system + S + system_to_user + U1 + user_to_own + A1 + own_to_user + U2
  + user_to_own ... is the rendered conversation, ready for the next own line.
  It holds for contents that do not begin with a line break, which a tokenizer
  would join to the header's, and that the template does not trim.
  """

  before_system: tuple[int, ...]
  system_to_user: tuple[int, ...]
  user_to_own: tuple[int, ...]
  own_to_user: tuple[int, ...]
  no_system: tuple[int, ...]  # all before U1 where no system message is given


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
  """A tokenizer and a template that belong together."""

  tokenizer: Any  # tokenizers.Tokenizer
  template: str | None  # jinja source
  special: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def encode(self, text: str, *, control: bool = False) -> list[int]:
    """Token ids of `text`, none added.

    A '<|im_end|>' inside `text` is spelled out as plain characters, so that
    personas and users cannot end a line; with `control` it is that token.
    """
    tokenizer = self.tokenizer if control else self._plain
    return tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int], *, control: bool = False) -> str:
    """The text of `ids`; control tokens are left out unless asked for."""
    return self.tokenizer.decode(list(ids), skip_special_tokens=not control)

  def render(self, messages: Sequence[Message], generate: bool = False) -> str:
    """The conversation as the template writes it.

    With `generate`, it ends where the assistant's next line begins.
    """
    import jinja2

    tokens = {f'{k}_token': v for k, v in self.special.items()}
    template = self._compiled
    try:
      return template.render(
        messages=[dict(message) for message in messages],
        add_generation_prompt=generate,
        tools=None,
        documents=None,
        **{'bos_token': '', 'eos_token': ''} | tokens,
      )
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
      roles = ', '.join(message['role'] for message in messages)
      raise ValueError(
        f'The chat template cannot render the roles ({roles}): {error}. '
        "Use roles that the model's template knows, or give another template."
      ) from error

  def frame(self) -> Frame:
    """The token pieces around contents; see `Frame`."""
    return self._frame

  def prompt_ids(self, system: str) -> list[int]:
    """Everything before the first user line; '' keeps the template's own."""
    frame = self.frame()
    if not system:
      return list(frame.no_system)
    middle = self.encode(system)
    return [*frame.before_system, *middle, *frame.system_to_user]

  @functools.cached_property
  def _compiled(self):
    import jinja2
    from jinja2 import sandbox

    if self.template is None:
      raise ValueError(
        'The model has no chat template; load a chat model, or give the '
        'jinja source as `template`.'
      )
    environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=['jinja2.ext.loopcontrols'],
    )
    environment.filters['tojson'] = _to_json
    environment.globals |= {'raise_exception': _fail, 'strftime_now': _now}
    try:
      return environment.from_string(self.template)
    except jinja2.TemplateSyntaxError as error:
      raise ValueError(
        f'The chat template is no jinja: {error} (line {error.lineno}); give '
        'another template.'
      ) from error

  @functools.cached_property
  def _plain(self):
    """The tokenizer without control tokens; runs of blanks stay tokens."""
    import tokenizers

    record = json.loads(self.tokenizer.to_str())
    record['added_tokens'] = [
      token for token in record['added_tokens'] if token['content'].isspace()
    ]
    record['post_processor'] = None  # it may name a token that is gone
    return tokenizers.Tokenizer.from_str(json.dumps(record))

  @functools.cached_property
  def _frame(self) -> Frame:
    marks = (_SYSTEM, *_MARKS)
    before, first, *turns = self._pieces(('system', *_ROLES), marks)
    alone, *same = self._pieces(_ROLES, _MARKS)
    own, user = turns[:2]
    if turns != [own, user, own, user, own] or same != turns:
      raise ValueError(
        'The chat template is not regular: it wraps lines differently from '
        f'turn to turn ({turns} with a system message, {same} without). '
        'Conversations of many turns need another template.'
      )
    ids = lambda text: tuple(self.encode(text, control=True))
    return Frame(ids(before), ids(first), ids(own), ids(user), ids(alone))

  def _pieces(self, roles, marks) -> list[str]:
    """The rendered conversation, cut at its contents."""
    contents = zip(roles, marks, strict=False)
    messages = [{'role': role, 'content': mark} for role, mark in contents]
    rest = self.render(messages, generate=True)
    pieces = []
    for message in messages:
      if rest.count(message['content']) != 1:
        raise ValueError(
          f'The chat template does not write the {message["role"]} line '
          'exactly once and in order. Conversations of many turns need '
          'another template.'
        )
      piece, rest = rest.split(message['content'])
      pieces.append(piece)
    return [*pieces, rest]


def _fail(message):
  import jinja2

  raise jinja2.TemplateError(message)


def _now(form):
  return datetime.datetime.now().strftime(form)


def _to_json(value, **options):
  return json.dumps(value, ensure_ascii=False, **options)
