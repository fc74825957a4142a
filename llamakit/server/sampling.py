"""From the fields of a request to a GenerateConfig: OpenAI's and llama-server's names, and Ollama's options."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llamakit.errors import UsageError
from llamakit.inference.config import GenerateConfig
from llamakit.inference.sampler_names import parse_names
from llamakit.server.config import LIMITS
from llamakit.server.fields import ApiError, Body
from llamakit.tokenizer import Tokenizer

_MANY = 2**31 - 1
_NUMBER = 1e6

#: field of a request -> (field of GenerateConfig, least, most)
_NUMBERS = {
    "temperature": ("temperature", -1.0, 1000.0),
    "top_p": ("top_p", 0.0, 1.0),
    "min_p": ("min_p", 0.0, 1.0),
    "typical_p": ("typical", 0.0, 1.0),
    "top_n_sigma": ("top_n_sigma", -_NUMBER, _NUMBER),
    "repeat_penalty": ("repeat_penalty", 1e-3, 1000.0),
    "presence_penalty": ("presence_penalty", -1000.0, 1000.0),
    "frequency_penalty": ("frequency_penalty", -1000.0, 1000.0),
    "xtc_probability": ("xtc_probability", 0.0, 1.0),
    "xtc_threshold": ("xtc_threshold", 0.0, 1.0),
    "dry_multiplier": ("dry_multiplier", -1000.0, 1000.0),
    "dry_base": ("dry_base", 1.0, 1000.0),
    "dynatemp_range": ("dynatemp_range", 0.0, 1000.0),
    "dynatemp_exponent": ("dynatemp_exp", 0.0, 1000.0),
    "mirostat_tau": ("mirostat_ent", 0.0, 1000.0),
    "mirostat_eta": ("mirostat_lr", 0.0, 1000.0),
    "adaptive_target": ("adaptive_target", -1.0, 1.0),
    "adaptive_decay": ("adaptive_decay", 0.0, 0.99),
}
_INTEGERS = {
    "top_k": ("top_k", -1, _MANY),
    "repeat_last_n": ("repeat_last_n", -1, _MANY),
    "dry_allowed_length": ("dry_allowed_length", 0, _MANY),
    "dry_penalty_last_n": ("dry_penalty_last_n", -1, _MANY),
    "mirostat": ("mirostat", 0, 2),
}
_SEED = 2**64


def sampling_of(body: Body, base: GenerateConfig, tokenizer: Tokenizer, n_ctx: int) -> GenerateConfig:
    """The configuration with every sampling field of a body, and its seed, stops, biases and grammar.

    Raises ApiError for a value that cannot be.
    """
    found: dict[str, Any] = {}
    for name, (field, low, high) in _NUMBERS.items():
        if name in body:
            found[field] = body.number(name, low, high)
    for name, (field, low, high) in _INTEGERS.items():
        if name in body:
            value = body.integer(name, low, high)
            assert value is not None, "it is in the body"
            # For these two -1 is the whole context, as in llama.cpp.
            found[field] = min(n_ctx if value < 0 else value, n_ctx) if field.endswith("last_n") else value
    if "seed" in body:
        seed = body.integer("seed", -_SEED, _SEED)
        assert seed is not None, "it is in the body"
        found["seed"] = -1 if seed == -1 else seed % 2**32
    found["ignore_eos"] = body.flag("ignore_eos")
    found["stop"] = tuple(body.texts("stop", LIMITS.stops, LIMITS.stop_characters))
    if "dry_sequence_breakers" in body:
        breakers = body.texts("dry_sequence_breakers", LIMITS.stops, LIMITS.stop_characters)
        found["dry_sequence_breaker"] = tuple(breakers)
    if "samplers" in body:
        names = body.get("samplers")
        found["samplers"] = names if isinstance(names, str) else ";".join(body.texts("samplers", 32, 64))
    found["logit_bias"] = _biases(body, tokenizer)
    found |= _structure(body)
    return configured(base, found)


def configured(base: GenerateConfig, found: Mapping[str, Any]) -> GenerateConfig:
    """`dataclasses.replace`, its UsageError as an ApiError."""
    try:
        return replace(base, **found)
    except UsageError as error:
        raise ApiError(400, error.reason) from error


def settings_of(config: GenerateConfig) -> dict[str, Any]:
    """llama-server's `generation_settings`: the fields above, under the names that a request has for them."""
    named = {**_NUMBERS, **_INTEGERS}
    settings: dict[str, Any] = {name: getattr(config, field) for name, (field, _, _) in named.items()}
    return settings | {
        "seed": config.seed,
        "n_predict": config.n_predict,
        "max_tokens": config.n_predict,
        "n_keep": config.keep,
        "n_probs": config.logprobs or 0,
        "ignore_eos": config.ignore_eos,
        "stop": list(config.stop),
        "samplers": list(parse_names(config.samplers)),
        "dry_sequence_breakers": list(config.dry_sequence_breaker),
        "logit_bias": [{"token": id, "bias": bias if math.isfinite(bias) else None} for id, bias in config.logit_bias],
        "grammar": config.grammar,
    }


def with_format(config: GenerateConfig, schema: Mapping[str, Any] | None) -> GenerateConfig:
    """The answer must satisfy a JSON schema; without one it is as it was. Raises ApiError beside another grammar."""
    if schema is None:
        return config
    if config.grammar or config.json_schema:
        raise ApiError(400, "the answer has two forms (expected one of response_format, format, json_schema, grammar)")
    return replace(config, json_schema=json.dumps(schema))


def _structure(body: Body) -> dict[str, str]:
    """llama-server's `grammar` and `json_schema`."""
    schema, grammar = body.object("json_schema"), body.text("grammar")
    if schema is not None and grammar:
        raise ApiError(400, "grammar and json_schema do not go together", param="grammar")
    return {"grammar": grammar, "json_schema": "" if schema is None else json.dumps(schema.values)}


def _biases(body: Body, tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    """OpenAI's {"15043": -100}, and llama-server's [[15043, -100], [" Hello", false]]."""
    value = body.get("logit_bias")
    if value is None:
        return ()
    pairs: list[Any] = list(value.items()) if isinstance(value, dict) else value if isinstance(value, list) else [0]
    if len(pairs) > LIMITS.biases:
        raise ApiError(400, f"logit_bias has {len(pairs)} items (expected at most {LIMITS.biases})", param="logit_bias")
    biases: list[tuple[int, float]] = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            body.refuse("logit_bias", "an object of token and bias, or a list of such pairs")
        bias = -math.inf if pair[1] is False else pair[1]
        ids = _token_ids(pair[0], tokenizer, is_key=isinstance(value, dict))
        sane = isinstance(bias, int | float) and not isinstance(bias, bool) and (abs(bias) <= _NUMBER or bias < 0)
        if not sane or not ids:
            body.refuse("logit_bias", f"tokens from 0 to {tokenizer.n_vocab - 1}, and numbers")
        biases += [(id, float(bias) if bias >= -_NUMBER else -math.inf) for id in ids]
    return tuple(biases)


def _token_ids(token: Any, tokenizer: Tokenizer, *, is_key: bool) -> list[int]:
    """Of a bias: an id, or (in a list) a text. Empty for what is neither."""
    if isinstance(token, str) and is_key:
        token = int(token) if token.isascii() and token.isdigit() and len(token) < 10 else None
    if isinstance(token, str):
        return tokenizer.encode(token, add_special=False, parse_special=True)
    is_id = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < tokenizer.n_vocab
    return [token] if is_id else []
