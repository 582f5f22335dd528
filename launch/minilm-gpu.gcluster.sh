#!/bin/bash
# Rendered by: tinybert launch gcluster configs/pretrain/minilm-gpu.yaml --accelerator v6e:4x4 --cluster CLUSTER --location us-east5 --project PROJECT --image us-docker.pkg.dev/PROJECT/tinybert/tinybert:tpu --mount runs:/workspace/runs --mount data:/data --env TEACHER=/data/all-MiniLM-L6-v2 --env TINYBERT_DATA=/data
# Machines: 16 × TPU v6e (32 GB), 4x4, 4 hosts.
# gcluster counts a preemption as a restart, so that --restarts is high; after other exit
# codes than these the job ends.
set -euo pipefail

gcluster job submit \
  --cluster=CLUSTER \
  --location=us-east5 \
  --project=PROJECT \
  --name=minilm-gpu \
  --image=us-docker.pkg.dev/PROJECT/tinybert/tinybert:tpu \
  --compute-type=ct6e-standard-4t \
  --topology=4x4 \
  --grace-period=120s \
  --restarts=100 \
  --restart-on-exit-codes=4,75,137,143 \
  --command='env PYTHONUNBUFFERED=1 JAX_PLATFORMS=tpu,cpu JAX_COMPILATION_CACHE_DIR=runs/compile-cache TEACHER=/data/all-MiniLM-L6-v2 TINYBERT_DATA=/data tinybert run configs/pretrain/minilm-gpu.yaml' \
  --mount=runs:/workspace/runs:rw \
  --mount=data:/data:rw
