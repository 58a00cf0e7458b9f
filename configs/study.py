"""The study: persona space, drift, RL, capping, and the answer."""

import ml_collections


def get_config(arg: str = 'laptop'):
  """`laptop` for two CPU cores, `full` for one GPU, `tiny` for tests."""
  c = ml_collections.ConfigDict()
  c.name = f'study:{arg}'
  c.model = 'smollm2-135m'
  c.context = 0  # slots of the longest conversation, for LongRoPE; 0: short
  c.inert = ''  # unknown fields of config.json that change nothing: 'a,b'
  c.dtype = 'float32'
  c.mesh = ''  # of the learner, as 'fsdp=4,tensor=2'; '': all on fsdp
  c.attend = ''  # how attention is computed; '': as is best on the backend
  c.seed = 0
  c.today = '2026-01-01'  # for chat templates that write a date
  c.space = dict(
    roles=64,
    prompts=1,  # of the two that each archetype has
    questions=3,  # a prompt
    default_questions=6,  # under each of the five default prompts
    tokens=24,  # longest reply
  )
  c.rollout = dict(
    batch=12,  # rows of every program
    lines=6,  # of both speakers, the opening included
    tokens=26,  # longest line; the longest opening that ships has 26
    prompt_tokens=112,  # longest prompt that ships has 105
    temperature=0.8,
  )
  c.judges = dict(lines=72, pairs=36)  # labelled ones to score
  c.rl = dict(
    algorithm='grpo',  # a row of learn.ALGORITHMS or learn.PREFERENCES
    data='',  # JSON lines for the latter; '': our own pairs
    steps=3,
    lines=4,  # of a training dialogue
    group=4,  # dialogues of one scenario; batch / group scenarios a step
    epochs=1,  # rounds over the dialogues of a step
    minibatches=1,  # updates of a round
    learning_rate=2e-5,
    critic_rate=1e-5,  # of a critic, where the algorithm has one
    process_rate=1e-6,  # of PRIME's reward model
    warmup=0,  # updates over which the rate rises
    decay=False,  # of the rate, towards zero at the end of `steps`
    weight_decay=0.0,
    entropy=0.0,  # weight of a bonus
    truncate=0.0,  # most that learner / sampler may weigh; 0: no correction
    skip=False,  # leave out steps with numbers that are not finite
    remat='full',  # what a layer keeps for its gradient
    share=True,  # read what a group's texts begin with once
    advantage=dict(),  # numbers of the algorithm's advantage, by name
    loss=dict(),  # and of its loss
    max_grad_norm=1.0,
    # rank=0: all parameters; start: a folder of PEFT that they go on from
    adapter=dict(rank=0, alpha=32.0, targets='', start=''),
    microbatches=1,
    held=1 << 24,  # logits that exist at a time, over all devices
    save_every=3,
    rewards=dict(prompt_to_line=1.0, line_to_line=0.5),
    force=False,  # train by a judge that tells nothing apart
  )
  c.cap = dict(
    hold='persona',  # or 'assistant'
    percentile=25.0,  # of the held side; smaller is stronger
    first=0.4,  # of the depth
    last=0.7,
    first_position=1,  # 0 would cap the attention sink too
  )
  c.evaluation = dict(dialogues=12, personas='')  # '': those that ship
  c.capability = dict(questions=24, stretch=64)
  c.controls = dict(random_cap=True, shuffled_rl=False)
  if arg == 'full':
    _full(c)
  elif arg == 'tiny':
    _tiny(c)
  elif arg != 'laptop':
    raise ValueError(
      f'study:{arg} is no size; give study:laptop, study:full or study:tiny.'
    )
  return c.lock()


def _full(c):
  c.dtype = 'bfloat16'
  c.space.update(
    roles=81, prompts=2, questions=12, default_questions=48, tokens=96
  )
  c.rollout.update(batch=128, lines=16, tokens=64)
  c.judges.update(lines=144, pairs=72)
  c.rl.update(
    steps=200,
    lines=16,
    group=8,
    learning_rate=1e-6,
    microbatches=4,
    save_every=20,
  )
  c.evaluation.dialogues = 256
  c.capability.questions = 80
  c.controls.shuffled_rl = True


def _tiny(c):
  c.space.update(roles=4, questions=1, default_questions=1, tokens=4)
  c.rollout.update(batch=4, lines=3, tokens=26)
  c.judges.update(lines=6, pairs=4)
  c.rl.update(steps=2, lines=3, group=2, save_every=1, force=True)
  c.evaluation.dialogues = 4
  c.capability.update(questions=2, stretch=256)
