"""The module by itself: cache, positions, attention, rope, checkpointing, adapters."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamakit.errors import FormatError, LlamakitError, MismatchError, UnsupportedError
from llamakit.formats.adapter import Adapter
from llamakit.formats.gguf import copied_tensor, typed_metadata, write_gguf
from llamakit.formats.open import open_model
from llamakit.ggml import GGMLType
from llamakit.model import KVCache, ModelConfig, attach, detach, layers, load_model
from llamakit.model.attention import causal_attention
from llamakit.model.device import can_prepack
from llamakit.model.elementwise import Lazy, gated_silu
from llamakit.model.layers import Dropout, QuantizedLinear, RMSNorm
from llamakit.model.load import linear_layers, load_config
from llamakit.quant import QTensor
from llamakit.quant.encode import quantize
from tests.tiny import cached_tiny_gguf

VARIANTS = {
    "gqa": {},
    "mha": {"n_head_kv": 4},
    "mqa": {"n_head_kv": 1},
    "tied": {"tied": True},
    "biases": {"biases": True},
    "head_dim": {"head_dim": 32},
    "linear": {"rope": "linear"},
    "llama3": {"rope": "llama3"},
    "yarn": {"rope": "yarn"},
    "theta": {"rope_base": 500000.0},
}


def load(**options):
    with open_model(cached_tiny_gguf(**options)) as file:
        return load_model(file, dtype=torch.float32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cache_changes_nothing(variant):
    model = load(**VARIANTS[variant])
    tokens = torch.arange(40).view(2, 20) % model.config.n_vocab
    with torch.no_grad():
        whole = model.logits(model(tokens))
        cache = KVCache(model.config, batch=2, n_ctx=20, dtype=torch.float32)
        parts = [model(tokens[:, :7], cache=cache)]
        parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(7, 12)]
        parts += [model(tokens[:, 12:], cache=cache)]
        assert torch.allclose(model.logits(torch.cat(parts, 1)), whole, atol=1e-4)
        cache.truncate(5)
        again = model(tokens[:, 5:], cache=cache)
    assert torch.allclose(model.logits(again), whole[:, 5:], atol=1e-4)


@pytest.mark.parametrize("t", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_and_its_gradient_are_those_of_torch(t, dtype):
    torch.manual_seed(0)
    shapes = [(2, t, 6, 8), (2, t, 2, 8), (2, t, 2, 8)]
    inputs = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
    out = causal_attention(*inputs)
    weight = torch.randn_like(out)
    mine = torch.autograd.grad((out * weight).sum(), inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in wide), is_causal=True, enable_gqa=True
    ).transpose(1, 2).reshape(2, t, 48)  # fmt: skip
    theirs = torch.autograd.grad((expected * weight.double()).sum(), wide)
    tolerance = 1e-10 if dtype == torch.float64 else 0.06
    assert torch.allclose(out.double(), expected, atol=tolerance)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a.double(), b, atol=tolerance * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_dropout_keeps_the_share_that_it_should(rate, dtype):
    """Also at every fourth place, and one after another: four are drawn with one word."""
    dropout = Dropout(rate)
    dropout.rows = range(2)
    mask = dropout.mask(torch.empty(2, 301, 333, dtype=dtype), 1).double()
    for places in (mask, *(mask.flatten()[i::4] for i in range(4))):
        assert (places == 0).double().mean() == pytest.approx(rate, abs=0.006)
    assert mask.max() == pytest.approx(1 / (1 - rate), rel=0.01) and mask.unique().numel() == 2
    pairs = torch.stack([mask.flatten()[:-1], mask.flatten()[1:]])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.01
    assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize("keep", [0, 1024])
def test_dropped_attention_weights_and_their_gradient(keep, monkeypatch):
    """As torch differentiates the same written out: softmax, times the mask, times the values."""
    from llamakit.model import attention

    monkeypatch.setattr(attention, "_KEEP_SOFTMAX_CTX", keep)
    torch.manual_seed(0)
    t, drawn = 200, torch.zeros(2, 2, 3, 200, 200, dtype=torch.float64)

    def mask(weights, tile):
        generator = torch.Generator().manual_seed(tile)
        found = torch.empty_like(weights).bernoulli_(0.7, generator=generator) / 0.7
        start, stop = tile * 128, weights.shape[2]
        drawn[..., start:stop, :stop] = found.view(2, 2, 3, stop - start, stop)
        return found

    shapes = [(2, t, 6, 8), (2, t, 2, 8), (2, t, 2, 8)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    out = causal_attention(*inputs, None, mask)
    mine = torch.autograd.grad(out.square().sum(), inputs)
    q, k, v = (x.transpose(1, 2) for x in inputs)
    scores = q.view(2, 2, 3, t, 8) @ k.view(2, 2, 1, t, 8).transpose(3, 4) / 8**0.5
    weights = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) * drawn
    expected = (weights @ v.view(2, 2, 1, t, 8)).view(2, 6, t, 8).transpose(1, 2).reshape(2, t, 48)
    theirs = torch.autograd.grad(expected.square().sum(), inputs)
    assert (drawn > 0).double().mean() == pytest.approx(0.7 * (128 * 128 + 72 * 200) / t**2, abs=0.01)  # two tiles
    for a, b in zip((out, *mine), (expected, *theirs), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_recomputing_the_softmax_gives_the_same_gradient(monkeypatch):
    from llamakit.model import attention

    torch.manual_seed(0)
    inputs = [torch.randn(s, requires_grad=True) for s in ((1, 200, 4, 8), (1, 200, 2, 8), (1, 200, 2, 8))]
    kept = torch.autograd.grad(causal_attention(*inputs).square().sum(), inputs)
    monkeypatch.setattr(attention, "_KEEP_SOFTMAX_CTX", 0)
    recomputed = torch.autograd.grad(causal_attention(*inputs).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_gradients_of_the_elementwise_functions():
    torch.manual_seed(0)
    norm = RMSNorm(torch.randn(6, dtype=torch.float64), 1e-5)
    x = torch.randn(3, 6, requires_grad=True)
    y = norm(x)
    expected = x / torch.sqrt(x.double().square().mean(-1, keepdim=True) + 1e-5) * norm.weight
    assert torch.allclose(y.double(), expected, atol=1e-5)
    weight = torch.randn_like(y)
    mine = torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0]
    theirs = torch.autograd.grad((expected * weight).sum(), x)[0]
    assert torch.allclose(mine, theirs, atol=1e-5)
    pair = [torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *x: Lazy(gated_silu, x).compute(), pair)


def random_adapter(model, rank=2, alpha=3.0, names=None):
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in model.config.tensor_shapes().items():
        if names is None and ("norm" in name or name in ("token_embd.weight", "output.weight")):
            continue
        if names is not None and name not in names:
            continue
        n_out, n_in = shape if len(shape) == 2 else (1, shape[0])
        tensors[name] = (
            rng.standard_normal((rank, n_in)).astype(np.float32) * 0.1,
            rng.standard_normal((n_out, rank)).astype(np.float32) * 0.1,
        )
    return Adapter(alpha=alpha, tensors=tensors)


def merged(model, adapter, scale):
    """Logits with W + scale * alpha / r * B A put in place of every W, for comparison."""
    for name, (a, b) in adapter.tensors.items():
        leaf = model.get_submodule(name.removesuffix(".weight"))
        delta = torch.from_numpy(b @ a) * adapter.scale(name, scale)
        if isinstance(leaf, RMSNorm):
            leaf.weight.data += delta[0]
        else:
            leaf._dense, leaf._forward = leaf.dense(torch.float32) + delta, None
            if name == "token_embd.weight":
                dense = leaf._dense
                leaf.forward = lambda tokens, dense=dense: F.embedding(tokens, dense)
    return model


@pytest.mark.parametrize(
    "names",
    [None, ["token_embd.weight"], ["output.weight"], ["blk.1.ffn_norm.weight", "output_norm.weight"]],
    ids=["blocks", "embedding", "output", "norms"],
)
def test_an_adapter_is_the_same_as_the_merged_matrices(names):
    tokens = torch.arange(12).view(1, 12)
    model = load(type="Q8_0")
    adapter = random_adapter(model, names=names)
    with torch.no_grad():
        base = model.logits(model(tokens))
        attach(model, adapter, 0.5)
        hot = model.logits(model(tokens))
        detach(model)
        assert torch.equal(model.logits(model(tokens)), base)
        expected_model = merged(load(type="Q8_0"), adapter, 0.5)
        expected = expected_model.logits(expected_model(tokens))
    assert (hot - base).abs().max() > 1e-3
    assert torch.allclose(hot, expected, atol=2e-4)


def test_two_adapters_add_up():
    tokens = torch.arange(12).view(1, 12)
    model = load()
    first, second = random_adapter(model, rank=2), random_adapter(model, rank=3, alpha=1.0)
    with torch.no_grad():
        attach(model, first, 1.0)
        attach(model, second, -0.5)
        both = model.logits(model(tokens))
        expected_model = merged(merged(load(), first, 1.0), second, -0.5)
        expected = expected_model.logits(expected_model(tokens))
    assert torch.allclose(both, expected, atol=2e-4)


def test_an_adapter_that_changes_nothing_leaves_every_bit():
    tokens = torch.arange(12).view(1, 12)
    model = load(type="Q4_0")
    adapter = random_adapter(model)
    adapter.tensors = {n: (a, np.zeros_like(b)) for n, (a, b) in adapter.tensors.items()}
    with torch.no_grad():
        base = model.logits(model(tokens))
        attach(model, adapter)
        assert torch.equal(model.logits(model(tokens)), base)


def test_an_adapter_of_another_model_is_refused_and_changes_nothing():
    model, other = load(), load(n_embd=32, n_ff=32)
    with pytest.raises(MismatchError, match="is for"):
        attach(model, random_adapter(other))
    with pytest.raises(MismatchError, match="does not have"):
        attach(load(tied=True), random_adapter(model, names=["output.weight"]))
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.skipif(not can_prepack(torch.device("cpu"), torch.bfloat16), reason="no fast bf16 on this processor")
def test_the_layouts_for_training_change_no_bit():
    tokens = torch.arange(24).view(2, 12)
    results = []
    with open_model(cached_tiny_gguf(type="Q4_0", biases=True)) as file:
        for for_training in (False, True):
            model = load_model(file, dtype=torch.bfloat16, for_training=for_training)
            assert all((layer._backward is not None) == for_training for layer in linear_layers(model))
            x = torch.ones(2, 12, model.config.n_embd, dtype=torch.bfloat16, requires_grad=True)
            y = model.output(model.blk[0](x, model.rope.rotations(torch.arange(12)), None))
            y.float().square().sum().backward()
            results.append((model(tokens), y, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("weight_cache", ["auto", "bf16", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_cache_changes_no_bit(weight_cache, dtype):
    tokens = torch.arange(12).view(1, 12)
    with open_model(cached_tiny_gguf(type="Q4_0")) as file, torch.no_grad():
        reference = load_model(file, dtype=dtype, weight_cache="none")
        model = load_model(file, dtype=dtype, weight_cache=weight_cache)
        assert torch.equal(model(tokens), reference(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ggml_type", [GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.F16])
def test_multiplying_in_slabs_changes_no_bit(ggml_type, dtype, monkeypatch):
    torch.manual_seed(0)
    shape = (1000, 768)
    rows = torch.randn(shape).half().view(torch.uint8) if ggml_type == GGMLType.F16 else quantize(
        torch.randn(shape), ggml_type
    )  # fmt: skip
    linear = QuantizedLinear(QTensor(rows, ggml_type, shape), torch.randn(1000), layers.Scratch())
    x, grad = torch.randn(2, 7, 768, dtype=dtype), torch.randn(2, 7, 1000, dtype=dtype)
    whole = linear.product(x), linear.product_back(grad)
    monkeypatch.setattr(layers, "SLAB_WEIGHTS", 1 << 17)
    sizes = []
    monkeypatch.setattr(layers.Scratch, "take", lambda _, shape, like, dtype: sizes.append(math.prod(shape)) or
                        torch.empty(shape, dtype=dtype))  # fmt: skip
    in_slabs = linear.product(x), linear.product_back(grad)
    assert len(sizes) > 8 and max(sizes) < 2.5 * (1 << 17)
    for a, b in zip(whole, in_slabs, strict=True):
        assert torch.equal(a, b) if dtype == torch.bfloat16 else torch.allclose(a, b, atol=1e-4)


def metadata_of(**options):
    file = open_model(cached_tiny_gguf(**options))
    return dict(file.metadata), dict(file.tensors)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("general.architecture", "gpt2", "only 'llama'"),
        ("llama.attention.head_count", 0, "head_count"),
        ("llama.attention.head_count", 5, "not a multiple"),
        ("llama.attention.head_count_kv", 3, "not a multiple"),
        ("llama.block_count", 3, "blk.2"),
        ("llama.block_count", 10**9, "block_count"),
        ("llama.embedding_length", None, "embedding_length is missing"),
        ("llama.embedding_length", "64", "expected an integer"),
        ("llama.embedding_length", 128, "dimension_count"),
        ("llama.rope.dimension_count", 6, "rope.dimension_count"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "epsilon"),
        ("llama.attention.layer_norm_rms_epsilon", -1.0, "epsilon"),
        ("llama.rope.freq_base", 0.0, "freq_base"),
        ("llama.rope.scaling.type", "longrope", "longrope"),
        ("llama.expert_count", 8, "mixture-of-experts"),
        ("llama.context_length", True, "context_length"),
    ],
)
def test_hyper_parameters_that_cannot_be_are_named(key, value, reason):
    metadata, tensors = metadata_of()
    if value is None:
        metadata.pop(key)
    else:
        metadata[key] = value
    with pytest.raises((FormatError, UnsupportedError), match=reason):
        ModelConfig.from_metadata(metadata, tensors)


def test_a_missing_or_misshapen_tensor_is_named():
    metadata, tensors = metadata_of()
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(LlamakitError, match=r"blk\.1\.ffn_up\.weight is missing"):
        ModelConfig.from_metadata(metadata, tensors)


def test_rope_turns_pairs_by_position_times_frequency():
    model = load()
    d = model.config.head_dim
    rotations = model.rope.rotations(torch.tensor([3]))
    for i in range(d // 2):
        angle = 3 * 10000 ** (-2 * i / d)
        assert complex(rotations[0, i]) == pytest.approx(complex(math.cos(angle), math.sin(angle)), abs=1e-6)


@pytest.mark.parametrize(("tokens", "reason"), [(7, "no list"), ("abc", "no list"), (["a", "b"], "has 2 entries")])
def test_a_vocabulary_that_cannot_be_the_models_is_named(tmp_path, tokens, reason):
    source = open_model(cached_tiny_gguf())
    metadata = typed_metadata(source) | {"tokenizer.ggml.tokens": tokens}
    path = tmp_path / "m.gguf"
    write_gguf(path, metadata=metadata, tensors=[copied_tensor(source, name) for name in source.tensors])
    with pytest.raises(FormatError, match=f"tokenizer.ggml.tokens {reason}|is {reason}"):
        load_config(open_model(path))
