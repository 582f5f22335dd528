"""How the mesh splits kernels, and that a step on a split model is the step of one device."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinybert_jax.batches.batch import Batch
from tinybert_jax.config.compute import MeshSection
from tinybert_jax.models.heads import make_classifier
from tinybert_jax.models.inputs import Text
from tinybert_jax.models.params import unstack_layers
from tinybert_jax.objectives.supervised import make_supervised
from tinybert_jax.parallel import sharding
from tinybert_jax.parallel.mesh import make_mesh
from tinybert_jax.settings.sizes import ModelConfig
from tinybert_jax.training.step import init_state, make_train_step

SIZES = ModelConfig(
    vocab_size=52,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=32,
    max_position_embeddings=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
INWARDS = ("attention/query", "attention/key", "attention/value", "intermediate")
OUTWARDS = ("attention/output", "output")
# A map that reads what another one has split is split by the dim that it reads.
KERNEL_DIMS = {name: ("fsdp", "tensor") for name in INWARDS} | {
    name: ("tensor", "fsdp") for name in OUTWARDS
}


@dataclasses.dataclass(frozen=True)
class _Chip:
    """As much of a device as a mesh asks for."""

    slice_index: int
    process_index: int
    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


_TWO_SLICES = [_Chip(i // 8, i // 4, i) for i in range(16)]  # two hosts of four chips each


def test_data_runs_over_slices_and_the_other_axes_stay_within_one():
    mesh = make_mesh(MeshSection(fsdp=2, tensor=2), random.Random(0).sample(_TWO_SLICES, 16))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 2}
    for number, inner in enumerate(mesh.devices.reshape(4, -1)):
        assert {(chip.slice_index, chip.process_index) for chip in inner} == {(number // 2, number)}


@pytest.mark.parametrize(
    "axes, named",
    [
        ({"dcn_data": 4}, ("mesh.dcn_data", "expected 2", "got 4")),
        ({"fsdp": 16}, ("multiple of the 2 slices", "data 1, fsdp 16")),
    ],
)
def test_slices_that_the_mesh_does_not_fit_are_refused(axes, named):
    with pytest.raises(ValueError) as raised:
        make_mesh(MeshSection(**axes), _TWO_SLICES)
    assert all(part in str(raised.value) for part in named)


def test_dcn_data_divides_the_data_axis_of_devices_without_slices():
    assert make_mesh(MeshSection(dcn_data=4)).shape["data"] == 8
    with pytest.raises(ValueError, match="multiple of the 3 slices"):
        make_mesh(MeshSection(dcn_data=3))


def _node(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


@pytest.mark.parametrize("name", KERNEL_DIMS)
@pytest.mark.parametrize("is_apart", [False, True])
def test_tensor_splits_the_columns_of_inward_and_the_rows_of_outward_kernels(name, is_apart):
    """As Megatron-LM does (arXiv 1909.08053): a block then sums over devices once."""
    mesh = make_mesh(MeshSection(fsdp=2, tensor=2))
    params = jax.eval_shape(make_classifier(SIZES, 3).init, jax.random.key(0))
    if is_apart:
        params = jax.eval_shape(unstack_layers, params)
    layers = sharding.param_specs(params, mesh)["encoder"]["layers"]
    for layer in layers if is_apart else [layers]:
        assert tuple(_node(layer, name)["kernel"]) == (None, *KERNEL_DIMS[name])


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"tensor": 2, "fsdp": 2}])
def test_a_step_with_split_kernels_is_that_of_one_device(axes):
    apply, init = make_classifier(SIZES, 3)
    start, optimizer = jax.jit(init)(jax.random.key(0)), optax.sgd(0.1)
    ids = jnp.asarray(np.random.default_rng(0).integers(5, 50, (8, 12)), jnp.int32)
    real = jnp.arange(12)[None] < jnp.arange(5, 13)[:, None]
    batch = Batch(Text(ids, 0 * ids), real, {"labels": ids[:, 0] % 3}, jnp.ones(8))

    def step_on(mesh):
        state = init_state(start, optimizer, jax.random.key(3), mesh)
        for name in OUTWARDS:
            kernel = _node(state.params["encoder"]["layers"], name)["kernel"]
            assert mesh.size == 1 or kernel.sharding.spec[1] == "tensor"
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        objective = make_supervised(apply)
        step = make_train_step(objective, optimizer, lambda _: 0.1, mesh, placed, num_steps=1)
        state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)), ())
        return jax.device_get((state.params, metrics))

    one = step_on(make_mesh(MeshSection(), jax.devices()[:1]))
    eight = step_on(make_mesh(MeshSection(**axes)))
    assert one[1]["grad_norm"] > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), one, eight)


@pytest.mark.parametrize(
    "shape, order",
    [
        ((30522, 312), (1, 0)),  # as libtpu's programs have them
        ((30522, 768), (0, 1)),
        ((512, 312), (1, 0)),
        ((312, 312), (0, 1)),
        ((4, 1200, 312), (0, 2, 1)),
        ((1, 312, 1200), (0, 1, 2)),
        ((312,), (0,)),
        ((), ()),
    ],
)
def test_tpus_store_the_smaller_of_a_matrix_and_its_transpose(shape, order):
    assert sharding.stored_order(shape) == order


def test_gradients_have_the_layout_of_their_parameters_on_tpus_alone(monkeypatch):
    grads = {"table": jnp.ones((300, 8)), "bias": jnp.ones(8), "head": jnp.ones((300, 3))}
    mesh, split = make_mesh(MeshSection()), make_mesh(MeshSection(fsdp=2))
    assert sharding.in_stored_layout(grads, mesh) is grads
    monkeypatch.setattr(sharding, "platform_of", lambda mesh: "tpu")
    assert sharding.in_stored_layout(grads, split) is grads, "the constraint would gather them"
    lowered = jax.jit(lambda tree: sharding.in_stored_layout(tree, mesh)).lower(grads).as_text()
    assert lowered.count("LayoutConstraint") == 1 and "dense<[0, 1]>" in lowered
