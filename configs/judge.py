"""A judge of persona consistency: an adapter of a chat model."""

from persona_jax import main


def get_config(arg: str = 'laptop'):
  """`laptop` for two CPU cores, some hours; `full` for one GPU."""
  c = main.load_config('study')
  with c.unlocked():
    c.name = f'judge:{arg}'
    c.judge = dict(slots=512)  # of a row, which holds several dialogues
    c.rollout.batch = 3  # rows of an update
    c.rl.update(
      algorithm='sft',
      group=1,
      steps=1100,
      learning_rate=5e-4,
      warmup=20,
      decay=True,
      remat='none',
      held=1 << 40,  # there are three logits
      save_every=50,
    )
    c.rl.adapter.update(rank=6, alpha=12.0)
  if arg == 'full':
    with c.unlocked():
      c.dtype = 'bfloat16'
      c.rollout.batch = 64
      c.rl.steps = 1200
  elif arg != 'laptop':
    raise ValueError(
      f'judge:{arg} is no size; give judge:laptop or judge:full.'
    )
  return c.lock()
