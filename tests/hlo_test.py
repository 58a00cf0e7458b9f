"""Collectives in the text of compiled programs."""

import json
import subprocess
import sys

import pytest

from persona_jax import hlo

KNOWN = """HloModule m, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %add.1 = f32[] add(%a, %a)
}

%inner_body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = f32[16,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[4]) tuple(%i, %y)
}

%inner_cond (p: (s32[], f32[4])) -> pred[] {
  %c.7 = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c.7), direction=LT, metadata={}
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %w = (s32[], f32[4]) while(%p), condition=%inner_cond, body=%inner_body
  %r = f32[8,8]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t = (s32[], f32[4]) tuple(%i, %y)
}

%cond (p: (s32[], f32[4])) -> pred[] {
  ROOT %f = pred[] fusion(%p), kind=kLoop, calls=%fused
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  %w = (s32[], f32[4]) while(%x), condition=%cond, body=%body, backend_config=TRIPS
  ROOT %out = f32[4] get-tuple-element(%w), index=1
}
"""  # noqa: E501
THREE = '{"known_trip_count":{"n":"3"},"known_init_step":{"init":"0"}}'


def one(line, devices=8):
  """The only collective of a program of one line."""
  text = f'HloModule m, num_partitions={devices}\n\n'
  text += f'ENTRY %main (x: f32[4]) -> f32[4] {{\n  {line}\n}}\n'
  (found,) = hlo.collectives(text)
  return found


def test_a_loop_counts_as_often_as_it_runs():
  reduce, gather = sorted(
    hlo.collectives(KNOWN.replace('TRIPS', THREE)), key=lambda x: x.times
  )
  assert (reduce.kind, reduce.times, reduce.group) == ('all-reduce', 3, 2)
  assert reduce.sent == 8 * 8 * 4  # twice a half of it
  assert (gather.kind, gather.times, gather.group) == ('all-gather', 15, 4)
  assert gather.sent == 16 * 4 * 4 * 3 / 4


@pytest.mark.parametrize(('add', 'times'), [('%one', 5), ('%two', 3)])
def test_a_loop_may_count_by_twos(add, times):
  body = KNOWN.replace(
    '  ROOT %t = (s32[], f32[4]) tuple(%i, %y)',
    '  %one = s32[] constant(1)\n'
    '  %two = s32[]{:T(128)} constant(2)\n'
    f'  %add.2 = s32[]{{:T(128)}} add(%i, {add}), metadata={{}}\n'
    '  ROOT %t = (s32[], /*index=1*/f32[4]) tuple(%add.2, %y), metadata={}',
    1,
  )
  found = {x['kind']: x['count'] for x in hlo.summary(body)}
  assert found == {'all-gather': times, 'all-reduce': 1}


def test_a_loop_of_unknown_length_counts_once_and_is_told_apart():
  found = hlo.summary(KNOWN.replace('TRIPS', '{}'))
  assert found == [
    {'kind': 'all-gather', 'open': 1, 'count': 5, 'sent': 5 * 192.0},
    {'kind': 'all-reduce', 'open': 1, 'count': 1, 'sent': 256.0},
  ]


@pytest.mark.parametrize(
  ('groups', 'size'),
  [
    ('replica_groups={{0,2,4},{1,3,5}}', 3),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', 2),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", 2),
    ('replica_groups={}', 8),
  ],
)
def test_groups_in_all_their_spellings(groups, size):
  assert one(f'%r = f32[8] all-reduce(%x), {groups}, to_apply=%a').group == size


@pytest.mark.parametrize(
  ('line', 'kind', 'size', 'sent'),
  [
    # A device sends its eighth to seven others, or on around the ring.
    ('%g = bf16[64,2]{1,0:T(8,128)} all-gather(%x)', 'all-gather', 256, 224),
    (
      '%g = (f32[8,2], f32[64,2]) all-gather-start(%x)', 'all-gather', 512, 448
    ),
    ('%r = f32[8,2] reduce-scatter(%x)', 'reduce-scatter', 512, 448),
    ('%r = (f32[8], bf16[16]) all-reduce-start(%x, %y)', 'all-reduce', 64, 112),
    ('%a = pred[64] all-to-all(%x)', 'all-to-all', 64, 56),
    (
      '%p = (u8[64], u8[64], u32[], u32[]) collective-permute-start(%x), '
      'source_target_pairs={{0,1}}',
      'collective-permute', 64, 64,
    ),
  ],
)  # fmt: skip
def test_bytes_by_hand(line, kind, size, sent):
  found = one(line)
  assert (found.kind, found.size, found.sent) == (kind, size, sent)


def test_what_is_done_was_counted_where_it_began():
  text = """HloModule m, num_partitions=2

%inner (x: f32[4]) -> f32[8] {
  ROOT %g = f32[8] all-gather(%x), replica_groups={{0,1}}
}

ENTRY %main (x: f32[4]) -> f32[8] {
  %s = ((f32[4]), f32[8]) async-start(%x), calls=%inner
  ROOT %d = f32[8] async-done(%s)
}
"""
  assert [x.kind for x in hlo.collectives(text)] == ['all-gather']


def test_an_all_reduce_of_which_a_slice_is_kept():
  text = """HloModule m, num_partitions=2

%all-reduce-scatter.1 (x: f32[8]) -> f32[4] {
  %all-reduce.1 = f32[8] all-reduce(%x), replica_groups={{0,1}}, to_apply=%a
  ROOT %s = f32[4] dynamic-slice(%all-reduce.1, %i), dynamic_slice_sizes={4}
}

ENTRY %main (x: f32[8]) -> f32[4] {
  ROOT %f = f32[4] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
  (found,) = hlo.collectives(text)
  assert (found.kind, found.sent) == ('reduce-scatter', 16)


def test_of_branches_the_dearest_counts():
  text = """HloModule m, num_partitions=2

%cheap (x: f32[4]) -> f32[4] {
  ROOT %r = f32[4] all-reduce(%x), replica_groups={{0,1}}, to_apply=%a
}

%dear (x: f32[4]) -> f32[4] {
  ROOT %r = f32[400] all-reduce(%x), replica_groups={{0,1}}, to_apply=%a
}

ENTRY %main (x: f32[4]) -> f32[4] {
  ROOT %c = f32[4] conditional(%i, %x, %x), branch_computations={%cheap, %dear}
}
"""
  assert [x.size for x in hlo.collectives(text)] == [1600]


def test_what_is_no_program():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.collectives('module @jit_f {}')


REAL = """
import json
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from persona_jax import hlo

mesh = jax.make_mesh((2, 4), ('a', 'b'))

def device(x):  # f32[4, 8]
  def turn(x, _):
    x = lax.psum(jnp.sin(x), 'b')
    whole = lax.all_gather(x, 'a', tiled=True)
    return lax.psum_scatter(whole * whole, 'a', tiled=True), None
  x, _ = lax.scan(turn, x, length=7)
  return lax.ppermute(x, 'b', [(i, (i + 1) % 4) for i in range(4)])

f = jax.jit(jax.shard_map(
    device, mesh=mesh, in_specs=P('a', 'b'), out_specs=P('a', 'b'),
    check_vma=False))
place = jax.NamedSharding(mesh, P('a', 'b'))
x = jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=place)
print(json.dumps(hlo.summary(f.lower(x).compile().as_text())))
"""


def test_a_real_program_of_eight_devices(fake_devices):
  done = subprocess.run(
    [sys.executable, '-c', REAL],
    capture_output=True,
    text=True,
    env=fake_devices,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  found = {x['kind']: (x['count'], x['sent']) for x in json.loads(done.stdout)}
  assert found == {  # seven turns of f32[4, 8], 128 bytes
    'all-reduce': (7, 7 * 2 * 128 * 3 / 4),
    'all-gather': (7, 7 * 256 / 2),
    'reduce-scatter': (7, 7 * 256 / 2),
    'collective-permute': (1, 128),
  }
