"""JSON schemas that bound every string and every array, so that every text that follows them comes to an end."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

_WORD = {"type": "string", "minLength": 1, "maxLength": 20}

SCHEMAS: dict[str, dict[str, Any]] = {
    "person": {
        "type": "object",
        "properties": {
            "name": _WORD,
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "height": {"type": "number"},
            "role": {"enum": ["sailor", "miller", "queen", 7, None]},
            "note": {"type": "string", "maxLength": 40},
        },
        "required": ["name", "age", "height", "role"],
    },
    "arrays": {
        "type": "array",
        "minItems": 1,
        "maxItems": 4,
        "items": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 99}, "maxItems": 3},
    },
    "strings": {
        "type": "object",
        "properties": {
            "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
            "short": {"type": "string", "minLength": 3, "maxLength": 8},
            "mood": {"type": "string", "pattern": "^[😀-😏é ]{1,4}$"},
        },
        "required": ["code", "short", "mood"],
        "additionalProperties": False,
    },
    "alternatives": {
        "$defs": {
            "circle": {
                "type": "object",
                "properties": {"kind": {"const": "circle"}, "radius": {"type": "number", "exclusiveMinimum": 0}},
                "required": ["kind", "radius"],
            },
            "box": {
                "type": "object",
                "properties": {
                    "kind": {"const": "box"},
                    "sides": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
                },
                "required": ["kind", "sides"],
            },
        },
        "type": "object",
        "properties": {
            "shape": {"oneOf": [{"$ref": "#/$defs/circle"}, {"$ref": "#/$defs/box"}]},
            "label": {"anyOf": [_WORD, {"type": "integer", "minimum": 1, "maximum": 9}]},
        },
        "required": ["shape", "label"],
    },
    "constants": {
        "type": "object",
        "properties": {
            "version": {"const": "1.0 \"beta\" \\ é 😀"},
            "nothing": {"type": "null"},
            "sure": {"type": "boolean"},
            "either": {"type": ["boolean", "null"]},
            "fixed": {"const": {"a": [1, 2.5, None]}},
        },
        "required": ["version", "nothing", "sure", "either", "fixed"],
    },
    "times": {
        "type": "array",
        "prefixItems": [
            {"type": "string", "format": "date"},
            {"type": "string", "format": "date-time"},
            {"type": "string", "format": "uuid"},
            {"type": "string", "format": "ipv4"},
        ],
        "minItems": 4,
        "items": False,
    },
}  # fmt: skip


def assert_valid(text: str, schema: dict[str, Any]) -> None:
    """The text is JSON, whole, without NaN, and what the schema describes; formats count."""

    def constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text, parse_constant=constant))
