"""The sampling options of `generate`, with llama.cpp's names, and what they become in its configuration."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import typer

from llamakit.cli.options import SAMPLING
from llamakit.errors import UsageError
from llamakit.files import process_escapes
from llamakit.inference.sampler_names import SAMPLERS, parse_letters


def _option(flag: str, text: str) -> typer.models.OptionInfo:
    return typer.Option(flag, help=text, rich_help_panel=SAMPLING)


PresencePenaltyOption = Annotated[float, _option("--presence-penalty", "Off the logit of recent tokens; 0: off.")]
FrequencyPenaltyOption = Annotated[
    float, _option("--frequency-penalty", "Off the logit of recent tokens for each time; 0: off.")
]
DryMultiplierOption = Annotated[float, _option("--dry-multiplier", "DRY: penalty of repeated sequences; 0: off.")]
DryBaseOption = Annotated[float, _option("--dry-base", "DRY: growth of the penalty with each token.")]
DryAllowedLengthOption = Annotated[int, _option("--dry-allowed-length", "DRY: repetitions shorter than this are free.")]
DryLastNOption = Annotated[int, _option("--dry-penalty-last-n", "DRY: how many tokens are searched; 0: off.")]
DryBreakerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dry-sequence-breaker",
        metavar="TEXT",
        help=r'DRY: a repetition ends here; repeatable, none: nowhere.  [default: "\n" ":" "\"" "*"]',
        rich_help_panel=SAMPLING,
        show_default=False,
    ),
]
TopNSigmaOption = Annotated[
    float, _option("--top-nsigma", "Drop below this many deviations under the likeliest; 0 or less: off.")
]
TypicalOption = Annotated[float, _option("--typical", "Sample among the most typical that reach this; 1: off.")]
XtcProbabilityOption = Annotated[
    float, _option("--xtc-probability", "XTC: how often the likely tokens are dropped; 0: off.")
]
XtcThresholdOption = Annotated[float, _option("--xtc-threshold", "XTC: what counts as likely; above 0.5: off.")]
DynatempRangeOption = Annotated[float, _option("--dynatemp-range", "Range of the dynamic temperature; 0: off.")]
DynatempExpOption = Annotated[float, _option("--dynatemp-exp", "Exponent of the dynamic temperature.")]
MirostatOption = Annotated[int, _option("--mirostat", "Mirostat, version 1 or 2, in place of the samplers; 0: off.")]
MirostatLrOption = Annotated[float, _option("--mirostat-lr", "Mirostat: learning rate.")]
MirostatEntOption = Annotated[float, _option("--mirostat-ent", "Mirostat: surprise to aim at, in bits.")]
AdaptiveTargetOption = Annotated[
    float, _option("--adaptive-target", "adaptive_p: probability of the tokens to prefer; below 0: off.")
]
AdaptiveDecayOption = Annotated[float, _option("--adaptive-decay", "adaptive_p: how much it remembers, 0 to 0.99.")]
SamplersOption = Annotated[str, _option("--samplers", "The samplers in their order, with ; between them.")]
SamplingSeqOption = Annotated[
    str | None,
    typer.Option(
        "--sampling-seq",
        metavar="LETTERS",
        help=f"The samplers as letters: {', '.join(f'{letter} {name}' for name, letter in SAMPLERS.items())}.",
        rich_help_panel=SAMPLING,
        show_default=False,
    ),
]
LogitBiasOption = Annotated[
    list[str] | None,
    typer.Option(
        "--logit-bias",
        metavar="ID(+/-)BIAS",
        help="Add to the logit of a token, 15043+1 or 15043-inf; repeatable.",
        rich_help_panel=SAMPLING,
    ),
]
IgnoreEosOption = Annotated[bool, _option("--ignore-eos", "Go on after an end token: never draw one.")]
RngOption = Annotated[
    Literal["llama.cpp", "llama2c"],
    _option("--rng", "Whose random numbers and samplers; llama2c: those of run.c, -t and --top-p alone."),
]

_BIAS = re.compile(r"\s*(\d{1,10})\s*([+-])\s*(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+|inf)\s*")


def given(context: typer.Context) -> set[str]:
    """The options that stand on the command line or in --config, by their fields in the configuration."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    names = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    return names | ({"samplers"} if "sampling_seq" in names else set())


def sampler_order(samplers: str, letters: str | None) -> str:
    """--samplers, or --sampling-seq where that is given. Raises UsageError for an unknown letter."""
    return samplers if letters is None else ";".join(parse_letters(letters))


def logit_biases(items: list[str] | None) -> tuple[tuple[int, float], ...]:
    """15043+1.5 -> (15043, 1.5). Raises UsageError for what is none."""
    biases = []
    for item in items or ():
        match = _BIAS.fullmatch(item)
        if match is None:
            raise UsageError(f"--logit-bias is {item!r} (expected TOKEN+BIAS or TOKEN-BIAS, such as 15043-1.5)")
        biases.append((int(match[1]), float(match[2] + match[3])))
    return tuple(biases)


def sequence_breakers(given: list[str] | None, default: tuple[str, ...], *, escape: bool) -> tuple[str, ...]:
    """The texts given, without those before a `none`, or else the default ones; escape: process escapes in them.

    Raises UsageError for an empty one.
    """
    if given is None:
        return default
    if "none" in given:
        given = given[len(given) - given[::-1].index("none") :]
    if "" in given:
        raise UsageError("--dry-sequence-breaker is empty (expected a text, or none)")
    return tuple(process_escapes(text) if escape else text for text in given)
