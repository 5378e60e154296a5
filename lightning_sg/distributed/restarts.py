"""The store in which the processes of a job that torchrun has restarted find each other."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore


def store_of_attempt(world_size: int, timeout: timedelta) -> dict[str, Any]:
    """Arguments for ``init_process_group``: after a restart the processes must not find those of the last attempt.

    torchrun's agent keeps one store for all attempts, and torch looks up the same keys in it every time, so the second
    attempt connects to addresses of the first, where nobody is (pytorch/pytorch#135712).

    Args:
        world_size: The number of processes.
        timeout: For each question to the store.

    Returns:
        A store with keys of this attempt's own; nothing where there is no store of an agent.
    """
    # On several nodes each agent counts for itself, and the counts may differ: torch's own way, then.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return {}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": PrefixStore(f"lightning_sg/attempt_{attempt}", store)}


__all__ = ["store_of_attempt"]
