"""A Hugging Face folder to GGUF: `llamakit convert` beside convert_hf_to_gguf.py's way, tensor by tensor in numpy.

    python benchmarks/convert.py [--peer path/to/convert_hf_to_gguf.py]

The peer's way: every tensor to float32, q and k permuted, quantized by `gguf.quants`, written by `GGUFWriter`. With
--peer the script itself is timed as well. Both sides are processes of their own, imports included, and alternate;
ours runs without its verification, whose time is told apart. Goals: at least twice as fast, and a peak of memory under
600 MB above the interpreter with torch.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import add_common_options, environment, load, machine, write_json
from models import add_place_options, make, workplace

_GOAL_RATIO, _GOAL_BYTES = 2.0, 600e6


def numpy_way(folder: str, target: str, outtype: str) -> None:
    """In a process of its own: config and vocabulary by our reader, all the rest as convert_hf_to_gguf.py does it."""
    import gguf
    import torch
    from safetensors import safe_open

    from llamakit.formats.names import gguf_name, rotary_heads

    config = json.loads((Path(folder) / "config.json").read_text())
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    writer = gguf.GGUFWriter(target, "llama")
    with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            data = file.get_tensor(name)
            data = data if data.dtype in (torch.float16, torch.float32) else data.float()
            ours = gguf_name(name) or name
            heads = rotary_heads(ours, config["num_attention_heads"], config["num_key_value_heads"])
            if heads is not None:
                shape = data.shape
                data = data.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
            wanted = gguf.GGMLQuantizationType.F32 if data.ndim < 2 else kind
            writer.add_tensor(ours, gguf.quants.quantize(data.numpy(), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def timed(command: list[str], threads: int) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds, peak bytes) of a process."""
    begin = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = "import resource,subprocess,sys; code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode; " \
              "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(code)"  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", program, *command], env=environment(threads), capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{ran.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begin, cpu, int(ran.stdout)


def commands(folder: Path, directory: Path, outtype: str, peer: str | None) -> dict[str, list[str]]:
    """Name -> command line of everything that is timed."""
    python = sys.executable
    ours = [python, "-m", "llamakit", "convert", str(folder), "--outtype", outtype]
    found = {
        "ours": [*ours, "-o", str(directory / "ours.gguf"), "--no-verify"],
        "numpy": [python, __file__, "--child", str(folder), str(directory / "numpy.gguf"), outtype],
    }
    if peer:
        found["peer"] = [python, peer, str(folder), "--outtype", outtype, "--outfile", str(directory / "peer.gguf")]
    return found | {"ours, verified": [*ours, "-o", str(directory / "ours.gguf")]}


def measure(folder: Path, directory: Path, outtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rounds of all commands in turn, in another order each time; the first does not count."""
    every = commands(folder, directory, outtype, arguments.peer)
    taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in every}
    for number in range(arguments.rounds + 1):
        names = list(every) if number % 2 else list(reversed(every))
        for name in names:
            result = timed(every[name], arguments.threads)
            if number:
                taken[name].append(result)
            for path in directory.glob("*.gguf"):
                if path.stem in ("ours", "numpy", "peer"):
                    path.unlink()
    figures: dict[str, Any] = {
        name: {"wall_s": statistics.median(r[0] for r in runs), "cpu_s": statistics.median(r[1] for r in runs),
               "peak_bytes": max(r[2] for r in runs)}
        for name, runs in taken.items()
    }  # fmt: skip
    for name in ("numpy", "peer"):
        if name in figures:
            ratios = [theirs[0] / ours[0] for theirs, ours in zip(taken[name], taken["ours"], strict=True)]
            figures[name] |= {"ratio": statistics.median(ratios), "rounds": sorted(ratios)}
    return figures


def show(outtype: str, figures: dict[str, Any], torch_bytes: int) -> None:
    """A line for each side."""
    print(f"\n{outtype}")
    for name, f in figures.items():
        ratio = f", {f['ratio']:.2f} times ours ({f['rounds'][0]:.2f} to {f['rounds'][-1]:.2f})" if "ratio" in f else ""
        print(f"  {name:15} {f['wall_s']:6.1f} s, CPU {f['cpu_s']:6.1f} s, peak {f['peak_bytes'] / 1e6:6.0f} MB{ratio}")
    above = figures["ours"]["peak_bytes"] - torch_bytes
    print(f"  goals: {_GOAL_RATIO:.0f} times, got {figures['numpy']['ratio']:.2f}; memory above torch under "
          f"{_GOAL_BYTES / 1e6:.0f} MB, got {above / 1e6:.0f} MB")  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        numpy_way(*sys.argv[2:5])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", help="shape of the model, of benchmarks/models.py (default: 1b)")
    parser.add_argument("--outtypes", nargs="+", default=["f16", "q8_0"], help="default: f16 q8_0")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default: 3)")
    parser.add_argument("--peer", help="path of convert_hf_to_gguf.py, to be timed as well")
    add_common_options(parser)
    add_place_options(parser)
    arguments = parser.parse_args()
    with workplace(arguments.dir, arguments.keep) as directory:
        folder = directory / f"{arguments.shape}-hf"
        if not folder.exists():
            model = make(f"{arguments.shape}-bf16", directory)
            making = [sys.executable, "-m", "llamakit", "convert", str(model), "-o", str(folder), "--no-verify"]
            timed(making, arguments.threads)
            model.unlink()
        torch_bytes = timed([sys.executable, "-c", "import torch"], 1)[2]
        print(f"{machine()['cpu']}, {arguments.threads} threads, load {load()}, torch alone {torch_bytes / 1e6:.0f} MB")
        results = {"torch_bytes": torch_bytes}
        for outtype in arguments.outtypes:
            results[outtype] = measure(folder, directory, outtype, arguments)
            show(outtype, results[outtype], torch_bytes)
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
