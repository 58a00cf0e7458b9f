"""How long a step may take and what it costs: ranges, from what bounds it."""

from typing import Any

from persona_jax import chips, costs
from persona_jax.job import Job

# Shares of a peak that large programs reach, low and high: assumptions. A step
# takes at best its slowest part, at worst all parts one after the other.
REACHED = {
  'compute': (0.35, 0.65),
  'memory': (0.5, 0.9),
  'network': (0.3, 0.8),
}
ABOUT = (
  'from its slowest part at '
  + ', '.join(f'{high:.0%} of {k}' for k, (_, high) in REACHED.items())
  + ' to the sum of all at '
  + ', '.join(f'{low:.0%}' for low, _ in REACHED.values())
)


def train(job: Job, collectives: list[dict] | None) -> dict[str, Any]:
  """Work and time of one update; what is sent is as compiled, or by hand."""
  flops, moved = costs.train_flops(job), costs.train_bytes(job)
  sent = costs.train_sent(job)
  if collectives is not None:
    sent = sum(x['sent'] for x in collectives)
  peak = _at_peak(job, flops['program'], moved, sent)
  return {
    'flops_model': flops['model'],
    'flops': flops['program'],
    'moved': moved,
    'sent': sent,
    **_range(peak, peak),
  }


def talk(job: Job, collectives: list[dict] | None) -> dict[str, Any]:
  """Work and time of a rollout whose lines have their full length.

  At best one speaker speaks in each step, at worst both do. Collectives of a
  speaker's read lie in three open loops, those of its step in two.
  """
  work = costs.talk(job)
  each = 2 * costs.step_sent(job)  # by hand, of both speakers
  sent = {'step': each, 'read': each * work.read / job.batch}
  if collectives is not None:
    sent = dict.fromkeys(sent, 0.0)
  for one in collectives or ():
    sent['read' if one['open'] > 2 else 'step'] += one['sent']
  moved = costs.talk_bytes(job)
  logits = 2.0 * job.batch * job.config.vocab * job.config.features

  def total(speakers):
    steps, reads = work.steps, work.reads
    flops = work.flops_step * speakers + logits * (2 - speakers)
    return {
      'flops': steps * flops + reads * work.flops_read,
      'moved': (steps * speakers + reads) * moved,
      'sent': (steps * sent['step'] + reads * sent['read']) * speakers / 2,
    }

  one, both = total(1), total(2)
  return {
    **one,
    'flops_model': one['flops'],
    'steps': work.steps,
    'reads': work.reads,
    **_range(_at_peak(job, **one), _at_peak(job, **both)),
  }


def dollars(job: Job, seconds: tuple[float, float]) -> dict[str, Any]:
  """What all chips cost an hour, and a step."""
  hour = tuple(job.place.count * price for price in job.place.chip.price)
  step = tuple(x * time / 3600 for x, time in zip(hour, seconds, strict=True))
  return {'hour': hour, 'step': step, 'about': chips.PRICES}


def _at_peak(job, flops, moved, sent) -> dict[str, float]:
  """Seconds of each part at its peak."""
  place = job.place
  return {
    'compute': flops / place.count / place.chip.flops,
    'memory': moved / place.chip.bandwidth,
    'network': sent / place.network if place.count > 1 else 0.0,
  }


def _range(best, worst) -> dict[str, Any]:
  low = {k: x / REACHED[k][1] for k, x in best.items()}
  high = {k: x / REACHED[k][0] for k, x in worst.items()}
  return {
    'parts': best,
    'bound': max(low, key=low.get),
    'seconds': (max(low.values()), sum(high.values())),
  }
