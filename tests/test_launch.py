"""configs/launch/: the templates parse, and the command lines in them are ones that llamakit takes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from llamakit.cli import build_app
from tests.helpers import ROOT

FOLDER = ROOT / "configs" / "launch"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
#: options of torch's launcher that the templates use
TORCHRUN = {"--nnodes", "--nproc-per-node", "--max-restarts", "--rdzv-backend", "--rdzv-id", "--rdzv-endpoint"}


def words_of_script(path: Path) -> list[str]:
    """The words of the torchrun command in a script."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(line for line in text.splitlines() if "torchrun" in line and not line.lstrip().startswith("#"))
    return shlex.split(line.removesuffix("&"))


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8")))


def container() -> dict[str, Any]:
    return documents()[1]["spec"]["template"]["spec"]["containers"][0]


def commands() -> dict[str, list[str]]:
    found = {path.name: words_of_script(path) for path in SCRIPTS}
    return found | {"kubernetes.yaml": [*container()["command"], *container()["args"]]}


def test_each_template_is_looked_at() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"torchrun-two-nodes.sh", "slurm.sh", "kubernetes.yaml"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    checked = subprocess.run([bash, "-n", path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and not checked.stderr
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize("name", ["torchrun-two-nodes.sh", "slurm.sh", "kubernetes.yaml"])
def test_the_command_is_one_that_llamakit_takes(name: str) -> None:
    words = commands()[name]
    words = words[words.index("torchrun") + 1 :]
    at = words.index("-m")
    launcher, (module, command, *options) = words[:at], words[at + 1 :]
    flags = {word.partition("=")[0] for word in launcher if word.startswith("--")}
    assert (module, command) == ("llamakit", "finetune") and flags == TORCHRUN
    finetune: Any = get_command(build_app(["finetune"]))
    known = {flag for param in finetune.commands["finetune"].params for flag in param.opts}
    used = [word.partition("=")[0] for word in options if word.startswith("--")]
    assert set(used) <= known and {"--checkpoint-in", "--checkpoint-out", "--lora-out", "--batch"} <= set(used)
    values = dict(zip(options[::2], options[1::2], strict=True)) if "=" not in options[0] else dict(
        option.split("=", 1) for option in options
    )  # fmt: skip
    assert "LATEST" in values["--checkpoint-in"], "a run that is started again goes on"
    assert int(values["--batch"]) % 16 == 0, "it divides among two machines of eight GPUs"


def test_slurm_has_the_job_come_back() -> None:
    text = (FOLDER / "slurm.sh").read_text(encoding="utf-8")
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert directives["signal"].startswith("B:USR1@") and "requeue" in directives
    assert directives["ntasks-per-node"] == "1", "torchrun starts the ranks of a node"
    assert "trap again USR1" in text and 'scontrol requeue "$SLURM_JOB_ID"' in text


def test_kubernetes_has_the_pods_meet() -> None:
    service, job = documents()
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert service["kind"] == "Service" and service["spec"]["clusterIP"] == "None"
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 2
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    endpoint = next(arg for arg in container()["args"] if "rdzv-endpoint" in arg)
    port = service["spec"]["ports"][0]["port"]
    assert endpoint == f"--rdzv-endpoint={job['metadata']['name']}-0.{pod['subdomain']}:{port}"
    gpus = container()["resources"]["limits"]["nvidia.com/gpu"]
    assert (
        f"--nproc-per-node={gpus}" in container()["args"] and f"--nnodes={spec['completions']}" in container()["args"]
    )
    assert {m["name"] for m in container()["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_slurm_saves_and_requeues_when_it_is_told(tmp_path: Path) -> None:
    """With stand-ins for Slurm's programs and torchrun: USR1 to the job ends the step by SIGTERM, and requeues."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    programs = tmp_path / "bin"
    programs.mkdir()
    stands = {
        "scontrol": 'if [ "$1" = show ]; then echo node1; else echo "$@" >> "$LOG"; fi',
        "srun": 'exec "${@:2}"',
        "torchrun": 'trap \'echo saved >> "$LOG"; exit 143\' TERM; echo "$@" >> "$LOG"; kill -USR1 $PPID;'
        " while :; do sleep 0.05; done",
    }
    for name, body in stands.items():
        (programs / name).write_text(f"#!{bash}\n{body}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    log = tmp_path / "log"
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin", "LOG": str(log), "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip
    done = subprocess.run(
        [bash, FOLDER / "slurm.sh"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    started, *rest = log.read_text(encoding="utf-8").splitlines()
    assert "--rdzv-endpoint node1:20077 -m llamakit finetune" in started
    assert rest == ["saved", "requeue 77"] and done.returncode == 0, done.stderr
