#!/usr/bin/env bash
# The whole road on a Cloud TPU slice: create it, install on every host, run, delete it.
#
#   PROJECT=my-project ZONE=us-east5-a BUCKET=/mnt/disks/runs ./tpu_slice.sh
#
# Needs gcloud, and a disk (Filestore, or Cloud Storage through gcsfuse) mounted at $BUCKET on every
# host, for the run directory, the base checkpoint and the preferences.
set -euo pipefail

: "${PROJECT:?}" "${ZONE:?}" "${BUCKET:?}"
NAME=${NAME:-grm}
TYPE=${TYPE:-v5p-128}                  # 64 chips, v5p:4x4x4 of `grm_jax.plan`
VERSION=${VERSION:-v2-alpha-tpuv5}
REPOSITORY=${REPOSITORY:?the address of your clone}
RECIPE=${RECIPE:-spct.py:27b}
OPTIONS=${OPTIONS:---mesh.tensor 4}

tpu=(gcloud compute tpus tpu-vm)
where=(--project "$PROJECT" --zone "$ZONE")
everywhere() { "${tpu[@]}" ssh "$NAME" "${where[@]}" --worker=all --command "$1"; }

"${tpu[@]}" describe "$NAME" "${where[@]}" > /dev/null 2>&1 ||
  "${tpu[@]}" create "$NAME" "${where[@]}" --accelerator-type "$TYPE" --version "$VERSION"

everywhere "set -e
  [ -d grm ] || git clone -q $REPOSITORY grm
  cd grm && git pull -q
  [ -d .venv ] || python3 -m venv .venv
  . .venv/bin/activate && pip install -q -e '.[tpu]'"

# Every host runs the same command. When the slice was preempted, create it again and run this
# script again: it goes on from the last checkpoint.
everywhere "cd grm && . .venv/bin/activate && python -m grm_jax.train --config $RECIPE \
  --run-dir $BUCKET/runs/27b --base $BUCKET/gemma-2-27b --preferences $BUCKET/preferences.jsonl \
  --instructions $BUCKET/instructions.jsonl $OPTIONS"

"${tpu[@]}" delete "$NAME" "${where[@]}" --quiet
