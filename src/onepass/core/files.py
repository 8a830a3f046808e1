"""Files that are written whole or not at all.

A file is written under a temporary name in its own folder, brought to the disk, and then renamed over the old one. A
full disk, a killed process or a power cut therefore leaves the previous file as it was.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["replace_file"]


def replace_file(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Puts ``data`` at ``path``, or leaves what was there.

    The folder must exist. Raises ``OSError`` naming ``path`` when the bytes cannot be written (a full disk, say); the
    temporary file is then removed and a previous ``path`` is untouched.
    """
    path = Path(path)
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode_of(path))
        os.replace(temporary, path)
        temporary = ""
    except OSError as error:
        kept = "the file that was there is unchanged" if path.exists() else "nothing was left behind"
        raise OSError(error.errno, f"could not write {path}: {error.strerror}; {kept}") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
    _sync_folder(path.parent)


def _mode_of(path: Path) -> int:
    """The permissions of the file to be replaced, or those that open() would give a new one."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """Brings the rename itself to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
