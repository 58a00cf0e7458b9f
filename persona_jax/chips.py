"""Accelerators and their topologies: what one chip holds, computes and sends.

Numbers are those that the makers print, TPUs: docs.cloud.google.com/tpu/docs
(v5e, v5p, v6e); GPUs: the data sheets of the H100 SXM and the H200 SXM.
"""

import math
import re
from typing import NamedTuple

GIB = 2**30
PRICES = (
  'list prices of a chip-hour in US dollars, from a three-year commitment to '
  'on demand, as remembered in 2026-11 and not looked up: an assumption'
)


class Chip(NamedTuple):
  """One accelerator; numbers of a second are peaks."""

  name: str
  platform: str  # 'tpu' or 'gpu'
  memory: float  # bytes that a program may use
  flops: float  # bfloat16
  bandwidth: float  # bytes of its memory
  network: float  # bytes that it sends, and as many that it receives
  axes: int  # of a topology
  price: tuple[float, float]  # dollars an hour


# Usable memory of a TPU is what its compiler says when a program is too large;
# that of a GPU is what its driver shows. Of a network that the makers count in
# both directions this is one.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v5e', 'tpu', 15.75 * GIB, 197e12, 819e9, 200e9, 2, (0.54, 1.20)),
    Chip('v5p', 'tpu', 95.74 * GIB, 459e12, 2765e9, 600e9, 3, (1.89, 4.20)),
    Chip('v6e', 'tpu', 31.25 * GIB, 918e12, 1638e9, 400e9, 2, (1.22, 2.70)),
    Chip('h100', 'gpu', 78 * GIB, 989e12, 3350e9, 450e9, 1, (2.0, 7.0)),
    Chip('h200', 'gpu', 139 * GIB, 989e12, 4800e9, 450e9, 1, (2.3, 8.0)),
  )
}
NODE = 8  # GPUs that NVLink joins
BETWEEN_NODES = 50e9  # bytes that a GPU sends to another node: 400 Gbit/s
LANES = 128  # numbers that a TPU keeps side by side


class Topology(NamedTuple):
  """Chips and how they lie: 'v5p:4x4x4'."""

  chip: Chip
  shape: tuple[int, ...]

  @property
  def count(self) -> int:
    """The number of chips."""
    return math.prod(self.shape)

  @property
  def network(self) -> float:
    """Bytes a second that a chip sends."""
    if self.chip.platform == 'gpu' and self.count > NODE:
      return BETWEEN_NODES
    return self.chip.network

  def __str__(self):
    return f'{self.chip.name}:{"x".join(map(str, self.shape))}'


def of(kind: str) -> Chip | None:
  """The chip of what JAX calls a device's kind; None where it is not known."""
  for words, name in _KINDS:
    if all(word in kind for word in words):
      return CHIPS[name]
  return None


_KINDS = (  # as jax.Device.device_kind has them
  (('TPU v5 lite',), 'v5e'),
  (('TPU v5e',), 'v5e'),
  (('TPU v5',), 'v5p'),
  (('TPU v6',), 'v6e'),
  (('H100', 'HBM3'), 'h100'),  # the SXM
  (('H200',), 'h200'),
)


def topology(text: str) -> Topology:
  """'v5p:4x4x4' or 'h100:8'.

  Raises:
    ValueError: no such chip, or a shape that it does not come in.
  """
  name, _, shape = text.partition(':')
  if name not in CHIPS:
    raise ValueError(
      f'the topology {text!r} names no chip that is known; write one of '
      f'{", ".join(example(chip) for chip in CHIPS.values())}.'
    )
  chip = CHIPS[name]
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape):
    sizes = ()
  else:
    sizes = tuple(map(int, shape.split('x')))
  if len(sizes) != chip.axes:
    raise ValueError(
      f'the topology {text!r} has no {chip.axes} sizes, as a {name} has; write '
      f'{example(chip)}.'
    )
  return Topology(chip, sizes)


def example(chip: Chip) -> str:
  """A topology of a chip."""
  return f'{chip.name}:{("8", "8x8", "4x4x4")[chip.axes - 1]}'
