"""Compiles our training steps for TPUs that are not here, and prints what the compiler expects.

    python benchmarks/ahead_of_time.py [--runs runs/ahead-of-time] [--only WORD]

Needs the extra `tpu`. Distillation of BERT-base into tinybert-4l-312d and masked LM of that
student, bfloat16, 64 rows of 128 tokens a chip. Cycles are those that the compiler of TPUs
estimates, a model of time: it knows neither collectives nor waits for memory. A line that is there
already, in the folder of --runs, is only printed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROWS, WIDTH, CHUNK_SIZE, MASK_RATE = 64, 128, 4096, 0.15
SPECIAL_TOKEN_IDS, MASK_TOKEN_ID = (0, 101, 102, 103), 103
TINY = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
# (work, topology, layers)
LINES = [
    (work, topology, layers)
    for topology in ("v5e:4x4", "v6e:4x4")
    for work in ("distill", "mlm")
    for layers in ("loop", "unrolled")
]
COLUMNS = ("step", "topology", "layers", "Mcycles", "products", "copies", "temporaries")
COLUMNS += ("gradients", "reduced", "of it bf16", "compiled in")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/ahead-of-time"))
    parser.add_argument("--only", default="", help="lines with this word")
    parser.add_argument("--line", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.line:
        print(json.dumps(compile_line(*args.line)))
        return
    args.runs.mkdir(parents=True, exist_ok=True)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for line in LINES:
        name = re.sub(r"\W", "-", "-".join(line))
        file = args.runs / f"{name}.json"
        if args.only not in name:
            continue
        if not file.is_file():  # a process for each: libtpu compiles for one topology
            command = [sys.executable, __file__, "--line", *line]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            file.write_text(done.stdout.splitlines()[-1])
        print(f"| {' | '.join([*line, *cells(json.loads(file.read_text()))])} |", flush=True)


def cells(found: dict[str, Any]) -> list[str]:
    total = found["cycles"]
    return [
        f"{total / 1e6:.1f}",
        f"{found['kinds'].get('product', 0) / total:.0%}",
        f"{found['kinds'].get('copy', 0) / total:.0%}",
        f"{found['temporaries'] / 1e6:,.0f} MB",
        f"{found['gradients'] / 1e6:.1f} MB",
        f"{sum(found['reduced'].values()) / 1e6:.1f} MB",
        f"{found['reduced'].get('bf16', 0) / 1e6:.1f} MB",
        f"{found['seconds']:.0f} s",
    ]


def compile_line(work: str, topology: str, layers: str, tiny: bool = False) -> dict[str, Any]:
    """Figures of the step of one device."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the devices to compile for are not here
    import jax

    from tinybert_jax.config.compute import MeshSection
    from tinybert_jax.parallel.mesh import make_mesh
    from tinybert_jax.performance import hlo
    from tinybert_jax.runs.topologies import devices_of

    mesh = make_mesh(MeshSection(), devices_of(topology))
    state, step = make_step(work, mesh, unroll=layers == "unrolled", tiny=tiny)
    begin = time.perf_counter()
    compiled = step()
    program = hlo.read(compiled.as_text())
    return {
        "seconds": time.perf_counter() - begin,
        "cycles": program.estimated_cycles(),
        "kinds": program.cycles_by_kind(),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "gradients": sum(4 * leaf.size for leaf in jax.tree.leaves(state.params)),
        "reduced": program.reduced_bytes(),
    }


def make_step(work: str, mesh: Any, *, unroll: bool, tiny: bool) -> Any:
    """(abstract state, function that compiles the step)."""
    import jax

    from tinybert_jax.models.params import unstack_layers
    from tinybert_jax.parallel import sharding
    from tinybert_jax.training import optimizer as optimizers
    from tinybert_jax.training.members import join_optimizer
    from tinybert_jax.training.step import abstract_state, make_train_step

    objective, init, frozen = make_objective(work, mesh, unroll=unroll, tiny=tiny)
    schedule = optimizers.make_schedule(
        "constant", learning_rate=1e-4, num_steps=10**6, warmup_steps=0
    )
    optimizer = join_optimizer(optimizers.make_optimizer(schedule), objective.members)
    key = jax.random.key(0)
    params = jax.eval_shape(lambda k: unstack_layers(init(k)) if unroll else init(k), key)
    state = abstract_state(params, optimizer, key, mesh)
    places = sharding.named_shardings(sharding.param_specs(frozen, mesh), mesh)
    frozen = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        frozen,
        places,
    )
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(objective, optimizer, schedule, mesh, placed, num_steps=10**6)
    return state, lambda: step.compile(state, make_batch(mesh), frozen)


def make_objective(work: str, mesh: Any, *, unroll: bool, tiny: bool) -> Any:
    """(objective, init of the trained parameters, the teacher's abstract parameters)."""
    import jax
    import jax.numpy as jnp

    from tinybert_jax.config.distillation import DistillSection
    from tinybert_jax.models.heads import make_encoder, make_masked_lm
    from tinybert_jax.models.params import frozen_params
    from tinybert_jax.objectives.alignment import init_projection
    from tinybert_jax.objectives.distillation import Options, Role, make_distill
    from tinybert_jax.objectives.masked_lm import make_mlm
    from tinybert_jax.parallel.mesh import num_batch_shards
    from tinybert_jax.settings.sizes import PRESETS, ModelConfig
    from tinybert_jax.terms.table import reads_of

    options: dict[str, Any] = {"unroll": unroll, "dtype": jnp.bfloat16}
    small = {**TINY, "hidden_size": 32, "vocab_size": 1200} if tiny else {}
    student = ModelConfig(**PRESETS["tinybert-4l-312d"] | small)
    shards = num_batch_shards(mesh)
    if work == "mlm":
        apply, init = make_masked_lm(student, **options)
        objective = make_mlm(
            apply,
            mask_rate=MASK_RATE,
            mask_token_id=MASK_TOKEN_ID,
            special_token_ids=SPECIAL_TOKEN_IDS,
            vocab_size=student.vocab_size,
            max_chunk_size=CHUNK_SIZE,
            num_shards=shards,
        )
        return objective, init, ()
    wide = {**small, "hidden_size": 64} if tiny else {}
    teacher = ModelConfig(**PRESETS["bert-base"] | wide)
    terms = DistillSection().terms("general")
    apply, init = make_encoder(student, **options)
    teacher_apply, teacher_init = make_encoder(teacher, **options)
    frozen = jax.eval_shape(
        lambda k: frozen_params(teacher_init(k), dtype=jnp.bfloat16, unroll=unroll),
        jax.random.key(0),
    )
    objective = make_distill(
        Role(apply, reads_of(terms), student.num_hidden_layers),
        Role(teacher_apply, reads_of(terms, of_teacher=True), teacher.num_hidden_layers),
        terms,
        Options(num_shards=shards),
    )

    def start(key: jax.Array) -> Any:
        projection = init_projection(key, student.hidden_size, teacher.hidden_size, 1)
        return {"student": init(key), "projection": projection}

    return objective, start, frozen


def make_batch(mesh: Any) -> Any:
    """The abstract batch of all devices."""
    import jax
    import jax.numpy as jnp

    from tinybert_jax.batches.batch import Batch
    from tinybert_jax.models.inputs import Text
    from tinybert_jax.parallel import sharding

    def leaf(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        place = sharding.batch_sharding(mesh)
        return jax.ShapeDtypeStruct((ROWS * mesh.size, *shape), dtype, sharding=place)

    ids = leaf(jnp.int32, WIDTH)
    return Batch(Text(ids, ids), leaf(bool, WIDTH), {"labels": leaf(jnp.int32)}, leaf(jnp.float32))


if __name__ == "__main__":
    main()
