"""Weights in files that the system can page out: a process need not hold those of other stages in memory."""

from __future__ import annotations

import ctypes
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_SMALLEST = 64 * 1024  # bytes; smaller parameters stay where they are
_AT_A_TIME = 16 * 1024 * 1024  # bytes written before their pages are let go of
_MADV_DONTNEED = 4  # Linux; of a shared mapping of a file it keeps what was written


class PagedParameters:
    """The parameters of modules that were made while :meth:`making` was entered, in files of this process.

    Each has a file that is deleted as soon as it is mapped, so that nothing is left behind however the process ends. To
    everyone they are ordinary parameters with ordinary values: the same random numbers, the same operations. Only
    their memory is the system's to take, where it is a disk's (``TMPDIR`` says which) and not that of a RAM disk.

    Example::

        >>> pages = PagedParameters()
        >>> with pages.making():
        ...     layer = nn.Linear(512, 512)
        >>> pages.holds(layer.weight), pages.holds(layer.bias)  # the bias is not worth a file
        (True, False)
        >>> pages.keep(layer.weight)
        >>> pages.holds(layer.weight)
        False
    """

    def __init__(self) -> None:
        # By identity: a WeakSet would compare values.
        self._mapped: dict[int, weakref.ref[nn.Parameter]] = {}
        self._written = 0

    @contextmanager
    def making(self) -> Iterator[None]:
        """While entered, new parameters of any module get a file."""
        with tempfile.TemporaryDirectory(prefix="lightning_sg-") as folder:
            handle = register_module_parameter_registration_hook(
                lambda _module, _name, parameter: self._take(parameter, Path(folder))
            )
            try:
                yield
            finally:
                handle.remove()
        self.let_go()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a parameter is in a file."""
        found = self._mapped.get(id(tensor))
        return found is not None and found() is tensor

    def keep(self, parameter: nn.Parameter) -> None:
        """Brings a parameter into memory for good: it is trained here."""
        if self.holds(parameter):
            parameter.data = parameter.data.clone()
            del self._mapped[id(parameter)]

    def let_go(self) -> None:
        """Tells the system that the pages are not needed now. Reading or writing brings them back."""
        self._written = 0
        for key, found in list(self._mapped.items()):
            parameter = found()
            if parameter is None:
                del self._mapped[key]
            elif _libc is not None:
                storage = parameter.untyped_storage()
                start, size = ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes())
                _libc.madvise(start, size, _MADV_DONTNEED)
        if _libc is not None:
            # What the parameters had before they got their files is free, but may lie inside the heap: a later, smaller
            # allocation is enough to keep it from the system, and one hole after the other would hold the whole model.
            _libc.malloc_trim(ctypes.c_size_t(0))

    @contextmanager
    def hidden(self, module: nn.Module) -> Iterator[None]:
        """While entered, the module is without them: moving it to a device leaves them where they are."""
        places = [
            (child._parameters, name, parameter)
            for child in module.modules()
            for name, parameter in child._parameters.items()
            if parameter is not None and self.holds(parameter)
        ]
        for held, name, _parameter in places:
            held[name] = None
        try:
            yield
        finally:
            for held, name, parameter in places:
                held[name] = parameter

    def _take(self, parameter: nn.Parameter | None, folder: Path) -> None:
        """Moves a parameter, which has its values or will be given them in place, into a file."""
        if parameter is None or self.holds(parameter) or not _can_be_mapped(parameter):
            return
        path = folder / "parameter"
        data = torch.from_file(str(path), shared=True, size=parameter.numel(), dtype=parameter.dtype)
        os.unlink(path)
        data = data.view(parameter.shape)
        data.copy_(parameter.data)
        parameter.data = data
        self._mapped[id(parameter)] = weakref.ref(parameter)
        self._written += parameter.nbytes
        if self._written > _AT_A_TIME:
            self.let_go()


def _can_be_mapped(parameter: nn.Parameter) -> bool:
    if type(parameter) is not nn.Parameter or parameter.device.type != "cpu":  # not a lazy one, nor on "meta"
        return False
    return parameter.layout == torch.strided and parameter.is_contiguous() and parameter.nbytes >= _SMALLEST


def _load_libc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        library.madvise, library.malloc_trim  # noqa: B018 (are they there?)
    except (AttributeError, OSError, TypeError):  # not on every system; the files then stay in the page cache
        return None
    return library


_libc = _load_libc()

__all__ = ["PagedParameters"]
