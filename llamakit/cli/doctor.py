"""`llamakit doctor`: what is in use on this machine, and what to do where something is missing."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llamakit
from llamakit import native
from llamakit.cli import render
from llamakit.cli.options import JsonOption
from llamakit.errors import EXIT_FAILURE, EXIT_OK, UsageError
from llamakit.files import available_memory_bytes

_PACKAGES = ("torch", "numpy", "gguf", "typer", "rich", "huggingface_hub")


def doctor(json: JsonOption = False) -> int:
    """Say what is in use: versions, device, threads, native code, memory. Exit 1: something is broken."""
    found: dict[str, Any] = {"versions": _versions(), **_compute()}
    found["native"], problems = _native()
    found["memory"] = {"total": _total_memory(), "available": available_memory_bytes()}
    found["temporary"] = _temporary()
    if not found["temporary"]["writable"]:
        problems.append(f"{found['temporary']['path']} cannot be written to: TMPDIR names another directory")
    found["problems"] = problems
    if json:
        render.print_json(found)
    else:
        _print(found)
    return EXIT_FAILURE if problems else EXIT_OK


def say_once_what_is_missing() -> None:
    """On stderr: that there is no native code, at the first run that would use it; of a broken one, every time.

    Raises UsageError for a LLAMAKIT_NATIVE that cannot be followed.
    """
    status = native.status()
    if status.isa is not None or status.hint is None:  # in use, or turned off on purpose
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    marker = cache / "llamakit" / "told-about-native-code"
    if marker.exists() and not status.broken:
        return
    render.note(f"no native code: {status.reason}; quantizing and decoding take longer, the results are the same")
    render.hint(f"{status.hint}; llamakit doctor says what is in use")
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:
        pass  # a home that cannot be written to: it is said again


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"llamakit": llamakit.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _compute() -> dict[str, Any]:
    """Device, threads and precision, as a command without options would have them."""
    import torch

    from llamakit.model.device import dtype_name, faster_dtype, has_fast_bf16, resolve_device

    device = resolve_device("auto")
    variable = next((name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if os.environ.get(name)), None)
    return {
        "platform": platform.platform(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name() if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "threads_from": variable or "torch",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "bf16": has_fast_bf16(device),
        "training_dtype": dtype_name(faster_dtype(device)),
    }


def _bf16(*, has: bool, trains: bool) -> str:
    if not has:
        return "emulated: training takes float32"
    return "in hardware" if trains else "in hardware, but slower than float32: training takes float32"


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _native() -> tuple[dict[str, Any], list[str]]:
    """What native code is in use, and what is broken about it."""
    try:
        status = native.status()
    except UsageError as error:
        return {"isa": None, "reason": str(error), "hint": error.hint}, [str(error)]
    shared = native.shares_threads() if status.isa else None
    problems = [f"native code: {status.reason}"] if status.broken else []
    return {**asdict(status), "threads_shared": shared}, problems


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _temporary() -> dict[str, Any]:
    import shutil
    import tempfile

    path = tempfile.gettempdir()
    return {"path": path, "free": shutil.disk_usage(path).free, "writable": os.access(path, os.W_OK)}


def _print(found: dict[str, Any]) -> None:
    versions = found["versions"]
    others = ", ".join(f"{name} {versions[name] or 'missing'}" for name in _PACKAGES)
    source = "torch's choice" if found["threads_from"] == "torch" else found["threads_from"]
    memory, temporary = found["memory"], found["temporary"]
    free = "unknown" if memory["available"] is None else render.human_bytes(memory["available"])
    lines = {
        "llamakit": f"{versions['llamakit']}, Python {versions['python']} ({sys.executable})",
        "packages": others,
        "platform": found["platform"],
        "device": f"{found['device']} ({found['device_name']})",
        "threads": f"{found['threads']} ({source}) of {found['cores']} cores",
        "bf16": _bf16(has=found["bf16"], trains=found["training_dtype"] == "bf16"),
        "native code": _native_text(found["native"]),
        "memory": f"{render.human_bytes(memory['total'])}, {free} available",
        "temporary": f"{temporary['path']}, {render.human_bytes(temporary['free'])} free",
    }
    for label, text in lines.items():
        render.say(f"{label:<12} {text}")
    if found["native"].get("hint"):
        render.hint(found["native"]["hint"])
    for problem in found["problems"]:
        render.error(problem)


def _native_text(state: dict[str, Any]) -> str:
    if state["isa"] is None:
        return f"none: {state['reason']}"
    threads = "on torch's threads" if state["threads_shared"] else "on one thread: torch's OpenMP was not found"
    return f"{state['isa']} (of {', '.join(state['isas'])}), {threads}, {state['path']}"
