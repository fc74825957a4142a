from llamakit.cli import completion_view as view
from llamakit.formats.open import open_model
from llamakit.inference.continuation import Done, Token
from llamakit.tokenizer import load_tokenizer
from tests.tiny import cached_tiny_gguf


def _tokenizer():
    return load_tokenizer(open_model(cached_tiny_gguf()))


def _done(reason, stop=None) -> Done:
    return Done(reason, "", 7, 1, 2, 1, 0.1, 0.1, stop)


def test_endings_are_a_users_words():
    assert view.ending(_done("stop", "\n")) == r"the text '\n'"
    assert [view.ending(_done(reason)) for reason in ("end", "length", "context")] == [
        "an end token",
        "-n",
        "a full context",
    ]


def test_logprobs_stand_in_columns_and_harm_no_terminal(capfd):
    tokenizer = _tokenizer()
    newline = tokenizer.encode("\n", add_special=False)[-1]
    letter = tokenizer.encode("a", add_special=False)[-1]
    view.log_logprobs(
        tokenizer, [Token(newline, "\n", -0.5, ((newline, -0.5),)), Token(letter, "a", -12.25, ((letter, -12.25),))]
    )
    title, first, second = capfd.readouterr().err.splitlines()
    assert title == "log-probabilities, and the likeliest tokens:"
    assert "\\" in first
    assert first.startswith("  -0.5000 ")
    assert second.startswith(" -12.2500 ")
    assert first.index("|") == second.index("|")
    view.log_logprobs(tokenizer, [])
    assert capfd.readouterr().err == ""


def test_json_of_an_interrupted_text_says_so():
    tokenizer = _tokenizer()
    token = Token(70, "x", -1.0)
    assert view.continuation_json(tokenizer, [token], "x", None, logprobs=False) == {
        "text": "x",
        "tokens": [70],
        "stop_reason": "interrupted",
    }
    value = view.continuation_json(tokenizer, [token], "x", _done("stop", "y"), logprobs=True)
    assert (value["stop_reason"], value["stop"], value["seed"]) == ("stop", "y", 7)
    (entry,) = value["logprobs"]["content"]
    assert entry == {
        "id": 70,
        "token": tokenizer.piece(70).decode(),
        "bytes": list(tokenizer.piece(70)),
        "logprob": -1.0,
        "top_logprobs": [],
    }
