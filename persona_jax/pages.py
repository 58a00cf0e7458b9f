"""Pages of HTML: numbers as they are read, figures as SVG, one style."""

import io
import math
import re
from importlib import resources

import jinja2
import matplotlib
from markupsafe import Markup

from persona_jax.analysis import looks

_HOME = resources.files('persona_jax')
_NAMED = re.compile(r'<g id="[\w.]+">')  # names that repeat from svg to svg


def page(template: str, **values) -> str:
  """A template of this package with `values`, which must be all it names."""
  environment = jinja2.Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  style = Markup((_HOME / 'report.css').read_text('utf-8'))
  environment.globals |= {'style': style, **values}
  environment.filters |= {
    'bounds': bounds,
    'duration': duration,
    'interval': interval,
    'mean': mean,
    'number': number,
  }
  text = (_HOME / template).read_text('utf-8')
  return environment.from_string(text).render()


def svg(figure) -> Markup:
  """A figure as SVG whose text is text and whose colours are the page's."""
  text = io.StringIO()
  unsigned = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
  with matplotlib.rc_context(
    {'svg.fonttype': 'none', 'svg.hashsalt': 'persona_jax'}
  ):
    figure.savefig(text, format='svg', transparent=True, metadata=unsigned)
  drawn = _NAMED.sub('<g>', text.getvalue())
  drawn = drawn[drawn.index('<svg') :].replace('xlink:href', 'href')
  drawn = re.sub(r' xmlns(:xlink)?="[^"]*"', '', drawn)
  for name, colour in looks.COLOURS.items():
    drawn = drawn.replace(colour, f'var(--{name})')
  return Markup(drawn)


def number(x: float | int | None, digits: int = 2, signed: bool = False) -> str:
  """A number with a true minus sign."""
  if x is None or not math.isfinite(x):
    return '–'
  sign = '+' if signed else ''
  text = f'{x:{sign},.{digits}f}'
  if not text.strip('+-0.'):
    text = text.lstrip('+-')  # no '-0.00'
  return text.replace('-', '−')


def mean(record: dict | None, signed: bool = False) -> str:
  """The middle of an interval, to the digits that the interval allows."""
  return number((record or {}).get('mean'), _digits(record), signed)


def bounds(record: dict | None, signed: bool = False) -> str:
  """'[0.62, 0.79]'; empty where there is no interval."""
  low, high = ((record or {}).get(k) for k in ('low', 'high'))
  if low is None or high is None:
    return ''
  digits = _digits(record)
  return f'[{number(low, digits, signed)}, {number(high, digits, signed)}]'


def interval(record: dict | None, signed: bool = False) -> str:
  """'0.71 [0.62, 0.79]'."""
  return f'{mean(record, signed)} {bounds(record, signed)}'.strip()


def _digits(record):
  """Decimals that show the interval's width to about a tenth of it."""
  low, high = ((record or {}).get(k) for k in ('low', 'high'))
  if low is None or high is None or not high > low:
    return 2
  digits = math.ceil(-math.log10((high - low) / 3))
  return min(4, max(2 if high - low <= 1 else 0, digits))


def duration(seconds: float | int | None) -> str:
  """'7 min 11 s'."""
  if seconds is None:
    return '–'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {rest} s' if minutes else f'{seconds:.1f} s'
