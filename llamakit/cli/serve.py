"""`llamakit serve`: a model behind the APIs of OpenAI, Ollama and llama-server."""

from __future__ import annotations

import json as json_module
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import llamakit
from llamakit.cli import render
from llamakit.cli.chat_options import ChatTemplateOption
from llamakit.cli.loading import Loaded, load
from llamakit.cli.options import (
    FILES,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    LoraOption,
    LoraScaledOption,
    OfflineOption,
    ThreadsOption,
    named_adapters,
)
from llamakit.cli.sources import local
from llamakit.errors import EXIT_OK, SaveError, UsageError
from llamakit.files import read_text
from llamakit.server.config import ServeConfig

if TYPE_CHECKING:
    from llamakit.server.http import Record
    from llamakit.server.service import Service

_SERVER, _SAFETY = "Server", "Safety"
_KEY = "LLAMAKIT_API_KEY"
#: a model may allow more, but not everybody who starts a server wants to pay for it in every slot
_USUAL_CTX = 8192


def serve(
    *,
    model: Annotated[
        str,
        typer.Option("-m", metavar="FILE", help="Model: a path, hf:user/repo[:QUANT] or a URL.", rich_help_panel=FILES),
    ],
    vocabulary: Annotated[
        str | None,
        typer.Option(
            "-z", metavar="FILE", help="Vocabulary (tokenizer.bin) of a llama2.c model.", rich_help_panel=FILES
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen on; others than loopback need a key.", rich_help_panel=_SERVER),
    ] = ServeConfig.host,
    port: Annotated[
        int, typer.Option("--port", help="Port to listen on; 0: any free one.", rich_help_panel=_SERVER)
    ] = ServeConfig.port,
    parallel: Annotated[
        int, typer.Option("--parallel", "-np", help="Texts that are written at once.", rich_help_panel=_SERVER)
    ] = ServeConfig.parallel,
    ctx: Annotated[
        int,
        typer.Option("--ctx", help="Context of each in tokens; 0: the model's, at most 8192.", rich_help_panel=_SERVER),
    ] = ServeConfig.ctx,
    queue: Annotated[
        int, typer.Option("--queue", help="Requests that may wait; more get 503.", rich_help_panel=_SERVER)
    ] = ServeConfig.queue,
    timeout: Annotated[
        float,
        typer.Option("--timeout", help="Seconds a request may take, waiting included.", rich_help_panel=_SERVER),
    ] = ServeConfig.timeout,
    alias: Annotated[
        str,
        typer.Option(
            "--alias",
            metavar="NAMES",
            help="Name of the model; several with commas.",
            show_default="the file's",
            rich_help_panel=_SERVER,
        ),
    ] = ServeConfig.alias,
    log_file: Annotated[
        Path | None,
        typer.Option(
            "--log-file", metavar="FILE", help="Append a JSON line for each request.", rich_help_panel=_SERVER
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help=f"Keys, one a line, that requests must have one of; or {_KEY} in the environment.",
            rich_help_panel=_SAFETY,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            metavar="ORIGIN",
            help="Web pages of this origin may use the server; repeatable, *: all.",
            rich_help_panel=_SAFETY,
        ),
    ] = None,
    chat_template: ChatTemplateOption = None,
    lora: LoraOption = None,
    lora_scaled: LoraScaledOption = None,
    force: ForceOption = False,
    offline: OfflineOption = False,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    config: ConfigOption = None,
) -> int:
    """Serve a model to programs that speak OpenAI's, Ollama's or llama-server's API, and a chat page to browsers."""
    from llamakit.tokenizer.chat_templates import find_chat_template

    wanted = ServeConfig(
        host=host, port=port, parallel=parallel, ctx=ctx, queue=queue, timeout=timeout, alias=alias,
        api_key_file=api_key_file, cors_origin=tuple(cors_origin or ()), log_file=log_file,
    )  # fmt: skip
    keys = _keys(api_key_file)
    bound_socket, make_server = _server_library()
    _check_exposed(host, keys)
    if "*" in wanted.cors_origin and not keys:
        render.warn("--cors-origin * without a key: every web page that is visited here may use the server")
    template = find_chat_template(chat_template) if chat_template else None
    named = named_adapters(lora, lora_scaled)
    with bound_socket(host, port) as sock:
        adapters = [(local(name, offline=offline), scale) for name, scale in named]
        files = local(model, offline=offline), local(vocabulary, offline=offline)
        loaded = load(
            files[0], vocabulary=files[1], adapters=adapters, force=force, threads=threads, device=device, dtype=dtype,
            n_ctx=ctx or None,
        )  # fmt: skip
        _use_template(loaded, template)
        service = _service(loaded, wanted)
        address = f"http://{_shown(host)}:{sock.getsockname()[1]}"
        server = make_server(service, sock, keys=keys, log=_log(log_file), ready=lambda: _tell(service, address))
        server.run()
    render.log("stopped")
    return EXIT_OK


def _server_library():
    """(bound_socket, Server), for which the packages of the extra have to be there."""
    try:
        from llamakit.server.run import Server, bound_socket
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "anyio", "h11"):
            raise
        hint = "pip install '.[serve]' in llamakit's folder, or pip install starlette uvicorn"
        raise UsageError(f"a server needs the package {error.name}", hint=hint) from error
    return bound_socket, Server


def _keys(file: Path | None) -> list[str]:
    """The keys of the file and of the environment. Raises UsageError for a file without any."""
    keys = [key for key in [os.environ.get(_KEY, "").strip()] if key]
    if file is not None:
        found = [line.strip() for line in read_text(file).splitlines() if line.strip()]
        if not found:
            raise UsageError("has no key (expected one a line)", path=file)
        keys += found
    return keys


def _check_exposed(host: str, keys: list[str]) -> None:
    from llamakit.server.guard import is_loopback

    if not keys and not is_loopback(host):
        hint = f"--api-key-file FILE, or {_KEY} in the environment; 127.0.0.1 is for this machine alone"
        raise UsageError(f"--host {host} can be reached from elsewhere, which needs an API key", hint=hint)


def _use_template(loaded: Loaded, template: str | None) -> None:
    from llamakit.tokenizer.chat_templates import use_chat_template

    if template is not None:
        use_chat_template(loaded.tokenizer, template)
    elif not loaded.tokenizer.chat_template:
        render.note("the model has no chat template: completions work, chats need --chat-template")


def _service(loaded: Loaded, config: ServeConfig) -> Service:
    from llamakit.inference.config import GenerateConfig
    from llamakit.inference.file_settings import with_file_settings
    from llamakit.inference.slots import Slots
    from llamakit.server.service import Service

    own = loaded.engine.config.n_ctx
    n_ctx = config.ctx or min(own, _USUAL_CTX)
    if n_ctx > own:
        render.warn(f"--ctx {n_ctx} is more than the {own} tokens that the model was trained for")
    for warning in loaded.tokenizer.warnings:
        render.note(f"{loaded.file.path}: {warning}")
    sampling, _ = with_file_settings(GenerateConfig(), loaded.file)
    names = _adapter_names(loaded)
    slots = Slots(
        loaded.engine, loaded.tokenizer, n_slots=config.parallel, n_ctx=n_ctx, max_waiting=config.queue,
        adapters={name: adapter for name, (adapter, _) in zip(names, loaded.adapters, strict=True)},
    )  # fmt: skip
    aliases = tuple(name.strip() for name in config.alias.split(",") if name.strip())
    return Service(
        slots=slots, tokenizer=loaded.tokenizer, file=loaded.file, config=config, sampling=sampling,
        names=aliases or (_stem(loaded.file.path),), version=llamakit.__version__,
        scales={name: scale for name, (_, scale) in zip(names, loaded.adapters, strict=True)},
    )  # fmt: skip


def _stem(path: Path) -> str:
    path = path.resolve()
    return path.name if path.is_dir() else path.stem


def _adapter_names(loaded: Loaded) -> list[str]:
    """The names of their files, numbered where two are alike."""
    names: list[str] = []
    for adapter, _ in loaded.adapters:
        stem = name = _stem(Path(adapter.path or "adapter"))
        number = 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _tell(service: Service, address: str) -> None:
    slots = service.slots
    render.log(f"serving {', '.join(service.model_names)}")
    render.log(f"{slots.n_slots} slots of {slots.n_ctx} tokens, {service.config.queue} requests may wait")
    render.log(f"listening on {address} (a chat page; APIs under {address}/v1 and {address}/api); Ctrl-C ends")


def _log(path: Path | None) -> Callable[[Record], None]:
    """A line on stderr for each request, and one of JSON in the file."""
    try:
        file = None if path is None else path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise SaveError(f"cannot write: {error.strerror}", path=path) from error

    def log(record: Record) -> None:
        tokens = f", {record.n_prompt} + {record.n_generated} tokens" if record.n_prompt else ""
        failure = f": {record.error}" if record.error else ""
        render.log(f"{record.method} {record.path} {record.status}{tokens}, {record.seconds:.2f} s{failure}")
        if file is not None:
            file.write(json_module.dumps({"time": round(time.time(), 3), **asdict(record)}) + "\n")

    return log
