"""The README.md of a model folder, in the form of the Hugging Face Hub."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from workbench.report import METHODS, percent, setting

SHOWN = 100  # classes in the table, the worst; metrics.json has all


def make_card(metrics: dict[str, Any]) -> ModelCard:
    """The card, with the test results in its metadata, which the Hub reads, and in words."""
    settings, data = metrics["settings"], metrics["data"]
    result = {"task_type": "image-classification", "dataset_type": "imagefolder", "dataset_name": data["name"]}
    about = ModelCardData(
        model_name=f"{settings['backbone']} on {data['name']}",
        library_name="apinet-head",
        pipeline_tag="image-classification",
        tags=["image-classification", "fine-grained", "timm"],
        metrics=["accuracy"],
        eval_results=[
            EvalResult(**result, dataset_split="test", metric_type=name, metric_value=round(metrics[key], 4))
            for name, key in (("accuracy", "accuracy"), ("balanced_accuracy", "mean_class_accuracy"))
        ],
    )
    start = "from scratch" if settings["no_pretrained"] else "from timm's pretrained weights"
    if settings["weights"]:
        start = f"from the weights of {as_text(settings['weights'])}"
    return ModelCard.from_template(
        about, template_path=str(Path(__file__).with_suffix(".md.jinja")), **metrics, start=start,
        method=METHODS[settings["baseline"]], listed=SHOWN, as_text=as_text, percent=percent, setting=setting,
    )  # fmt: skip


def as_text(name: str) -> str:
    """A name with Markdown's special characters escaped."""
    return re.sub(r"([\\|<>&`*_\[\]])", r"\\\1", " ".join(name.splitlines()))
