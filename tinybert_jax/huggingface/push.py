"""Sends a model folder to the Hugging Face hub, as one commit."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from tinybert_jax.huggingface.untrusted import CONFIG, check_folder
from tinybert_jax.report.card import card_metadata
from tinybert_jax.report.tables import format_si

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_CARD = "README.md"
_SUFFIXES = (".json", ".safetensors", ".txt", ".md", ".model")
_WEIGHTS = re.compile(r"model[^/]*\.safetensors(\.index\.json)?")


class Plan(NamedTuple):
    """What is sent: the files by their path in the repository."""

    name: str  # owner/name
    files: dict[str, Path]
    left_out: list[str]
    is_public: bool
    license: str = ""  # that README.md names

    def describe(self) -> str:
        sizes = {path: float(file.stat().st_size) for path, file in self.files.items()}
        kind = "public" if self.is_public else "private"
        lines = [
            f"{len(sizes)} files, {format_si(sum(sizes.values()), 'B')}, in one commit to the "
            f"{kind} repository {self.name}:",
            *(f"  {path}  {format_si(size, 'B')}" for path, size in sizes.items()),
        ]
        named = f"{self.license}, by {_CARD}; check that it fits your data"
        lines.append(f"license: {named if self.license else f'none that {_CARD} names'}")
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        return "\n".join(lines)


def make_plan(folder: str | Path, name: str, *, is_public: bool = False) -> Plan:
    """Looks at the folder; raises ValueError for what is no model folder or no owner/name."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            f"{name!r}: expected a repository as owner/name, of letters, digits, -, _ "
            "and .; correct it"
        )
    root = Path(os.path.expanduser(folder))
    if not (root / CONFIG).is_file() or not any(root.glob("model*.safetensors")):
        inner = sorted(p.parent.name for p in root.glob(f"*/{CONFIG}")) if root.is_dir() else []
        has = f" with folders in it: {', '.join(inner)}; push one of them" if inner else ""
        raise ValueError(
            f"{root}: expected a model folder ({CONFIG} and model.safetensors), got none{has}"
        )
    check_folder(root)
    files, left_out = {}, []
    for file in sorted(root.rglob("*")):
        path = file.relative_to(root)
        if not file.is_file():
            continue
        is_wanted = file.suffix in _SUFFIXES and len(path.parts) <= 2
        if is_wanted and not any(part.startswith(".") for part in path.parts):
            files[str(path)] = file
        else:
            left_out.append(str(path))
    card = files[_CARD].read_text("utf-8", "replace") if _CARD in files else ""
    return Plan(name, files, left_out, is_public, card_metadata(card).get("license", ""))


def push(plan: Plan, message: str) -> str:
    """Creates the repository where there is none, and commits; returns what was done, in a line.

    Weights of other names that an earlier commit left are removed in the same commit. Raises
    ValueError where a private commit would go to a public repository, and where the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    hub = HfApi()
    try:
        there = _files_there(hub, plan)
        if there is None:
            hub.create_repo(plan.name, private=not plan.is_public)
        stale = [path for path in there or () if _WEIGHTS.fullmatch(path)]
        stale = [path for path in stale if path not in plan.files]
        operations = [CommitOperationAdd(path, str(file)) for path, file in plan.files.items()]
        operations += [CommitOperationDelete(path) for path in stale]
        commit = hub.create_commit(plan.name, operations, commit_message=message)
    except Exception as error:  # the hub client raises many kinds of errors
        raise _explained(error, plan.name) from error
    removed = f", {', '.join(stale)} removed" if stale else ""
    return f"pushed {len(plan.files)} files{removed}: {commit.commit_url}"


def _files_there(hub: Any, plan: Plan) -> list[str] | None:
    """The files of the repository; None where there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = hub.model_info(plan.name)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:  # so the hub answers without a token too
            raise
        return None
    if not (info.private or plan.is_public):
        raise ValueError(
            f"{plan.name}: expected a private repository, got a public one, where everybody could "
            "read the model; give --public, or choose another name"
        )
    return [file.rfilename for file in info.siblings or ()]


def _explained(error: Exception, name: str) -> ValueError:
    if isinstance(error, ValueError) and str(error).startswith(f"{name}: expected"):
        return error
    status = getattr(getattr(error, "response", None), "status_code", None)
    fix = {
        401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
        403: "take a token that may write there, or another owner",
    }.get(status or 0, "check the network, and run the command again")
    told = " ".join(str(error).split())[:300] or type(error).__name__
    return ValueError(f"{name}: the hub did not take the model ({told}); {fix}")
