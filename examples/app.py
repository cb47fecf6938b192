"""A page in the browser that classifies images dropped on it: python examples/app.py own-model

It is served on localhost only. Needs Gradio: pip install '.[app]'
"""

from pathlib import Path
from typing import Any

import torch

from workbench import DEVICE, Command, model_folder, number
from workbench.guard import check_device
from workbench.image_files import BadImageError, load_image
from workbench.images import eval_transform


def make_page(folder: Path, top: int = 5, device: str = "cpu") -> Any:
    try:
        import gradio
    except ImportError:
        raise SystemExit("the page needs Gradio: pip install '.[app]', or pip install gradio") from None
    place = check_device(device)
    net, classes, config = model_folder.load(folder)
    net, transform = net.to(place), eval_transform(config)

    def classify(file: str | None) -> dict[str, float]:
        if file is None:
            return {}
        try:
            image = transform(load_image(file))  # upright and in RGB, as in training
        except BadImageError as error:
            raise gradio.Error(str(error)) from None
        with torch.inference_mode():
            probabilities = net(image[None].to(place))[0].softmax(0).tolist()
        return dict(zip(classes, probabilities, strict=True))

    return gradio.Interface(
        classify,
        gradio.Image(type="filepath", sources=["upload", "clipboard"], label="Image"),
        gradio.Label(num_top_classes=min(top, len(classes)), label="Classes"),
        title=folder.resolve().name,
        live=True,  # classes at once, without a button
        flagging_mode="never",  # nothing is stored
        analytics_enabled=False,  # or reported
    )


def main(arguments: list[str] | None = None) -> None:
    parser = Command(__doc__)
    parser.add_argument("model", type=Path, help="model folder of train_own.py or train_cub.py")
    parser.add_argument("--top", type=number(int, 1), default=5, help="classes shown")
    parser.add_argument("--port", type=int, default=7860, help="port of the page")
    parser.add_argument("--device", **DEVICE)
    options = parser.parse_args(arguments)
    page = make_page(options.model, options.top, options.device)
    try:
        page.launch(server_name="127.0.0.1", server_port=options.port)
    except OSError as error:  # the port is taken
        raise SystemExit(f"--port {options.port}: {error}") from None


if __name__ == "__main__":
    main()
