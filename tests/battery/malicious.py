"""Malicious files: what a stranger could put in the place of a file of ours."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import socket
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.flag}",)


def running(make: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    """In the place of a file, what would make another one, the flag, if it were run."""

    def change(path: Path, flag: Path) -> None:
        path.unlink(missing_ok=True)
        make(path, flag)

    return change


def replaced_by(make: Callable[[Path], None]) -> Callable[[Path, Path], None]:
    def change(path: Path, flag: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return change


def write_objects(path: Path, flag: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.array([Evil(flag)], object), allow_pickle=True)


def write_archive_of_objects(path: Path, flag: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, frames=np.array([Evil(flag)], object))


def write_calling_header(path: Path, flag: Path) -> None:
    """An .npy whose header is Python that calls something."""
    header = f"{{'descr': __import__('os').system('touch {flag}'), 'fortran_order': False, 'shape': (1,)}}\n".encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def write_zip(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"x")

    return make


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("../../evil")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))


def write_overlapping(path: Path) -> None:
    """A safetensors file whose two tensors share their bytes."""
    part = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"a": part, "b": part}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))


def write_socket(path: Path) -> None:
    short = Path(tempfile.mkdtemp()) / "s"  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(short))
    shutil.move(short, path)


MALICIOUS: dict[str, Callable[[Path, Path], None]] = {
    "a pickle": running(lambda p, flag: (p.write_bytes(pickle.dumps(Evil(flag))), None)[1]),
    "a pickle in text": running(lambda p, flag: (p.write_bytes(pickle.dumps(Evil(flag), 0)), None)[1]),
    "objects in npy": running(write_objects),
    "objects in npz": running(write_archive_of_objects),
    "a header that calls": running(write_calling_header),
    "torch.save": running(lambda p, flag: torch.save({"x": torch.zeros(1)}, p)),
    "torch.save of code": running(lambda p, flag: torch.save(Evil(flag), p)),
    "a zip that climbs out": replaced_by(write_zip("../../evil.npy")),
    "a zip of the root": replaced_by(write_zip("/evil.npy")),
    "a tar that climbs out": replaced_by(write_tar),
    "a gzip of nothing but zeros": replaced_by(lambda p: (p.write_bytes(gzip.compress(bytes(2**26))), None)[1]),
    "tensors that overlap": replaced_by(write_overlapping),
    "a socket": replaced_by(write_socket),
    "a link to a file of the system": replaced_by(lambda p: p.symlink_to("/etc/passwd")),
    "a link to /dev/zero": replaced_by(lambda p: p.symlink_to("/dev/zero")),
    "a link to /proc/self/mem": replaced_by(lambda p: p.symlink_to("/proc/self/mem")),
    "a pipe": replaced_by(lambda p: os.mkfifo(p)),
    "a folder": replaced_by(lambda p: p.mkdir()),
    "a link to itself": replaced_by(lambda p: p.symlink_to(p)),
    "a broken link": replaced_by(lambda p: p.symlink_to("nowhere")),
    "deep JSON": replaced_by(lambda p: p.write_text("[" * 200_000)),
    "a number of a million digits": replaced_by(lambda p: p.write_text('{"format_version": ' + "9" * 10**6 + "}")),
    "a YAML tag": running(lambda p, flag: (p.write_text(f"!!python/object/apply:os.system ['touch {flag}']"), None)[1]),
    "NaN": replaced_by(lambda p: p.write_text('{"format_version": NaN}')),
    "half a character": replaced_by(lambda p: (p.write_bytes(b'{"format_version": "\\ud800\xc3"}'), None)[1]),
    "a sparse giant": replaced_by(lambda p: (p.touch(), os.truncate(p, 2**36))[0]),
    "a header of 2^63": replaced_by(lambda p: p.write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")),
}
