"""One run: its inputs, its folder, its mesh. All is read and checked before anything is written."""

import contextlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tinybert_jax.runs.preflight import check_folder, check_further_teachers, check_labels, check_order, check_sizes, check_vocabularies, check_weights
from tinybert_jax.runs import corpus_preflight
from tinybert_jax.batches.tokenize import tokenize_task
from tinybert_jax.config import load as configs
from tinybert_jax.config.models import SOLE
from tinybert_jax.config.models import FurtherTeacher
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.config.models import Student
from tinybert_jax.config.run import RunConfig
from tinybert_jax.config.stages import StageSection
from tinybert_jax.data.splits import TaskData
from tinybert_jax.evaluation.scorer import Judge, majority_share, make_scorer, task_metrics
from tinybert_jax.huggingface.folder import start_params
from tinybert_jax.runs.inputs import read_inputs
from tinybert_jax.models.heads import make_classifier
from tinybert_jax.models.params import Apply, Params, frozen_params
from tinybert_jax.parallel import sharding
from tinybert_jax.parallel.mesh import make_mesh
from tinybert_jax.performance import host
from tinybert_jax.performance.device_peaks import measure_gemm_peak, peak_flops
from tinybert_jax.tokens.store import Store
from tinybert_jax.training.metric_log import MetricLog


class Run(NamedTuple):
    """What every recipe gets. Model folders of finished stages are under `folder/models`."""

    config: RunConfig
    folder: Path
    mesh: Mesh
    log: MetricLog
    tokenizer: Any
    teacher: ModelConfig
    further_teachers: tuple[FurtherTeacher, ...]
    students: tuple[Student, ...]
    task: TaskData | None
    corpus: tuple[str, ...]
    heldout: tuple[str, ...]  # documents of the corpus that no stage trains on
    stores: tuple[tuple[Store, float], ...]  # the corpus as token stores, each with its weight
    heldout_store: Store | None
    peak_flops: float
    is_profiled: bool = False  # whether each stage leaves a trace in `folder/profile`

    @property
    def data(self) -> TaskData:
        """The task's text; `open_run` refuses stages without the task they need."""
        assert self.task is not None
        return self.task

    @property
    def score(self) -> str:
        """The metric that chooses the best checkpoint."""
        assert self.config.task is not None
        return self.config.task.score

    def section(self, stage: str) -> Any:
        """The section of a stage that runs; it is there, or the stage would not run."""
        section = getattr(self.config, stage)
        assert section is not None
        return section

    @property
    def mask_ids(self) -> dict[str, Any]:
        """What masking has to know of the vocabulary, as keyword arguments."""
        return {
            "mask_token_id": self.tokenizer.mask_token_id,
            "special_token_ids": tuple(int(i) for i in self.tokenizer.all_special_ids),
            "vocab_size": len(self.tokenizer),
        }

    @property
    def is_regression(self) -> bool:
        return self.config.task is not None and self.config.task.regression

    def model_folder(self, stage: str, member: str = SOLE) -> Path:
        """`models/<stage>[-<member>]`: its one model, its first seed's, or the best teacher."""
        return self.folder / "models" / (f"{stage}-{member}" if member else stage)

    def seed_folders(self, stage: str, member: str = SOLE) -> list[Path]:
        """The model of each seed: of several all but the first student's are `…-seed-<seed>`."""
        first = self.model_folder(stage, member)
        seeds = self.config.seeds(stage)
        if len(seeds) == 1:
            return [first]
        folders = [first.with_name(f"{first.name}-seed-{seed}") for seed in seeds]
        return folders if stage == "finetune" else [first, *folders[1:]]

    def is_done(self, stage: str) -> bool:
        folders = [
            folder
            for name in self.config.members(stage)
            for folder in (*self.seed_folders(stage, name), self.model_folder(stage, name))
        ]
        return bool(folders) and all((path / "config.json").is_file() for path in folders)

    def latest(self, *stages: str, member: str = SOLE, seed: int | None = None) -> Path | None:
        """The model of the first of the given stages that is done, or that of a seed's number."""
        stage = next((name for name in stages if self.is_done(name)), None)
        if stage is None:
            return None
        if seed is None:
            return self.model_folder(stage, member)
        return self.seed_folders(stage, member)[seed]

    @property
    def pretrained_teacher(self) -> str | Path | None:
        """Where the teacher's general weights are; None for a teacher from random weights."""
        return self.latest("pretrain") or self.config.teacher.path

    def learns_task(self, stages: Collection[str]) -> bool:
        """Whether any of the stages reads a teacher that knows the task."""
        return any(
            self.config.teaches(name) for name in ("intermediate", "prediction") if name in stages
        )

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
    run = read_run(config, stages)
    if _learns_now(run, stages):
        check_teacher(run, run.task_teacher, run.teacher)
    if "prediction" in stages and not run.is_done("prediction"):
        for own in run.further_teachers:
            check_teacher(run, own.section.path, own.sizes)
    with host.locked(run.folder, "run_dir"):
        check_folder(run.folder, config)  # again: another run may have begun while we read
        _write_identity(run.folder, config, run.mesh)
        _keep_tokenizer(run.folder, run.tokenizer)
        yield run._replace(peak_flops=_peak_flops(config.compute.dtype, run.mesh.size))


def read_run(config: RunConfig, stages: Sequence[str]) -> Run:
    """Reads and checks all inputs of the given stages; scores no model, writes nothing."""
    if jax.process_count() > 1:
        raise ValueError(
            f"expected one process, got {jax.process_count()}: use one with all devices"
        )
    folder = Path(config.run_dir).expanduser().resolve()
    check_folder(folder, config)
    inputs = read_inputs(config, folder)
    run = Run(
        config=config,
        folder=folder,
        mesh=make_mesh(config.mesh),
        log=MetricLog(folder / "metrics.jsonl"),
        **{name: value for name, value in inputs._asdict().items() if name != "text"},
        **inputs.text._asdict(),
        peak_flops=np.nan,  # measured once the run is sure to start
    )
    _check(run, stages)
    return run


def with_dropout(model: ModelConfig, section: StageSection) -> ModelConfig:
    """The sizes with a stage's own dropout rate, where it has one."""
    if section.dropout is None:
        return model
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return model.model_copy(update=dict.fromkeys(rates, section.dropout))


def compute_options(config: RunConfig, stage: str | None = None) -> dict[str, Any]:
    """Keyword options for `make_classifier` and its kin; `stage`: of a model that it
    trains; without: of a teacher, which is only read."""
    compute = config.compute
    name = compute.dtype if stage else compute.frozen_dtype
    product_dtype = _PRODUCT_DTYPES.get(name)
    # cuDNN's call cannot be vectorised over seeds: its mask would lose the axis of the heads.
    is_vectorised = stage is not None and len(config.seeds(stage)) > 1
    return {
        "dtype": jnp.dtype("float32" if product_dtype else name),
        "product_dtype": product_dtype,
        "unroll": compute.unroll_layers,
        "attention": "xla" if is_vectorised else compute.attention,
    }


_PRODUCT_DTYPES: dict[str, Any] = {"bfloat16_products": jnp.bfloat16, "int8_products": jnp.int8}


def as_read(config: RunConfig, params: Params) -> Params:
    """Parameters of a model that is only read, as one made with `compute_options` takes them."""
    options = compute_options(config)
    names = ("dtype", "product_dtype", "unroll")
    return frozen_params(params, **{name: options[name] for name in names})


def dev_judge(run: Run, apply: Callable, section: StageSection) -> Judge:
    """Metrics on the dev set."""
    rows = tokenize_task(run.tokenizer, run.data.dev, section.max_length)
    score = make_scorer(
        apply,
        buckets=section.buckets(),
        pad_token_id=run.tokenizer.pad_token_id,
        packed=section.batching == "pack",
        mesh=run.mesh,
    )

    def measure(params: Any) -> dict[str, float]:
        return task_metrics(score(params, rows), run.data.dev_labels, regression=run.is_regression)

    return Judge(measure, rows.fingerprint())


def load_classifier(run: Run, path: str | Path, sizes: ModelConfig) -> tuple[Apply, Params]:
    """A model that knows the task, to be called with `placed_as_read` of its parameters."""
    apply, init = make_classifier(sizes, run.data.num_outputs, **compute_options(run.config))
    return apply, start_params(path, init, whole=True)


def placed_as_read(run: Run, params: Params) -> Params:
    """`as_read`, on the run's devices."""
    return sharding.placed(as_read(run.config, params), run.mesh)


def check_teacher(run: Run, path: str | Path, sizes: ModelConfig) -> None:
    """Refuses a teacher that has nothing to teach: near the majority class on the dev set."""
    margin = run.config.distillation.teacher_margin
    if run.is_regression or margin == -1:
        return
    section = run.config.prediction or run.section("intermediate")
    apply, params = load_classifier(run, path, sizes)
    accuracy = dev_judge(run, apply, section).measure(placed_as_read(run, params))["accuracy"]
    chance = majority_share(run.data.dev_labels)
    needed = min(chance + margin, 1.0)
    if accuracy < needed:
        raise ValueError(
            f"teacher: expected a dev accuracy of at least {needed:.4f} (the majority class has "
            f"{chance:.4f}), got {accuracy:.4f} from {path}; check its label order, fine-tune it "
            "on the task, or for longer (in another run_dir), or take it as it is with "
            "distillation.teacher_margin=-1"
        )


def publish(run: Run, models: Mapping[str, Path]) -> Path:
    """Copies a finished stage's models to `folder/hf`, the run's product; members by name in it."""
    partial = run.folder / ".hf-partial"
    shutil.rmtree(partial, ignore_errors=True)
    for name, model in models.items():
        ignored = shutil.ignore_patterns("projection.safetensors")
        shutil.copytree(model, partial / name, ignore=ignored)
    product, before = run.folder / "hf", run.folder / ".hf-before"
    shutil.rmtree(before, ignore_errors=True)
    if product.exists():
        product.rename(before)
    partial.rename(product)
    shutil.rmtree(before, ignore_errors=True)
    return product


def _check(run: Run, stages: Sequence[str]) -> None:
    config = run.config
    check_order(config, stages, run.is_done)
    check_sizes(config, stages, run.mesh, run.tokenizer, run.teacher, run.students)
    check_vocabularies(config, run.tokenizer, run.students)
    if run.stores:
        corpus_preflight.check_stores(config, stages, run.tokenizer, run.stores, run.heldout_store)
    elif {"pretrain", "general"} & set(stages):
        corpus_preflight.check_corpus(run.tokenizer, run.corpus)
        if run.heldout and "pretrain" in stages:
            corpus_preflight.check_corpus(run.tokenizer, run.heldout, "corpus.heldout_share")
    if _learns_now(run, stages):
        check_labels(run.task_teacher, run.data.label_names)
    num_outputs = run.task.num_outputs if run.task else 0
    if "prediction" in stages:
        labels = run.data.label_names
        further = run.further_teachers
        check_further_teachers(config, run.tokenizer, further, num_outputs, labels)
    check_weights(config, stages, run.teacher, run.students, num_outputs)


def _learns_now(run: Run, stages: Sequence[str]) -> bool:
    """Whether a stage will read a teacher of the task that is there already."""
    pending = {name for name in stages if not run.is_done(name)}
    return run.learns_task(pending) and "finetune" not in pending


def _keep_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Whole or not at all: a resumed run reads it back."""
    if not (folder / "tokenizer").is_dir():
        partial = folder / ".tokenizer-partial"
        shutil.rmtree(partial, ignore_errors=True)
        tokenizer.save_pretrained(str(partial))
        partial.rename(folder / "tokenizer")


def _write_identity(folder: Path, config: RunConfig, mesh: Mesh) -> None:
    partial = folder / ".config-partial"
    partial.write_text(configs.dump(config), encoding="utf-8")
    partial.rename(folder / "config.yaml")
    packages = (
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "transformers",
    )
    environment = {
        "tinybert-jax": _own_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "mesh": " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "git_commit": _git_commit(),
    }
    (folder / "env.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


def _own_version() -> str:
    try:
        return importlib.metadata.version("tinybert-jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from a checkout


def _git_commit() -> str:
    """The commit of the package's own checkout, or 'none' for an installed package."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # or it is somebody else's checkout
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _peak_flops(dtype: str, num_devices: int) -> float:
    """All devices together. Host devices share one CPU, measured; an unknown accelerator: NaN."""
    device, dtype = jax.devices()[0], dtype.removesuffix("_products")
    if device.platform == "cpu":
        return measure_gemm_peak(dtype)
    return (peak_flops(device.device_kind, dtype) or np.nan) * num_devices
