"""Every reader of files from strangers under a coverage-guided fuzzer (atheris, on libFuzzer).

    pip install atheris
    python benchmarks/fuzz_readers.py --seconds 300            # each reader in turn
    python benchmarks/fuzz_readers.py --readers onnx --seconds 3600

A reader may return, or raise ValueError, FileNotFoundError or ImportError with a message of its
own. Anything else is a finding: another exception, a file that takes longer than ten seconds, or
2 GB more memory. Containers (ZIP, tar, safetensors) are made around the bytes that are searched,
so that the search reaches the content. Findings are listed by where they were raised, and the
shortest input of each is kept under ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import pickle
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SLOW_S = 10
MEMORY_BYTES = 2 << 30
REFUSALS = (ValueError, FileNotFoundError, ImportError)
MODULES = (
    "stp_jax.data",
    "stp_jax.export",
    "stp_jax.hwmodel",
    "stp_jax.models.torch_files",
    "experiments.labelled_images",
    "experiments.load",
)


class Target(NamedTuple):
    """A reader: how bytes become a file that it reads, and bytes to start from."""

    read: Callable[[bytes, Path], Any]
    seeds: Callable[[Path], list[bytes]]


def _file(name: str, data: bytes, folder: Path) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# --- Models ---------------------------------------------------------------------------------------


@functools.cache
def _mlp():
    from flax import nnx

    from stp_jax import models

    return models.create("mlp", num_classes=3, rngs=nnx.Rngs(0), in_features=4)


@functools.cache
def _packed(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    import stp_jax
    from stp_jax.export import save_packed, variables

    model = _mlp()
    path = folder / "model.safetensors"
    save_packed(stp_jax.quantize(model, stp_jax.default_policy(model, budget=6)), path)
    return variables.read(path)


def _read_packed_header(data: bytes, folder: Path) -> None:
    """The header of a packed file, around sound tensors."""
    from safetensors.flax import save_file

    from stp_jax.export import load_integers, load_packed

    path = folder / "header.safetensors"
    metadata = {"stp_jax.packed_terms": data.decode(errors="replace")}
    save_file(_packed(folder)[0], path, metadata)
    with contextlib.suppress(REFUSALS):
        load_integers(path)
    load_packed(_mlp(), path)


def _read_packed(data: bytes, folder: Path) -> None:
    from stp_jax.export import load_integers

    load_integers(_file("raw.safetensors", data, folder))


def _packed_file(folder: Path) -> list[bytes]:
    _packed(folder)
    return [(folder / "model.safetensors").read_bytes()]


def _torch_seeds(folder: Path) -> list[bytes]:
    """A pickle as PyTorch writes one: a dictionary with one tensor."""
    head = b"\x80\x02}q\x00X\x01\x00\x00\x00wq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07"
    storage = b"\x00\x00\x00storageq\x03ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03"
    rest = b"\x00\x00\x00cpuq\x06K\x04tq\x07QK\x00K\x02K\x02\x86q\x08K\x02K\x01\x86q\x09\x89"
    tail = b"ccollections\nOrderedDict\nq\x0a)Rq\x0btq\x0cRq\x0ds."
    return [head + storage + rest + tail, pickle.dumps({"w": 1.0}, protocol=2)]


def _read_torch(data: bytes, folder: Path) -> None:
    from stp_jax.models.torch_files import read_torch

    path = folder / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
    read_torch(path)


def _read_torch_legacy(data: bytes, folder: Path) -> None:
    from stp_jax.models.torch_files import read_torch

    read_torch(_file("legacy.pt", data, folder))


def _legacy_seeds(folder: Path) -> list[bytes]:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    heads = [0x1950A86A20F9469CFC6C, 1001, system]
    parts = [pickle.dumps(head, protocol=2) for head in heads]
    storage = (4).to_bytes(8, "little") + np.arange(4, dtype=np.float32).tobytes()
    return [b"".join([*parts, _torch_seeds(folder)[0], pickle.dumps(["0"], protocol=2), storage])]


def _read_llama2c(data: bytes, folder: Path) -> None:
    from stp_jax.models import load_llama2c

    load_llama2c(_file("model.bin", data, folder))


def _llama2c_seeds(_: Path) -> list[bytes]:
    width, hidden, depth, heads, kv_heads, vocabulary, context = sizes = (8, 8, 1, 2, 1, 5, 4)
    kv = width // heads * kv_heads
    layers = depth * (2 * width + 2 * width**2 + 2 * kv * width + 3 * hidden * width)
    numbers = vocabulary * width + layers + width + context * width // heads
    return [np.array(sizes, "<i4").tobytes() + np.zeros(numbers, "<f4").tobytes()]


# --- The accelerator model ------------------------------------------------------------------------


def _read_onnx(data: bytes, folder: Path) -> None:
    from stp_jax.hwmodel import read_onnx

    read_onnx(_file("network.onnx", data, folder))


def _onnx_seeds(_: Path) -> list[bytes]:
    from onnx import TensorProto, helper

    def tensor(name: str, *shape: int):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    def weights(name: str, *shape: int):
        return helper.make_tensor(name, TensorProto.FLOAT, shape, [0.5] * int(np.prod(shape)))

    conv = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2])
    dense = helper.make_node("Gemm", ["a", "b"], ["c"], transB=1)
    product = helper.make_node("MatMul", ["a", "m"], ["c"])
    graphs = [
        ([conv], [tensor("x", 1, 2, 8, 8)], [tensor("y", 1, 3, 4, 4)], [weights("w", 3, 2, 3, 3)]),
        ([dense], [tensor("a", 1, 4)], [tensor("c", 1, 3)], [weights("b", 3, 4)]),
        ([product], [tensor("a", 1, 4)], [tensor("c", 1, 3)], [weights("m", 4, 3)]),
    ]
    models = [helper.make_model(helper.make_graph(n, "g", i, o, w)) for n, i, o, w in graphs]
    return [model.SerializeToString() for model in models]


def _read_topology(data: bytes, folder: Path) -> None:
    from stp_jax.hwmodel import read_scalesim_topology

    read_scalesim_topology(_file("net.csv", data, folder))


def _read_scalesim_config(data: bytes, folder: Path) -> None:
    from stp_jax.hwmodel import read_scalesim_config

    read_scalesim_config(_file("array.cfg", data, folder))


def _technology(suffix: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, folder: Path) -> None:
        from stp_jax.hwmodel import read_technology

        read_technology(_file(f"table.{suffix}", data, folder))

    return read


_JSON_TABLE = {
    "name": "a",
    "node_nm": 45,
    "energy_pj": {"multiply8": {"value": 0.2, "source": "s", "node_nm": 45}},
    "area_um2": {"multiply8": {"value": 282.0, "source": "s"}},
}
_TOML_TABLE = b"""name = "a"
node_nm = 45
[energy_pj]
multiply8 = {value = 0.2, source = "s"}
"""
_TOPOLOGIES = [
    b"Layer, IFMAP H, IFMAP W, Filter H, Filter W, Channels, Num Filter, Strides,\n"
    b"Conv1, 8, 8, 3, 3, 4, 8, 1,\nConvDP2, 8, 8, 3, 3, 4, 1, 2,\n",
    b"Layer, M, N, K,\nfc, 1, 10, 64,\n",
]
_CONFIG = b"""[general]
run_name = a
[architecture_presets]
ArrayHeight: 32
ArrayWidth: 32
IfmapSramSzkB: 64
FilterSramSzkB: 64
OfmapSramSzkB: 64
Dataflow: ws
Bandwidth: 10
[run_presets]
InterfaceBandwidth: USER
"""

# --- Data and configurations ----------------------------------------------------------------------


def _image(kind: str = "PNG") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    pixels = np.arange(90, dtype=np.uint8).reshape(5, 6, 3)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _read_folder(data: bytes, folder: Path) -> None:
    """An image in a folder of classes."""
    from stp_jax.data import load

    _file("images/test/a/0.png", _image(), folder)
    _file("images/train/a/1.png", _image(), folder)
    _file("images/train/a/0.jpg", data, folder)
    list(load("folder", data_dir=folder / "images", validation=0.0).train)


def _archive(files: dict[str, bytes], path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def _read_labels(data: bytes, folder: Path) -> None:
    from experiments.labelled_images import load_labelled_images

    files = {"labels.csv": data, "0.png": _image()}
    load_labelled_images(_archive(files, folder / "labels.tar"), size=4, shorter=4)


def _read_labelled_image(data: bytes, folder: Path) -> None:
    from experiments.labelled_images import load_labelled_images

    files = {"labels.csv": b"file,class_index\n0.png,3\n", "0.png": data}
    load_labelled_images(_archive(files, folder / "images.tar"), size=4, shorter=4)


def _read_tar(data: bytes, folder: Path) -> None:
    from experiments.labelled_images import load_labelled_images

    load_labelled_images(_file("raw.tar", data, folder), size=4, shorter=4)


def _tar_seeds(folder: Path) -> list[bytes]:
    files = {"labels.csv": b"file,class_index\n0.png,3\n", "0.png": _image()}
    return [_archive(files, folder / "seed.tar").read_bytes()]


def _read_budgets(data: bytes, folder: Path) -> None:
    from experiments.config import Config
    from experiments.context import read_budgets

    path = _file("budgets.json", data, folder)
    read_budgets(Config(budgets=str(path)), {"fc": 3})


def _read_run(data: bytes, folder: Path) -> None:
    """The two JSON files of a run's folder."""
    from experiments.load import load_run

    config, _, results = data.partition(b"\x00")
    _file("run/config.json", config, folder)
    _file("run/results.json", results, folder)
    _file("run/model.safetensors", b"", folder)
    load_run(folder / "run")


def _read_setting(data: bytes, folder: Path) -> None:
    """What follows ``--set``."""
    from experiments.config import Config, override

    override(Config(), data.decode(errors="replace").split("\n"))


_RUN = b'{"config": {"data": "digits", "seed": 0}}\x00{"experiment": "a"}'

TARGETS = {
    "packed": Target(_read_packed, _packed_file),
    "packed-header": Target(
        _read_packed_header, lambda folder: [_packed(folder)[1]["stp_jax.packed_terms"].encode()]
    ),
    "torch": Target(_read_torch, _torch_seeds),
    "torch-legacy": Target(_read_torch_legacy, _legacy_seeds),
    "llama2c": Target(_read_llama2c, _llama2c_seeds),
    "onnx": Target(_read_onnx, _onnx_seeds),
    "topology": Target(_read_topology, lambda _: _TOPOLOGIES),
    "scalesim-config": Target(_read_scalesim_config, lambda _: [_CONFIG]),
    "technology-json": Target(_technology("json"), lambda _: [json.dumps(_JSON_TABLE).encode()]),
    "technology-toml": Target(_technology("toml"), lambda _: [_TOML_TABLE]),
    "image-folder": Target(_read_folder, lambda _: [_image(), _image("JPEG")]),
    "labels": Target(_read_labels, lambda _: [b"file,class_index\n0.png,3\n"]),
    "labelled-image": Target(_read_labelled_image, lambda _: [_image(), _image("JPEG")]),
    "labelled-tar": Target(_read_tar, _tar_seeds),
    "budgets": Target(_read_budgets, lambda _: [b'{"fc": 3}', b'{"fc": [1, 2, 3]}']),
    "run": Target(_read_run, lambda _: [_RUN]),
    "settings": Target(
        _read_setting, lambda _: [b"seed=3\nwidth=16\nmeasured=float", b"stages=float,int8"]
    ),
}

# --- The search -----------------------------------------------------------------------------------


class SlowFileError(Exception):
    """A file took longer than a reader may."""


def _too_slow(*_: Any) -> None:
    raise SlowFileError(f"longer than {SLOW_S} s")


class Findings:
    """What a reader raised that it should not, by where: how often, and the shortest input."""

    def __init__(self, out: Path):
        """Keeps inputs in a folder."""
        self._out, self._seen = out, {}
        out.mkdir(parents=True, exist_ok=True)

    def note(self, error: BaseException, data: bytes) -> None:
        """Counts an error, and keeps the input if it is the shortest."""
        here = [f for f in traceback.extract_tb(error.__traceback__) if __file__ not in f.filename]
        own = [f for f in here if "/stp_jax/" in f.filename or "/experiments/" in f.filename]
        frame = (own or here)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno} {type(error).__name__}"
        count, shortest = self._seen.get(place, (0, data))
        if count == 0 or len(data) < len(shortest):
            shortest = data
            (self._out / place.replace(" ", "-").replace(":", "-")).write_bytes(data)
        self._seen[place] = (count + 1, shortest)
        (self._out / "findings.json").write_text(json.dumps(self.table(), indent=1))
        if count == 0:
            print(f"  {place}: {str(error)[:100]!r}", flush=True)

    def table(self) -> dict[str, int]:
        """How often by place."""
        return {place: count for place, (count, _) in self._seen.items()}


def fuzz(name: str, seconds: int, out: Path) -> None:
    """Searches one reader in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["stp_jax", "experiments"]):
        for module in MODULES:
            importlib.import_module(module)

    target, findings = TARGETS[name], Findings(out)
    folder = Path(tempfile.mkdtemp(prefix="fuzz_readers_"))
    corpus = folder / "corpus"
    for number, seed in enumerate(target.seeds(folder)):
        with contextlib.suppress(REFUSALS):
            target.read(seed, folder)
        _file(str(number), seed, corpus)
    signal.signal(signal.SIGALRM, _too_slow)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES,) * 2)

    def one(data: bytes) -> None:
        signal.alarm(SLOW_S)
        try:
            with contextlib.suppress(REFUSALS):
                target.read(data, folder)
        except BaseException as error:
            findings.note(error, data)
        finally:
            signal.alarm(0)

    options = [f"-max_total_time={seconds}", "-max_len=4096", "-rss_limit_mb=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    """Searches each reader in a process of its own and lists what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--readers", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--seconds", type=int, default=300, help="of each reader")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="where findings go")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        fuzz(args.readers[0], args.seconds, args.out)
        return
    for name in args.readers:
        print(name, flush=True)
        command = [sys.executable, __file__, "--in-process", "--readers", name]
        options = ["--seconds", str(args.seconds), "--out", str(args.out / name)]
        ended = subprocess.run([*command, *options], stderr=subprocess.PIPE, text=True)
        runs = [line for line in ended.stderr.splitlines() if " runs in " in line]
        print(
            "  " + (runs[-1] if runs else f"ended with {ended.returncode}: {ended.stderr[-2000:]}")
        )


if __name__ == "__main__":
    main()
