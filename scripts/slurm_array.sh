#!/usr/bin/env bash
# A sweep as one SLURM array, without a process that waits for it: every task of the array is one run.
#
#   scripts/slurm_array.sh [SBATCH FLAGS] -- hardware=slurm_gpu method=sequential,replay seed=0,1,2
#
# After -- stands what would stand after `clpet train -m`. Resources come from the hardware option and from the sbatch
# flags, which win. Finished runs are left out, so the same command again submits the gaps (wait until the array is
# over: a run that is still queued is no finished one). A run that is preempted, or out of time, saves and is queued
# again. Logs: OUTPUT_DIR/.slurm/JOB_TASK.log. PYTHON=... names the Python that has clpet (default: python),
# MAX_RESTARTS=... how often a task may be queued again (default: 100).
set -euo pipefail

fail() {
    echo "slurm_array: $*" >&2
    exit 2
}

# Submits this file once more, as the script of the array.
submit() {
    local flags=() python answer plan
    while (($#)) && [[ $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    (($# > 1)) || fail "usage: $0 [SBATCH FLAGS] -- KEY=VALUE,VALUE ..."
    command -v sbatch >/dev/null || fail "there is no sbatch here: submit where the cluster lets you"
    python=$(command -v "${PYTHON:-python}") || fail "there is no ${PYTHON:-python}: set PYTHON"
    answer=$("$python" -m clpet sweep "${@:2}")
    [[ -n $answer ]] || { echo "slurm_array: every run of this sweep is finished" && return; }
    mapfile -t plan <<<"$answer"
    sbatch --job-name=clpet --requeue --open-mode=append --signal=B:USR2@120 --output="${plan[0]%/*}/%A_%a.log" \
        "${plan[@]:1}" "${flags[@]}" "${BASH_SOURCE[0]}" --task "$python" "${plan[0]}"
}

# One run. SLURM tells this shell that time is up (the B: of --signal), so the shell stays and passes it on.
task() {
    local python=$1 list=$2 overrides child code=0 job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    eval "overrides=($(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$list"))"
    "$python" -u -m clpet train "${overrides[@]}" hydra.mode=RUN &
    child=$!
    trap 'kill -USR2 "$child"' USR2
    trap : TERM # SLURM sends this one to the run as well
    while :; do
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break # else a signal has ended the wait, not the run
    done
    # 75: the run has saved and wants to go on; 140: it was told before it listened. Only a job that SLURM still
    # takes for running is queued again: one that was cancelled stays so, one that SLURM has requeued is queued.
    if [[ $code -eq 75 || $code -eq 140 ]] && ((${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-100})) &&
        [[ $(squeue --noheader --jobs="$job" --format=%T) == RUNNING ]]; then
        scontrol requeue "$job"
    fi
    exit "$code"
}

if [[ ${1:-} == --task ]]; then
    task "${@:2}"
else
    submit "$@"
fi
