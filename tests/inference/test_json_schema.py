import json

import pytest

from llamakit.errors import FormatError, UnsupportedError
from llamakit.inference.json_schema import bounded, read_schema, with_any_of

LARGEST = 10**15 - 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "line 1 column 1"),
        ('{"type":\n"string",}', "line 2 column 10"),
        ("[]", "no object"),
        ("true", "no object"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"const": NaN}', "NaN"),
        ('{"items":' * 50_000, "too deeply nested"),
        ('"\ud83d"', "no sound JSON"),
    ],
    ids=lambda text: text[:20].encode("ascii", "replace").decode(),
)
def test_what_is_no_schema_is_refused_with_its_place(text, reason):
    with pytest.raises(FormatError, match=reason) as caught:
        read_schema(text, name="my.json")
    assert str(caught.value).startswith("my.json: the schema is")


@pytest.mark.parametrize("step", [0, 1_000_003, 10**9, 0.1234567])
def test_steps_of_too_many_remainders_are_refused(step):
    schema = {"properties": {"a": {"anyOf": [{"type": "number", "multipleOf": step}]}}}
    with pytest.raises(UnsupportedError, match="multipleOf"):
        read_schema(json.dumps(schema))


@pytest.mark.parametrize(
    ("schema", "with_bounds"),
    [
        ({"type": "integer"}, {"type": "integer", "maximum": LARGEST, "minimum": -LARGEST}),
        ({"type": "integer", "minimum": 3}, {"type": "integer", "minimum": 3, "maximum": LARGEST}),
        ({"type": "integer", "exclusiveMaximum": 3}, {"type": "integer", "exclusiveMaximum": 3, "minimum": -LARGEST}),
        (
            {"type": ["number", "null"]},
            {"type": ["number", "null"], "maximum": LARGEST, "minimum": -LARGEST, "multipleOf": 1e-6},
        ),
        ({"type": "string", "format": "time"}, {"type": "string", "format": "time", "maxLength": 21}),
        (
            {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
            {
                "type": "object",
                "properties": {"a": {"type": "string"}},
                "required": ["a"],
                "additionalProperties": False,
            },
        ),
    ],
    ids=json.dumps,
)
def test_what_a_schema_leaves_open_is_bounded_everywhere_in_it(schema, with_bounds):
    assert bounded(schema) == with_bounds
    for around in (
        lambda part: {"items": part},
        lambda part: {"$defs": {"x": part}},
        lambda part: {"prefixItems": [True, part]},
        lambda part: {"anyOf": [{"type": "null"}, part]},
        lambda part: {"additionalProperties": {"items": part}},
    ):
        assert bounded(around(schema)) == around(with_bounds)


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "string"},
        {"type": "integer", "minimum": 10**17},
        {"type": "integer", "enum": [10**17]},
        {"type": "number", "minimum": 0, "maximum": 1e-9},
        {"const": {"type": "integer"}},
        {"properties": {"type": {"const": "integer"}}, "additionalProperties": True},
        {"type": "object"},
        {"properties": {"a": {}}, "required": ["b"]},
        {"properties": {"a": {}}, "minProperties": 2},
        {"properties": {"a": {}}, "patternProperties": {"^b": {}}},
        {"properties": {"a": {}}, "$ref": "#/$defs/b", "$defs": {"b": {}}},
        {"allOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {}}}]},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_what_a_schema_says_stays(schema):
    before = json.dumps(schema)
    bounds = bounded(schema)
    assert json.dumps(schema) == before
    assert "additionalProperties" not in bounds or bounds["additionalProperties"] is True
    if schema.get("maximum") != 1e-9:
        assert bounds == schema
    else:
        assert "multipleOf" not in bounds


def _tagged(name: str, key: str = "kind") -> dict:
    return {"type": "object", "properties": {key: {"const": name}}, "required": [key]}


@pytest.mark.parametrize(
    ("alternatives", "apart"),
    [
        ([{"type": "string"}, {"type": ["null", "integer"]}], True),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([{"type": "integer"}, {}], False),
        ([{"const": 1}, {"enum": [2, "1", None]}], True),
        ([{"const": 1}, {"const": 1.0}], False),
        ([{"const": [1]}, {"const": [2]}], False),
        ([_tagged("a"), _tagged("b")], True),
        ([_tagged("a"), _tagged("b", "type")], False),
        ([_tagged("a"), {**_tagged("b"), "required": []}], False),
        ([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b/sub~1ject"}], True),
        ([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], False),
        ([{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/a"}], False),
        ([{"$ref": "http://x.y/z"}, _tagged("b")], False),
        ([True, _tagged("b")], False),
    ],
)
def test_one_of_becomes_any_of_only_where_no_value_fits_two(alternatives, apart):
    definitions = {"a": _tagged("a"), "b": {"sub/ject": _tagged("b")}, "loop": {"$ref": "#/$defs/loop"}}
    schema = {"items": {"oneOf": alternatives}, "$defs": definitions}
    assert with_any_of(schema)["items"] == {"anyOf" if apart else "oneOf": alternatives}
