"""Sound containers with hostile contents, and models with scrambled headers, through the commands themselves."""

import random
import time

import numpy as np
import pytest

from llamakit.cli import run
from llamakit.formats.gguf import GGUFFile, Typed, copied_tensor, typed_metadata, write_gguf
from llamakit.formats.gguf_reader import GGUFValueType as V
from tests.fuzz.mutate import scrambled
from tests.tiny import cached_tiny_gguf, tiny_text

_NUMBERS = [
    Typed(n, t)
    for n, t in ((0, V.UINT32), (1, V.UINT32), (2**31, V.UINT32), (2**32 - 1, V.UINT32), (-1, V.INT32), (7, V.INT8),
                 (2**63, V.UINT64), (float("nan"), V.FLOAT32), (float("inf"), V.FLOAT32), (-1.0, V.FLOAT32),
                 (1e30, V.FLOAT32), (True, V.BOOL), ("", V.STRING), ("\x1b[31m{{", V.STRING))
]  # fmt: skip


def _hostile_value(rng: random.Random, key: str, value):
    kind = rng.randrange(4)
    if kind == 0 or not isinstance(value, Typed) or value.type is not V.ARRAY:
        return rng.choice(_NUMBERS)
    items = list(value.value)
    if kind == 1:
        items = items[: rng.randrange(len(items))]
    elif kind == 2:
        items = items + items[-3:]
    elif isinstance(items[0], str):
        items[rng.randrange(len(items))] = rng.choice(["", "<0xZZ>", "<0x-1>", "\udcff", "a" * 5000, items[0], "\0"])
    else:
        items[rng.randrange(len(items))] = rng.choice([0, 1, 100])
    if isinstance(items[:1], list) and items and isinstance(items[0], str):
        return Typed(items, V.ARRAY, V.STRING)
    return Typed(np.array(items, dtype=np.asarray(value.value).dtype), V.ARRAY, value.element_type)


def hostile_model(number: int, path) -> None:
    """A well-formed GGUF of a tiny Llama in which one to three keys, tensors or bytes are not what they should be."""
    rng = random.Random(number)
    source = cached_tiny_gguf(tokenizer=rng.choice(["spm", "bpe"]))
    if rng.random() < 0.3:
        path.write_bytes(scrambled(source.read_bytes(), number, 16000))
        return
    with GGUFFile(source) as file:
        metadata = typed_metadata(file)
        names = list(file.tensors)
        for _ in range(rng.randrange(1, 4)):
            key = rng.choice(list(metadata))
            if rng.random() < 0.2:
                del metadata[key]
            else:
                metadata[key] = _hostile_value(rng, key, metadata[key])
        if rng.random() < 0.2:
            names.remove(rng.choice(names))
        write_gguf(path, metadata=metadata, tensors=[copied_tensor(file, name) for name in names])


def commands(model, text, out):
    yield ["inspect", str(model), "--tensors"]
    yield ["tokenize", "-m", str(model), "-p", "The old king <s> é", "--ids"]
    yield ["generate", "-m", str(model), "-p", "The old", "-n", "2", "-c", "32"]
    yield ["finetune", "--model-base", str(model), "--train-data", str(text), "--adam-iter", "1", "--ctx", "8",
           "--batch", "1", "--checkpoint-in", "", "--checkpoint-out", "", "--lora-out", str(out)]  # fmt: skip


def campaign(tmp_path, capsys, numbers):
    text, model, out = tmp_path / "text.txt", tmp_path / "model.gguf", tmp_path / "lora.gguf"
    text.write_text(tiny_text(300, 1))
    codes = []
    for number in numbers:
        hostile_model(number, model)
        for arguments in commands(model, text, out):
            begin = time.process_time()
            code = run(arguments)
            seconds = time.process_time() - begin
            err = capsys.readouterr().err
            errors = [line for line in err.splitlines() if line.startswith("error: ")]
            assert code in (0, 2, 4), (number, arguments[0], err)
            assert len(errors) == (code != 0) and "Traceback" not in err, (number, arguments[0], err)
            assert "\x1b" not in err
            assert seconds < 20, (number, arguments[0])  # a hang; most take some hundredths of a second
            codes.append(code)
            if code:
                assert not out.exists() or arguments[0] != "finetune"
            out.unlink(missing_ok=True)
    return codes


@pytest.mark.slow
def test_hostile_models(tmp_path, capsys):
    codes = campaign(tmp_path, capsys, range(12))
    assert 0 in codes and 2 in codes


@pytest.mark.prove
@pytest.mark.timeout(3000)
def test_a_thousand_hostile_models(tmp_path, capsys):
    campaign(tmp_path, capsys, range(12, 1000))
