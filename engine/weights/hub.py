"""Checkpoints named by a hub id: the folder in huggingface_hub's cache, fetched only when asked to."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from ..errors import CheckpointError
from .files import choose


def snapshot(repo: str, variant: str | None, download: bool) -> Path:
    """Local folder of the hub id `org/name`; with `download`, fetch the files that will be read first.

    Raises CheckpointError if it is not in the cache and `download` is False, or if it cannot be fetched.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        if not download:
            return Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
        patterns = _wanted(repo, huggingface_hub.HfApi().list_repo_files(repo), variant)
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo} is neither a folder here nor in the local cache of huggingface_hub: check the path, or fetch it "
            "with --download (download=True)"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # boundary: without a network it is an error of whichever HTTP library is used
        raise CheckpointError(f"{repo} could not be fetched: {error}") from error


def _wanted(repo: str, files: list[str], variant: str | None) -> list[str]:
    """Of a repository's files: configurations, tokenizers and, for every folder, the weights `choose` would take."""
    folders: defaultdict[str, list[str]] = defaultdict(list)
    for file in files:
        folder, _, name = file.rpartition("/")
        folders[folder].append(name)
    if "model_index.json" in folders[""]:
        folders[""] = ["model_index.json"]  # other files there are whole-model checkpoints of other programs
    wanted: list[str] = []
    for folder, names in folders.items():
        prefix = f"{folder}/" if folder else ""
        wanted += [prefix + name for name in names if name.endswith((".json", ".txt", ".model"))]
        if any(name.endswith(".safetensors") for name in names):
            choice = choose(f"{repo}/{folder}", names, variant)
            shards = [name for name in names if choice.index and name.endswith(".safetensors") and "-of-" in name]
            wanted += [prefix + name for name in (*choice.files, *shards)]
    return wanted
