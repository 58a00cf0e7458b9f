#!/bin/bash
# Several processes of one run on this machine, for a try without a pod:
#
#   launch/local.sh N train --distributed --workdir=DIR [words of persona-jax]
#
# Process 0 is shown; process 1 writes LOGS/1.log, and so on.
#   DEVICES=4  fake CPU devices in each process; unset: process I has GPU I
#   LOGS=DIR   a new temporary folder otherwise
#   GRACE=30   seconds that the others have to end when one has failed
#
# SIGTERM and SIGINT reach all of them. The status is that of the first to fail.

set -um  # m: a background process takes SIGINT only in a group of its own
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
  echo "usage: launch/local.sh N train --distributed [--workdir=DIR ...]" >&2
  exit 2
fi
n=$1
shift
logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"
if [ -n "${DEVICES:-}" ]; then
  export JAX_PLATFORMS=cpu
  XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES"
  export XLA_FLAGS
fi
port=$(python3 -c '
import socket
with socket.socket() as free:
  free.bind(("127.0.0.1", 0))
  print(free.getsockname()[1])')

declare -A left  # by process id, its rank
pass() {
  [ ${#left[@]} = 0 ] || kill -s "$1" "${!left[@]}" 2>/dev/null
}
told='' late=''
trap 'told=1; pass TERM' TERM HUP
trap 'told=1; pass INT' INT

export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$n
for ((i = 0; i < n; i++)); do
  export JAX_PROCESS_ID=$i
  [ -n "${DEVICES:-}" ] || export JAX_LOCAL_DEVICE_IDS=$i
  if [ "$i" = 0 ]; then
    persona-jax "$@" &
  else
    persona-jax "$@" > "$logs/$i.log" 2>&1 &
  fi
  left[$!]=$i
done
[ "$n" = 1 ] || echo "local.sh: the others write to $logs" >&2

status=0
while [ ${#left[@]} -gt 0 ]; do
  wait -n -p pid "${!left[@]}"
  code=$?
  [ -n "${pid:-}" ] || continue  # a signal came, and was passed on
  rank=${left[$pid]}
  unset "left[$pid]"
  [ "$code" != 0 ] || continue
  echo "local.sh: process $rank ended with status $code" >&2
  [ "$status" = 0 ] || continue
  status=$code
  if [ -z "$told" ]; then
    [ "$rank" = 0 ] || tail -n 20 "$logs/$rank.log" >&2
    pass TERM
  fi
  if [ ${#left[@]} -gt 0 ]; then
    (sleep "${GRACE:-30}" && kill -s KILL "${!left[@]}") > /dev/null 2>&1 &
    late=$!
  fi
done
[ -z "$late" ] || kill -- "-$late" 2>/dev/null
exit "$status"
