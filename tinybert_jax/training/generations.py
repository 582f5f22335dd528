"""Generations of files at an fsspec URL, such as `gs://bucket/run`.

    objects/<SHA-256>                          the bytes of a file
    generations/<number>-<SHA-256>.json        a manifest: name, size and SHA-256 of every file

A manifest is written after all its objects, and a generation without an intact one does not exist.
An object is named by its hash: generations share objects, none is overwritten, and damage shows.
Imports fsspec late, which `datasets` brings along.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

_BLOCK = 2**24  # bytes that are sent at once
_KEPT = 2  # generations
_NAMES = {
    "objects": re.compile(r"[0-9a-f]{64}"),
    "generations": re.compile(r"\d{8}-[0-9a-f]{64}\.json"),
}
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}  # protocol -> extra of this package


class File(NamedTuple):
    num_bytes: int
    sha256: str


class Generation(NamedTuple):
    name: str  # of the manifest
    files: Mapping[str, File]

    @property
    def number(self) -> int:
        return int(self.name[:8])


class DamagedError(ValueError):
    """An object, or a file that is sent, whose bytes are not those of its hash."""


class Generations:
    """The generations at a URL. Everything raises OSError where the storage refuses.

    `kept`: those with an intact manifest, newest first; `damaged`: names of the other manifests.
    """

    def __init__(self, url: str):
        """Reads the manifests; raises ValueError for a URL that fsspec cannot open."""
        self.url = url
        self._files, self.root, self.is_local = _open(url)
        names = sorted(self._list("generations"), reverse=True)
        self._known = {*names}  # every manifest that this object has seen or written
        read = [self._read_manifest(name) for name in names]
        self.kept = [generation for generation in read if generation is not None]
        self.damaged = sorted(self._known - {generation.name for generation in self.kept})
        # Hashes of the objects that were sent whole.
        self._sent = {file.sha256 for generation in self.kept for file in generation.files.values()}

    def objects(self) -> set[File]:
        """The objects that are there, with all their bytes."""
        found = self._list("objects").items()
        return {File(size, name) for name, size in found if name in self._sent}

    def send(self, source: BinaryIO, file: File) -> None:
        """Writes the first bytes of an open file as an object.

        Raises DamagedError where they do not have the hash.
        """
        digest, left = hashlib.sha256(), file.num_bytes
        with _refusals(), self._files.open(self._object(file), "wb", block_size=_BLOCK) as target:
            while block := source.read(min(_BLOCK, left)):
                digest.update(block)
                target.write(block)
                left -= len(block)
        if digest.hexdigest() != file.sha256:
            raise DamagedError("has other bytes than its hash says")
        self._sent.add(file.sha256)

    def commit(self, files: Mapping[str, File], announce: Callable[[str], None]) -> None:
        """Makes a generation of files whose objects are there, and removes the older ones.

        `announce(name)` is called before the manifest is written. Raises OSError where another run
        has written a generation meanwhile.
        """
        content = json.dumps({"files": {n: file._asdict() for n, file in files.items()}}).encode()
        number = max((int(name[:8]) for name in self._known), default=0) + 1
        name = f"{number:08d}-{hashlib.sha256(content).hexdigest()}.json"
        announce(name)
        self._refuse_others()
        self._known.add(name)  # a write that is refused may have been done nevertheless
        with _refusals(), self._files.open(self._path("generations", name), "wb") as target:
            target.write(content)
        try:
            self._refuse_others()
        except OSError:
            self._remove("generations", name)
            raise
        self.kept.insert(0, Generation(name, dict(files)))
        self._prune()

    def read(self, file: File) -> Iterator[bytes]:
        """The bytes of an object in blocks; raises DamagedError, at the end, where they differ."""
        digest = hashlib.sha256()
        try:
            with _refusals(tells_missing=True):
                opened = self._files.open(self._object(file), "rb", block_size=_BLOCK)
                with opened:
                    while block := opened.read(_BLOCK):
                        digest.update(block)
                        yield block
        except FileNotFoundError:
            raise DamagedError(f"objects/{file.sha256} is missing") from None
        if digest.hexdigest() != file.sha256:
            raise DamagedError(f"objects/{file.sha256} has other bytes than its name says")

    def fetch(self, file: File, target: Path) -> None:
        """Writes an object to a file; raises DamagedError."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as opened:
            for block in self.read(file):
                opened.write(block)

    def _prune(self) -> None:
        """Removes all but the newest generations, and the objects of none."""
        self.kept = self.kept[:_KEPT]
        names = {generation.name for generation in self.kept}
        wanted = {file.sha256 for own in self.kept for file in own.files.values()}
        for name in self._known - names:
            self._remove("generations", name)
        for name in self._list("objects").keys() - wanted:
            self._remove("objects", name)
        self._known, self._sent = names, wanted

    def _refuse_others(self) -> None:
        others = sorted(self._list("generations").keys() - self._known)
        if others:
            raise OSError(f"another run copies to it: it has written generation {others[0][:8]}")

    def _read_manifest(self, name: str) -> Generation | None:
        """None where the content is not that of the hash in the name."""
        with _refusals():
            content = self._files.cat_file(self._path("generations", name))
        if hashlib.sha256(content).hexdigest() != name[9:73]:
            return None
        return Generation(name, {n: File(**own) for n, own in json.loads(content)["files"].items()})

    def _list(self, folder: str) -> dict[str, int]:
        """Name -> size of what is in a folder; `find` would take a refusal for an empty folder."""
        try:
            with _refusals(tells_missing=True):
                self._files.invalidate_cache()
                found = self._files.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return {}
        sizes = {own["name"].rsplit("/", 1)[-1]: own["size"] for own in found}
        return {name: size for name, size in sizes.items() if _NAMES[folder].fullmatch(name)}

    def _remove(self, *parts: str) -> None:
        with contextlib.suppress(FileNotFoundError), _refusals(tells_missing=True):
            self._files.rm_file(self._path(*parts))

    def _object(self, file: File) -> str:
        return self._path("objects", file.sha256)

    def _path(self, *parts: str) -> str:
        return "/".join([self.root.rstrip("/"), *parts])


def _open(url: str) -> tuple[Any, str, bool]:
    """(file system, path in it, whether it is that of this machine)"""
    import fsspec

    protocol = fsspec.core.split_protocol(url)[0] or "file"
    is_local = protocol in ("file", "local")
    options = {"auto_mkdir": True} if is_local else {}
    try:
        return *fsspec.core.url_to_fs(url, use_listings_cache=False, **options), is_local
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        fix = f"pip install 'tinybert-jax[{extra}]'" if extra else f"install it ({error})"
        raise ValueError(f"{url}: the package for {protocol}:// is missing: {fix}") from error
    except ValueError as error:
        raise ValueError(f"{url}: expected a URL that fsspec opens, got: {error}") from error


@contextlib.contextmanager
def _refusals(*, tells_missing: bool = False) -> Iterator[None]:
    """Turns the exceptions that clients of object stores define into OSError.

    FileNotFoundError too, which is a refusal where something is written, as of a missing bucket.
    """
    try:
        yield
    except Exception as error:
        is_missing = isinstance(error, FileNotFoundError)
        if isinstance(error, OSError) and (tells_missing or not is_missing):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error
