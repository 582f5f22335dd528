"""TinyBERT's layer losses on SST-2's real lengths: our distillation against PyTorch, one run.

    TEACHER=<all-MiniLM-L6-v2 folder> TINYBERT_DATA=<data> python benchmarks/distill.py

Real tokens (no padding) per second of a whole step: the teacher's pass, the student's with dropout,
attention, hidden-state and embedding losses, gradient, clipping and AdamW, 32 examples a step
(packed: on average). `--pair minilm`: all-MiniLM-L6-v2 into 3 layers × 192; `bert-base`: that size
into tinybert-4l-312d, both from random weights with the folder's vocabulary.
PyTorch runs transformers' models with the losses of the released TinyBERT code, on the very batches
that our padded side sees, made inside its clock (ours are made while the step before runs); what
the first step says without dropout is printed of both.
Each figure is the median of rounds that the sides run in turn, each in a process of its own.
"""

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path

import finetune
import numpy as np
import sides

BATCH_SIZE = 32
STUDENTS = {
    "minilm": {
        "num_hidden_layers": 3,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_attention_heads": 12,
    },
    "bert-base": "tinybert-4l-312d",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pair", choices=STUDENTS, default="minilm")
    parser.add_argument("--width", type=int, default=64, help="of padded and of packed rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of our packed sides in a round")
    parser.add_argument("--padded-steps", type=int, default=5, help="of the padded sides")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sides.save_rows(folder / "rows.npz", finetune.read_rows())
        make_models(folder, args.pair)
        padded = (folder, args.width, args.padded_steps)
        packed = (folder, args.width, args.steps)
        results = sides.compare(
            {
                f"ours fp32, packed rows of {args.width}": (ours, (*packed, True, None)),
                f"ours fp32, padded to {args.width}": (ours, (*padded, False, None)),
                f"ours bfloat16_products, packed rows of {args.width}": (
                    ours,
                    (*packed, True, "bfloat16"),
                ),
                f"ours fp32, int8 teacher, packed rows of {args.width}": (
                    ours,
                    (*packed, True, None, "int8"),
                ),
                f"PyTorch fp32, padded to {args.width}": (torch_side, (*padded, False)),
                f"PyTorch bf16 autocast, padded to {args.width}": (torch_side, (*padded, True)),
            },
            args.rounds,
        )
    print(f"{args.pair}, layer losses on SST-2, {BATCH_SIZE} examples a step")
    sides.show(results, "real tokens")


def make_models(folder: Path, pair: str) -> None:
    """Teacher, student and projection, the same for all sides."""
    import torch
    import transformers

    from tinybert_jax.settings.sizes import PRESETS

    torch.manual_seed(0)
    teacher = transformers.BertModel.from_pretrained(os.environ["TEACHER"], dtype=torch.float32)
    vocab = {"vocab_size": teacher.config.vocab_size}
    if pair == "bert-base":
        teacher = transformers.BertModel(transformers.BertConfig(**PRESETS["bert-base"], **vocab))
    given = STUDENTS[pair]
    sizes = PRESETS[given] if isinstance(given, str) else given
    student = transformers.BertModel(transformers.BertConfig(**sizes, **vocab))
    teacher.save_pretrained(folder / "teacher")
    student.save_pretrained(folder / "student")
    generator = np.random.default_rng(0)
    dims = student.config.hidden_size, teacher.config.hidden_size
    np.save(folder / "projection.npy", generator.normal(0, dims[0] ** -0.5, dims).astype("f4"))


def batches(folder: Path, width: int, is_packed: bool):
    from tinybert_jax.batches import loader
    from tinybert_jax.batches.bucketing import bucketed_epochs
    from tinybert_jax.batches.packing import packed_epochs

    rows = sides.load_rows(folder / "rows.npz")
    if is_packed:
        epochs = packed_epochs(rows.lengths, width=width, global_batch_size=BATCH_SIZE, seed=(0,))
    else:
        epochs = bucketed_epochs(
            rows.lengths, buckets=(width,), global_batch_size=BATCH_SIZE, seed=(0,)
        )
    return loader.planned_batches(rows, epochs, pad_token_id=0)


def ours(
    folder: Path,
    width: int,
    num_steps: int,
    is_packed: bool,
    product_dtype: str | None,
    teacher_dtype: str | None = None,
) -> sides.Round:
    """`product_dtype`: of both models' products; `teacher_dtype`: of the teacher's, if another."""
    from tinybert_jax.performance import host

    host.keep_freed_memory()  # as the command does, before the first thread
    import jax

    from tinybert_jax.config.distillation import DistillSection
    from tinybert_jax.huggingface.folder import read_model, start_params
    from tinybert_jax.models.heads import make_encoder
    from tinybert_jax.models.params import frozen_params, unstack_layers
    from tinybert_jax.objectives.distillation import Options, Role, make_distill
    from tinybert_jax.terms.table import reads_of

    teacher_dtype = teacher_dtype or product_dtype
    terms = DistillSection().terms("intermediate")

    def model(name: str, own_dtype: str | None):
        config = read_model(folder / name).config
        apply, init = make_encoder(config, unroll=True, product_dtype=own_dtype)
        params = start_params(folder / name, init, jax.random.key(0))
        reads = reads_of(terms, of_teacher=name == "teacher")
        return Role(apply, reads, config.num_hidden_layers), params

    student, params = model("student", product_dtype)
    teacher, frozen = model("teacher", teacher_dtype)
    frozen = frozen_params(
        frozen, dtype=jax.numpy.float32, product_dtype=teacher_dtype, unroll=True
    )
    kernel = np.load(folder / "projection.npy")
    projection = {"kernel": kernel[None], "bias": np.zeros((1, kernel.shape[1]), np.float32)}
    objective = make_distill(
        student,
        teacher,
        terms,
        Options(normalisation="valid_only" if is_packed else "paper_code"),
    )
    start = unstack_layers({"student": params, "projection": projection})
    batch_at = batches(folder, width, is_packed)
    if not is_packed and product_dtype is None:
        first = batch_at(0)
        batch, counts = objective.prepare(first, jax.random.key(0), jax.numpy.zeros(()))

        @jax.jit
        def value(start, frozen):
            targets = objective.targets(batch, frozen)
            return objective.loss(start, batch, counts, None, targets)[0]  # no key: no dropout

        print(f"  first loss, ours    {float(value(start, frozen)):.6f}", flush=True)
    return sides.train_rounds(objective, start, batch_at, num_steps=num_steps, frozen=frozen)


def torch_side(folder: Path, width: int, num_steps: int, is_bf16: bool) -> sides.Round:
    import torch
    import transformers
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **unused):
        scores = torch.matmul(query, key.transpose(2, 3)) * scaling + attention_mask
        module.scores = scores
        weights = torch.nn.functional.dropout(scores.softmax(-1), dropout, module.training)
        return torch.matmul(weights, value).transpose(1, 2).contiguous(), None

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.AttentionInterface.register("scores", attention)
    AttentionMaskInterface.register("scores", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    student, teacher = (
        transformers.BertModel.from_pretrained(
            folder / name, add_pooling_layer=False, attn_implementation="scores"
        )
        for name in ("student", "teacher")
    )
    teacher.eval().requires_grad_(False)
    kernel = torch.tensor(np.load(folder / "projection.npy"))
    fit = torch.nn.Linear(*kernel.shape)
    with torch.no_grad():
        fit.weight.copy_(kernel.T)
        fit.bias.zero_()
    trained = [*student.parameters(), *fit.parameters()]
    optimizer = torch.optim.AdamW(
        trained, lr=sides.LEARNING_RATE, weight_decay=0.01, eps=1e-6, fused=True
    )
    stride = teacher.config.num_hidden_layers // student.config.num_hidden_layers
    mse = torch.nn.functional.mse_loss
    batch_at = batches(folder, width, False)
    steps = itertools.count()

    def taps(model, inputs):
        output = model(**inputs, output_hidden_states=True)
        scores = [layer.attention.self.scores for layer in model.encoder.layer]
        return output.hidden_states, [torch.where(s <= -1e2, 0.0, s) for s in scores]

    def loss(batch) -> torch.Tensor:
        ids, mask = np.array(batch.inputs.input_ids), np.array(batch.attention_mask)
        inputs = {
            "input_ids": torch.from_numpy(ids).long(),
            "attention_mask": torch.from_numpy(mask).long(),
        }
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            with torch.no_grad():
                hidden_t, scores_t = taps(teacher, inputs)
            hidden, scores = taps(student, inputs)
            attention = [
                mse(s, t) for s, t in zip(scores, scores_t[stride - 1 :: stride], strict=True)
            ]
            states = [mse(fit(s), t) for s, t in zip(hidden, hidden_t[::stride], strict=True)]
            return sum(attention) + sum(states)

    if not is_bf16:
        student.eval()
        print(f"  first loss, PyTorch {float(loss(batch_at(0)).detach()):.6f}", flush=True)
    student.train()

    def run() -> tuple[float, float]:
        num_tokens, begin = 0, time.perf_counter()
        for _ in range(num_steps):
            batch = batch_at(next(steps))
            loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            num_tokens += int(np.count_nonzero(batch.attention_mask))
        return num_tokens, time.perf_counter() - begin

    return run


if __name__ == "__main__":
    main()
