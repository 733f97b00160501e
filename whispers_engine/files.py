"""Writing without half-written results: into a temporary neighbour first, then renamed into place."""

from __future__ import annotations

import errno
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # whose errors name no file where a write meets them


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `target`, replacing what was there, when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()
        with _named(new, target):
            yield new
        for path in new.iterdir():
            path.chmod(0o755 if path.is_dir() else 0o644)  # some writers make private files; results are not
        try:
            if target.exists():
                target.rename(old)
            new.rename(target)
        except BaseException:  # an interrupt comes after a rename as well as before it
            if old.exists() and not target.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yields a path, of the same name in a folder of its own, whose file becomes `target` when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".partial") as work:
        path = Path(work) / target.name
        with _named(path, target):
            yield path
        path.replace(target)


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Around safetensors' `save_file`, which has an error of its own type for what the system refuses, such as a full disk: an OSError
    that names the file, as any other writer raises."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"I/O error: (.*) \(os error (\d+)\)", str(error))
        if number is None:
            raise OSError(errno.EIO, str(error), str(path)) from error
        raise OSError(int(number[2]), number[1], str(path)) from error


@contextmanager
def _named(new: Path, target: Path) -> Iterator[None]:
    """An error of the system names the place that was meant, not the temporary one that becomes it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _FULL:
            error.filename = str(target)
        elif isinstance(error.filename, str | Path) and Path(error.filename).is_relative_to(new):
            error.filename = str(target / Path(error.filename).relative_to(new))
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with new_file(path) as new:
        new.write_text(text, encoding="utf-8")
