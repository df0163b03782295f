#!/usr/bin/env bash
# Ask a run to stop: all workers finish the same step and save it. launch.sh takes it up again.
#
#   stop.sh NAME [--slices N]
#
#   --slices N         as create.sh was told
#   --zone, --project  by default those of gcloud config
#   --dry-run          print the commands only
set -euo pipefail
source "$(dirname "$0")/common.sh"

only_shared "$@"

everywhere "kill -TERM \$(cat llmtune.pid)"
