"""Checkpoints: whole ones restore every bit, and whatever is not whole is named and passed over."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.runtime import checkpoints, manifest, workdir
from experiments.runtime.checkpoints import CheckpointError, StageCheckpoints


class Position:
    """Stands for a grain iterator: a position in the data."""

    def __init__(self, index=0):
        self.state = {"next_index": index}

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def make_state(step):
    key = jax.random.key(step)
    return {"kernel": jax.random.normal(key, (17, 5)), "count": jnp.int32(step)}


def save(folder, *steps):
    with StageCheckpoints(folder) as stage:
        for step in steps:
            stage.save(step, make_state(step), Position(step))


def restore(folder):
    data = Position()
    with StageCheckpoints(folder) as stage:
        step, state = stage.restore(make_state(0), data)
    return step, state, data.state["next_index"]


def assert_is_step(found, step):
    number, state, index = found
    assert (number, index) == (step, step)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(step))


def flip_a_bit(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def test_the_newest_two_are_kept_and_the_newest_comes_back_bit_for_bit(tmp_path):
    save(tmp_path, 3, 7, 12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["12", "7"]
    assert all(manifest.find_damage(path) is None for path in tmp_path.iterdir())
    assert_is_step(restore(tmp_path), 12)


def test_an_empty_folder_gives_the_start(tmp_path):
    assert_is_step(restore(tmp_path / "new"), 0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What a checkpoint is restored from: its subfolders' files and its manifest, by name."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 1)
    found = [*(folder / "1").glob("*/**/*"), folder / "1" / manifest.NAME]
    return {
        path.relative_to(folder / "1").as_posix(): path.read_bytes()
        for path in found
        if path.is_file()
    }


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_cut_or_missing_file_is_found(files, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert manifest.find_damage(folder) is None
    name = data.draw(st.sampled_from(sorted(name for name in files if files[name])))
    content = bytearray(files[name])
    match data.draw(st.sampled_from(["flip", "cut", "remove"])):
        case "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(
                st.integers(0, 7)
            )
            (folder / name).write_bytes(content)
        case "cut":
            (folder / name).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        case "remove":
            (folder / name).unlink()
    # Blanks of the manifest itself may change without harm.
    harmless = name == manifest.NAME and not any(
        path.read_bytes() != files[path.relative_to(folder).as_posix()]
        for path in folder.rglob("*")
        if path.is_file() and path.name != manifest.NAME
    )
    assert manifest.find_damage(folder) is not None or harmless


@pytest.mark.parametrize("damage", [flip_a_bit, cut, lambda path: path.unlink()])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, damage, capsys):
    save(tmp_path, 4, 8)
    damage(max((tmp_path / "8").rglob("d/*"), key=lambda path: path.stat().st_size))
    assert_is_step(restore(tmp_path), 4)
    told = capsys.readouterr().out
    assert "checkpoint of step 8 cannot be used, going back: its file state/" in told
    # The run gets to step 8 again.
    save(tmp_path, 8)
    assert_is_step(restore(tmp_path), 8)


def test_a_checkpoint_without_manifest_is_unfinished(tmp_path, capsys):
    save(tmp_path, 4, 8)
    for step in ("4", "8"):
        (tmp_path / step / manifest.NAME).unlink()
    assert_is_step(restore(tmp_path), 0)
    told = capsys.readouterr().out
    assert told.count("it is unfinished") == 2 and "starting from its beginning" in told


@pytest.mark.parametrize("damage", [flip_a_bit, cut, lambda path: path.unlink()])
def test_damage_to_what_orbax_notes_for_itself_does_no_harm(tmp_path, damage):
    """The manifest leaves these files out."""
    save(tmp_path, 4)
    names = [path for path in (tmp_path / "4").iterdir() if path.is_file()]
    for path in names:
        if path.name != manifest.NAME:
            damage(path)
    assert_is_step(restore(tmp_path), 4)


def test_what_a_killed_save_leaves_is_cleared_away(tmp_path):
    save(tmp_path, 4)
    torn = tmp_path / "8.orbax-checkpoint-tmp"
    (torn / "state").mkdir(parents=True)
    assert_is_step(restore(tmp_path), 4)
    save(tmp_path, 8)
    assert not torn.exists()
    assert_is_step(restore(tmp_path), 8)


def test_a_whole_checkpoint_of_another_shape_is_kept_and_refused(tmp_path):
    save(tmp_path, 4)
    other = {"kernel": jnp.zeros((3, 3)), "weight": jnp.int32(0)}
    with (
        StageCheckpoints(tmp_path) as stage,
        pytest.raises(CheckpointError, match="4 is whole but does not fit this run"),
    ):
        stage.restore(other, Position())
    assert_is_step(restore(tmp_path), 4)


def test_a_full_disk_is_an_error_and_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    save(tmp_path, 4)

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_manifest", full)
        with pytest.raises(Exception) as caught:
            save(tmp_path, 8)
    assert workdir.disk_is_full(caught.value)
    assert_is_step(restore(tmp_path), 4)


def test_budgets_by_layer_and_by_filter_do_not_pass_for_each_other(tmp_path):
    """A budget is stored as () or beside its kernel; a run of the other kind is told so."""
    shapes = {"layer": (), "filter": (1, 1, 1, 4)}
    for saved, wanted in (("layer", "filter"), ("filter", "layer"), ("filter", "filter")):
        with StageCheckpoints(tmp_path / f"{saved}-{wanted}") as stage:
            state = {"budget": jnp.full(shapes[saved], 3, jnp.int32)}
            stage.save(1, state, Position(1))
            stage.wait()
            target = {"budget": jnp.zeros(shapes[wanted], jnp.int32)}
            if saved != wanted:
                with pytest.raises(CheckpointError, match="does not fit this run"):
                    stage.restore(target, Position())
            else:
                np.testing.assert_array_equal(
                    stage.restore(target, Position())[1]["budget"], state["budget"]
                )
