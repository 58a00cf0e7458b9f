"""GGUF: headers as the gguf package reads them, and every packing by hand."""

import struct

import gguf
import numpy as np
import pytest
import tiny_gguf

from persona_jax import models
from persona_jax.models import gguf_file, gguf_header

# Packed weights: block by block, number by number, as ggml's structs say.


def half(block, at):
  return float(np.frombuffer(bytes(block[at : at + 2]), '<f2')[0])


def nibbles(low_first, i, j):
  """Number i of 32 that share 16 bytes from `j`: low halves come first."""
  byte = int(low_first[j + i % 16])
  return byte >> 4 if i >= 16 else byte & 15


def q8_0(b):
  return [half(b, 0) * int(np.int8(b[2 + i])) for i in range(32)]


def q4_0(b):
  return [half(b, 0) * (nibbles(b, i, 2) - 8) for i in range(32)]


def q4_1(b):
  return [half(b, 0) * nibbles(b, i, 4) + half(b, 2) for i in range(32)]


def fifth(b, at, i):
  return (struct.unpack('<I', bytes(b[at : at + 4]))[0] >> i & 1) << 4


def q5_0(b):
  fives = [nibbles(b, i, 6) | fifth(b, 2, i) for i in range(32)]
  return [half(b, 0) * (five - 16) for five in fives]


def q5_1(b):
  fives = [nibbles(b, i, 8) | fifth(b, 4, i) for i in range(32)]
  return [half(b, 0) * five + half(b, 2) for five in fives]


def q2_k(b):
  d, least, out = half(b, 80), half(b, 82), []
  for i in range(256):
    part, shift, byte = i // 128, i % 128 // 32 * 2, i % 32
    scale = int(b[i // 16])
    two = int(b[16 + 32 * part + byte]) >> shift & 3
    out.append(d * (scale & 15) * two - least * (scale >> 4))
  return out


def q3_k(b):
  out = []
  for i in range(256):
    part, shift, byte = i // 128, i % 128 // 32, i % 32
    three = int(b[32 + 32 * part + byte]) >> 2 * shift & 3
    three -= 0 if int(b[byte]) >> (4 * part + shift) & 1 else 4
    group = i // 16
    low = int(b[96 + group % 8]) >> 4 * (group // 8) & 15
    high = int(b[104 + group % 4]) >> 2 * (group // 4) & 3
    out.append(half(b, 108) * ((low | high << 4) - 32) * three)
  return out


def sixes(b, group):
  """Scale and minimum of one of eight groups, packed into 12 bytes."""
  s = [int(x) for x in b[4:16]]
  if group < 4:
    return s[group] & 63, s[group + 4] & 63
  scale = s[group + 4] & 15 | s[group - 4] >> 6 << 4
  return scale, s[group + 4] >> 4 | s[group] >> 6 << 4


def q45_k(b, quants, fifths=None):
  out = []
  for i in range(256):
    group, byte = i // 32, i % 32
    scale, least = sixes(b, group)
    number = int(b[quants + group // 2 * 32 + byte]) >> 4 * (group % 2) & 15
    if fifths is not None:
      number |= (int(b[fifths + byte]) >> group & 1) << 4
    out.append(half(b, 0) * scale * number - half(b, 2) * least)
  return out


def q6_k(b):
  out = []
  for i in range(256):
    part, quarter, byte = i // 128, i % 128 // 32, i % 32
    low = int(b[64 * part + 32 * (quarter % 2) + byte]) >> 4 * (quarter // 2)
    high = int(b[128 + 32 * part + byte]) >> 2 * quarter & 3
    six = (low & 15 | high << 4) - 32
    out.append(half(b, 208) * int(np.int8(b[192 + i // 16])) * six)
  return out


SLOW = {  # kind -> numbers of one block, and where its float16 numbers lie
  'Q8_0': (q8_0, (0,)),
  'Q4_0': (q4_0, (0,)),
  'Q4_1': (q4_1, (0, 2)),
  'Q5_0': (q5_0, (0,)),
  'Q5_1': (q5_1, (0, 2)),
  'Q2_K': (q2_k, (80, 82)),
  'Q3_K': (q3_k, (108,)),
  'Q4_K': (lambda b: q45_k(b, 16), (0, 2)),
  'Q5_K': (lambda b: q45_k(b, 48, 16), (0, 2)),
  'Q6_K': (q6_k, (208,)),
}
PLAIN = {
  'F32': lambda b: np.frombuffer(b, '<f4'),
  'F16': lambda b: np.frombuffer(b, '<f2').astype(np.float32),
  'BF16': lambda b: (np.frombuffer(b, '<u2').astype(np.uint32) << 16).view(
    np.float32
  ),
}


def packed(kind, rows, row):
  """Rows of random blocks whose float16 scales are near one."""
  number = gguf.GGMLQuantizationType[kind]
  width, size = gguf.GGML_QUANT_SIZES[number]
  draw = np.random.default_rng(0)
  if kind in PLAIN:
    wave = draw.normal(size=(*rows, row)).astype(np.float32)
    return gguf.quants.quantize(wave, number).view(np.uint8)
  blocks = draw.integers(0, 256, (*rows, row // width, size), np.uint8)
  for at in SLOW[kind][1]:
    scales = draw.uniform(0.5, 2.0, blocks.shape[:-1]).astype('<f2')
    blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
  return blocks.reshape(*rows, -1)


def by_hand(kind, data):
  if kind in PLAIN:
    return PLAIN[kind](data.tobytes()).reshape(*data.shape[:-1], -1)
  size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
  blocks = data.reshape(-1, size)
  numbers = np.array([SLOW[kind][0](block) for block in blocks], np.float32)
  return numbers.reshape(*data.shape[:-1], -1)


def rows_of(path, name='x'):
  return gguf_file.Rows(gguf_header.read(path)[1][name])


@pytest.mark.parametrize('kind', gguf_file.KINDS)
def test_every_packing_by_hand(tmp_path, kind):
  data = packed(kind, (3,), 512)
  number = gguf.GGMLQuantizationType[kind]
  tiny_gguf.write(tmp_path / 'x.gguf', {'x': (data, number)})
  rows = rows_of(tmp_path / 'x.gguf')
  assert rows.shape == (3, 512)
  got = rows[:]
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, by_hand(kind, data), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize('kind', ['F32', 'Q4_K'])
@pytest.mark.parametrize(
  'index',
  [
    (),
    (slice(1, 2),),
    (slice(0, 2), slice(2, 3), slice(5, 300)),
    (slice(None), slice(None), slice(0, 1)),
    (1, slice(None, None, 2)),
  ],
  ids=str,
)
def test_slices_of_experts(tmp_path, kind, index):
  data = packed(kind, (2, 4), 512)
  number = gguf.GGMLQuantizationType[kind]
  tiny_gguf.write(tmp_path / 'x.gguf', {'x': (data, number)})
  rows = rows_of(tmp_path / 'x.gguf')
  np.testing.assert_array_equal(rows[index], rows[:][index])


def test_only_the_rows_asked_for_are_unpacked(tmp_path, monkeypatch):
  data = packed('Q8_0', (64,), 32)
  kind = gguf.GGMLQuantizationType.Q8_0
  tiny_gguf.write(tmp_path / 'x.gguf', {'x': (data, kind)})
  seen = []
  unpack = gguf.quants.dequantize
  spy = lambda data, kind: seen.append(data.shape) or unpack(data, kind)
  monkeypatch.setattr(gguf.quants, 'dequantize', spy)
  assert rows_of(tmp_path / 'x.gguf')[4:6, :3].shape == (2, 3)
  assert seen == [(2, 34)]


# What llama.cpp's converter does to weights, undone.


def permuted(array, heads):
  """As llama.cpp's converter: the halves of a head become pairs."""
  halves = array.reshape(heads, 2, -1, *array.shape[1:])
  return halves.swapaxes(1, 2).reshape(array.shape)


@pytest.mark.parametrize('shape', [(24, 5), (24,)])
@pytest.mark.parametrize('index', [slice(None), slice(3, 17), (slice(9, 10),)])
def test_rows_of_queries_are_put_back(tmp_path, shape, index):
  want = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
  tiny_gguf.write(tmp_path / 'x.gguf', {'x': permuted(want, 3)})
  tensor = gguf_header.read(tmp_path / 'x.gguf')[1]['x']
  rows = gguf_file.Rows(tensor, order=gguf_file.unpaired(24, 3))
  np.testing.assert_array_equal(rows[index], want[index])


@pytest.mark.parametrize('architecture', ['llama', 'qwen2'])
def test_model_of_a_file_is_the_model(tmp_path, architecture):
  weights = tiny_gguf.weights()
  given = dict(weights)
  if architecture == 'llama':
    for name, heads in (('q', 2), ('k', 1)):
      name = f'blk.0.attn_{name}.weight'
      given[name] = permuted(weights[name], heads)
  else:
    for name, size in (('q', 8), ('k', 4), ('v', 4)):
      bias = np.arange(size, dtype=np.float32)
      given[f'blk.0.attn_{name}.bias'] = bias
  tiny_gguf.write(tmp_path / 'x.gguf', given, architecture)
  model = models.load(tmp_path / 'x.gguf')
  attn = model.variables['params']['layers']['attn']
  for name in 'qkv':
    want = weights[f'blk.0.attn_{name}.weight']
    np.testing.assert_array_equal(attn[name]['kernel'][0], want)
  assert model.template == '{{ messages }}'
  assert model.special == {'bos': '<s>', 'eos': '</s>'}
  assert model.tokenizer.encode('he').ids == [258]


@pytest.mark.parametrize('name', ['output_norm.weight', 'token_embd.weight'])
@pytest.mark.parametrize('architecture', ['gemma3', 'llama'])
def test_norms_of_gemma_hold_one_more(tmp_path, architecture, name):
  weights = tiny_gguf.weights()
  tiny_gguf.write(tmp_path / 'x.gguf', weights, architecture)
  metadata, tensors = gguf_header.read(tmp_path / 'x.gguf')
  rows = gguf_file.rows(name, tensors[name], None, metadata)
  shift = architecture == 'gemma3' and name == 'output_norm.weight'
  want = weights[name] - 1 if shift else weights[name]
  np.testing.assert_array_equal(rows[:], want)


# Headers.


def test_header_is_that_of_the_package(gguf_path):
  reader = gguf.GGUFReader(gguf_path)
  metadata, tensors = gguf_header.read(gguf_path)
  fields = {k: v for k, v in reader.fields.items() if k[:5] != 'GGUF.'}
  assert metadata == {k: v.contents() for k, v in fields.items()}
  assert list(tensors) == [tensor.name for tensor in reader.tensors]
  for tensor in reader.tensors[::20]:
    ours = tensors[tensor.name]
    assert ours.shape == tuple(tensor.shape[::-1].tolist())
    assert ours.kind == tensor.tensor_type
    assert ours.data.tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize(
  'value', ['é', 7, 0.5, True, [1, 2], ['a', 'é'], [0.5], [True, False]]
)
def test_values_of_metadata(tmp_path, value):
  tiny_gguf.write(tmp_path / 'x.gguf', {}, some=value)
  assert gguf_header.read(tmp_path / 'x.gguf')[0]['some'] == value


def pair(key, kind, value):
  key = key.encode()
  return struct.pack('<Q', len(key)) + key + struct.pack('<I', kind) + value


def tensor(name, axes, kind=0, offset=0):
  name = name.encode()
  head = struct.pack('<Q', len(name)) + name + struct.pack('<I', len(axes))
  tail = struct.pack('<IQ', kind, offset)
  return head + struct.pack(f'<{len(axes)}Q', *axes) + tail


def header(pairs=(), tensors=(), version=3, counts=None, rest=bytes(128)):
  counts = counts or (len(tensors), len(pairs))
  start = b'GGUF' + struct.pack('<IQQ', version, *counts)
  return start + b''.join(pairs) + b''.join(tensors) + rest


HUGE = 2**61
ONE = struct.pack('<I', 1)


@pytest.mark.parametrize(
  ('file', 'said'),
  [
    (b'GGUF', 'announces 4 bytes'),
    (header(version=1), 'its version is 1'),
    (header(version=1 << 24), 'its version is 16777216'),
    (header(counts=(0, HUGE)), 'pairs of metadata'),
    (header(counts=(HUGE, 0)), 'tensors'),
    (header([pair('a', 4, ONE)] * 2), "the key 'a' is there twice"),
    (header([pair('a', 13, ONE)]), "'a' has a value of the unknown type 13"),
    (header([pair('a', 9, struct.pack('<IQ', 9, 1))]), 'unknown type 9'),
    (header([pair('a', 9, struct.pack('<IQ', 8, HUGE))]), "strings of 'a'"),
    (header([pair('a', 9, struct.pack('<IQ', 10, HUGE))]), 'bytes at byte'),
    (header([pair('a', 8, struct.pack('<Q', HUGE))]), 'bytes at byte'),
    (header([pair('a', 8, struct.pack('<Q', 1) + b'\xff')]), "can't decode"),
    (header([pair('general.alignment', 4, bytes(4))]), 'alignment 0 is no'),
    (
      header([pair('general.alignment', 4, struct.pack('<I', 24))]),
      'alignment 24 is no power',
    ),
    (header([pair('general.alignment', 8, bytes(8))]), "alignment '' is no"),
    (header(tensors=[tensor('x', [4])] * 2), "tensor 'x' is there twice"),
    (header(tensors=[tensor('x', [4], offset=8)]), 'no multiple of 32'),
    (header(tensors=[tensor('x', [4], offset=1 << 63)]), 'ends at byte'),
    (header(tensors=[tensor('x', [HUGE, HUGE])]), 'ends at byte'),
    (header(tensors=[tensor('x', [1 << 32, 1 << 32, 0])]), 'no whole blocks'),
    (header(tensors=[tensor('x', [33], 8)]), 'no whole blocks of 32'),
    (header(tensors=[tensor('x', [1] * 5)]), '5 axes, not 1 to 4'),
    (header(tensors=[tensor('x', [])]), '0 axes'),
    (header(tensors=[tensor('x', [4], 4)]), 'unknown type 4'),
    (header(tensors=[tensor('x', [999])]), 'ends at byte'),
  ],
  ids=lambda x: x if isinstance(x, str) else '',
)
def test_damaged_headers(tmp_path, file, said):
  (tmp_path / 'x.gguf').write_bytes(file)
  with pytest.raises(models.CheckpointError, match=said) as error:
    gguf_file.read(tmp_path / 'x.gguf')
  assert 'x.gguf ends early or is damaged' in str(error.value)
  assert 'fetch it again' in str(error.value)


def test_last_byte_counts(tmp_path):
  start = header(tensors=[tensor('x', [4])], rest=b'')
  start += bytes(-len(start) % 32)
  (tmp_path / 'x.gguf').write_bytes(start + bytes(16))
  assert gguf_header.read(tmp_path / 'x.gguf')[1]['x'].shape == (4,)
  (tmp_path / 'x.gguf').write_bytes(start + bytes(15))
  with pytest.raises(models.CheckpointError, match="'x' .4,. ends at byte"):
    gguf_header.read(tmp_path / 'x.gguf')


def test_empty_file(tmp_path):
  (tmp_path / 'x.gguf').write_bytes(b'')
  with pytest.raises(models.CheckpointError, match='not a GGUF file'):
    gguf_file.read(tmp_path / 'x.gguf')


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'split.count': 3}, 'one of 3 parts.*--merge'),
    ({'tokenizer.chat_template': 7}, 'chat_template is 7, not a text'),
  ],
  ids=['split', 'template'],
)
def test_files_that_are_not_read(tmp_path, changes, said):
  tiny_gguf.write(tmp_path / 'x.gguf', **changes)
  with pytest.raises(models.CheckpointError, match=said):
    gguf_file.read(tmp_path / 'x.gguf')


def test_packings_that_are_not_read(tmp_path):
  kind = gguf.GGMLQuantizationType.IQ4_NL
  data = np.zeros((2, 18), np.uint8)
  tiny_gguf.write(tmp_path / 'x.gguf', {'x': (data, kind)})
  with pytest.raises(models.CheckpointError, match='tensors of IQ4_NL; read'):
    gguf_file.read(tmp_path / 'x.gguf')
