#!/usr/bin/env bash
# Train on several machines with torchrun. Run this on every one of them, with the same arguments:
#
#   NODES=2 GPUS=8 HOST=node0 bash scripts/run_multinode.sh --load_model ... --proj_dir /shared/run
#
# NODES: machines. GPUS: processes on each (1 with --accelerator cpu). HOST: the name or address of
# one of them, at which all meet, with PORT (29400). --proj_dir, --load_model and --data_file must be
# the same files everywhere, on a shared file system.
# RESTARTS=3 starts all processes anew when one dies; add --resume auto --save_every N then.
# SIGTERM to this script saves a checkpoint and ends; SAVE_SECONDS (600) is how long that may take.
# torchrun's own exit status is 1 whatever train.py's was.
set -euo pipefail
: "${NODES:?how many machines}" "${GPUS:?how many processes on each}" "${HOST:?where all meet}"

# torchrun knows a machine by its host name alone, which may belong to another of its networks: find
# out by which address this machine reaches HOST, and whether it is HOST itself.
read -r is_host address < <(python - "$HOST" <<'EOF'
import socket
import sys

host = socket.gethostbyname(sys.argv[1])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect((host, 9))  # sends nothing, but settles the route
    address = probe.getsockname()[0]
print(str(address == host).lower(), address)
EOF
)
# Without this, restarts of torchrun fail now and then (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec python -m torch.distributed.run --nnodes "$NODES" --nproc_per_node "$GPUS" \
    --rdzv_backend c10d --rdzv_endpoint "$HOST:${PORT:-29400}" --rdzv_id "${RUN_ID:-finchtune}" \
    --rdzv_conf "is_host=$is_host" --local_addr "$address" \
    --max_restarts "${RESTARTS:-0}" --shutdown_timeout "${SAVE_SECONDS:-600}" \
    "$(dirname "$0")/../train.py" "$@"
