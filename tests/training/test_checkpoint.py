"""Checkpoints are restored bit-exactly; damaged checkpoints are renamed and skipped."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinybert_jax.training import checkpoint


def _tree(value=0.0):
    return {
        "w": jnp.arange(2048, dtype=jnp.float32) + value,
        "n": {"count": jnp.int32(7)},
        "key": jax.random.key(3),
    }


def _abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def _array_file(step_folder):
    """The largest data file: the one that holds `w`."""
    files = [p for p in (step_folder / "state").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def test_save_and_restore_are_bit_exact_with_key_and_meta(tmp_path):
    tree = _tree(0.1)
    checkpoint.save(tmp_path / "c", 5, tree, {"best_score": 0.5})
    restored = checkpoint.restore_newest(tmp_path / "c", _abstract(tree))
    assert restored.step == 5 and restored.meta == {"best_score": 0.5}
    assert np.array_equal(restored.tree["w"], tree["w"])
    draw = lambda key: jax.random.normal(key, (3,))  # noqa: E731
    assert np.array_equal(draw(restored.tree["key"]), draw(tree["key"]))


def test_a_folder_without_checkpoints_gives_none(tmp_path):
    assert checkpoint.restore_newest(tmp_path / "c", _abstract(_tree())) is None


def test_only_the_newest_checkpoints_are_kept_and_partial_ones_are_removed(tmp_path):
    folder = tmp_path / "c"
    (folder / "partial-9").mkdir(parents=True)
    for step in (1, 2, 10):
        checkpoint.save(folder, step, _tree(step), {}, keep=2)
    assert checkpoint.steps(folder) == [2, 10]
    assert not (folder / "partial-9").exists()
    assert float(checkpoint.restore_newest(folder, _abstract(_tree())).tree["w"][0]) == 10


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_checkpoint_is_renamed_and_the_previous_one_restored(tmp_path, damage):
    folder = tmp_path / "c"
    for step in (1, 2):
        checkpoint.save(folder, step, _tree(step), {})
    file = _array_file(folder / "2")
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "delete":
        file.unlink()
    else:
        (folder / "2" / "manifest.json").write_text("{")
    with pytest.warns(UserWarning, match="renamed to damaged-2"):
        restored = checkpoint.restore_newest(folder, _abstract(_tree()))
    assert restored.step == 1 and float(restored.tree["w"][0]) == 1
    assert (folder / "damaged-2").is_dir()


def test_checkpoints_after_a_step_are_discarded(tmp_path):
    folder = tmp_path / "c"
    for step in (3, 5):
        checkpoint.save(folder, step, _tree(step), {})
    checkpoint.discard_after(folder, 4)
    assert checkpoint.restore_newest(folder, _abstract(_tree())).step == 3


@pytest.mark.parametrize("change", ["unstacked layers", "shape"])
def test_a_checkpoint_with_other_arrays_is_refused_and_kept(tmp_path, change):
    """Such as a checkpoint of a version that stacks layers differently."""
    folder, tree = tmp_path / "stage" / "last", _tree()
    checkpoint.save(folder, 1, tree, {})
    other = tree | {"w": (tree["w"],) if change == "unstacked layers" else tree["w"][:5]}
    with pytest.raises(ValueError, match="expected the arrays that this version trains") as raised:
        checkpoint.restore_newest(folder, _abstract(other))
    assert f"delete {folder.parent} to train" in str(raised.value)
    if change == "shape":
        assert "got others (w has shape (2048,), not (5,))" in str(raised.value)
    assert checkpoint.steps(folder) == [1]


def test_files_are_hashed_in_blocks(tmp_path, monkeypatch):
    def refuse(path):
        raise AssertionError(f"{path} is read into memory")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    checkpoint.save(tmp_path / "c", 1, _tree(), {})
    assert checkpoint.restore_newest(tmp_path / "c", _abstract(_tree())).step == 1


def test_a_checkpoint_that_is_read_is_not_removed(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, _tree(step), {}, keep=9)
    with checkpoint.pinned(tmp_path / "1"):
        assert checkpoint.prune(tmp_path, last=1) == [2]
    assert checkpoint.prune(tmp_path, last=1) == [1]
    with pytest.raises(FileNotFoundError), checkpoint.pinned(tmp_path / "1"):
        pass


def test_a_checkpoint_that_is_read_is_replaced(tmp_path):
    """As where a resumed run saves a step again while it is copied."""
    checkpoint.save(tmp_path, 1, _tree(1), {})
    with pytest.raises(FileNotFoundError, match="replaced meanwhile"):  # the reader learns of it
        with checkpoint.pinned(tmp_path / "1"):
            checkpoint.save(tmp_path, 1, _tree(7), {})
            raise ValueError("files differ from their hashes")
    assert float(checkpoint.restore_newest(tmp_path, _abstract(_tree())).tree["w"][0]) == 7
    checkpoint.save(tmp_path, 2, _tree(2), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_multiples_and_named_steps_are_kept(tmp_path):
    for step in range(1, 9):
        (tmp_path / str(step)).mkdir()
    assert checkpoint.prune(tmp_path, last=2, every=3, also=[1]) == [2, 4, 5]
    assert checkpoint.steps(tmp_path) == [1, 3, 6, 7, 8]


def test_a_checkpoint_of_version_0_1_is_restored(tmp_path):
    """Its manifest holds the hashes of files alone."""
    checkpoint.save(tmp_path, 1, _tree(1), {})
    manifest = tmp_path / "1" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())["files"]))
    assert checkpoint.restore_newest(tmp_path, _abstract(_tree())).step == 1


def test_arrays_that_were_wrong_before_they_were_written_are_found(tmp_path):
    checkpoint.save(tmp_path, 1, _tree(1), {})
    manifest = tmp_path / "1" / "manifest.json"
    found = json.loads(manifest.read_text())
    found["arrays"]["w"] = "0" * 64
    manifest.write_text(json.dumps(found))
    with pytest.warns(UserWarning, match="arrays differ from manifest.json: .'w'"):
        assert checkpoint.restore_newest(tmp_path, _abstract(_tree())) is None
