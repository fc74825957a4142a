from __future__ import annotations

import pytest

from llamakit.conversion.file_types import QUANTIZE_TYPES, given_name, parse_file_type
from llamakit.errors import UnsupportedError, UsageError
from llamakit.ggml import GGMLType as T


def test_names_numbers_and_aliases() -> None:
    assert parse_file_type("q4_k_m") == parse_file_type("15") == parse_file_type("Q4_K") == ("Q4_K_M", 15, T.Q4_K)
    assert parse_file_type("Q3_K").number == 12 and parse_file_type("Q5_K").number == 17
    assert parse_file_type("0").name == "F32" and parse_file_type("copy").number is None
    assert {t.number for t in QUANTIZE_TYPES.values() if t.number is not None} == {
        0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 21, 25, 30, 32, 36, 37, 38,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["IQ1_S", "iq1_m", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "27", "Q1_0"]
)
def test_what_llama_quantize_has_beyond_is_refused_by_name(text: str) -> None:
    with pytest.raises(UnsupportedError, match=r"^quantizing to I?Q[123]\w+ is not supported$") as caught:
        parse_file_type(text)
    nearest = str(caught.value.hint).removeprefix("the nearest that is: ")
    assert nearest in QUANTIZE_TYPES


@pytest.mark.parametrize("text", ["", "Q4", "4", "1024", "-1", "9" * 99, "Q4_K_M ", "q\x1b[31m", "٣"])
def test_other_types_are_unknown(text: str) -> None:
    with pytest.raises(UsageError, match=r"^unknown type to quantize to: ") as caught:
        parse_file_type(text)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("q4_k", "Q4_K"),
        ("15", "Q4_K"),
        ("q4_k_m", "Q4_K_M"),
        ("12", "Q3_K"),
        ("14", "Q4_K_S"),
        ("0", "F32"),
        ("copy", "COPY"),
    ],
)
def test_a_name_in_a_path_is_the_one_that_llama_quantize_takes(text: str, name: str) -> None:
    assert given_name(text) == name
