"""`tinybert doctor`: the facts of the machine, and advice that a run deserves."""

import json
import os
import subprocess
import sys

import jax
import pytest
import yaml

from tinybert_jax import __version__, cli
from tinybert_jax.runs import environment


def _write_run(folder, dtype, padding, **sections):
    compute = {"dtype": dtype, "unroll_layers": False}
    (folder / "config.yaml").write_text(yaml.safe_dump({"compute": compute, **sections}))
    rows = []
    for stage in sections:
        step = {"kind": "train", "stage": stage, "step": 50, "seconds": 5.0, "loss": 1.0}
        rows.append({**step, "padding_share": padding, "mfu": 0.31})
        rows.append({"kind": "stage", "stage": stage, "step": 0, "seconds": 9.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_machine(capsys, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"tinybert_jax  {__version__}\n" in out
    assert f"{jax.device_count()} × cpu" in out and f"jax {jax.__version__}" in out
    assert "FLOP/s (measured" in out
    assert "not kept from run to run" in out
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    assert cli.main(["doctor", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("| | |\n|---|---|\n| tinybert_jax | ")
    assert "JAX_COMPILATION_CACHE_DIR=/somewhere" in out


def test_advice_that_a_run_deserves(tmp_path, capsys):
    _write_run(tmp_path, "float32", 0.4, finetune={"batching": "bucket"}, baseline={})
    assert cli.main(["doctor", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "9 s, 5 s of them steps; 40% padding, 31% of the peak" in out
    for told in ("finetune.batching=pack", "unroll_layers=true", "baseline=null"):
        assert told in out


def test_advice_where_float8_products_gain_nothing(tmp_path, capsys, monkeypatch):
    _write_run(tmp_path, "bfloat16", 0.4, finetune={"batching": "pack"})
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["compute"]["teacher_dtype"] = "float8_products"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["doctor", str(tmp_path)]) == 0
    assert "float8_products is slower than bfloat16 on a cpu" in capsys.readouterr().out
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert "may gain nothing" in environment.float8_note("float8_products", "gpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
    assert environment.float8_note("float8_products", "gpu") == ""


def test_a_run_without_need_of_it_has_no_advice(tmp_path, capsys):
    _write_run(tmp_path, "bfloat16_products", 0.4, finetune={"batching": "pack"})
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["compute"]["unroll_layers"] = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["doctor", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for told in ("batching=pack", "unroll_layers", "baseline=null", "dtype=bfloat16_products:"):
        assert told not in out


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_folder_that_is_no_run(name, tmp_path, capsys):
    _write_run(tmp_path, "float32", 0.0, finetune={})
    (tmp_path / name).unlink()
    assert cli.main(["doctor", str(tmp_path)]) == 2
    assert f"got one without {name}" in capsys.readouterr().err


@pytest.mark.parametrize("platforms", ["cuda", "mars"])
def test_a_platform_that_is_not_here_is_one_line(platforms):
    done = subprocess.run(
        [sys.executable, "-m", "tinybert_jax", "doctor"],
        env={**os.environ, "JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
    )
    if platforms == "cuda" and done.returncode == 0:
        pytest.skip("a card is here")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"JAX_PLATFORMS={platforms}: expected devices of that platform" in done.stderr
