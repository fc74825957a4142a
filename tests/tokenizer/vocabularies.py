"""Small vocabularies as real GGUF files, and texts that take tokenizers apart."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamakit.formats.gguf import write_gguf
from llamakit.formats.open import open_model
from llamakit.tokenizer import Tokenizer, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

#: what llama.cpp wants to see before it looks at a vocabulary
_MODEL = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def byte_letters() -> list[str]:
    """GPT-2's stand-in of each byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(256, 512))
    return [chr(b) if b in shown else chr(next(hidden)) for b in range(256)]


LETTERS = byte_letters()


def letters(text: str) -> str:
    """A text in byte letters."""
    return "".join(LETTERS[b] for b in text.encode())


def spm_metadata(
    pieces: Sequence[tuple[str, float]] = (),
    special: Sequence[tuple[str, int]] = (),
    *,
    with_bytes: bool = True,
    **keys: Any,
) -> dict[str, Any]:
    """<unk> <s> </s>, the bytes, pieces with their scores, then special tokens (text, type)."""
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)] if with_bytes else []
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *(p for p, _ in pieces), *(s for s, _ in special)]
    types = [2, 3, 3, *[6] * len(byte_tokens), *[1] * len(pieces), *(t for _, t in special)]
    scores = [0.0] * (3 + len(byte_tokens)) + [s for _, s in pieces] + [0.0] * len(special)
    return {
        **_MODEL,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        **{key.replace("__", "."): value for key, value in keys.items()},
    }


def bpe_metadata(
    merges: Sequence[str] = (), special: Sequence[tuple[str, int]] = (), *, pre: str | None = "gpt-2", **keys: Any
) -> dict[str, Any]:
    """The 256 byte letters, what the merges make, then special tokens (text, type)."""
    tokens = [*dict.fromkeys([*LETTERS, *(m.replace(" ", "") for m in merges)])]
    types = [1] * len(tokens) + [t for _, t in special]
    tokens += [s for s, _ in special]
    return {
        **_MODEL,
        "tokenizer.ggml.model": "gpt2",
        **({} if pre is None else {"tokenizer.ggml.pre": pre}),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": list(merges),
        **{key.replace("__", "."): value for key, value in keys.items()},
    }


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> Path:
    """A vocabulary-only GGUF file; values of None are left out."""
    write_gguf(path, metadata={k: v for k, v in metadata.items() if v is not None}, tensors=[])
    return path


def load(path: Path, metadata: dict[str, Any] | None = None) -> Tokenizer:
    """The tokenizer of a file, written first when metadata is given."""
    if metadata is not None:
        write_vocabulary(path, metadata)
    return load_tokenizer(open_model(path))


def shared(name: str) -> Path:
    """A file that lies beside the checkout; skips the test where it is missing."""
    default = Path(__file__).resolve().parents[3] / "shared"
    path = Path(os.environ.get("LLAMAKIT_SHARED", default)) / name
    if not path.exists():
        pytest.skip(f"{path} is missing")
    return path


#: what has tripped tokenizers: digits, endings in both cases, scripts, joiners, accents, spaces of every kind,
#: control characters, symbols, special tokens in the text
FRAGMENTS = (
    "'s", "'S", "'re", "'LL", "'t", "'D", "'Ve", "don't", "DON'T", "it'S", " 's", "''", "’s", "ſ", "\u212a",
    " ", " ", "  ", "   ", "\n", "\r\n", "\t", "\n\n", "\r", "\v", "\f", "\0", "\x1c", "\x1f", "\x7f", "\x85", "\xa0",
    "\u1680", "\u2003", "\u3000", "\u2028", "\u200b", "\u200d", "\ufeff", "\u2581", "\u2581\u2581",
    "1", "12", "123", "1234", "1234567", "٣", "²", "½", "①", "१२३", "፩", "ⅷ", "㈠",
    "a", "B", "Ab", "aB", "ABC", "camelCase", "HTMLParser", "é", "É", "ß", "ǅ", "ñ", "e\u0301", "Ж", "жЖ", "ª", "ʼ",
    "中", "中文字符", "日本", "ひらがな", "カタカナ", "한글", "ㄱ", "ㄅ", "ไทย", "ภาษาไทย", "हिन्दी", "ا", "العربية",
    "،", "。", "，", "！", "“", "”", "—", "…", "!", "?!", "...", "->", "$", "+", "=", "<", "~", "`", "|", "^", "_",
    "/", "\\", "()", "[", "]", "{}", "#", "@", "%", "&", "*", ";", ":", ",", ".", '"',
    "😀", "👨\u200d👩\u200d👧", "🇩🇪", "\u0301", "\u0308", "\u20dd", "𝔘", "𐐀", "\U00011f04", "\u0378", "\ue000", "\U0010ffff",
    "ﬁ", "µ", "ƻ", "<sentinel:12>", "IMGIMGABCZ", "<|x|>", "<s>", "</s>", "<unk>", "<0x41>", " <|user|> ",
)  # fmt: skip

_ASCII = [chr(c) for c in range(0x20, 0x7F)]


def random_text(rng: random.Random) -> str:
    """A short text of one of four kinds: the fragments above, ASCII, both mixed, any code points."""
    kind = rng.random()
    if kind < 0.5:
        return "".join(rng.choice(FRAGMENTS) for _ in range(rng.randint(0, 14)))
    if kind < 0.7:
        return "".join(rng.choice([*_ASCII, "\n", " ", "  "]) for _ in range(rng.randint(1, 30)))
    if kind < 0.9:
        return "".join(rng.choice([*FRAGMENTS, *_ASCII, *_ASCII]) for _ in range(rng.randint(1, 30)))
    ranges = ((0x20, 0x80), (0x80, 0x3000), (0x3000, 0xD800), (0xE000, 0x20000))
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(1, 12)))


def random_merges(n: int, seed: int = 0) -> list[str]:
    """n merges of two byte letters each: wherever two bytes meet in one word, they show it."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in LETTERS for b in LETTERS]
    return [f"{a} {b}" for a, b in rng.sample(pairs, n)]
