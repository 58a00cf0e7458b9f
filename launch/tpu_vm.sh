#!/bin/bash
# A run on all hosts of a TPU VM slice, from your own machine:
#
#   launch/tpu_vm.sh NAME ZONE train --distributed --config=study:full \
#     --workdir=bucket/runs/one [words of persona-jax]
#
# Installs this checkout's last commit on every host, in ~/persona-jax, and
# starts the run, which goes on if the connection is lost. The log of the first
# host is shown; Ctrl-C leaves the log, not the run. The same command again goes
# on from the last checkpoint, after a preemption too.
#   REF=v0.1.0     another commit of this checkout
#   PROJECT=mine   another project than gcloud's
#   BUCKET=mine    mounted as ~/persona-jax/bucket. The hosts share no disk, and
#                  a workdir is shared. Give it a hierarchical namespace, so
#                  that a folder is renamed at once
#
# To end it, saved:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
#     --command='kill -TERM $(cat persona-jax/pid)'

# shellcheck disable=SC2016  # what stands in '...' is read by the hosts
set -eu
if [ $# -lt 3 ]; then
  echo 'usage: [REF=...] [BUCKET=...] launch/tpu_vm.sh NAME ZONE' \
    'train --distributed --workdir=bucket/DIR [...]' >&2
  exit 2
fi
name=$1 zone=$2
shift 2
at=(--zone="$zone" ${PROJECT:+--project="$PROJECT"})
hosts() {
  gcloud compute tpus tpu-vm ssh "$name" "${at[@]}" --worker="$1" \
    --command="set -e; mkdir -p persona-jax; cd persona-jax; $2"
}

sources=$(mktemp -d)
trap 'rm -r "$sources"' EXIT
git -C "$(dirname "$0")/.." archive --prefix=persona_jax/ --format=tar.gz \
  --output="$sources/persona_jax.tar.gz" "${REF:-HEAD}"

hosts all '
if [ -f pid ] && kill -0 "$(cat pid)" 2> /dev/null; then
  echo "$(hostname): a run is on; end it first." >&2
  exit 1
fi'
gcloud compute tpus tpu-vm scp "$sources/persona_jax.tar.gz" \
  "$name:persona-jax/" "${at[@]}" --worker=all
hosts all '  # uv, for the Python of an image may be too old
[ -d uv ] || python3 -m pip install --quiet --target=uv uv
[ -d env ] || uv/bin/uv venv --quiet --python=">=3.11" env
uv/bin/uv pip install --quiet --python=env/bin/python \
  --reinstall-package=persona-jax "./persona_jax.tar.gz[data,hf,tpu]"'
if [ -n "${BUCKET:-}" ]; then
  hosts all "bucket=$(printf %q "$BUCKET")"'
if ! command -v gcsfuse > /dev/null; then
  from=https://packages.cloud.google.com/apt
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsS "$from/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
  echo "deb [signed-by=$key] $from gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  sudo apt-get -qq update
  sudo apt-get -qq install gcsfuse
fi
mkdir -p bucket
mountpoint -q bucket ||
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$bucket" bucket'
fi
hosts all "words=($(printf '%q ' "$@"))"'
nohup setsid env/bin/persona-jax "${words[@]}" > log 2>&1 < /dev/null &
echo "$!" > pid'
hosts 0 'tail -n +1 --pid="$(cat pid)" -f log'
