"""PyTorch's files, written here by hand in both of its formats, and files that want to run code."""

import collections
import io
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from stp_jax.models.torch_files import read_torch

RNG = np.random.default_rng(0)
STATE = {
    "weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "steps": np.array(7, np.int64),
    "half": RNG.normal(size=5).astype(np.float16),
}
KINDS = {"float32": "FloatStorage", "int64": "LongStorage", "float16": "HalfStorage"}


class Storage:
    def __init__(self, key, array):
        self.key, self.array = key, array


class Tensor:
    """Pickles as PyTorch's tensors do; columns first shows strides."""

    def __init__(self, key, array):
        self.array, self.storage = array, Storage(key, array)

    def __reduce__(self):
        strides = tuple(s // self.array.itemsize for s in self.array.strides)
        arguments = (self.storage, 0, self.array.shape, strides, False, collections.OrderedDict())
        return sys.modules["torch._utils"]._rebuild_tensor_v2, arguments


@pytest.fixture(autouse=True)
def names_of_torch(monkeypatch):
    """Modules with the names that a file refers to; the reader itself needs none of them."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for kind in KINDS.values():
        setattr(torch, kind, type(kind, (), {"__module__": "torch"}))

    def rebuild(*args):
        raise AssertionError("only its name is stored")

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    rebuild.__name__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if isinstance(value, Storage):
            kind = getattr(sys.modules["torch"], KINDS[value.array.dtype.name])
            return ("storage", kind, value.key, "cpu", value.array.size)
        return None


def dump(value, file):
    Pickler(file, protocol=2).dump(value)


def tensors():
    state = {**STATE, "transposed": STATE["weight"].T}
    return {name: Tensor(str(i), array) for i, (name, array) in enumerate(state.items())}


def raw(array):
    """The storage in its order in memory."""
    return (array.T if array.flags.f_contiguous and array.ndim == 2 else array).tobytes()


def write_zip(path, content):
    body = io.BytesIO()
    dump(content, body)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body.getvalue())
        archive.writestr("archive/byteorder", "little")
        for tensor in tensors().values():
            archive.writestr(f"archive/data/{tensor.storage.key}", raw(tensor.array))


def write_legacy(path, content):
    with path.open("wb") as file:
        dump(0x1950A86A20F9469CFC6C, file)
        dump(1001, file)
        dump({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, file)
        dump(content, file)
        dump([tensor.storage.key for tensor in tensors().values()], file)
        for tensor in tensors().values():
            file.write(tensor.array.size.to_bytes(8, "little") + raw(tensor.array))


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_both_formats_are_read(tmp_path, write):
    path = tmp_path / "weights.pth"
    write(path, {"state_dict": collections.OrderedDict(tensors()), "epoch": 3})
    found = read_torch(path)
    assert found["epoch"] == 3
    assert list(found["state_dict"]) == [*STATE, "transposed"]
    for name, value in {**STATE, "transposed": STATE["weight"].T}.items():
        assert found["state_dict"][name].dtype == value.dtype
        np.testing.assert_array_equal(found["state_dict"][name], value)


class Bomb:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_files_run_no_code(tmp_path, write, capsys):
    path = tmp_path / "weights.pth"
    write(path, {"weight": Bomb()})
    with pytest.raises(ValueError, match=r"builtins\.print|__builtin__\.print"):
        read_torch(path)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path, write):
    path = tmp_path / "weights.pth"
    tensor = Tensor("0", np.broadcast_to(STATE["weight"][:, :1], (3, 4000)))
    tensor.array = np.lib.stride_tricks.as_strided(STATE["weight"], (3, 4000), (16, 4))
    write(path, {**tensors(), "weight": tensor})
    with pytest.raises(ValueError, match="larger than its storage"):
        read_torch(path)


def test_torn_files_are_named(tmp_path):
    path = tmp_path / "weights.pth"
    write_legacy(path, tensors())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"weights\.pth.*damaged"):
        read_torch(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02\x8e" + (1 << 62).to_bytes(8, "little"),  # a byte string that no memory holds
        b"\x80\x02X\xff\xff\xff\xff",  # a text longer than the file
        b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01h\x00s.",  # a dictionary inside itself
    ],
    ids=["size", "cut", "circle"],
)
def test_damaged_pickles_are_named(tmp_path, content):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    with pytest.raises(ValueError, match=r"weights\.pth.*damaged"):
        read_torch(path)
