"""Shapes of machines: chips, hosts and names agree with the vendors' tables."""

import math

import pytest

from tinybert_jax.performance import accelerators

# (shape, hosts, machine type of GKE, accelerator type of the Cloud TPU API), from Google's tables.
SLICES = [
    ("v4:2x2x1", 1, "ct4p-hightpu-4t", "v4-8"),
    ("v4:2x2x4", 4, "ct4p-hightpu-4t", "v4-32"),
    ("v4:4x4x8", 32, "ct4p-hightpu-4t", "v4-256"),
    ("v5e:1x1", 1, "ct5lp-hightpu-1t", "v5litepod-1"),
    ("v5e:2x4", 1, "ct5lp-hightpu-8t", "v5litepod-8"),
    ("v5e:4x4", 4, "ct5lp-hightpu-4t", "v5litepod-16"),
    ("v5e:16x16", 64, "ct5lp-hightpu-4t", "v5litepod-256"),
    ("v5p:2x2x1", 1, "ct5p-hightpu-4t", "v5p-8"),
    ("v5p:4x4x4", 16, "ct5p-hightpu-4t", "v5p-128"),
    ("v5p:16x16x24", 1536, "ct5p-hightpu-4t", "v5p-12288"),
    ("v6e:2x2", 1, "ct6e-standard-4t", "v6e-4"),
    ("v6e:8x16", 32, "ct6e-standard-4t", "v6e-128"),
]


@pytest.mark.parametrize("text, hosts, machine, name", SLICES, ids=[s[0] for s in SLICES])
def test_slices(text, hosts, machine, name):
    machines = accelerators.read(text, num_slices=3)
    assert machines.hosts_per_slice == hosts
    assert machines.num_chips == 3 * math.prod(map(int, text.split(":")[1].split("x")))
    assert (machines.machine_type, machines.accelerator_type) == (machine, name)


@pytest.mark.parametrize(
    "text, per_host, hosts, chips_per_host, machine",
    [
        ("a100:16", None, 2, 8, "a2-highgpu-8g"),
        ("a100-80gb:2", None, 1, 2, "a2-ultragpu-2g"),
        ("h100:8", 4, 2, 4, "a3-highgpu-4g"),
        ("h200:64", None, 8, 8, "a3-ultragpu-8g"),
        ("b200:8", None, 1, 8, "a4-highgpu-8g"),
    ],
)
def test_gpus(text, per_host, hosts, chips_per_host, machine):
    machines = accelerators.read(text, gpus_per_host=per_host)
    assert (machines.num_hosts, machines.chips_per_host) == (hosts, chips_per_host)
    assert machines.machine_type == machine
    assert machines.has_whole_hosts == (chips_per_host == (per_host or 8))


@pytest.mark.parametrize(
    "text, options, named",
    [
        ("v5:4x4", {}, ("v5e", "h100", "'v5:4x4'", "write it as")),
        ("cpu", {}, ("v5e", "'cpu'")),
        ("v5e", {}, ("a topology that is a product", "''", "v5e:4x4")),
        ("v5e:16", {}, ("a topology that is a product", "'16'")),
        ("v5e:4x", {}, ("'4x'",)),
        ("v5e:3x5", {}, ("16x16", "'3x5'", "choose one")),
        ("v5e:4x4x4", {}, ("8x16", "'4x4x4'")),
        ("v5p:4x4", {}, ("multiples of 4", "'4x4'", "v5p:4x4x4")),
        ("v5p:8x4x4", {}, ("A ≤ B ≤ C", "'8x4x4'")),
        ("v4:16x16x20", {}, ("64 cubes", "'16x16x20'")),
        ("v4:0x0x0", {}, ("'0x0x0'",)),
        ("h100:12", {}, ("at most 8 or a multiple", "'12'")),
        ("h100:two", {}, ("a number of GPUs", "'two'", "h100:8")),
        ("h100:-8", {}, ("'-8'",)),
        ("h100:8", {"num_slices": 2}, ("--slices", "h100:8")),
        ("v5e:4x4", {"gpus_per_host": 4}, ("--gpus-per-host", "4", "remove it")),
        ("v5e:4x4", {"num_slices": 0}, ("at least 1", "0")),
    ],
)
def test_shapes_that_do_not_exist(text, options, named):
    with pytest.raises(ValueError) as error:
        accelerators.read(text, **options)
    for part in ("expected", "got", *named):
        assert part in str(error.value)


def test_a_number_of_gpus_that_no_machine_has():
    machines = accelerators.read("h200:4")
    with pytest.raises(ValueError, match="expected 8 GPUs of h200 on each host.*got 4"):
        _ = machines.machine_type
