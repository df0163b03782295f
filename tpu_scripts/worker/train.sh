#!/usr/bin/env bash
# On a worker: train, and start again after what starting again can mend (the exit codes of docs/reliability.md).
#
#   worker/train.sh CONFIG.yaml [--section.key VALUE ...]
#
#   LLMTUNE_PROCESSES  for --processes; default auto
#   LLMTUNE_STARTS     at most so many starts; default 20
#   LLMTUNE_PAUSE      seconds between two; default 15, in which the others end too
set -uo pipefail

child='' asked=''
trap 'asked=1; [[ -z $child ]] || kill -TERM "$child"' TERM INT

for ((start = 1; start <= ${LLMTUNE_STARTS:-20}; start++)); do
  llmtune train "$@" --processes "${LLMTUNE_PROCESSES:-auto}" &
  child=$!
  [[ -z $asked ]] || kill -TERM "$child"
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the step is saved
    wait "$child"
    code=$?
  done
  child=''
  case $code in
    0 | 2 | 76) break ;;
  esac
  [[ -z $asked ]] || break
  echo "llmtune ended with code $code; start $((start + 1)) follows"
  sleep "${LLMTUNE_PAUSE:-15}"
done
[[ -n $asked ]] || echo "$code" >~/llmtune.exit
exit "$code"
