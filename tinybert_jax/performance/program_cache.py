"""Compiled programs that are kept from run to run."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.monitoring

_ASKED = "/jax/compilation_cache/compile_requests_use_cache"
_HIT = "/jax/compilation_cache/cache_hits"
_SHORTEST = 2.0  # seconds of compiling that are worth a line


def keep_programs(platform: str) -> str | None:
    """The folder that JAX keeps compiled programs in; None: they are not kept.

    JAX's own settings come first: JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE=false.
    Without them it is the user's cache folder on accelerators (`platform` gpu or tpu), whose
    programs take minutes to compile, and none on a CPU.
    """
    config: Any = jax.config  # its attributes are made at run time
    if not config.jax_enable_compilation_cache:
        return None
    if config.jax_compilation_cache_dir is None and platform != "cpu":
        base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        folder = os.path.join(base, "tinybert_jax", "programs")
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            print(f"compiled programs are not kept: {folder}: {error.strerror}", flush=True)
            return None
        config.update("jax_compilation_cache_dir", folder)
    return config.jax_compilation_cache_dir


def programs_folder() -> str | None:
    """The folder that programs are kept in now."""
    config: Any = jax.config
    return config.jax_compilation_cache_dir if config.jax_enable_compilation_cache else None


class Compilation:
    """How long a compilation took, and whether its programs were kept from an earlier run."""

    def __init__(self) -> None:
        self.seconds, self.num_asked, self.num_kept = 0.0, 0, 0

    def describe(self) -> str | None:
        """What to tell of it; None where it took next to no time."""
        if self.seconds < _SHORTEST:
            return None
        if 0 < self.num_asked == self.num_kept:
            return f"read in {self.seconds:.0f} s, as an earlier run has compiled it"
        return f"compiled in {self.seconds:.0f} s"


@contextlib.contextmanager
def watched_compilation() -> Iterator[Compilation]:
    """Yields the `Compilation` of what is compiled within."""
    found, start = Compilation(), time.monotonic()

    def count(event: str, **_: object) -> None:
        found.num_asked += event == _ASKED
        found.num_kept += event == _HIT

    jax.monitoring.register_event_listener(count)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(count)
        found.seconds = time.monotonic() - start
