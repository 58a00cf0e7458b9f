"""Chat templates in jinja, rendered exactly as transformers renders them."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

_THOUGHTS = ('reasoning_content', 'thinking', 'reasoning')  # first one wins


class _Generation(ext.Extension):
  """The tag {% generation %}, which marks what assistants say: its body."""

  tags = {'generation'}  # noqa: RUF012, jinja's way

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    call = self.call_method('_body')
    return nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _body(self, caller):
    return caller()


def compiled(source: str) -> jinja2.Template:
  """The template, in the sandbox and with the helpers of transformers.

  Raises:
    ValueError: `source` is no jinja.
  """
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, ext.loopcontrols],
  )
  environment.filters['tojson'] = _to_json
  environment.globals |= {'raise_exception': _fail, 'strftime_now': _now}
  try:
    return environment.from_string(source)
  except jinja2.TemplateSyntaxError as error:
    raise ValueError(
      f'The chat template is no jinja: {error} (line {error.lineno}); give '
      'another template.'
    ) from error


def render(
  template: jinja2.Template,
  messages: Sequence[Mapping[str, Any]],
  generate: bool,
  variables: Mapping[str, Any],
) -> str:
  """The conversation as text; `variables` may override any but `messages`.

  Raises:
    ValueError: the conversation is empty, or the template fails on it.
  """
  if not messages:
    raise ValueError(
      'The conversation is empty, and chat templates read its first message; '
      'give at least one message.'
    )
  known = {'tools': None, 'documents': None} | dict(variables)
  try:
    return template.render(
      **known
      | {'messages': [_plain(message) for message in messages]}
      | {'add_generation_prompt': generate}
    )
  except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
    roles = ', '.join(str(message.get('role')) for message in messages)
    raise ValueError(
      f'The chat template cannot render the roles ({roles}): {error}. '
      "Use roles that the model's template knows, or give another template."
    ) from error


def _plain(message):
  """A message without empty fields; its thoughts under the usual names."""
  fields = {k: v for k, v in message.items() if v is not None}
  thoughts = [fields[name] for name in _THOUGHTS if name in fields]
  if thoughts:
    fields.setdefault('thinking', thoughts[0])
    fields['reasoning_content'] = thoughts[0]
  return fields


def _fail(message):
  raise jinja2.TemplateError(message)


def _now(form):
  return datetime.datetime.now().strftime(form)


def _to_json(
  value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
):
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )
