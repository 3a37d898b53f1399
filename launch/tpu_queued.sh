#!/usr/bin/env bash
# Start a job on TPU VMs of Google Cloud, requested as queued resources.
#
#   launch/tpu_queued.sh --name=mine --zone=us-east5-a --topology=v5p:8x8x8 --spot -- \
#       train --config=configs/pretrain.py:1.7b --workdir=gs://bucket/runs/mine \
#       --config.data.path='gs://bucket/captions/*.tar'
#
#   --topology=CHIP:AxBxC  chips of one slice (v4, v5e, v5p, v6e)       --slices=N   slices (1)
#   --name, --zone, --project, --runtime=VERSION (by default that of the chip)
#   --restarts=N           new requests at most after the machines were preempted (20)
#   --dry_run              print the commands instead of running them
#   -- COMMAND ...         the command of blip3o: train or rl, and any other on a slice of one host. The bucket in its paths is
#                          mounted at /gcs with Cloud Storage FUSE. Create it with --enable-hierarchical-namespace: otherwise
#                          the renaming of a checkpoint's directory is not atomic
#
# Cost: TPUs are billed by the chip-hour from ACTIVE until they are deleted, also when idle. This script deletes them when the
# job ends with any status, and when the script is stopped (Ctrl-C).
#   --keep                 keep the machines after the job, for inspection; delete them yourself
#   --spot                 spot machines: the cheapest, preempted at any time; the job resumes from its last checkpoint
#   --reserved             machines of your reservation, which is paid for in any case
#   neither                on demand: the most expensive, never preempted
#   --valid_until=6h       stop waiting in the queue after that time; waiting costs nothing
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name="" zone="" project="" topology="" slices=1 runtime="" spot="" reserved="" valid_until="" restarts=20 keep="" dry_run=""
parse "name zone project topology slices runtime valid_until restarts" "spot reserved keep dry_run" "$@"
need name zone topology
whole 1 slices
whole 0 restarts
read_topology
read_command "$((slices * hosts))" tpu
[ "$chip" != tpu7x ] || die "tpu7x is given out through GKE alone: use gke_jobset.sh"
[ -z "$spot" ] || [ -z "$reserved" ] || die "--spot and --reserved exclude each other"
[ -z "$several" ] || [[ $workdir == gs://* || $workdir == /* ]] ||
    die "--workdir=$workdir: the machines share no directory; give gs://BUCKET/DIRECTORY, or the absolute path of a shared mount"

declare -A runtimes=([v4]=tpu-ubuntu2204-base [v5e]=v2-alpha-tpuv5-lite [v5p]=v2-alpha-tpuv5 [v6e]=v2-alpha-tpuv6e)
declare -A types=([v4]=v4 [v5e]=v5litepod [v5p]=v5p [v6e]=v6e)
where=("--zone=$zone" ${project:+"--project=$project"})
nodes=("$name")
create=("--type=${types[$chip]}" "--topology=$shape" "--runtime-version=${runtime:-${runtimes[$chip]}}")
if [ "$slices" -gt 1 ]; then
    create+=("--node-count=$slices" "--node-prefix=$name")
    nodes=()
    for ((slice = 0; slice < slices; slice++)); do nodes+=("$name-$slice"); done
else
    create+=("--node-id=$name")
fi
create+=(${spot:+--spot} ${reserved:+--reserved} ${valid_until:+"--valid-until-duration=$valid_until"})

# The commands of each machine. All hosts restart after 75 (they have saved) and 137 (one was lost) (docs/pods.md).
printf -v blip3o ' %q' blip3o "${job[@]}"
setup="set -e; mkdir -p blip3o; tar xzf blip3o.tgz -C blip3o; cd blip3o"
# The Python of the machine images is older than 3.11.
setup+="; python3 -m pip install -q --user uv; python3 -m uv venv -q --allow-existing --python 3.12 ~/venv"
setup+="; python3 -m uv pip install -q --python ~/venv/bin/python -c launch/locks/jax-0.10.txt '.[tpu]'"
if [ -n "$bucket" ]; then
    setup+="; command -v gcsfuse || { echo 'deb https://packages.cloud.google.com/apt gcsfuse-jammy main' |"
    setup+=" sudo tee /etc/apt/sources.list.d/gcsfuse.list; sudo apt-get update -q; sudo apt-get install -qy gcsfuse; }"
    setup+="; sudo install -d -o \"\$USER\" /gcs; mountpoint -q /gcs || gcsfuse --implicit-dirs $bucket /gcs"
fi
script="cd blip3o; export PATH=~/venv/bin:\$PATH; eval \"\$(python3 blip3o_jax/parallel/flags.py $chip)\"; "
script+="while :; do$blip3o; status=\$?; case \$status in ${RESTARTED// /|}) ;; *) exit \$status ;; esac; done"

tpu() { run gcloud compute tpus "$@" "${where[@]}"; }
on_all() { # runs COMMAND on all machines of all slices concurrently; returns the status of a failure
    local node status=0 pids=() pid
    for node in "${nodes[@]}"; do
        tpu tpu-vm ssh "$node" --worker=all "--command=$1" &
        pids+=($!)
        [ -z "$dry_run" ] || wait "$!"
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    return "$status"
}
state() { gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || echo GONE; }
asked="" # 1 while there is a request to delete, with or without machines
delete() {
    asked=""
    tpu queued-resources delete "$name" --force --quiet
}

archive=$(mktemp -d)
# Runs also when a signal or an error ends this script: machines that are not deleted cost money.
trap 'rm -rf "$archive"; [ -z "$asked" ] || delete || echo "tpu_queued.sh: $name is not deleted and goes on costing" >&2' EXIT
run tar czf "$archive/blip3o.tgz" -C "$root" --exclude=__pycache__ setup.py README.md blip3o_jax configs launch

for ((attempt = 0; attempt <= restarts; attempt++)); do
    tpu queued-resources create "$name" "${create[@]}"
    [ -n "$keep" ] || asked=1
    if [ -z "$dry_run" ]; then
        until now=$(state) && [[ $now =~ ^(ACTIVE|FAILED|SUSPENDED|GONE)$ ]]; do sleep 30; done
        [ "$now" = ACTIVE ] || { asked=1; die "the request ended as $now before it became active"; }
    fi
    for node in "${nodes[@]}"; do tpu tpu-vm scp "$archive/blip3o.tgz" "$node:" --worker=all; done
    status=0
    { on_all "$setup" && on_all "$script"; } || status=$?
    [ -z "$dry_run" ] || exit 0
    now=$(state)
    [ -n "$keep" ] && [ "$now" = ACTIVE ] || delete
    [ "$now" != ACTIVE ] || exit "$status"
    echo "tpu_queued.sh: the machines were taken away ($now), asking for others" >&2
done
exit 75
