#!/usr/bin/env bash
# Installs into .venv and runs the loop on this machine, from nothing to M3.
#
#   launch/local.sh                                  the demo
#   launch/local.sh --workdir=runs/a --dry_run       arguments go to selfreward_jax.main
#
# Without --config it is --config=configs/m3.py:demo. Relative paths are from the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ! -x .venv/bin/python ]]; then
  for candidate in python3.12 python3.11 python3 python; do
    # Run it: a version manager's shim can be on PATH without a Python behind it.
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      "$candidate" -m venv .venv
      break
    fi
  done
  if [[ ! -x .venv/bin/python ]]; then
    echo "launch/local.sh: Python 3.11 or 3.12 is needed, and none is on PATH" >&2
    exit 2
  fi
fi

if [[ setup.py -nt .venv/.installed ]]; then
  .venv/bin/python -m pip install --quiet --editable .
  touch .venv/.installed
fi

case " $*" in
  *" --config="* | *" --config "*) ;;
  *) set -- --config=configs/m3.py:demo "$@" ;;
esac
# glibc gives a step's gigabytes back to Linux after each; in huge pages they return at a tenth of the cost, 8 % of a step.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec .venv/bin/python -m selfreward_jax.main "$@"
