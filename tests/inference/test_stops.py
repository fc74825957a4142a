import pytest

from llamakit.formats.open import open_model
from llamakit.inference.stops import Stops
from llamakit.tokenizer import load_tokenizer
from tests.tiny import cached_tiny_gguf


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(open_model(cached_tiny_gguf()))


def _pushed(stops: Stops, *pieces: str) -> tuple[list[str], str | None]:
    """What is shown after each piece, up to the one that ends the text, and what ended it."""
    shown, found = [], None
    for piece in pieces:
        text, found = stops.push(5, piece)
        shown.append(text)
        if found:
            return shown, found
    return [*shown, stops.finish()], None


@pytest.mark.parametrize(
    ("pieces", "shown", "found"),
    [
        (["Hello", " wor", "ld"], ["Hello", " wor", "ld", ""], None),
        (["a E", "N", "D b"], ["a ", "", ""], "END"),
        (["a E", "N", "Dx"], ["a ", "", ""], "END"),
        (["a E", "n", "d"], ["a ", "En", "d", ""], None),
        (["xENDy"], ["x"], "END"),
        (["E"], ["", "E"], None),
        (["EEN", "END"], ["E", "EN"], "END"),
        (["a\n", "\nb"], ["a", ""], "\n\n"),
        (["END and \n\n"], [""], "END"),
        (["\n\nEND"], [""], "\n\n"),
    ],
)
def test_a_stop_is_cut_off_and_what_may_be_one_is_held_back(tokenizer, pieces, shown, found):
    assert _pushed(Stops(tokenizer, ["END", "\n\n"], [], "a prompt with END"), *pieces) == (shown, found)


@pytest.mark.parametrize(
    ("pieces", "shown", "found"),
    [
        (["Hi\n", "Us", "er", ": go"], ["Hi\n", "Us", "er", ": go"], "User:"),
        (["Us", "er ", ":"], ["Us", "er ", ":", ""], None),
        ([": hello"], [": hello"], "User:"),
        ([" : hello"], [" : hello", ""], None),
        (["", ":"], ["", ":"], "User:"),
    ],
)
def test_a_reverse_prompt_stays_and_may_begin_in_the_prompt(tokenizer, pieces, shown, found):
    assert _pushed(Stops(tokenizer, [], ["User:", "longer than that"], "User: hi\nUser"), *pieces) == (shown, found)


def test_a_reverse_prompt_that_stands_in_the_prompt_ends_nothing(tokenizer):
    assert _pushed(Stops(tokenizer, [], ["User:"], "User:"), " x", "y") == ([" x", "y", ""], None)


def test_both_kinds_together(tokenizer):
    assert _pushed(Stops(tokenizer, ["END"], ["User:"], ""), "E", "User:") == (["", "EUser:"], "User:")
    assert _pushed(Stops(tokenizer, ["END"], ["User:"], ""), "User:END") == (["User:"], "END")


def test_a_control_token_ends_the_text_by_its_id(tokenizer):
    stops = Stops(tokenizer, ["</s>"], [], "")
    assert stops.push(5, "a") == ("a", None)
    assert stops.push(tokenizer.eos_id, "") == ("", "</s>")
