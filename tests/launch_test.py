"""The launchers start what they say, pass signals on and end."""

import os
import re
import signal
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import pytest
import yaml

from persona_jax import main

LAUNCH = Path(__file__).parents[1] / 'launch'
SCRIPTS = sorted([*LAUNCH.glob('*.sh'), *LAUNCH.glob('*.sbatch')])
FAKE = f"""#!{sys.executable} -SE
import os, signal, sys, time

def told(which, _):
  os.write(1, b'told %d' % which)  # print may be what is interrupted
  sys.exit(128 + which)

signal.signal(signal.SIGTERM, told)
signal.signal(signal.SIGINT, told)
rank = os.environ['JAX_PROCESS_ID']
if os.environ.get('DEAF') == rank:
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
shown = 'JAX_NUM_PROCESSES', 'JAX_COORDINATOR_ADDRESS', 'XLA_FLAGS'
print(rank, *(os.environ.get(name) for name in shown), sys.argv[1:], flush=True)
if os.environ.get('FAILS') == rank:
  time.sleep(0.3)
  sys.exit(7)
time.sleep(float(os.environ.get('NAP', 0)))
"""


@pytest.fixture
def start(tmp_path):
  """Starts `local.sh` with a fake persona-jax: (process, its logs)."""
  put(tmp_path / 'persona-jax', FAKE)

  def start(*words, **variables):
    path = f'{tmp_path}:{os.environ["PATH"]}'
    logs = tmp_path / 'logs'
    process = subprocess.Popen(
      [LAUNCH / 'local.sh', *words],
      env=os.environ | {'PATH': path, 'LOGS': str(logs)} | variables,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    return process, logs

  # Tests that run in the background are deaf to it, and so would children be.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield start
  signal.signal(signal.SIGINT, before)


def put(path, text):
  """A program at `path`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


def texts(folder, names, word):
  """What the files of a folder say, once each has the word in it."""
  for _ in range(200):
    found = [p.read_text() for n in names if (p := folder / n).exists()]
    if len(found) == len(names) and all(word in text for text in found):
      return found
    time.sleep(0.05)
  raise TimeoutError(f'no {word!r} in {names}: {found}')


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path):
  subprocess.run(['bash', '-n', path], check=True)
  assert path.suffix == '.sbatch' or os.access(path, os.X_OK)


def test_local_starts_every_rank(start):
  process, logs = start('3', 'train', '--distributed', 'a b', DEVICES='2')
  out, _ = process.communicate(timeout=20)
  assert process.returncode == 0
  said = [out, *texts(logs, ['1.log', '2.log'], 'train')]
  flags = '--xla_force_host_platform_device_count=2'
  ranks, addresses = [], set()
  for text in said:
    rank, count, address, rest = text.rstrip().split(' ', 3)
    assert (count, rest) == ('3', f"{flags} ['train', '--distributed', 'a b']")
    ranks.append(rank)
    addresses.add(address)
  assert ranks == ['0', '1', '2']
  assert re.fullmatch(r'127\.0\.0\.1:\d+', addresses.pop()) and not addresses


@pytest.mark.parametrize('which', [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on(start, which):
  process, logs = start('2', 'train', NAP='30')
  process.stdout.readline()  # process 0 is there
  texts(logs, ['1.log'], 'train')
  process.send_signal(which)
  out, _ = process.communicate(timeout=20)
  assert process.returncode == 128 + which
  assert f'told {which}' in out
  assert f'told {which}' in (logs / '1.log').read_text()


def test_local_ends_all_when_one_fails(start):
  process, _ = start('3', 'train', FAILS='1', DEAF='2', NAP='30', GRACE='1')
  out, err = process.communicate(timeout=20)
  assert process.returncode == 7
  assert f'told {signal.SIGTERM}' in out
  assert 'process 1 ended with status 7' in err
  assert 'process 2 ended with status 137' in err  # it heard nothing


def test_local_wants_a_number(start):
  process, _ = start('train')
  assert 'usage' in process.communicate()[1]
  assert process.returncode == 2


@pytest.mark.parametrize('status', [0, 1, 143])
def test_slurm_queues_again_what_was_told_to_end(tmp_path, status):
  put(tmp_path / 'srun', f'#!/bin/bash\necho "srun $*"\nexit {status}\n')
  put(tmp_path / 'scontrol', '#!/bin/bash\necho "scontrol $*"\n')
  ran = subprocess.run(
    ['bash', LAUNCH / 'slurm.sbatch', 'train', '--distributed', 'a b'],
    env=os.environ
    | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
    | {'SLURM_JOB_ID': '5', 'SLURM_CPUS_PER_TASK': '8'},
    capture_output=True,
    text=True,
  )
  assert ran.returncode == status
  assert 'persona-jax train --distributed a b\n' in ran.stdout
  assert ('scontrol requeue 5' in ran.stdout) == (status == 143)


def test_slurm_tells_tasks_and_not_the_shell():
  text = (LAUNCH / 'slurm.sbatch').read_text()
  assert re.search(r'^#SBATCH --signal=TERM@\d+$', text, re.MULTILINE)
  tasks = re.search(r'^#SBATCH --ntasks-per-node=(\d+)$', text, re.MULTILINE)
  assert f'\n#SBATCH --gpus-per-node={tasks[1]}\n' in text


def test_tpu_vm_starts_a_run_that_outlives_its_shell(tmp_path):
  put(
    tmp_path / 'gcloud',
    '#!/bin/bash\nprintf "%s\\0" "$@" > "$(mktemp "$TOLD/XXXXXX")"\n',
  )
  told, host = tmp_path / 'told', tmp_path / 'host'
  told.mkdir()
  words = ['train', '--distributed', '--workdir=bucket/it\'s "one"']
  subprocess.run(
    [LAUNCH / 'tpu_vm.sh', 'slice', 'zone-a', *words],
    env=os.environ
    | {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'TOLD': str(told)}
    | {'BUCKET': 'mine'},
    check=True,
  )
  calls = sorted(told.iterdir(), key=lambda path: path.stat().st_mtime_ns)
  calls = [path.read_text().split('\0')[:-1] for path in calls]
  assert [call[3] for call in calls] == ['ssh', 'scp'] + ['ssh'] * 4
  assert all('--zone=zone-a' in call for call in calls)
  commands = [call[-1].removeprefix('--command=') for call in calls]
  for command in commands[:1] + commands[2:]:
    subprocess.run(['bash', '-n', '-c', command], check=True)

  folder = host / 'persona-jax'
  put(
    folder / 'env' / 'bin' / 'persona-jax',
    '#!/bin/bash\nprintf "%s\\n" "$@"\nexec sleep 30\n',
  )
  here = {'cwd': host, 'capture_output': True}
  subprocess.run(['bash', '-c', commands[4]], **here, check=True, timeout=5)
  [log] = texts(folder, ['log'], words[-1])
  assert log.splitlines() == words
  again = subprocess.run(['bash', '-c', commands[0]], **here)
  assert again.returncode == 1 and b'a run is on' in again.stderr
  os.kill(int((folder / 'pid').read_text()), signal.SIGTERM)


def test_gke_starts_what_exists():
  jobset = yaml.safe_load((LAUNCH / 'gke.yaml').read_text())
  name, spec = jobset['metadata']['name'], jobset['spec']
  [job] = spec['replicatedJobs']
  hosts = job['template']['spec']
  pod = hosts['template']['spec']
  [container] = pod['containers']
  assert container['command'] == ['persona-jax']
  program, *words = container['args']
  _, options = main.PROGRAMS[program].parse(words)
  assert options['distributed']

  chips = container['resources']['limits']['google.com/tpu']
  shape = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
  assert chips * hosts['parallelism'] == prod(map(int, shape.split('x')))
  env = {each['name']: each.get('value') for each in container['env']}
  assert hosts['parallelism'] == hosts['completions']
  assert env['JAX_NUM_PROCESSES'] == str(hosts['parallelism'])
  first = f'{name}-{job["name"]}-0-0.{spec["network"]["subdomain"]}'
  port = container['ports'][0]['containerPort']
  assert env['JAX_COORDINATOR_ADDRESS'] == f'{first}:{port}'
  assert 'JAX_PROCESS_ID' in env

  [mount] = container['volumeMounts']
  assert options['workdir'].startswith(mount['mountPath'])
  [saved, taken] = hosts['podFailurePolicy']['rules']
  assert saved['onExitCodes']['values'] == [128 + signal.SIGTERM]
  assert saved['onExitCodes']['containerName'] == container['name']
  assert {saved['action'], taken['action']} == {'FailJob'}
