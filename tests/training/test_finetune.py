"""The verb: its files, what it refuses, what it says, and that a resume is exact."""

import json

import numpy as np
import pytest

from llamakit.errors import DivergedError, LlamakitError, MismatchError
from llamakit.files import RunLock
from llamakit.formats.adapter import read_adapter
from llamakit.training import loop
from llamakit.training.checkpoint import read_checkpoint
from llamakit.training.loop import Control
from llamakit.training.report import Evaluation, Finished, Remark, Saving, StepReport
from tests.tiny import cached_tiny_gguf, tiny_text
from tests.training.runs import losses, run


def files(directory):
    return sorted(p.name for p in directory.iterdir() if p.name != "text.txt")


def of(kind, reports):
    return [r for r in reports if isinstance(r, kind)]


def test_files_appear_under_the_old_contract(tmp_path):
    reports = run(tmp_path, adam_iter=5, save_every=2)
    assert files(tmp_path) == sorted(
        f"{kind}-{n}.{ext}" for kind, ext in (("chk", "gguf"), ("lora", "bin")) for n in ("2", "4", "5", "LATEST")
    )
    assert [r.path.rpartition("/")[2] for r in of(Saving, reports)][:4] == [
        "chk-2.gguf",
        "chk-LATEST.gguf",
        "lora-2.bin",
        "lora-LATEST.bin",
    ]
    assert (tmp_path / "lora-LATEST.bin").read_bytes() == (tmp_path / "lora-5.bin").read_bytes()
    assert read_adapter(tmp_path / "lora-5.bin").alpha == 4
    assert of(Finished, reports)[0].iterations == 5


def test_nothing_else_is_saved_when_the_last_iteration_was(tmp_path):
    reports = run(tmp_path, adam_iter=4, save_every=2)
    assert len(of(Saving, reports)) == 8


def test_a_name_without_the_pattern_is_written_once(tmp_path):
    reports = run(tmp_path, lora_out=str(tmp_path / "lora.gguf"), checkpoint_out="", adam_iter=1)
    assert files(tmp_path) == ["lora.gguf"]
    assert len(of(Saving, reports)) == 1


def test_running_again_trains_as_many_iterations_more(tmp_path):
    first = run(tmp_path, adam_iter=3)
    again = run(tmp_path, adam_iter=3)
    assert [r.step for r in of(StepReport, first + again)] == [1, 2, 3, 4, 5, 6]
    assert any("starting afresh" in r.text for r in of(Remark, first))
    assert not any("starting afresh" in r.text for r in of(Remark, again))


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2, "grad_acc": 2}, {"dtype": "bf16"}], ids=str)
def test_a_resume_is_exact_to_the_last_bit(tmp_path, n, options):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = run(tmp_path / "whole", adam_iter=2 * n, **options)
    parts = run(tmp_path / "parts", adam_iter=n, **options) + run(tmp_path / "parts", adam_iter=n, **options)
    assert losses(whole) == losses(parts)
    name = f"lora-{2 * n}.bin"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_resume_is_exact_over_the_end_of_an_epoch(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text("the old king saw a new river and a bridge")
    options = {"ctx": 8, "batch": 3, "save_every": 0, "sample_random_offsets": True, "val_split": 0.0}
    whole = run(tmp_path / "whole", adam_iter=12, **options)
    parts = [r for _ in range(4) for r in run(tmp_path / "parts", adam_iter=3, **options)]
    assert losses(whole) == losses(parts)
    assert read_checkpoint(tmp_path / "parts" / "chk-12.gguf").progress.epochs >= 1
    assert (tmp_path / "whole/lora-12.bin").read_bytes() == (tmp_path / "parts/lora-12.bin").read_bytes()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ctx": 8}, ("--ctx", "16", "8")),
        ({"seed": 8}, ("--seed", "7", "8")),
        ({"lora_alpha": 8.0}, ("--lora-alpha", "4.0", "8.0")),
        ({"lora_r": 8, "lora_alpha": 4.0}, ("rank of attn_q", "4", "8")),
        ({"rank_wq": 0}, ("rank of attn_q", "4", "0")),
        ({"rank_tok_embd": 2}, ("rank of token_embd", "0", "2")),
        ({"val_split": 0.0}, ("--val-split", "0.05", "0.0")),
        ({"sample_start": "a"}, ("--sample-start", "''", "'a'")),
        ({"fill_with_next_samples": True}, ("--fill-with-next-samples", "False", "True")),
        ({"model_base": {"type": "F32"}}, ("base", "checkpoint", "this run")),
        ({"model_base": {"seed": 3, "type": "Q8_0"}}, ("base", "checkpoint", "this run")),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run_is_refused_naming_both_values(tmp_path, changes, named):
    run(tmp_path, adam_iter=1)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    if "model_base" in changes:
        changes = {"model_base": str(cached_tiny_gguf(**changes["model_base"]))}
    with pytest.raises(MismatchError) as caught:
        run(tmp_path, adam_iter=1, **changes)
    assert all(word in str(caught.value) for word in named)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_another_text_is_refused_until_it_is_meant(tmp_path):
    run(tmp_path, adam_iter=2)
    (tmp_path / "text.txt").write_text(tiny_text(3000, 6))
    with pytest.raises(MismatchError, match="training text") as caught:
        run(tmp_path, adam_iter=1)
    assert "--restart-data" in str(caught.value.hint)
    reports = run(tmp_path, adam_iter=1, restart_data=True)
    assert of(StepReport, reports)[0].sample == 1
    run(tmp_path, adam_iter=1)  # the new text is now the checkpoint's


def test_settings_come_from_the_command_line_with_one_warning_naming_both(tmp_path):
    run(tmp_path, adam_iter=1)
    reports = run(tmp_path, adam_iter=1, adam_alpha=5e-4, batch=3)
    warnings = [r.text for r in of(Remark, reports) if r.level == "warning" and "settings" in r.text]
    assert len(warnings) == 1
    assert "--adam-alpha 0.0005 (was 0.001)" in warnings[0] and "--batch 3 (was 2)" in warnings[0]


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run(tmp_path, adam_iter=1)
    path = tmp_path / "chk-LATEST.gguf"
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in [*rng.integers(0, len(data), 60).tolist(), len(data) - 1]:
        broken = bytearray(data)
        broken[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(broken))
        try:
            read_checkpoint(path)
        except LlamakitError as error:
            assert error.exit_code == 2
            continue
        assert broken[position] in (0, 1, 2, 4, 8, 16, 32, 64, 128), position  # only padding may go unnoticed
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(LlamakitError) as caught:
        run(tmp_path, adam_iter=1)
    assert caught.value.exit_code == 2


def test_only_the_newest_files_are_kept(tmp_path):
    run(tmp_path, adam_iter=6, save_every=1, keep_last=2)
    assert files(tmp_path) == sorted(
        f"{kind}-{n}.{ext}" for kind, ext in (("chk", "gguf"), ("lora", "bin")) for n in ("5", "6", "LATEST")
    )
    (tmp_path / "chk-3.gguf").write_text("somebody else's")
    run(tmp_path, adam_iter=2, save_every=1, keep_last=2)
    assert {"chk-3.gguf", "chk-7.gguf", "chk-8.gguf"} <= set(files(tmp_path))
    assert "chk-5.gguf" not in files(tmp_path)


def test_the_log_has_one_object_per_step(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("of an earlier run\n")
    run(tmp_path, adam_iter=3, save_every=2, log_file=str(log))
    run(tmp_path, adam_iter=1, log_file=str(log))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all({"loss", "lr", "tok_per_s", "elapsed_s"} <= line.keys() for line in lines)
    assert ["val_loss" in line for line in lines] == [False, True, True, True]
    assert lines[1]["val_ppl"] == pytest.approx(np.exp(lines[1]["val_loss"]))


def test_all_of_the_held_out_text_is_evaluated_at_the_end(tmp_path):
    (tmp_path / "text.txt").write_text(tiny_text(60000, 5))
    evaluations = of(Evaluation, run(tmp_path, adam_iter=3, save_every=2, val_split=0.3))
    assert [e.when for e in evaluations] == ["start", "save", "end"]
    assert evaluations[0].n_tokens <= 4096 and evaluations[1].n_tokens <= 4096
    assert evaluations[2].n_tokens == evaluations[2].n_held_out > 4096


def test_a_signal_ends_the_run_after_its_step_saved(tmp_path):
    control, seen = Control(), []
    from llamakit.training.finetune import finetune
    from tests.training.runs import run_config

    for report in finetune(run_config(tmp_path, adam_iter=50, save_every=0), control):
        seen.append(report)
        if isinstance(report, StepReport) and report.step == 3:
            control.signal = 15
    assert of(Finished, seen)[0].signal == 15
    assert len(of(StepReport, seen)) == 3
    assert read_checkpoint(tmp_path / "chk-LATEST.gguf").progress.iterations == 3


def test_a_request_to_save_saves_and_goes_on(tmp_path):
    control, seen = Control(), []
    from llamakit.training.finetune import finetune
    from tests.training.runs import run_config

    for report in finetune(run_config(tmp_path, adam_iter=4, save_every=0), control):
        seen.append(report)
        if isinstance(report, StepReport) and report.step == 1:
            control.save = True
    assert {"chk-2.gguf", "chk-4.gguf"} <= set(files(tmp_path)) and not control.save


def spoil(monkeypatch, steps):
    """Make the loss and every gradient of some steps not a number."""
    original, count = loop.backpropagate, [0]

    def backpropagate(model, *args):
        count[0] += 1
        total = original(model, *args)
        if count[0] not in steps:
            return total
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(float("nan"))
        return float("nan")

    monkeypatch.setattr(loop, "backpropagate", backpropagate)


def test_a_step_without_a_finite_loss_has_no_effect(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    spoil(monkeypatch, {2, 3, 4, 5})
    reports = run(tmp_path / "a", adam_iter=5, save_every=1)
    assert [r.skipped for r in of(StepReport, reports)] == [False, True, True, True, True]
    first, last = (read_adapter(tmp_path / "a" / f"lora-{n}.bin") for n in (1, 5))
    for name, (a, b) in first.tensors.items():
        assert np.array_equal(a, last.tensors[name][0]) and np.array_equal(b, last.tensors[name][1])
    state = read_checkpoint(tmp_path / "a" / "chk-LATEST.gguf")
    assert state.progress.updates == 1 and state.progress.iterations == 5


def test_five_such_steps_in_a_row_end_the_run_and_keep_the_checkpoint(tmp_path, monkeypatch):
    spoil(monkeypatch, set(range(3, 99)))
    with pytest.raises(DivergedError, match="5 steps in a row"):
        run(tmp_path, adam_iter=20, save_every=2)
    state = read_checkpoint(tmp_path / "chk-LATEST.gguf")
    assert all(np.isfinite(array).all() for array in state.arrays.values())


def test_a_second_run_on_the_same_outputs_is_refused(tmp_path):
    with (
        RunLock([tmp_path / "chk-LATEST.gguf"]),
        pytest.raises(LlamakitError, match="another run") as caught,
    ):
        run(tmp_path)
    assert caught.value.exit_code == 2
    assert files(tmp_path) == []
    run(tmp_path, adam_iter=1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_out": "nowhere/lora.gguf"}, "cannot be written"),
        ({"model_base": ""}, "--model-base is missing"),
        ({"model_base": "nowhere/base.gguf"}, "No such file"),
        ({"lora_r": 1000}, "rank 1000"),
        ({"ctx": 100000}, "--ctx 100000"),
        ({"rank_wq": 0, "rank_wk": 0, "rank_wv": 0, "rank_wo": 0, "rank_ffn_gate": 0, "rank_ffn_up": 0,
          "rank_ffn_down": 0}, "nothing to train"),
        ({"only_write_lora": True}, "needs a checkpoint"),
        ({"train_data": "nowhere/text.txt"}, "No such file"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, monkeypatch, options, reason):
    monkeypatch.chdir(tmp_path)  # where nobody else makes a folder of that name
    with pytest.raises(LlamakitError, match=reason) as caught:
        run(tmp_path, **options)
    assert caught.value.exit_code == 2
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "options",
    [{"ctx": 0}, {"batch": 0}, {"lora_r": 0}, {"rank_wq": -1}, {"val_split": 1.0}, {"lora_dropout": -0.1},
     {"adam_alpha": float("nan")}, {"adam_beta1": 1.0}, {"cos_decay_min": 2.0}, {"threads": 0}],
    ids=str,
)  # fmt: skip
def test_an_option_that_cannot_be_is_named(tmp_path, options):
    with pytest.raises(LlamakitError, match="--" + next(iter(options)).replace("_", "-")):
        run(tmp_path, **options)


def test_writing_only_the_adapter(tmp_path):
    run(tmp_path, adam_iter=2)
    expected = (tmp_path / "lora-2.bin").read_bytes()
    for path in tmp_path.glob("lora-*"):
        path.unlink()
    run(tmp_path, only_write_lora=True, train_data="/nowhere")
    assert (tmp_path / "lora-2.bin").read_bytes() == (tmp_path / "lora-LATEST.bin").read_bytes() == expected


def test_a_warmup_longer_than_the_run_is_warned_of_with_the_rate_that_it_will_reach(tmp_path):
    warnings = [r.text for r in of(Remark, run(tmp_path, adam_iter=2, warmup=100)) if r.level == "warning"]
    assert any("--warmup 100" in w and "2e-05" in w for w in warnings)


def test_norms_and_embeddings_are_trained_when_their_rank_is_given(tmp_path):
    reports = run(tmp_path, adam_iter=2, rank_tok_embd=2, rank_out=2, rank_att_norm=1, rank_out_norm=1, rank_ffn_norm=1)
    assert any("llama.cpp ignores" in r.text for r in of(Remark, reports))
    adapter = read_adapter(tmp_path / "lora-LATEST.bin")
    for name in ("token_embd.weight", "output.weight", "output_norm.weight", "blk.0.attn_norm.weight"):
        assert np.abs(adapter.tensors[name][1]).max() > 0, name


def test_epochs_end_the_run(tmp_path):
    (tmp_path / "text.txt").write_text("the old king saw a new river and a bridge")
    reports = run(tmp_path, adam_iter=500, epochs=2, ctx=8, batch=4, save_every=0)
    assert "--epochs 2" in of(Finished, reports)[0].reason
    assert read_checkpoint(tmp_path / "chk-LATEST.gguf").progress.epochs == 2


def test_the_loss_falls(tmp_path):
    values = losses(run(tmp_path, adam_iter=60, adam_alpha=1e-2, save_every=0, batch=4))
    assert np.mean(values[-5:]) < np.mean(values[:5]) - 0.3
