#!/usr/bin/env bash
# Bring a run's directory here: exports, report, metrics; not its checkpoints.
#
#   fetch.sh NAME [--checkpoints] [--slices N] RUN DESTINATION
#
#   RUN                the `output` of its configuration, relative to /shared
#   DESTINATION        a folder here, made where there is none
#   --checkpoints      these too
#   --zone, --project  by default those of gcloud config
#   --dry-run          print the commands only
set -euo pipefail
source "$(dirname "$0")/common.sh"

words=() leave_out=(--exclude ./checkpoints)
while (($#)); do
  case $1 in
    --checkpoints) leave_out=(); shift ;;
    -*) shared_option "$@"; shift "$taken" ;;
    *) words+=("$1"); shift ;;
  esac
done
((${#words[@]} == 3)) || die "give NAME, RUN and DESTINATION, in this order; --help says what they are"
name=${words[0]} path=${words[1]} destination=${words[2]}
settle
[[ $path == /* ]] || path=/shared/$path

first=${nodes[0]} archive=llmtune-run.tar.gz
run gcloud compute tpus tpu-vm ssh "$first" "${where[@]}" --worker 0 \
  --command "tar -C $(quoted "$path") -czf $archive $(quoted "${leave_out[@]}") ."
run mkdir -p "$destination"
run gcloud compute tpus tpu-vm scp "$first:$archive" "$destination/$archive" "${where[@]}" --worker 0
run tar -C "$destination" -xzf "$destination/$archive"
run rm "$destination/$archive"
