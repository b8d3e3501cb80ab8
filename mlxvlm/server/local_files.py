"""Picture files of this machine -> their bytes, within one folder where there is one. Knows paths, not pictures."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path

from mlxvlm.errors import ImageError
from mlxvlm.processors.sources import ImageLimits, reason, short, too_large

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a pipe would wait for whoever writes to it.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


def read_anywhere(path: Path, limits: ImageLimits) -> bytes:
    """A regular file that the server's user can read. Raises ImageError."""
    name = short(str(path))
    try:
        return _read(os.open(path.expanduser(), _FILE), name, limits)
    except FileNotFoundError as error:
        raise ImageError(f"no such image file: {name}") from error
    except (OSError, ValueError, RuntimeError) as error:  # a NUL inside, nobody's home
        raise ImageError(f"{name} can't be read: {reason(error)}") from error


def read_under(root: Path, path: Path, limits: ImageLimits) -> bytes:
    """A regular file under `root`, never one that a link or ".." leads to outside of it. Raises ImageError.

    The error does not tell a file that is missing from one that may not be read.
    """
    refusal = ImageError(f"no such image under the server's image folder: {short(str(path))}")
    try:
        root = root.resolve()
        target = (root / path).resolve()
        return _read(_open_without_links(root, target.relative_to(root)), short(str(path)), limits)
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: it is not inside
        raise refusal from error


def _open_without_links(root: Path, inside: Path) -> int:
    """Opens step by step: a folder that became a link since it was resolved is an error, not a way out."""
    if not inside.parts:
        raise IsADirectoryError(str(root))
    with ExitStack() as folders:
        folder = os.open(root, _FOLDER)
        folders.callback(os.close, folder)
        for part in inside.parts[:-1]:
            folder = os.open(part, _FOLDER, dir_fd=folder)
            folders.callback(os.close, folder)
        return os.open(inside.parts[-1], _FILE | os.O_NOFOLLOW, dir_fd=folder)


def _read(descriptor: int, name: str, limits: ImageLimits) -> bytes:
    try:
        # Devices and pipes may have no end.
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(limits.max_bytes + 1) or b""  # None: a kernel's file with nothing to say yet
    finally:
        os.close(descriptor)
    if len(data) > limits.max_bytes:
        raise too_large(name, limits)
    return data
