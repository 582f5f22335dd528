"""The `Run` that every stage gets: folder, devices, inputs, and the models of finished stages."""

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from tinybert_jax.config.compute import ComputeSection
from tinybert_jax.config.distillation import DistillSection
from tinybert_jax.config.models import SOLE, FurtherTeacher, Student, TeacherSection
from tinybert_jax.config.run import StagePlan
from tinybert_jax.config.stages import FINETUNE, PRETRAIN, StageSection
from tinybert_jax.config.tasks import TaskSection, TextTask
from tinybert_jax.data.splits import TaskData
from tinybert_jax.huggingface.encoder_decoder import (
    Tokenizers,
    save_encoder_decoder,
    start_any,
)
from tinybert_jax.huggingface.folder import save_model, write_json
from tinybert_jax.huggingface.head import Head, is_name
from tinybert_jax.models.heads import Model
from tinybert_jax.models.params import Apply, Params, frozen_params
from tinybert_jax.parallel import processes
from tinybert_jax.parallel.sharding import place_params
from tinybert_jax.performance import disk
from tinybert_jax.settings.sizes import EncoderDecoderConfig, Sizes
from tinybert_jax.tasks.task import Settings, Task
from tinybert_jax.tokens.store import Store
from tinybert_jax.training.metric_log import MetricLog
from tinybert_jax.training.preemption import NEVER, Stop
from tinybert_jax.training.saver import Saver

INPUTS, IDENTITIES = "inputs.json", "stages"  # what `runs.identity` writes to the run folder


class RunTask(NamedTuple):
    """The task of a run and its data."""

    kind: Task
    name: str
    metric: str  # chooses the best checkpoint and the best seed, on `data.selection`
    data: TaskData
    section: TaskSection

    @property
    def texts_per_example(self) -> int:
        """Texts of an example to train on that are rows of their own, in the same batch."""
        return self.section.texts_per_example


class Run(NamedTuple):
    """The inputs and settings of one run; read-only.

    Finished stages write their models to `folder/models`.
    """

    name: str
    folder: Path
    mesh: Mesh
    log: MetricLog
    seed: int
    plans: Mapping[str, StagePlan]  # by the name of the stage, in running order
    compute: ComputeSection
    distillation: DistillSection
    tokenizers: Tokenizers  # of texts, and of the targets of a translation
    teacher: Sizes
    teacher_section: TeacherSection
    further_teachers: tuple[FurtherTeacher, ...]
    students: tuple[Student, ...]
    has_named_students: bool  # the config has `students` instead of `student`
    task: RunTask | None
    corpus: tuple[str, ...]  # documents to train on; empty where the corpus is `stores`
    heldout: tuple[str, ...]  # documents of the corpus that no stage trains on
    stores: tuple[tuple[Store, float], ...]  # the corpus as (token store, share of a batch)
    heldout_store: Store | None
    saver: Saver  # writes checkpoints
    peak_flops: float  # FLOP/s of all devices together; NaN where unknown
    is_profiled: bool = False  # write a trace of each stage to `folder/profile`
    stop: Stop = NEVER  # a request to stop the run

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of all texts but the targets of a translation."""
        return self.tokenizers.source

    @property
    def required_task(self) -> RunTask:
        """The task, not None; `open_run` refuses a config whose stages need a task it lacks."""
        assert self.task is not None
        return self.task

    @property
    def mask_ids(self) -> dict[str, Any]:
        """Token ids that masking needs, as keyword arguments of `make_mlm` and `make_mask`."""
        return {
            "mask_token_id": self.tokenizer.mask_token_id,
            "special_token_ids": tuple(int(i) for i in self.tokenizer.all_special_ids),
            "vocab_size": len(self.tokenizer),
        }

    def model_folder(self, stage: str, member: str = SOLE) -> Path:
        """The folder `models/<stage>[-<member>]`.

        With one seed it holds the only model; with several, the student of the first seed, the
        teacher with the best score, or the mean of a stage that averages its seeds.
        """
        return self.folder / "models" / (f"{stage}-{member}" if member else stage)

    def seed_folders(self, plan: StagePlan, member: str = SOLE) -> list[Path]:
        """The model folders that a stage keeps: one for each seed, or one for their mean.

        They are in the order of `plan.seeds`. With several the names end in `-seed-<seed>`, except
        for the student of the first seed.
        """
        first = self.model_folder(plan.name, member)
        if len(plan.seeds) == 1 or plan.stage.averages_seeds:
            return [first]
        folders = [first.with_name(f"{first.name}-seed-{seed}") for seed in plan.seeds]
        return folders if plan.stage.role == "teacher" else [first, *folders[1:]]

    def output_folders(self, plan: StagePlan) -> list[Path]:
        """Every model folder that the stage writes."""
        folders = [
            folder
            for name in plan.members
            for folder in (*self.seed_folders(plan, name), self.model_folder(plan.name, name))
        ]
        return list(dict.fromkeys(folders))

    def is_done(self, stage: str) -> bool:
        """Whether the stage has finished and its model folders exist."""
        plan = self.plans.get(stage)
        if plan is None:
            return False
        folders = self.output_folders(plan)
        if not folders or not all((path / "config.json").is_file() for path in folders):
            return False
        is_recorded = (self.folder / IDENTITIES / f"{stage}.json").is_file()
        # Version 0.1 wrote neither file.
        return is_recorded or not (self.folder / INPUTS).is_file()

    def find_model(self, *stages: str, member: str = SOLE, seed: int | None = None) -> Path | None:
        """The model folder of the first of `stages` that is done; None where none is done.

        `seed`: index into the seeds of that stage; None: `model_folder`.
        """
        stage = next((name for name in stages if self.is_done(name)), None)
        if stage is None:
            return None
        if seed is None:
            return self.model_folder(stage, member)
        return self.seed_folders(self.plans[stage], member)[seed]

    @property
    def pretrained_teacher(self) -> str | Path | None:
        """The folder or hub id of the pretrained teacher; None: the teacher starts at random."""
        return self.find_model(PRETRAIN.name) or self.teacher_section.path

    @property
    def task_teacher(self) -> str | Path:
        """The folder or hub id of the fine-tuned teacher; raises ValueError without one."""
        given = self.teacher_section.finetuned or self.teacher_section.path
        folder = self.find_model(FINETUNE.name) or given
        if folder is None:
            raise ValueError(
                "teacher: expected a fine-tuned teacher, got none; add a finetune section or set "
                "teacher.finetuned to the folder of a fine-tuned model"
            )
        return folder

    @property
    def own_teachers(self) -> list[Path]:
        """The folders of all seeds of the finetune stage, if their mean teaches; else empty."""
        plan = self.plans.get(FINETUNE.name)
        if plan is None or plan.section.teach != "mean":
            return []
        return self.seed_folders(plan)

    def teacher_of(self, plan: StagePlan) -> str | Path | None:
        """The folder or hub id of the teacher of a distillation stage."""
        return self.task_teacher if plan.stage.teacher == "task" else self.pretrained_teacher


def with_dropout(model: Sizes, section: StageSection) -> Sizes:
    """The model config with the dropout rate of the stage, if the stage sets `dropout`."""
    if section.dropout is None:
        return model
    if isinstance(model, EncoderDecoderConfig):
        sides = {name: getattr(model, name) for name in ("encoder", "decoder")}
        changed = {name: with_dropout(side, section) for name, side in sides.items()}
        return model.model_copy(update=changed)
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    changes = {**dict.fromkeys(rates, section.dropout), "classifier_dropout": None}
    return model.model_copy(update=changes)


def trained_options(compute: ComputeSection, plan: StagePlan) -> dict[str, Any]:
    """Keyword arguments of a trained encoder: dtypes, unrolling and the attention backend."""
    # vmap over seeds does not work with cuDNN's call: its mask would lose the axis of the heads.
    is_vectorised = len(plan.seeds) > 1
    attention = "xla" if is_vectorised else compute.attention
    return _options(compute.dtype, compute.unroll_layers, attention)


def frozen_options(compute: ComputeSection) -> dict[str, Any]:
    """Keyword arguments of a frozen encoder: that of a teacher."""
    return _options(compute.frozen_dtype, compute.unroll_layers, compute.attention)


# dtype -> (dtype of activations, of the inputs of products with weights)
_PRODUCTS: dict[str, tuple[Any, Any]] = {
    "bfloat16_products": (jnp.float32, jnp.bfloat16),
    "int8_products": (jnp.float32, jnp.int8),
    "float8_products": (jnp.bfloat16, jnp.float8_e4m3fn),
}


def _options(dtype: str, unroll: bool | Literal["auto"], attention: str) -> dict[str, Any]:
    assert unroll != "auto", "the run has settled it for its devices"
    activations, product_dtype = _PRODUCTS.get(dtype, (dtype, None))
    return {
        "dtype": jnp.dtype(activations),
        "product_dtype": product_dtype,
        "unroll": unroll,
        "attention": attention,
    }


def freeze_params(compute: ComputeSection, params: Params) -> Params:
    """A teacher's parameters in the form that an encoder with `frozen_options` reads."""
    options = frozen_options(compute)
    names = ("dtype", "product_dtype", "unroll")
    return frozen_params(params, **{name: options[name] for name in names})


def place_frozen_params(run: Run, params: Params) -> Params:
    """`freeze_params`, then sends the parameters to the run's devices."""
    return place_params(freeze_params(run.compute, params), run.mesh)


def make_task_model(run: Run, sizes: Sizes, **options: Any) -> Model:
    """(apply, init) of a model with the head of the run's task."""
    return run.required_task.kind.make_head(sizes, run.required_task.data.num_outputs, **options)


def load_frozen(run: Run, path: str | Path, sizes: Sizes) -> tuple[Apply, Params]:
    """(apply, params) of a fine-tuned model in the folder or hub id `path`.

    `apply` reads `place_frozen_params(run, params)`, not `params`.
    """
    apply, init = make_task_model(run, sizes, **frozen_options(run.compute))
    return apply, start_any(path, init, whole=True)


def num_outputs(run: Run, sizes: Sizes) -> int:
    """Outputs of a model of the task for each unit."""
    task = run.required_task
    return sizes.hidden_size if task.kind.form == "similarity" else task.data.num_outputs


def save_task_model(
    run: Run,
    folder: Path,
    params: Params,
    sizes: Sizes,
    settings: Settings,
    extra: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """Saves a trained model with the head of the task and what else its kind has in a folder.

    Of several processes the main one does.
    """
    kind = run.required_task.kind
    files = kind.more_files or (lambda width, length: {})
    trees = files(sizes.hidden_size, sizes.max_position_embeddings)
    more = {name: functools.partial(write_json, tree=tree) for name, tree in trees.items()}
    head = _head_of(run, settings) if kind.hf_head else None
    if isinstance(sizes, EncoderDecoderConfig):
        if processes.is_main():
            files = {**(extra or {}), **more}
            save_encoder_decoder(folder, params, sizes, run.tokenizers, files)
    elif processes.is_main():
        save_model(folder, params, sizes, run.tokenizer, head=head, extra={**(extra or {}), **more})


def _head_of(run: Run, settings: Settings) -> Head:
    """The head, with the labels of the task, that a trained model is saved with."""
    task = run.required_task
    names = task.data.label_names or ()
    kind = task.kind
    assert kind.hf_head is not None
    reads_pairs = kind.unit != "span" and task.data.train.text_pair is not None
    columns = _columns_of(task.section)
    return Head(
        kind.hf_head, kind.problem_type, names, dict(settings), kind.kind, reads_pairs, columns
    )


def _columns_of(section: TaskSection) -> dict[str, str]:
    """The columns of text, to be read again; none where they have the usual name or none."""
    if not isinstance(section, TextTask) or section.builtin:
        return {}
    given = {"text": section.text, "text_pair": section.text_pair}
    columns = {name: column for name, column in given.items() if column is not None}
    is_usual = columns == {"text": "text"} or any(map(str.isdecimal, columns.values()))
    return columns if not is_usual and all(map(is_name, columns.values())) else {}


LINEAGE, CARD = "lineage.json", "README.md"


def remove_export(run: Run) -> None:
    """Removes `folder/hf`, where an earlier process has exported models."""
    shutil.rmtree(run.folder / "hf", ignore_errors=True)


def export_models(
    run: Run, models: Mapping[str, Path], lineage: Mapping[str, Any], cards: Mapping[str, str]
) -> Path:
    """Copies models of a finished stage to `folder/hf` and returns that folder.

    `lineage`: what the models were made of, for a file in each of their folders; `cards`: the text
    of their model cards.
    `models`: by subfolder of `folder/hf`; "" for the folder itself. An existing `folder/hf` is
    replaced.
    """
    partial = run.folder / ".hf-partial"
    shutil.rmtree(partial, ignore_errors=True)
    for name, model in models.items():
        ignored = shutil.ignore_patterns("projection.safetensors")
        shutil.copytree(model, partial / name, ignore=ignored)
        made = {"stage": model.name, **lineage}
        (partial / name / LINEAGE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        (partial / name / CARD).write_text(cards[name], encoding="utf-8")
    disk.sync_tree(partial)
    target, before = run.folder / "hf", run.folder / ".hf-before"
    shutil.rmtree(before, ignore_errors=True)
    if target.exists():
        target.rename(before)
    partial.rename(target)
    disk.sync(run.folder)
    shutil.rmtree(before, ignore_errors=True)
    return target
