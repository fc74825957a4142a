"""The pages are true to the code: the command reference, the examples, links, flags, the tree of files."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from llamakit.tokenizer.chat_templates import find_chat_template
from tests.helpers import ROOT
from tests.test_readme import PAGES
from tests.tiny import cached_tiny_gguf, tiny_text

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
ALL_PAGES = [*PAGES, "CHANGELOG.md", "SECURITY.md", "data/README.md"]


def load(path: Path) -> ModuleType:
    """A script as a module, not run."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_command_reference_is_current() -> None:
    page = load(ROOT / "scripts" / "make_cli_docs.py").page()
    assert text_of("docs/cli.md") == page, "run: make docs"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_named(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 30
    assert f"examples/{path.name}" in text_of("docs/api.md")


def test_api_page_shows_the_examples_as_they_are() -> None:
    page = text_of("docs/api.md")
    for path in EXAMPLES:
        assert f"```python\n{path.read_text(encoding='utf-8')}```" in page, f"run: make docs ({path.name})"


def test_prompt_example(capsys: pytest.CaptureFixture[str]) -> None:
    load(ROOT / "docs/examples/prompt_a_gguf.py").main(str(cached_tiny_gguf()), "The old king")
    assert capsys.readouterr().out.startswith("The old king")


def test_training_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(tiny_text(4000), encoding="utf-8")
    load(ROOT / "docs/examples/train_a_lora.py").main(str(cached_tiny_gguf()), "text.txt")
    assert Path("style-LATEST.gguf").exists()
    assert "Finished(" in capsys.readouterr().out


def test_train_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(tiny_text(6000), encoding="utf-8")
    load(ROOT / "docs/examples/train_from_scratch.py").main(str(text), str(folder))
    assert (folder / "model-LATEST.gguf").exists()
    assert "Finished(" in capsys.readouterr().out


def test_tensor_example(capsys: pytest.CaptureFixture[str]) -> None:
    load(ROOT / "docs/examples/read_a_tensor.py").main(str(cached_tiny_gguf(type="Q4_K")))
    assert "blk.0.attn_q.weight: (256, 256), Q4_K" in capsys.readouterr().out


def test_convert_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(ROOT / "docs/examples/convert_and_verify.py").main(str(cached_tiny_gguf()), str(tmp_path / "folder"))
    assert "vocabulary equal\nmax |dlogit| = 0.0, KL = 0.0" in capsys.readouterr().out
    assert (tmp_path / "folder" / "model.safetensors").exists()


def test_the_script_for_a_pipeline_says_what_it_takes() -> None:
    ran = subprocess.run(["bash", ROOT / "docs/examples/finetune_ci.sh"], capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and ran.stderr.startswith("usage: finetune_ci.sh MODEL DATA TEXT OUT")


@pytest.mark.prove
def test_the_script_for_a_pipeline_hands_on_what_did_no_harm(tmp_path: Path) -> None:
    chat, text, out = tmp_path / "chat.jsonl", tmp_path / "text.txt", tmp_path / "out"
    lines = (ROOT / "data" / "llamakit-instruct.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    chat.write_text("".join(lines[:20]), encoding="utf-8")
    text.write_text(tiny_text(3000), encoding="utf-8")
    model = cached_tiny_gguf(n_layer=1, tokenizer="bpe", chat_template=find_chat_template("chatml"))

    def script(*options: str, limit: str) -> int:
        python = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LLAMAKIT": f"{sys.executable} -m llamakit"}
        return subprocess.run(
            ["bash", ROOT / "docs/examples/finetune_ci.sh", model, chat, text, out, "--adam-iter", "2", *options],
            env={**os.environ, **python, "PPL_CTX": "64", "PPL_CHUNKS": "4", "MAX_RISE": limit},
            capture_output=True,
            check=False,
            timeout=250,
        ).returncode

    tried = {"lora.gguf", "report", "perplexity.json"}
    assert script("--adam-alpha", "1e-5", limit="50") == 0
    assert {path.name for path in out.iterdir()} == {*tried, "model-q8_0.gguf", "Modelfile"}
    assert script("--adam-alpha", "20", "--warmup", "0", limit="5") == 1  # nothing is left of the model
    assert {path.name for path in out.iterdir()} == tried
    first, second = json.loads((out / "perplexity.json").read_text())["results"]
    assert second["ppl"] > 1.05 * first["ppl"]
    assert script("--no-such-option", limit="5") == 2


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text_of(page)):
        assert "://" not in target, f"{page}: {target}: no address is known to be ours"
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def _known_flags() -> set[str]:
    from typer.main import get_command

    from llamakit.cli import build_app
    from llamakit.cli.compat import ALIASES, NO_OPS
    from llamakit.cli.compat_convert import _VALUED

    flags = {"--help", "--version", *_VALUED}
    for _, command in load(ROOT / "scripts" / "make_cli_docs.py").leaves(get_command(build_app())):
        for param in command.params:
            flags |= {*param.opts, *param.secondary_opts}
    for table in (*ALIASES.values(), *NO_OPS.values()):
        flags |= set(table)
    for program in (ROOT / "benchmarks").glob("*.py"):
        flags |= set(re.findall(r'"(--[a-z][\w-]*)"', program.read_text(encoding="utf-8")))
    return flags | {flag.replace("_", "-") for flag in flags}


#: flags of other programs that the pages speak of
FOREIGN = {
    "--no-deps",
    "--like-this",
    "--rank",
    "--merge",
    "--split",
    "--remote",
    "--nproc-per-node",
    "--max-restarts",
    "--shutdown-timeout",
}


@pytest.mark.parametrize("page", ALL_PAGES)
def test_flags_exist(page: str) -> None:
    known = _known_flags()
    text = re.sub(r"^```text\n.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)  # other programs, drawings
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", text)):
        assert flag.replace("_", "-") in known | FOREIGN, f"{page} speaks of {flag}"


def test_every_flag_of_finetune_is_in_the_comparison() -> None:
    """docs/finetune-compat.md promises every flag: those of the old tool, and what is new."""
    from llamakit.training.config import FinetuneConfig

    page = text_of("docs/finetune-compat.md").replace("_", "-")
    for name in FinetuneConfig.__dataclass_fields__:
        flag = name.replace("_", "-")
        short = re.sub(r"^rank-(w.|ffn-(?:gate|up|down))$", r"-\1", flag)
        assert f"--{flag}" in page or (short != flag and f"`{short}`" in page), flag


def test_contributing_names_files_that_exist() -> None:
    table = text_of("CONTRIBUTING.md").partition("## Where does X happen?")[2].partition("\n## ")[0]
    for path in re.findall(r"`([\w/]+(?:\.py|/))`", table):
        assert (ROOT / "llamakit" / path).exists(), path


def test_exit_codes_are_the_ones_in_the_code() -> None:
    from llamakit import errors

    section = text_of("README.md").partition("## Exit codes")[2]
    told = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", section, re.MULTILINE) for code in row.split(",")}
    assert told == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


@pytest.mark.parametrize("name", ["demo", "instruct"])
def test_the_configurations_of_finetune_are_understood(name: str) -> None:
    from llamakit.training.config import FinetuneConfig

    values = tomllib.loads((ROOT / "configs" / f"{name}.toml").read_text(encoding="utf-8"))
    FinetuneConfig(**{key.replace("-", "_"): value for key, value in values.items()})


def test_demo_cleans_a_play() -> None:
    play = (
        "# Title\n\n## ACT I\n\n_Enter A\nand B_\n\n**ANNE**  \n_\\[Aside]_  \nWell, good night.  \nStay.\n\n_Exit_\n"
    )
    assert load(ROOT / "scripts" / "demo.py").plain_text(play) == "ANNE:\n\nWell, good night.\nStay.\n"


def test_prove_counts_by_area(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.fuzz.test_mutants" name="test_a" time="2.5"><properties>'
        '<property name="mutants" value="3000"/></properties></testcase><testcase classname="tests.fuzz.test_mutants"'
        ' name="test_b" time="1"><failure/></testcase><testcase classname="tests.fuzz.test_more" name="test_c" time="0">'
        '<skipped message="no CUDA device"/></testcase></testsuite></testsuites>',
        encoding="utf-8",
    )
    prove = load(ROOT / "scripts" / "prove.py")
    area = prove.read_report(report)
    area.clock_s, area.processor_s, area.machine_s, area.date, area.commit = 90.0, 60.0, 120.0, "2026-01-02", "abc"
    page = prove.page({"fuzz": area}, ["fuzz", "quant"])
    assert (
        "- duration: 1.5 minutes, 1.0 minutes of processor time; the machine was shared: other programs took 50%"
        in page
    )
    assert "| fuzz | 1 | 1 | 1 | 1.5 | 1.0 | 2026-01-02 | abc |" in page
    assert "| fuzz | `test_a` | mutants = 3000 |" in page and "- fuzz: 1 x no CUDA device" in page
    assert "FAILED (1)" in page and "- `tests.fuzz.test_mutants.test_b`" in page and "- not proven: quant" in page


def test_prove_knows_every_test() -> None:
    paths = load(ROOT / "scripts" / "prove.py").area_paths(ROOT / "tests")
    covered = {file for places in paths.values() for place in places
               for file in ([place] if place.is_file() else place.rglob("test_*.py"))}  # fmt: skip
    assert covered == set((ROOT / "tests").rglob("test_*.py"))


@pytest.mark.prove
def test_an_interrupted_proof_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prove = load(ROOT / "scripts" / "prove.py")
    for name, value in (("RESULTS", tmp_path / "proof"), ("PAGE", tmp_path / "proof.md"), ("ROOT", tmp_path)):
        monkeypatch.setattr(prove, name, value)
    for name in ("first", "second"):
        (tmp_path / "tests" / name).mkdir(parents=True)
        (tmp_path / "tests" / name / "test_it.py").write_text("def test_it(): pass\n")
    (tmp_path / "tests" / "second" / "test_it.py").write_text("def test_it(): assert False\n")
    monkeypatch.setattr("sys.argv", ["prove.py", "first"])
    assert prove.main() == 0
    assert "- not proven: second" in (tmp_path / "proof.md").read_text()
    monkeypatch.setattr("sys.argv", ["prove.py", "second"])
    assert prove.main() == 1
    page = (tmp_path / "proof.md").read_text()
    assert "1 passed, 1 failed" in page and "| first | 1 | 0 |" in page and "| second | 0 | 1 |" in page
    (tmp_path / "tests" / "second" / "test_it.py").write_text("def test_it(): pass\ndef test_more(): pass\n")
    monkeypatch.setattr("sys.argv", ["prove.py", "--failed", "second"])
    assert prove.main() == 0
    page = (tmp_path / "proof.md").read_text()
    assert "all passed: 2 passed" in page and "| second | 1 | 0 |" in page
    assert "- second: 1 that had failed once more at " in page and page.count(": 1 passed\n") == 1
    monkeypatch.setattr("sys.argv", ["prove.py", "third"])
    assert prove.main() == 2 and "no area 'third' (there are: first, second)" in capsys.readouterr().err


def test_prove_knows_a_test_by_its_name() -> None:
    prove = load(ROOT / "scripts" / "prove.py")
    name = "tests.test_docs.test_prove_knows_a_test_by_its_name[a.b[c]-d::e]"
    assert prove.node_id(name, ROOT) == "tests/test_docs.py::test_prove_knows_a_test_by_its_name[a.b[c]-d::e]"
    assert prove.node_id("tests.quant.test_encode.TestX.test_y", ROOT) == "tests/quant/test_encode.py::TestX::test_y"
