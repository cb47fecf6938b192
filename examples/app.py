"""A page in the browser to drop an image on, by a model folder that train_own.py wrote: app.py MODEL

It is served on this machine, for this machine alone. Needs Gradio: pip install 'apinet-head[app]'
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform

from workbench.image_files import BadImageError, load_image
from workbench.model_folder import load


def make_page(folder: Path, top: int = 5) -> Any:
    """The Gradio interface.

    Raises:
        SystemExit: there is no Gradio, or no such model.
    """
    try:
        import gradio
    except ImportError:
        raise SystemExit("the page needs Gradio: pip install 'apinet-head[app]', or pip install gradio") from None
    net, classes, settings = load(folder)
    transform = create_transform(**settings)

    def classify(file: str | None) -> dict[str, float]:
        if file is None:
            return {}
        try:
            image = transform(load_image(file))  # upright and in RGB, as in training
        except BadImageError as error:
            raise gradio.Error(str(error)) from None
        with torch.inference_mode():
            probabilities = net(image[None])[0].softmax(0).tolist()
        return dict(zip(classes, probabilities, strict=True))

    return gradio.Interface(
        classify,
        gradio.Image(type="filepath", sources=["upload", "clipboard"], label="Image"),
        gradio.Label(num_top_classes=min(top, len(classes)), label="Classes"),
        title=folder.resolve().name,
        live=True,  # classes at once, without a button
        flagging_mode="never",  # nothing is kept
        analytics_enabled=False,  # and nothing reported
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--top", type=int, default=5, help="classes shown (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    options = parser.parse_args()
    make_page(options.model, options.top).launch(server_name="127.0.0.1", server_port=options.port)


if __name__ == "__main__":
    main()
