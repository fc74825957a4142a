"""What makes two files different models is found, and what does not is let through."""

import numpy as np
import pytest

from llamakit.formats.gguf import TensorData, typed_metadata, write_gguf
from llamakit.formats.open import open_model
from llamakit.ggml import GGMLType
from llamakit.inference.verify import compare_logits, verify
from tests.tiny import cached_tiny_gguf


def changed(tmp_path, *, metadata=None, tensors=None, drop=(), **options):
    """A copy of a tiny model with other metadata, tensors or without some, opened beside the original."""
    original = open_model(cached_tiny_gguf(**options))
    data = {
        name: TensorData(name, info.shape, info.type, original.read(name)) for name, info in original.tensors.items()
    }
    data |= {name: TensorData(name, array.shape, GGMLType.F32, array) for name, array in (tensors or {}).items()}
    path = tmp_path / "changed.gguf"
    write_gguf(
        path,
        metadata={**typed_metadata(original), **(metadata or {})},
        tensors=[tensor for name, tensor in data.items() if name not in drop],
    )
    return original, open_model(path)


def weights(name, **options):
    with open_model(cached_tiny_gguf(**options)) as file:
        return file.read(name).view(np.float32).reshape(file.tensors[name].shape).copy()


@pytest.mark.parametrize("options", [{}, {"type": "Q4_K"}, {"tokenizer": "bpe", "tied": True}])
def test_a_copy_is_the_same(tmp_path, options):
    report = verify(*changed(tmp_path, **options))
    assert report.passed and report.n_equal == report.n_tensors and report.worst is None
    assert (report.vocabulary, report.max_dlogit, report.kl) == ("equal", 0.0, 0.0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "MXFP4"])
def test_rounding_is_no_difference(kind):
    """The same seed gives the same weights in every type that the gguf package writes."""
    report = verify(open_model(cached_tiny_gguf()), open_model(cached_tiny_gguf(type=kind)))
    assert report.passed, report.failures
    assert 0 < report.n_equal < report.n_tensors and report.worst
    assert report.kl and report.max_dlogit and 0 < report.kl < report.max_dlogit


@pytest.mark.parametrize(
    ("options", "failure"),
    [
        ({"metadata": {"llama.rope.freq_base": 500000.0}}, "rope_base is 500000.0, was 10000.0"),
        ({"metadata": {"llama.context_length": 128}}, "n_ctx is 128, was 256"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 5}}, "the vocabulary differs in its special tokens"),
        ({"metadata": {"tokenizer.chat_template": "{{ messages }}"}}, "the vocabulary differs in its chat template"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "tensor blk.0.attn_q.bias is new"),
    ],
)
def test_differences_are_named(tmp_path, options, failure):
    report = verify(*changed(tmp_path, **options))
    assert not report.passed and report.max_dlogit is None
    assert [f for f in report.failures if f == failure], report.failures


def test_one_weight_in_the_last_row_is_seen(tmp_path):
    rows = weights("blk.1.ffn_down.weight")
    rows[-1, 3] += 1e-3
    report = verify(*changed(tmp_path, tensors={"blk.1.ffn_down.weight": rows}))
    assert [f for f in report.failures if f.startswith("tensor blk.1.ffn_down.weight (F32 -> F32) differs by")]
    assert report.n_equal == report.n_tensors - 1


def test_swapped_rotary_rows_are_seen(tmp_path):
    """The commonest way to break a Llama: every weight is there, in the other order."""
    rows = weights("blk.0.attn_q.weight").reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    assert not verify(*changed(tmp_path, tensors={"blk.0.attn_q.weight": np.ascontiguousarray(rows)})).passed


def test_not_a_number_is_a_failure_and_equal_ones_are_not(tmp_path):
    rows = weights("blk.0.ffn_up.weight")
    rows[0, 0] = np.nan
    original, other = changed(tmp_path, tensors={"blk.0.ffn_up.weight": rows})
    assert [f for f in verify(original, other).failures if "blk.0.ffn_up.weight" in f and "nan" in f]
    assert verify(other, other, forward=False).passed
    assert "the forward pass gives no finite numbers" in verify(other, other).failures


def test_a_missing_vocabulary_is_told(tmp_path):
    original = open_model(cached_tiny_gguf())
    path = tmp_path / "bare.gguf"
    metadata = {k: v for k, v in typed_metadata(original).items() if not k.startswith("tokenizer.")}
    tensors = [TensorData(name, info.shape, info.type, original.read(name)) for name, info in original.tensors.items()]
    write_gguf(path, metadata=metadata, tensors=tensors)
    report = verify(original, open_model(path))
    assert report.passed and report.vocabulary == "not carried over" and report.notes
    assert verify(open_model(path), open_model(path)).vocabulary == "absent"


def test_another_seed_looks_at_other_rows(tmp_path):
    rows = weights("blk.0.attn_k.weight")
    rows[17] += 1
    original, other = changed(tmp_path, tensors={"blk.0.attn_k.weight": rows})
    found = [verify(original, other, seed=seed, forward=False).passed for seed in range(12)]
    assert set(found) == {True, False}
    assert found == [verify(original, other, seed=seed, forward=False).passed for seed in range(12)]


def test_what_the_sample_misses_the_forward_pass_sees(tmp_path):
    rows = weights("blk.0.attn_v.weight")
    rows[1:31] += 1
    original, other = changed(tmp_path, tensors={"blk.0.attn_v.weight": rows})
    max_dlogit, kl = compare_logits(original, other)
    assert max_dlogit > 0.1 and kl > 1e-3
