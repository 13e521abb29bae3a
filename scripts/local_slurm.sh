#!/usr/bin/env bash
# A real SLURM of one node on this machine, to try out and test jobs before they are submitted to a cluster.
#
#   scripts/local_slurm.sh start [DIR]     starts it and prints the SLURM_CONF to export; if it is up, only prints it
#   scripts/local_slurm.sh stop [DIR]      ends its jobs and daemons
#   scripts/local_slurm.sh status [DIR]    shows nodes and jobs; exit code 1 if it is not up
#   scripts/local_slurm.sh install         installs Debian's packages slurm-wlm and munge where they are missing
#
# It writes only to DIR (default: /tmp/clpet-slurm-UID), including its own munge key. The daemons run as the current
# user, on free ports of the loopback interface, without cgroups, systemd and accounting. With CPUS=8 the node takes
# eight jobs of one CPU each, whatever the machine has.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
NEEDED=(slurmctld slurmd munged sbatch srun scontrol)

fail() {
    echo "local_slurm: $*" >&2
    exit 1
}

missing() {
    local name
    for name in "${NEEDED[@]}"; do
        command -v "$name" >/dev/null || echo "$name"
    done
}

install() {
    local absent
    absent=$(missing | xargs)
    [[ -z $absent ]] && return
    command -v apt-get >/dev/null || fail "$absent missing, and this machine has no apt-get: install SLURM and munge"
    [[ $(id -u) -eq 0 ]] || fail "$absent missing: run apt-get install slurm-wlm munge as root"
    echo "local_slurm: installing slurm-wlm and munge" >&2
    {
        apt-get -qq -o DPkg::Lock::Timeout=300 update
        DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 install --no-install-recommends \
            slurm-wlm munge
    } >&2 || fail "apt-get could not install slurm-wlm and munge"
    [[ -z $(missing) ]] || fail "$(missing | xargs) are still missing after the installation"
}

# The first free port, starting at $1.
port() {
    local number
    for ((number = $1; number < $1 + 5000; number++)); do
        (: <"/dev/tcp/127.0.0.1/$number") 2>/dev/null || { echo "$number" && return; }
    done
    fail "no free port from $1 on"
}

# The configuration: one node with CPUS CPUs, and short intervals so that requeued jobs start soon.
configuration() {
    local control worker
    control=$(port $((20000 + RANDOM % 10000)))
    worker=$(port $((control + 1)))
    cat <<CONF
ClusterName=clpet
SlurmctldHost=localhost
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
SlurmctldPort=$control
SlurmdPort=$worker
AuthType=auth/munge
AuthInfo=socket=$state/munge.socket,cred_expire=10
CryptoType=crypto/munge
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/d
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmdParameters=config_overrides
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=100000,sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
KillWait=5
MinJobAge=3600
MailProg=/bin/true
NodeName=localhost NodeAddr=127.0.0.1 CPUs=${CPUS:-$(nproc)} RealMemory=$(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo)
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
CONF
}

up() {
    [[ -f $SLURM_CONF ]] && [[ $(timeout 10 sinfo --noheader --format %t 2>/dev/null) =~ ^(idle|mix|alloc) ]]
}

# Compares the name too: the recorded process id may belong to another process by now.
alive() {
    [[ $(cat "/proc/$(cat "$state/$1.pid" 2>/dev/null)/comm" 2>/dev/null) == "$1" ]]
}

start() {
    install
    mkdir -p "$state"/{ctld,d}
    chmod 755 "$state"
    exec 9>"$state/.lock"
    flock 9
    if ! up; then
        halt
        [[ -f $state/munge.key ]] || (umask 077 && head -c 1024 /dev/urandom >"$state/munge.key")
        configuration >"$SLURM_CONF"
        munged --force --socket="$state/munge.socket" --key-file="$state/munge.key" --pid-file="$state/munged.pid" \
            --seed-file="$state/munge.seed" --log-file="$state/munged.log" 9>&- 2>>"$state/munged.log" ||
            fail "munged does not start, see $state/munged.log"
        slurmctld -c 9>&- && slurmd -c -N localhost 9>&- || fail "see $state/slurmctld.log and $state/slurmd.log"
        for _ in {1..60}; do
            up && break
            sleep 0.5
        done
        up || fail "the node does not start, see $state/slurmctld.log and $state/slurmd.log"
    fi
    echo "export SLURM_CONF=$SLURM_CONF"
}

# Cancels all jobs, then ends the daemons by their recorded process ids.
halt() {
    local name
    if alive slurmctld && alive slurmd; then
        timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
        for _ in {1..20}; do
            [[ -z $(timeout 10 squeue --noheader 2>/dev/null) ]] && break
            sleep 0.5
        done
    fi
    for name in slurmd slurmctld munged; do
        if alive "$name"; then kill "$(cat "$state/$name.pid")"; fi
        for _ in {1..20}; do
            alive "$name" || break
            sleep 0.25
        done
        rm -f "$state/$name.pid"
    done
}

stop() {
    [[ -d $state ]] || return 0
    halt
    echo "local_slurm: stopped" >&2
}

status() {
    up || fail "SLURM is not running in $state"
    sinfo
    squeue
}

state=$(realpath -m "${2:-/tmp/clpet-slurm-$(id -u)}")
export SLURM_CONF=$state/slurm.conf
case ${1:-} in
    start | stop | status | install) "$1" ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
esac
