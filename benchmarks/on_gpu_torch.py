"""The PyTorch sides of benchmarks/on_gpu.py: transformers' BERT, compiled, in bf16 autocast."""

import itertools
import time
from collections.abc import Callable

import numpy as np
import sides
from on_gpu_work import MASK_RATE, MASK_TOKEN_ID, Ready, Settings, Work, token_ids


def torch_distill(work: Work, settings: Settings) -> Ready:
    import torch

    device = _torch_device(settings.tiny)
    teacher = _torch_model("AutoModel", work.teacher, device, "scores")
    student = _torch_model("AutoModel", work.student, device, "scores")
    fit = torch.nn.Linear(student.config.hidden_size, teacher.config.hidden_size, device=device)
    teacher.to(torch.bfloat16).eval().requires_grad_(False)
    student.train()
    given = [torch.from_numpy(ids).long().to(device) for ids in token_ids(work)]
    teach, learn = make_torch_losses(student, teacher, fit, is_bf16=True)
    trained = [*student.parameters(), *fit.parameters()]

    def make_loss(compiled: Callable) -> Callable:
        compiled_teach, compiled_learn = compiled(teach), compiled(learn)

        def loss(ids):
            with torch.no_grad():
                targets = compiled_teach(ids)
            return compiled_learn(ids, targets)

        return loss

    return _torch_rounds(make_loss, trained, [(ids,) for ids in given], work, settings, device)


def make_torch_losses(student, teacher, fit, *, is_bf16: bool) -> tuple[Callable, Callable]:
    """teach(ids) -> (hidden states, score maps) of the mapped layers; learn(ids, those) -> loss.

    The bf16 teacher needs no autocast.
    """
    import torch

    mse = torch.nn.functional.mse_loss
    stride = teacher.config.num_hidden_layers // student.config.num_hidden_layers
    device_type = fit.weight.device.type

    def taps(model, ids):
        scores: list = []  # the attention of each layer appends its own
        hidden = [model.embeddings(input_ids=ids)]
        for layer in model.encoder.layer:
            hidden.append(layer(hidden[-1], scores=scores))
        return hidden, scores

    def teach(ids):
        hidden, scores = taps(teacher, ids)
        return hidden[::stride], scores[stride - 1 :: stride]

    def learn(ids, targets):
        hidden_t, scores_t = targets
        with torch.autocast(device_type, torch.bfloat16, enabled=is_bf16):
            hidden, scores = taps(student, ids)
            attention = [mse(s.float(), t.float()) for s, t in zip(scores, scores_t, strict=True)]
            states = [mse(fit(s).float(), t.float()) for s, t in zip(hidden, hidden_t, strict=True)]
            return sum(attention) + sum(states)

    return teach, learn


def torch_mlm(work: Work, settings: Settings, gathered: bool) -> Ready:
    import torch

    device = _torch_device(settings.tiny)
    model = _torch_model("AutoModelForMaskedLM", work.student, device, "sdpa")
    model.train()
    num_masked = max(round(MASK_RATE * work.width), 1)
    generator = np.random.default_rng(1)
    given = []
    for ids in token_ids(work):
        order = generator.permuted(np.tile(np.arange(work.width), (len(ids), 1)), axis=1)
        places = np.sort(order[:, :num_masked], axis=1)
        masked, labels = ids.copy(), np.full_like(ids, -100)
        np.put_along_axis(labels, places, np.take_along_axis(ids, places, 1), 1)
        np.put_along_axis(masked, places, MASK_TOKEN_ID, 1)
        arrays = (masked, labels)
        if gathered:
            flat = (places + work.width * np.arange(len(ids))[:, None]).ravel()
            arrays = (masked, labels.ravel()[flat], flat)
        given.append(tuple(torch.from_numpy(array).long().to(device) for array in arrays))

    def whole(ids, labels):
        with torch.autocast(device.type, torch.bfloat16):
            return model(input_ids=ids, labels=labels).loss

    def at_masked(ids, labels, places):
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.bert(input_ids=ids).last_hidden_state
            logits = model.cls(hidden.flatten(0, 1)[places])
            return torch.nn.functional.cross_entropy(logits.float(), labels)

    loss = at_masked if gathered else whole
    return _torch_rounds(
        lambda compiled: compiled(loss), list(model.parameters()), given, work, settings, device
    )


def _torch_device(tiny: bool):
    import torch

    if tiny:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("expected a GPU, got none; give --tiny for a trial without")
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")


def _torch_model(kind: str, sizes: dict[str, int], device, attention: str):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.AttentionInterface.register("scores", _attention_that_tells)
    options = {"add_pooling_layer": False} if kind == "AutoModel" else {}
    torch.manual_seed(0)
    with device:
        return getattr(transformers, kind).from_config(
            transformers.BertConfig(**{"vocab_size": 30522} | sizes),
            attn_implementation=attention,
            dtype=torch.float32,
            **options,
        )


def _attention_that_tells(
    module, query, key, value, attention_mask, scaling, dropout=0.0, *, scores, **unused
):
    """transformers' eager attention without a mask; appends its raw scores to the list `scores`."""
    import torch

    raw = torch.matmul(query, key.transpose(2, 3)) * scaling
    scores.append(raw)
    weights = torch.nn.functional.dropout(raw.softmax(-1), dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def _torch_rounds(
    make_loss: Callable, trained: list, given: list[tuple], work: Work, settings: Settings, device
) -> Ready:
    """`make_loss(compiled)` makes the loss with `compiled` around each function to compile."""
    import torch

    optimizer = torch.optim.AdamW(
        trained, lr=sides.LEARNING_RATE, weight_decay=0.01, eps=1e-6, fused=True
    )
    loss, note = make_loss(lambda function: function), "eager"
    if not settings.tiny:
        loss, note = _torch_compiled(make_loss, loss, given[0])
    optimizer.zero_grad()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    batches = itertools.cycle(given)

    def run() -> tuple[float, float]:
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(settings.num_steps):
            loss(*next(batches)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        return settings.num_steps * work.batch_size * work.width, seconds

    def told() -> tuple[str, int | None]:
        if not on_gpu:
            return "cpu", None
        return torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()

    return Ready(run, told, note)


def _torch_compiled(make_loss: Callable, eager: Callable, batch: tuple) -> tuple[Callable, str]:
    """The compiled loss, tried forwards and backwards; or `eager`, and a note that says why."""
    import torch
    from torch._dynamo.utils import counters

    try:
        loss = make_loss(lambda function: torch.compile(function, dynamic=False))
        loss(*batch).backward()
    except Exception as error:  # a peer in eager mode is a figure too, as long as it says so
        torch._dynamo.reset()
        first_line = (str(error).strip() or "no message").split("\n")[0][:120]
        return eager, f"EAGER, compile failed: {type(error).__name__}: {first_line}"
    breaks = sum(counters["graph_break"].values())
    return loss, "compiled" + (f", {breaks} graph breaks" if breaks else "")
