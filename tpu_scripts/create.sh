#!/usr/bin/env bash
# Create a TPU slice, or several that train one run together, and wait until they are there.
#
#   create.sh NAME --type TYPE [--spot | --reserved] [--queued [--valid-for 6h]] [--slices N]
#
#   --type TYPE        as the cloud calls it: v5litepod-16, v6e-64, v5p-128, v4-32
#   --spot             cheaper, and may be taken away at any time; resume.sh takes the run up again
#   --reserved         out of the project's reservation
#   --queued           wait for room in the queue of TPUs; without it, there is room now or an error
#   --valid-for TIME   with --queued: give up after so long (6h, 30m)
#   --slices N         so many slices, NAME-0, NAME-1, ...; implies --queued
#   --version IMAGE    the VM's image; by default the one that belongs to the type
#   --zone, --project  by default those of gcloud config
#   --dry-run          print the commands only
set -euo pipefail
source "$(dirname "$0")/common.sh"

type='' version='' tier='' valid_for=''
while (($#)); do
  case $1 in
    --type) type=$(value "$@"); shift 2 ;;
    --version) version=$(value "$@"); shift 2 ;;
    --valid-for) valid_for=$(value "$@"); shift 2 ;;
    --spot | --reserved)
      [[ -z $tier ]] || die "$1 and $tier do not go together; keep one"
      tier=$1
      shift ;;
    *) shared_option "$@"; shift "$taken" ;;
  esac
done
settle
[[ -n $type ]] || die "no --type was given, such as v5litepod-16"
[[ -z $valid_for || -n $queued ]] || die "--valid-for is about the queue; add --queued"

if [[ -z $version ]]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    v5e-*) die "--type $type: the cloud says v5litepod-${type#v5e-}" ;;
    *) die "--type $type: its image is not known here; name it with --version" ;;
  esac
fi

if [[ -z $queued ]]; then
  run gcloud compute tpus tpu-vm create "$name" "${where[@]}" --accelerator-type "$type" --version "$version" ${tier:+"$tier"}
  exit
fi

names=(--node-id "$name")
((slices == 1)) || names=(--node-count "$slices" --node-prefix "$name")
run gcloud compute tpus queued-resources create "$name" "${names[@]}" "${where[@]}" --accelerator-type "$type" \
  --runtime-version "$version" ${tier:+"$tier"} ${valid_for:+--valid-until-duration "$valid_for"}

ask=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format 'value(state.state)')
show "${ask[@]}"
state='' last=''
until [[ -n $dry_run || $state == ACTIVE ]]; do
  state=$("${ask[@]}")
  [[ $state == "$last" ]] || echo "$name: $state"
  last=$state
  case $state in
    ACTIVE) ;;
    FAILED | SUSPENDED) die "$name is $state: delete.sh $name --queued, and try another zone or type" ;;
    *) sleep 30 ;;
  esac
done
