#!/usr/bin/env bash
# A SLURM cluster of two nodes on this machine, for tests: real daemons, pretended CPUs, loopback only.
#
#   slurm/local_cluster.sh install   Debian's packages, without letting them start daemons of their own
#   slurm/local_cluster.sh start     needs root; about five seconds; nothing where it is up already
#   slurm/local_cluster.sh stop      cancels its jobs, ends its daemons, takes its names out of /etc/hosts
#
# Afterwards SLURM's commands find it by SLURM_CONF, which `start` prints. Partition `low` can be pre-empted by `high`.
# DINO_VALUE_SLURM is its folder (default /tmp/dino-value-slurm), DINO_VALUE_SLURM_PORT the first of its four ports; a second
# cluster takes others.
set -euo pipefail

readonly DIR=${DINO_VALUE_SLURM:-/tmp/dino-value-slurm}
readonly PORT=${DINO_VALUE_SLURM_PORT:-26810}
readonly MARK="# dino-value local cluster $DIR"
readonly PACKAGES=(slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin munge mariadb-server-core mariadb-client-core)
readonly PROGRAMS=(slurmctld slurmd slurmdbd sbatch munged mariadbd mariadb-install-db)
export SLURM_CONF=$DIR/slurm.conf PATH=$PATH:/usr/sbin:/sbin

fail() { echo "local_cluster: $*" >&2; exit 1; }

wait_for() { # SECONDS COMMAND…
    local last=$((SECONDS + $1)); shift
    until "$@" &>/dev/null; do ((SECONDS < last)) || return 1; sleep 0.1; done
}

need() { # fails when a program is missing, and names it
    local program
    for program in "${PROGRAMS[@]}"; do
        command -v "$program" >/dev/null || fail "$program is not installed; run $0 install"
    done
    [ "$(id -u)" = 0 ] || fail "needs root, for the daemons and for the nodes' names in /etc/hosts"
}

install_packages() {
    local policy=/usr/sbin/policy-rc.d # what tells Debian's packages not to start services
    apt-get -qq update
    if [ ! -e $policy ]; then
        # shellcheck disable=SC2064
        trap "rm -f $policy" EXIT
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
    fi
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${PACKAGES[@]}" >/dev/null
}

hosts() { # NAMES: /etc/hosts with this cluster's line replaced; written in place, for it may be a mount
    # Lines that end with the mark: another cluster's folder may begin with this one's name.
    local rest; rest=$(awk -v mark="$MARK" 'substr($0, length($0) - length(mark) + 1) != mark' /etc/hosts)
    { echo "$rest"; [ -z "$1" ] || echo "127.0.0.1 $1 $MARK"; } >"$DIR/hosts"
    cat "$DIR/hosts" >/etc/hosts
}

idle() { [ "$(sinfo --noheader -N -p low -t idle,mix,alloc,comp -o %N | wc -l)" = 2 ]; }
accounted() { sacctmgr -n list cluster format=cluster | grep -qw dinovalue; }
running() { [ -f "$SLURM_CONF" ] && timeout 5 scontrol ping | grep -q 'is UP' && idle; }

configure() {
    local host; host=$(hostname -s)
    # A name that resolves to another interface would put the daemons there.
    cat >"$SLURM_CONF" <<CONF
ClusterName=dinovalue
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire: a requeued job starts after seconds, not two minutes
AuthInfo=socket=$DIR/munge.socket,cred_expire=5
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdPidFile=$DIR/slurmd-%n.pid
SlurmdLogFile=$DIR/slurmd-%n.log
SlurmdSpoolDir=$DIR/spool-%n
StateSaveLocation=$DIR/state
SlurmdParameters=config_overrides
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,bf_interval=5,sched_min_interval=0,batch_sched_delay=0
# a job that is pre-empted gets the signal it asked for (--signal), which submitit saves on
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# ids that no earlier cluster gave: submitit would take that job's result for this one's
FirstJobId=$(($(date +%s) % 60000000 + 1))
KillWait=5
MinJobAge=3600
ReturnToService=2
# a request that can never be met is refused, not left pending
EnforcePartLimits=ALL
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=$DIR/munge.socket
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((PORT + 2))-$((PORT + 3))] CPUs=8 RealMemory=512000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
CONF
    install -m 600 /dev/stdin "$DIR/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$DIR/munge.socket
CommunicationParameters=NoInAddrAny
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
SlurmUser=root
PidFile=$DIR/slurmdbd.pid
LogFile=$DIR/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounting
CONF
}

start() {
    need
    if running; then echo "SLURM_CONF=$SLURM_CONF"; return; fi
    stop
    mkdir -p "$DIR/state" "$DIR/spool-n1" "$DIR/spool-n2"
    touch "$DIR/.dino-value-slurm"
    # Names of nodes must resolve: rank 0's becomes MASTER_ADDR.
    hosts "$(hostname -s) n1 n2"
    configure
    (umask 077; head -c 1024 /dev/urandom >"$DIR/munge.key")
    munged --key-file="$DIR/munge.key" --socket="$DIR/munge.socket" --pid-file="$DIR/munged.pid" \
        --log-file="$DIR/munged.log" --seed-file="$DIR/munged.seed" </dev/null
    # Without accounting a job that leaves no result (cancelled, killed) never ends for submitit.
    mariadb-install-db --no-defaults --user=root --auth-root-authentication-method=socket --skip-test-db \
        --datadir="$DIR/mysql" &>"$DIR/mariadb-install.log" || fail "see $DIR/mariadb-install.log"
    setsid mariadbd --no-defaults --user=root --datadir="$DIR/mysql" --socket="$DIR/mysql.socket" \
        --pid-file="$DIR/mariadbd.pid" --skip-networking --innodb-flush-log-at-trx-commit=0 \
        --log-error="$DIR/mariadbd.log" </dev/null &>/dev/null &
    wait_for 60 test -S "$DIR/mysql.socket" || fail "mariadbd did not start; see $DIR/mariadbd.log"
    MYSQL_UNIX_PORT=$DIR/mysql.socket slurmdbd </dev/null
    wait_for 60 sacctmgr -n list cluster || fail "slurmdbd does not answer; see $DIR/slurmdbd.log"
    slurmctld -c </dev/null
    slurmd -N n1 </dev/null
    slurmd -N n2 </dev/null
    wait_for 60 idle || fail "the nodes did not come up; see the logs in $DIR"
    wait_for 60 accounted || fail "the cluster did not reach its accounting; see $DIR/slurmdbd.log"
    echo "SLURM_CONF=$SLURM_CONF"
}

stop() {
    [ -e "$DIR" ] || return 0
    [ -e "$DIR/.dino-value-slurm" ] || fail "$DIR is not this script's; give another DINO_VALUE_SLURM"
    if timeout 5 scontrol ping 2>/dev/null | grep -q 'is UP'; then
        scancel --quiet --user="$(id -un)" || true
        wait_for 30 eval '[ -z "$(squeue --noheader)" ]' || true
    fi
    local name file pid
    for name in slurmd-n1 slurmd-n2 slurmctld slurmdbd mariadbd munged; do
        file=$DIR/$name.pid
        pid=$(cat "$file" 2>/dev/null) || continue
        # only a process that is still what the file says: ids are used again
        [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${name%-n?}" ] || continue
        kill "$pid" 2>/dev/null || true
        wait_for 20 test ! -e "/proc/$pid" || kill -9 "$pid" 2>/dev/null || true
    done
    hosts ''
    rm -rf "$DIR"
}

case ${1:-} in
    install) install_packages ;;
    start | stop) "$1" ;;
    *) sed -n '2,10s/^# \?//p' "$0"; exit 2 ;;
esac
