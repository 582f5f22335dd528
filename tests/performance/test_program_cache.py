import subprocess
import sys

import jax
import pytest

from tinybert_jax.performance.program_cache import Compilation, keep_programs

COMPILES = """
import jax, jax.numpy as jnp
from tinybert_jax.performance.program_cache import keep_programs, watched_compilation
print(keep_programs("cpu"))
with watched_compilation() as found:
    jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((8, 8))).compile()
print(0 < found.num_asked == found.num_kept, found.seconds > 0)
"""


@pytest.fixture
def settings():
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    held = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in held.items():
        jax.config.update(name, value)


def test_programs_are_kept_on_accelerators_alone(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    assert keep_programs("cpu") is None
    assert keep_programs("gpu") == str(tmp_path / "tinybert_jax" / "programs")


def test_a_folder_that_cannot_be_made_keeps_none(settings, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    jax.config.update("jax_compilation_cache_dir", None)
    assert keep_programs("gpu") is None
    assert "compiled programs are not kept" in capsys.readouterr().out


def test_the_settings_of_jax_come_first(settings, monkeypatch, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert keep_programs("tpu") == keep_programs("cpu") == str(tmp_path)
    jax.config.update("jax_enable_compilation_cache", False)
    assert keep_programs("tpu") is None


def test_a_program_of_an_earlier_process_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    told = [
        subprocess.run(
            [sys.executable, "-c", COMPILES], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert told == [[str(tmp_path), number, "True"] for number in ("False", "True")]


def test_only_long_compilations_are_worth_a_line():
    found = Compilation()
    assert found.describe() is None
    found.seconds = 61.2
    assert found.describe() == "compiled in 61 s"
    found.num_asked, found.num_kept = 2, 1
    assert found.describe() == "compiled in 61 s"
    found.num_kept = 2
    assert found.describe() == "read in 61 s, as an earlier run has compiled it"
