"""Runs a function in several processes as torchrun would, and brings back what each returns or raises.

With ``LIGHTNING_SG_TEST_DEVICE=cuda`` the tests train on GPUs, and one is enough for all processes. A process that has
used one cannot be forked; the processes then come from a server that has not, and get what to do as a pickle.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import random
import signal
import socket
import subprocess
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import torch

_PR_SET_PDEATHSIG = 1
#: What the tests train on: ``"cpu"`` or ``"cuda"``.
DEVICE = os.environ.get("LIGHTNING_SG_TEST_DEVICE", "cpu")
#: Seconds until a rank that has said nothing is ended; far above what any test needs.
TIMEOUT = 60.0 if DEVICE == "cpu" else 120.0


@dataclass
class Failure:
    """What a rank raised."""

    kind: str
    message: str
    trace: str


#: Below the range that the kernel takes ports of connections from, so that none of these can be in the way.
_PORTS = range(10_000, 32_000)
#: The newest reservations: by the time that one is dropped, its port has long been bound or done with.
_reservations: deque[socket.socket] = deque(maxlen=64)


def free_port() -> int:
    """A port that is free, and that no other test process on this machine is given at the same time.

    A socket with the port in its name stands for the reservation: the kernel lets one process have it, and takes it
    back when that process ends.
    """
    start = random.SystemRandom().randrange(len(_PORTS))  # tests seed the shared generator
    for port in (*_PORTS[start:], *_PORTS[:start]):
        reservation = socket.socket(socket.AF_UNIX)
        try:
            reservation.bind(f"\0lightning-sg-tests-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            reservation.close()
            continue
        _reservations.append(reservation)
        return port
    raise RuntimeError(f"No free port from {_PORTS.start} to {_PORTS.stop - 1}: end what occupies them.")


def run_ranks(count: int, work: Callable[[], Any], *, may_fail: bool = False, patience: float = TIMEOUT) -> list[Any]:
    """Calls ``work`` in ``count`` forked processes with torchrun's environment variables.

    Args:
        count: The number of processes.
        work: Called without arguments in each; what it returns must be picklable, and on GPUs it too.
        may_fail: Return :class:`Failure` for ranks that raise, instead of failing here.
        patience: Seconds until ranks that have said nothing are ended.

    Returns:
        Each rank's result, in rank order. ``None`` for a rank that died without a word.
    """
    context: Any = get_context("fork" if DEVICE == "cpu" else "forkserver")
    if DEVICE != "cpu":
        context.set_forkserver_preload(["lightning.pytorch", "lightning_sg", "tests.conftest"])
        work = _Pickled(work)
    port = free_port()
    gc.collect()  # a store that a child finds among its garbage would join a thread that only this process has
    processes, ends = [], []
    for rank in range(count):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(rank, count, port, work, theirs))
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(mine)
    results = []
    deadline = time.monotonic() + patience
    for end in ends:
        try:
            here = end.poll(max(0.0, deadline - time.monotonic()))
            results.append(pickle.loads(end.recv_bytes()) if here else Failure("Timeout", "said nothing", ""))
        except EOFError:
            results.append(None)
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
    failures = [(rank, result) for rank, result in enumerate(results) if isinstance(result, Failure)]
    if failures and not may_fail:
        raise AssertionError("\n".join(f"rank {rank}: {failure.trace or failure}" for rank, failure in failures))
    return results


def stop_this_process(seconds: float) -> None:
    """Stops the calling process, and has another let it go on."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


class _Pickled:
    """A function that travels to another process with what it holds of its surroundings."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._pickle: bytes = cloudpickle.dumps(work)

    def __call__(self) -> Any:
        return pickle.loads(self._pickle)()


def child(rank: int, count: int, port: int, work: Callable[[], Any], end: Connection) -> None:
    """Calls ``work`` as one rank, sends what it returns or raises, and ends the process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives the tests, however they end
    gc.freeze()
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",
        OMP_NUM_THREADS="1",
    )
    if DEVICE != "cpu" and count > torch.cuda.device_count():
        # NCCL refuses two processes on one device of a host: make it take them for two hosts.
        os.environ.update(
            NCCL_HOSTID=f"host-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1", NCCL_CUMEM_ENABLE="0"
        )
    try:
        result: Any = work()
    except BaseException as error:
        result = Failure(type(error).__name__, str(error), traceback.format_exc())
    end.send_bytes(pickle.dumps(result))
    end.close()
    os._exit(0)
