#!/usr/bin/env bash
# Trains on a TPU VM of one host, and is run on it: launch/tpu_vm.sh --config=configs/pretrain.py ... --workdir=DIR
set -euo pipefail
cd "$(dirname "$0")/.."

attributes=http://metadata.google.internal/computeMetadata/v1/instance/attributes
hosts=$(curl -sf --max-time 10 -H "Metadata-Flavor: Google" "$attributes/worker-network-endpoints" || true)
if [[ "${TPU_WORKER_HOSTNAMES:-$hosts}" == *,* ]]; then
    echo "error: this TPU slice has several hosts, one is supported: make a slice of one host, such as v5litepod-8" >&2
    exit 1
fi

[[ -x .venv/bin/python ]] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/pip install -q -e ".[tpu]"
exec .venv/bin/python -m omnifusion_jax.train "$@"
