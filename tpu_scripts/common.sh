# shellcheck shell=bash
# shellcheck disable=SC2034 # what is set here is used there
# What the scripts of this folder share. They set `name`, `slices` and the rest through `shared_option`, then call `settle`.

name='' zone='' project='' slices=1 queued='' dry_run='' taken=0 where=() nodes=()
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() { # one line: what is wrong, and how to mend it
  printf '%s: error: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "bash 4.4 or newer is needed; this is $BASH_VERSION"

usage() { # the comment at the head of the script that runs
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit 0
}

value() { # OPTION VALUE ...
  [[ $# -ge 2 && $2 != --* ]] || die "$1 needs a value; --help says which"
  printf '%s' "$2"
}

shared_option() { # ARGUMENTS: takes the first one, or an option with its value; `taken` of them
  taken=2
  case $1 in
    --zone) zone=$(value "$@") ;;
    --project) project=$(value "$@") ;;
    --slices) slices=$(value "$@") ;;
    --queued) queued=1 taken=1 ;;
    --dry-run) dry_run=1 taken=1 ;;
    -h | --help) usage ;;
    -*) die "unknown option $1; --help lists them" ;;
    *)
      [[ -z $name ]] || die "$1: there is a NAME already, $name; --help shows the order"
      name=$1 taken=1
      ;;
  esac
}

settle() { # checks what was given; `nodes`: the slices by name, `where`: what tells gcloud the place
  [[ -n $name ]] || die "no NAME was given; --help shows what comes where"
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || die "NAME $name: small letters, digits and - only, a letter first"
  [[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices $slices: give how many, 1 or more"
  [[ -n $dry_run ]] || command -v gcloud >/dev/null || die "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
  where=(${zone:+--zone "$zone"} ${project:+--project "$project"})
  nodes=("$name")
  if ((slices > 1)); then # several slices come from the queue alone, which names them so
    queued=1 nodes=()
    for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
  fi
}

only_shared() { # ARGUMENTS: of a script that has no options of its own
  while (($#)); do
    shared_option "$@"
    shift "$taken"
  done
  settle
}

show() { # COMMAND ...: as it could be typed
  local words
  printf -v words '%q ' "$@"
  printf '%s\n' "${words% }"
}

run() { # COMMAND ...: shown, and carried out but for --dry-run
  show "$@"
  [[ -n $dry_run ]] || "$@"
}

everywhere() { # COMMAND-LINE: on all workers of all slices at once; fails where one of them fails
  local node pid pids=()
  for node in "${nodes[@]}"; do
    show gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker all --command "$1"
    [[ -n $dry_run ]] && continue
    gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker all --command "$1" &
    pids+=("$!")
  done
  for pid in "${pids[@]}"; do wait "$pid"; done
}

to_everywhere() { # FILE DESTINATION: onto all workers of all slices
  local node
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$1" "$node:$2" "${where[@]}" --worker all
  done
}

quoted() { # WORDS ...: as one string that a remote shell takes apart into the same words
  local words=''
  (($#)) && printf -v words '%q ' "$@"
  printf '%s' "${words% }"
}
