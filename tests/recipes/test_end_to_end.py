"""The whole pipeline as a user runs it; then the same killed in every stage: the same bits."""

import json
import random
import signal
import subprocess
import sys
import time

import huggingface_hub
import numpy as np
import pytest
import yaml

STAGES = ["pretrain", "finetune", "general", "intermediate", "prediction", "baseline"]
WORDS = {
    "sea": "wave tide harbour sail anchor gull salt deck storm shore".split(),
    "kitchen": "oven spoon butter flour kettle onion plate knife soup bread".split(),
}


def _write_inputs(folder):
    rng = random.Random(0)

    def sentence(label):
        filler = ["the", "a", "was", "and", "near", "with", "old", "new"]
        return " ".join(rng.choice(WORDS[label] + filler) for _ in range(rng.randint(4, 14)))

    for name, count in (("train", 160), ("dev", 40)):
        rows = [(sentence(label), label) for label in WORDS for _ in range(count // 2)]
        lines = "".join(f"{text}\t{label}\n" for text, label in rows)
        (folder / f"{name}.tsv").write_text("text\tlabel\n" + lines)
    documents = [". ".join(sentence(label) for _ in range(6)) for label in WORDS for _ in range(30)]
    (folder / "corpus.txt").write_text("\n\n".join(documents))
    model = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32}
    stage = {
        "num_steps": 80,
        "global_batch_size": 8,
        "max_length": 16,
        "learning_rate": 5e-3,
        "log_every": 4,
        "save_every": 8,
    }
    settings = {
        "run_dir": "set below",
        "tokenizer": {"vocab_size": 120},
        "corpus": {"files": [str(folder / "corpus.txt")], "heldout_share": 0.2},
        "task": {"train": str(folder / "train.tsv"), "dev": str(folder / "dev.tsv")},
        "teacher": {**model, "num_attention_heads": 2, "max_position_embeddings": 16},
        "student": {**model, "num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 8},
        **{name: stage for name in STAGES},
    }
    for name in ("finetune", "prediction", "baseline"):
        settings[name] = {**stage, "eval_every": 10}
    settings["finetune"] |= {
        "keep_every": 24,
        "learning_rate": 1e-2,
        "average_decay": 0.9,
        "batching": "pack",
    }
    phases = [{"share": 0.1, "max_length": 8}, {"share": 0.2, "global_batch_size": 16}]
    settings["pretrain"] = {**stage, "learning_rate": 1e-3, "eval_every": 40, "phases": phases}
    settings["general"] = {**stage, "phases": phases[:1], "keep_every": 24}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))


def _command(run_dir, config="run.yaml"):
    return [sys.executable, "-m", "tinybert_jax", "run", config, f"run_dir={run_dir}"]


@pytest.fixture(scope="module", autouse=True)
def _shared_compilation_cache(tmp_path_factory):
    """Eight runs of one program: compiled once."""
    patch = pytest.MonkeyPatch()
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    patch.setenv("XLA_FLAGS", flags)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    _write_inputs(folder)
    done = subprocess.run(_command("golden"), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def _metrics(run):
    """Everything but clocks."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = {"time", "seconds", "seconds_left", "tokens_per_second", "mfu"}
    return [
        {k: v for k, v in row.items() if k not in clocks} for row in rows if row["kind"] != "stage"
    ]


def test_run_folder_holds_what_it_promises(golden):
    folder, output = golden
    run = folder / "golden"
    for name in ("config.yaml", "env.json", "metrics.jsonl", "results.json", "report.html"):
        assert (run / name).is_file()
    left = {str(path.relative_to(run / "checkpoints")) for path in run.glob("checkpoints/*/*/*")}
    kept = {f"{name}/last/{step}" for name in ("general", "finetune") for step in (24, 48, 72)}
    states = [run / "checkpoints" / name for name in kept if name.startswith("finetune")]
    best = {json.loads((state / "meta.json").read_text())["best_step"] for state in states}
    assert left == kept | {f"finetune/best/{step}" for step in best}, "those of keep_every"
    assert "removed the checkpoints of a finished run" in output
    results = json.loads((run / "results.json").read_text())
    scores = {m["role"]: m["metrics"]["accuracy"] for m in results["models"]}
    assert scores["teacher"] >= 0.9, "two words of a kind are enough for any model"
    assert set(scores) == {"teacher", "student", "baseline", "linear"}
    assert results["share_kept"] == scores["student"] / scores["teacher"]
    assert np.sum(results["models"][0]["confusion"]) == 40
    train = [row for row in _metrics(run) if row["kind"] == "train"]
    assert {row["stage"] for row in train} == set(STAGES)
    heldout = [r for r in _metrics(run) if r["kind"] == "eval" and r["stage"] == "pretrain"]
    assert [row["step"] for row in heldout] == [40, 80]
    assert heldout[1]["perplexity"] < heldout[0]["perplexity"] < 120  # the vocabulary's size
    layers = [row["loss"] for row in train if row["stage"] == "intermediate"]
    assert layers[-1] < layers[0]
    assert "left" in output and "tok/s" in output and "mfu" in output


def test_product_loads_in_transformers_with_the_same_predictions(golden):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, _ = golden
    texts = [line.split("\t")[0] for line in (folder / "dev.tsv").read_text().splitlines()[1:]]
    done = subprocess.run(
        [sys.executable, "-m", "tinybert_jax", "predict", "golden/hf", "dev.tsv", "--logits"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ours = [json.loads(line) for line in done.stdout.splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "golden" / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "golden" / "hf")
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**inputs).logits.numpy()
    found = [list(row["logits"].values()) for row in ours]
    np.testing.assert_allclose(found, theirs, atol=1e-4)
    names = [model.config.id2label[i] for i in theirs.argmax(-1)]
    assert [row["label"] for row in ours] == names
    card = huggingface_hub.ModelCard.load(folder / "golden" / "hf" / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    accuracy = {score.metric_type: score.metric_value for score in card.data.eval_results}
    assert 0 <= accuracy["accuracy"] <= 1


def test_killed_in_every_stage_it_ends_with_the_same_bits(golden):
    folder, _ = golden
    run = folder / "killed"
    outputs = [_run_until_killed(folder, run, stage) for stage in STAGES]
    done = subprocess.run(_command("killed"), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for stage, after in zip(STAGES, [*outputs[1:], done.stdout], strict=True):
        assert f"{stage}: resumes at step" in after, f"the kill in {stage} came too late"
    assert _metrics(run) == _metrics(folder / "golden")
    for stage in STAGES:
        file = f"models/{stage}/model.safetensors"
        assert (run / file).read_bytes() == (folder / "golden" / file).read_bytes(), stage
    before, now = (json.loads((p / "results.json").read_text()) for p in (folder / "golden", run))
    assert before["share_kept"] == now["share_kept"]
    once, environment = (json.loads((p / "env.json").read_text()) for p in (folder / "golden", run))
    assert once["earlier"] == []
    assert len(environment["earlier"]) == len(STAGES), "one for each process that was killed"
    started = [own["started"] for own in (*environment["earlier"], environment)]
    assert started == sorted(started)


def test_seeds_share_a_run_and_the_best_is_exported_also_when_killed(golden):
    folder, _ = golden
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    for name in ("pretrain", "tokenizer"):
        del settings[name]
    settings["teacher"] = {"path": str(folder / "golden" / "models" / "pretrain")}
    settings["finetune"] |= {"num_seeds": 2}
    settings |= {"num_seeds": 3, "prediction": settings["prediction"] | {"learning_rate": 1e-3}}
    (folder / "seeds.yaml").write_text(yaml.safe_dump(settings))
    run, killed = folder / "seeds", folder / "seeds-killed"
    for stage in ("finetune", "intermediate", "prediction"):
        _run_until_killed(folder, killed, stage, "seeds.yaml")
    for name in ("seeds", "seeds-killed"):
        done = subprocess.run(
            _command(name, "seeds.yaml"), cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert _metrics(run) == _metrics(killed)

    results = json.loads((run / "results.json").read_text())
    described = {model["role"]: model for model in results["models"]}
    teachers = [own["accuracy"] for own in described["teacher"]["by_seed"]]
    assert len(teachers) == 2
    assert described["teacher"]["metrics"]["accuracy"] == max(teachers)
    assert described["teacher"]["mean"]["accuracy"] == np.mean(teachers)
    best = run / "models" / f"finetune-seed-{np.argmax(teachers)}" / "model.safetensors"
    assert (run / "models" / "finetune" / "model.safetensors").read_bytes() == best.read_bytes()
    for role in ("student", "baseline"):
        scores = [own["accuracy"] for own in described[role]["by_seed"]]
        assert len(scores) == 3
        assert described[role]["metrics"]["accuracy"] == np.mean(scores)
        assert described[role]["deviation"]["accuracy"] == np.std(scores, ddof=1)
    names = ["prediction", "prediction-seed-1", "prediction-seed-2"]
    weights = [(run / "models" / name / "model.safetensors").read_bytes() for name in names]
    assert len(set(weights)) == 3
    best = np.argmax([own["accuracy"] for own in described["student"]["by_seed"]])
    assert (run / "hf" / "model.safetensors").read_bytes() == weights[best]
    for folder_name in (run / "models").iterdir():
        same = killed / "models" / folder_name.name / "model.safetensors"
        assert (folder_name / "model.safetensors").read_bytes() == same.read_bytes()
    assert "mean of 3 seeds" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("stage", "name", "part", "more"),
    [
        ("pretrain", "corpus.txt", "corpus", "\n\none more document about the sea and the wave"),
        ("finetune", "dev.tsv", "task.dev", None),
    ],
)
def test_data_changed_under_a_resume_is_refused(golden, tmp_path, stage, name, part, more):
    folder, _ = golden
    for copied in ("run.yaml", "train.tsv", "dev.tsv", "corpus.txt"):
        text = (folder / copied).read_text().replace(str(folder), str(tmp_path))
        (tmp_path / copied).write_text(text)
    _run_until_killed(tmp_path, tmp_path / "run", stage)
    file = tmp_path / name
    text = file.read_text()
    file.write_text(text + (more or text.splitlines()[-1] + "\n"))
    before = {
        p: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").rglob("*") if p.is_file()
    }
    done = subprocess.run(_command("run"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{part}: expected the content that this run began with" in done.stderr
    assert all(path.read_bytes() == content for path, content in before.items())


def _run_until_killed(folder, run, stage, config="run.yaml"):
    """Starts or resumes the run and SIGKILLs it after `stage` has logged step 12 and saved one."""
    process = subprocess.Popen(
        _command(run.name, config),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wanted = f'"stage": "{stage}", "step": 12,'
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        metrics = run / "metrics.jsonl"
        is_saved = any((run / "checkpoints" / stage / "last").glob("[0-9]*"))
        if is_saved and metrics.exists() and wanted in metrics.read_text():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    output, _ = process.communicate(timeout=60)
    return output
