"""Text to token ids and back, exactly as llama.cpp does it."""

from llamakit.tokenizer.base import Tokenizer, TokenStream
from llamakit.tokenizer.llama2c import load_llama2c_tokenizer
from llamakit.tokenizer.load import load_tokenizer

__all__ = ["TokenStream", "Tokenizer", "load_llama2c_tokenizer", "load_tokenizer"]
