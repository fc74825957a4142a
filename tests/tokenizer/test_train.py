from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llamakit.errors import DataError, UsageError
from llamakit.formats.sentencepiece_model import encode_sentencepiece_model, write_sentencepiece_model
from llamakit.formats.vocabulary import vocabulary_only
from llamakit.tokenizer import Tokenizer
from llamakit.tokenizer.load import tokenizer_of
from llamakit.tokenizer.train import new_vocabulary
from tests.helpers import ROOT
from tests.tiny import tiny_text

THAI = (
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม\n"
    "และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ\n"
) * 3  # fmt: skip
CHINESE = "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。\n" * 3
TEXT = tiny_text(20_000) + THAI + CHINESE + "x = 12345\n    if y:\n        return 2026\n" * 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    write_sentencepiece_model(path, new_vocabulary([TEXT], 600))
    return tokenizer_of(vocabulary_only(path), path), sentencepiece.SentencePieceProcessor(model_file=str(path))


_TEXTS = st.text(st.sampled_from("abcdefgheeaionrst 0123456789\n\t  ,.'\u3000é→人权มนุษย์ทั้ง😀\u0000\u2581"), max_size=80)


@settings(max_examples=150, deadline=None)
@given(text=_TEXTS | st.text(max_size=40))
def test_the_ids_are_those_of_sentencepiece_and_the_text_comes_back(
    trained: tuple[Tokenizer, sentencepiece.SentencePieceProcessor], text: str
) -> None:
    ours, theirs = trained
    ids = ours.encode(text, add_special=False, parse_special=False)
    if "\u2581" not in text and "\0" not in text:  # the first is how a space is spelled, the second ends a text there
        assert ids == (theirs.encode(text) or ours.encode("", add_special=False))
    assert ours.decode(ids) == text.replace("\u2581", " ")


@pytest.mark.parametrize(
    "text", [THAI, CHINESE, "  two spaces  and   three ", "\n\n a\n", " ", "   ", "日本語 ไทย", "1234"]
)
def test_any_language_and_any_spaces(
    trained: tuple[Tokenizer, sentencepiece.SentencePieceProcessor], text: str
) -> None:
    ours, theirs = trained
    ids = ours.encode(text, add_special=False)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == text == theirs.decode(ids)


def test_thai_gets_tokens_of_several_characters(tmp_path: Path) -> None:
    write_sentencepiece_model(tmp_path / "thai.model", new_vocabulary([THAI], 380))
    thai = tokenizer_of(vocabulary_only(tmp_path / "thai.model"), None)
    ids = thai.encode(THAI, add_special=False)
    assert len(ids) < 0.6 * len(THAI) and thai.decode(ids) == THAI
    assert {id for id in ids if id < 259} == {3 + ord("\n")}


def test_the_settings_are_llama2c_s(trained: tuple[Tokenizer, sentencepiece.SentencePieceProcessor]) -> None:
    ours, theirs = trained
    tokens = ours.vocabulary.tokens
    assert (tokens[:4], tokens[258]) == (["<unk>", "<s>", "</s>", "<0x00>"], "<0xFF>")
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.n_vocab) == (1, 2, 0, 600)
    assert not any(len(token) > 1 and any(c.isdigit() for c in token) for token in tokens[259:])
    assert any(len(token) > 1 and not token.strip("\u2581") for token in tokens)
    assert theirs.vocab_size() == 600


def test_llama2c_would_have_got_the_same_pieces() -> None:
    """From text without runs of spaces, where the one setting that differs has no effect."""
    lines = tiny_text(20_000).splitlines()
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=(line for line in lines if line), model_writer=out, model_type="bpe", vocab_size=500,
        self_test_sample_size=0, input_format="text", character_coverage=1.0, split_digits=True,
        allow_whitespace_only_pieces=True, byte_fallback=True, normalization_rule_name="identity", minloglevel=4,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    ours = new_vocabulary(lines, 500)
    assert [piece.text for piece in ours.pieces] == [theirs.id_to_piece(i) for i in range(500)]


_TRAIN = """
import sys
from pathlib import Path
from llamakit.formats.sentencepiece_model import encode_sentencepiece_model
from llamakit.tokenizer.train import new_vocabulary
sys.stdout.buffer.write(encode_sentencepiece_model(new_vocabulary([Path(sys.argv[1]).read_text()], 600)))
"""


def test_the_same_text_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    command = [sys.executable, "-c", _TRAIN, str(tmp_path / "a.txt")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=250)
    assert result.stdout == encode_sentencepiece_model(new_vocabulary([TEXT], 600))
    assert result.stderr == b""  # SentencePiece's own log stays silent


def test_sizes_that_cannot_be_name_those_that_can(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--vocab-size is 259") as error:
        new_vocabulary([TEXT], 259)
    with pytest.raises(UsageError, match=r"--vocab-size is 300, the smallest possible for this text is (\d+)") as error:
        new_vocabulary([TEXT], 300)
    smallest = int(str(error.value).partition("this text is ")[2].partition(":")[0])
    assert len(new_vocabulary([TEXT], smallest).pieces) == smallest
    with pytest.raises(UsageError):
        new_vocabulary([TEXT], smallest - 1)
    with pytest.raises(
        UsageError, match=r"--vocab-size is 90000, the largest possible for this text is (\d+)"
    ) as error:
        new_vocabulary([TEXT], 90_000)
    largest = int(str(error.value).partition("this text is ")[2].partition(":")[0])
    assert len(new_vocabulary([TEXT], largest).pieces) == largest
    for wrong in (["", " \n "], []):
        with pytest.raises(DataError, match="no text to make a vocabulary from"):
            new_vocabulary(wrong, 300)
    output = capfd.readouterr()
    assert output.out == output.err == ""


def test_rare_characters_may_be_left_to_bytes() -> None:
    full, partly = new_vocabulary([TEXT], 600), new_vocabulary([TEXT], 600, character_coverage=0.98)
    singles = [sum(len(piece.text) == 1 for piece in model.pieces) for model in (full, partly)]
    assert singles[1] < singles[0]


def test_long_lines_and_odd_characters_count() -> None:
    one_line = CHINESE.replace("\n", "") * 60
    assert len(one_line.encode()) > 20_000
    assert len(new_vocabulary([one_line, "a\tb\0c\u2581d"], 330).pieces) == 330


def test_an_error_in_the_text_is_told_as_it_is() -> None:
    def texts() -> Iterator[str]:
        yield TEXT
        raise DataError("is not UTF-8", path="a.txt", line=7)

    with pytest.raises(DataError, match=r"a\.txt:7: is not UTF-8"):
        new_vocabulary(texts(), 600)
