#!/usr/bin/env bash
# Runs one job as several processes on this machine, as a pod slice runs it on several hosts.
#
#   launch/processes.sh 2 --config=configs/m3.py:tiny --workdir=runs/two
#
# The first argument is the number of processes, the rest goes to selfreward_jax.main. On a CPU each has $DEVICES virtual
# devices (4); the GPUs of a machine are dealt out evenly. Process 0 speaks, the others write to $LOGS/process-N.log
# (a temporary folder). When one dies the others are stopped, and the exit code is not 0. Ctrl-C and SIGTERM stop all.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "launch/processes.sh: the first argument is the number of processes" >&2
  exit 2
fi
count=$1
shift
python=.venv/bin/python
[[ -x $python ]] || python=$(command -v python3)
logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
gpus=0
if [[ ${JAX_PLATFORMS:-} != cpu ]] && command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi --list-gpus | wc -l)
fi
if ((gpus % count)); then
  echo "launch/processes.sh: $gpus GPUs can't be dealt out evenly to $count processes" >&2
  exit 2
fi

pids=()
# A child in the background of a script ignores SIGINT, so Ctrl-C is passed on as SIGTERM. One that hangs is killed.
stop() {
  ((${#pids[@]})) || return
  kill -TERM "${pids[@]}" 2>/dev/null
  for ((tenth = 0; tenth < 600; tenth++)); do
    kill -0 "${pids[@]}" 2>/dev/null || return
    sleep 0.1
  done
  kill -KILL "${pids[@]}" 2>/dev/null
}
trap 'stop; exit 130' INT
trap 'stop; exit 143' TERM

for ((index = 0; index < count; index++)); do
  if ((gpus)); then
    each=$((gpus / count))
    CUDA_VISIBLE_DEVICES=$(seq -s, $((index * each)) $((index * each + each - 1)))
    export CUDA_VISIBLE_DEVICES
  else
    export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=${DEVICES:-4}
  fi
  command=("$python" -m selfreward_jax.main "$@" --coordinator=127.0.0.1:"$port" --num_processes="$count" --process_id="$index")
  if ((index)); then
    "${command[@]}" >"$logs/process-$index.log" 2>&1 &
  else
    # Ctrl-C goes to all of the terminal's group: what process 0 says at its end still needs its pipe.
    "${command[@]}" 2> >(trap '' INT TERM && exec tee "$logs/process-0.log" >&2) &
  fi
  pids+=($!)
done

left=$count
while ((left)); do
  wait -n -p ended "${pids[@]}"
  code=$?
  left=$((left - 1))
  for index in "${!pids[@]}"; do
    [[ ${pids[$index]} == "${ended:-}" ]] && break
  done
  if ((code)); then
    unset "pids[$index]"
    stop
    # 2 is a mistake that the process has explained, and process 0 does so here; anything else is a death.
    if ((code == 2)); then
      ((index)) && grep '^error:' "$logs/process-$index.log" >&2
    else
      echo "process $index of $count ended with code $code, the others were stopped; its last lines are in" \
        "$logs/process-$index.log; start again to go on from there" >&2
    fi
    exit "$code"
  fi
  unset "pids[$index]"
done
