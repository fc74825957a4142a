"""What `bench` prints: llama-bench's records and formats (tools/llama-bench/llama-bench.cpp), our own fields last."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import llamakit
from llamakit.files import escape_control

if TYPE_CHECKING:
    from llamakit.formats.base import ModelFile
    from llamakit.inference.bench import Result
    from llamakit.inference.limits import Limits

Format = Literal["md", "csv", "json", "jsonl", "sql"]
#: one test under llama-bench's names, in its order
Record = dict[str, Any]

_BUILD, _BUILD_NUMBER = f"llamakit {llamakit.__version__}", 0
_SAMPLES = ("samples_ns", "samples_ts")
#: column of the table -> its width, negative where text is on the left
_WIDTHS = {
    "model": -30, "size": 10, "params": 10, "backend": -10, "threads": 7, "n_batch": 7, "n_ubatch": 8, "lora": -10,
    "test": 15, "t/s": 20, "% of limit": 10,
}  # fmt: skip
#: general.file_type -> what llama.cpp calls it, where that is not its usual name
_DESCRIPTIONS = {
    "F32": "all F32", "Q2_K": "Q2_K - Medium", "MXFP4_MOE": "MXFP4 MoE", "TQ1_0": "TQ1_0 - 1.69 bpw ternary",
    "TQ2_0": "TQ2_0 - 2.06 bpw ternary", "IQ2_XXS": "IQ2_XXS - 2.0625 bpw", "IQ2_XS": "IQ2_XS - 2.3125 bpw",
    "IQ2_S": "IQ2_S - 2.5 bpw", "IQ2_M": "IQ2_M - 2.7 bpw", "IQ3_XS": "IQ3_XS - 3.3 bpw",
    "IQ3_XXS": "IQ3_XXS - 3.0625 bpw", "IQ1_S": "IQ1_S - 1.5625 bpw", "IQ1_M": "IQ1_M - 1.75 bpw",
    "IQ4_NL": "IQ4_NL - 4.5 bpw", "IQ4_XS": "IQ4_XS - 4.25 bpw", "IQ3_S": "IQ3_S - 3.4375 bpw",
    "IQ3_M": "IQ3_S mix - 3.66 bpw",
}  # fmt: skip
_MIXTURES = {"_S": " - Small", "_M": " - Medium", "_L": " - Large"}
_GUESSED = 1024


@dataclass(frozen=True)
class Subject:
    """What is measured, the same for all of its tests. backend: CPU or CUDA; kv_type: of the key-value cache."""

    file: ModelFile
    backend: str
    processor: str
    engine: str
    n_threads: int
    kv_type: str
    lora: str
    limits: Limits


def model_type(file: ModelFile) -> str:
    """Architecture, size and file type, such as `llama 135M Q4_1`: llama.cpp's words, the size by the file's own label
    or its number of weights (llama.cpp goes by the number of layers)."""
    from llamakit.conversion.quantize_metadata import kept_file_type
    from llamakit.ggml import FILE_TYPES

    label = file.metadata.get("general.size_label")
    size = label if isinstance(label, str) and label else _size_label(_n_params(file))
    number = kept_file_type(file, file.tensors.values())
    name = FILE_TYPES.get(number & ~_GUESSED, "unknown, may not work")
    described = _DESCRIPTIONS.get(name) or (name[:-2] + _MIXTURES[name[-2:]] if name[-2:] in _MIXTURES else name)
    return f"{file.metadata['general.architecture']} {size} {'(guessed) ' if number & _GUESSED else ''}{described}"


def _n_params(file: ModelFile) -> int:
    return sum(info.n_elements for info in file.tensors.values())


def _size_label(n_params: int) -> str:
    """135M, 1.1B, 293K: two digits at least, as in gguf-py."""
    unit, letter = next((u for u in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if n_params > u[0]), (1e3, "K"))
    value = n_params / unit
    return f"{value:.{max(2 - len(str(round(value)).lstrip('0')), 0)}f}{letter}"


def record(subject: Subject, result: Result) -> Record:
    """One test as llama-bench records it. What there is no choice about here has its word for the default."""
    test, on_gpu = result.test, subject.backend != "CPU"
    return {
        "build_commit": _BUILD,
        "build_number": _BUILD_NUMBER,
        "cpu_info": "" if on_gpu else subject.processor,
        "gpu_info": subject.processor if on_gpu else "",
        "backends": subject.backend,
        "model_filename": str(subject.file.path),
        "model_type": model_type(subject.file),
        "model_size": sum(info.n_bytes for info in subject.file.tensors.values()),
        "model_n_params": _n_params(subject.file),
        "n_batch": test.n_batch,
        "n_ubatch": test.n_ubatch,
        "n_threads": subject.n_threads,
        "cpu_mask": "0x0",
        "cpu_strict": False,
        "poll": 0,
        "type_k": subject.kv_type,
        "type_v": subject.kv_type,
        "n_gpu_layers": -1 if on_gpu else 0,
        "n_cpu_moe": 0,
        "split_mode": "none",
        "main_gpu": 0,
        "no_kv_offload": False,
        "flash_attn": -1,
        "devices": "auto",
        "tensor_split": "0.00",
        "tensor_buft_overrides": "none",
        "load_mode": "auto",
        "lazy_mode": "auto",
        "embeddings": False,
        "no_op_offload": 0,
        "no_host": False,
        "repack": subject.engine == "native",
        "fit_target": 0,
        "fit_min_ctx": 0,
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(result.test_time)),
        "avg_ns": result.avg_ns,
        "stddev_ns": result.stddev_ns,
        "avg_ts": result.avg_ts,
        "stddev_ts": result.stddev_ts,
        # Ours from here on.
        "engine": subject.engine,
        "lora": subject.lora,
        "limit_ts": result.limit_ts,
        "limit_share": result.limit_share,
        "read_bandwidth": round(subject.limits.read_bandwidth),
        "gemm_peak": round(subject.limits.gemm_peak),
        "samples_ns": list(result.samples_ns),
        "samples_ts": result.samples_ts,
    }


class Report:
    """Records as one text in a format, piece by piece: `header` and `row` for each, then `footer`.

    columns: of the table, those shown beside the usual ones.
    """

    def __init__(self, format: Format, *, columns: tuple[str, ...] = ()) -> None:
        self._format = format
        self._columns = [c for c in _WIDTHS if c not in ("n_batch", "n_ubatch", "lora") or c in columns]
        self._is_first = True

    def add(self, values: Record) -> str:
        """The text of one more record, the header before the first."""
        text = (self._header(values) if self._is_first else "") + self._row(values)
        self._is_first = False
        return text

    def footer(self) -> str:
        """What ends the text."""
        return {"md": f"\nbuild: {_BUILD} ({_BUILD_NUMBER})\n", "json": "\n]\n"}.get(self._format, "")

    def _header(self, values: Record) -> str:
        names = _plain(values)
        if self._format == "md":
            titles = [_aligned(name, _WIDTHS[name]) for name in self._columns]
            rules = ["-" * (abs(w) - 1) + ("-" if w < 0 else ":") for w in (_WIDTHS[name] for name in self._columns)]
            return _table_row(titles) + _table_row(rules)
        if self._format == "csv":
            return ",".join(names) + "\n"
        if self._format == "sql":
            columns = ",\n".join(f"  {name} {_sql_type(value)}" for name, value in names.items())
            return f"CREATE TABLE IF NOT EXISTS llama_bench (\n{columns}\n);\n\n"
        return "[\n" if self._format == "json" else ""

    def _row(self, values: Record) -> str:
        plain = _plain(values)
        if self._format == "md":
            cells = _cells(values)
            return _table_row([_aligned(cells[name], _WIDTHS[name]) for name in self._columns])
        if self._format == "csv":
            return ",".join('"' + _text(value).replace('"', '""') + '"' for value in plain.values()) + "\n"
        if self._format == "sql":
            quoted = ", ".join("'" + _text(value).replace("'", "''") + "'" for value in plain.values())
            return f"INSERT INTO llama_bench ({', '.join(plain)}) VALUES ({quoted});\n"
        pairs = [f"{json.dumps(name)}: {_json(value)}" for name, value in values.items()]
        if self._format == "jsonl":
            return "{" + ", ".join(pairs) + "}\n"
        lines = ",\n".join(f"    {pair}" for pair in pairs)
        return ("" if self._is_first else ",\n") + f"  {{\n{lines}\n  }}"


def _plain(values: Record) -> Record:
    """What has a column in a table of one row a test."""
    return {name: value for name, value in values.items() if name not in _SAMPLES}


def _cells(values: Mapping[str, Any]) -> dict[str, str]:
    """The columns of the table as text."""
    size, n_params = values["model_size"], values["model_n_params"]
    test = (f"pp{values['n_prompt']}" if values["n_prompt"] else "", f"tg{values['n_gen']}" if values["n_gen"] else "")
    depth = f" @ d{values['n_depth']}" if values["n_depth"] else ""
    return {
        "model": escape_control(values["model_type"]),
        "size": f"{size / 2**20:.2f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB",
        "params": f"{n_params / 1e6:.2f} M" if n_params < 1e9 else f"{n_params / 1e9:.2f} B",
        "backend": values["backends"],
        "threads": str(values["n_threads"]),
        "n_batch": str(values["n_batch"]),
        "n_ubatch": str(values["n_ubatch"]),
        "lora": escape_control(values["lora"]),
        "test": "+".join(filter(None, test)) + depth,
        "t/s": f"{values['avg_ts']:.2f} ± {values['stddev_ts']:.2f}",
        "% of limit": f"{100 * values['limit_share']:.1f} %",
    }


def _aligned(text: str, width: int) -> str:
    return text.ljust(-width) if width < 0 else text.rjust(width)


def _table_row(cells: list[str]) -> str:
    return "".join(f"| {cell} " for cell in cells) + "|\n"


def _text(value: object) -> str:
    """As llama-bench's csv and sql have it: true is 1."""
    if isinstance(value, float):
        return f"{value:.6f}"
    return escape_control(str(int(value) if isinstance(value, bool) else value))


def _json(value: object) -> str:
    if isinstance(value, list):
        return f"[ {', '.join(f'{v:.6g}' if isinstance(v, float) else str(v) for v in value)} ]"
    return f"{value:.6f}" if isinstance(value, float) else json.dumps(value)


def _sql_type(value: object) -> str:
    return "TEXT" if isinstance(value, str) else "REAL" if isinstance(value, float) else "INTEGER"
