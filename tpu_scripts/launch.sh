#!/usr/bin/env bash
# Start a run on all workers, in the background; the same command again resumes it. Each worker writes llmtune.log.
#
#   launch.sh NAME [--slices N] [--dry-run] -- CONFIG.yaml [--section.key VALUE ...]
#
#   CONFIG.yaml        a file here, which is copied; paths in it are relative to /shared
#   --slices N         as create.sh was told
#   --zone, --project  by default those of gcloud config
#   --dry-run          print the commands only
set -euo pipefail
source "$(dirname "$0")/common.sh"

while (($#)); do
  [[ $1 != -- ]] || break
  shared_option "$@"
  shift "$taken"
done
settle
(($# >= 2)) || die "no CONFIG.yaml was given; it comes after --"
config=$2
shift 2
[[ -f $config ]] || die "$config: there is no such file here"

to_everywhere "$config" run.yaml
everywhere "llmtune/tpu_scripts/worker/start.sh${*:+ $(quoted "$@")}"
