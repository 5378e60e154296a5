"""Keeps weights in files that the system can page out, so that no process holds the whole model in memory."""

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

_SMALLEST = 64 * 1024  # bytes; smaller parameters get no file
_AT_A_TIME = 16 * 1024 * 1024  # bytes written before their pages are released
_MADV_DONTNEED = 4  # Linux; keeps what was written to a shared file mapping


class PagedParameters:
    """Keeps the parameters of modules made inside :meth:`making` in files of this process.

    Each parameter has a file that is deleted as soon as it is mapped, so nothing stays behind however the process ends.
    They remain ordinary parameters with the same values. Only the system may reclaim their memory, provided that the
    files are on a disk (``TMPDIR`` says where) and not on a RAM disk.

    Example::

        >>> pages = PagedParameters()
        >>> with pages.making():
        ...     layer = nn.Linear(512, 512)
        >>> pages.holds(layer.weight), pages.holds(layer.bias)  # the bias is too small for a file
        (True, False)
        >>> pages.keep(layer.weight)
        >>> pages.holds(layer.weight)
        False
    """

    def __init__(self) -> None:
        # By id: a WeakSet would compare values.
        self._mapped: dict[int, weakref.ref[nn.Parameter]] = {}
        self._written = 0

    @contextmanager
    def making(self) -> Iterator[None]:
        """Gives every new parameter of any module a file inside the context."""
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

    @property
    def count(self) -> int:
        """The number of parameters that are in files."""
        return len(self._mapped)

    def keep(self, parameter: nn.Parameter) -> None:
        """Moves a parameter into memory for good, because this process trains it."""
        if self.holds(parameter):
            parameter.data = parameter.data.clone()
            del self._mapped[id(parameter)]

    def let_go(self) -> None:
        """Releases the pages. The next read or write brings them back."""
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
            # The memory that parameters had before they got their files is free but may lie inside the heap. One small
            # allocation after it keeps it from the system, and many such holes would add up to the whole model.
            _libc.malloc_trim(ctypes.c_size_t(0))

    @contextmanager
    def hidden(self, module: nn.Module) -> Iterator[None]:
        """Hides them from the module inside the context, so that moving it to a device leaves them where they are."""
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
        """Moves a parameter into a file, whether it has its values already or gets them later in place."""
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
    if type(parameter) is not nn.Parameter or parameter.device.type != "cpu":  # lazy, or on "meta"
        return False
    return parameter.layout == torch.strided and parameter.is_contiguous() and parameter.nbytes >= _SMALLEST


def _load_libc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        library.madvise, library.malloc_trim  # noqa: B018 (raises if they are missing)
    except (AttributeError, OSError, TypeError):  # not on every system; the files then stay in the page cache
        return None
    return library


_libc = _load_libc()

__all__ = ["PagedParameters"]
