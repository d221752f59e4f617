"""
Files of arrays that may come from strangers: npz, written so that no crash leaves half of one, and read without pickle.

A reader says what it expects; nothing else of a file is unpacked, so a small file cannot fill the memory.
"""

import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

READ_AT_ONCE = 2**20  # bytes


def write_arrays(file: Any, arrays: Iterable[tuple[str, np.ndarray]], compressed: bool = True) -> None:
    """
    Write arrays as ``np.load(..., allow_pickle=False)`` reads them.

    :param file: File object open for writing bytes.
    :param arrays: Names and arrays of numbers, one by one.
    :param compressed: Whether to deflate them, at the fastest level: frames shrink by much at any.
    """
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method, compresslevel=1) as archive:
        for name, array in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)


class ArrayFile:
    """
    Reads what ``write_arrays`` wrote.

    :param file: File object open for reading bytes.
    :raises ValueError: If it is no such file. The same holds for all methods.
    """

    def __init__(self, file: BinaryIO) -> None:
        with damaged_file_errors():
            self._archive = zipfile.ZipFile(file)
            self.names = {name.removesuffix(".npy") for name in self._archive.namelist()}

    def check(self, name: str, dtype: Any, *shapes: tuple[int, ...]) -> None:
        """
        Look whether there is an array, without reading it.

        :param name: Its name.
        :param dtype: What its numbers must be.
        :param shapes: What its shape may be.
        """
        with self._open(name, dtype, shapes):
            pass

    def read(self, name: str, dtype: Any, *shapes: tuple[int, ...]) -> np.ndarray:
        """
        :param name: Name of an array.
        :param dtype: What its numbers must be.
        :param shapes: What its shape may be.
        :return: The array.
        """
        with self._open(name, dtype, shapes) as (member, shape):
            array = np.empty(shape, dtype=dtype)
            view = memoryview(array.reshape(-1).view(np.uint8).data)
            done = 0
            while done < len(view):
                n = member.readinto(view[done : done + READ_AT_ONCE])
                if n == 0:
                    raise EOFError(f"its {name} ends too early")
                done += n
            if member.read(1):  # reading to the end also compares the checksum
                raise ValueError(f"its {name} is longer than its shape says")
        # A byte that is neither 0 nor 1 would make a bool that is neither
        return array.view(np.uint8) != 0 if array.dtype == bool else array

    @contextmanager
    def _open(self, name: str, dtype: Any, shapes: tuple[tuple[int, ...], ...]) -> Iterator[tuple[Any, tuple[int, ...]]]:
        """The numbers of an array and its shape, which is one of those allowed."""
        with damaged_file_errors():
            info = self._archive.getinfo(f"{name}.npy")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"its {name} is compressed by method {info.compress_type}")
            with self._archive.open(info) as member:
                if np.lib.format.read_magic(member) != (1, 0):
                    raise ValueError(f"its {name} has another version of the npy format")
                shape, fortran_order, found = np.lib.format.read_array_header_1_0(member)
                if found != np.dtype(dtype) or shape not in shapes or fortran_order:
                    wanted = " or ".join(str(shape) for shape in shapes)
                    raise ValueError(f"its {name} is {found} {shape}, but must be {np.dtype(dtype)} {wanted}")
                yield member, shape


@contextmanager
def damaged_file_errors() -> Iterator[None]:
    """Whatever reading a damaged file raises becomes a ValueError; there are many ways to fail."""
    try:
        yield
    except ValueError:
        raise
    except KeyError as error:
        raise ValueError(f"it lacks {error.args[0] if error.args else error!r}") from error
    except Exception as error:
        raise ValueError(f"it cannot be read ({type(error).__name__}: {error})") from error


def sha256(path: Path) -> str:
    """
    :param path: A file.
    :return: Its SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """
    Make the operating system write a file, or a folder's list of files, to the disk.

    :param path: File or folder.
    """
    if path.is_dir() and os.name != "posix":
        return  # elsewhere folders cannot be opened
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs what may be written to
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
