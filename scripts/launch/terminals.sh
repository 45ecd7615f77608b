#!/usr/bin/env bash
# Several workers by hand: the same command in as many terminals as you like, on any machine that reaches the storage.
# Each joins the study, works until its total is reached, and may be stopped with Ctrl-C at any time.
#
#   scripts/launch/terminals.sh spec.yaml 3       three at once from here, each with a log of its own
#
# On one machine `dfmerge run spec.yaml --workers 3` does the same under one display.
set -euo pipefail
spec=$1 count=${2:-2}
shift $(($# < 2 ? $# : 2))

cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / count > 0 ? cores / count : 1))}
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 1; i <= count; i++)); do
    python -m dfmerge_studies run "$spec" --no-test "$@" >"worker-$i.log" 2>&1 &
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
done
exit "$status"
