"""Files that survive a crash, and fingerprints of what they were made from."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tightrope.errors import FileError, TightropeError

T = TypeVar("T")

DIGEST = "sha256"  # its name in the header of a file of tensors


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace a file's content so that a crash leaves the old content or the new, never a mixture.

    Raises:
        TightropeError: if the disk is full; the old file is still there.
        FileError: if the file cannot be written for another reason.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> TightropeError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TightropeError(
            f"no space left to write {path}; what was there before is kept. Free some space"
        )
    return FileError(f"cannot write {path}: {error.strerror}; check the path and its permissions")


@contextmanager
def locked(path: Path, taken: TightropeError, timeout: float = 0.0) -> Iterator[None]:
    """Hold a lock: a file that stays behind, but that nobody holds any more when its process is gone.

    Args:
        path: the file.
        taken: what is raised if another process holds the lock.
        timeout: how many seconds to wait for it.

    Raises:
        TightropeError: `taken`, or if the disk is full.
        FileError: if the file cannot be written.
    """
    lock = FileLock(path, timeout=timeout)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # a folder that takes no files, such as /proc, is to FileLock one whose lock is taken
        lock.acquire()
    except Timeout:
        raise taken from None
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield
    finally:
        lock.release()


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON objects, one a line, and see them onto the disk: all of them or, where that fails, none.

    Raises:
        TightropeError: if the disk is full; the file is as it was.
        FileError: if the file cannot be written for another reason.
    """
    content = "".join(to_json(record) + "\n" for record in records).encode()
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, size)
        raise _unwritable(path, error) from error


def read_lines(path: Path) -> list[bytes]:
    """The lines that `append_lines` wrote; a last one that a crash cut off is left out.

    Raises:
        FileError: if the file cannot be read.
    """
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise _unreadable(path, error) from None
    with suppress(ValueError):
        json.loads(rest)  # a whole record that only lacks its newline counts
        lines.append(rest)
    return lines


def _unreadable(path: Path, error: OSError) -> FileError:
    return FileError(f"cannot read {path}: {error.strerror}; check the path and its permissions")


def check_line(kind: TypeAdapter[T], line: bytes, path: Path, number: int) -> T:
    """The JSON value of a line, checked against what it should be.

    Args:
        kind: what it should be.
        line: the line.
        path: the file it is from, for the error.
        number: its number in that file, from 1.

    Raises:
        FileError: if it is something else; the message names file, line and key.
    """
    try:
        return kind.validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FileError(
            f"{path}, line {number}: {f'{where}: ' if where else ''}{first['msg']}; "
            "restore the file, or make it again"
        ) from None


def to_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON without NaN or Infinity, which other readers reject."""
    return json.dumps(record, allow_nan=False, indent=indent)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileError: if the file is missing or broken.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileError(f"{path} is missing") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError as error:
        raise FileError(f"{path} is not valid JSON ({error}); delete it or restore it") from error
    if not isinstance(content, dict):
        raise FileError(f"{path} should hold a JSON object")
    return content


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> None:
    """Tensors and a JSON header in one safetensors file, written atomically, with a digest of both."""
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    words = dict(header or {})
    # In the header: of several words beside it, safetensors would not keep the order.
    signed = {**words, DIGEST: _digest(contiguous, to_json(words))}
    write_atomically(path, save(contiguous, {"header": to_json(signed)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote: the tensors, on the CPU, and the header.

    Raises:
        FileError: if the file is missing, truncated, not a safetensors file, or not as it was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            header = json.loads((file.metadata() or {}).get("header", "{}"))
        digest = header.pop(DIGEST, None)  # other programs write none
        if digest is not None and digest != _digest(tensors, to_json(header)):
            raise ValueError("its content is not what was written, by its SHA-256")
    except FileNotFoundError:  # safetensors says so of what may not be read, too
        reason = f"cannot read {path}; check its permissions" if path.exists() else f"{path} is missing"
        raise FileError(reason) from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error}; check the path and its permissions") from None
    except (SafetensorError, ValueError) as error:
        raise FileError(
            f"{path} is corrupt or not a safetensors file ({error}); delete it or restore it"
        ) from error
    return tensors, header


def _digest(tensors: Mapping[str, Tensor], header: str) -> str:
    return hashlib.sha256((fingerprint(tensors) + header).encode()).hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
