"""
The folder that checkpoints lie in::

    lock                              kept by the process that writes here
    frames_0_1f0c....npz              a block of the replay buffer's frames; written once, used by all checkpoints that need it
    frames_0_1f0c....copy.npz         the same again, since no checkpoint could replace it
    checkpoint_000007_35000_steps/    the last two checkpoints
        networks.npz                  all networks, what their optimizers remember, and torch's random streams
        replay.npz                    all of the replay buffer but its frames
        manifest.json                 everything else, and the SHA-256 of every file, itself included

A checkpoint is written beside the others and gets its name when it is whole; older ones go after that.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from sb3_iris.archive import damaged_file_errors, sha256, sync, write_arrays
from sb3_iris.buffers import SequenceReplayBuffer

FORMAT = "sb3_iris checkpoint 1"
MANIFEST = "manifest.json"
NEW = ".new"  # what is written here is no checkpoint yet
TEMPORARY = ".frames"
FRAMES = "frames_*.npz"
FILES = ("networks.npz", "replay.npz")
KEPT = 2  # checkpoints: the newest one, and the one to fall back to
MOST_MANIFEST_BYTES = 2**26
LOCK_SECONDS = 10.0  # a killed process may take a moment to be gone


class StoredFrames(NamedTuple):
    """What a folder has of a replay buffer's frames."""

    folder: Path
    blocks: list[dict[str, Any]]  # file, first and last step (the last excluded), size in bytes and SHA-256; oldest first


class FolderLock:
    """
    Keeps other processes from writing to a folder, as long as this object lives; the operating system lets go when the
    process ends, in whatever way.

    :param folder: The folder.
    :raises ValueError: If another process keeps it.
    """

    _held: ClassVar["weakref.WeakValueDictionary[tuple[int, Path], FolderLock]"] = weakref.WeakValueDictionary()

    def __init__(self, folder: Path) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        path = folder / "lock"
        if path.is_symlink():
            raise ValueError(f"{path} is a link, which no checkpoint folder has: what it leads to is left alone")
        self._file = open(path, "a+b", buffering=0)
        give_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    self._file.seek(0)
                    holder = self._file.read(20).decode(errors="replace") or "unknown"
                    raise ValueError(
                        f"path={str(folder)!r} belongs to another process (number {holder}), which writes its checkpoints "
                        "there: end that one first, or choose another folder"
                    ) from None
                time.sleep(0.1)
            except OSError:
                warnings.warn(f"path={str(folder)!r} lies on a file system without locks: let only one process write there")
                break
        with contextlib.suppress(OSError):  # of a full disk; the lock is there all the same
            self._file.truncate(0)
            self._file.write(str(os.getpid()).encode())

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of a model keeps no folder; None takes the lock's place, in another process too."""
        return type(None), ()

    @classmethod
    def of(cls, folder: Path) -> "FolderLock":
        """
        :param folder: A folder.
        :return: Its lock, the same one for all models of this process.
        """
        key = (os.getpid(), folder)
        lock = cls._held.get(key)
        if lock is None or not lock._is_in_place(folder):
            lock = cls._held[key] = cls(folder)
        return lock

    def _is_in_place(self, folder: Path) -> bool:
        """Whether the folder is still the one that was locked."""
        path = folder / "lock"
        return not hasattr(self, "_file") or (path.exists() and os.path.samestat(os.fstat(self._file.fileno()), path.stat()))


@contextmanager
def signals_deferred(message: str) -> Iterator[None]:
    """
    Ctrl-C and SIGTERM wait until the block is done.

    :param message: What to say if one had to wait and the block has succeeded.
    """
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield
        return
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield
        if received:
            print(message, file=sys.stderr, flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if received:
            signal.raise_signal(received[0])


def find_checkpoints(folder: str | Path) -> list[Path]:
    """
    :param folder: Folder with checkpoints.
    :return: Its checkpoints, whole or damaged, newest first; empty if there are none, or no such folder.
    """
    paths = [path for path in Path(folder).glob("checkpoint_*") if re.fullmatch(r"checkpoint_\d{6,}_\d+_steps", path.name)]
    paths = [path for path in paths if path.is_dir() and not path.is_symlink()]  # links could lead anywhere
    return sorted(paths, key=_number, reverse=True)


def next_checkpoint(folder: Path, num_timesteps: int) -> Path:
    """
    :param folder: Folder with checkpoints.
    :param num_timesteps: Env steps of the run.
    :return: Where the next checkpoint belongs.
    """
    number = 1 + max(map(_number, find_checkpoints(folder)), default=0)
    return folder / f"checkpoint_{number:06d}_{num_timesteps}_steps"


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.split("_")[1])


def write_frames(buffer: SequenceReplayBuffer, folder: Path) -> list[dict[str, Any]]:
    """
    Write the frames that the folder does not have yet.

    :param buffer: The frames.
    :param folder: Folder with checkpoints.
    :return: All blocks of frames that the buffer consists of, for ``StoredFrames``.
    """
    oldest = buffer.n_added - buffer.size()
    blocks: list[dict[str, Any]] = []
    if buffer.stored is not None and buffer.stored.folder == folder:
        blocks = [block for block in buffer.stored.blocks if block["last"] > oldest]
    if not all([_mend(folder, block) for block in blocks]):
        blocks = []  # both files of a block are gone or damaged: write anew what is in the buffer
    for first, last in buffer.blocks(blocks[-1]["last"] if blocks else oldest):
        path = folder / TEMPORARY
        with open(path, "wb") as file:
            write_arrays(file, [("frames", buffer.frames_block(first, last))])
        digest = sha256(path)
        block: dict[str, Any] = {"file": f"frames_{first}_{digest[:16]}.npz", "size": path.stat().st_size, "sha256": digest}
        _put_in_place(path, folder / block["file"])
        blocks.append({**block, "first": first, "last": last})
        _mend(folder, blocks[-1])  # makes the copy
    return blocks


def _mend(folder: Path, block: dict[str, Any]) -> bool:
    """Make both files of a block as they were written; False if neither is any more."""
    intact = intact_copy(folder, block)
    if intact is None:
        return False
    for name in _copies(block["file"]):
        if not _is_intact(folder / name, block):
            shutil.copyfile(intact, folder / TEMPORARY)
            _put_in_place(folder / TEMPORARY, folder / name)
    return True


def _put_in_place(temporary: Path, path: Path) -> None:
    sync(temporary)
    os.replace(temporary, path)


def _copies(file: str) -> tuple[str, str]:
    return file, f"{file.removesuffix('.npz')}.copy.npz"


def remove_leftovers(folder: Path) -> None:
    """
    Remove what an interrupted writing left behind.

    :param folder: Folder with checkpoints.
    """
    shutil.rmtree(folder / NEW, ignore_errors=True)
    (folder / TEMPORARY).unlink(missing_ok=True)


def remove_old(folder: Path) -> None:
    """
    Remove all checkpoints but the newest whole ones, and all frames that those do not need.

    :param folder: Folder with checkpoints.
    """
    kept: list[dict[str, Any]] = []
    for checkpoint in find_checkpoints(folder):
        try:
            if len(kept) < KEPT:
                kept.append(check_files(checkpoint))
                continue
        except (ValueError, OSError):
            pass
        (checkpoint / MANIFEST).unlink(missing_ok=True)  # without it, what is left of a checkpoint is none
        shutil.rmtree(checkpoint, ignore_errors=True)
    needed = {name for manifest in kept for block in manifest["frames"] for name in _copies(block["file"])}
    for path in folder.glob(FRAMES):
        if path.name not in needed:
            path.unlink(missing_ok=True)


def manifest_digest(manifest: dict[str, Any]) -> str:
    """
    :param manifest: Content of a manifest.
    :return: SHA-256 of it, but for the entry in which that stands.
    """
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_files(checkpoint: Path) -> dict[str, Any]:
    """
    :param checkpoint: Folder of a checkpoint.
    :return: Its manifest.
    :raises ValueError: If it is not whole, or not as it was written.
    """
    path = checkpoint / MANIFEST
    with damaged_file_errors():
        _check_size(path, range(1, MOST_MANIFEST_BYTES))
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its {MANIFEST} is not as it was written ({error})") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError(f"its {MANIFEST} is not of the format {FORMAT!r}")
        if manifest["sha256"] != manifest_digest(manifest):
            raise ValueError(f"its {MANIFEST} is not as it was written")
        for name in FILES:
            file = manifest["files"][name]
            _check_size(checkpoint / name, range(file["size"], file["size"] + 1))
            if sha256(checkpoint / name) != file["sha256"]:
                raise ValueError(f"its {name} is not as it was written")
        for block in manifest["frames"]:
            if not re.fullmatch(r"frames_\d{1,20}_[0-9a-f]{16}\.npz", block["file"]):  # so it cannot lead anywhere else
                raise ValueError(f"its frames are in a file of the name {block['file']!r}")
            if intact_copy(checkpoint.parent, block) is None:
                raise ValueError(f"{block['file']} is missing or not as it was written, and so is its copy")
    return manifest


def _check_size(path: Path, sizes: range) -> None:
    """A file of its own, of one of these sizes: neither a link nor a pipe, which could be without end."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"its {path.name} is missing")
    if path.stat().st_size not in sizes:
        raise ValueError(f"its {path.name} has {path.stat().st_size} bytes, which is not as it was written")


def intact_copy(folder: Path, block: dict[str, Any]) -> Path | None:
    """
    :param folder: Folder with checkpoints.
    :param block: A block of frames.
    :return: The first of its two files that is as it was written.
    """
    return next((folder / name for name in _copies(block["file"]) if _is_intact(folder / name, block)), None)


def _is_intact(path: Path, block: dict[str, Any]) -> bool:
    is_file = path.is_file() and not path.is_symlink() and path.stat().st_size == block["size"]
    return is_file and sha256(path) == block["sha256"]
