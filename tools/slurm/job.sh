# -------------------------------------------------------------------------------------- the same in every job script
# Every start resumes at the newest checkpoint. USR1 comes before the time limit (--signal) or from a preemption: the run
# saves, and the job goes back into the queue. TERM (scancel) ends it. A run that fails is not started again.

cd "$repository" || exit 1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it from the job since Slurm 22.05
stop=

signal() {  # to the steps of this job; torchrun saves on TERM, and does not know USR1
    stop=$1 signaled=1
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap 'signal requeue' USR1
trap 'signal end' TERM

follow() {  # runs a command to its end; bash handles a signal while it waits, so it waits again after one
    "$@" &
    signaled=
    wait "$!"
    code=$?
    while [ -n "$signaled" ]; do
        signaled=
        wait "$!"
        code=$?
    done
    return "$code"
}

echo "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST"
# one torchrun a node; a node that has saved and left must not end the one that is still writing the checkpoint
# shellcheck disable=SC2016  # each node expands its own number
node='exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"'
follow srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 bash -c "$node" "$python" \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$gpus" --master-addr="$head" --master-port="$port" "${train[@]}" &&
    [ -z "$stop" ] &&
    follow srun --nodes=1 --ntasks=1 "$python" -m tools.finish_run "$run" --skip-existing
code=$?

if [ "$stop" = requeue ] && [ "$code" -ne 0 ]; then
    echo "saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
