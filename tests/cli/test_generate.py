import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamakit.cli import run
from llamakit.formats.adapter import Adapter, write_adapter
from llamakit.formats.base import TensorData
from llamakit.formats.gguf import GGUFFile, write_gguf
from tests.formats.files import split_gguf
from tests.helpers import ROOT, assert_error, warm
from tests.tiny import cached_tiny_gguf
from tests.warm import Process

GREEDY = ("-t", "0", "-n", "12")
PROMPT = "The old king"


@pytest.fixture(scope="module")
def model() -> Path:
    return cached_tiny_gguf(n_ctx=64)


@pytest.fixture
def cli(capfd) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command line in this process, where torch is loaded already; standard input is /dev/null."""

    def call(*args: object) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        code = run([str(arg) for arg in args])
        return subprocess.CompletedProcess(args, code, *capfd.readouterr())

    return call


@pytest.fixture
def continuation(model, cli) -> str:
    """What the model says after PROMPT."""
    return cli("generate", "-m", model, PROMPT, *GREEDY, "--no-display-prompt").stdout.removesuffix("\n")


def _shared(name: str) -> Path:
    path = Path(os.environ.get("LLAMAKIT_SHARED", ROOT.parent / "shared")) / name
    if not path.exists():
        pytest.skip(f"{path} is not there (LLAMAKIT_SHARED names the folder)")
    return path


def _adapter(model: Path, path: Path, tensor: str = "blk.0.attn_q.weight") -> Path:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(0, 0.5, shape).astype(np.float32) for shape in ((4, 64), (64, 4)))
    write_adapter(path, Adapter(4.0, {tensor: (a, b)}), GGUFFile(model))
    return path


def test_stdout_is_the_prompt_and_its_continuation_and_stderr_has_the_timings(model, continuation, cli):
    result = cli("generate", "-m", model, PROMPT, *GREEDY)
    assert result.returncode == 0
    assert result.stdout == f"{PROMPT}{continuation}\n"
    assert continuation
    for expected in ("loading ", "load: ", "prompt: ", "generation: 12 tokens", "tok/s", "ended by -n"):
        assert expected in result.stderr


@pytest.mark.parametrize("option", ["-p", "-f"])
def test_every_source_of_the_prompt_gives_the_same_text(option, model, continuation, tmp_path, cli):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n", encoding="utf-8")
    result = cli("generate", "-m", model, option, PROMPT if option == "-p" else file, *GREEDY)
    assert result.stdout == f"{PROMPT}{continuation}\n"


@pytest.mark.slow
def test_standard_input_is_the_prompt_where_something_was_redirected_or_piped_in(model, continuation, tmp_path):
    piped = warm("generate", "-m", model, *GREEDY, input=PROMPT + "\n")
    assert piped.stdout == f"{PROMPT}{continuation}\n"
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n", encoding="utf-8")
    with file.open("rb") as stdin:
        redirected = warm("generate", "-m", model, *GREEDY, stdin=stdin)
    assert redirected.stdout == piped.stdout


@pytest.mark.slow
def test_an_empty_pipe_and_a_closed_standard_input_count_as_none(model, cli):
    nothing = cli("generate", "-m", model, *GREEDY).stdout
    assert warm("generate", "-m", model, *GREEDY, input="").stdout == nothing
    shell = f"exec {sys.executable} -m llamakit generate -m {model} -t 0 -n 12 <&-"
    closed = subprocess.run(["bash", "-c", shell], capture_output=True, check=True, text=True, cwd=ROOT)
    assert closed.stdout == nothing


def test_no_prompt_starts_from_bos(model, cli):
    text = cli("generate", "-m", model, *GREEDY).stdout
    as_json = json.loads(cli("generate", "-m", model, *GREEDY, "--json").stdout)
    assert text == as_json["text"] + "\n"
    assert as_json["prompt_tokens"] == [1]


def test_json_is_one_object_with_everything(model, continuation, cli):
    result = cli("generate", "-m", model, PROMPT, *GREEDY, "--json", "--seed", "5")
    value = json.loads(result.stdout)
    assert (value["prompt"], value["text"], value["seed"]) == (PROMPT, continuation, 5)
    assert (len(value["tokens"]), value["stop_reason"]) == (12, "length")
    assert {"load_s", "prefill_s", "decode_s", "prefill_tok_per_s", "decode_tok_per_s"} <= value.keys()


def test_a_seed_repeats_a_sampled_text(model, cli):
    runs = [cli("generate", "-m", model, "-n", "12", "--json", "-s", seed).stdout for seed in ("7", "7", "8")]
    texts = [json.loads(run)["tokens"] for run in runs]
    assert texts[0] == texts[1] != texts[2]


def test_escapes_are_processed_unless_told_otherwise(model, cli):
    assert cli("generate", "-m", model, r"a\nb", "-n", "1").stdout.startswith("a\nb")
    assert cli("generate", "-m", model, "-p", r"a\nb", "-n", "1", "--no-escape").stdout.startswith(r"a\nb")


def test_a_chat_template_is_not_applied_and_a_hint_says_so(continuation, cli):
    path = cached_tiny_gguf(n_ctx=64, chat_template="{{ messages[0].content }}<|im_end|>")
    result = cli("generate", "-m", path, PROMPT, *GREEDY)
    assert result.stdout == f"{PROMPT}{continuation}\n"
    assert "hint: " in result.stderr
    assert "chat" in result.stderr


def test_adapters_of_every_spelling(model, continuation, tmp_path, cli):
    lora = _adapter(model, tmp_path / "lora.gguf")

    def text(*arguments):
        result = cli("generate", "-m", model, PROMPT, *GREEDY, "--no-display-prompt", *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout.removesuffix("\n")

    with_lora = text("--lora", lora)
    assert with_lora != continuation
    assert text("--lora-scaled", f"{lora}:1.0") == with_lora
    assert text("--lora-scaled", lora, "1.0") == with_lora
    assert text("--lora-scaled", f"{lora}:0") == continuation
    assert text("--lora", lora, "--lora-scaled", f"{lora}:-1") == continuation


def test_adapters_of_other_models(model, tmp_path, cli):
    lora = _adapter(model, tmp_path / "lora.gguf")
    requantized = cached_tiny_gguf(n_ctx=64, type="Q8_0")
    result = cli("generate", "-m", requantized, "-n", "1", "--lora", lora)
    assert result.returncode == 0
    assert "note: " in result.stderr
    assert "another quantization" in result.stderr
    other = cached_tiny_gguf(n_ctx=64, rope_base=5000.0)
    assert_error(cli("generate", "-m", other, "-n", "1", "--lora", lora), 2, "lora.gguf", "another model", "--force")
    assert cli("generate", "-m", other, "-n", "1", "--lora", lora, "--force").returncode == 0
    deeper = _adapter(cached_tiny_gguf(n_layer=3), tmp_path / "deep.gguf", "blk.2.attn_q.weight")
    assert_error(cli("generate", "-m", model, "--lora", deeper, "--force"), 2, "blk.2.attn_q.weight")


def test_files_that_are_no_models(model, tmp_path, cli):
    assert_error(cli("generate", "-m", _adapter(model, tmp_path / "lora.gguf")), 2, "lora.gguf", "adapter", "--lora")
    vocabulary = tmp_path / "vocab.gguf"
    write_gguf(vocabulary, metadata={"general.architecture": "llama"}, tensors=[])
    assert_error(cli("generate", "-m", vocabulary), 2, "vocab.gguf", "vocabulary without a model")
    checkpoint = tmp_path / "chk.gguf"
    metadata = {"general.architecture": "llama", "training.type": "finetune_lora"}
    write_gguf(checkpoint, metadata=metadata, tensors=[])
    assert_error(cli("generate", "-m", checkpoint), 2, "chk.gguf", "checkpoint")
    assert_error(cli("generate", "-m", tmp_path / "none.gguf"), 2, "none.gguf")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--top-p", "2"), "--top-p is 2.0"),
        (("--ctx", "2", PROMPT), "the context holds 2"),
        (("--lora-scaled", "x:y"), "--lora-scaled is 'x:y'"),
        (("-p", "a", "b"), "more than once"),
        (("-z", "tok.bin"), "-z is for llama2.c"),
        (("-cnv", "-p", "hello"), "no chat template"),
        (("--stop", ""), "--stop is empty"),
        (("-r", ""), "--reverse-prompt is empty"),
        (("--logprobs", "-1"), "--logprobs is -1"),
        (("-np", "0"), "--parallel is 0"),
        (("-n", "-3"), "-n is -3"),
        (("--keep", "-1", "--context-shift", "--ctx", "16", "x" * 12), "--keep keeps"),
        (("--in-prefix", "a", "-cnv", "hello"), "--in-prefix and --in-suffix do not go with -cnv"),
        (("--prompts", "none.jsonl"), "none.jsonl"),
        (("--prompts", "none.jsonl", "hello"), "more than once"),
    ],
)
def test_mistakes_are_one_line(arguments, fragment, model, cli):
    assert_error(cli("generate", "-m", model, *arguments), 2, fragment)


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(model):
    with Process("generate", "-m", model, "-t", "0", "-n", "50") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        stderr = process.stderr.read()
    assert "Error" not in stderr
    assert "error: " not in stderr


@pytest.mark.slow
def test_ctrl_c_keeps_the_text_so_far_and_exits_130(model):
    # The text of this model in float32 is longer than a pipe holds: it waits for a reader, and cannot end by itself.
    long, options = cached_tiny_gguf(n_ctx=100_000, seed=5), ("-t", "0", "--dtype", "f32")
    with Process("generate", "-m", long, PROMPT, *options, text=False) as process:
        assert process.stdout is not None
        text = process.stdout.read(len(PROMPT) + 5)
        process.send_signal(signal.SIGINT)
        rest, stderr = process.communicate(timeout=250)
    assert process.returncode == 130
    assert (text + rest).startswith(PROMPT.encode())
    assert rest.endswith(b"\n")
    assert b"Traceback" not in stderr


def test_llama2c_story_is_run_cs_to_the_byte(cli):
    model, vocabulary = _shared("models/stories260K.bin"), _shared("models/tok512.bin")
    result = cli("generate", "-m", model, "-z", vocabulary, "-t", "0", "-n", "200")
    digest = "beeb5cb46785efee81a8545300b31e396b595e5ce6f3b77db201545501981d14"  # llama2.c test_all.py
    assert hashlib.sha256(result.stdout.removesuffix("\n").encode()).hexdigest() == digest, result.stderr
    assert result.stdout.endswith("\n")
    assert_error(cli("generate", "-m", model, "-n", "1"), 2, "no vocabulary", "-z FILE")
    # -n counts the prompt as run.c does: one token of it is BOS, the others take from -n
    value = json.loads(cli("generate", "-m", model, "-z", vocabulary, "-p", "Once", "-n", "9", "--json").stdout)
    assert len(value["tokens"]) + len(value["prompt_tokens"]) - 1 == 9


def test_a_model_in_parts_says_the_same(cli, model, tmp_path):
    parts = split_gguf(tmp_path / "m.gguf", model, 8)
    whole, split = (cli("generate", "-m", path, "-p", PROMPT, *GREEDY) for path in (model, parts[-1]))
    assert (split.returncode, split.stdout) == (0, whole.stdout)


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "1e39", "x", ""])
def test_a_scale_that_is_no_number_is_refused(model, cli, scale):
    assert_error(cli("generate", "-m", model, PROMPT, "--lora-scaled", f"a.gguf:{scale}"), 2, "--lora-scaled")


def test_the_files_own_sampling_is_the_default_under_the_command_lines(cli, tmp_path):
    source, path = GGUFFile(cached_tiny_gguf(n_ctx=64)), tmp_path / "model.gguf"
    own = {"general.sampling.temp": 0.0, "general.sampling.top_k": 7, "general.sampling.sequence": "top_k;temp"}
    _rewrite(source, path, own)
    greedy = cli("generate", "-m", source.path, PROMPT, *GREEDY).stdout
    result = cli("generate", "-m", path, PROMPT, "-n", "12")
    assert result.stdout == greedy
    assert "the file recommends its sampling: samplers top_k;temperature, top_k 7, temperature 0" in result.stderr
    result = cli("generate", "-m", path, PROMPT, "-n", "12", "-t", "0.8", "--top-k", "1", "--sampling-seq", "kt")
    assert result.stdout == greedy
    assert "recommends" not in result.stderr
    _rewrite(source, path, {"general.sampling.sequence": "top_k;best"})
    assert_error(cli("generate", "-m", path, PROMPT), 2, str(path), "general.sampling.sequence", "'best'", "--samplers")
    _rewrite(source, path, {"general.sampling.top_p": 7.0})
    assert_error(cli("generate", "-m", path, PROMPT), 2, str(path), "--top-p is 7.0")


def _rewrite(source: GGUFFile, path: Path, more: dict) -> None:
    tensors = [TensorData(i.name, i.shape, i.type, source.read(i.name, 0, None)) for i in source.tensors.values()]
    write_gguf(path, metadata={**source.metadata, **more}, tensors=tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samplers", "top_k;best"], "unknown sampler 'best'"),
        (["--sampling-seq", "kz"], "unknown sampler 'z'"),
        (["--logit-bias", "5"], "--logit-bias is '5'"),
        (["--logit-bias", "99999+1"], "--logit-bias has the token 99999"),
        (["--dry-base", "0.5"], "--dry-base is 0.5"),
        (["--rng", "llama2c", "--top-k", "5"], "--top-k does not go with --rng llama2c"),
    ],
)
def test_sampling_that_cannot_be_is_one_line(options, message, model, cli):
    assert_error(cli("generate", "-m", model, PROMPT, *options), 2, message)


def test_biases_rule_tokens_in_and_out(model, cli):
    value = json.loads(cli("generate", "-m", model, PROMPT, *GREEDY, "--json", "-l", "7+1000").stdout)
    assert set(value["tokens"]) == {7}
    text = cli("generate", "-m", model, PROMPT, *GREEDY, "--dry-multiplier", "5", "--dry-sequence-breaker", "none")
    assert text.returncode == 0
    long = json.loads(cli("generate", "-m", model, PROMPT, "-n", "40", "--seed", "3", "--json", "--ignore-eos").stdout)
    assert (len(long["tokens"]), long["stop_reason"]) == (40, "length")


def test_llama2cs_random_numbers_give_the_text_of_its_documentation(cli):
    """doc/stories260K.md of karpathy/llama2.c; 256 steps are run.c's default."""
    options = ("-t", "1.0", "--top-p", "0.9", "-s", "133742", "-n", "256")
    stories, vocabulary = _shared("models/stories260K.bin"), _shared("models/tok512.bin")
    result = cli("generate", "-m", stories, "-z", vocabulary, "--rng", "llama2c", *options)
    digest = "0d33d0d617b86488c85dd171d128cd7559d789a71bc80efb254577f8dc4750aa"
    assert hashlib.sha256(result.stdout.encode()).hexdigest() == digest


def _value(cli, *arguments):
    result = cli("generate", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_stops_are_hidden_reverse_prompts_shown_and_both_are_named(model, continuation, cli):
    stop = continuation[5:9]
    before = continuation[: continuation.index(stop)]
    result = cli("generate", "-m", model, PROMPT, *GREEDY, "--stop", stop)
    assert result.stdout == f"{PROMPT}{before}\n"
    assert f"ended by the text {stop!r}" in result.stderr
    result = cli("generate", "-m", model, PROMPT, *GREEDY, "-r", stop, "--reverse-prompt", "another")
    assert result.stdout.startswith(f"{PROMPT}{before}{stop}")
    assert continuation.startswith(result.stdout.removeprefix(PROMPT).removesuffix("\n"))
    value = _value(cli, "-m", model, PROMPT, *GREEDY, "--stop", "-", "--stop", stop)
    assert (value["text"], value["stop_reason"], value["stop"]) == (before, "stop", stop)


def test_escapes_count_in_stops_and_frames(model, cli):
    assert cli("generate", "-m", model, PROMPT, *GREEDY, "--stop", r"\x").returncode == 0
    framed = _value(cli, "-m", model, "b", "-n", "1", "--in-prefix", r"a\n", "--in-suffix", "</s>")
    assert framed["prompt"] == "a\nb</s>"
    assert framed["prompt_tokens"][-1] == 2, "control tokens count in what stands around"
    plain = _value(cli, "-m", model, "b</s>", "-n", "1", "--in-prefix", r"a\n", "--no-escape")
    assert plain["prompt"] == r"a\nb</s>"
    assert 2 not in plain["prompt_tokens"], "and not in the prompt between"
    shown = cli("generate", "-m", model, "b", "-n", "1", "--in-prefix", "a:", "--in-suffix", "?").stdout
    assert shown.startswith("a:b?")


def test_a_context_shift_makes_a_text_longer_than_the_context(model, cli):
    options = ("-m", model, PROMPT, "-t", "0", "--ctx", "32", "--ignore-eos")
    assert _value(cli, *options)["stop_reason"] == "context"
    assert _value(cli, *options, "--context-shift", "-n", "-2")["stop_reason"] == "context"
    assert _value(cli, *options, "--context-shift", "--no-context-shift")["stop_reason"] == "context"
    long = _value(cli, *options, "--context-shift", "--keep", "-1", "-n", "100")
    assert (long["stop_reason"], len(long["tokens"])) == ("length", 100)


def test_logprobs_in_json_are_openais_and_else_lines_on_stderr(model, continuation, cli):
    value = _value(cli, "-m", model, PROMPT, *GREEDY, "--logprobs", "2")
    entries = value["logprobs"]["content"]
    assert [entry["id"] for entry in entries] == value["tokens"]
    for entry in entries:
        assert entry["token"].encode() == bytes(entry["bytes"]) or "\ufffd" in entry["token"]
        first, second = entry["top_logprobs"]
        assert (first["id"], first["logprob"]) == (entry["id"], entry["logprob"]), "greedy"
        assert second["logprob"] <= first["logprob"] <= 0
    result = cli("generate", "-m", model, PROMPT, *GREEDY, "--logprobs", "2")
    assert result.stdout == f"{PROMPT}{continuation}\n"
    lines = result.stderr.split("likeliest tokens:\n")[1].splitlines()[:12]
    assert all(f"{entry['logprob']:.4f} " in line for entry, line in zip(entries, lines, strict=True))
    assert "logprobs" not in _value(cli, "-m", model, PROMPT, *GREEDY)
    assert _value(cli, "-m", model, PROMPT, *GREEDY, "--logprobs", "0")["logprobs"]["content"][0]["top_logprobs"] == []


def test_the_chain_of_samplers_is_shown_on_request_as_llama_cpp_prints_it(model, cli):
    chain = "logits -> ?penalties -> ?dry -> ?top-n-sigma -> top-k -> ?typical -> top-p -> min-p -> ?xtc -> temp-ext -> dist"
    assert f"sampler chain: {chain}\n" in cli("generate", "-m", model, PROMPT, "-n", "1", "-v").stderr
    assert "sampler chain" not in cli("generate", "-m", model, PROMPT, "-n", "1").stderr


@pytest.mark.slow
def test_head_takes_a_line_and_nobody_complains(model):
    """The pipe of a shell, with a text that is longer than a pipe holds."""
    long = cached_tiny_gguf(n_ctx=100_000, seed=5)
    for options in (f"-p '{PROMPT}\nThe' -n 60000", "--prompts - -n 5"):
        command = f"{sys.executable} -m llamakit generate -m {long} -t 0 --dtype f32 --ignore-eos {options}"
        shell = f"yes {'a' * 400} | head -100 | ({command}; echo $? >&2) | head -1"
        result = subprocess.run(["bash", "-c", shell], capture_output=True, check=False, text=True, cwd=ROOT)
        assert result.stdout.count("\n") == 1
        assert "Traceback" not in result.stderr
        assert "rror" not in result.stderr
        assert result.stderr.rstrip().endswith("\n1"), "it noticed, and left"
