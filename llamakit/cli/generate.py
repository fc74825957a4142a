"""`llamakit generate`: continue a prompt, streaming it to stdout."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamakit.cli import completion_options as completion
from llamakit.cli import completion_view as view
from llamakit.cli import grammar_options as structure
from llamakit.cli import render
from llamakit.cli import sampling_options as sampling
from llamakit.cli.chat_options import (
    ChatSetup,
    ChatTemplateOption,
    SingleTurnOption,
    SystemFileOption,
    SystemOption,
    refuse_without_chat,
    system_text,
)
from llamakit.cli.converse import converse
from llamakit.cli.loading import Loaded, load
from llamakit.cli.options import (
    CHAT,
    FILES,
    MODEL,
    OUTPUT,
    SAMPLING,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    LoraOption,
    LoraScaledOption,
    OfflineOption,
    ThreadsOption,
    named_adapters,
)
from llamakit.cli.prompt import framed_ids, read_prompt
from llamakit.cli.prompts import read_prompts, run_prompts
from llamakit.cli.sources import local
from llamakit.conversion.convert_config import check_stated
from llamakit.errors import EXIT_INTERRUPTED, EXIT_OK, UsageError
from llamakit.inference.config import GenerateConfig

if TYPE_CHECKING:
    from llamakit.inference.continuation import Done, Token
    from llamakit.tokenizer.chat import Renderer

_PROMPT = completion.PROMPT


def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to continue.", show_default=False)
    ] = None,
    *,
    model: Annotated[
        str,
        typer.Option(
            "-m",
            metavar="FILE",
            help="Model: GGUF, or llama2.c .bin with -z; a path, hf:user/repo[:QUANT] or a URL.",
            rich_help_panel=FILES,
        ),
    ],
    vocabulary: Annotated[
        str | None,
        typer.Option(
            "-z", metavar="FILE", help="Vocabulary (tokenizer.bin) of a llama2.c model.", rich_help_panel=FILES
        ),
    ] = None,
    prompt_option: Annotated[
        str | None, typer.Option("-p", metavar="TEXT", help="Text to continue.", rich_help_panel=_PROMPT)
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("-f", metavar="FILE", help="File with the text to continue.", rich_help_panel=_PROMPT),
    ] = None,
    no_escape: Annotated[
        bool,
        typer.Option(
            "--no-escape", help=r"Leave \n, \t, \xNN ... in PROMPT and -p as they are.", rich_help_panel=_PROMPT
        ),
    ] = False,
    in_prefix: completion.InPrefixOption = "",
    in_suffix: completion.InSuffixOption = "",
    prompts: completion.PromptsOption = None,
    conversation: Annotated[
        bool,
        typer.Option(
            "-cnv", help="Chat, as llamakit chat does; the prompt is the first message.", rich_help_panel=CHAT
        ),
    ] = False,
    system: SystemOption = None,
    system_file: SystemFileOption = None,
    chat_template: ChatTemplateOption = None,
    single_turn: SingleTurnOption = False,
    n_predict: Annotated[
        int,
        typer.Option(
            "-n", help="Tokens at most; -1: until an end token, -2: or the context is full.", rich_help_panel=SAMPLING
        ),
    ] = GenerateConfig.n_predict,
    reverse_prompt: completion.ReversePromptOption = None,
    stop: completion.StopOption = None,
    keep: completion.KeepOption = GenerateConfig.keep,
    context_shift: completion.ContextShiftOption = GenerateConfig.context_shift,
    temperature: Annotated[
        float, typer.Option("-t", help="Temperature; 0 takes the likeliest token.", rich_help_panel=SAMPLING)
    ] = GenerateConfig.temperature,
    top_k: Annotated[
        int, typer.Option("--top-k", help="Sample among the k likeliest; 0: off.", rich_help_panel=SAMPLING)
    ] = GenerateConfig.top_k,
    top_p: Annotated[
        float,
        typer.Option("--top-p", help="Sample among the likeliest that reach this; 1: off.", rich_help_panel=SAMPLING),
    ] = GenerateConfig.top_p,
    min_p: Annotated[
        float,
        typer.Option("--min-p", help="Drop below this share of the likeliest; 0: off.", rich_help_panel=SAMPLING),
    ] = GenerateConfig.min_p,
    repeat_penalty: Annotated[
        float, typer.Option("--repeat-penalty", help="Penalty of recent tokens; 1: off.", rich_help_panel=SAMPLING)
    ] = GenerateConfig.repeat_penalty,
    repeat_last_n: Annotated[
        int, typer.Option("--repeat-last-n", help="How many tokens are recent; 0: off.", rich_help_panel=SAMPLING)
    ] = GenerateConfig.repeat_last_n,
    presence_penalty: sampling.PresencePenaltyOption = GenerateConfig.presence_penalty,
    frequency_penalty: sampling.FrequencyPenaltyOption = GenerateConfig.frequency_penalty,
    dry_multiplier: sampling.DryMultiplierOption = GenerateConfig.dry_multiplier,
    dry_base: sampling.DryBaseOption = GenerateConfig.dry_base,
    dry_allowed_length: sampling.DryAllowedLengthOption = GenerateConfig.dry_allowed_length,
    dry_penalty_last_n: sampling.DryLastNOption = GenerateConfig.dry_penalty_last_n,
    dry_sequence_breaker: sampling.DryBreakerOption = None,
    top_n_sigma: sampling.TopNSigmaOption = GenerateConfig.top_n_sigma,
    typical: sampling.TypicalOption = GenerateConfig.typical,
    xtc_probability: sampling.XtcProbabilityOption = GenerateConfig.xtc_probability,
    xtc_threshold: sampling.XtcThresholdOption = GenerateConfig.xtc_threshold,
    dynatemp_range: sampling.DynatempRangeOption = GenerateConfig.dynatemp_range,
    dynatemp_exp: sampling.DynatempExpOption = GenerateConfig.dynatemp_exp,
    mirostat: sampling.MirostatOption = GenerateConfig.mirostat,
    mirostat_lr: sampling.MirostatLrOption = GenerateConfig.mirostat_lr,
    mirostat_ent: sampling.MirostatEntOption = GenerateConfig.mirostat_ent,
    adaptive_target: sampling.AdaptiveTargetOption = GenerateConfig.adaptive_target,
    adaptive_decay: sampling.AdaptiveDecayOption = GenerateConfig.adaptive_decay,
    samplers: sampling.SamplersOption = GenerateConfig.samplers,
    sampling_seq: sampling.SamplingSeqOption = None,
    logit_bias: sampling.LogitBiasOption = None,
    ignore_eos: sampling.IgnoreEosOption = False,
    grammar: structure.GrammarOption = GenerateConfig.grammar,
    grammar_file: structure.GrammarFileOption = None,
    json_schema: structure.JsonSchemaOption = GenerateConfig.json_schema,
    json_schema_file: structure.JsonSchemaFileOption = None,
    rng: sampling.RngOption = "llama.cpp",
    seed: Annotated[
        int, typer.Option("--seed", help="Seed; -1: a random one, which is reported.", rich_help_panel=SAMPLING)
    ] = GenerateConfig.seed,
    ctx: Annotated[
        int, typer.Option("--ctx", help="Context in tokens; 0: the model's.", rich_help_panel=SAMPLING)
    ] = GenerateConfig.ctx,
    rope_freq_base: Annotated[
        float | None,
        typer.Option(
            "--rope-freq-base",
            metavar="N",
            help="Base of the rotary frequencies instead of the model's own.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    lora: LoraOption = None,
    lora_scaled: LoraScaledOption = None,
    force: ForceOption = False,
    offline: OfflineOption = False,
    threads: ThreadsOption = None,
    parallel: completion.ParallelOption = GenerateConfig.parallel,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    no_display_prompt: Annotated[
        bool, typer.Option("--no-display-prompt", help="Print the continuation alone.", rich_help_panel=OUTPUT)
    ] = False,
    logprobs: completion.LogprobsOption = None,
    verbose: completion.VerboseOption = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> int:
    """Continue a prompt, from the command line, a file or standard input; without one, from the start of a text."""
    from llamakit.tokenizer.chat import Renderer
    from llamakit.tokenizer.chat_templates import find_chat_template

    check_stated(None, rope_freq_base)
    grammar, json_schema, source = structure.read_structure(grammar, grammar_file, json_schema, json_schema_file)
    wanted = GenerateConfig(
        n_predict=n_predict, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repeat_penalty=repeat_penalty, repeat_last_n=repeat_last_n, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, dry_multiplier=dry_multiplier, dry_base=dry_base,
        dry_allowed_length=dry_allowed_length, dry_penalty_last_n=dry_penalty_last_n,
        dry_sequence_breaker=sampling.sequence_breakers(
            dry_sequence_breaker, GenerateConfig.dry_sequence_breaker, escape=not no_escape
        ),
        top_n_sigma=top_n_sigma, typical=typical, xtc_probability=xtc_probability, xtc_threshold=xtc_threshold,
        dynatemp_range=dynatemp_range, dynatemp_exp=dynatemp_exp, mirostat=mirostat, mirostat_lr=mirostat_lr,
        mirostat_ent=mirostat_ent, adaptive_target=adaptive_target, adaptive_decay=adaptive_decay,
        samplers=sampling.sampler_order(samplers, sampling_seq), logit_bias=sampling.logit_biases(logit_bias),
        ignore_eos=ignore_eos, grammar=grammar, json_schema=json_schema, rng=rng, seed=seed, ctx=ctx,
        keep=keep, context_shift=context_shift,
        stop=completion.texts(stop, escape=not no_escape), parallel=parallel, logprobs=logprobs,
        reverse_prompt=completion.texts(reverse_prompt, escape=not no_escape),
    )  # fmt: skip
    structure.check(wanted, source)
    frame = completion.texts([in_prefix, in_suffix], escape=not no_escape)
    _check_prompt_options(prompts, (prompt, prompt_option, prompt_file), frame, conversation)
    many = read_prompts(prompts) if prompts else None
    named = named_adapters(lora, lora_scaled)
    if not conversation:
        refuse_without_chat(
            system=system, system_file=system_file, chat_template=chat_template, single_turn=single_turn
        )
    instructions = system_text(system, system_file, escape=not no_escape)
    template = find_chat_template(chat_template) if chat_template else None
    use_stdin = not prompts and (single_turn if conversation else vocabulary is None)  # a chat reads line by line
    text = read_prompt(prompt, prompt_option, prompt_file, escape=not no_escape, use_stdin=use_stdin) or ""
    adapters = [(local(name, offline=offline), scale) for name, scale in named]
    files = local(model, offline=offline), local(vocabulary, offline=offline)
    loaded = load(
        files[0], vocabulary=files[1], adapters=adapters, force=force, threads=threads, device=device, dtype=dtype,
        n_ctx=ctx or None, rope_theta=rope_freq_base, chat=conversation, chat_template=template,
    )  # fmt: skip
    wanted = _with_file_settings(loaded, wanted, sampling.given(context))
    if verbose:
        view.log_chain(wanted, loaded.tokenizer)
    if prompts and many is not None:
        _remarks(loaded, wanted)
        if not conversation:
            _hint_at_chat(loaded)
            return run_prompts(loaded, many, prompts, wanted, partial(_prompt_ids, loaded, frame))
        with closing(Renderer()) as renderer:  # one process renders all of them
            return run_prompts(loaded, many, prompts, wanted, partial(_chat_ids, loaded, instructions, renderer))
    if conversation:
        _remarks(loaded, wanted)
        setup = ChatSetup(text, instructions, single_turn, json, force, offline)
        return converse(loaded, wanted, setup, as_json=partial(_as_json, logprobs=logprobs is not None))
    _hint_at_chat(loaded)
    ids = _prompt_ids(loaded, frame, text)
    text = frame[0] + text + frame[1]
    return _run(loaded, ids, wanted, shown="" if no_display_prompt else text, prompt=text, json=json)


def _check_prompt_options(
    prompts: Path | None, others: tuple[object, ...], frame: tuple[str, ...], conversation: bool
) -> None:
    """Raise UsageError for sources of a prompt, and for what stands around it, that do not go together."""
    if prompts and any(other is not None for other in others):
        raise UsageError("the prompt is given more than once (--prompts and another)", hint="give only one of them")
    if conversation and any(frame):
        raise UsageError("--in-prefix and --in-suffix do not go with -cnv", hint="the model's template stands there")


def _with_file_settings(loaded: Loaded, config: GenerateConfig, given: set[str]) -> GenerateConfig:
    """What the file recommends, under what the user has set, and a note that says so."""
    from llamakit.inference.file_settings import with_file_settings

    config, found = with_file_settings(config, loaded.file, given=given)
    if found:
        settings = ", ".join(
            f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}" for name, value in found.items()
        )
        render.note(f"the file recommends its sampling: {settings}")
    if config.ignore_eos and not loaded.tokenizer.eog_ids:
        render.note("--ignore-eos has no effect: the vocabulary has no end token")
    return config


def _hint_at_chat(loaded: Loaded) -> None:
    """Where a chat may be meant."""
    if loaded.tokenizer.chat_template:
        render.hint("this model has a chat template; a plain completion does not apply it, llamakit chat does")


def _prompt_ids(loaded: Loaded, frame: tuple[str, ...], text: str) -> list[int]:
    """The prompt as it is, or in its frame (--in-prefix and --in-suffix)."""
    from llamakit.inference.completion import encode_prompt

    if any(frame):
        return framed_ids(loaded.tokenizer, frame[0], text, frame[1])
    return encode_prompt(loaded.tokenizer, text)


def _chat_ids(loaded: Loaded, system: str, renderer: Renderer, text: str) -> list[int]:
    """A prompt of --prompts as the first message of a chat of its own."""
    from llamakit.tokenizer.chat import encode_chat

    head = [{"role": "system", "content": system}] if system else []
    return encode_chat(loaded.tokenizer, [*head, {"role": "user", "content": text}], renderer=renderer)


def _run(loaded: Loaded, ids: list[int], config: GenerateConfig, *, shown: str, prompt: str, json: bool) -> int:
    """Generate and render; shown: what stands on stdout before the continuation."""
    from llamakit.inference.completion import generate as continue_prompt
    from llamakit.inference.continuation import Done

    config = _for_file(loaded, ids, config)
    _remarks(loaded, config)
    tokens: list[Token] = []
    pieces: list[str] = []
    done: Done | None = None
    reports = continue_prompt(loaded.engine, loaded.tokenizer, ids, config)
    if shown and not json:
        render.stream(shown)
    try:
        for report in reports:
            if isinstance(report, Done):
                done = report
            else:
                tokens.append(report)
            pieces.append(report.text)
            if not json:
                render.stream(report.text)
    except KeyboardInterrupt:
        pass  # what there is so far counts
    if json:
        logprobs = config.logprobs is not None
        render.print_json(_as_json(loaded, prompt, ids, tokens, "".join(pieces), done, logprobs=logprobs))
    else:
        render.stream("\n")
        if config.logprobs is not None:
            view.log_logprobs(loaded.tokenizer, tokens)
        _timings(loaded, done, config)
    structure.note_cut(config, done)
    return EXIT_INTERRUPTED if done is None else EXIT_OK


def _for_file(loaded: Loaded, ids: list[int], config: GenerateConfig) -> GenerateConfig:
    """run.c's rule for its own models: -n counts steps, so that the prompt's tokens after BOS count too."""
    if not loaded.is_llama2c or config.n_predict < 0:
        return config
    return replace(config, n_predict=max(0, config.n_predict - (len(ids) - 1)))


def _remarks(loaded: Loaded, config: GenerateConfig) -> None:
    n_ctx = loaded.engine.config.n_ctx
    if config.ctx > n_ctx:
        render.warn(f"--ctx {config.ctx} is more than the {n_ctx} tokens that the model was trained for")
    for warning in loaded.tokenizer.warnings:
        render.note(f"{loaded.file.path}: {warning}")


def _timings(loaded: Loaded, done: Done | None, config: GenerateConfig) -> None:
    render.log(f"load: {loaded.load_s:.2f} s")
    if done is None:
        render.note("interrupted")
        return
    render.log(f"prompt: {done.n_prompt} tokens in {done.prefill_s:.2f} s, {done.prefill_tok_per_s:.1f} tok/s")
    render.log(f"generation: {done.n_generated} tokens in {done.decode_s:.2f} s, {done.decode_tok_per_s:.1f} tok/s")
    ending = structure.ending(config, done) or view.ending(done)
    render.log(f"ended by {ending}" + (f", seed {done.seed}" if config.temperature > 0 else ""))


def _as_json(
    loaded: Loaded, prompt: str, ids: list[int], tokens: list[Token], text: str, done: Done | None, *, logprobs: bool
) -> dict[str, Any]:
    """What `--json` prints; an interrupted generation has no timings."""
    value: dict[str, Any] = {"model": str(loaded.file.path), "prompt": prompt, "prompt_tokens": ids}
    value |= view.continuation_json(loaded.tokenizer, tokens, text, done, logprobs=logprobs)
    value["load_s"] = loaded.load_s
    if done:
        value |= {
            "prefill_s": done.prefill_s,
            "decode_s": done.decode_s,
            "prefill_tok_per_s": done.prefill_tok_per_s,
            "decode_tok_per_s": done.decode_tok_per_s,
        }
    return value
