"""Pickles that ask for nothing bad by name, and would do harm: they are known by their operations alone."""

from __future__ import annotations

import pickle
import random
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from llamakit.errors import FormatError
from llamakit.formats import torch_pickle
from llamakit.formats.torch_file import TorchFile
from llamakit.formats.torch_pickle import Storage, check_pickle
from tests.formats.torch_payloads import archive

STORAGE = bytes(range(48))  # 12 float32


def text(value: str) -> bytes:
    """A text, as protocol 2 writes it."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """A whole number, of 32 bits or as a long one."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def tensor(
    shape: tuple[int, ...] = (3, 4), stride: tuple[int, ...] = (4, 1), offset: int = 0, key: str = "0", n: int = 12,
    kind: str = "FloatStorage",
) -> bytes:  # fmt: skip
    """The operations that leave a tensor on the stack."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(n) + b"tQ"
    sizes = b"".join(b"(" + b"".join(map(number, row)) + b"t" for row in (shape, stride))
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sizes + b"\x89" + hooks + b"tR"


def call(module: str, name: str, arguments: bytes) -> bytes:
    """The operations that call a function; arguments: those that leave a tuple on the stack."""
    return f"c{module}\n{name}\n".encode() + arguments + b"R"


def whole(value: bytes, key: bytes = text("w")) -> bytes:
    """A pickle of {key: value}."""
    return b"\x80\x02}" + key + value + b"s."


#: what torch.load(weights_only=True) may do, and no model needs
ASKS = {
    "bytearray of a terabyte": call("builtins", "bytearray", number(1 << 40) + b"\x85"),
    "tensor of a terabyte": call("torch", "FloatTensor", number(1 << 38) + b"\x85"),
    "storage of a terabyte": call("torch.storage", "UntypedStorage", number(1 << 40) + b"\x85"),
    "typed storage of a terabyte": call("torch", "FloatStorage", number(1 << 38) + b"\x85"),
    "rebuild from a type": call("torch._tensor", "_rebuild_from_type_v2", b"(NN)}t"),
    "rebuild from numpy": call("torch._utils", "_rebuild_device_tensor_from_numpy", b"(NNNNt"),
    "rebuild a subclass": call("torch._utils", "_rebuild_wrapper_subclass", b"(NNNt"),
    "a parameter with attributes": call(
        "torch._utils", "_rebuild_parameter_with_state", b"(" + tensor() + b"\x88}}" + text("data") + b"K\1st"
    ),
    "Counter": call("collections", "Counter", b")"),
    "set": call("builtins", "set", b"]\x85"),
    "bytes": call("_codecs", "encode", text("x") + text("latin1") + b"\x86"),
    "numpy's scalar of objects": call("numpy._core.multiarray", "scalar", b"N" + text("x") + b"\x86"),
    "a class of its own": b"c__main__\nModel\n)\x81}b",
    "a name with a line of its own": call("os\x1b[31m", "system", b")"),
}
_MILLION = b"]q\0"
for _i in range(7):  # ten times the level before
    _MILLION = b"(" + _MILLION + (b"h" + bytes([_i])) * 9 + b"tq" + bytes([_i + 1])
WRONG = {
    "lists nested": b"]" * 20000 + b"a" * 19999,
    "a list into itself": b"]q\0h\0a",
    "a million references": _MILLION,
    "a storage that claims more": tensor(n=13),
    "a storage that claims less": tensor(n=11),
    "a storage that claims an exabyte": tensor((1 << 60,), (1,), n=1 << 60),
    "a storage that claims less than nothing": tensor(n=-12),
    "a storage of another type": tensor(kind="DoubleStorage"),
    "a storage that is the pickle": tensor(key="../data.pkl"),
    "a storage of a long name": tensor(key="0" * 100),
    "steps backwards": tensor(stride=(-4, 1)),
    "rows of less than nothing": tensor(shape=(-3, 4)),
    "a shape of another kind": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\0NN\x89NtR",
    "a shape beyond 64 bits": tensor(shape=(1 << 70, 4)),
    "a shape whose product wraps": tensor((1 << 32, 1 << 32), (0, 1)),
    "a call of a tensor": tensor() + b")R",
    "a call of a dtype": b"ctorch\nfloat32\n)R",
    "a number of a thousand bits": b"\x8a\xff" + b"\x7f" * 255,
    "a text that is too long": b"X\xff\xff\xff\x7fabc",
    "a text that is no text": b"X\2\0\0\0\xff\xff",
    "a far memory that is empty": b"j\xff\xff\xff\xff",
    "a mark that is missing": b"t",
    "a set by its operation": b"\x8f",
    "an operation that nobody has": b"\xff",
    "state into a tensor": tensor() + b"(K\0K\0tb",
}
PICKLES = {name: whole(value) for name, value in (ASKS | WRONG).items()} | {
    "a key nested deeply": whole(b"K\1", b")" + b"\x85" * 1_000_000),  # hash() of it ends the process
    "a key that is a tuple": whole(b"K\1", b"K\1\x85"),
    "a key of a megabyte": whole(b"K\1", text("x" * (1 << 20))),
    "nothing": b"",
    "protocol 4": pickle.dumps({"a": 1}, 4),
    "protocol 0": pickle.dumps({"a": 1}, 0),
    "two protocols": b"\x80\x02" + whole(b"K\1"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_what_is_not_loaded(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.pt").write_bytes(archive(PICKLES[name], {"0": STORAGE}))
    with pytest.raises(FormatError) as caught:
        TorchFile(tmp_path / "x.pt")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ASKS)
def test_what_no_model_needs_does_not_reach_torch(name: str) -> None:
    with pytest.raises(FormatError, match=r"x\.pt: its pickle is not loaded: it (asks for|has|calls) ") as caught:
        check_pickle(PICKLES[name], "x.pt")
    assert "could run any code" in str(caught.value.hint)


def test_it_says_what_is_asked_for() -> None:
    with pytest.raises(FormatError, match=r"its pickle is not loaded: it asks for builtins\.bytearray$"):
        check_pickle(PICKLES["bytearray of a terabyte"], "x.pt")
    with pytest.raises(FormatError, match="nested more than 64 deep"):
        check_pickle(PICKLES["a key nested deeply"], "x.pt")


def test_methods_put_out_of_the_way(tmp_path: Path) -> None:
    """A pickle may give an OrderedDict attributes that hide its methods: they are not asked, let alone called."""
    ordered = b"ccollections\nOrderedDict\n)R" + text("w") + tensor() + b"s"
    state = b"}" + text("items") + b"ccollections\nOrderedDict\ns" + text("keys") + b"Ns"
    (tmp_path / "x.pt").write_bytes(archive(b"\x80\x02" + ordered + state + b"b.", {"0": STORAGE}))
    with TorchFile(tmp_path / "x.pt") as file:
        assert file.read("w").tobytes() == STORAGE


def test_what_torch_saves_passes(tmp_path: Path) -> None:
    """Every type and container of a checkpoint, and as many storages as there are."""
    kinds = ["float32", "float16", "bfloat16", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "bool",
             "complex64", "float8_e4m3fn", "float8_e5m2"]  # fmt: skip
    layer = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    saved: dict[str, Any] = {
        **{kind: torch.zeros(3).to(getattr(torch, kind)) for kind in kinds},
        "model": layer.state_dict(), "parameter": layer.weight, "optimizer": optimizer.state_dict(),
        "ordered": OrderedDict(a=1), "values": [1, -1, 1 << 40, 2.5, "ä", None, True, (), {}, torch.Size([1, 2])],
        "long": list(range(3000)), "dtype": torch.bfloat16, "sub": layer.weight[1:, 1:],
    }  # fmt: skip
    torch.save(saved, tmp_path / "x.pt")
    with TorchFile(tmp_path / "x.pt") as file:
        assert {*file.tensors, *file.other_dtypes} >= {*kinds, "model/weight", "parameter", "optimizer/state/0/exp_avg"}
        assert file.values["long"] == saved["long"]
        assert file.read("sub").tobytes() == layer.weight[1:, 1:].detach().contiguous().numpy().tobytes()
    assert check_pickle(whole(tensor()), "x.pt") == [Storage("data/0", 48)]


def test_more_operations_than_a_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pickle, "_MAX_OPERATIONS", 5)
    with pytest.raises(FormatError, match="more than 5 operations"):
        check_pickle(whole(tensor()), "x.pt")


def test_mutants(tmp_path: Path) -> None:
    """A few bytes changed in the pickle: an error of ours, or a file that reads."""
    sound, rng, refused = whole(tensor() + text("x") + b"](K\1G\0\0\0\0\0\0\0\0e\x86"), random.Random(0), 0
    for _ in range(400):
        mutant = bytearray(sound)
        for _ in range(rng.choice((1, 1, 2, 3))):
            mutant[rng.randrange(len(mutant))] = rng.choice((rng.randrange(256), *b"RbsQ.t(\x85\x81h"))
        (tmp_path / "x.pt").write_bytes(archive(bytes(mutant), {"0": STORAGE}))
        try:
            with TorchFile(tmp_path / "x.pt") as file:
                for name in file.tensors:
                    file.read(name)
        except FormatError:
            refused += 1
    assert refused > 200
