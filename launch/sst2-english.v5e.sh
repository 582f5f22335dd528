#!/bin/bash
# Rendered by: tinybert launch tpu-vm configs/distill/sst2-english.yaml --accelerator v5e:2x4 --project PROJECT --zone us-west4-a --image us-docker.pkg.dev/PROJECT/tinybert/tinybert:tpu --mount 10.0.0.2:/runs:/workspace/runs --mount 10.0.0.2:/data:/data --env TEACHER=/data/all-MiniLM-L6-v2 --env TINYBERT_DATA=/data
# Machines: 8 × TPU v5e (16 GB), 2x4, 1 host.
# Queued resources are a legacy API; Compute Engine has no v5e, GKE has: see `tinybert launch jobset`.
# The machines go on costing money until you run:
#   gcloud compute tpus queued-resources delete sst2-english --force --zone=us-west4-a --project=PROJECT
set -euo pipefail

startup=$(mktemp)
trap 'rm -f "$startup"' EXIT
cat >"$startup" <<'STARTUP'
#!/bin/bash
set -uo pipefail
echo always >/sys/kernel/mm/transparent_hugepage/enabled
export DEBIAN_FRONTEND=noninteractive
apt-get update && apt-get install --yes nfs-common
command -v docker >/dev/null || apt-get install --yes docker.io
mkdir -p /workspace/runs
mountpoint -q /workspace/runs || mount -t nfs -o rw,hard 10.0.0.2:/runs /workspace/runs || exit 1
mkdir -p /data
mountpoint -q /data || mount -t nfs -o rw,hard 10.0.0.2:/data /data || exit 1
gcloud auth configure-docker --quiet us-docker.pkg.dev
failures=0
while :; do
  docker run --rm \
    --name=sst2-english \
    --privileged \
    --network=host \
    --stop-timeout=120 \
    --volume=/workspace/runs:/workspace/runs \
    --volume=/data:/data \
    --env=PYTHONUNBUFFERED=1 \
    --env=JAX_PLATFORMS=tpu,cpu \
    --env=JAX_COMPILATION_CACHE_DIR=runs/compile-cache \
    --env=TEACHER=/data/all-MiniLM-L6-v2 \
    --env=TINYBERT_DATA=/data \
    us-docker.pkg.dev/PROJECT/tinybert/tinybert:tpu \
    tinybert run configs/distill/sst2-english.yaml
  status=$?
  case "$status" in
  0 | 2 | 3 | 5) break ;; # finished; wrong input, a gate, diverged
  75) ;;         # stopped and saved
  *)
    failures=$((failures + 1))
    [ "$failures" -le 3 ] || break
    ;;
  esac
  sleep 10
done
exit "$status"
STARTUP

gcloud compute tpus queued-resources create sst2-english \
  --node-id=sst2-english \
  --accelerator-type=v5litepod-8 \
  --runtime-version=v2-alpha-tpuv5-lite \
  "--metadata-from-file=startup-script=$startup" \
  --zone=us-west4-a \
  --project=PROJECT
