#!/usr/bin/env bash
# Delete TPUs; what lies on /shared stays.
#
#   delete.sh NAME [--queued] [--slices N]
#
#   --queued, --slices  as create.sh was told
#   --zone, --project   by default those of gcloud config
#   --dry-run           print the commands only
set -euo pipefail
source "$(dirname "$0")/common.sh"

only_shared "$@"

if [[ -n $queued ]]; then
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
else
  run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
fi
