"""Copies the run folder to a URL (`run_store`), and fetches it where the folder is gone.

A copy holds the checkpoints, the models and the exported one, the teachers' logits, and the text
files of the run: everything that a run on another machine goes on from.
"""

import collections
import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tinybert_jax.config.stages import STAGE_NAMES
from tinybert_jax.performance import disk, host
from tinybert_jax.runs.run import IDENTITIES, INPUTS
from tinybert_jax.training import checkpoint
from tinybert_jax.training.generations import DamagedError, File, Generation, Generations
from tinybert_jax.training.manifest import read_manifest
from tinybert_jax.training.saver import reason, try_again

Say = Callable[[str], None]

# In this order, because a state is never newer than what it refers to: rows of metrics and best
# parameters; and a stage that has finished has its models.
_PARTS = (
    f"{IDENTITIES}/*.json",
    "checkpoints/*/last/*/",
    "checkpoints/*/best/*/",
    "checkpoints/*/*.json",
    "models/*/",
    "tokenizer/",
    "teacher_logits/*/*.safetensors",
    "teacher_text/*/*.json",
    "diverged/*/",
    "hf/",
    "*",
)
# What a run can do without, or makes again, and so is left out, as a whole, where it is damaged:
# the first part of its name, and of how many parts the name is.
_OPTIONAL = {"checkpoints": 4, "models": 2, "diverged": 2}
_OPTIONAL |= {"teacher_logits": 1, "teacher_text": 1, "hf": 1}
_RECORD = ".run_store.json"  # the manifests that this folder was copied to
# A generation is fetched to the first, which is renamed to the second when complete; when the files
# before it are removed, it is renamed to the third, whose content is then moved to the run folder.
_PARTIAL, _FETCHED, _MOVING = ".fetch-partial", ".fetched", ".moving"


class _Part(NamedTuple):
    """A folder or file that is copied, or left out, as a whole."""

    path: Path
    name: str  # below the run folder

    @property
    def is_optional(self) -> bool:
        return self.name.split("/")[0] in _OPTIONAL

    @property
    def is_checkpoint(self) -> bool:
        return self.name.startswith("checkpoints/") and self.path.is_dir()


class RunStore:
    """The copy of one run folder."""

    def __init__(self, generations: Generations, folder: Path, say: Say):
        self.generations, self.folder, self.say = generations, folder, say
        # By name: what tells that a file is the same as before, and its hash.
        self._seen: dict[str, tuple[tuple[int, ...], File]] = {}
        self._told: set[str] = set()

    def copy(self) -> None:
        """Copies what has changed since the last copy; checkpoints are not removed meanwhile."""
        there, files = self.generations.objects(), {}
        for part in _parts(self.folder):
            try:
                files |= self._copy_part(part, there)
            except FileNotFoundError:  # removed meanwhile: the next copy has what replaces it
                if not part.is_optional:
                    raise
            except ValueError as error:
                if not part.is_checkpoint:
                    raise
                if part.name not in self._told:
                    self._told.add(part.name)
                    self.say(f"run_store: {part.name} is damaged here and not copied: {error}")
        kept = self.generations.kept
        if not kept or kept[0].files != files:
            self.generations.commit(files, self._record)

    def _copy_part(self, part: _Part, there: set[File]) -> dict[str, File]:
        if part.path.is_file():
            return {part.name: self._copy_file(part.path, part.name, there, None)}
        hashes: Mapping[str, str] = {}
        found: dict[str, File] = {}
        try:
            with contextlib.ExitStack() as stack:
                if part.is_checkpoint:
                    stack.enter_context(checkpoint.pinned(part.path))
                    hashes = read_manifest(part.path)["files"]
                for path in sorted(p for p in part.path.rglob("*") if p.is_file()):
                    inner = str(path.relative_to(part.path))
                    name = f"{part.name}/{inner}"
                    found[name] = self._copy_file(path, name, there, hashes.get(inner))
        except FileNotFoundError:  # replaced meanwhile: a new file, an old hash
            for name in [name for name in self._seen if name.startswith(f"{part.name}/")]:
                del self._seen[name]
            raise
        return found

    def _copy_file(self, path: Path, name: str, there: set[File], sha256: str | None) -> File:
        """`sha256`: what the file should have; None: not known."""
        with path.open("rb") as opened:
            stat = os.fstat(opened.fileno())
            signature = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            seen = self._seen.get(name)
            if seen is not None and seen[0] == signature:
                file = seen[1]
            else:
                file = File(stat.st_size, sha256 or _sha256(opened, stat.st_size))
            if file not in there:
                opened.seek(0)
                self.generations.send(opened, file)
                there.add(file)
        self._seen[name] = signature, file
        return file

    def _record(self, name: str) -> None:
        names = [*_recorded(self.folder, self.generations.url)[-3:], name]
        content = {"url": self.generations.url, "generations": names}
        disk.replace_text(self.folder / _RECORD, json.dumps(content) + "\n")


def open_store(
    url: str, folder: Path, check_config: Callable[[Path], object], say: Say
) -> RunStore:
    """The store of a run folder, which is first fetched from it unless it has the newer state.

    `check_config(file)` raises ValueError for the config file of another run. Raises ValueError
    for a store of another run, and where no intact generation is there.
    """
    generations = _read(url, say)
    if generations.is_local and Path(generations.root).resolve().is_relative_to(folder):
        raise ValueError(f"run_store: expected a place outside of run_dir, got {url}")
    store = RunStore(generations, folder, say)
    for name in generations.damaged:
        say(f"run_store: generation {name[:8]} of {url} was not written to its end, or is damaged")
    is_moving = (folder / _FETCHED).exists() or (folder / _MOVING).exists()
    if not generations.kept and not is_moving:
        return store
    with host.locked_folder(folder, "run_dir"):
        _move_fetched(folder)
        newest = generations.kept[0] if generations.kept else None
        here = _names(folder)
        # The folder has what it was copied from, except for what a user has removed since.
        is_own = bool(here) and newest is not None and newest.name in _recorded(folder, url)
        if newest is not None and not is_own:
            _check_identity(store, newest, check_config)
            if _progress(newest.files) > _progress(here):
                _fetch_newest(store)
    return store


def _read(url: str, say: Say) -> Generations:
    try:
        return try_again(f"reading {url}", lambda: Generations(url), say)
    except OSError as error:
        raise _unreadable(url, error) from error


def _unreadable(url: str, error: OSError) -> OSError:
    return OSError(f"run_store: {url} cannot be read: {reason(error)}; repeat the command later")


def _check_identity(
    store: RunStore, newest: Generation, check_config: Callable[[Path], object]
) -> None:
    """Raises ValueError where the store holds a run of another config or of other inputs."""
    url = store.generations.url
    aside = store.folder / ".store-config-partial"
    if "config.yaml" not in newest.files:
        raise ValueError(f"run_store: expected the copy of a run, got others in {url}")
    try:
        _fetch_file(store, newest.files["config.yaml"], aside)
        check_config(aside)
        if not (store.folder / INPUTS).is_file() or INPUTS not in newest.files:
            return
        _fetch_file(store, newest.files[INPUTS], aside)
        there, here = (json.loads(file.read_text()) for file in (aside, store.folder / INPUTS))
    except DamagedError:
        return  # found again, and told, where the generation is fetched
    finally:
        aside.unlink(missing_ok=True)
    for kind in ("data", "models"):
        changed = [name for name in here[kind] if here[kind][name] != there[kind].get(name)]
        if changed:
            raise ValueError(
                f"run_store: {url} holds a run with other content of "
                f"{', '.join(changed[:3])} than {store.folder}; choose another run_store"
            )


def _fetch_newest(store: RunStore) -> None:
    """Replaces the run folder by the newest generation that is ahead of it and intact.

    What a run can repeat is left out where it is damaged, as in a local folder.
    """
    folder, url = store.folder, store.generations.url
    here, problems = _progress(_names(folder)), []
    for generation in store.generations.kept:
        shutil.rmtree(folder / _PARTIAL, ignore_errors=True)
        damage = _fetch(store, generation, folder / _PARTIAL)
        for name, text in damage.items():
            store.say(f"run_store: leaves {name} of generation {generation.number} out: {text}")
        lost = _missing(generation.files, damage)
        if lost:
            problems.append(f"{lost} of generation {generation.number}")
        elif _progress(_names(folder / _PARTIAL)) > here:
            num_bytes = sum(file.num_bytes for file in generation.files.values())
            disk.sync_tree(folder / _PARTIAL)
            (folder / _PARTIAL).rename(folder / _FETCHED)
            disk.sync(folder)
            _move_fetched(folder)
            store._record(generation.name)
            store.say(
                f"run_store: fetched generation {generation.number} of {url}, "
                f"{num_bytes / 1e6:,.1f} MB"
            )
            return
    shutil.rmtree(folder / _PARTIAL, ignore_errors=True)
    if not _names(folder):
        raise ValueError(
            f"run_store: expected an intact generation in {url}, got damage in "
            f"{' and in '.join(problems)}; put the objects back, or begin the run again with "
            "another run_store"
        )
    store.say(f"run_store: the newer generations of {url} are damaged; {folder} is used")


def _fetch(store: RunStore, generation: Generation, target: Path) -> dict[str, str]:
    """Writes a generation to a folder without its damaged parts, and returns their damage."""
    damage: dict[str, str] = {}
    for name, file in generation.files.items():
        part = _part_of(name)
        if part in damage:
            continue
        if not (target / name).resolve().is_relative_to(target.resolve()):
            raise ValueError(f"{store.generations.url}: {name!r} lies outside of a run folder")
        try:
            _fetch_file(store, file, target / name)
        except DamagedError as error:
            damage[part] = str(error)
    for part in damage:
        path = target / part
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return damage


def _fetch_file(store: RunStore, file: File, target: Path) -> None:
    generations = store.generations
    name = f"reading {generations.url}"
    try:
        try_again(name, lambda: generations.fetch(file, target), store.say)
    except OSError as error:
        raise _unreadable(generations.url, error) from error


def _missing(names: Collection[str], damage: Iterable[str]) -> str:
    """The first damaged part that a run cannot do without; "" where there is none.

    A stage that has not finished needs one of its states.
    """
    finished = {Path(name).stem for name in names if name.startswith(f"{IDENTITIES}/")}
    states: dict[str, set[str]] = {}
    for part in map(_part_of, names):
        if part.startswith("checkpoints/") and part.split("/")[2] == "last":
            states.setdefault(str(Path(part).parent), set()).add(part)
    lost = [part for part in damage if part.split("/")[0] not in _OPTIONAL]
    lost += [f for f, own in states.items() if own <= {*damage} and f.split("/")[1] not in finished]
    return min(lost, default="")


def _move_fetched(folder: Path) -> None:
    """Replaces the content of the folder by what is fetched; goes on where a kill ended it."""
    if (folder / _FETCHED).exists():
        for path in [path for path in folder.iterdir() if not path.name.startswith(".")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / _FETCHED).rename(folder / _MOVING)
        disk.sync(folder)
    if (folder / _MOVING).exists():
        for path in (folder / _MOVING).iterdir():
            path.rename(folder / path.name)
        disk.sync(folder)
        (folder / _MOVING).rmdir()


def _parts(folder: Path) -> Iterator[_Part]:
    for pattern in _PARTS:
        for path in sorted(folder.glob(pattern)):
            is_whole = not path.name.startswith(".")
            if path.parent.name in ("last", "best"):
                is_whole = path.name.isdigit()
            if is_whole and path.is_file() == (not pattern.endswith("/")):
                yield _Part(path, str(path.relative_to(folder)))


def _names(folder: Path) -> list[str]:
    return [part.name for part in _parts(folder)]


def _progress(names: Iterable[str]) -> list[tuple[bool, int]]:
    """(is finished, step of the newest state; 0 if finished) by stage; [] without any file."""
    found = [name.split("/") for name in names]

    def of_stage(stage: str) -> tuple[bool, int]:
        states = [int(own[3]) for own in found if own[:3] == ["checkpoints", stage, "last"]]
        has_model = any(own[0] == "models" and own[1].startswith(stage) for own in found)
        is_done = has_model and [IDENTITIES, f"{stage}.json"] in found
        return is_done, 0 if is_done else max(states, default=0)  # no state of it is needed

    return [of_stage(stage) for stage in STAGE_NAMES] if found else []


def _recorded(folder: Path, url: str) -> list[str]:
    """The manifests of the store that hold earlier states of this folder, oldest first."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    return record["generations"] if record.get("url") == url else []


def _sha256(opened: BinaryIO, num_bytes: int) -> str:
    """That of the first bytes: rows may be appended meanwhile."""
    digest = hashlib.sha256()
    while num_bytes and (block := opened.read(min(2**20, num_bytes))):
        digest.update(block)
        num_bytes -= len(block)
    return digest.hexdigest()


def _part_of(name: str) -> str:
    """The name of the part that a file belongs to."""
    pieces = name.split("/")
    return "/".join(pieces[: _OPTIONAL.get(pieces[0])])


def describe(url: str) -> str:
    """A line for each part of the newest generation: its name and size."""
    newest, sizes = _written(url).kept[0], collections.Counter()
    for name, file in newest.files.items():
        sizes[_part_of(name)] += file.num_bytes
    lines = [f"{part:<40} {size / 1e6:>10,.1f} MB" for part, size in sizes.items()]
    total = f"generation {newest.number}, {len(newest.files)} files"
    return "\n".join([*lines, f"{total:<40} {sizes.total() / 1e6:>10,.1f} MB"])


def verify(url: str) -> tuple[str, bool]:
    """(a line for each part of all generations and the rate, whether all are intact)."""
    generations, start = _written(url), time.monotonic()
    damage: dict[str, str] = {}
    files = {(name, file) for own in generations.kept for name, file in own.files.items()}
    for name, file in sorted(files):
        damage.setdefault(_part_of(name), "")
        try:
            collections.deque(generations.read(file), maxlen=0)
        except DamagedError as error:
            damage[_part_of(name)] = f"{name}: {error}"
    num_bytes = sum(file.num_bytes for _, file in files)
    rate = num_bytes / max(time.monotonic() - start, 1e-9)
    lines = [f"{part:<40} {text or 'intact'}" for part, text in damage.items()]
    lines += [f"generation {name[:8]:<29} no intact manifest" for name in generations.damaged]
    lines.append(f"{num_bytes / 1e6:,.1f} MB at {rate / 1e6:,.0f} MB/s")
    return "\n".join(lines), not any(damage.values()) and not generations.damaged


def fetch(url: str, output: str) -> str:
    """Writes the newest intact generation to a new folder, which a run may go on with."""
    folder = Path(output).resolve()
    if folder.exists():
        raise ValueError(f"--output: expected a new folder, got {output}, which exists; remove it")
    generations = _written(url)
    with host.locked_folder(folder, "--output"):
        _fetch_newest(RunStore(generations, folder, print))
    return f"wrote {folder}"


def _written(url: str) -> Generations:
    generations = _read(url, print)
    if not generations.kept:
        raise ValueError(f"{url}: expected the run_store of a run, got a place without one")
    return generations
