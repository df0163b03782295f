#!/usr/bin/env bash
# Put llmtune, as the last commit of this checkout has it, onto all workers, and mount the disk that they share.
#
#   install.sh NAME --share HOST:/PATH [--slices N]
#
#   --share HOST:/PATH  an NFS share (Filestore, for one), mounted as /shared: data, models and runs lie there
#   --slices N          as create.sh was told
#   --zone, --project   by default those of gcloud config
#   --dry-run           print the commands only
set -euo pipefail
source "$(dirname "$0")/common.sh"

share=''
while (($#)); do
  case $1 in
    --share) share=$(value "$@"); shift 2 ;;
    *) shared_option "$@"; shift "$taken" ;;
  esac
done
settle
[[ -n $share ]] || die "no --share was given: the workers write one run directory, on a disk that they share"
[[ $share == *:/* ]] || die "--share $share: give HOST:/PATH, such as 10.0.0.2:/share"

archive=llmtune.tar.gz
[[ -n $dry_run ]] || trap 'rm -f "$archive"' EXIT
run git -C "$here/.." archive --format tar.gz --output "$PWD/$archive" HEAD
to_everywhere "$archive" "$archive"
everywhere "rm -rf llmtune && mkdir llmtune && tar -xzf $archive -C llmtune && llmtune/tpu_scripts/worker/install.sh $(quoted "$share")"
