"""Sizes as llama.cpp's tools take them."""

from __future__ import annotations

import re

from llamakit.errors import UsageError


def parse_size(text: str) -> int:
    """300M or 2G in bytes, decimal as in llama-gguf-split. Raises UsageError for anything else, and for nothing."""
    match = re.fullmatch(r"([0-9]{1,9})([MG])", text)
    if match is None or int(match[1]) == 0:
        raise UsageError(f"'{text}' is no size (expected a number and M or G, as in 2G)")
    return int(match[1]) * {"M": 1_000_000, "G": 1_000_000_000}[match[2]]
