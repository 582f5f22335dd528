"""Sides of a comparison, each in a process of its own, taking turns round by round.

A side is a function that sets up and returns `round() -> (units, seconds)`. One side works at a
time; its figure is the median over the rounds, its memory the most that its process ever held.
"""

import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

LEARNING_RATE = 1e-4

Round = Callable[[], tuple[float, float]]


class Result(NamedTuple):
    rate: float  # units per second, median over the rounds
    peak_mib: float  # resident memory of the side's own process


def compare(sides: dict[str, tuple[Callable[..., Round], tuple]], num_rounds: int) -> dict:
    """name -> `Result` of sides given as (function, arguments); the first round of each is lost."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    try:
        for name, (make_round, arguments) in sides.items():
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make_round, arguments))
            process.start()
            theirs.close()
            processes.append(process)
            _ask(pipes[name], True)  # set up and warmed up before the next side starts
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(num_rounds):
            for name, pipe in pipes.items():
                units, seconds = _ask(pipe, True)
                rates[name].append(units / seconds)
        return {
            name: Result(statistics.median(rates[name]), _ask(pipe, False))
            for name, pipe in pipes.items()
        }
    finally:  # a side that failed leaves the others waiting
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join()


def show(results: dict[str, Result], unit: str) -> None:
    """A line a side: its rate, how many times that fits into the first side's, its memory."""
    first = next(iter(results.values()))
    for name, result in results.items():
        print(
            f"  {name:<44} {result.rate:>12,.0f} {unit}/s   ratio {first.rate / result.rate:7.2f}"
            f"   peak {result.peak_mib:7,.0f} MiB"
        )


def save_rows(path: Path, rows) -> None:
    """Token rows on disk, made once: tokenising would be the peak of every side's memory."""
    np.savez(path, **{name: value for name, value in rows._asdict().items() if value is not None})


def load_rows(path: Path):
    from tinybert_jax.batches.batch import TokenRows

    with np.load(path) as saved:
        fields = {"labels": None} | dict(saved)
    return TokenRows(**fields | {"num_truncated": int(fields["num_truncated"])})


def train_rounds(
    objective, params, batch_at, *, num_steps: int, frozen=(), num_seeds: int = 1
) -> Round:
    """The product's own train step, its loader in front: `num_steps` of it, real tokens counted."""
    import jax

    from tinybert_jax.batches import loader
    from tinybert_jax.config.compute import MeshSection
    from tinybert_jax.parallel import sharding
    from tinybert_jax.parallel.mesh import make_mesh
    from tinybert_jax.training.members import join_optimizer
    from tinybert_jax.training.optimizer import make_optimizer, make_schedule
    from tinybert_jax.training.step import init_state, make_train_step

    mesh = make_mesh(MeshSection())
    schedule = make_schedule(
        "constant", learning_rate=LEARNING_RATE, num_steps=10**6, warmup_steps=0
    )
    optimizer = join_optimizer(make_optimizer(schedule), objective.members)
    frozen = jax.device_put(frozen)
    key = jax.random.key(0)
    keys = jax.random.split(key, num_seeds) if num_seeds > 1 else key
    state = init_state(params, optimizer, keys, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(objective, optimizer, schedule, mesh, placed, num_steps=10**6)
    batches = loader.prefetched(batch_at, start_step=0, placement=sharding.batch_sharding(mesh))

    def run() -> tuple[float, float]:
        nonlocal state
        num_tokens = []
        begin = time.perf_counter()
        for _ in range(num_steps):
            state, metrics = step(state, next(batches), frozen)
            num_tokens.append(metrics["num_tokens"])
        jax.block_until_ready(state)
        return sum(map(int, num_tokens)), time.perf_counter() - begin

    return run


def trainer_rounds(
    model, examples: list, collator, tokenizer, *, num_steps: int, batch_size: int, **options
) -> Round:
    """transformers' Trainer with the same optimizer: `num_steps` steps between two more."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    begins: list[float] = []
    num_tokens: list[int] = []

    class Timed(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            begins.append(time.perf_counter())
            num_tokens.append(int(inputs["attention_mask"].sum()))
            return super().training_step(model, inputs, *args, **kwargs)

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch_size,
        max_steps=num_steps + 2,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        adam_epsilon=1e-6,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = Timed(
        model, arguments, train_dataset=examples, data_collator=collator, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)

    def run() -> tuple[float, float]:
        begins.clear()
        num_tokens.clear()
        trainer.train()
        return sum(num_tokens[1:-1]), begins[-1] - begins[1]

    return run


def _ask(pipe, go_on: bool):
    pipe.send(go_on)
    return pipe.recv()


def _serve(pipe, make_round: Callable[..., Round], arguments: tuple) -> None:
    run = make_round(*arguments)
    try:
        while pipe.recv():
            pipe.send(run())
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    except (EOFError, BrokenPipeError):  # another side failed
        pass
