"""The README.md of a model folder, in the form of the Hugging Face Hub."""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from workbench.report import METHODS, percent, setting

SHOWN = 100  # classes in the table, the worst; metrics.json has all


def make_card(metrics: dict[str, Any]) -> ModelCard:
    """With the test results as data, which the Hub reads, and in words."""
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
    return ModelCard(f"---\n{about.to_yaml()}\n---\n\n{_text(metrics)}")


def _text(metrics: dict[str, Any]) -> str:
    settings, data = metrics["settings"], metrics["data"]
    name = _cell(data["name"])
    accuracy, of_classes, constant = (
        percent(metrics[key]) for key in ("accuracy", "mean_class_accuracy", "largest_class_share")
    )
    low, high = map(percent, metrics["accuracy_interval"])
    weights = "from scratch" if settings["no_pretrained"] else "from timm's pretrained weights"
    licences = "the images" if settings["no_pretrained"] else "the images and of the pretrained weights"
    rows = [
        f"| {_cell(row['class'])} | {row['train_images']} | {row['test_images']} | {percent(row['accuracy'])} |"
        for row in metrics["by_class"][:SHOWN]
    ]
    left = len(metrics["by_class"]) - len(rows)
    rows += ["", f"{left} more classes are in metrics.json."] if left else []
    return f"""# {settings["backbone"]} on {name}

An image classifier for {len(metrics["by_class"])} classes, trained {weights} with {METHODS[settings["baseline"]]}
([the paper](https://arxiv.org/abs/2002.10191)).

## Results

After the last epoch, {accuracy} of the {metrics["test_images"]} test images are right (95 % interval {low} to {high}),
and {of_classes} as the mean over the classes. Always naming the largest class would make {constant} right. The test
images chose nothing: neither an epoch nor a setting.

| class, worst first | training images | test images | accuracy |
| --- | ---: | ---: | ---: |
{chr(10).join(rows)}

## Trained on

{name}: {data["train"]} training and {data["test"]} test images.

{chr(10).join(f"- {_cell(note)}" for note in data["notes"])}

The licence of this model is up to whoever trained it, and to the licences of {licences}.

{chr(10).join(f"- `{key}`: {setting(value)}" for key, value in settings.items())}

{metrics["minutes"]:.1f} minutes on {metrics["machine"]}

## Use

```python
import json

import torch
from apinet_head import APINet
from PIL import Image
from timm.data import create_transform

net = APINet.from_pretrained("THIS_FOLDER").eval()
about = json.load(open("THIS_FOLDER/classes.json"))
image = create_transform(**about["transform"])(Image.open("IMAGE").convert("RGB"))
with torch.inference_mode():
    print(about["classes"][int(net(image[None]).argmax())])
```
"""


def _cell(text: str) -> str:
    """A name as it is, whatever Markdown would make of its characters."""
    return re.sub(r"([\\|<>&`*_\[\]])", r"\\\1", " ".join(text.splitlines()))
