"""One run: its inputs, its folder, its mesh. All is read and checked before anything is written."""

import contextlib
import difflib
import fcntl
import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax.sharding import Mesh

from tinybert_jax import config as configs
from tinybert_jax import cost, distill, sharding
from tinybert_jax.convert import hf_files
from tinybert_jax.data import builtin, sources, vocab
from tinybert_jax.data.pipeline import tokenize_task
from tinybert_jax.data.sources import LabelledText
from tinybert_jax.evaluate import make_scorer, task_metrics
from tinybert_jax.log import MetricLog
from tinybert_jax.sections import ModelConfig, RunConfig, StageSection, StudentSection


class TaskData(NamedTuple):
    train: LabelledText
    dev: LabelledText

    @property
    def label_names(self) -> tuple[str, ...] | None:
        return self.train.label_names

    @property
    def num_outputs(self) -> int:
        return len(self.label_names) if self.label_names else 1


class Run(NamedTuple):
    """What every recipe gets. Model folders of finished stages are under `folder/models`."""

    config: RunConfig
    folder: Path
    mesh: Mesh
    log: MetricLog
    tokenizer: Any
    teacher: ModelConfig
    student: ModelConfig | None
    task: TaskData | None
    corpus: tuple[str, ...]
    peak_flops: float

    def model_folder(self, stage: str) -> Path:
        return self.folder / "models" / stage

    def is_done(self, stage: str) -> bool:
        return (self.model_folder(stage) / "config.json").is_file()

    def latest(self, *stages: str) -> Path | None:
        """The model of the first of the given stages that is done."""
        return next((self.model_folder(name) for name in stages if self.is_done(name)), None)

    @property
    def pretrained_teacher(self) -> str | Path | None:
        """Where the teacher's general weights are; None for a teacher from random weights."""
        return self.latest("pretrain") or self.config.teacher.path

    @property
    def task_teacher(self) -> str | Path:
        """The teacher that knows the task; raises ValueError where there is none."""
        teacher = self.config.teacher
        folder = self.latest("finetune") or teacher.finetuned or teacher.path
        if folder is None:
            raise ValueError(
                "teacher: expected one that knows the task, got none; add a finetune section or "
                "give a fine-tuned folder as teacher.finetuned"
            )
        return folder


@contextlib.contextmanager
def open_run(config: RunConfig, stages: Sequence[str]) -> Iterator[Run]:
    """Reads and checks all inputs of the given stages, then opens or resumes the run folder.

    Raises ValueError, with nothing written, where an input is wrong or the folder belongs to
    another config or to a run that is still going.
    """
    folder = Path(config.run_dir).resolve()
    _check_same_config(folder, config)
    mesh = sharding.make_mesh(config.mesh)
    corpus = _read_corpus(config) if config.corpus else ()
    task = _read_task(config) if config.task else None
    tokenizer = _make_tokenizer(config, folder, corpus)
    teacher = _teacher_config(config, tokenizer)
    student = _student_config(config.student, teacher) if config.student else None
    _check(config, stages, mesh, teacher, student, task)
    with _locked(folder):
        _write_identity(folder, config, mesh)
        if not (folder / "tokenizer").is_dir():
            tokenizer.save_pretrained(str(folder / "tokenizer"))
        yield Run(
            config=config,
            folder=folder,
            mesh=mesh,
            log=MetricLog(folder / "metrics.jsonl"),
            tokenizer=tokenizer,
            teacher=teacher,
            student=student,
            task=task,
            corpus=corpus,
            peak_flops=_peak_flops(config.compute.dtype, mesh.size),
        )


def with_dropout(model: ModelConfig, section: StageSection) -> ModelConfig:
    """The sizes with a stage's own dropout rate, where it has one."""
    if section.dropout is None:
        return model
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return model.model_copy(update=dict.fromkeys(rates, section.dropout))


def compute_options(config: RunConfig) -> dict[str, Any]:
    """Keyword options for `make_classifier` and its kin."""
    return {"dtype": jnp.dtype(config.compute.dtype), "unroll": config.compute.unroll_layers}


def dev_judge(run: Run, apply: Callable, section: StageSection) -> Callable[[Any], dict]:
    """parameters -> metrics on the dev set."""
    rows = tokenize_task(run.tokenizer, run.task.dev, section.max_length)
    score = make_scorer(apply, buckets=section.buckets(), pad_token_id=run.tokenizer.pad_token_id)
    regression = run.config.task.regression
    return lambda params: task_metrics(
        score(params, rows), run.task.dev.labels, regression=regression
    )


def publish(run: Run, stage: str) -> Path:
    """Copies a finished stage's model to `folder/hf`, the run's product."""
    partial = run.folder / ".hf-partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(
        run.model_folder(stage), partial, ignore=shutil.ignore_patterns("projection.safetensors")
    )
    shutil.rmtree(run.folder / "hf", ignore_errors=True)
    return partial.rename(run.folder / "hf")


def _read_corpus(config: RunConfig) -> tuple[str, ...]:
    section = config.corpus
    documents = builtin.builtin_corpus() if section.builtin else sources.read_corpus(section.files)
    return tuple(documents[: section.max_documents])


def _read_task(config: RunConfig) -> TaskData:
    section = config.task
    if section.builtin:
        train, dev = builtin.builtin_task("train"), builtin.builtin_task("dev")
        return TaskData(_first(train, section.max_train_rows), _first(dev, section.max_dev_rows))

    def read(path: str, split: str | None, max_rows: int | None, labels) -> LabelledText:
        return sources.read_labelled(
            path,
            text=section.text,
            text_pair=section.text_pair,
            label=section.label,
            labels=labels,
            regression=section.regression,
            format=section.format,
            split=split,
            max_rows=max_rows,
        )

    train = read(section.train, section.train_split, section.max_train_rows, section.labels)
    # Labels named only by the training split are the only ones that the dev split may hold.
    labels = section.labels or train.label_names
    dev = read(section.dev, section.dev_split, section.max_dev_rows, labels)
    return TaskData(train, dev)


def _first(text: LabelledText, max_rows: int | None) -> LabelledText:
    pair = text.text_pair[:max_rows] if text.text_pair else None
    return text._replace(text=text.text[:max_rows], text_pair=pair, labels=text.labels[:max_rows])


def _make_tokenizer(config: RunConfig, folder: Path, corpus: Sequence[str]) -> Any:
    if (folder / "tokenizer").is_dir():
        return hf_files.load_tokenizer(folder / "tokenizer")
    section = config.tokenizer
    if section.vocab_size:
        return vocab.train_wordpiece(
            corpus, vocab_size=section.vocab_size, lowercase=section.lowercase
        )
    return hf_files.load_tokenizer(section.path or config.teacher.path)


def _teacher_config(config: RunConfig, tokenizer: Any) -> ModelConfig:
    if config.teacher.path:
        teacher = hf_files.read_model(config.teacher.path).config
    else:
        teacher = _sized(
            config.teacher.sizes(),
            "teacher",
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
    if len(tokenizer) > teacher.vocab_size:
        raise ValueError(
            f"vocabulary: expected a tokenizer of at most {teacher.vocab_size} pieces (the "
            f"teacher's table), got {len(tokenizer)}; use the tokenizer that belongs to the teacher"
        )
    return teacher


def _student_config(section: StudentSection, teacher: ModelConfig) -> ModelConfig:
    if section.path:
        return hf_files.read_model(section.path).config
    inherited = teacher.model_dump(exclude={"num_hidden_layers", "initializer_range"})
    return _sized({**inherited, **section.sizes()}, "student")


def _sized(fields: dict[str, Any], role: str, **more: Any) -> ModelConfig:
    try:
        return ModelConfig(**{**fields, **more})
    except ValueError as error:
        raise ValueError(f"{role}: {error.errors()[0]['msg']}") from None


def _check(config, stages, mesh, teacher, student, task: TaskData | None) -> None:
    for name in stages:
        section = getattr(config, name)
        models = {"teacher": teacher} if name in ("pretrain", "finetune") else {}
        if name in ("general", "intermediate", "prediction"):
            models = {"teacher": teacher, "student": student}
        if name == "baseline":
            models = {"student": student}
        for role, model in models.items():
            if section.max_length > model.max_position_embeddings:
                raise ValueError(
                    f"{name}.max_length: expected at most {model.max_position_embeddings} (the "
                    f"{role}'s positions), got {section.max_length}"
                )
        per_step = section.global_batch_size // section.gradient_accumulation_steps
        if per_step % sharding.num_batch_shards(mesh):
            raise ValueError(
                f"{name}.global_batch_size: expected a multiple of "
                f"{sharding.num_batch_shards(mesh) * section.gradient_accumulation_steps} (batch "
                f"devices × accumulation steps), got {section.global_batch_size}"
            )
    if {"general", "intermediate"} & set(stages):
        needs_heads = config.distillation.attention_weight > 0
        distill.check_fit(student, teacher, needs_heads=needs_heads)
        distill.make_layer_map(
            config.distillation.layer_map, student.num_hidden_layers, teacher.num_hidden_layers
        )
    if "prediction" in stages:
        distill.check_fit(student, teacher, needs_heads=False)
    task_teacher = config.teacher.finetuned or config.teacher.path
    if task_teacher and {"intermediate", "prediction"} & set(stages) and not config.finetune:
        check_labels(task_teacher, task.label_names)


def check_labels(path: str | Path, label_names: Sequence[str] | None) -> None:
    """Refuses a teacher whose labels, or their order, are not the task's."""
    theirs = hf_files.read_model(path).label_names
    if label_names is None or theirs is None or all(n.startswith("LABEL_") for n in theirs):
        if label_names is not None and theirs is not None and len(theirs) != len(label_names):
            raise ValueError(
                f"labels: expected {len(label_names)} ({list(label_names)}), the teacher {path} "
                f"has {len(theirs)}; fine-tune it on this task first (finetune section)"
            )
        return
    if tuple(theirs) != tuple(label_names):
        raise ValueError(
            f"labels: expected the teacher's order {list(theirs)}, got the task's "
            f"{list(label_names)}; write task.labels in the teacher's order, or fine-tune the "
            f"teacher on this task first (finetune section)"
        )


def _check_same_config(folder: Path, config: RunConfig) -> None:
    file = folder / "config.yaml"
    if not file.is_file():
        if folder.is_dir() and any(p for p in folder.iterdir() if p.name != ".lock"):
            raise ValueError(
                f"run_dir: expected an empty or new folder or one of an earlier run, got {folder} "
                "with files of something else"
            )
        return
    before, now = file.read_text(encoding="utf-8"), configs.dump(config)
    if yaml.safe_load(before) != yaml.safe_load(now):
        lines = difflib.unified_diff(
            before.splitlines(), now.splitlines(), "folder", "this command", lineterm="", n=0
        )
        changes = "\n  ".join(line for line in lines if not line.startswith("@@"))
        raise ValueError(
            f"run_dir: {folder} holds a run of another config; choose another run_dir, or undo "
            f"these changes:\n  {changes}"
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        if jax.process_index() == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"run_dir: {folder} is in use by another process; wait for it or choose "
                    "another run_dir"
                ) from None
        yield


def _write_identity(folder: Path, config: RunConfig, mesh: Mesh) -> None:
    if not (folder / "config.yaml").is_file():
        (folder / "config.yaml").write_text(configs.dump(config), encoding="utf-8")
    packages = (
        "tinybert-jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "transformers",
    )
    versions = {name: importlib.metadata.version(name) for name in packages}
    environment = {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "mesh": " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "git_commit": _git_commit(),
    }
    (folder / "env.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


def _git_commit() -> str:
    """The commit of the package's own checkout, or 'none' for an installed package."""
    try:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _peak_flops(dtype: str, num_devices: int) -> float:
    """All devices together. Host devices share one CPU, measured; an unknown accelerator: NaN."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return cost.measure_gemm_peak()
    return (cost.peak_flops(device.device_kind, dtype) or np.nan) * num_devices
