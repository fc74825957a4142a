"""`hf:` sources: which files of a repository are meant, and how huggingface_hub brings them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamakit.errors import LlamakitError, UsageError
from llamakit.files import escape_control
from llamakit.hub.download import SPLIT, Download, OnProgress, disk_error, refused, split_parts

_TIMEOUT_S = 10
_HF = re.compile(r"(?://)?(datasets/)?([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/([^:]+)|:([\w.-]+))?")
# A folder that `open_model` reads: configuration, vocabulary, templates; the weights are chosen apart.
_FOLDER = re.compile(
    r"config\.json|generation_config\.json|tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|merges\.txt|chat_template\.(jinja|json)|additional_chat_templates/[\w.-]+\.jinja"
    r"|adapter_config\.json"
)
_SAFETENSORS = re.compile(r"(model(-\d+-of-\d+)?|adapter_model)\.safetensors|model\.safetensors\.index\.json")
_PICKLED = re.compile(r"(pytorch_model(-\d+-of-\d+)?|adapter_model)\.bin|pytorch_model\.bin\.index\.json")


@dataclass(frozen=True)
class _Repo:
    source: str
    id: str
    is_dataset: bool
    revision: str
    file: str | None
    quant: str | None

    @property
    def type(self) -> str:
        return "dataset" if self.is_dataset else "model"


def _parse(source: str) -> _Repo:
    found = _HF.fullmatch(source.removeprefix("hf:"))
    if found is None:
        raise UsageError(
            f"{escape_control(source)} is no repository (expected hf:user/repo[:QUANT] or hf:user/repo/FILE)"
        )
    dataset, repo, revision, file, quant = found.groups()
    if dataset and not file:
        raise UsageError("a data set needs a file", path=source, hint=f"for example hf:datasets/{repo}/train.txt")
    return _Repo(source, repo, bool(dataset), revision or "main", file, quant)


def _library() -> Any:
    """huggingface_hub, its own log silenced: what matters becomes an error of ours, and progress goes to the caller."""
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        hint = "pip install '.[hf]' in llamakit's folder, or pip install huggingface_hub"
        raise UsageError("hf: sources need the package huggingface_hub", hint=hint) from error
    huggingface_hub.utils.logging.set_verbosity(50)  # CRITICAL
    return huggingface_hub


def fetch_repository(source: str, offline: bool, progress: OnProgress) -> Path:
    """Bring what an `hf:` source means here; the path of its file or folder. Raises as `hub.fetch` does.

    The listing comes first, and is asked for once: where the network is down, that says so within seconds, before
    huggingface_hub begins to try again.
    """
    repo = _parse(source)
    library = _library()
    offline = offline or library.constants.HF_HUB_OFFLINE
    with _hub_errors(repo, library):
        listed = _cached_files(repo, library) if offline else _listed_files(repo, library)
        chosen = _choose(repo, listed)
        if offline:
            _require_cached(repo, chosen, listed)
        paths = [_download(repo, library, name, offline, progress) for name in chosen]
    if len(chosen) > 1 and not chosen[0].lower().endswith(".gguf"):
        return _common_folder(repo, chosen, paths)
    return paths[0]


def _listed_files(repo: _Repo, library: Any) -> list[str]:
    info = library.HfApi().repo_info(repo.id, revision=repo.revision, repo_type=repo.type, timeout=_TIMEOUT_S)
    return sorted(sibling.rfilename for sibling in info.siblings or ())


def _cached_files(repo: _Repo, library: Any) -> list[str]:
    """What the cache holds of a revision (layout: the Hub's documentation, "Understand caching")."""
    folder = Path(library.constants.HF_HUB_CACHE) / f"{repo.type}s--{repo.id.replace('/', '--')}"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        reference = folder / "refs" / repo.revision
        commit = reference.read_text(encoding="ascii").strip() if reference.is_file() else repo.revision
        snapshot = folder / "snapshots" / commit
        if snapshot.is_dir() and snapshot.resolve().is_relative_to(folder.resolve()):
            return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
    raise UsageError(
        f"{repo.id} (revision {repo.revision}) is not in the cache", path=repo.source, hint="run once without --offline"
    )


def _choose(repo: _Repo, files: Sequence[str]) -> list[str]:
    """The files of a repository that the source means, the one to open first."""
    if repo.file is not None:
        chosen = split_parts(repo.file)
    else:
        gguf = _choose_gguf(repo, files)
        chosen = split_parts(gguf) if gguf else _choose_folder(repo, files)
    for name in chosen:
        if name.startswith("/") or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise UsageError(f"the repository names a file outside itself: {escape_control(name)}", path=repo.source)
    return chosen


def _choose_gguf(repo: _Repo, files: Sequence[str]) -> str | None:
    models = [name for name in files if name.lower().endswith(".gguf") and _is_model_file(name)]
    for quant in [repo.quant] if repo.quant else ["Q4_K_M", "Q8_0"]:
        wanted = re.compile(re.escape(quant) + "[.-]", re.IGNORECASE)
        found = next((name for name in models if wanted.search(name)), None)
        if found:
            return found
    if repo.quant:
        there = ", ".join(escape_control(name) for name in models[:12]) or "none"
        raise UsageError(f"no GGUF file of {repo.id} is {repo.quant}", path=repo.source, hint=f"there are: {there}")
    return next(iter(models), None)


def _is_model_file(name: str) -> bool:
    """No projector or importance matrix, and of a split model the first part."""
    base = name.rpartition("/")[2].lower()
    split = SPLIT.fullmatch(name)
    return not any(word in base for word in ("mmproj", "imatrix")) and (split is None or int(split[2]) == 1)


def _choose_folder(repo: _Repo, files: Sequence[str]) -> list[str]:
    weights = [name for name in files if _SAFETENSORS.fullmatch(name)]
    weights = weights or [name for name in files if _PICKLED.fullmatch(name)]
    described = [name for name in files if name in ("config.json", "adapter_config.json")]
    if not weights or not described:
        hint = "name one of its files: hf:user/repo/FILE"
        raise UsageError(
            f"{repo.id} holds no GGUF file and no model in transformers' format", path=repo.source, hint=hint
        )
    return [*described, *(n for n in files if _FOLDER.fullmatch(n) and n not in described), *weights]


def _require_cached(repo: _Repo, chosen: Sequence[str], cached: Sequence[str]) -> None:
    """Raise UsageError naming the first file that the cache lacks, shards that others speak of included."""
    wanted = list(chosen)
    for name in chosen:
        split = SPLIT.fullmatch(name)
        if split and int(split[3]) <= 9999:
            wanted += [f"{split[1]}-{i:05d}-of-{split[3]}{split[4]}" for i in range(1, int(split[3]) + 1)]
    missing = next((name for name in wanted if name not in cached), None)
    if missing:
        reason = f"{escape_control(missing)} is not in the cache"
        raise UsageError(reason, path=repo.source, hint="run once without --offline")


def _download(repo: _Repo, library: Any, name: str, offline: bool, progress: OnProgress) -> Path:
    meter = _meter(library, escape_control(name), progress)
    options: dict[str, Any] = {"revision": repo.revision, "repo_type": repo.type, "local_files_only": offline}
    return Path(library.hf_hub_download(repo.id, name, tqdm_class=meter, **options))


def _meter(library: Any, name: str, progress: OnProgress) -> type:
    """A progress bar for huggingface_hub that draws nothing and reports.

    It is a tqdm because Xet's transfers use more of one than plain downloads do; they would open a second bar, for
    the bytes on the network, if this one did not take those too. It counts what is on the disk.
    """

    class Meter(library.utils.tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self.update(0)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            progress(Download(name, int(self.n), None if self.total is None else int(self.total)))

        def update_transfer(self, n: float) -> None:
            pass

        def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None:
            pass

    return Meter


def _common_folder(repo: _Repo, names: Sequence[str], paths: Sequence[Path]) -> Path:
    folders = {path.parents[name.count("/")] for name, path in zip(names, paths, strict=True)}
    if len(folders) > 1:
        raise LlamakitError("the repository changed during the download", path=repo.source, hint="run it once more")
    return folders.pop()


@contextlib.contextmanager
def _hub_errors(repo: _Repo, library: Any) -> Iterator[None]:
    """huggingface_hub's exceptions in our words; a URL or a token never enters a message."""
    errors = library.errors
    network: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # httpx's, whichever generation is installed
    login, place = "hf auth login, or set HF_TOKEN", repo.source
    try:
        yield
    except errors.GatedRepoError as error:
        hint = f"accept its terms on the page of {repo.id}, then: {login}"
        raise UsageError("the repository is gated: its owners ask for an agreement", path=place, hint=hint) from error
    except errors.RepositoryNotFoundError as error:
        hint = f"check the name; for a private one: {login}"
        raise UsageError("there is no such repository, or it is private", path=place, hint=hint) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"there is no revision {repo.revision}", path=place) from error
    except errors.RemoteEntryNotFoundError as error:
        raise UsageError(f"there is no such file in {repo.id}", path=place, hint="check the name") from error
    except errors.HFValidationError as error:
        raise UsageError("is no name of a repository", path=place) from error
    except errors.HfHubHTTPError as error:
        raise refused(error.response.status_code, place, login) from error
    except ValueError as error:  # over 50 GB without hf_xet, by huggingface_hub's own sentence
        reason = escape_control(str(error).strip().partition("\n")[0])[:200]
        raise LlamakitError(f"huggingface_hub refuses: {reason}", path=place, hint="pip install hf_xet") from error
    except (network, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        hint = "check the connection; --offline takes what the cache holds"
        raise LlamakitError("the Hub cannot be reached", path=place, hint=hint) from error
    except (OSError, RuntimeError) as error:  # without a number: a size that differs, or hf_xet's
        if isinstance(error, OSError) and error.errno:
            raise disk_error(error, place) from error
        wrong_size = str(error).startswith("Consistency check failed")
        reason = "its size is wrong" if wrong_size else type(error).__name__
        hint = "run it once more: whole files are kept"
        raise LlamakitError(f"the download failed: {reason}", path=place, hint=hint) from error
