"""Pickles that would do harm, and archives to put them in. Every payload of the first kind makes a canary file."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def archive(
    pickled: bytes,
    storages: dict[str, bytes] | None = None,
    more: dict[str, bytes] | None = None,
    *,
    root: str = "x/",
) -> bytes:
    """What torch.save would write around this pickle; more: name -> content of further entries."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        file.writestr(f"{root}data.pkl", pickled)
        file.writestr(f"{root}byteorder", b"little")
        for key, data in (storages or {}).items():
            file.writestr(f"{root}data/{key}", data)
        file.writestr(f"{root}version", b"3\n")
        for name, content in (more or {}).items():
            file.writestr(name, content)
    return raw.getvalue()


class _Call:
    def __init__(self, function: Any, *args: Any) -> None:
        self._reduced = (function, args)

    def __reduce__(self) -> Any:
        return self._reduced


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def called(module: str, name: str, *args: str) -> bytes:
    """A pickle that calls a function with texts."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(map(_text, args)) + b"tR."


def storage(numel: str = "6", key: str = "0", kind: str = "FloatStorage", location: str = "cpu") -> bytes:
    """A persistent id, the way in which a pickle names a storage."""
    number = b"J" + struct.pack("<i", int(numel))
    return b"(" + _text("storage") + f"ctorch\n{kind}\n".encode() + _text(key) + _text(location) + number + b"tQ"


def tensor(place: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """The state {"a": tensor}, whatever it claims."""
    numbers = [b"(" + b"".join(b"J" + struct.pack("<i", n) for n in row) + b"t" for row in (shape, strides)]
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + b"J" + struct.pack("<i", offset) + b"".join(numbers)
    return b"\x80\x02}" + _text("a") + rebuilt + b"\x89ccollections\nOrderedDict\n)RtRs."


def payloads(canary: Path) -> dict[str, Callable[[], bytes]]:
    """Name -> a whole file. The canary is what it would make, or overwrite."""
    touch, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    sixes = {"0": bytes(24)}
    pickles: dict[str, bytes] = {
        "os.system": called("os", "system", touch),
        "posix.system": called("posix", "system", touch),
        "nt.system": called("nt", "system", touch),
        "os.popen": called("os", "popen", touch),
        "subprocess.getoutput": called("subprocess", "getoutput", touch),
        "subprocess.call by protocol 4": pickle.dumps(_Call(__import__("subprocess").call, ["touch", str(canary)]), 4),
        "builtins.eval": called("builtins", "eval", code),
        "__builtin__.eval": called("__builtin__", "eval", code),
        "builtins.exec": called("builtins", "exec", code),
        "builtins.open": called("builtins", "open", str(canary), "w"),
        "builtins.getattr": called("builtins", "getattr", "", "__class__"),
        "builtins.__import__": called("builtins", "__import__", "antigravity"),
        "torch.hub": called("torch.hub", "load", str(canary), "x"),
        "torch.load": called("torch", "load", str(canary)),
        "torch.save": called("torch", "save", "x", str(canary)),
        "torch.serialization.add_safe_globals": called("torch.serialization", "add_safe_globals", "os"),
        "torch.storage._load_from_bytes": called("torch.storage", "_load_from_bytes", "x"),
        "torch.from_file": called("torch", "from_file", str(canary)),
        "pickle.loads": called("pickle", "loads", "x"),
        "runpy": called("runpy", "_run_code", code),
        "pathlib": called("pathlib", "Path", str(canary)),
        "numpy": called("numpy", "fromfile", str(canary)),
        "the old INST": b"(S" + repr(touch).encode() + b"\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + _text(touch) + b"o.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n(" + _text(touch) + b"t\x81.",
        "BUILD with a state of its own": b"\x80\x02ctorch\nTensor\n)\x81}" + _text("__reduce__") + b"cos\nsystem\nsb.",
        "a name with dots": b"\x80\x04" + _short("torch") + _short("os.system") + b"\x93(" + _text(touch) + b"tR.",
        "EXT1": b"\x80\x02\x82\x01.",
        "an unknown persistent id": b"\x80\x02" + _text("os.system") + b"Q.",
        "SETITEM on a list": b"\x80\x02]" + _text("a") + _text("b") + b"s.",
        "a memo that is not there": b"\x80\x02h\x7f.",
        "a stack that is empty": b"\x80\x02R.",
        "no end": b"\x80\x02}",
        "a mapping in itself": b"\x80\x02}q\0" + _text("a") + b"h\0s.",
        "ten doublings of a list": b"\x80\x02]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(40)) + b".",
        "_rebuild_tensor_v2 of a text": called("torch._utils", "_rebuild_tensor_v2", touch),
        "_rebuild_parameter of a text": called("torch._utils", "_rebuild_parameter", touch, "x", "y"),
        "_rebuild_sparse_tensor": called("torch._utils", "_rebuild_sparse_tensor", "x", "y"),
        "_rebuild_qtensor": called("torch._utils", "_rebuild_qtensor", "x", "y"),
        "a storage that is not there": tensor(storage(key="7"), 0, (2, 3), (3, 1)),
        "a storage outside of the archive": tensor(storage(key="../../x"), 0, (2, 3), (3, 1)),
        "a storage that says it is larger": tensor(storage("2000000000"), 0, (2000000000,), (1,)),
        "a shape that is larger": tensor(storage(), 0, (20, 30), (30, 1)),
        "strides that leave": tensor(storage(), 0, (2, 3), (30, 1)),
        "an offset that leaves": tensor(storage(), 5, (2, 3), (3, 1)),
        "an offset before": tensor(storage(), -3, (2, 3), (3, 1)),
        "strides backwards": tensor(storage(), 5, (2, 3), (-3, -1)),
        "a shape of less than nothing": tensor(storage(), 0, (-2, 3), (3, 1)),
        "one element a billion times": tensor(storage(), 0, (1000000000, 1000), (0, 0)),
        "a storage of another kind": tensor(storage(kind="QInt8Storage"), 0, (2, 3), (3, 1)),
        "a tensor without data": b"\x80\x02}" + _text("a") + b"ctorch\nTensor\n(K\x05tRs.",
    }
    return {name: (lambda raw=raw: archive(raw, sixes)) for name, raw in pickles.items()}


def _short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()
