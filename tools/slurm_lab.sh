#!/usr/bin/env bash
# A real SLURM on this machine, for tests: one controller and N nodes that are processes, all of it in one folder.
#
#   bash tools/slurm_lab.sh start FOLDER [NODES]     up in about two seconds (2 nodes); what runs already stays
#   SLURM_CONF=FOLDER/slurm.conf sbatch ...          partitions: main (default), low, and high, which requeues jobs of low
#   bash tools/slurm_lab.sh lose FOLDER NODE         a power cut: the node's daemon and every process of its jobs end at once
#   bash tools/slurm_lab.sh silence FOLDER NODE      the node's daemon ends alone: the node is DOWN, what its jobs started lives on
#   bash tools/slurm_lab.sh return FOLDER NODE       the node is there again
#   bash tools/slurm_lab.sh stop FOLDER              cancel all jobs, end the daemons, leave FOLDER/log and nothing else
#
# Needs Debian's slurmctld, slurmd, slurm-client and munge; no systemd, no database, no cgroups. As root it adds the nodes'
# names to /etc/hosts (one marked line, taken out by stop), so that a job finds its first host by name.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "slurm lab: $*" >&2
    exit 1
}

[ $# -ge 2 ] || fail "usage: slurm_lab.sh start|stop|lose|silence|return FOLDER [NODES or NODE]"
action=$1 folder=$(realpath -m -- "$2") argument=${3:-}
case $folder in *[!A-Za-z0-9._/-]*) fail "$folder: only letters, digits, '.', '_' and '-' can be in the folder's name" ;; esac
export SLURM_CONF=$folder/slurm.conf
marker="# slurm lab $folder"

# running COMMAND PID_FILE: print the pid when the file names a living process of that command.
running() {
    local pid
    pid=$(tr -dc 0-9 2>/dev/null <"$2") || return 1
    [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ] && echo "$pid"
}

# end COMMAND PID_FILE: ask, wait for ten seconds, insist.
end() {
    local pid
    pid=$(running "$1" "$2") || return 0
    kill "$pid" 2>/dev/null || return 0
    for _ in $(seq 100); do
        running "$1" "$2" >/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
}

# A hosts file may be mounted into a container: it can be written, not replaced.
without_our_hosts() { grep -vF "$marker" /etc/hosts || true; }

start_munge() {
    running munged "$folder/run/munged.pid" >/dev/null && return
    rm -f "$folder/run/munge.socket" "$folder/run/munge.socket.lock"
    if [ ! -s "$folder/munge/key" ]; then
        (umask 077 && head -c 128 /dev/urandom >"$folder/munge/key")
        chmod 0400 "$folder/munge/key"
    fi
    # --force: the folders above are not munge's own, which it would refuse.
    munged --force --num-threads=2 --key-file="$folder/munge/key" --socket="$folder/run/munge.socket" \
        --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed" \
        2>"$folder/log/munged.start" || fail "munged does not start: $(tail -n 1 "$folder/log/munged.start")"
}

# A block of free ports, one for the controller and one for each node.
free_ports() {
    local base port taken
    taken=" $(awk 'FNR > 1 && $4 == "0A" {split($2, a, ":"); print a[2]}' /proc/net/tcp /proc/net/tcp6 2>/dev/null | tr '\n' ' ') "
    for base in $(shuf -i 17000-19900 -n 50); do
        for port in $(seq "$base" $((base + $1))); do
            [[ $taken == *" $(printf %04X "$port") "* ]] && continue 2
        done
        echo "$base"
        return
    done
    fail "no free ports"
}

write_configuration() {
    local nodes=$1 base memory host node
    base=$(free_ports "$nodes")
    host=$(hostname -s 2>/dev/null || hostname)
    memory=$(awk -v nodes="$nodes" '/^MemTotal/ {print int($2 / 1024 / nodes)}' /proc/meminfo)
    # 22.05 ends at start where it finds no usable cgroup, needed or not; v1, named and unused, starts everywhere.
    local cgroup=cgroup/v1
    [ "$(slurmd -V | grep -oE '[0-9]+' | head -1)" -ge 24 ] && cgroup=disabled
    echo "CgroupPlugin=$cgroup" >"$folder/cgroup.conf"
    {
        cat <<CONFIGURATION
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$base
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired: 120 s by default, and for values below 5.
AuthInfo=socket=$folder/run/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
PropagateResourceLimits=NONE
# Patience in seconds; a real cluster has minutes.
SlurmdTimeout=10
KillWait=20
BatchStartTimeout=20
UnkillableStepTimeout=30
MinJobAge=3600
ReturnToService=2
JobRequeue=1
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# The nodes may claim more processors than this machine has.
SlurmdParameters=config_overrides
CONFIGURATION
        for node in $(seq "$nodes"); do
            echo "NodeName=lab$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((base + node)) CPUs=4 RealMemory=$memory State=UNKNOWN"
        done
        cat <<CONFIGURATION
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP PreemptMode=REQUEUE
PartitionName=main Default=YES PriorityTier=10
PartitionName=low PriorityTier=1
PartitionName=high PriorityTier=100 PreemptMode=OFF
CONFIGURATION
    } >"$SLURM_CONF"
}

node_names() { sed -n 's/^NodeName=\([^ ]*\).*/\1/p' "$SLURM_CONF"; }

start_node() {
    running slurmd "$folder/run/slurmd-$1.pid" >/dev/null && return
    mkdir -p "$folder/spool/$1"
    slurmd -f "$SLURM_CONF" -N "$1" || fail "slurmd of $1 does not start: $(tail -n 1 "$folder/log/slurmd-$1.log")"
}

await_nodes() {
    local wanted up=0
    wanted=$(node_names | wc -l)
    for _ in $(seq 150); do
        up=$(sinfo -h -N -p main -o '%t' 2>/dev/null | grep -cE '^(idle|mix|alloc|comp)$' || true)
        [ "$up" = "$wanted" ] && return
        sleep 0.2
    done
    fail "only $up of $wanted nodes are up: see $folder/log"
}

start() {
    local command node
    for command in munged slurmctld slurmd sbatch srun; do
        command -v "$command" >/dev/null || fail "$command is not installed (apt-get install slurmctld slurmd slurm-client munge)"
    done
    mkdir -p "$folder"/{munge,run,log,state,spool}
    [ -f "$SLURM_CONF" ] || write_configuration "${argument:-2}"
    if [ -w /etc/hosts ] && ! grep -qF "$marker" /etc/hosts; then
        echo "127.0.0.1 $(node_names | tr '\n' ' ')$marker" >>/etc/hosts
    fi
    start_munge
    running slurmctld "$folder/run/slurmctld.pid" >/dev/null ||
        slurmctld -f "$SLURM_CONF" || fail "slurmctld does not start: $(tail -n 1 "$folder/log/slurmctld.log")"
    for node in $(node_names); do start_node "$node"; done
    await_nodes
}

# A job's processes outlive the node's daemon: they go first.
cancel_jobs() {
    running slurmctld "$folder/run/slurmctld.pid" >/dev/null || return 0
    local jobs
    jobs=$(timeout 10 squeue -h -o %A 2>/dev/null | sort -u) || return 0
    [ -n "$jobs" ] || return 0
    # shellcheck disable=SC2086
    timeout 20 scancel --full --signal=KILL $jobs 2>/dev/null || true
    # shellcheck disable=SC2086
    timeout 20 scancel $jobs 2>/dev/null || true
    for _ in $(seq 100); do
        [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && return
        sleep 0.2
    done
}

stop() {
    local node
    if [ -f "$SLURM_CONF" ]; then
        cancel_jobs
        for node in $(node_names); do lose "$node"; done
    fi
    end slurmctld "$folder/run/slurmctld.pid"
    end munged "$folder/run/munged.pid"
    rm -rf "${folder:?}"/{munge,run,state,spool,slurm.conf,cgroup.conf}
    if [ -w /etc/hosts ] && grep -qF "$marker" /etc/hosts; then
        local kept
        kept=$(without_our_hosts)
        echo "$kept" >/etc/hosts
    fi
}

# The step daemons of a node, known by the log that they hold open, and all that runs under them.
processes_of() {
    local process
    for process in /proc/[0-9]*; do
        [ "$(cat "$process/comm" 2>/dev/null)" = slurmstepd ] || continue
        [ -n "$(find "$process/fd" -lname "$folder/log/slurmd-$1.log" 2>/dev/null)" ] && family "${process#/proc/}"
    done
    return 0
}

family() {
    local child
    echo "$1"
    for child in $(cat "/proc/$1"/task/*/children 2>/dev/null); do family "$child"; done
}

lose() {
    local daemon processes
    daemon=$(running slurmd "$folder/run/slurmd-$1.pid") || true
    processes=$(processes_of "$1")
    # shellcheck disable=SC2086
    [ -z "$daemon$processes" ] || kill -KILL $daemon $processes 2>/dev/null || true
}

silence() {
    local daemon
    daemon=$(running slurmd "$folder/run/slurmd-$1.pid") || return 0
    kill -KILL "$daemon" 2>/dev/null || true
}

case $action in
    start) start ;;
    stop) stop ;;
    lose) lose "${argument:?which node?}" ;;
    silence) silence "${argument:?which node?}" ;;
    return) start_node "${argument:?which node?}" ;;
    *) fail "unknown action $action: start, stop, lose, silence or return" ;;
esac
