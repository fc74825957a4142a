"""Tiny random Llama GGUFs of every variant, with real small tokenizers: same options and seed, same bytes."""

from __future__ import annotations

import atexit
import hashlib
import itertools
import math
import random
import shutil
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QType
from gguf import quants

_SUBJECTS = [
    "king",
    "queen",
    "sailor",
    "miller",
    "teacher",
    "river",
    "forest",
    "captain",
    "widow",
    "child",
    "dragon",
    "merchant",
]
_OBJECTS = [
    "crown",
    "boat",
    "letter",
    "lantern",
    "garden",
    "bridge",
    "story",
    "harbour",
    "candle",
    "secret",
    "winter",
    "mountain",
]
_VERBS = [
    "watched",
    "carried",
    "remembered",
    "followed",
    "forgot",
    "painted",
    "crossed",
    "promised",
    "wanted",
    "loved",
    "feared",
    "sold",
]
_ADJECTIVES = [
    "old",
    "quiet",
    "bright",
    "broken",
    "gentle",
    "hungry",
    "golden",
    "distant",
    "bitter",
    "clever",
    "little",
    "heavy",
]
_TAILS = ["in the morning", "before the war", "with great care", "without a word", "near the sea", "at last"]

#: types whose blocks hold 256 weights: the model's dimensions grow to fit
BLOCK_256 = frozenset(t for t, (n, _) in gguf.GGML_QUANT_SIZES.items() if n == 256)
#: every tensor type that `gguf.quants` can decode, F32 and F16 included
ALL_TYPES = ("F32", "F16", *sorted(t.name for t in quants._type_traits))


def tiny_text(n_chars: int, seed: int = 0) -> str:
    """English-like sentences in paragraphs, exactly n_chars characters of ASCII."""
    rng, parts, length = random.Random(seed), [], 0
    while length < n_chars:
        subject, thing = rng.choice(_SUBJECTS), rng.choice(_OBJECTS)
        sentence = f"The {rng.choice(_ADJECTIVES)} {subject} {rng.choice(_VERBS)} a {rng.choice(_ADJECTIVES)} {thing}"
        if rng.random() < 0.5:
            sentence += f" {rng.choice(_TAILS)}"
        if rng.random() < 0.2:
            sentence = f'"{sentence}," said the {rng.choice(_SUBJECTS)}'
        parts.append(sentence + rng.choice([". ", ". ", "! ", "?\n", ".\n\n"]))
        length += len(parts[-1])
    return "".join(parts)[:n_chars]


@cache
def _merges(n: int, space: str) -> tuple[tuple[str, str], ...]:
    """The n most frequent merges of a small text, byte-pair style; a word starts with `space`."""
    words = Counter(tiny_text(20_000, seed=99).split())
    split = {word: [space, *word] for word in sorted(words)}
    merges = []
    for _ in range(n):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in split.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += words[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, pieces in split.items():
            split[word] = _merge(pieces, best)
    return tuple(merges)


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-in of each byte, in byte order."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(256, 512))
    return [chr(b) if b in shown else chr(next(hidden)) for b in range(256)]


def _add_spm(writer: gguf.GGUFWriter, n_merges: int) -> int:
    tokens, scores, types = ["<unk>", "<s>", "</s>"], [0.0] * 3, [2, 3, 3]
    tokens += [f"<0x{b:02X}>" for b in range(256)]
    scores, types = scores + [0.0] * 256, types + [6] * 256
    letters = ["\u2581", *map(chr, range(0x21, 0x7F)), "é", "ß", "→"]
    merged = list(dict.fromkeys(a + b for a, b in _merges(n_merges, "\u2581")))
    tokens += merged + letters
    scores += [-float(i + 1) for i in range(len(merged) + len(letters))]
    types += [1] * (len(merged) + len(letters))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    return len(tokens)


def _add_bpe(writer: gguf.GGUFWriter, n_merges: int, pre: str) -> int:
    letters = _byte_letters()
    merges = _merges(n_merges, letters[0x20])
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    types = [3, 3, 3]
    tokens += letters + list(dict.fromkeys(a + b for a, b in merges))
    types += [1] * (len(tokens) - 3)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{a} {b}" for a, b in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    return len(tokens)


#: type -> byte offsets of its float16 scales, for the types that `gguf.quants` cannot write (ggml-common.h)
_SCALE_OFFSETS = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,),
    "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip

#: type -> how many scales its minimum's factor must be for the weights to have mean 0
_MINIMUM_RATIOS = {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}


def _set_scales(blocks: np.ndarray, name: str, scales: np.ndarray) -> None:
    """Put one scale per block, (n,) float32, into packed blocks (n, block_bytes) uint8."""
    halves = scales.astype("<f2").view(np.uint16)
    minimums = (scales * _MINIMUM_RATIOS.get(name, 1)).astype("<f2")
    for offset, values in zip(_SCALE_OFFSETS.get(name, ()), (halves, minimums), strict=False):
        blocks[:, offset : offset + 2] = values[:, None].view(np.uint8)
    if name == "IQ1_M":  # one nibble of the scale in the top of each of four uint16
        words = blocks[:, 48:56].copy().view("<u2")
        nibbles = halves[:, None] >> np.array([0, 4, 8, 12], np.uint16) & 0xF
        blocks[:, 48:56] = ((words & 0x0FFF) | nibbles << 12).astype("<u2").view(np.uint8)


def random_rows(rng: np.random.Generator, n_rows: int, n_in: int, type_name: str, std: float) -> np.ndarray:
    """Packed rows of valid random blocks whose weights have about this standard deviation; (n_rows, row_bytes) uint8."""
    qtype = QType[type_name]
    n_block, n_bytes = gguf.GGML_QUANT_SIZES[qtype]
    count = n_rows * n_in // n_block
    blocks = rng.integers(0, 256, (count, n_bytes), dtype=np.uint8)
    if type_name == "NVFP4":  # four unsigned e4m3 scales, then nibbles up to 12 in halves
        exponent = math.floor(math.log2(std / 2.5)) + 7
        blocks[:, :4] = np.clip(rng.integers(0, 8, (count, 4)) + 8 * exponent, 1, 0x7E)
    else:
        _set_scales(blocks, type_name, np.ones(count, np.float32))
        unit = float(quants.dequantize(blocks[: max(1, 65536 // n_block)], qtype).std())
        _set_scales(blocks, type_name, (std / unit * rng.uniform(0.7, 1.3, count)).astype(np.float32))
    return blocks.reshape(n_rows, -1)


def packed_rows(rng: np.random.Generator, shape: tuple[int, int], type_name: str, std: float) -> np.ndarray:
    """A random matrix (n_out, n_in) in any type, as GGUFWriter takes it: floats as they are, the rest packed uint8."""
    if type_name in _SCALE_OFFSETS or type_name in ("IQ1_M", "NVFP4"):
        return random_rows(rng, *shape, type_name, std)
    weights = rng.normal(0, std, shape).astype(np.float32)
    if type_name in ("F32", "F16"):
        return weights.astype({"F32": np.float32, "F16": np.float16}[type_name])
    return quants.quantize(weights, QType[type_name])


def _add_rope(writer: gguf.GGUFWriter, rope: str, n_ctx: int, head_dim: int) -> None:
    if rope in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(n_ctx // 4)
    elif rope == "llama3":
        factors = np.linspace(1, 8, head_dim // 2, dtype=np.float32)
        writer.add_tensor("rope_freqs.weight", factors)
    elif rope != "none":
        raise ValueError(rope)


def _add_blocks(
    writer: gguf.GGUFWriter, rng: np.random.Generator, n_layer: int, shapes: dict[str, tuple[int, int]],
    type_name: str, biases: bool,
) -> None:  # fmt: skip
    n_embd = shapes["attn_q"][1]
    for i in range(n_layer):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", _norm(rng, n_embd))
        for name, shape in shapes.items():
            rows = packed_rows(rng, shape, type_name, 1 / math.sqrt(shape[1]))
            writer.add_tensor(f"blk.{i}.{name}.weight", rows, raw_dtype=QType[type_name])
            if biases:
                writer.add_tensor(f"blk.{i}.{name}.bias", rng.normal(0, 0.2, shape[0]).astype(np.float32))


def _norm(rng: np.random.Generator, n_embd: int) -> np.ndarray:
    return (1 + 0.1 * rng.normal(size=n_embd)).astype(np.float32)


def tiny_gguf(
    path: str | Path,
    *,
    seed: int = 0,
    type: str = "F32",
    tokenizer: str = "spm",
    pre: str = "gpt-2",
    n_merges: int = 60,
    n_layer: int = 2,
    n_embd: int | None = None,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int | None = None,
    n_ff: int | None = None,
    n_ctx: int = 256,
    tied: bool = False,
    biases: bool = False,
    rope: str = "none",
    rope_base: float = 10000.0,
    embedding_type: str | None = None,
    output_type: str | None = None,
    chat_template: str | None = None,
    name: str = "tiny",
) -> Path:
    """Write a random Llama GGUF and return its path; equal arguments give equal bytes.

    type: GGML type of the seven matrices and, unless named apart, of embedding and output; types with blocks of
    256 raise n_embd and n_ff to 256. tokenizer: "spm" (353 or so tokens) or "bpe" (with `pre`).
    rope: none, linear (4), llama3 (a rope_freqs.weight), yarn (4). head_dim is written only when given.
    """
    types = {type, embedding_type or type, output_type or type}
    wide = any(QType[t] in BLOCK_256 for t in types)
    n_embd = n_embd or (256 if wide else 64)
    n_ff = n_ff or (512 if wide else 128)
    d = head_dim or n_embd // n_head
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name(name)
    for add, value in (
        (writer.add_block_count, n_layer), (writer.add_context_length, n_ctx), (writer.add_embedding_length, n_embd),
        (writer.add_feed_forward_length, n_ff), (writer.add_head_count, n_head), (writer.add_head_count_kv, n_head_kv),
        (writer.add_rope_freq_base, rope_base), (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, d), (writer.add_quantization_version, 2),
    ):  # fmt: skip
        add(value)
    if head_dim:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    n_vocab = _add_spm(writer, n_merges) if tokenizer == "spm" else _add_bpe(writer, n_merges, pre)
    writer.add_vocab_size(n_vocab)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    _add_rope(writer, rope, n_ctx, d)
    embedding = packed_rows(rng, (n_vocab, n_embd), embedding_type or type, 2 / math.sqrt(n_embd))
    writer.add_tensor("token_embd.weight", embedding, raw_dtype=QType[embedding_type or type])
    q, kv = n_head * d, n_head_kv * d
    shapes = {
        "attn_q": (q, n_embd), "attn_k": (kv, n_embd), "attn_v": (kv, n_embd), "attn_output": (n_embd, q),
        "ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff),
    }  # fmt: skip
    _add_blocks(writer, rng, n_layer, shapes, type, biases)
    writer.add_tensor("output_norm.weight", _norm(rng, n_embd))
    if not tied:
        rows = packed_rows(rng, (n_vocab, n_embd), output_type or type, 2 / math.sqrt(n_embd))
        writer.add_tensor("output.weight", rows, raw_dtype=QType[output_type or type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


@cache
def session_directory() -> Path:
    """Where files of one test session lie that several tests use; it goes with the process."""
    directory = Path(tempfile.mkdtemp(prefix="llamakit-tiny-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def cached_tiny_gguf(**options: Any) -> Path:
    """`tiny_gguf` written once per test session for each set of options; do not write to the file."""
    key = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:16]
    path = session_directory() / f"{key}.gguf"
    return path if path.exists() else tiny_gguf(path, **options)
