"""Messages between the processes that hold neighbouring stages."""

from lightning_sg.transport.compression import COMPRESSIONS, Compression
from lightning_sg.transport.grid import ProcessGrid
from lightning_sg.transport.link import Downstream, Link, Upstream, open_links
from lightning_sg.transport.message import Activations, Message, Residual, Target

__all__ = [
    "COMPRESSIONS",
    "Activations",
    "Compression",
    "Downstream",
    "Link",
    "Message",
    "ProcessGrid",
    "Residual",
    "Target",
    "Upstream",
    "open_links",
]
