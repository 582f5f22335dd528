"""Many students from one pass of a BERT-base teacher, against a run for each of them.

    TEACHER=<folder with BERT's tokenizer> TINYBERT_DATA=<data> python benchmarks/many_students.py

Seconds a step of TinyBERT's layer losses (attention, hidden states, embeddings) in fp32, with
dropout, clipping and AdamW, on SST-2's real lengths, --examples a step packed into rows of 64. All
from random weights: what a step costs does not depend on them. The last lines say what four sizes
in one pass cost of four runs, and 8 seeds of tinybert-4l-312d of one. Each figure is the median of
rounds that the sides run in turn, each in a process of its own.
"""

import argparse
import tempfile
from pathlib import Path

import finetune
import sides

WIDTH, NUM_SEEDS = 64, 8
PRESET = "tinybert-4l-312d"
FAMILY = ("2l-192d", "3l-192d", PRESET, "6l-384d")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="in a round of every side")
    parser.add_argument("--examples", type=int, default=160, help="a step, on average")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.npz"
        sides.save_rows(rows, finetune.read_rows())
        given = (rows, args.examples, args.steps)
        compared: dict = {f"{name} alone": (students, (*given, (name,), 1)) for name in FAMILY}
        compared["the four in one pass"] = students, (*given, FAMILY, 1)
        seeds = f"{NUM_SEEDS} seeds of {PRESET} in one pass"
        compared[seeds] = students, (*given, (PRESET,), NUM_SEEDS)
        results = sides.compare(compared, args.rounds)
    print(f"BERT-base into {', '.join(FAMILY)}; {args.examples} examples a step")
    for name, result in results.items():
        print(f"  {name:<44} {1 / result.rate:7.2f} s a step   peak {result.peak_mib:7,.0f} MiB")
    seconds = {name: 1 / result.rate for name, result in results.items()}
    four = sum(seconds[f"{name} alone"] for name in FAMILY)
    print(f"the four in one pass: {seconds['the four in one pass'] / four:.0%} of four runs")
    print(f"{NUM_SEEDS} seeds: {seconds[seeds] / seconds[f'{PRESET} alone']:.2f} times one")


def students(
    path: Path, num_examples: int, num_steps: int, names: tuple[str, ...], num_seeds: int
) -> sides.Round:
    from tinybert_jax.performance import host

    host.keep_freed_memory()  # as the command does, before the first thread
    import jax
    import jax.numpy as jnp

    from tinybert_jax.batches import loader
    from tinybert_jax.batches.packing import packed_epochs
    from tinybert_jax.config.distillation import DistillSection
    from tinybert_jax.config.models import SOLE
    from tinybert_jax.models.heads import make_encoder
    from tinybert_jax.models.params import frozen_params, unstack_layers
    from tinybert_jax.objectives.alignment import init_projection
    from tinybert_jax.objectives.distillation import Role, make_distill
    from tinybert_jax.settings.sizes import PRESETS, ModelConfig
    from tinybert_jax.terms.table import reads_of
    from tinybert_jax.training.members import join_objectives, merge_members

    terms = DistillSection().terms("general")
    teacher = ModelConfig(**PRESETS["bert-base"])
    teacher_apply, teacher_init = make_encoder(teacher, unroll=True)
    objectives, params = {}, {}
    for name in names:
        sizes = _sizes(name)
        apply, init = make_encoder(sizes, unroll=True)
        member = name if len(names) > 1 else SOLE
        objectives[member] = make_distill(
            Role(apply, reads_of(terms), sizes.num_hidden_layers),
            Role(teacher_apply, reads_of(terms, of_teacher=True), teacher.num_hidden_layers),
            terms,
        )
        keys = jax.random.split(jax.random.key(1), num_seeds)

        def start(key, init=init, sizes=sizes):
            projection = init_projection(key, sizes.hidden_size, teacher.hidden_size, 1)
            return unstack_layers({"student": init(key), "projection": projection})

        every = [start(key) for key in keys]
        params[member] = (
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *every) if num_seeds > 1 else every[0]
        )
    rows = sides.load_rows(path)
    epochs = packed_epochs(rows.lengths, width=WIDTH, global_batch_size=num_examples, seed=(0,))
    run = sides.train_rounds(
        join_objectives(objectives),
        merge_members(params),
        loader.planned_batches(rows, epochs, pad_token_id=0),
        num_steps=num_steps,
        frozen=frozen_params(teacher_init(jax.random.key(0)), dtype=jnp.float32, unroll=True),
        num_seeds=num_seeds,
    )
    return lambda: (num_steps, run()[1])


def _sizes(name: str):
    """TinyBERT's own for the preset's name; else 12 heads and 4 times the width inside."""
    from tinybert_jax.settings.sizes import PRESETS, ModelConfig

    if name in PRESETS:
        return ModelConfig(**PRESETS[name])
    layers, width = (int(number[:-1]) for number in name.split("-"))
    return ModelConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=12,
    )


if __name__ == "__main__":
    main()
