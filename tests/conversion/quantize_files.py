"""Small models and importance matrices, and the files that llama-quantize of 2026 wrote from them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from llamakit.formats.gguf import GGUFFile, TensorData, copied_tensor, open_gguf, typed_metadata, write_gguf
from llamakit.ggml import GGMLType
from tests.formats.files import split_gguf
from tests.tiny import cached_tiny_gguf

WIDE = {"n_embd": 256, "n_ff": 256, "n_merges": 5, "n_head_kv": 1}
MODELS = {
    "plain": {**WIDE, "n_layer": 1},
    "two": {"n_embd": 64, "n_ff": 96, "n_merges": 5, "n_layer": 2},
    "narrow": {"n_embd": 64, "n_ff": 160, "tokenizer": "bpe", "tied": True, "biases": True, "rope": "llama3"},
    "f16": {**WIDE, "type": "F16", "n_layer": 1},
    "bf16": {**WIDE, "type": "BF16", "n_layer": 1},
    "q8_0": {**WIDE, "type": "Q8_0", "n_layer": 1},
    "q4_k": {**WIDE, "type": "Q4_K", "n_layer": 1},
    "iq2_xs": {**WIDE, "type": "IQ2_XS", "n_layer": 1},
}
DATASET = "d" * 126 + "éé"  # cut inside of a letter


def write_model(folder: Path, name: str) -> Path:
    """model.gguf of this name in the folder, with its importance matrix, imatrix.gguf, where its rows are F32."""
    path = folder / "model.gguf"
    if name == "experts":
        _write_experts(path)
    elif name == "split":
        split_gguf(path, write_model(folder, "two"), 9)
        path.unlink()
        return next(folder.glob("model-00001-of-*.gguf"))
    else:
        shutil.copyfile(cached_tiny_gguf(**MODELS[name]), path)
    if MODELS.get(name, {}).get("type", "F32") == "F32":
        write_imatrix(folder / "imatrix.gguf", path)
    return path


def _write_experts(path: Path) -> None:
    rng = np.random.default_rng(5)
    source = cached_tiny_gguf(**WIDE, n_layer=1)
    with GGUFFile(source) as file:
        tensors = []
        for name, info in file.tensors.items():
            if "ffn_" in name and "norm" not in name:
                shape = (2, *info.shape)
                numbers = rng.normal(0, 0.1, shape).astype(np.float32)
                tensors.append(TensorData(name.replace(".weight", "_exps.weight"), shape, GGMLType.F32, numbers))
            else:
                tensors.append(copied_tensor(file, name))
        gate = rng.normal(0, 0.1, (2, 256)).astype(np.float32)
        tensors.append(TensorData("blk.0.ffn_gate_inp.weight", gate.shape, GGMLType.F32, gate))
        metadata = typed_metadata(file) | {"llama.expert_count": 2, "llama.expert_used_count": 1}
        write_gguf(path, metadata=metadata, tensors=tensors)


def write_imatrix(path: Path, model: Path, *, scale: float = 1.0) -> None:
    """Importances for every matrix but output.weight; of two experts the second was never asked."""
    rng = np.random.default_rng(3)
    tensors = []
    with open_gguf(model) as file:
        for name, info in sorted(file.tensors.items()):
            if len(info.shape) < 2 or name == "output.weight" or "gate_inp" in name:
                continue
            n_matrices = info.shape[0] if len(info.shape) == 3 else 1
            counts = np.full((n_matrices, 1), 64, np.float32)
            counts[1:] = 0
            sums = (rng.normal(0, 1, (n_matrices, info.shape[-1])) ** 2 * counts * scale).astype(np.float32)
            shape = sums.shape if n_matrices > 1 else sums.shape[1:]
            tensors.append(TensorData(f"{name}.in_sum2", shape, GGMLType.F32, sums))
            tensors.append(TensorData(f"{name}.counts", counts.shape, GGMLType.F32, counts))
    metadata = {
        "general.type": "imatrix", "imatrix.datasets": [DATASET, "more.txt"], "imatrix.chunk_count": 7,
        "imatrix.chunk_size": 128,
    }  # fmt: skip
    write_gguf(path, metadata=metadata, tensors=tensors)


_NAMES = (
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ4_NL IQ4_XS "
    "TQ1_0 TQ2_0 MXFP4_MOE COPY"
)
_TYPES = _NAMES.split()
_I = "--imatrix imatrix.gguf"
#: command lines of llama-quantize: model, options, type; model.gguf and OUT stand between options and type
CASES: list[tuple[str, str, str]] = [
    *(("plain", "", kind) for kind in _TYPES),
    *(("plain", _I, kind) for kind in [*_TYPES, "Q2_K_S"]),
    *(("narrow", "", kind) for kind in ("Q4_0", "Q2_K", "Q4_K_M", "Q5_K_S", "Q6_K", "IQ4_XS", "TQ2_0")),
    *(("narrow", _I, kind) for kind in ("Q4_K_M", "Q3_K_L", "IQ4_NL")),
    *(("experts", "", kind) for kind in ("Q4_K_M", "MXFP4_MOE")),
    *(("experts", _I, kind) for kind in ("Q4_0", "Q2_K_S", "Q3_K_M", "Q5_K_M", "Q6_K", "IQ4_XS")),
    *((name, "", kind) for name in ("f16", "bf16") for kind in ("F32", "F16", "BF16", "Q8_0")),
    *((name, "--allow-requantize", kind) for name in ("q8_0", "q4_k", "iq2_xs") for kind in ("F32", "F16", "Q4_0")),
    ("q8_0", "", "Q8_0"),
    ("iq2_xs", "", "COPY"),
    ("plain", "--pure", "Q4_K_M"),
    ("two", "--leave-output-tensor", "Q4_0"),
    ("two", "--output-tensor-type q5_0", "Q4_0"),
    ("two", "--token-embedding-type f16 --output-tensor-type F32", "Q4_0"),
    ("two", r"--tensor-type ATTN_V=q8_0 --tensor-type blk\.[0-1]\.ffn=q4_1", "Q4_0"),
    ("two", "--tensor-type-file rules.txt", "Q4_0"),
    ("two", f"{_I} --include-weights attn --include-weights ffn_up", "Q4_0"),
    ("two", f"{_I} --exclude-weights attn", "Q4_0"),
    ("two", f"{_I} --include-weights nothing", "Q4_0"),
    ("two", "--imatrix ./imatrix.gguf --override-kv quantize.imatrix.dataset=str:mine", "Q4_0"),
    (
        "two",
        "--override-kv general.name=str:mine --override-kv a.b=float:0.1 --override-kv a.c=bool:true "
        "--override-kv llama.context_length=int:77 --override-kv general.file_type=int:3",
        "Q4_0",
    ),
    ("two", "--prune-layers 0", "Q4_0"),
    ("two", f"--prune-layers 1 {_I}", "Q4_K_M"),
    ("two", "--keep-split", "Q8_0"),
    ("split", "", "Q4_0"),
    ("split", "--keep-split", "Q4_0"),
    ("split", "--keep-split", "COPY"),
    ("two", "--max-buffer-size 1", "q4_k"),
    ("two", "", "2"),
]
RULES = "attn_k=q5_1\n blk\\.1=q8_0  output=q5_0\n"
#: the first digits of the sha256 of what was written, parts one after the other, in the order of CASES
_DIGITS = """
d10770c8fa414361 f4ac29612c14b003 f137fbff66d79cc5 4d98ad282bcae6fd 9856ca6cc8335b74 729920adb8e37546
5b951e2aa91c8a3e 5169d0cae8760460 ea41ff21390d46e6 11d92ca39aac1821 c85eecd832b14756 5b4367d5d442cdc6
33e8d6f97843955a 236e4dc331333c47 2a852123e1fec492 c64d2d332069459c afcefbc2c77a39a8 5ea794ecdcad4f7d
924584ebfb90c4f2 df576e8625cbd2f7 30d408da04b03238 941eccf1b0488241 40ccd3eff99db6c5 8b0b0b0cd4fc7086
6ccd83b89e5f6568 8e28118cffd53dec d55d3538d7bb93f7 fd24c21ee1b0cf1c c201af567800ea75 3745ec09a2b3543a
2fc823e3b4da1a55 238ee8be59039342 c28439f5372b3eae ad3c7ba7c4892f1b b305aece41cbf182 fdc961b89d7c244a
297ed404828f4a95 2975984b9c26a90f 0f6a5e84b2c88cd6 b424c1e0976f5243 0edbb82fa33948f4 28cc26cd49ef0cb0
e1c0d8935a570698 fdf7918746da20a9 79d1811e4d21de7a 09610c6dbc27b677 6deb12f824cbfa55 6f6348f782cbbe7d
628135b78024d2d0 09030d6cbb2627b8 d504a2ab135259ba 94ef9d3a816826f5 bdaca269b6ef3a1f 784150ad2e80686e
374a315e3391cc51 04dcb2d8b102ad4f f48deabf7a0294e1 2f05621f88cc27af 59bf1fca76b26e4c 834f2f1ebb2d6cde
53243828e6bfbebd b3beafaa23859411 188d80e5bd6d3587 127fc91b64a342ed 04b704f2b61f23cd f852b78d931efe04
f4ac29612c14b003 88285382a04e4193 56eeb5fb0fac7f61 e0662dc7db3b68e9 81a844ba70c0dfd4 f137fbff66d79cc5
5fc373f206d4577e cbec24d0e7cf40f8 0a1ace893ec5d8a8 2e714f3c25ad4ae8 dce18d1db469860b f8338193a4a47e64
adf78ecb31f9b713 db4515c57fd0099b c585e10ce37953fe 1f2062d5611a6809 5169d0cae8760460 619598236ecc2323
8e631f381aad7fb9 b7361d298f57c47b 5cf4ace1819d924b 7575de1ed9a2ad67 3ef29b44b18fddaf b53391f2536f1e98
dc403d7e1c697841 acbafd43ac18a40b 85b3e2004384e94e 1f64d093e8a114f0 e6d19bff243b4652 d5eb401f5e78a284
fc61496d8f1e24a9 dcd6677652f8826a 85b3e2004384e94e 810f10d33ddf0b55 eeda1889f160c1cf c776241941a6e22d
85b3e2004384e94e
"""
HASHES = _DIGITS.split()
