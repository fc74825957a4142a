"""One default, one place: what a command offers is what its dataclass says."""

from __future__ import annotations

from llamakit.cli.convert import convert
from llamakit.cli.finetune import finetune
from llamakit.cli.generate import generate
from llamakit.cli.merge import merge
from llamakit.conversion.convert_config import ConvertConfig
from llamakit.conversion.merge_config import MergeConfig
from llamakit.inference.config import GenerateConfig
from llamakit.training.config import FinetuneConfig
from tests.helpers import assert_parity


def test_finetune() -> None:
    assert_parity(finetune, FinetuneConfig, cli_only=("config", "json", "n_gpu_layers", "offline"))


def test_generate() -> None:
    files = (
        "prompt",
        "model",
        "vocabulary",
        "prompt_option",
        "prompt_file",
        "no_escape",
        "lora",
        "lora_scaled",
        "force",
    )
    others = ("conversation", "offline", "threads", "device", "dtype", "no_display_prompt", "json", "config")
    texts = ("dry_sequence_breaker", "logit_bias")  # None on the command line, read into what the field has
    assert_parity(
        generate,
        GenerateConfig,
        cli_only=("context", "sampling_seq", *files, *others, *texts),
        config_only=("logprobs", "prefill_chunk", "stop_ids", *texts),
    )


def test_convert() -> None:
    files = ("base", "force", "system", "parameter", "split_max_size")
    others = ("dry_run", "no_verify", "threads", "offline", "json", "config")
    assert_parity(convert, ConvertConfig, cli_only=files + others, config_only=("split_max_bytes",))


def test_merge() -> None:
    assert_parity(
        merge,
        MergeConfig,
        cli_only=("lora", "lora_scaled", "threads", "offline", "json", "config"),
        config_only=("lora", "lora_scaled"),
    )
