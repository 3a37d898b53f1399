#!/usr/bin/env bash
# Start a job on GPU machines under Slurm, with one process for each GPU.
#
#   launch/slurm.sh --nodes=4 --gpus=8 --dry_run -- train --config=configs/pretrain.py:1.7b --workdir=/shared/runs/mine
#
#   --nodes=N (1)  --gpus=G per node (8)  --chip=h100|h200 (h100)  --name=NAME (blip3o)
#   --partition  --account  --qos  --time      options of sbatch
#   --activate=FILE        file that is sourced first, such as bin/activate of a virtual environment
#   --dry_run              print the batch script instead of submitting it
#   -- COMMAND ...         the command of blip3o: train or rl, whose working directory all nodes must share, and on one node any
#                          other, as one process with all GPUs
#
# Cost: set by --partition, --time and --qos of your site; a partition whose jobs may be preempted is usually the cheapest. Two
# minutes before the end of --time, and on preemption, all processes get SIGTERM, save the same step and exit with status 75. The
# script then requeues the job, which resumes from that step. It also requeues the job after status 137 (a process was killed, and
# the others have exited). If a machine fails, Slurm requeues the job.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
nodes=1 gpus=8 chip=h100 name=blip3o activate="" partition="" account="" qos="" time="" dry_run=""
parse "nodes gpus chip name activate partition account qos time" "dry_run" "$@"
whole 1 nodes gpus
read_command "$nodes" slurm
tasks=1
[ -z "$several" ] || tasks=$gpus
[ -z "$bucket" ] || die "gs://$bucket: give the path of a file system that all nodes see"
python3 "$root/blip3o_jax/parallel/flags.py" "$chip" > /dev/null
printf -v blip3o ' %q' blip3o "${job[@]}"

script="#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$tasks
#SBATCH --gpus-per-node=$gpus
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
${partition:+#SBATCH --partition=$partition
}${account:+#SBATCH --account=$account
}${qos:+#SBATCH --qos=$qos
}${time:+#SBATCH --time=$time
}"
script+="cd $(printf %q "$root")
${activate:+source $(printf %q "$activate")
}eval \"\$(python3 blip3o_jax/parallel/flags.py $chip)\"
status=0
# srun returns the largest status. If a process fails, the others exit with its status; --wait kills those that do not.
srun --wait=120 --label$blip3o || status=\$?
case \$status in ${RESTARTED// /|}) scontrol requeue \"\$SLURM_JOB_ID\" ;; esac
exit \"\$status\""

if [ -n "$dry_run" ]; then
    echo "$script"
else
    sbatch <<< "$script"
fi
