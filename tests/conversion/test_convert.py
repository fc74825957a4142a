"""Every reader into every writer and back: the same bytes where bytes are promised, the same model everywhere."""

import os

import numpy as np
import pytest

from llamakit.conversion.convert import ConvertPlan, WrittenSlice, convert
from llamakit.conversion.convert_config import ConvertConfig
from llamakit.errors import FormatError, LlamakitError, SaveError, UnsupportedError, UsageError
from llamakit.formats.gguf import GGUFFile, TensorData, typed_metadata, write_gguf
from llamakit.formats.gguf_writer import copied_tensor
from llamakit.formats.open import open_model
from llamakit.formats.stamps import base_stamps
from llamakit.ggml import GGMLType
from llamakit.inference.verify import verify
from tests.tiny import cached_tiny_gguf


def run(source, out, **options):
    """Convert and prove it, as the command does."""

    def check(expected, written):
        report = verify(expected, written)
        assert report.passed, report.failures

    return convert(ConvertConfig(source=source, out=out, **options), verify=check)


def types(path):
    with open_model(path) as file:
        return {info.type.name for info in file.tensors.values() if len(info.shape) > 1}


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"tokenizer": "bpe", "tied": True}, {"biases": True, "rope": "yarn"}, {"rope": "linear", "head_dim": 24},
        {"rope_base": 500000.0, "n_head_kv": 4},
    ],
    ids=["spm", "bpe-tied", "biases-yarn", "linear-head_dim", "mha"],
)  # fmt: skip
def test_a_folder_comes_back_from_gguf_as_it_was(tmp_path, options, outtype):
    run(cached_tiny_gguf(**options), tmp_path / "hf", outtype=outtype)
    run(tmp_path / "hf", tmp_path / "m.gguf", outtype=outtype)
    run(tmp_path / "m.gguf", tmp_path / "again")
    names = sorted(os.listdir(tmp_path / "hf"))
    assert names == sorted(os.listdir(tmp_path / "again")) and "model.safetensors" in names
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert types(tmp_path / "hf") == {outtype.upper()}


def test_auto_takes_the_16_bit_type_of_a_checkpoint(tmp_path):
    for outtype, expected in (("bf16", "BF16"), ("f16", "F16"), ("f32", "F16")):
        run(cached_tiny_gguf(), tmp_path / outtype, outtype=outtype)
        assert types(run(tmp_path / outtype, tmp_path / f"{outtype}.gguf").paths[0]) == {expected}


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_comes_back_in_the_same_bytes(tmp_path, version, tied):
    source = cached_tiny_gguf(tied=tied, n_ctx=64)
    first = run(source, tmp_path / "m.bin", version=version)
    assert [p.name for p in first.paths] == ["m.bin", "tokenizer.bin"]
    run(tmp_path / "m.bin", tmp_path / "m.gguf", vocab=tmp_path / "tokenizer.bin")
    (tmp_path / "two").mkdir()
    run(tmp_path / "m.gguf", tmp_path / "two" / "m.bin", version=version)
    for name in ("m.bin", "tokenizer.bin"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_version_2_loses_what_8_bits_lose(tmp_path):
    run(cached_tiny_gguf(n_ctx=64), tmp_path / "m.bin", version=2)
    with open_model(cached_tiny_gguf(n_ctx=64)) as source, open_model(tmp_path / "m.bin") as written:
        report = verify(source, written)
    assert report.passed and report.worst and 0.001 < report.worst[1] < 0.012


def test_a_rotary_base_survives_llama2c_version_0_alone(tmp_path):
    source = cached_tiny_gguf(rope_base=500000.0, n_ctx=64)
    for version, kept in ((0, 500000.0), (1, 10000.0)):
        plans = []
        convert(ConvertConfig(source=source, out=tmp_path / "m.bin", version=version), on_report=plans.append)
        assert any("llama.rope.freq_base is 500000" in note for note in plans[0].notes)
        with open_model(tmp_path / "m.bin") as file:
            assert file.metadata["llama.rope.freq_base"] == kept


def test_another_vocabulary_beside_the_target_stays(tmp_path):
    (tmp_path / "tokenizer.bin").write_bytes(b"mine")
    written = run(cached_tiny_gguf(n_ctx=64), tmp_path / "m.bin")
    assert [p.name for p in written.paths] == ["m.bin", "m-tokenizer.bin"] and "stays" in written.notes[0]
    assert (tmp_path / "tokenizer.bin").read_bytes() == b"mine"
    bpe = run(cached_tiny_gguf(n_ctx=64, tokenizer="bpe"), tmp_path / "b.bin")
    assert len(bpe.paths) == 1 and "no tokenizer.bin" in bpe.notes[0]


def test_a_gguf_keeps_its_types_and_every_value(tmp_path):
    source = cached_tiny_gguf(type="Q4_K", output_type="Q6_K")
    run(source, tmp_path / "copy.gguf")
    with GGUFFile(source) as a, GGUFFile(tmp_path / "copy.gguf") as b:
        assert dict(a.metadata_types) == dict(b.metadata_types) and list(a.tensors) == list(b.tensors)
        assert all(np.array_equal(a.read(name), b.read(name)) for name in a.tensors)


@pytest.mark.parametrize(
    ("outtype", "matrices", "file_type"),
    [
        ("q8_0", {"Q8_0"}, 7),
        ("q4_0", {"Q4_0", "Q6_K"}, 2),
        ("Q4_K_M", {"Q4_K", "Q6_K"}, 15),
        ("tq2_0", {"TQ2_0", "F16"}, 37),
    ],
)
def test_quantized_outtypes(tmp_path, outtype, matrices, file_type):
    source = cached_tiny_gguf(n_embd=256, n_ff=512)
    convert(ConvertConfig(source=source, out=tmp_path / "q-{ftype}.gguf", outtype=outtype))
    path = tmp_path / f"q-{outtype.lower()}.gguf"
    with open_model(path) as file:
        assert types(path) == matrices and file.metadata["general.file_type"] == file_type
        assert {info.type.name for info in file.tensors.values() if len(info.shape) == 1} == {"F32"}


def test_a_packed_model_becomes_a_folder(tmp_path):
    run(cached_tiny_gguf(type="Q4_0"), tmp_path / "hf")
    assert types(tmp_path / "hf") == {"F16"}
    with pytest.raises(UsageError, match="cannot be in a Hugging Face folder"):
        run(cached_tiny_gguf(type="Q4_0"), tmp_path / "q", outtype="q8_0")


def test_numbers_that_the_user_states(tmp_path):
    convert(ConvertConfig(
        source=cached_tiny_gguf(), out=tmp_path / "m.gguf", ctx=99, rope_freq_base=5e5, model_name="mine"
    ))  # fmt: skip
    with GGUFFile(cached_tiny_gguf()) as a, GGUFFile(tmp_path / "m.gguf") as b:
        assert list(a.metadata) == list(b.metadata)
        changed = {
            key
            for key in a.metadata
            if isinstance(a.metadata[key], (int, float, str)) and a.metadata[key] != b.metadata[key]
        }
        assert changed == {"llama.context_length", "llama.rope.freq_base", "general.name"}
        assert b.metadata["llama.context_length"] == 99 and b.metadata["general.name"] == "mine"


def test_the_vocabulary_alone(tmp_path):
    convert(ConvertConfig(source=cached_tiny_gguf(), out=tmp_path / "v.gguf", vocab_only=True))
    with GGUFFile(cached_tiny_gguf()) as a, GGUFFile(tmp_path / "v.gguf") as b:
        assert not b.tensors and a.metadata["tokenizer.ggml.tokens"] == b.metadata["tokenizer.ggml.tokens"]


def test_reports_count_every_byte(tmp_path):
    reports = []
    convert(ConvertConfig(source=cached_tiny_gguf(), out=tmp_path / "m.gguf", outtype="f16"), on_report=reports.append)
    plan, *slices = reports
    assert isinstance(plan, ConvertPlan) and all(isinstance(s, WrittenSlice) for s in slices)
    assert slices[-1].bytes_done == plan.n_bytes and [s.index for s in slices if s.done] == list(range(1, 22))


def test_default_target_of_a_folder(tmp_path):
    run(cached_tiny_gguf(), tmp_path / "hf", outtype="bf16")
    assert run(tmp_path / "hf", None).paths == (tmp_path / "hf" / "ggml-model-bf16.gguf",)
    with pytest.raises(UsageError, match="where should it go"):
        run(cached_tiny_gguf(), None)


def test_what_does_not_verify_leaves_nothing(tmp_path):
    def refuse(expected, written):
        raise LlamakitError("no")

    (tmp_path / "m.gguf").write_bytes(b"what was there")
    for name in ("m.gguf", "m.bin", "hf"):
        with pytest.raises(LlamakitError, match="no"):
            convert(ConvertConfig(source=cached_tiny_gguf(n_ctx=64), out=tmp_path / name), verify=refuse)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == b"what was there"


def changed(tmp_path, **tensors):
    with GGUFFile(cached_tiny_gguf()) as file:
        metadata = {k: v for k, v in typed_metadata(file).items() if tensors or not k.startswith("tokenizer.")}
        data = [TensorData(n, i.shape, GGMLType.F32, tensors.get(n.replace(".", "_"), file.read(n).view("<f4").reshape(i.shape))) for n, i in file.tensors.items()]  # fmt: skip
        write_gguf(tmp_path / "changed.gguf", metadata=metadata, tensors=data)
    return tmp_path / "changed.gguf"


def test_refusals(tmp_path):
    tiny = cached_tiny_gguf()
    bare = changed(tmp_path)
    with pytest.raises(UsageError, match="has no vocabulary"):
        run(bare, tmp_path / "m.gguf")
    large = changed(tmp_path, output_norm_weight=np.full(64, 1e30, np.float32), token_embd_weight=np.full((417, 64), 1e30, np.float32))  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"token_embd\.weight has values that F16 cannot hold"):
        run(large, tmp_path / "m.gguf", outtype="f16")
    with pytest.raises(UsageError, match="is the source itself"):
        run(large, large)
    with pytest.raises(UsageError, match="cannot be written"):
        run(tiny, tmp_path / "no" / "m.gguf")
    with pytest.raises(UsageError, match="does not exist"):
        run(tiny, tmp_path / "no" / "hf")
    with pytest.raises(UnsupportedError, match="IQ2_XS"):
        run(tiny, tmp_path / "m.gguf", outtype="iq2_xs")
    with pytest.raises(UsageError, match="unknown type"):
        run(tiny, tmp_path / "m.gguf", outtype="q9")
    with pytest.raises(UnsupportedError, match="bias"):
        run(cached_tiny_gguf(biases=True), tmp_path / "m.bin")
    with pytest.raises(FormatError):
        run(tmp_path / "truncated.gguf" if (tmp_path / "truncated.gguf").write_bytes(tiny.read_bytes()[:5000]) else tiny, tmp_path / "m.gguf")  # fmt: skip
    with pytest.raises(UsageError, match="exclude each other"):
        ConvertConfig(source=tiny, vocab=tiny, vocab_type="spm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["changed.gguf", "truncated.gguf"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"what was there")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name in ("m.gguf", "m.bin", "hf"):
        with pytest.raises(SaveError, match="No space left"):
            convert(ConvertConfig(source=cached_tiny_gguf(n_ctx=64), out=tmp_path / name))
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("options", [{}, {"n_head_kv": 4, "tokenizer": "bpe"}, {"head_dim": 24}])
def test_a_model_has_one_stamp_in_every_format(tmp_path, options):
    """So that an adapter trained on a folder goes onto the GGUF of the same model."""
    source = cached_tiny_gguf(n_ctx=64, **options)
    run(source, tmp_path / "hf", outtype="f32")
    run(tmp_path / "hf", tmp_path / "m.gguf", outtype="q8_0")
    if not options:
        run(source, tmp_path / "m.bin")
        run(tmp_path / "m.bin", tmp_path / "back.gguf", vocab=tmp_path / "tokenizer.bin")
    stamps = set()
    for path in (source, tmp_path / "hf", *tmp_path.glob("*.gguf")):
        with open_model(path) as file:
            stamps.add(base_stamps(file).model)
    assert len(stamps) == 1


@pytest.mark.parametrize("target", ["hf", "m.bin", "m.gguf"])
def test_what_the_source_lacks_is_told_of_the_source(tmp_path, target):
    with GGUFFile(cached_tiny_gguf()) as file:
        tensors = [copied_tensor(file, name) for name in file.tensors if name != "blk.1.ffn_up.weight"]
        write_gguf(tmp_path / "lacking.gguf", metadata=typed_metadata(file), tensors=tensors)
    with pytest.raises(LlamakitError, match=r"blk\.1\.ffn_up\.weight") as caught:
        run(tmp_path / "lacking.gguf", tmp_path / target)
    assert caught.value.path == tmp_path / "lacking.gguf" and not (tmp_path / target).exists()
