#!/usr/bin/env bash
# Show what a worker says, from its last 100 lines on, until Ctrl-C. Worker 0 of the first slice has the progress.
#
#   logs.sh NAME [--worker I] [--slices N [--slice S]]
#
#   --worker I         of the slice, from 0
#   --slice S          of several, from 0
#   --zone, --project  by default those of gcloud config
#   --dry-run          print the commands only
set -euo pipefail
source "$(dirname "$0")/common.sh"

worker=0 slice=0
while (($#)); do
  case $1 in
    --worker) worker=$(value "$@"); shift 2 ;;
    --slice) slice=$(value "$@"); shift 2 ;;
    *) shared_option "$@"; shift "$taken" ;;
  esac
done
settle
[[ $worker =~ ^[0-9]+$ ]] || die "--worker $worker: give a number, from 0"
if [[ ! $slice =~ ^[0-9]+$ ]] || ((slice >= slices)); then
  die "--slice $slice: there are $slices, counted from 0"
fi

run gcloud compute tpus tpu-vm ssh "${nodes[slice]}" "${where[@]}" --worker "$worker" --command 'tail -n 100 -F llmtune.log'
