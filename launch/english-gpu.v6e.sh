#!/bin/bash
# Rendered by: tinybert launch tpu-vm configs/pretrain/english-gpu.yaml --accelerator v6e:4x4 --spot --project PROJECT --zone us-east5-b --image us-docker.pkg.dev/PROJECT/tinybert/tinybert:tpu --mount 10.0.0.2:/runs:/workspace/runs --mount 10.0.0.2:/data:/data --env TEACHER=/data/all-MiniLM-L6-v2 --env TINYBERT_DATA=/data
# Machines: 16 × TPU v6e (32 GB), 4x4, 4 hosts.
# Compute Engine: a managed instance group.
# The machines go on costing money until you run:
#   gcloud compute instance-groups managed delete english-gpu --zone=us-east5-b --project=PROJECT
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
    --name=english-gpu \
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
    tinybert run configs/pretrain/english-gpu.yaml
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

gcloud compute resource-policies create workload-policy english-gpu \
  --type=HIGH_THROUGHPUT \
  --accelerator-topology=4x4 \
  --region=us-east5 \
  --project=PROJECT
gcloud compute instance-templates create english-gpu \
  --machine-type=ct6e-standard-4t \
  --image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e \
  --image-project=ubuntu-os-accelerator-images \
  --boot-disk-size=200GB \
  --maintenance-policy=TERMINATE \
  --scopes=cloud-platform \
  --provisioning-model=SPOT \
  --instance-termination-action=DELETE \
  "--metadata-from-file=startup-script=$startup" \
  --project=PROJECT
gcloud compute instance-groups managed create english-gpu \
  --size=4 \
  --template=english-gpu \
  --workload-policy=projects/PROJECT/regions/us-east5/resourcePolicies/english-gpu \
  --zone=us-east5-b \
  --project=PROJECT
