#!/usr/bin/env bash
# On a worker, from its copy of llmtune: mount the shared disk, make the environment. install.sh calls it.
#
#   worker/install.sh HOST:/PATH
set -euo pipefail
cd "$(dirname "$0")/../.."

if ! mountpoint -q /shared; then
  sudo apt-get -qq update
  sudo DEBIAN_FRONTEND=noninteractive apt-get -qq install -y nfs-common
  sudo mkdir -p /shared
  sudo mount -t nfs -o hard,nofail "$1" /shared
  sudo chmod 1777 /shared
fi

[[ -x ~/.local/bin/uv ]] || curl -LsSf https://astral.sh/uv/install.sh | sh # the images' own Python is too old
~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv
grep -v '^libtpu=' constraints/python3.12.txt >constraints/worker.txt # jax[tpu] says which libtpu it is for
~/.local/bin/uv pip install --quiet --python .venv/bin/python -c constraints/worker.txt '.[tpu]'
.venv/bin/llmtune --version
