"""What a Hugging Face folder says about special tokens and chat templates, as GGUF keys.

Several files have a say: tokenizer.json's post-processor, tokenizer_config.json, config.json, and files of templates.
Who wins, and in which order the keys come, is as in gguf-py's SpecialVocab (gguf/vocab.py), which
convert_hf_to_gguf.py uses: the GGUF files that people have were made so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamakit.errors import FormatError
from llamakit.files import escape_control, read_text
from llamakit.formats.folder import member
from llamakit.formats.strict_json import read_object
from llamakit.formats.tokenizer_json import AddedToken, added_tokens

#: kinds of special tokens -> their GGUF key, None where there is none
SPECIAL_KEYS: dict[str, str | None] = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "cls": None,
    "mask": "mask_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
}
USUAL_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_ADDED_KINDS = ("bos", "eos", "sep")
_MAX_TEMPLATES = 64
#: spellings of control tokens that some folders do not mark as special: whole, or by how they begin and end
_LOOKS_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_LOOKS_SPECIAL_AROUND = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


def looks_special(token: str) -> bool:
    """Whether a token that nothing marks as special is one for convert_hf_to_gguf.py, by its spelling."""
    return token in _LOOKS_SPECIAL or any(token.startswith(a) and token.endswith(b) for a, b in _LOOKS_SPECIAL_AROUND)


@dataclass(frozen=True)
class HuggingFaceFiles:
    """The JSON objects of a folder, None for those that are absent."""

    directory: Path
    tokenizer: Mapping[str, Any] | None
    tokenizer_config: Mapping[str, Any] | None
    config: Mapping[str, Any] | None

    @classmethod
    def read(cls, directory: Path) -> HuggingFaceFiles:
        """Read what is there. Raises UsageError or FormatError for a file that is there and cannot be read."""
        names = ("tokenizer.json", "tokenizer_config.json", "config.json")
        return cls(directory, *(optional_object(directory, name) for name in names))

    def path(self, name: str) -> Path:
        """Where a file of the folder is."""
        return self.directory / name


def optional_object(directory: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of a folder, None where there is no such file."""
    path = member(directory, name)
    return read_object(path) if path.is_file() else None


@dataclass
class _Special:
    """What was found so far. kinds: the special tokens that are asked for, in order."""

    kinds: list[str]
    config: dict[str, Any] | None
    ids: dict[str, int] = field(default_factory=dict)
    add: dict[str, bool] = field(default_factory=dict)

    def named(self, kind: str) -> Any:
        return None if self.config is None else self.config.get(f"{kind}_token")

    def name(self, kind: str, token: Any) -> None:
        assert self.config is not None
        self.config[f"{kind}_token"] = token


def special_metadata(
    files: HuggingFaceFiles, n_vocab: int | None, kinds: Sequence[str] = USUAL_KINDS
) -> dict[str, Any]:
    """Keys for special tokens, for whether BOS and EOS are added, and for chat templates.

    n_vocab: ids from there on are skipped. kinds: which special tokens to ask for. Raises FormatError for what
    cannot be, naming the file.
    """
    config = None if files.tokenizer_config is None else dict(files.tokenizer_config)
    special = _Special(list(kinds), config)
    added: list[AddedToken] = []
    if files.tokenizer is not None:
        added = added_tokens(files.tokenizer, files.path("tokenizer.json"))
        _read_post_processor(files.tokenizer, special)
    found: dict[str, Any] = {}
    if special.config is not None:
        _read_tokenizer_config(special, added, files, n_vocab)
        found = template_metadata(files)
    _read_config(special, files, n_vocab)
    ids = {f"tokenizer.ggml.{SPECIAL_KEYS[k]}": id for k, id in special.ids.items() if SPECIAL_KEYS.get(k)}
    adds = {f"tokenizer.ggml.add_{k}_token": value for k, value in special.add.items() if k in _ADDED_KINDS}
    return {**ids, **adds, **found}


def _read_tokenizer_config(
    special: _Special, added: Sequence[AddedToken], files: HuggingFaceFiles, n_vocab: int | None
) -> None:
    for kind in special.kinds:
        flag = (special.config or {}).get(f"add_{kind}_token")
        if isinstance(flag, bool):
            special.add.setdefault(kind, flag)
        token = content_of(special.named(kind))
        id = next((a.id for a in added if a.content == token), None)
        _set(special, kind, id, files.path("tokenizer_config.json"), n_vocab)


def _read_config(special: _Special, files: HuggingFaceFiles, n_vocab: int | None) -> None:
    config = files.config or {}
    inner = config.get("text_config")
    for kind in special.kinds:
        id = config.get(f"{kind}_token_id")
        if id is None and isinstance(inner, Mapping):
            id = inner.get(f"{kind}_token_id")
        _set(special, kind, id, files.path("config.json"), n_vocab)


def _set(special: _Special, kind: str, id: Any, path: Path, n_vocab: int | None) -> None:
    if type(id) is not int:
        return
    if not 0 <= id < 1 << 32:
        raise FormatError(f"the {kind} token has the id {str(id)[:40]}, which cannot be", path=path)
    if n_vocab is None or id < n_vocab:
        special.ids.setdefault(kind, id)


def content_of(token: Any) -> str | None:
    """The spelling of a token as tokenizer_config.json names it: a text, or an object with a "content"."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_post_processor(tokenizer: Mapping[str, Any], special: _Special) -> None:
    """Whether BOS and EOS are put around a text, and which tokens they are where nothing names them."""
    for kind, other in (("bos", "cls"), ("eos", "sep")):
        if special.config and not special.named(kind) and special.named(other):
            special.name(kind, special.named(other))
    post_processor = tokenizer.get("post_processor")
    if not isinstance(post_processor, Mapping):
        return
    processors = post_processor.get("processors", [post_processor])
    for processor in processors if isinstance(processors, list) else ():
        kind = processor.get("type") if isinstance(processor, Mapping) else None
        if kind == "ByteLevel":
            special.add.setdefault("bos", False)
            special.add.setdefault("eos", False)
        elif kind == "RobertaProcessing":
            special.add.update(bos=True, eos=True, sep=True)
            for ours, theirs in (("cls", "bos"), ("sep", "eos")):
                entry = processor.get(ours)
                if special.config and not special.named(ours):
                    special.name(ours, entry[0] if isinstance(entry, list) and entry else special.named(theirs))
        elif kind == "TemplateProcessing":
            _read_template_processing(processor, special)


def _read_template_processing(processor: Mapping[str, Any], special: _Special) -> None:
    """A template of what stands around one text ("single") and around two ("pair")."""
    single, pair = _items(processor.get("single")), _items(processor.get("pair"))
    first = last = None
    bos, eos = special.named("bos"), special.named("eos")
    if len(single) > 1:
        first, last = _id(single[0], "SpecialToken"), _id(single[-1], "SpecialToken")
    if first:
        if not special.config:
            bos = first
        elif first not in (bos, special.named("cls")):
            if not bos:
                special.name("bos", bos := first)
            if not special.named("cls"):
                special.name("cls", first)
        special.add["bos"] = first in (bos, special.named("cls"))
    if last:
        if special.config and last != eos:
            spare = next((kind for kind in ("eot", "eom") if kind not in special.kinds), None)
            if spare is not None:
                special.kinds.append(spare)
                special.name(spare, eos)
            special.name("eos", last)
        special.add["eos"] = True
        eos = last
    _read_pair(pair, first, last, eos, special)


def _read_pair(pair: list[Any], first: str | None, last: str | None, eos: Any, special: _Special) -> None:
    """Whether something separates two texts: only the plain form, A ... B, says so."""
    start = 1 if pair and first and _id(pair[0], "SpecialToken") == first else 0
    stop = len(pair) - 1 if pair and last and _id(pair[-1], "SpecialToken") == last else len(pair)
    pair = pair[start:stop]
    if len(pair) < 3 or (_id(pair[0], "Sequence"), _id(pair[-1], "Sequence")) != ("A", "B"):
        return
    separators = (special.named("sep"), eos)
    middle = [_id(item, "SpecialToken") for item in pair[1:-1]]
    adds = bool(middle[0]) and middle[0] in separators and not last
    if len(middle) == 2 and middle[1]:
        adds = adds or middle[1] in separators
    special.add["sep"] = adds
    if adds and not special.named("sep") and special.config:
        special.name("sep", eos)


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _id(item: Any, kind: str) -> str | None:
    entry = item.get(kind) if isinstance(item, Mapping) else None
    id = entry.get("id") if isinstance(entry, Mapping) else None
    return id if isinstance(id, str) else None


def template_metadata(files: HuggingFaceFiles) -> dict[str, Any]:
    """The chat template, and those of other names: in tokenizer_config.json, or in files of their own."""
    config = files.tokenizer_config or {}
    templates = config["chat_template"] if "chat_template" in config else _template_files(files.directory)
    if isinstance(templates, str):
        return {"tokenizer.chat_template": templates}
    named: dict[str, str] = {}
    for name, template in _named_templates(templates, files.path("tokenizer_config.json")):
        safe = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
        if safe:
            named[safe] = template
    default = named.pop("default", None)
    found: dict[str, Any] = {f"tokenizer.chat_template.{name}": template for name, template in named.items()}
    if named:
        found["tokenizer.chat_templates"] = list(named)
    if default is not None:
        found["tokenizer.chat_template"] = default
    return found


def _named_templates(templates: Any, path: Path) -> Iterator[tuple[str, str]]:
    for i, choice in enumerate(templates if isinstance(templates, list) else ()):
        name = choice.get("name") if isinstance(choice, Mapping) else None
        template = choice.get("template") if isinstance(choice, Mapping) else None
        if i >= _MAX_TEMPLATES or not isinstance(name, str) or not isinstance(template, str):
            raise FormatError(f"chat_template[{i}] is no template with a name", path=path)
        yield name, template


def _template_files(directory: Path) -> Any:
    jinja = member(directory, "chat_template.jinja")
    if jinja.is_file():
        others = directory / "additional_chat_templates"
        paths = sorted(others.glob("*.jinja")) if others.is_dir() else []
        if not paths:
            return _template(jinja)
        named = [{"name": path.stem, "template": _template(member(others, path.name))} for path in paths]
        return [{"name": "default", "template": _template(jinja)}, *named]
    found = optional_object(directory, "chat_template.json")
    return None if found is None else found.get("chat_template")


def _template(path: Path) -> str:
    if path.stat().st_size > 1 << 24:
        raise FormatError(f"{escape_control(path.name)} is too large for a chat template", path=path)
    return read_text(path)
