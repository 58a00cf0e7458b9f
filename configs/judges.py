"""Whether judges can be believed: each on lines with known labels."""

from persona_jax import main


def get_config(arg: str = 'laptop'):
  """`laptop` for two CPU cores, minutes a judge; `full` for one GPU."""
  c = main.load_config('study')
  with c.unlocked():
    c.name = f'judges:{arg}'
    c.jury = dict(
      names='trained,likelihood,likelihood_alone,likelihood_others,verdict,shortness',
      adapter='',  # of `trained`, a folder of PEFT; '': the one that ships
      entailment='',  # an NLI cross-encoder, by path or as hf:org/name
      contradiction='',  # its label of that meaning, by number; '': by name
      server='',  # url of a judge that speaks OpenAI's protocol, up to /v1
      server_model='',
      server_key='',  # the environment variable that holds its API key
      labels='',  # JSON lines of one's own; '': the test set that ships
      released='',  # dialogue files of consistent-LLMs, in one's own clone
      examples=0,  # of those, at most; 0: all
      calibration=150,  # dialogues, of other kinds of fact
      alarms=0.1,  # share of their neutral lines that a threshold may give up
    )
    c.rollout.batch = 8  # dialogues of a pass
  if arg == 'full':
    with c.unlocked():
      c.dtype = 'bfloat16'
      c.rollout.batch = 128
      c.jury.calibration = 2000
  elif arg != 'laptop':
    raise ValueError(
      f'judges:{arg} is no size; give judges:laptop or judges:full.'
    )
  return c.lock()
