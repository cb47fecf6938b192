"""A timm backbone with the API-Net head on its pooled features: a whole classifier in one module."""

from collections.abc import Mapping
from typing import Any, TypeVar

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apinet_head._checks import check_module, check_number
from apinet_head.chunked import check_chunk_size, run_in_chunks
from apinet_head.deploy import plain_classifier
from apinet_head.head import APIHead, APIOutput

Self = TypeVar("Self", bound="APINet")


class APINet(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="apinet-head",
    license="apache-2.0",
    paper_url="https://arxiv.org/abs/2002.10191",
    pipeline_tag="image-classification",
    tags=["image-classification", "fine-grained", "timm"],
):
    """Backbone and `APIHead`, with `save_pretrained`, `from_pretrained` and `push_to_hub` of huggingface_hub.

    Args:
        backbone: a timm name, or a module that maps images to features [B,D].
        num_classes: C; 0 for no classifier.
        pretrained: take timm's weights for the backbone.
        chunk_size: images that go through the backbone at a time, to save memory, see `ChunkedBackbone`; None for all.
        backbone_args: further arguments of `timm.create_model`.
        **head_args: further arguments of `APIHead`. `dim` is needed for a module that has no `num_features`.

    Raises:
        ValueError: the channels of the backbone's features are unknown, or an argument doesn't fit.
        TypeError: the backbone is neither a name nor a module, or a number none.

    Examples:
        >>> import torch
        >>> net = APINet("resnet18", num_classes=10)
        >>> images = torch.randn(4, 3, 64, 64)
        >>> output = net(images, torch.tensor([0, 0, 1, 1]))  # for api_loss
        >>> net.eval()(images).shape  # class logits
        torch.Size([4, 10])
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int,
        *,
        pretrained: bool = False,
        chunk_size: int | None = None,
        backbone_args: Mapping[str, Any] | None = None,
        **head_args: Any,
    ) -> None:
        super().__init__()
        self.chunk_size: int | None = None if chunk_size is None else check_chunk_size(chunk_size)
        if isinstance(backbone, str):
            import timm

            backbone = timm.create_model(backbone, pretrained=pretrained, num_classes=0, **(backbone_args or {}))
        else:
            check_module(backbone, "backbone")
            if pretrained or backbone_args:
                raise ValueError("pretrained and backbone_args go with a timm name, got a module as backbone")
        dim = head_args.pop("dim", None)
        self.dim: int = _feature_dim(backbone) if dim is None else dim
        self.backbone: nn.Module = backbone
        self.head: APIHead = APIHead(self.dim, num_classes, **head_args)
        self._batch_norm_fixed = False

    def forward(self, images: Tensor, labels: Tensor | None = None, **head_args: Any) -> Tensor | APIOutput:
        """Class logits [B,C] of images [B,3,H,W]; with labels [B] an APIOutput for `api_loss`.

        Further arguments (`pairs`, `keys`, ...) go to the head.
        """
        if self.chunk_size is None:
            features = self.backbone(images)
        else:
            features = run_in_chunks(self.backbone, images, self.chunk_size)
        output: Tensor | APIOutput = self.head(features, labels, **head_args)
        return output

    def parameter_groups(
        self, lr: float, backbone_lr: float | None = None, weight_decay: float = 5e-4
    ) -> list[dict[str, Any]]:
        """Two groups for any torch optimiser, the backbone's and the head's; defaults as published.

        Frozen parameters are in their group as well: optimisers leave parameters without a gradient alone.

        Args:
            lr: learning rate of the head, and of the backbone if that has none of its own.
            backbone_lr: learning rate of the backbone.
            weight_decay: of all parameters, biases and norms included.

        Raises:
            ValueError: a rate or the decay is negative or not finite.

        Examples:
            >>> import torch
            >>> net = APINet("resnet18", num_classes=10)
            >>> optimizer = torch.optim.SGD(net.parameter_groups(0.01, backbone_lr=0.001), momentum=0.9)
        """
        rates = {"backbone": lr if backbone_lr is None else backbone_lr, "head": lr}
        for name, value in (("lr", lr), ("backbone_lr", rates["backbone"]), ("weight_decay", weight_decay)):
            check_number(value, name, 0)
        return [
            {
                "name": name,
                "params": list(getattr(self, name).parameters()),
                "lr": rate,
                "weight_decay": weight_decay,
            }
            for name, rate in rates.items()
        ]

    def to_deploy(self) -> nn.Module:
        """What is left of the net at test time: a copy of backbone and classifier, as a plain timm model in eval mode.

        It gives the same logits [B,C], needs no apinet-head, and its state dict loads into
        `timm.create_model(backbone, num_classes=C)`. Around a module that is not of timm it is a Sequential.

        Raises:
            ValueError: the net has no linear classifier, or the timm model has not one place for it (models with two
                classifiers for distillation, say).

        Examples:
            >>> import torch
            >>> net = APINet("test_resnet", num_classes=10).eval()
            >>> images = torch.randn(2, 3, 64, 64)
            >>> torch.equal(net.to_deploy()(images), net(images))
            True
        """
        return plain_classifier(self.backbone, self.head.classifier)

    def freeze_backbone(self: Self, frozen: bool = True, *, batch_norm: str = "train") -> Self:
        """Keep the backbone's weights as they are, or let them learn again.

        Freezing clears their gradients too, so that no optimiser moves them, not by weight decay either.

        Args:
            frozen: True, or False to let all of the backbone learn again and end a `batch_norm="eval"`.
            batch_norm: what the backbone's BatchNorm does in train mode while frozen. "train", as in the published
                training: it normalises by the batch and goes on updating its running statistics. "eval": it
                normalises by its running statistics, which stay as they are.

        Returns:
            The net itself.
        """
        if batch_norm not in ("train", "eval"):
            raise ValueError(f"batch_norm must be 'train' or 'eval', got {batch_norm!r}")
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(not frozen)
            if frozen:
                parameter.grad = None
        self._batch_norm_fixed = frozen and batch_norm == "eval"
        return self.train(self.training)

    def train(self: Self, mode: bool = True) -> Self:
        """As nn.Module's, but BatchNorm fixed by `freeze_backbone` stays in eval mode."""
        super().train(mode)
        if self._batch_norm_fixed:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    @classmethod
    def _from_pretrained(cls: type[Self], *, model_id: str, strict: bool = True, **kwargs: Any) -> Self:
        # The mixin stores all arguments of __init__: the weights come from the file, not from timm once more; and
        # what the file lacks is an error, not a random weight.
        kwargs["pretrained"] = False
        if "backbone" not in kwargs:
            raise ValueError(
                f"{model_id} was saved from a net around a module, not a timm name: make that module again and pass it "
                "as from_pretrained(..., backbone=module)"
            )
        net: Self = super()._from_pretrained(model_id=model_id, strict=strict, **kwargs)
        return net.eval()  # huggingface_hub before 1.0 does this for some formats only


def _feature_dim(backbone: nn.Module) -> int:
    # timm: some architectures have a hidden layer between pooling and classifier, which widens the features.
    for name in ("head_hidden_size", "num_features"):
        dim = getattr(backbone, name, None)
        if isinstance(dim, int) and dim > 0:
            return dim
    raise ValueError(
        f"cannot tell how many channels the features of {type(backbone).__name__} have: it has no num_features; "
        "pass dim=, as in APINet(backbone, num_classes, dim=2048)"
    )
