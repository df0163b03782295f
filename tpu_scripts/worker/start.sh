#!/usr/bin/env bash
# On a worker: start ~/run.yaml in the background. launch.sh calls it, with overrides of the configuration.
#
#   worker/start.sh [--section.key VALUE ...]        llmtune.log, llmtune.pid and llmtune.exit appear at home
set -euo pipefail
cd

if [[ -f llmtune.pid ]] && kill -0 "$(cat llmtune.pid)" 2>/dev/null; then
  echo "start.sh: error: a run is going on here already; stop.sh ends it" >&2
  exit 2
fi
rm -f llmtune.exit
export PATH=$HOME/llmtune/.venv/bin:$PATH
cd /shared
setsid "$HOME/llmtune/tpu_scripts/worker/train.sh" "$HOME/run.yaml" "$@" >>"$HOME/llmtune.log" 2>&1 </dev/null &
echo $! >"$HOME/llmtune.pid"
