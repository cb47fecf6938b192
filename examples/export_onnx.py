"""Export a model folder as an ONNX file for images [N,3,H,W] of any N, checked with onnxruntime.

python examples/export_onnx.py own-model

The file's metadata has all that is needed to use it without the model folder, as JSON: `classes`, the names in the
order of the logits, and `transform`, how images are prepared, with the mean and standard deviation of the backbone.
Needs pip install '.[export]'. docs/deploy.md has other ways.
"""

import json
from pathlib import Path

import torch

from workbench import Command, model_folder, writing


def export(folder: Path, file: Path) -> float:
    """The largest difference between the probabilities of the file and of the net, for random images."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 # torch.onnx needs it, but its own error is less clear
    except ImportError as error:
        raise SystemExit(f"{error}: pip install '.[export]'") from None
    net, classes, transform = model_folder.load(folder)
    model = net.to_deploy()
    shape = transform.get("input_size") or [3, transform["crop"], transform["crop"]]
    # Two images: the exporter would take a dimension of 1 as constant.
    program = torch.onnx.export(
        model, (torch.randn(2, *shape),), dynamo=True, input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), verbose=False,
    )  # fmt: skip
    program.model.metadata_props.update(classes=json.dumps(classes), transform=json.dumps(transform))
    with writing("", file):
        program.save(file)
    images = torch.randn(3, *shape)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.inference_mode():
        return (torch.from_numpy(logits).softmax(1) - model(images).softmax(1)).abs().max().item()


def main(arguments: list[str] | None = None) -> None:
    parser = Command(__doc__)
    parser.add_argument("model", type=Path, help="model folder of train_own.py or train_cub.py")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: model.onnx in the model folder")
    options = parser.parse_args(arguments)
    file = options.output or options.model / "model.onnx"
    difference = export(options.model, file)
    print(f"{file}: its probabilities differ from the net's by at most {difference:.1e}")


if __name__ == "__main__":
    main()
