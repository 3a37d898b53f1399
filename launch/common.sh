# Functions that the launchers of this directory source: arguments, topologies, the command of the job. Do not run this file.
# shellcheck shell=bash disable=SC2034,SC2154

# Exit statuses after which the same command resumes (docs/pods.md): 75 saved and stopped; 137 killed, or another host was lost.
RESTARTED="75 137"
restarts_on() { [[ " $RESTARTED " == *" $1 "* ]]; }

die() { echo "$(basename "$0"): $*" >&2; exit 2; }

usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0; }

# parse "NAMES" "SWITCHES" "$@": sets a variable for each --name=value, sets one to 1 for each --switch, and sets "extra" to the
# arguments after --.
parse() {
    local _names=" $1 " _switches=" $2 " _name _argument
    shift 2
    extra=()
    while [ $# -gt 0 ]; do
        _argument=$1
        shift
        case $_argument in
            --) extra=("$@"); return ;;
            -h | --help) usage ;;
            --*) ;;
            *) die "unknown argument $_argument (see --help)" ;;
        esac
        _name=${_argument%%=*} _name=${_name#--}
        case $_names:$_switches in
            *" $_name "*:*) [[ $_argument == *=* ]] || die "--$_name needs a value: --$_name=... (see --help)" ;;
            *:*" $_name "*) [[ $_argument != *=* ]] || die "--$_name takes no value: give it, or leave it out" ;;
            *) die "unknown argument --$_name (see --help)" ;;
        esac
        if [[ $_argument == *=* ]]; then printf -v "$_name" '%s' "${_argument#*=}"; else printf -v "$_name" 1; fi
    done
}

need() {
    local _name
    for _name in "$@"; do [ -n "${!_name:-}" ] || die "--$_name=... is missing (see --help)"; done
}

# whole LEAST NAME...: exits with an error unless each variable is a whole number of at least LEAST.
whole() {
    local _least=$1 _name
    shift
    for _name in "$@"; do
        [[ ${!_name} =~ ^(0|[1-9][0-9]{0,5})$ ]] && [ "${!_name}" -ge "$_least" ] ||
            die "--$_name=${!_name} is not a whole number of $_least or more"
    done
}

# Sets chip=v5p shape=8x8x8 chips=512 hosts=128 for topology=v5p:8x8x8. A host has four chips, but v5e:2x4 and v6e:2x4 are a single
# host with eight.
read_topology() {
    [[ $topology =~ ^(v5e|v6e):([1-9][0-9]{0,3}x[1-9][0-9]{0,3})$ ]] ||
        [[ $topology =~ ^(v4|v5p|tpu7x):([1-9][0-9]{0,3}x[1-9][0-9]{0,3}x[1-9][0-9]{0,3})$ ]] ||
        die "--topology=$topology is not CHIP:AxB of v5e, v6e, or CHIP:AxBxC of v4, v5p, tpu7x"
    chip=${BASH_REMATCH[1]} shape=${BASH_REMATCH[2]} chips=$((${BASH_REMATCH[2]//x/*}))
    chips_per_host=$((chips < 4 ? chips : 4))
    case $topology in v5e:2x4 | v6e:2x4) chips_per_host=8 ;; esac
    [ $((chips % chips_per_host)) -eq 0 ] || die "--topology=$topology: $chips chips, not a multiple of 4"
    hosts=$((chips / chips_per_host))
}

# Commands that can run on several hosts; all others run on one.
DISTRIBUTED="train rl"

# read_command HOSTS METHOD: reads the command of blip3o from "extra" (the arguments after --) and sets
#   job      the command, with gs://BUCKET replaced by /gcs, where the bucket is mounted, and for a command of DISTRIBUTED with
#            --distributed=METHOD, unless METHOD is ""
#   several  1 for a command of DISTRIBUTED, else ""
#   workdir  the value of its --workdir, or ""
#   bucket   the bucket of its gs:// paths, or ""
read_command() {
    local _argument _next="" _name=${extra[0]:-}
    [[ $_name =~ ^[a-z] ]] || die "give the command after --: train --config=... --workdir=... (see --help)"
    job=() several="" workdir="" bucket=""
    for _argument in "${extra[@]}"; do
        case $_argument in
            --workdir=*) workdir=${_argument#*=} ;;
            *) [ "$_next" != --workdir ] || workdir=$_argument ;;
        esac
        _next=$_argument
        while [[ $_argument =~ gs://([^/]*)(/?) ]]; do
            [ "${bucket:=${BASH_REMATCH[1]}}" = "${BASH_REMATCH[1]}" ] ||
                die "gs://$bucket and gs://${BASH_REMATCH[1]}: one bucket is mounted, name one"
            _argument=${_argument/"${BASH_REMATCH[0]}"/"/gcs${BASH_REMATCH[2]}"}
        done
        job+=("$_argument")
    done
    [[ ! $workdir =~ ^gs://[^/]*/?$ ]] || die "--workdir=$workdir needs a directory in the bucket"
    if [[ " $DISTRIBUTED " == *" $_name "* ]]; then
        several=1
    elif [ "$1" -gt 1 ]; then
        die "$_name runs on one host (${DISTRIBUTED/ / and } on several), and here are $1"
    fi
    [ -z "$several" ] || [ -z "$2" ] || job+=("--distributed=$2")
}

# run COMMAND...: runs the command, or prints it with --dry_run.
run() {
    if [ -n "${dry_run:-}" ]; then
        printf '+'
        printf ' %q' "$@"
        echo
    else
        "$@"
    fi
}
