#!/usr/bin/env bash
# Submits a sweep as one SLURM array; no process has to wait for it. Every task of the array is one run.
#
#   scripts/slurm_array.sh [SBATCH FLAGS] -- hardware=slurm_gpu method=sequential,replay seed=0,1,2
#
# After -- come the arguments of `clpet train -m`. Resources come from the hardware option; the sbatch flags override
# them. Finished runs are skipped, so the same command submits the missing runs again (wait until the array is over: a
# queued run is not finished). A run that is preempted or out of time saves and is requeued. Logs are in
# OUTPUT_DIR/.slurm/JOB_TASK.log. PYTHON=... is the Python with clpet (default: python), MAX_RESTARTS=... the maximum
# number of requeues of a task (default: 100).
set -euo pipefail

fail() {
    echo "slurm_array: $*" >&2
    exit 2
}

# Submits this file as the script of the array.
submit() {
    local flags=() python answer plan
    while (($#)) && [[ $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    (($# > 1)) || fail "usage: $0 [SBATCH FLAGS] -- KEY=VALUE,VALUE ..."
    command -v sbatch >/dev/null || fail "sbatch is not installed on this machine: submit from a login node"
    python=$(command -v "${PYTHON:-python}") || fail "${PYTHON:-python} is not installed: set PYTHON"
    answer=$("$python" -m clpet sweep "${@:2}")
    [[ -n $answer ]] || { echo "slurm_array: every run of this sweep is finished" && return; }
    mapfile -t plan <<<"$answer"
    sbatch --job-name=clpet --requeue --open-mode=append --signal=B:USR2@120 --output="${plan[0]%/*}/%A_%a.log" \
        "${plan[@]:1}" "${flags[@]}" "${BASH_SOURCE[0]}" --task "$python" "${plan[0]}"
}

# One run. SLURM signals this shell when time is up (the B: of --signal), so it waits and passes the signal on.
task() {
    local python=$1 list=$2 overrides child code=0 job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    eval "overrides=($(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$list"))"
    "$python" -u -m clpet train "${overrides[@]}" hydra.mode=RUN &
    child=$!
    trap 'kill -USR2 "$child"' USR2
    trap : TERM # SLURM also sends SIGTERM to the run itself
    while :; do
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break # otherwise a signal has interrupted the wait, not the run
    done
    # 75: the run has saved and can resume; 140: SIGUSR2 came before its handler was installed. Requeue only if SLURM
    # still considers the job running: a cancelled one must stay cancelled, and a preempted one is queued already.
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
