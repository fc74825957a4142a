import pytest
import torch

from llamakit.formats.open import open_model
from llamakit.model import KVCache, Llama, load_model
from llamakit.model.cache import JoinedCache
from tests.tiny import cached_tiny_gguf

VARIANTS = [{}, {"rope": "llama3", "head_dim": 32}, {"rope": "linear", "n_head_kv": 1}, {"rope": "yarn"}]


def _filled(model: Llama, *prompts: list[int], n_ctx: int = 40) -> list[KVCache]:
    """A cache for each prompt, computed one after the other."""
    caches = [KVCache(model.config, n_ctx=n_ctx, dtype=torch.float32) for _ in prompts]
    with torch.no_grad():
        for cache, ids in zip(caches, prompts, strict=True):
            model(torch.tensor([ids]), cache=cache)
    return caches


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_shifted_keys_of_the_first_layer_are_those_of_tokens_that_stood_there_from_the_start(options):
    model = load_model(open_model(cached_tiny_gguf(**options)))
    ids = list(range(50, 82))
    shifted, fresh = _filled(model, ids, ids[:3] + ids[13:])
    storage = shifted._k[0].data_ptr(), shifted._v[0].data_ptr()
    shifted.shift(3, 10, model.rope)
    assert shifted.n_past == fresh.n_past == 22
    # They depend on nothing but the token and its place.
    for ours, expected in ((shifted._k[0], fresh._k[0]), (shifted._v[0], fresh._v[0])):
        torch.testing.assert_close(ours[:, :, :22], expected[:, :, :22], rtol=1e-5, atol=1e-5)
    assert (shifted._k[0].data_ptr(), shifted._v[0].data_ptr()) == storage, "it moves in its place"
    assert shifted._k[0].shape[2] == shifted.n_ctx == 40


def test_values_and_the_keys_of_deeper_layers_move_and_turn_and_what_is_kept_stays():
    model = load_model(open_model(cached_tiny_gguf()))
    (cache,) = _filled(model, list(range(50, 82)))
    keys, values = cache._k[1].clone(), cache._v[1].clone()
    cache.shift(2, 7, model.rope)
    assert torch.equal(cache._v[1][:, :, :25], torch.cat([values[:, :, :2], values[:, :, 9:32]], dim=2))
    assert torch.equal(cache._k[1][:, :, :2], keys[:, :, :2])
    d = model.config.head_dim
    angles = -7 * model.config.rope_base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    pairs = torch.view_as_complex(keys[:, :, 9:32].double().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    torch.testing.assert_close(cache._k[1][:, :, 2:25], turned.float(), rtol=1e-6, atol=1e-6)


def test_tokens_of_joined_contexts_see_their_own_alone():
    model = load_model(open_model(cached_tiny_gguf()))
    first, second = list(range(60, 70)), list(range(90, 95))
    alone = _filled(model, [*first, 7, 8], [*second, 9])
    joined = _filled(model, first, second)
    with torch.no_grad():
        hidden = model(torch.tensor([[7, 8, 9]]), cache=JoinedCache([(joined[0], 2), (joined[1], 1)]))
        expected = [model(torch.tensor([[11]]), cache=cache) for cache in alone]
        ours = model(torch.tensor([[11, 11]]), cache=JoinedCache([(cache, 1) for cache in joined]))
    assert hidden.shape[1] == 3
    assert [cache.n_past for cache in joined] == [cache.n_past for cache in alone] == [13, 7]
    torch.testing.assert_close(ours[0], torch.cat(expected)[:, 0], rtol=1e-4, atol=1e-4)
