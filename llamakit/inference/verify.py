"""Do two model files hold the same model? Their rows, their vocabularies and what they answer, compared.

Every conversion ends with it: the written file is opened through its own reader and held against its source.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from llamakit.errors import UnsupportedError
from llamakit.files import escape_control
from llamakit.formats.base import ModelFile, TensorInfo
from llamakit.formats.llama2c import Llama2cFile
from llamakit.ggml import GGMLType
from llamakit.model.config import ModelConfig, RopeScaling
from llamakit.model.load import load_config
from llamakit.model.stream import streamed_logits
from llamakit.quant import dequantize
from llamakit.tokenizer import Tokenizer, load_tokenizer

#: rows of each tensor that are compared, the first and the last among them
_ROWS = 8
#: what a forward pass is run on, and up to which size of both files
_TOKENS, _MAX_FORWARD_BYTES = 64, 2_000_000_000
# Equal weights give equal logits; another order of sums in another layout gives less than this.
_SAME_LOGITS = 1e-3
#: type -> relative root-mean-square error that rounding weights to it may cost; twice what normal weights lose
_ROUNDING: Mapping[GGMLType, float] = {
    GGMLType.F32: 0.0, GGMLType.F16: 1e-3, GGMLType.BF16: 4e-3, GGMLType.Q8_0: 0.012, GGMLType.Q6_K: 0.04,
    GGMLType.Q5_K: 0.08, GGMLType.Q5_1: 0.08, GGMLType.Q5_0: 0.1, GGMLType.Q4_K: 0.16, GGMLType.Q4_1: 0.16,
    GGMLType.Q4_0: 0.2, GGMLType.IQ4_NL: 0.18, GGMLType.IQ4_XS: 0.18, GGMLType.Q3_K: 0.35, GGMLType.Q2_K: 0.7,
    GGMLType.MXFP4: 0.25, GGMLType.NVFP4: 0.25,
}  # fmt: skip
_ANY_ROUNDING = 1.0  # ternary and one-bit types: half of the weights' size may be gone
#: texts whose ids must agree: spaces, digits, letters of many kinds, code, emoji
_PROBES = (
    "Hello world", "  two  spaces\n\n\tand a tab ", "It's 1234567 o'clock, isn't it?", "Grüße aus Köln — ça va?",
    "日本語と한국어와 ภาษาไทย", "def f(x):\n    return x ** 2  # !!", "🙂👩‍👩‍👧 é\u0301 \u00a0\u2028", "",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What the comparison of two models found.

    n_tensors: compared tensors, n_equal of them equal in every row that was looked at. worst: the tensor with the
    largest relative root-mean-square error, and that error. vocabulary: "equal", "absent" in both files, or what is
    missing. max_dlogit, kl: largest difference of the log-probabilities, and mean Kullback-Leibler divergence in nats
    per token, of a forward pass over 64 tokens; None where none was run. notes: what is worth knowing, failures:
    what makes the two different models; none of them means that they are the same.
    """

    n_tensors: int
    n_equal: int
    worst: tuple[str, float] | None = None
    vocabulary: str = "absent"
    max_dlogit: float | None = None
    kl: float | None = None
    notes: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing makes them different models."""
        return not self.failures


def verify(expected: ModelFile, written: ModelFile, *, seed: int = 0, forward: bool | None = None) -> VerifyReport:
    """Compare a model with the one that was made from it.

    Hyper-parameters and vocabularies must be equal; of every tensor, a seeded sample of rows must agree, up to what
    rounding to the types of the two files costs. forward: compare a forward pass over random tokens, too; by default
    where both have less than 2 GB. Memory: about one layer.
    Raises FormatError or UnsupportedError where one of them is no model that can be read.
    """
    failures, notes = _compare_hyper_parameters(load_config(expected), load_config(written)), []
    errors = _compare_tensors(expected, written, seed, failures)
    vocabulary = _compare_vocabularies(expected, written, failures, notes)
    max_dlogit = kl = None
    if forward is None:
        forward = max(_n_bytes(expected), _n_bytes(written)) < _MAX_FORWARD_BYTES
    if forward and not failures:
        max_dlogit, kl = compare_logits(expected, written, seed)
        if not math.isfinite(max_dlogit):
            failures.append("the forward pass gives no finite numbers")
        elif not any(errors.values()) and max_dlogit > _SAME_LOGITS:
            failures.append(f"the weights look equal, but the logits differ by {max_dlogit:.2g}")
    worst = max(errors.items(), key=lambda item: item[1], default=("", 0.0))
    return VerifyReport(
        n_tensors=len(errors),
        n_equal=sum(not error for error in errors.values()),
        worst=worst if worst[1] else None,
        vocabulary=vocabulary,
        max_dlogit=max_dlogit,
        kl=kl,
        notes=tuple(notes),
        failures=tuple(failures),
    )


def _n_bytes(file: ModelFile) -> int:
    return sum(info.n_bytes for info in file.tensors.values())


def _compare_hyper_parameters(expected: ModelConfig, written: ModelConfig) -> list[str]:
    """One line for each that differs by more than the last digits that a float32, or a table of angles, keeps."""
    pairs = [(f.name, getattr(expected, f.name), getattr(written, f.name)) for f in fields(ModelConfig)]
    return [f"{name} is {ours}, was {theirs}" for name, theirs, ours in pairs if not _alike(theirs, ours)]


def _alike(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    if isinstance(a, RopeScaling) and isinstance(b, RopeScaling):
        return all(_alike(getattr(a, f.name), getattr(b, f.name)) for f in fields(RopeScaling))
    return a == b


def _compare_tensors(expected: ModelFile, written: ModelFile, seed: int, failures: list[str]) -> dict[str, float]:
    """Tensor name -> relative root-mean-square error of its sampled rows; what is wrong joins the failures."""
    errors: dict[str, float] = {}
    for name in [*expected.tensors, *(name for name in written.tensors if name not in expected.tensors)]:
        shown, a, b = escape_control(name), expected.tensors.get(name), written.tensors.get(name)
        if a is None or b is None:
            failures.append(f"tensor {shown} is {'missing' if b is None else 'new'}")
        elif _trimmed(a.shape) != _trimmed(b.shape):
            failures.append(f"tensor {shown} has shape {list(b.shape)}, had {list(a.shape)}")
        else:
            errors[name] = _relative_error(_sample(expected, a, seed), _sample(written, b, seed))
            allowed = max(
                _ROUNDING.get(_stored(file, info), _ANY_ROUNDING) for file, info in ((expected, a), (written, b))
            )
            if not errors[name] <= allowed:  # NaN is a failure, too
                failures.append(
                    f"tensor {shown} ({a.type.name} -> {b.type.name}) differs by {errors[name]:.2g} (expected at most "
                    f"{allowed:.2g}, relative)"
                )
    return errors


def _stored(file: ModelFile, info: TensorInfo) -> GGMLType:
    """The type that says how a tensor was rounded: version 2 of llama2.c shows as float32 what is int8 with scales."""
    rounded = isinstance(file, Llama2cFile) and file.version == 2 and len(info.shape) > 1
    return GGMLType.Q8_0 if rounded else info.type


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without outer axes of size 1, which some writers drop and some keep."""
    return _trimmed(shape[1:]) if len(shape) > 1 and shape[0] == 1 else shape


def _sample(file: ModelFile, info: TensorInfo, seed: int) -> Tensor:
    """The first, the last and some seeded rows between, float32 (rows, n_in)."""
    rng = np.random.default_rng([seed, zlib.crc32(info.name.encode()), info.n_rows])
    chosen = {0, info.n_rows - 1, *rng.integers(0, info.n_rows, _ROWS - 2).tolist()} if info.n_rows else set()
    rows = [dequantize(torch.from_numpy(file.read(info.name, row, row + 1)), info.type) for row in sorted(chosen)]
    return torch.cat(rows) if rows else torch.empty(0, 1)


def _relative_error(expected: Tensor, written: Tensor) -> float:
    """Root-mean-square error over root-mean-square; 0 where all values are equal, NaN included.

    Weights below float16's normal range are measured against that: there its steps no longer shrink with the value.
    """
    if torch.equal(expected.nan_to_num(), written.nan_to_num()) and torch.equal(expected.isnan(), written.isnan()):
        return 0.0
    expected, written = expected.double(), written.double()
    least = torch.finfo(torch.float16).tiny * expected.numel() ** 0.5
    return float((written - expected).norm() / expected.norm().clamp(min=least))


def _compare_vocabularies(expected: ModelFile, written: ModelFile, failures: list[str], notes: list[str]) -> str:
    """ "equal", "absent", or what happened to it."""
    theirs, ours = _tokenizer(expected, notes), _tokenizer(written, notes)
    if theirs is None or ours is None:
        if theirs is ours:
            return "absent"
        what = "not carried over" if ours is None else "added"
        notes.append(f"the vocabulary was {what}")
        return what
    different = [what for what, is_equal in _vocabulary_checks(theirs, ours) if not is_equal]
    failures += [f"the vocabulary differs in {what}" for what in different]
    return "different" if different else "equal"


def _tokenizer(file: ModelFile, notes: list[str]) -> Tokenizer | None:
    if "tokenizer.ggml.tokens" not in file.metadata:
        return None
    try:
        return load_tokenizer(file)
    except UnsupportedError as error:
        notes.append(f"the vocabulary is not compared: {error.reason}")
        return None


def _vocabulary_checks(a: Tokenizer, b: Tokenizer) -> Iterator[tuple[str, bool]]:
    """(what, whether it is equal) of everything that changes ids or prompts."""
    yield "its kind", (a.model, a.pre) == (b.model, b.pre)
    yield "its tokens", a.vocabulary.tokens == b.vocabulary.tokens
    yield "the kinds of its tokens", a.vocabulary.attrs == b.vocabulary.attrs
    yield "its special tokens", (a.bos_id, a.eos_id, a.unk_id, a.eog_ids) == (b.bos_id, b.eos_id, b.unk_id, b.eog_ids)
    yield "whether BOS and EOS are added", (a.add_bos, a.add_eos) == (b.add_bos, b.add_eos)
    yield "its chat template", (a.chat_template or "") == (b.chat_template or "")
    yield "the ids of some texts", all(a.encode(text) == b.encode(text) for text in _PROBES)


def compare_logits(expected: ModelFile, written: ModelFile, seed: int = 0) -> tuple[float, float]:
    """(largest difference of two logits, mean Kullback-Leibler divergence in nats) over 64 seeded random tokens.

    Computed in float32 on both sides, one layer in memory at a time; the divergence D(expected || written) in float64.
    """
    n_vocab = expected.tensors["token_embd.weight"].shape[0]
    tokens = np.random.default_rng(seed).integers(0, n_vocab, _TOKENS).tolist()
    a, b = streamed_logits(expected, tokens), streamed_logits(written, tokens)
    log_p, log_q = (logits.double().log_softmax(dim=-1) for logits in (a, b))
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
    return float((a - b).abs().max()), max(0.0, float(kl))
