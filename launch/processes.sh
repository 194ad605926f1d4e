#!/usr/bin/env bash
# Runs one job as several processes on this machine, as a pod slice runs it on several hosts.
#
#   launch/processes.sh 2 --config=configs/m3.py:tiny --workdir=runs/two
#
# The first argument is the number of processes, the rest goes to selfreward_jax.main. On a CPU each has $DEVICES virtual
# devices (4); the GPUs of a machine are dealt out evenly. Process 0 speaks, the others write to $LOGS/process-N.log
# (a temporary folder). When one dies the others are stopped, and the exit code is not 0.
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
stop() {
  ((${#pids[@]})) && kill -"$1" "${pids[@]}" 2>/dev/null
}
trap 'stop INT; wait; exit 130' INT
trap 'stop TERM; wait; exit 143' TERM

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
    "${command[@]}" 2> >(tee "$logs/process-0.log" >&2) &
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
    stop TERM
    wait
    # 2 is a mistake that process 0 has explained; anything else is a death.
    ((code == 2)) || echo "process $index of $count ended with code $code, the others were stopped; its last lines are in" \
      "$logs/process-$index.log; start again to go on from there" >&2
    exit "$code"
  fi
  unset "pids[$index]"
done
