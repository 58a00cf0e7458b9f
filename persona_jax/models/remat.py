"""What a layer keeps for its gradient, by name; the rest is computed again."""

import flax.linen as nn
import jax

TAPS = ('resid', 'attn_out', 'mlp_out', 'attn_weights')


def rematerialised(block: type[nn.Module], remat: str) -> type[nn.Module]:
  """A layer that keeps what `remat` names; see `decoder.functions`.

  Raises:
    ValueError: there is no such way, or no such tap.
  """
  if remat == 'none':
    return block
  return nn.remat(block, prevent_cse=False, policy=_kept(remat))


def _kept(remat: str):
  """As `jax.checkpoint` is told."""
  way, _, names = remat.partition(':')
  names = names.split(',') if names else []
  unknown = [name for name in names if name not in TAPS]
  if unknown or bool(names) != (way in ('save', 'offload')):
    way = None
  if way == 'full':
    return None
  if way == 'dots':
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  if way == 'save':
    return jax.checkpoint_policies.save_only_these_names(*names)
  if way == 'offload':
    return jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=names,
      offload_src='device',
      offload_dst='pinned_host',
    )
  raise ValueError(
    f"remat={remat!r} is unknown; give 'none', 'full', 'dots', or 'save:' or "
    f"'offload:' with some of the taps {TAPS}."
  )
