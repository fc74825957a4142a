"""How a text is cut; free of heavy imports, for the command line's help."""

from __future__ import annotations

from dataclasses import dataclass


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
    """share of the tokens, the last ones, that is held out and evaluated; 0: none"""
