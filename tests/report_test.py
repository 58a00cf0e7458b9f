"""The report and its pictures: whole, in parts, undefined, and hostile."""

import io
import json
import math
import re

import jinja2
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from persona_jax import pages, report
from persona_jax.analysis import judge_plots, plots
from persona_jax.text import corpus

LINES, STEPS, LAYERS = 8, 40, 30
KINDS = ('small talk', 'task', 'emotional', 'meta-reflective')
ARMS = {  # inconsistency, projection, rise of the projection a line
  'base/free': (0.42, 0.30, 0.05),
  'base/capped': (0.38, -0.35, 0.0),
  'base/random': (0.43, 0.28, 0.05),
  'rl/free': (0.31, 0.27, 0.05),
  'rl/capped': (0.29, -0.36, 0.0),
  'shuffled/free': (0.42, 0.31, 0.05),
}
EFFECTS = (
  ('RL', 'rl/free', 'base/free'),
  ('cap', 'base/capped', 'base/free'),
  ('RL and cap', 'rl/capped', 'base/free'),
  ('cap on RL', 'rl/capped', 'rl/free'),
  ('random cap', 'base/random', 'base/free'),
  ('shuffled RL', 'shuffled/free', 'base/free'),
)
UNDEFINED = {'mean': None, 'low': None, 'high': None, 'n': 0}
HOSTILE = '</p><script>alert(1)</script><img src=http://x onerror=a()> {{ 1 }}'


def interval(mean, half, n=16):
  return {'mean': mean, 'low': mean - half, 'high': mean + half, 'n': n}


def fake(seed=0, lines=LINES, steps=STEPS):
  """Results of a study that looks like a real one; all numbers invented."""
  rng = np.random.default_rng(seed)
  arms = {name: _arm(rng, lines, *level) for name, level in ARMS.items()}
  base = arms['base/free']['summary']['projection']
  return {
    'about': _about(),
    'times': {
      'model': 4.1,
      'space': 171.0,
      'judges': 64.0,
      'baseline': 96.0,
      'rl': 431.0,
      'cap': 320.0,
      'answer': 22.0,
    },
    'space': _space(rng),
    'judges': _judges(rng),
    'rl': {
      'algorithm': 'grpo',
      'learning_rate': 1e-5,
      'loss': {'clip': 0.2, 'kl': 0.01, 'kl_kind': 'k3'},
      'dialogues_per_step': 16,
      'steps': [_step(rng, i, 0.3) for i in range(steps)],
      'shuffled_steps': [_step(rng, i, 0.0) for i in range(steps)],
    },
    'arms': arms,
    'effects': [
      _effect(rng, arms, *effect, metric)
      for effect in EFFECTS
      for metric in arms['base/free']['curves']
    ],
    'answer': {
      'headline': 'RL reduced inconsistency; it left its place on the '
      'Assistant axis where it was.',
      'sentences': [
        'Untrained personas stand on the Assistant side of the average role: '
        '+0.48 [+0.39, +0.57] on a scale where 0 is the mean of roles and 1 '
        'the default Assistant.',
        *(
          f'{name}: inconsistency fell (-0.110 [-0.151, -0.070]) by the '
          'training judge and did not measurably change (-0.021 [-0.060, '
          '+0.018]) by the independent one; projection did not measurably '
          'change (-0.030 [-0.081, +0.020]); degenerate lines did not '
          'measurably change (+0.004 [-0.010, +0.018]).'
          for name in ('RL', 'Cap', 'RL and cap', 'Random cap')
        ),
        'RL closed 6% [-4%, 17%] (not told from zero) of the projection gap.',
        'The cap is a ceiling: it keeps the model from sliding toward the '
        'Assistant.',
      ],
      'gap': {'base': base, 'closed_by_rl': interval(0.06, 0.1)},
    },
  }


def _about():
  return {
    'version': '0.1.0',
    'date': '2026-01-31',
    'config_name': 'study:laptop',
    'config': {
      'model': 'smollm2-135m',
      'seed': 0,
      'rl': {'steps': STEPS, 'rewards': {'prompt_to_line': 1.0}},
      'cap': {'hold': 'persona', 'percentile': 25.0},
    },
    'model': {
      'name': 'SmolLM2-135M-Instruct',
      'sha256': '0123456789abcdef' * 4,
      'layers': LAYERS,
      'features': 576,
      'parameters': 134_515_008,
    },
    'machine': {
      'platform': 'Linux-6.1-x86_64',
      'cores': 2,
      'python': '3.11.2',
      'jax': '0.10.2',
      'device': 'cpu',
    },
  }


def _space(rng):
  roles = corpus.archetypes().roles
  groups = list(dict.fromkeys(role.group for role in roles))
  lean = {group: 4 - 1.5 * i for i, group in enumerate(groups)}
  along = np.array([rng.normal(lean[role.group], 3) for role in roles])
  along -= along.mean()
  norm = 10 + 30 * np.linspace(0, 1, LAYERS) ** 2 + rng.normal(0, 1, LAYERS)
  explained = 0.19 * 0.8 ** np.arange(20)
  ceiling = [8.0 + i if 12 <= i < 21 else None for i in range(LAYERS)]
  return {
    'layer': 15,
    'roles': [
      {
        'name': role.name,
        'group': role.group,
        'projection': float(p),
        'pc': [float(p + rng.normal(0, 2)), float(rng.normal(0, 3))],
      }
      for role, p in zip(roles, along, strict=True)
    ],
    'default': {'projection': 14.0, 'pc': [12.0, 4.0]},
    'centre': -31.0,
    'default_at': -17.0,
    'explained': explained.tolist(),
    'components_for_70_percent': 8,
    'cosine_by_layer': np.linspace(0.3, 0.75, LAYERS).tolist(),
    'norm_by_layer': norm.tolist(),
    'responses': 222,
    'examples': [
      {
        'role': i,
        'prompt': roles[i].prompts[0],
        'question': 'What do you do when you cannot sleep?',
        'reply': 'I walk the deck and count the stars until my feet are cold.',
      }
      for i in (3, 40, 77)
    ],
    'calibration': 'axis; hold=persona, percentile 25 of 222 replies',
    'band': [12, 21],
    'bounds': {'low': [None] * LAYERS, 'high': ceiling},
  }


def _judges(rng):
  errors = ('direct', 'implied', 'other party', 'role break', 'third person')

  def judge(area, labelled, errors=()):
    return {
      'auc': interval(area, 0.08, 24),
      'slope': 2.1,
      'offset': -0.4,
      'labelled': labelled,
      'by_error': {
        e: interval(area + rng.normal(0, 0.1), 0.14) for e in errors
      },
    }

  return {
    'prompt_to_line': {
      'likelihood': judge(0.71, 144, errors),
      'verdict': judge(0.56, 144, errors),
    },
    'line_to_line': {
      'likelihood': judge(0.64, 72),
      'verdict': judge(0.53, 72),
    },
  }


def _step(rng, i, gain):
  reward = 0.55 + gain * (1 - math.exp(-i / 15)) + rng.normal(0, 0.03)
  line = 0.5 + gain / 2 * (1 - math.exp(-i / 15)) + rng.normal(0, 0.03)
  return {
    'step': i + 1,
    'reward': reward + 0.5 * line,
    'reward/prompt_to_line': reward,
    'reward/line_to_line': line,
    'loss': rng.normal(0, 0.01),
    'loss/policy': rng.normal(0, 0.01),
    'loss/kl': 0.002 * i + abs(rng.normal(0, 0.004)),
    'policy/clipped': abs(rng.normal(0.02, 0.01)),
    'policy/ratio': 1.0,
    'norm/grads': 4 + abs(rng.normal(0, 1)),
    'norm/updates': 0.1,
    'length': 21 - 3 * gain * i / STEPS + rng.normal(0, 0.6),
    'degenerate': abs(rng.normal(0.04, 0.02)),
    'seconds': 10.5,
  }


def _arm(rng, lines, level, projection, rise):
  record = _measures(rng, lines, level, projection, rise, 0.06)
  dialogue = ['Hello there, how has your day been?', 'Long, and salty.'] * 3
  return record | {
    'by_kind': {
      kind: _measures(rng, lines, level + 0.05 * i, projection, rise, 0.12)
      for i, kind in enumerate(KINDS)
    },
    'capability': {
      'perplexity': interval(21.4 + rng.normal(), 1.3, 12),
      'accuracy': interval(0.46, 0.1, 80),
    },
    'examples': [
      {
        'persona': 'You are Tomas Hagen, a lighthouse keeper in Norway.',
        'kind': kind,
        'lines': dialogue,
      }
      for kind in KINDS
    ],
  }


def _measures(rng, lines, level, projection, rise, half):
  n = np.arange(lines)
  middles = {
    'inconsistency/global/likelihood': level + 0.02 * n,
    'inconsistency/local/likelihood': level - 0.1 + 0.01 * n,
    'inconsistency/global/verdict': 0.5 + 0.2 * (level - 0.4) + 0 * n,
    'inconsistency/local/verdict': 0.47 + 0 * n,
    'length': 21 - 0.2 * n,
    'degenerate': 0.03 + 0.002 * n,
    'projection': projection + rise * n,
    'fired': (0.3 if projection < 0 else 0.0) + 0 * n,
  }
  curves = {
    name: [
      interval(float(m + rng.normal(0, half / 4)), _half(name, half))
      for m in middle
    ]
    for name, middle in middles.items()
  }
  summary = {
    name: interval(float(middle.mean()), _half(name, half) / 2)
    for name, middle in middles.items()
  }
  summary['slope/projection'] = interval(rise, 0.01)
  summary['slope/inconsistency'] = interval(0.02, 0.03)
  return {'summary': summary, 'curves': curves}


def _half(name, half):
  return half * {'length': 20, 'degenerate': 0.3, 'fired': 0.4}.get(name, 1)


def _effect(rng, arms, name, of, against, metric):
  a, b = (arms[x]['summary'][metric]['mean'] for x in (of, against))
  half = _half(metric, 0.04)
  difference = interval(a - b + rng.normal(0, half / 4), half)
  return {
    'name': name,
    'of': of,
    'against': against,
    'metric': metric,
    'difference': difference,
    'excludes_zero': difference['low'] > 0 or difference['high'] < 0,
  }


def small(**changes):
  """Little, so that it renders fast; a part that is None is missing."""
  results = fake(lines=3, steps=4) | changes
  return {name: part for name, part in results.items() if part is not None}


def undefined(part):
  """`part` with every interval undefined and every other float None."""
  if isinstance(part, dict) and set(part) == set(UNDEFINED):
    return UNDEFINED
  if isinstance(part, dict):
    return {name: undefined(value) for name, value in part.items()}
  if isinstance(part, list):
    return [undefined(value) for value in part]
  return None if isinstance(part, float) else part


def ids(page):
  return set(re.findall(r'<section id="(\w+)"', page))


def screen(results, width=100):
  console = Console(width=width, file=io.StringIO(), color_system=None)
  console.print(report.answer_panel(results, width))
  return console.file.getvalue().rstrip('\n').split('\n')


@pytest.fixture(scope='module')
def results():
  return fake()


@pytest.fixture(scope='module')
def page(results):
  return report.render(json.loads(json.dumps(results, allow_nan=False)))


@pytest.fixture
def drawn(monkeypatch):
  """`report` without its pictures, for tests of the words."""
  monkeypatch.setattr(report, 'pictures', lambda parts: {})
  return report.render


# The page.


def test_page_is_whole(page):
  assert ids(page) == {
    *('answer', 'model', 'space', 'judges', 'baseline', 'rl', 'cap'),
    *('arms', 'limits', 'run'),
  }
  assert page.count('<figure>') == page.count('<svg') == 11
  assert page.index('id="answer"') < page.index('id="model"')
  assert 'RL reduced inconsistency; it left its place' in page
  assert 'The cap that was run is a ceiling' in page
  assert 'factual failure' in page


def test_nothing_is_fetched_or_run(page):
  assert 'http' not in page
  assert not re.search(r'<(script|link|iframe|img|object|embed)|@import', page)
  assert not re.search(r'\son\w+=', page)
  assert not re.search(r'(src|href)="(?!#)', page)
  assert not re.search(r'url\((?!#)', page)


def test_pictures_take_the_colours_of_the_page(page):
  drawings = ''.join(re.findall(r'<svg.*?</svg>', page, re.DOTALL))
  assert 'var(--blue)' in drawings
  assert not re.search(r'#[0-9a-f]{6}\b', drawings)
  names = set(re.findall(r'var\(--(\w+)\)', page))
  assert all(page.count(f'--{name}: ') == 2 for name in names)  # and dark
  assert '>viking raider</text>' in drawings  # text that can be searched


def test_judged_numbers_bear_their_judge(page):
  good = 'badge">likelihood judge: AUC 0.71 [0.63, 0.79] on 144 labelled lines<'
  poor = (
    'badge warn">verdict judge: AUC 0.56 [0.48, 0.64] on 144 labelled lines, '
    'not told from chance<'
  )
  assert good in page
  assert poor in page
  for row in re.findall(r'<tr><t[hd]>.*?</tr>', page, re.DOTALL):
    for word in ('likelihood', 'verdict'):
      if f'{word} judge, ' in row:
        assert f'{word} judge: AUC' in row


def test_a_judge_without_calibration_is_a_warning():
  told = report.badge({}, 'prompt_to_line', 'likelihood')
  assert told == ('likelihood judge: not calibrated', False)


def test_a_judge_measured_on_one_persona_is_not_valid():
  # One unit has an interval of no width, which proves nothing.
  assert not report.valid({'auc': interval(0.7, 0.0, n=1)})
  assert report.valid({'auc': interval(0.7, 0.1, n=2)})
  assert not report.valid({'auc': interval(0.6, 0.1, n=9)})


@pytest.mark.parametrize('part', report.PARTS)
def test_a_missing_part_is_left_out(part, drawn):
  page = drawn(small(**{part: None}))
  home = {'times': 'x', 'about': 'model', 'effects': 'x'}.get(part, part)
  assert home not in ids(page)
  assert 'id="limits"' in page


def test_nothing_at_all_still_renders(tmp_path):
  report.write({}, tmp_path / 'report.html')
  page = (tmp_path / 'report.html').read_text()
  assert ids(page) == {'limits', 'run'}
  assert '<figure>' not in page


def test_missing_arms_are_left_out():
  whole = small()
  arms = {'base/free': whole['arms']['base/free']}
  page = report.render(whole | {'arms': arms, 'effects': [], 'rl': None})
  assert not {'rl', 'cap'} & ids(page)
  assert 'shuffled' not in page
  assert 'No control by a random direction' in page


def test_undefined_numbers_leave_no_empty_picture():
  whole = fake(lines=3, steps=4)
  results = undefined(whole) | {'about': whole['about']}
  results['rl'] |= {'learning_rate': 1e-5, 'loss': {}}
  results['answer']['gap']['closed_by_rl'] = None
  page = report.render(results)
  assert '<figure>' not in page
  assert 'nan' not in re.sub(r'<style>.*?</style>', '', page, flags=re.DOTALL)
  assert ids(page) >= {'space', 'judges', 'rl', 'arms'}
  assert len(screen(results)) <= 24


def test_texts_of_models_are_escaped(tmp_path):
  results = small(rl=None, effects=None)
  results['answer']['sentences'] = [HOSTILE]
  results['arms'] = {'base/free': results['arms']['base/free']}
  results['space']['examples'][0] |= {'reply': HOSTILE, 'prompt': HOSTILE}
  results['space']['roles'][0] |= {'name': f'$a_${HOSTILE}', 'group': HOSTILE}
  arm, lines = results['arms']['base/free'], [HOSTILE, '', '\ud800 $x^$ \x00']
  arm['examples'] = [{'persona': HOSTILE, 'kind': HOSTILE, 'lines': lines}]
  arm['by_kind'] = {HOSTILE: arm['by_kind']['task']}
  report.write(results, tmp_path / 'report.html')
  page = (tmp_path / 'report.html').read_text()
  assert '<script' not in page
  assert '<img' not in page
  assert '&lt;script&gt;alert(1)' in page
  assert '{{ 1 }}' in page
  assert '(nothing)' in page
  assert '</p><script>' in '\n'.join(screen(results))


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, drawn):
  path = tmp_path / 'report.html'
  report.write({}, path)
  before = path.read_bytes()
  with pytest.raises(jinja2.UndefinedError):
    report.write({'judges': {'prompt_to_line': {'verdict': {}}}}, path)
  assert path.read_bytes() == before
  assert list(tmp_path.iterdir()) == [path]


def test_side_of_the_cap():
  bounds = lambda low, high: {'bounds': {'low': [None, low], 'high': [high]}}
  assert report.side(bounds(1.0, None)) == 'floor'
  assert report.side(bounds(None, 1.0)) == 'ceiling'


@pytest.mark.parametrize(
  ('record', 'text'),
  [
    (interval(0.71, 0.08), '0.71 [0.63, 0.79]'),
    (interval(0.5, 0.5), '0.50 [0.00, 1.00]'),
    (interval(0.0312, 0.002), '0.031 [0.029, 0.033]'),
    (interval(-0.0002, 0.01), '0.000 [−0.010, 0.010]'),
    (interval(21.43, 1.31), '21.4 [20.1, 22.7]'),
    (interval(5000.0, 400.0), '5,000 [4,600, 5,400]'),
    (interval(1.0, 0.0), '1.00 [1.00, 1.00]'),
    ({'mean': 0.5, 'low': None, 'high': None, 'n': 1}, '0.50'),
    (UNDEFINED, '–'),
    (None, '–'),
  ],
)
def test_intervals_have_sensible_digits(record, text):
  assert pages.interval(record) == text


def test_signs_and_durations():
  assert pages.interval(interval(0.1, 0.2), True) == '+0.10 [−0.10, +0.30]'
  assert pages.duration(4.12) == '4.1 s'
  assert pages.duration(431.0) == '7 min 11 s'
  assert pages.duration(7300.0) == '2 h 1 min'
  assert pages.duration(None) == '–'


# The terminal.


@pytest.mark.parametrize('width', [60, 80, 100, 200])
@pytest.mark.parametrize('long', [1, 12])
def test_answer_fits_one_screen(results, width, long):
  answer = results['answer']
  answer = answer | {
    'headline': ' '.join([answer['headline']] * long),
    'sentences': answer['sentences'] * long,
  }
  lines = screen(results | {'answer': answer}, width)
  assert len(lines) <= 24
  assert max(map(len, lines)) <= min(width, 100)
  said = '\n'.join(lines)
  assert 'more in report.html' in said
  assert 'RL + cap' in said
  assert 'verdict judge: AUC' in said


def test_answer_shows_intervals_not_markup(results):
  said = '\n'.join(screen(results))
  assert '+0.48 [+0.39, +0.57]' in said
  assert re.search(r'│ RL +0.38 \[0.35, 0.41\]', said)
  assert 'not told from chance' in said


def test_answer_of_an_unfinished_study():
  assert 'not whole' in screen({})[1]


# The pictures.


DRAW = {
  'scatter': lambda r: plots.scatter(r['space']),
  'ranking': lambda r: plots.ranking(r['space']),
  'layers': lambda r: plots.layers(r['space']),
  'training': lambda r: plots.training(r['rl']['steps']),
  'drift': lambda r: plots.drift(r['arms']),
  'effects': lambda r: plots.effects(r['effects']),
  'partners': lambda r: plots.partners(r['arms']['base/free']),
  'calibration': lambda r: judge_plots.calibration(r['judges']),
}


@pytest.mark.parametrize('name', DRAW)
def test_pictures_have_labelled_axes(results, name):
  figure = DRAW[name](results)
  assert isinstance(figure, Figure)
  for axes in figure.axes:
    assert axes.has_data()
    grid = axes.get_subplotspec()
    if name != 'partners' or grid.is_last_row():
      assert axes.get_xlabel()
    if name != 'partners' or grid.is_first_col():
      assert axes.get_ylabel()


@pytest.mark.parametrize('name', DRAW)
def test_nothing_to_draw_is_none(name):
  assert DRAW[name](undefined(small())) is None


def test_names_of_roles_do_not_overlap(results):
  figure = plots.scatter(results['space'])
  figure.draw_without_rendering()
  axes = figure.axes[0]
  boxes = [text.get_window_extent() for text in axes.texts]
  named = {text.get_text() for text in axes.texts}
  assert 'default Assistant' in named
  assert len(named) > 20
  assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
  points = sum(len(c.get_offsets()) for c in axes.collections)
  assert points == len(results['space']['roles']) + 1


def test_ranking_names_both_ends(results):
  (axes,) = plots.ranking(results['space'], ends=5).axes
  names = [label.get_text() for label in axes.get_yticklabels()]
  order = sorted(results['space']['roles'], key=lambda r: r['projection'])
  assert names[:5] == [role['name'] for role in order[:5]]
  assert names[5:10] == [role['name'] for role in order[-5:]]
  assert names[10:] == ['default Assistant', f'{len(order) - 10} roles between']


@pytest.mark.parametrize('count', [1, 9, 10, 11, 12])
def test_ranking_draws_every_role_once(results, count):
  space = results['space']
  space = space | {'roles': space['roles'][:count]}
  (axes,) = plots.ranking(space, ends=5).axes
  assert len(axes.collections) == count + 1  # and the default


def test_drift_leaves_out_what_was_not_measured(results):
  arms = {'base/free': results['arms']['base/free'], 'new/arm': {}}
  figure = plots.drift(arms, ('projection', 'unheard of'))
  assert [a.get_title('left') for a in figure.axes] == [
    'Projection on the Assistant axis'
  ]


def test_hollow_marks_where_the_interval_includes_zero(results):
  figure = plots.effects(results['effects'], ('projection',))
  faces = [line.get_markerfacecolor() for line in figure.axes[0].lines[1:]]
  found = [e for e in results['effects'] if e['metric'] == 'projection']
  page = plots.COLOURS['page']
  assert [face != page for face in faces] == [e['excludes_zero'] for e in found]


def test_pictures_leave_the_settings_of_matplotlib(results):
  import matplotlib

  before = dict(matplotlib.rcParams)
  plots.layers(results['space'])
  assert dict(matplotlib.rcParams) == before
