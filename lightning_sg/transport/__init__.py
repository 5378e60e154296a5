"""Messages between the processes that hold neighbouring stages."""

from lightning_sg.transport.compression import CODINGS, Coding
from lightning_sg.transport.link import Downstream, Upstream, open_links
from lightning_sg.transport.message import Message

__all__ = ["CODINGS", "Coding", "Downstream", "Message", "Upstream", "open_links"]
