"""A model folder as an ONNX file for images [N,3,H,W] of any N, checked with onnxruntime: export_onnx.py MODEL

Needs pip install 'apinet-head[export]'. docs/deploy.md has the other ways.
"""

import argparse
from pathlib import Path

import torch

from workbench.model_folder import load


def export(folder: Path, file: Path) -> float:
    """The largest difference between the probabilities of the file and of the net, for random images.

    Raises:
        SystemExit: there is no such model, or a package is missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 # torch.onnx needs it, and says so in other words
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'apinet-head[export]'") from None
    net, _, settings = load(folder)
    model = net.to_deploy()
    shape = settings["input_size"]
    # The exporter takes a dimension of 1 for one that is always 1.
    program = torch.onnx.export(
        model, (torch.randn(2, *shape),), dynamo=True, input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), verbose=False,
    )  # fmt: skip
    program.save(file)
    images = torch.randn(3, *shape)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.inference_mode():
        return (torch.from_numpy(logits).softmax(1) - model(images).softmax(1)).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, help="default: model.onnx in the model folder")
    options = parser.parse_args()
    file = options.output or options.model / "model.onnx"
    difference = export(options.model, file)
    print(f"{file}: its probabilities differ from the net's by {difference:.1e} at most")


if __name__ == "__main__":
    main()
