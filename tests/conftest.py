"""Eight host devices, strict ranks, signatures checked at run time, no network."""

import gc
import os

# Compiling takes most of the time of a test with tiny models: these flags make it 4 times as fast.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

from jaxtyping import install_import_hook

install_import_hook("tinybert_jax", "beartype.beartype")

import hypothesis
import jax
import pytest
from bad_world import models, world  # noqa: F401
from jax.experimental.compilation_cache import compilation_cache

from tinybert_jax.parallel.mesh import make_mesh
from tinybert_jax.runs import preflight

jax.config.update("jax_numpy_rank_promotion", "raise")

# Few examples, always the same; a first example may take long, as it compiles.
hypothesis.settings.register_profile("tests", max_examples=30, deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The rooms with the longest files first, so that two workers end at about the same time.
    items.sort(key=lambda item: item.path.parent.name not in ("recipes", "training", "tasks"))
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_a_file_end_with_it():
    """Compiled programs would fill gigabytes over a run of all tests."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module")
def cheap_programs(tmp_path_factory):
    """For runs of tiny models, which have programs in common, also with those of other files.

    The programs are kept on disk, and are of one device, not of eight.
    """
    root = tmp_path_factory.getbasetemp()
    cache = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "programs"
    patch = pytest.MonkeyPatch()
    patch.setattr(
        preflight,
        "make_mesh",
        lambda section, devices=None: make_mesh(section, devices or jax.devices()[:1]),
    )
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(cache), 0.0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    patch.undo()
