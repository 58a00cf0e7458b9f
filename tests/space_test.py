"""Persona space: planted axes, pooling, bounds of caps, and their files."""

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from sklearn.decomposition import PCA

from persona_jax import models, taps
from persona_jax.activations import Directions, calibration, edits, space
from persona_jax.models import decoder
from persona_jax.models.config import Kind, Rope

CONFIG = models.DecoderConfig(
  vocab=300,
  features=32,
  layers=3,
  heads=4,
  kv_heads=2,
  head_dim=8,
  hidden=48,
  kinds=(Kind(Rope(1e4)),),
  norm_eps=1e-6,
)
APPLY, _ = decoder.functions(CONFIG)
ROLES, REPLIES, LAYERS, WIDTH = 30, 8, 2, 64
NAMES = [f'role {i}' for i in range(ROLES)]


def cosine(a, b):
  return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.fixture(scope='module')
def planted():
  """(replies, role, direction, depth): roles lie `depth` down `direction`.

  All share a mean twenty times as long, as real role vectors do.
  """
  rng = np.random.default_rng(0)
  direction = rng.normal(size=(LAYERS, WIDTH))
  direction /= np.linalg.norm(direction, axis=1, keepdims=True)
  shared = rng.normal(size=(LAYERS, WIDTH)) * 15
  depth = np.concatenate([rng.uniform(1, 9, ROLES), [0.0]])  # the default: 0
  role = rng.permutation(np.repeat(np.arange(-1, ROLES), REPLIES))
  replies = shared - depth[role, None, None] * direction
  replies += 0.1 * rng.normal(size=replies.shape)
  return replies.astype(np.float32), role, direction, depth[:ROLES]


@pytest.fixture(scope='module')
def found(planted):
  replies, role, _, _ = planted
  return space.space(NAMES, replies, role)


@pytest.mark.parametrize('layer', range(LAYERS))
def test_a_planted_axis_is_found(planted, found, layer):
  _, _, direction, depth = planted
  assert cosine(found.axis[layer], direction[layer]) > 0.99
  first = found.components(layer).vectors[0]
  assert abs(cosine(first, direction[layer])) > 0.99
  assert found.cosine_with_first_component(layer) > 0.99
  along = found.along(layer)
  np.testing.assert_allclose(along, depth.mean() - depth, atol=0.5)
  np.testing.assert_allclose(along.mean(), 0, atol=1e-4)


@pytest.mark.parametrize('layer', range(LAYERS))
def test_without_centring_the_shared_mean_hides_the_axis(planted, found, layer):
  _, _, direction, _ = planted
  roles = found.roles[:, layer]
  _, _, vectors = np.linalg.svd(roles, full_matrices=False)
  assert abs(cosine(vectors[0], direction[layer])) < 0.5
  assert cosine(vectors[0], roles.mean(0)) ** 2 > 0.99
  assert cosine(roles[0], roles[1]) > 0.98  # as alike as everything is


def test_each_role_weighs_one():
  replies = np.array([[[1.0]], [[3.0]], [[10.0]], [[7.0]], [[9.0]]])
  role = np.array([0, 0, 1, -1, -1])
  got = space.space(['a', 'b'], replies, role)
  # roles 2 and 10 with mean 6, default 8: 8 - 6; over replies it were 8 - 14/3
  np.testing.assert_allclose(got.roles[:, 0, 0], [2.0, 10.0])
  np.testing.assert_allclose(got.axis, [[2.0]])


@pytest.mark.parametrize(
  ('role', 'said'), [([0, 0, -1], 'b has'), ([0, 1, 1], 'the default has')]
)
def test_a_role_without_replies_is_refused(role, said):
  with pytest.raises(ValueError, match=said):
    space.space(['a', 'b'], np.ones((3, 1, 2)), np.array(role))


def test_components_are_those_of_sklearn(found):
  x = found.roles[:, 0]
  mine, other = space.principal(x), PCA().fit(x)
  kept = ROLES - 1  # centring takes one
  np.testing.assert_allclose(mine.mean, other.mean_, rtol=1e-5)
  np.testing.assert_allclose(
    mine.explained[:kept], other.explained_variance_ratio_[:kept], rtol=1e-3
  )
  assert np.all(np.diff(mine.explained) <= 0)
  dots = np.sum(mine.vectors[:3] * other.components_[:3], axis=1)
  np.testing.assert_allclose(np.abs(dots), 1, atol=1e-4)
  np.testing.assert_allclose(
    mine.coordinates(x, 3) * np.sign(dots), other.transform(x)[:, :3], atol=1e-2
  )


# In the model.


@pytest.fixture(scope='module')
def variables():
  return fakes.variables(CONFIG)


@pytest.fixture(scope='module')
def text():
  """Tokens, ragged positions, and which tokens are the reply."""
  rng = np.random.default_rng(1)
  tokens = jnp.asarray(rng.integers(0, 300, (4, 9)))
  size = np.array([[9], [6], [7], [9]])
  positions = jnp.asarray(np.where(np.arange(9) < size, np.arange(9), -1))
  mask = jnp.asarray(positions >= np.array([[3], [2], [6], [9]]))
  return tokens, positions, mask


@jax.jit
def read(variables, tokens, positions):
  return space.read_axis(APPLY, variables, tokens, positions)


@jax.jit
def residual(variables, tokens, positions):
  """`[L B S D]`: all of it, before and after the stored edits."""
  everything = lambda tap, x: x
  before = taps.edited(taps.keep(APPLY, everything), edits.stored)
  after = taps.keep(taps.edited(APPLY, edits.stored), everything)
  at = (variables, tokens, positions)
  return before(*at)[1], after(*at)[1]


def test_pooling_in_the_pass_is_stacking_everything(variables, text):
  tokens, positions, mask = text
  got = jax.jit(lambda *x: space.pooled(APPLY, *x))(variables, *text)
  _, every = residual(variables, tokens, positions)
  assert got.shape == (3, 4, 32)
  for b in range(3):
    own = every[:, b, np.flatnonzero(mask[b])]
    np.testing.assert_allclose(got[:, b], np.mean(own, 1), atol=1e-5)
  assert not np.any(mask[3]) and not np.any(got[:, 3])


@pytest.fixture(scope='module')
def capped(variables, text):
  """Variables with caps on one axis that act about half the time."""
  rng = np.random.default_rng(2)
  axis, probe = jnp.asarray(rng.normal(size=(2, 3, 32)), jnp.float32)
  every, _ = residual(variables, *text[:2])
  unit = axis / np.linalg.norm(axis, axis=1, keepdims=True)
  along = np.einsum('lbsd,ld->lbs', every, unit)
  low = np.percentile(along, 30, (1, 2)).astype(np.float32)
  high = np.percentile(along, 70, (1, 2)).astype(np.float32)
  stored = edits.caps(axis, jnp.asarray(low), jnp.asarray(high))
  collection = edits.merged(stored, edits.probes(probe))
  return variables | {'edits': collection}, unit, probe, low, high


def test_read_axis_is_what_one_reads_by_hand(text, capped):
  tokens, positions, _ = text
  variables, unit, probe, low, high = capped
  reading = read(variables, tokens, positions)
  before, after = residual(variables, tokens, positions)
  probe = probe / np.linalg.norm(probe, axis=1, keepdims=True)
  np.testing.assert_allclose(
    reading.projection, np.einsum('lbsd,ld->lbs', after, probe), atol=1e-4
  )
  along = np.einsum('lbsd,ld->lbs', before, unit)
  wide = lambda x: x[:, None, None]
  moved = (along < wide(low)) | (along > wide(high))
  real = np.asarray(positions) >= 0
  np.testing.assert_array_equal(reading.moved[:, real], moved[:, real])
  assert 0.2 < np.mean(moved[:, real]) < 0.8
  held = np.einsum('lbsd,ld->lbs', after, unit)[:, real]
  assert np.all(held > low[:, None] - 1e-4)
  assert np.all(held < high[:, None] + 1e-4)


def test_without_caps_nothing_is_moved(variables, text, capped):
  tokens, positions, _ = text
  *_, probe, _, _ = capped
  free = variables | {'edits': edits.probes(probe)}
  off = edits.merged(edits.no_caps(3, 32), edits.probes(probe))
  for collection in (free['edits'], off):
    reading = read(variables | {'edits': collection}, tokens, positions)
    assert not np.any(reading.moved)
  every, _ = residual(free, tokens, positions)
  unit = probe / np.linalg.norm(probe, axis=1, keepdims=True)
  np.testing.assert_allclose(
    reading.projection, np.einsum('lbsd,ld->lbs', every, unit), atol=1e-4
  )


# Bounds.


@pytest.fixture(scope='module')
def along(planted, found):
  """Projections `[N L]` of all replies toward the Assistant."""
  unit = found.axis / np.linalg.norm(found.axis, axis=1, keepdims=True)
  return np.einsum('nld,ld->nl', planted[0], unit)


BAND = (0, LAYERS)


def test_the_floor_is_the_released_ceiling_turned_round(along):
  low, high = calibration.bounds(along, hold='assistant', band=BAND)
  # the files of the paper: the 25th percentile along roles - default
  ceiling = np.percentile(-along, 25, axis=0)
  np.testing.assert_allclose(low, -ceiling, rtol=1e-5)
  np.testing.assert_allclose(low, np.percentile(along, 75, axis=0), rtol=1e-5)
  assert np.all(high == np.inf)


def test_the_ceiling_is_the_mirror_image(along):
  low, high = calibration.bounds(along, hold='persona', band=BAND)
  np.testing.assert_allclose(high, np.percentile(along, 25, axis=0), rtol=1e-5)
  assert np.all(low == -np.inf)
  floor, _ = calibration.bounds(-along, hold='assistant', band=BAND)
  np.testing.assert_allclose(high, -floor, rtol=1e-5)


@pytest.mark.parametrize('hold', calibration.SIDES)
def test_the_side_that_is_held_keeps_the_bound_by_itself(planted, along, hold):
  low, high = calibration.bounds(along, hold=hold, band=BAND)
  within = (low <= along) & (along <= high)
  default = planted[1] == -1
  free = {'assistant': within[default], 'persona': within[~default]}
  other = {'assistant': within[~default], 'persona': within[default]}
  assert free[hold].mean() > other[hold].mean() + 0.2


@pytest.mark.parametrize('hold', calibration.SIDES)
def test_a_smaller_percentile_holds_more(along, hold):
  acts = []
  for percentile in (1.0, 25.0, 50.0, 75.0):
    low, high = calibration.bounds(
      along, hold=hold, band=BAND, percentile=percentile
    )
    acts.append(np.mean((along < low) | (along > high)))
  np.testing.assert_allclose(acts, [0.99, 0.75, 0.5, 0.25], atol=0.01)


def test_layers_outside_the_band_stay_free():
  x = np.arange(20.0).reshape(4, 5)
  for hold in calibration.SIDES:
    low, high = calibration.bounds(x, hold=hold, band=(1, 3))
    finite = np.isfinite(low) | np.isfinite(high)
    assert finite.tolist() == [False, True, True, False, False]
  for band in [(2, 2), (-1, 2), (3, 6)]:
    with pytest.raises(ValueError, match='band'):
      calibration.bounds(x, hold='persona', band=band)
  with pytest.raises(ValueError, match='no side of the axis'):
    calibration.bounds(x, hold='user', band=(0, 1))


def test_a_random_axis_is_as_long_and_elsewhere(found):
  other = calibration.random_axis(5, found.axis)
  np.testing.assert_allclose(
    np.linalg.norm(other, axis=1), np.linalg.norm(found.axis, axis=1), rtol=1e-5
  )
  for layer in range(LAYERS):
    assert abs(cosine(other[layer], found.axis[layer])) < 0.5
  np.testing.assert_array_equal(other, calibration.random_axis(5, found.axis))
  assert np.any(other != calibration.random_axis(6, found.axis))


# Files.


def directions(**fields):
  vectors = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
  fields = {'model': 'tiny', 'sha256': 'abc'} | fields
  return Directions(vectors=vectors.T[:, ::2], **fields)  # not contiguous


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {
      'sign': 'away_from_assistant',
      'low': np.full(4, -np.inf, np.float32),
      'high': np.arange(4, dtype=np.float32),
      'layer_base': 1,
      'first_position': 1,
      'calibration': 'of “all” replies\n',
    },
  ],
  ids=['plain', 'all fields'],
)
def test_directions_come_back_as_they_were(tmp_path, fields):
  path = tmp_path / 'axis.safetensors'
  directions().save(path)
  written = directions(**fields)
  written.save(path)  # over the other
  read = Directions.load(path)
  assert vars(read).keys() == vars(written).keys()
  for name, value in vars(written).items():
    np.testing.assert_array_equal(vars(read)[name], value, err_msg=name)
  assert [p.name for p in tmp_path.iterdir()] == ['axis.safetensors']


def test_directions_turn_toward_the_assistant():
  there, away = directions(), directions(sign='away_from_assistant')
  np.testing.assert_array_equal(there.toward_assistant(), there.vectors)
  np.testing.assert_array_equal(away.toward_assistant(), -away.vectors)
  with pytest.raises(ValueError, match="sign='up' is none of"):
    directions(sign='up')


@pytest.mark.parametrize(
  ('arrays', 'words', 'said'),
  [
    ({'vectors': np.ones((2, 3))}, None, 'model'),
    ({'vectors': np.ones((2, 3))}, {'model': '"x"', 'sha256': '""'}, 'sign'),
    (
      {'axis': np.ones((2, 3))},
      {'model': '"x"', 'sha256': '""', 'sign': '"toward_assistant"'},
      'vectors',
    ),
  ],
)
def test_a_file_that_does_not_say_what_it_holds(tmp_path, arrays, words, said):
  path = tmp_path / 'bare.safetensors'
  path.write_bytes(safetensors.numpy.save(arrays, metadata=words))
  with pytest.raises(ValueError, match=f'no described directions.*{said}'):
    Directions.load(path)


def test_a_file_cut_short_is_refused_by_name(tmp_path):
  path = tmp_path / 'cut.safetensors'
  directions().save(path)
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(ValueError, match='cut.safetensors'):
    Directions.load(path)
