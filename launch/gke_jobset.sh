#!/usr/bin/env bash
# Start a job on TPU slices of a GKE cluster that has JobSet and the Cloud Storage FUSE driver.
#
#   launch/gke_jobset.sh --name=mine --image=REGISTRY/blip3o:1 --topology=v5p:8x8x8 --spot -- \
#       train --config=configs/pretrain.py:1.7b --workdir=gs://bucket/runs/mine \
#       --config.data.path='gs://bucket/captions/*.tar'
#
#   --topology=CHIP:AxBxC  chips of one slice (v4, v5e, v5p, v6e, tpu7x)   --slices=N   slices (1)
#   --image                an image built from launch/Dockerfile
#   --service_account      service account of the pods, with read and write access to the bucket (default)
#   --restarts=N           restarts of the JobSet at most (100)
#   --spot                 use nodes of spot pools: the cheapest, and preempted at any time
#   --reservation=NAME     use nodes of a reservation, which is paid for in any case
#   --dry_run              print the manifest instead of applying it
#   -- COMMAND ...         the command of blip3o: train or rl, and any other on a slice of one host. The bucket in its paths is
#                          mounted at /gcs; create it with a hierarchical namespace (see tpu_queued.sh)
#
# Cost: that of the node pools. You set their size and lifetime; a pool that scales to 0 costs nothing after the job. Without
# --spot and --reservation the job runs in any pool of the topology.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name="" image="" topology="" slices=1 service_account=default restarts=100 spot="" reservation="" dry_run=""
parse "name image topology slices service_account restarts reservation" "spot dry_run" "$@"
need name image topology
whole 1 slices
whole 0 restarts
read_topology
read_command "$((slices * hosts))" tpu
[ -n "$bucket" ] || die "the command names no bucket, which pods share: give gs://BUCKET/DIRECTORY"
[ -z "$several" ] || [[ $workdir == gs://* ]] || die "--workdir=$workdir: pods share a bucket, give gs://BUCKET/DIRECTORY"
[ -z "$spot" ] || [ -z "$reservation" ] || die "--spot and --reservation exclude each other"
declare -A accelerators=(
    [v4]=tpu-v4-podslice [v5e]=tpu-v5-lite-podslice [v5p]=tpu-v5p-slice [v6e]=tpu-v6e-slice [tpu7x]=tpu7x
)

json() { python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@"; }
nodes="{cloud.google.com/gke-tpu-accelerator: ${accelerators[$chip]}, cloud.google.com/gke-tpu-topology: $shape"
nodes+="${spot:+, cloud.google.com/gke-spot: \"true\"}${reservation:+, cloud.google.com/reservation-name: $reservation}}"

manifest=$(< "$here/gke_jobset.yaml")
fill() { manifest=${manifest//"@$1@"/"$2"}; }
fill NAME "$name"
fill IMAGE "$image"
fill SLICES "$slices"
fill HOSTS "$hosts"
fill CHIP "$chip"
fill CHIPS_PER_HOST "$chips_per_host"
fill BUCKET "$bucket"
fill RESTARTS "$restarts"
fill RESTARTED "${RESTARTED// /, }"
fill SERVICE_ACCOUNT "$service_account"
fill NODES "$nodes"
fill ARGS "$(json "${job[@]}")"

if [ -n "$dry_run" ]; then
    echo "$manifest"
else
    kubectl apply -f - <<< "$manifest"
fi
