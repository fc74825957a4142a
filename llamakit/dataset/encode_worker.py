"""A process that tokenizes: texts on its standard input, ids on its standard output, until the input ends.

Run by `encoding.encoded`. A request is the number of texts n and of their bytes (two uint32), n sizes in bytes
(uint32), n flags (uint8: the text goes on after the one before), and the bytes, UTF-8. The answer is the number of all
ids (int64), n counts (uint32), and the ids (uint32); or -1, the number of bytes of a message, and the message.
"""

from __future__ import annotations

import signal
import struct
from collections.abc import Sequence
from typing import IO

import numpy as np

from llamakit.errors import LlamakitError
from llamakit.formats.gguf import open_gguf
from llamakit.tokenizer import Tokenizer, load_tokenizer

#: a text, and whether it goes on after the one before
Part = tuple[str, bool]

HEAD, ANSWER = struct.Struct("<II"), struct.Struct("<q")


def encode_parts(tokenizer: Tokenizer, parts: Sequence[Part]) -> list[np.ndarray]:
    """Ids of each text, (n,) uint32: no BOS, no EOS, control tokens in the text as plain text."""
    return [
        np.array(tokenizer.encode(text, add_special=False, parse_special=False, continued=continued), np.uint32)
        for text, continued in parts
    ]


def read_exactly(stream: IO[bytes], n: int) -> bytes:
    """n bytes, fewer where the stream ends."""
    parts: list[bytes] = []
    while n and (part := stream.read(n)):
        parts.append(part)
        n -= len(part)
    return b"".join(parts)


def answer(vocabulary: str, stdin: IO[bytes], stdout: IO[bytes]) -> None:
    """Answer requests with the tokenizer of a GGUF file until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; who started us ends us by closing the input
    with open_gguf(vocabulary) as file:
        tokenizer = load_tokenizer(file)
    while len(head := read_exactly(stdin, HEAD.size)) == HEAD.size:
        n, n_bytes = HEAD.unpack(head)
        sizes = np.frombuffer(read_exactly(stdin, 4 * n), "<u4").tolist()
        flags = read_exactly(stdin, n)
        data, at, parts = read_exactly(stdin, n_bytes), 0, list[Part]()
        if len(data) < n_bytes:
            return
        for size, flag in zip(sizes, flags, strict=True):
            parts.append((data[at : at + size].decode(), bool(flag)))
            at += size
        try:
            found = encode_parts(tokenizer, parts)
        except LlamakitError as error:
            message = str(error).encode()
            stdout.write(ANSWER.pack(-1) + ANSWER.pack(len(message)) + message)
        else:
            counts = np.array([len(ids) for ids in found], "<u4")
            stdout.write(ANSWER.pack(int(counts.sum())) + counts.tobytes())
            stdout.writelines(ids.astype("<u4", copy=False).data for ids in found)
        stdout.flush()
