"""The store in which the processes of a job that torchrun has restarted find each other."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore


def store_of_attempt(world_size: int, timeout: timedelta) -> dict[str, Any]:
    """Arguments for ``init_process_group`` that keep a restarted job apart from its last attempt.

    torchrun's agent keeps one store for all attempts, and torch uses the same keys every time. So the second attempt
    would connect to addresses of the first, where nobody listens (pytorch/pytorch#135712).

    Args:
        world_size: The number of processes.
        timeout: For each question to the store.

    Returns:
        A store with keys of its own for this attempt; nothing if no agent keeps one.
    """
    # On several nodes each agent counts its own restarts, and the counts may differ: leave it to torch.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return {}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": PrefixStore(f"lightning_sg/attempt_{attempt}", store)}


__all__ = ["store_of_attempt"]
