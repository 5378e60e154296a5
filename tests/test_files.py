"""Files are written as a whole or not at all."""

from __future__ import annotations

import os
import re
import signal
import stat
import threading
from pathlib import Path

import pytest

from lightning_sg import files
from lightning_sg.files import part_of, replace, write_atomically, write_text_atomically
from tests.small_disk import forked, small_disk


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with write_atomically(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
        assert names(tmp_path) == [".a.txt.part", "a.txt"]
    assert path.read_text() == "new"
    write_text_atomically(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"
    assert names(tmp_path) == ["a.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_earlier_file_and_no_part(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fails() -> None:
        with write_atomically(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fails()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_kill_leaves_the_earlier_file_and_the_next_write_clears_up(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def dies() -> None:
        with write_atomically(path) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(dies) == signal.SIGKILL
    assert path.read_text() == "old"
    assert part_of(path).read_text() == "half"
    write_text_atomically(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_leaves_the_earlier_file_and_is_named(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 64) as folder:
        path = folder / "a.bin"
        path.write_bytes(b"old")
        with (
            pytest.raises(OSError, match=r"No space left.*earlier file.*unchanged.*a\.bin'"),
            write_atomically(path) as f,
        ):
            f.write(bytes(100_000))
        assert path.read_bytes() == b"old"
        assert names(folder) == ["a.bin"]


def test_an_error_that_is_about_another_file_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"other\.txt"), write_atomically(tmp_path / "a.txt") as file:
        file.write((tmp_path / "other.txt").read_bytes())
    assert names(tmp_path) == []


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"

    def meanwhile() -> None:
        with write_atomically(path) as one:
            one.write(b"one")
            write_text_atomically(path, "two")

    with pytest.raises(OSError, match="another process is writing the same file"):
        meanwhile()
    assert path.read_text() == "two"
    assert names(tmp_path) == ["a.txt"]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("target")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / ".link.part").symlink_to("target")  # planted: writing must not follow it
    write_text_atomically(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "target"
    assert (tmp_path / "link").read_text() == "new"
    assert not (tmp_path / "link").is_symlink()


def test_a_pipe_or_device_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_text_atomically(pipe, "through")
    reader.join(10)
    assert read == ["through"]


#: Ways to write a file that can leave half of one, and where they are right.
_IN_PLACE = re.compile(r"\.write_text\(|\.write_bytes\(|torch\.save\(|\bopen\([^)]*[\"'][wxa]b?\+?[\"']|savefig\(")
_RIGHT = {
    ("distributed/snapshots.py", "torch.save({**state"),  # with write_atomically
    ("files.py", 'path.open("wb")'),  # a pipe or device
    ("files.py", 'part.open("xb")'),
    ("checkpoint/torch_file.py", "torch.save(value, digesting)"),
    ("objects.py", "torch.save(value, stream)"),  # to memory
    ("summary_picture.py", "figure.savefig(path"),  # in a temporary folder
    ("tools/style.py", "figure.savefig(file"),  # to memory
    ("tools/timeline/profiler.py", 'files.open(path, "w")'),  # on another machine
}


def test_nothing_else_in_the_package_writes_a_file_in_place() -> None:
    package = Path(files.__file__).parent
    found = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        for line in path.read_text().splitlines()
        if _IN_PLACE.search(line) and not any(path == package / file and text in line for file, text in _RIGHT)
    ]
    assert found == [], "use lightning_sg.files.write_atomically"


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("before", ["nothing", "file", "folder", "link"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_anything_takes_the_place_of_anything(
    new: str, before: str, at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(files, "_exchange", lambda *_paths: False)
    make(tmp_path / "new", new, "new")
    make(tmp_path / "there", before, "old")
    replace(tmp_path / "new", tmp_path / "there")
    found = tmp_path / "there" / "inside" if new == "folder" else tmp_path / "there"
    assert found.read_text() == "new"
    assert set(names(tmp_path)) - {"target"} == {"there"}
    if before == "link":
        assert (tmp_path / "target").read_text() == "old"


def make(path: Path, kind: str, text: str) -> None:
    if kind == "file":
        path.write_text(text)
    elif kind == "folder":
        path.mkdir()
        (path / "inside").write_text(text)
    elif kind == "link":
        (path.parent / "target").write_text(text)
        path.symlink_to("target")
