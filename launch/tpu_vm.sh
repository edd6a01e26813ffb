#!/usr/bin/env bash
# A TPU slice of any number of hosts, from this machine, with gcloud.
usage="launch/tpu_vm.sh [--dry-run] ACTION NAME --zone=ZONE [--project=PROJECT] ...
  create NAME --type=v5litepod-16 [--version=v2-alpha-tpuv5-lite] [--spot]   rents it
  copy   NAME                       copies this repository to all its hosts and installs it
  run    NAME -- TRAIN_FLAGS        trains on all hosts, in the background (--workdir: gs://... or a shared mount)
  logs   NAME [--worker=0]          follows the log of a host
  stop   NAME                       SIGTERM: the run saves its state and ends
  delete NAME                       gives it back"
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "error: $1" >&2
    echo "$usage" >&2
    exit 2
}

dry=
if [[ "${1:-}" == --dry-run ]]; then
    dry=1
    shift
fi
[[ $# -ge 2 ]] || fail "an action and a name are needed"
action=$1 name=$2
shift 2

type="" version="v2-alpha-tpuv5-lite" worker=0 place=() spot=() train=()
while (($#)); do
    case $1 in
        --zone=* | --project=*) place+=("$1") ;;
        --type=*) type=${1#*=} ;;
        --version=*) version=${1#*=} ;;
        --worker=*) worker=${1#*=} ;;
        --spot) spot=(--spot) ;;
        --)
            shift
            train=("$@")
            break
            ;;
        *) fail "unknown: $1" ;;
    esac
    shift
done
[[ " ${place[*]} " == *" --zone="* ]] || fail "--zone is missing"

do_it() {
    if [[ $dry ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

tpu() { do_it gcloud compute tpus tpu-vm "$1" "$name" "${place[@]}" "${@:2}"; }
on() { tpu ssh "--worker=$1" "--command=$2"; }

case $action in
    create)
        [[ $type ]] || fail "--type is missing"
        tpu create "--accelerator-type=$type" "--version=$version" "${spot[@]}"
        ;;
    copy)
        archive=$(mktemp -u --suffix=.tgz)
        do_it tar czf "$archive" --exclude=.git --exclude=.venv --exclude=runs .
        do_it gcloud compute tpus tpu-vm scp "$archive" "$name:omnifusion.tgz" "${place[@]}" --worker=all
        do_it rm "$archive"
        # the VM's own Python may be older than the library needs
        uv="python3 -m uv"
        on all "mkdir -p omnifusion && tar xzf omnifusion.tgz -C omnifusion && cd omnifusion \
            && python3 -m pip install -q --user uv && $uv venv -q --allow-existing --python 3.12 .venv \
            && $uv pip install -q --python .venv/bin/python -e '.[tpu,gcs]'"
        ;;
    run)
        ((${#train[@]})) || fail "the flags of training are missing: -- --config=sft --workdir=gs://..."
        flags=$(printf '%q ' "${train[@]}")
        start="nohup .venv/bin/python -u -m omnifusion_jax.train $flags </dev/null >>train.log 2>&1"
        on all "cd omnifusion && { $start & } && echo \$! >train.pid && echo started"
        ;;
    logs) on "$worker" "tail -n 100 -F omnifusion/train.log" ;;
    stop) on all "kill -TERM \$(cat omnifusion/train.pid)" ;;
    delete) tpu delete --quiet ;;
    *) fail "unknown action: $action" ;;
esac
