"""JSON schemas, as far as a grammar needs them: read, and bounded where they leave bounds out.

A small model that may go on with digits or further properties does so for ever. llama.cpp's grammars bound both
(common/json-schema-to-grammar.cpp), and so does this: what is allowed becomes less, and every text of it is valid.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from itertools import combinations
from typing import Any

from llamakit.errors import UnsupportedError
from llamakit.formats.strict_json import parse_object

#: whole numbers that a float64 holds exactly have 15 digits; digits after the point
_LARGEST = 10**15 - 1
_SMALLEST_STEP = 1e-6
_MAX_MULTIPLE = 100_000
_LONGEST_FORMATS = {"date-time": 32, "time": 21, "duration": 32}
# What llguidance takes for a date has a 29th of February in any year.
_NO_LEAP_DAY = "^[0-9]{4}-(02-([01][0-9]|2[0-8])|(0[13-9]|1[0-2])-)"
_MAX_REFERENCES, _MAX_ALTERNATIVES = 16, 200
_UPPER, _LOWER = ("maximum", "exclusiveMaximum"), ("minimum", "exclusiveMinimum")
_ONE_SCHEMA = ("items", "additionalProperties", "additionalItems", "unevaluatedProperties", "unevaluatedItems")
_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
# With one of these beside `properties`, the properties of an object are the business of several schemas.
_COMPOSED = ("$ref", "anyOf", "oneOf", "patternProperties", "unevaluatedProperties", "dependentSchemas", "if")

Schema = dict[str, Any]


def read_schema(text: str, *, name: str = "--json-schema") -> Schema:
    """The schema that a text holds; name: what an error calls it.

    Raises FormatError for what is no JSON object, UnsupportedError for a `multipleOf` that would take too long.
    """
    schema = parse_object(text.encode("utf-8", "surrogatepass"), name, "the schema")
    for part in _parts(schema):
        step = part.get("multipleOf")
        if isinstance(step, int | float) and not isinstance(step, bool) and not _is_quick(step):
            raise UnsupportedError(
                f"multipleOf {step} has too many digits", path=name, hint=f"a number of at most {_MAX_MULTIPLE} steps"
            )
    return schema


def bounded(schema: Schema) -> Schema:
    """A schema that allows less: numbers of at most 15 digits before the point and 6 after it, seconds of at most 6,
    no 29th of February, and no property that is not named, where the schema says nothing of these.

    One with `allOf` comes back as it is: what its parts leave open is closed by others.
    """
    return schema if any("allOf" in part for part in _parts(schema)) else _mapped(schema, _bound)


def with_any_of(schema: Schema) -> Schema:
    """The same with anyOf in place of oneOf where it is plain that no value fits two of the alternatives.

    That is so where they differ in their types or constants, or in the constants of a property that all require.
    llguidance wants oneOf proven so, and sees it by itself for few, and for none behind a reference.
    """

    def change(part: Schema) -> None:
        one_of = part.get("oneOf")
        if not isinstance(one_of, list) or "anyOf" in part or len(one_of) > _MAX_ALTERNATIVES:
            return
        if all(_are_apart(a, b, schema) for a, b in combinations(one_of, 2)):
            part["anyOf"] = part.pop("oneOf")

    return _mapped(schema, change)


def _is_quick(step: float) -> bool:
    """Whether the remainders of a number, which an automaton has a state for each of, are few."""
    _, digits, exponent = Decimal(repr(step)).normalize().as_tuple()
    return step != 0 and isinstance(exponent, int) and exponent <= 6 and int("".join(map(str, digits))) <= _MAX_MULTIPLE


def _children(schema: Schema) -> list[Schema]:
    """The schemas that are parts of a schema, in its keywords that hold any."""
    found: list[Any] = [schema.get(key) for key in _ONE_SCHEMA]
    for key in _SCHEMAS:
        value = schema.get(key)
        found += value if isinstance(value, list) else []
    for key in _NAMED_SCHEMAS:
        value = schema.get(key)
        found += value.values() if isinstance(value, dict) else []
    return [part for part in found if isinstance(part, dict)]


def _parts(schema: Schema) -> list[Schema]:
    """The schema and all inside of it."""
    found, queue = [], [schema]
    while queue:
        part = queue.pop()
        found.append(part)
        queue += _children(part)
    return found


def _mapped(schema: Schema, change: Callable[[Schema], None]) -> Schema:
    """A copy in which the schema and all inside of it are changed."""

    def mapped(part: Any) -> Any:
        return _mapped(part, change) if isinstance(part, dict) else part

    result = dict(schema)
    for key in _ONE_SCHEMA:
        if key in schema:
            result[key] = mapped(schema[key])
    for key in _SCHEMAS:
        if isinstance(schema.get(key), list):
            result[key] = [mapped(part) for part in schema[key]]
    for key in _NAMED_SCHEMAS:
        if isinstance(schema.get(key), dict):
            result[key] = {name: mapped(part) for name, part in schema[key].items()}
    change(result)
    return result


def _bound(schema: Schema) -> None:
    if "enum" not in schema and "const" not in schema:
        _bound_number(schema)
        longest = _LONGEST_FORMATS.get(str(schema.get("format")))
        if longest is not None and "maxLength" not in schema:
            schema["maxLength"] = longest
        if schema.get("format") in ("date", "date-time") and "pattern" not in schema:
            schema["pattern"] = _NO_LEAP_DAY
    _close_object(schema)


def _bound_number(schema: Schema) -> None:
    types = _types(schema)
    if types is None or not {"integer", "number"} & types:
        return
    bounds = {key: schema[key] for key in (*_UPPER, *_LOWER) if isinstance(schema.get(key), int | float)}
    if any(abs(value) > _LARGEST or isinstance(value, bool) for value in bounds.values()):
        return
    if not bounds.keys() & set(_UPPER):
        schema["maximum"] = _LARGEST
    if not bounds.keys() & set(_LOWER):
        schema["minimum"] = -_LARGEST
    if "number" in types and "multipleOf" not in schema and all(_is_coarse(value) for value in bounds.values()):
        schema["multipleOf"] = _SMALLEST_STEP


def _is_coarse(value: float) -> bool:
    """Whether numbers with six digits after the point come close enough to a bound."""
    exponent = Decimal(repr(value)).normalize().as_tuple().exponent
    return isinstance(exponent, int) and exponent >= -6


def _close_object(schema: Schema) -> None:
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or "additionalProperties" in schema or any(k in schema for k in _COMPOSED):
        return
    least = schema.get("minProperties", 0)
    few = isinstance(least, int) and least > len(properties)
    if isinstance(required, list) and all(key in properties for key in required) and not few:
        schema["additionalProperties"] = False


def _are_apart(a: Any, b: Any, root: Schema) -> bool:
    """Whether it is plain that no value fits both schemas."""
    a, b = _resolved(a, root), _resolved(b, root)
    values_a, values_b = _constants(a), _constants(b)
    if values_a is not None and values_b is not None:
        return not values_a & values_b
    types_a, types_b = _types(a), _types(b)
    if types_a is None or types_b is None:
        return False
    if "number" in types_a | types_b:
        types_a, types_b = ({"number" if t == "integer" else t for t in types} for types in (types_a, types_b))
    if not types_a & types_b:
        return True
    return types_a == types_b == {"object"} and _differ_in_a_property(a, b, root)


def _differ_in_a_property(a: Schema, b: Schema, root: Schema) -> bool:
    """Whether two schemas of objects require a property, and different constants in it."""
    properties_a, properties_b = a.get("properties"), b.get("properties")
    required_a, required_b = a.get("required"), b.get("required")
    if not (isinstance(properties_a, dict) and isinstance(properties_b, dict)):
        return False
    if not (isinstance(required_a, list) and isinstance(required_b, list)):
        return False
    for key in properties_a.keys() & properties_b.keys():
        one, other = (_constants(_resolved(p[key], root)) for p in (properties_a, properties_b))
        if key in required_a and key in required_b and one is not None and other is not None and not one & other:
            return True
    return False


def _resolved(schema: Any, root: Schema) -> Schema:
    """The schema that a reference into `root` means; an empty one, which allows everything, where that is not plain."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
            break
        schema = _at_pointer(root, schema["$ref"])
    return schema if isinstance(schema, dict) and "$ref" not in schema else {}


def _at_pointer(root: Any, reference: str) -> Any:
    """What stands at #/a/b, None where nothing does or the reference is of another kind."""
    if not reference.startswith("#/"):
        return None
    for name in reference[2:].split("/"):
        root = root.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root


def _constants(schema: Schema) -> set[str] | None:
    """The only values that a schema allows, as JSON, None where it names none, or one that has parts."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or any(isinstance(value, list | dict) for value in values):
        return None
    return {json.dumps(float(value) if type(value) is int else value) for value in values}


def _types(schema: Schema) -> set[str] | None:
    """The types that a schema names, None where it names none."""
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    return {t for t in types if isinstance(t, str)} or None
