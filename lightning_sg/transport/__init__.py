"""Messages between the processes that hold neighbouring stages."""

from lightning_sg.transport.away import Away
from lightning_sg.transport.chain import Chain
from lightning_sg.transport.compression import COMPRESSIONS, Compression
from lightning_sg.transport.grid import ProcessGrid
from lightning_sg.transport.inbox import never
from lightning_sg.transport.interruptible import interruptible
from lightning_sg.transport.link import Downstream, Link, Upstream
from lightning_sg.transport.message import Activations, Message, Residual, Target, split
from lightning_sg.transport.opening import carry_between_devices, open_chain
from lightning_sg.transport.roll_call import RunStore, StoreAddress, call_roll
from lightning_sg.transport.watch import Watch

__all__ = [
    "COMPRESSIONS",
    "Activations",
    "Away",
    "Chain",
    "Compression",
    "Downstream",
    "Link",
    "Message",
    "ProcessGrid",
    "Residual",
    "RunStore",
    "StoreAddress",
    "Target",
    "Upstream",
    "Watch",
    "call_roll",
    "carry_between_devices",
    "interruptible",
    "never",
    "open_chain",
    "split",
]
