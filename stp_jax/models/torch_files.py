"""State dicts of PyTorch's files, read without PyTorch and without running code from them.

A .pth file is a pickle whose tensors refer to storages beside it: in one zip archive, or, before
PyTorch 1.6, one after the other in the file. The unpickler here knows only what plain tensors need
and refuses every other name, as ``torch.load(weights_only=True)`` does.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C  # opens a file of the older format
_DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Tensor:
    """Part of a storage, to be read once the storages are known."""

    def __init__(self, storage: tuple[str, str], offset: int, shape: tuple, strides: tuple):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self, storages: Mapping[str, np.ndarray]) -> np.ndarray:
        kind, key = self.storage
        flat = storages[key].view(_DTYPES[kind])[self.offset :]
        last = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if min(self.shape, default=1) < 1:
            return np.zeros(self.shape, flat.dtype)
        large = last >= len(flat) or math.prod(self.shape) > len(flat)
        if large or min(self.strides, default=0) < 0:
            raise ValueError("a tensor is larger than its storage")
        strides = [step * flat.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides).copy()


def _rebuild(storage: tuple[str, str], offset: int, shape: tuple, strides: tuple, *_: Any):
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): name for name in _DTYPES},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no plain tensor")
        return _KNOWN[module, name]

    def persistent_load(self, reference: tuple) -> tuple[str, str]:
        _, kind, key, *_ = reference  # ("storage", type, key, device, elements, …)
        if kind not in _DTYPES:
            raise pickle.UnpicklingError(f"it holds a storage of unknown type {kind!r}")
        self.kinds[key] = kind
        return kind, key

    def __init__(self, file: Any):
        super().__init__(file)
        self.kinds: dict[str, str] = {}


def _read_zip(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("the archive holds no data.pkl")
        root = names[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
        unpickler = _Unpickler(io.BytesIO(archive.read(names[0])))
        content = unpickler.load()
        storages = {
            key: np.frombuffer(archive.read(f"{root}data/{key}"), np.uint8)
            for key in unpickler.kinds
        }
    return content, storages


def _read_legacy(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    with path.open("rb") as file:
        if _Unpickler(file).load() != _MAGIC:
            raise ValueError("it is no file of PyTorch's")
        _Unpickler(file).load()  # the version
        if not _Unpickler(file).load().get("little_endian"):
            raise ValueError("its numbers are big-endian")
        unpickler = _Unpickler(file)
        content = unpickler.load()
        storages = {}
        for key in _Unpickler(file).load():
            count = int.from_bytes(file.read(8), "little")
            size = count * np.dtype(_DTYPES[unpickler.kinds[key]]).itemsize
            storages[key] = np.frombuffer(file.read(size), np.uint8)
    return content, storages


def _arrays(content: Any, storages: Mapping[str, np.ndarray]) -> Any:
    if isinstance(content, _Tensor):
        return content.array(storages)
    if isinstance(content, Mapping):
        return {name: _arrays(value, storages) for name, value in content.items()}
    return content


def read_torch(path: Path) -> Any:
    """The content of a .pt, .pth or .bin file of plain tensors, which become NumPy arrays.

    Raises:
      ValueError: the file is damaged, or holds anything but tensors, numbers, text, lists and
        dictionaries of them.
    """
    read: Callable = _read_zip if zipfile.is_zipfile(path) else _read_legacy
    try:
        return _arrays(*read(path))
    except Exception as error:  # a damaged pickle raises whatever its operations run into
        raise ValueError(f"{path} holds more than weights, or is damaged: {error}") from error
