"""One default, one place: what a command offers is what its dataclass says."""

from __future__ import annotations

from llamakit.cli.bench import bench
from llamakit.cli.convert import convert
from llamakit.cli.data import prepare
from llamakit.cli.data_check import check
from llamakit.cli.finetune import finetune
from llamakit.cli.generate import generate
from llamakit.cli.imatrix import imatrix
from llamakit.cli.merge import merge
from llamakit.cli.perplexity import perplexity
from llamakit.cli.quantize import quantize
from llamakit.cli.serve import serve
from llamakit.cli.tokenizer import train as train_tokenizer
from llamakit.cli.train import train
from llamakit.conversion.convert_config import ConvertConfig
from llamakit.conversion.merge_config import MergeConfig
from llamakit.conversion.quantize_config import QuantizeConfig
from llamakit.dataset.config import CheckConfig
from llamakit.dataset.prepare_config import PrepareConfig, TrainTokenizerConfig
from llamakit.inference.bench_config import BenchConfig
from llamakit.inference.config import GenerateConfig, PerplexityConfig
from llamakit.inference.imatrix_config import ImatrixConfig
from llamakit.server.config import ServeConfig
from llamakit.training.config import FinetuneConfig
from llamakit.training.train_config import TrainConfig
from tests.helpers import assert_parity


def test_finetune() -> None:
    others = ("config", "devices", "json", "n_gpu_layers", "offline", "plan", "report_to", "report_dir", "report")
    repeated = ("sample_prompt", "lora_targets")  # None there, tuples here
    assert_parity(finetune, FinetuneConfig, cli_only=(*others, *repeated), config_only=repeated)


def test_train() -> None:
    others = ("config", "devices", "print_config", "json", "offline", "report_to", "report_dir")
    repeated = ("sample_prompt", "export")  # None there, tuples here
    assert_parity(train, TrainConfig, cli_only=(*others, *repeated), config_only=repeated)


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
        "rope_freq_base",
        "in_prefix",
        "in_suffix",
        "prompts",
    )
    chat = ("conversation", "system", "system_file", "chat_template", "single_turn")
    others = ("offline", "threads", "device", "dtype", "no_display_prompt", "verbose", "json", "config")
    texts = (
        "dry_sequence_breaker",
        "logit_bias",
        "stop",
        "reverse_prompt",
    )  # None on the command line, read into what the field has
    assert_parity(
        generate,
        GenerateConfig,
        cli_only=("context", "sampling_seq", "grammar_file", "json_schema_file", *files, *chat, *others, *texts),
        config_only=("prefill_chunk", *texts),
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


def test_quantize() -> None:
    # Typer cannot tell an empty list from none: the options that can be repeated are None there, () here.
    repeated = ("tensor_type", "tensor_type_file", "include_weights", "exclude_weights", "override_kv")
    others = ("arguments", "kl", "dry_run", "threads", "offline", "json", "config")
    assert_parity(
        quantize, QuantizeConfig, cli_only=(*others, *repeated), config_only=("source", "out", "type", *repeated)
    )


def test_perplexity() -> None:
    files = ("models", "file", "kl_divergence_base", "kl_divergence", "lora", "lora_scaled", "force")
    others = ("threads", "device", "dtype", "offline", "json", "config")
    assert_parity(perplexity, PerplexityConfig, cli_only=files + others)


def test_imatrix() -> None:
    others = ("show_statistics", "threads", "device", "dtype", "offline", "json", "config")
    assert_parity(imatrix, ImatrixConfig, cli_only=("in_files", *others), config_only=("in_files",))


def test_serve() -> None:
    files = ("model", "vocabulary", "lora", "lora_scaled", "force", "chat_template", "offline", "config")
    repeated = ("cors_origin",)  # None where it is not given
    others = ("threads", "device", "dtype")
    assert_parity(serve, ServeConfig, cli_only=(*files, *others, *repeated), config_only=repeated)


def test_bench() -> None:
    lists = ("n_prompt", "n_gen", "n_pg", "n_depth", "n_batch", "n_ubatch")  # texts such as 1-8*2 there
    files = ("models", "lora", "lora_scaled", "force", "offline", "config")
    others = ("no_warmup", "threads", "device", "dtype", "output", "output_err", "progress", "verbose")
    assert_parity(bench, BenchConfig, cli_only=(*lists, *files, *others), config_only=(*lists, "warmup"))


def test_data_check() -> None:
    assert_parity(check, CheckConfig, cli_only=("sources", "model", "offline", "json", "config"))


def test_data_prepare() -> None:
    # Typer cannot tell an empty list from none; what is required is asked for in a line of our own.
    own = ("inputs", "out", "vocab_model")
    assert_parity(prepare, PrepareConfig, cli_only=("input_option", "offline", "json", "config", *own), config_only=own)


def test_tokenizer_train() -> None:
    own = ("inputs", "out", "vocab_size")
    others = ("input_option", "offline", "json", "config")
    assert_parity(train_tokenizer, TrainTokenizerConfig, cli_only=(*others, *own), config_only=own)
