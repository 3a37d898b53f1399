#!/usr/bin/env bash
# Start a job of several processes ("hosts") on this machine.
#
#   launch/local.sh -n 2 -d 4 -- train --config=configs/demo.py --workdir=runs/mine
#
#   -n N         number of processes (1)
#   -d D         CPU devices of each process (1); 0 lets JAX find the devices (one process on a machine with accelerators)
#   -r R         restarts at most (100), after status 75 (all hosts have saved) and 137 (one was killed)
#   -c CHIP      chip whose environment of blip3o_jax/parallel/flags.py is set, or none (cpu; none with -d 0)
#   --dry_run    print the commands instead of running them
#
# Every line of output begins with the number of its host. If one process fails, the others detect it and exit; those that do
# not are killed after 120 s. The exit status is the first one that is not restarted, or else that of the process that failed
# first. On SIGTERM or SIGINT all processes save and exit, and this script exits with their status; a second signal kills them.
# The environment variable PYTHON names the interpreter (python3).
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
processes=1 devices=1 restarts=100 chip="" dry_run=""
while [ $# -gt 0 ]; do
    case $1 in
        -n | -d | -r | -c) [ $# -gt 1 ] || die "$1 needs a value (see --help)" ;;&
        -n) processes=$2; shift 2 ;;
        -d) devices=$2; shift 2 ;;
        -r) restarts=$2; shift 2 ;;
        -c) chip=$2; shift 2 ;;
        --dry_run) dry_run=1; shift ;;
        --) shift; break ;;
        -h | --help) usage ;;
        *) die "unknown argument $1 (see --help)" ;;
    esac
done
for number in "$processes" "$devices" "$restarts"; do
    [[ $number =~ ^(0|[1-9][0-9]{0,5})$ ]] || die "'$number' is not a whole number"
done
[ "$processes" -gt 0 ] || die "-n must be 1 or more"
extra=("$@")
read_command "$processes" ""
[ -z "$bucket" ] || die "gs://$bucket: no bucket is mounted here, give a path"

python=${PYTHON:-python3}
if [ "$devices" -gt 0 ]; then
    # The environment sets the devices of JAX with several hosts; the setting stops the mesh from choosing another number.
    export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices
    [ -z "$several" ] || job+=("--config.mesh.cpu_devices=$devices")
    chip=${chip:-cpu}
fi
if [ -n "$chip" ] && [ "$chip" != none ]; then
    settings=$("$python" "$here/../blip3o_jax/parallel/flags.py" "$chip") # a separate command, so that its failure ends the script
    eval "$settings"
fi

flags_of() { # sets flags: the flags that host $1 adds to the command
    flags=(${several:+--distributed=off})
    if [ "$processes" -gt 1 ]; then
        flags=("--coordinator=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$1")
    fi
}

if [ -n "$dry_run" ]; then
    port=PORT
    for ((host = 0; host < processes; host++)); do
        flags_of "$host"
        printf '[%d] JAX_PLATFORMS=%s JAX_NUM_CPU_DEVICES=%s' "$host" "${JAX_PLATFORMS:-}" "${JAX_NUM_CPU_DEVICES:-}"
        printf ' %q' "$python" -u -m blip3o_jax "${job[@]}" "${flags[@]}"
        echo
    done
    exit 0
fi

stopping=""
pids=()
stop() { # NAME of the signal
    if [ -z "$stopping" ]; then
        echo "local.sh: passing the signal on" >&2
        kill -TERM "${pids[@]}" 2>/dev/null || true
    elif [ "$stopping$1" = TERMINT ]; then
        echo "local.sh: the hosts save, as SIGTERM asked; once more ends them at once" >&2
    else
        kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
    stopping+=$1
}
trap 'stop TERM' TERM
trap 'stop INT' INT

run_once() { # starts all hosts and waits for them; sets status
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    pids=()
    for ((host = 0; host < processes; host++)); do
        flags_of "$host"
        "$python" -u -m blip3o_jax "${job[@]}" "${flags[@]}" > >(sed -u "s/^/[$host] /") 2> >(sed -u "s/^/[$host] /" >&2) &
        pids+=($!)
        echo "local.sh: host $host is process $!" >&2
    done
    status=0
    local left=("${pids[@]}") still ended code pid host late=""
    while [ ${#left[@]} -gt 0 ]; do
        ended="" code=0
        wait -n -p ended "${left[@]}" || code=$?
        [ -n "$ended" ] || continue # a signal to this script interrupted the wait
        still=()
        for pid in "${left[@]}"; do [ "$pid" = "$ended" ] || still+=("$pid"); done
        left=(${still[@]+"${still[@]}"})
        for host in "${!pids[@]}"; do
            [ "${pids[host]}" != "$ended" ] || [ "$code" -eq 0 ] || echo "local.sh: host $host ended with status $code" >&2
        done
        if [ "$code" -ne 0 ]; then
            if [ -z "$late" ] && [ ${#left[@]} -gt 0 ]; then
                # The other processes get 120 s to exit and print their messages: if a collective waits for a killed host,
                # jax.distributed reports that host after a minute (RUNTIME_TIMEOUT in parallel/peers.py). The subshell has no
                # output, because a reader of this script's output would wait until the sleep ends.
                (sleep 120 & trap 'kill $!' TERM; wait; kill -KILL "${left[@]}") > /dev/null 2>&1 &
                late=$!
            fi
            if [ "$status" -eq 0 ] || { restarts_on "$status" && ! restarts_on "$code"; }; then status=$code; fi
        fi
    done
    [ -z "$late" ] || kill "$late" 2>/dev/null || true
}

for ((attempt = 0; ; attempt++)); do
    run_once
    if ! restarts_on "$status" || [ -n "$stopping" ] || [ "$attempt" -ge "$restarts" ]; then
        sleep 0.2 # until the last lines of output are written
        exit "$status"
    fi
    echo "local.sh: ended with status $status, restart $((attempt + 1)) of at most $restarts" >&2
done
