"""A checkpoint's pickle, judged by its bytes before anything runs it.

torch.load(weights_only=True) restricts what a pickle can do, and has been broken before; it also allows what no model
needs: storage of any size out of nothing, or keys nested so deeply that Python crashes. So every operation is read
here first (pickletools only reads), and only what torch.save writes for tensors and plain values passes.
"""

from __future__ import annotations

import os
import pickletools
from typing import Any, NamedTuple

from llamakit.errors import FormatError
from llamakit.files import escape_control

_MAX_OPERATIONS = 1 << 21
_MAX_DEPTH, _MAX_KEY = 64, 64

#: kind of storage -> bytes of an element
_STORAGES = {
    "torch FloatStorage": 4, "torch HalfStorage": 2, "torch BFloat16Storage": 2, "torch DoubleStorage": 8,
    "torch CharStorage": 1, "torch ShortStorage": 2, "torch IntStorage": 4, "torch LongStorage": 8,
    "torch ByteStorage": 1, "torch BoolStorage": 1, "torch ComplexFloatStorage": 8, "torch ComplexDoubleStorage": 16,
    "torch.storage UntypedStorage": 1,
}  # fmt: skip
_DTYPES = (
    "float32", "float16", "bfloat16", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
    "uint64", "bool", "complex64", "complex128", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu",
)  # fmt: skip
_REBUILD = frozenset(f"torch._utils _rebuild_tensor{version}" for version in ("", "_v2", "_v3"))
#: what a pickle may call: none of these does more than to describe a tensor, or to make an empty dict
_CALLED = _REBUILD | {"torch._utils _rebuild_parameter", "torch Size", "collections OrderedDict"}
_NAMED = _CALLED | _STORAGES.keys() | {f"torch {dtype}" for dtype in _DTYPES}
_PUTS, _GETS = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
#: the container stays, and is as deep as what is put into it makes it
_UPDATES = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}
_OPERATIONS = _PUTS | _GETS | _UPDATES | {
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BINPERSID", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE",
    "EMPTY_LIST", "EMPTY_DICT", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINSTRING",
}  # fmt: skip


_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "GLOBAL"}
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"}


class Storage(NamedTuple):
    """A storage that the pickle speaks of: the name of its record, and how many bytes it says that are."""

    name: str
    n_bytes: int


class _Value(NamedTuple):
    """A value on the stack: how deep its nesting is, and what it is, for whole numbers, texts, names and tuples."""

    depth: int
    what: Any = None


_MARK = _Value(-1)


class _Machine:
    """What would be on the stack, without making anything of it. storages: those that were spoken of."""

    def __init__(self) -> None:
        self.storages: list[Storage] = []
        self._stack: list[_Value] = []
        self._memo: dict[int, _Value] = {}

    def step(self, operation: pickletools.OpcodeInfo, argument: Any) -> int:
        """The depth of what an operation leaves on top.

        Raises IndexError or KeyError for what is not on the stack or in the memo, ValueError for an impossible tensor.
        """
        name = operation.name
        if name in _PUTS:
            self._memo[argument] = self._stack[-1]
        elif name in _GETS:
            self._stack.append(self._memo[argument])
        elif name == "MARK":
            self._stack.append(_MARK)
        else:
            taken = self._take(operation.stack_before)
            if operation.stack_after:
                self._stack.append(self._result(name, argument, taken))
        return self._stack[-1].depth if self._stack else 0

    def _take(self, before: list[pickletools.StackObject]) -> list[_Value]:
        """What an operation takes from the stack, lowest first; all down to the mark where it takes a slice."""
        if pickletools.stackslice not in before:
            return [self._stack.pop() for _ in before][::-1]
        taken = []
        while (value := self._stack.pop()) is not _MARK:
            taken.append(value)
        taken += [self._stack.pop() for _ in before[:-2]]
        return taken[::-1]

    def _result(self, name: str, argument: Any, taken: list[_Value]) -> _Value:
        if name in _UPDATES:
            return _Value(max(taken[0].depth, 1 + max((value.depth for value in taken[1:]), default=-1)))
        what = None
        if name in _LITERALS:
            what = argument
        elif name in _TUPLES:
            what = tuple(value.what for value in taken)
        elif name == "BINPERSID":
            self.storages.append(_storage(taken[0].what))
        elif name == "REDUCE":
            _check_call(taken[0].what, taken[1].what)
        return _Value(1 + max((value.depth for value in taken), default=-1), what)


def _storage(what: Any) -> Storage:
    """("storage", kind, key, device, number of elements), as torch.save names a storage."""
    match what:
        case ("storage", str(kind), str(key), str(), int(n)) if kind in _STORAGES and len(key) <= _MAX_KEY and n >= 0:
            return Storage(f"data/{key}", n * _STORAGES[kind])
    raise ValueError("it has a storage that is not described as torch.save does it")


def _check_call(function: Any, arguments: Any) -> None:
    """A tensor is described by (storage, offset, shape, strides, ...), where torch does not refuse all that is below
    zero."""
    if not isinstance(function, str) or function not in _CALLED:
        raise ValueError("it calls what is no function")
    if function not in _REBUILD:
        return
    match arguments:
        case (_, int(offset), tuple(shape), tuple(strides), *_) if len(shape) == len(strides):
            if all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides)):
                return
    raise ValueError("it has a tensor that is not described as torch.save does it")


def check_pickle(raw: bytes, path: str | os.PathLike[str]) -> list[Storage]:
    """The storages that a pickle speaks of, which asks for nothing that a model does not need.

    Raises FormatError for one that does, for a broken one, for nesting that is too deep, and for more operations than
    the largest model has.
    """
    machine = _Machine()
    try:
        for n, (operation, argument, _) in enumerate(pickletools.genops(raw)):
            _check_operation(operation.name, argument, n)
            if machine.step(operation, argument) > _MAX_DEPTH:
                raise ValueError(f"its values are nested more than {_MAX_DEPTH} deep")
    except (ValueError, IndexError, KeyError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it takes what is not there"
        raise FormatError(
            f"its pickle is not loaded: {escape_control(reason[:200])}",
            path=path,
            hint="only tensors and plain values are; a pickle that asks for more could run any code",
        ) from error
    return machine.storages


def _check_operation(name: str, argument: Any, n: int) -> None:
    if n >= _MAX_OPERATIONS:
        raise ValueError(f"it has more than {_MAX_OPERATIONS} operations")
    if (name == "PROTO") != (n == 0) or (name == "PROTO" and argument != 2):
        raise ValueError("it is not of protocol 2, in which torch.save writes")
    if name not in _OPERATIONS:
        raise ValueError(f"it has the operation {name}, which torch.save does not write")
    if name == "GLOBAL" and argument not in _NAMED:
        raise ValueError(f"it asks for {str(argument).replace(' ', '.')}")
    if name == "LONG1" and not -(2**63) <= argument < 2**63:
        raise ValueError("it has a number of more than 64 bits")
