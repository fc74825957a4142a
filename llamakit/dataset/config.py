"""How a text is cut; free of heavy imports, for the command line's help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How a text becomes samples, and samples become rows of a batch."""

    ctx: int = 128
    """tokens per sequence"""
    sample_start: str = ""
    """each occurrence of this text starts a sample; empty: every token does"""
    include_sample_start: bool = False
    """the sample start is part of the sample"""
    escape: bool = False
    """process escapes such as \\n in the sample start"""
    overlapping_samples: bool = False
    """samples reach over the next sample start, up to ctx tokens"""
    fill_with_next_samples: bool = False
    """fill short samples with the next ones instead of end tokens"""
    separate_with_eos: bool = False
    """an EOS token between filled samples"""
    separate_with_bos: bool = True
    """a BOS token between filled samples"""
    sample_random_offsets: bool = False
    """start each sample at a random place"""
    val_split: float = 0.05
    """share of the data, a text's last tokens or any samples of a chat, that is held out and evaluated; 0: none"""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How questions and answers become samples, and samples become rows of a batch."""

    chat_template: str | None = None
    """template instead of the base's own: a name, or a file with Jinja"""
    train_on: Literal["all", "assistant", "last"] = "assistant"
    """which tokens have a loss: all, those of the answers, or those of the last answer"""
    long_samples: Literal["cut", "window"] = "cut"
    """samples that are longer than the context are cut, or become several"""
    pack: bool = True
    """several short samples share a row; else rows of like lengths share a batch"""
    on_error: Literal["stop", "skip"] = "stop"
    """a sample that cannot be used stops the run, or is left out and counted"""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What the doctor of training data looks at."""

    ctx: int = 0
    """tokens per sequence; 0: the model's"""
    chat_template: str | None = None
    """template instead of the base's own: a name, or a file with Jinja"""
    train_on: Literal["all", "assistant", "last"] = "assistant"
    """which tokens have a loss: all, those of the answers, or those of the last answer"""
    long_samples: Literal["cut", "window"] = "cut"
    """samples that are longer than the context are cut, or become several"""
