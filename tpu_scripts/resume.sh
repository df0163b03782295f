#!/usr/bin/env bash
# Watch over a run on spot TPUs until it is finished: where they were taken away, get new ones and go on.
#
#   resume.sh NAME --type TYPE --share HOST:/PATH [options of create.sh] -- CONFIG.yaml [--section.key VALUE ...]
#
#   --type, --share    and all else as create.sh and install.sh were told
#   --every SECONDS    between two looks; default 60
#   --zone, --project  by default those of gcloud config
#   --dry-run          print what one round after a preemption does
set -euo pipefail
source "$(dirname "$0")/common.sh"

share='' every=60 create=()
while (($#)); do
  case $1 in
    --) break ;;
    --share) share=$(value "$@"); shift 2 ;;
    --every) every=$(value "$@"); shift 2 ;;
    --type | --version | --valid-for)
      given=$(value "$@") # not within the parentheses, where its failure would be lost
      create+=("$1" "$given")
      shift 2 ;;
    --spot | --reserved) create+=("$1"); shift ;;
    *) shared_option "$@"; shift "$taken" ;;
  esac
done
settle
(($# >= 2)) || die "no CONFIG.yaml was given; it comes after --"
[[ $every =~ ^[1-9][0-9]*$ ]] || die "--every $every: give seconds, 1 or more"
[[ " ${create[*]} " == *' --type '* ]] || die "no --type was given, such as v5litepod-16"
[[ -n $share ]] || die "no --share was given, which install.sh needs"
same=("$name" "${where[@]}" --slices "$slices" ${dry_run:+--dry-run})

begin_again() {
  "$here/delete.sh" "${same[@]}" ${queued:+--queued} || true # it may be gone already
  "$here/create.sh" "${same[@]}" ${queued:+--queued} "${create[@]}" || return
  "$here/install.sh" "${same[@]}" --share "$share" || return
  "$here/launch.sh" "${same[@]}" "$@"
}

state_of() { # NODE: READY, PREEMPTED, ...; empty where there is none
  gcloud compute tpus tpu-vm describe "$1" "${where[@]}" --format 'value(state)' 2>/dev/null || true
}

exit_code() { # of the run, once it has ended for good; else empty
  gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${where[@]}" --worker 0 --command 'cat llmtune.exit 2>/dev/null' 2>/dev/null || true
}

ask=(gcloud compute tpus tpu-vm describe)
if [[ -n $dry_run ]]; then
  for node in "${nodes[@]}"; do show "${ask[@]}" "$node" "${where[@]}" --format 'value(state)'; done
  begin_again "$@"
  exit
fi
while :; do
  lost=''
  for node in "${nodes[@]}"; do
    state=$(state_of "$node")
    case $state in
      '' | PREEMPTED | TERMINATED | STOPPED) lost="$node is ${state:-gone}" ;;
    esac
  done
  if [[ -n $lost ]]; then
    echo "$lost; getting new ones"
    begin_again "$@" || echo "that did not work; trying again in $every s" >&2
  else
    code=$(exit_code)
    [[ -z $code ]] || { echo "the run ended with code $code"; exit "$code"; }
  fi
  sleep "$every"
done
