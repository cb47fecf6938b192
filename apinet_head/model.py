"""A timm backbone with the API-Net head on its pooled features: a complete classifier in one module."""

import copy
import difflib
import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, save_torch_state_dict
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils._pytree import MappingKey, keystr, tree_flatten_with_path, tree_map

from apinet_head._checks import check_int, check_module, check_number, describe, shown
from apinet_head._modules import is_plain, is_plain_linear
from apinet_head.chunked import run_in_chunks
from apinet_head.head import APIHead, APIOutput
from apinet_head.loss import LossTerms

Self = TypeVar("Self", bound="APINet")


# The Hub's own template has placeholders; the licence of a net is for whoever trained it to say.
MODEL_CARD = """---
{{ card_data }}
---

An image classifier trained with [API-Net]({{ paper_url }}) and saved by apinet-head:

```python
from apinet_head import APINet

net = APINet.from_pretrained("THIS_FOLDER").eval()
```
"""


class APINet(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="apinet-head",
    model_card_template=MODEL_CARD,
    paper_url="https://arxiv.org/abs/2002.10191",
    pipeline_tag="image-classification",
    tags=["image-classification", "fine-grained", "timm"],
):
    """Backbone and `APIHead`, with `save_pretrained`, `from_pretrained` and `push_to_hub` of huggingface_hub.

    It has the methods of a timm model, so that timm's functions accept it: `timm.data.resolve_model_data_config(net)`,
    `timm.optim.create_optimizer_v2(net, layer_decay=0.7)`.

    Args:
        backbone: a timm name, or a module that maps images to features [B,D].
        num_classes: C; 0 for no classifier.
        pretrained: load timm's weights into the backbone.
        chunk_size: images per chunk of the backbone, to save memory, see `ChunkedBackbone`; None for the whole batch.
        keep_chunks: number of chunks that are not recomputed, see `ChunkedBackbone`.
        backbone_args: further arguments of `timm.create_model`.
        **head_args: further arguments of `APIHead`. A module without `num_features` needs `dim`; `device` and `dtype`
            apply to the backbone too.

    Raises:
        ValueError: timm has no such model, the number of feature channels is unknown, or a value is out of range.
        TypeError: an argument is unknown or has the wrong type.

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
        keep_chunks: int = 1,
        backbone_args: Mapping[str, Any] | None = None,
        **head_args: Any,
    ) -> None:
        super().__init__()
        _check_head_args(head_args)
        self.chunk_size: int | None = None if chunk_size is None else check_int(chunk_size, "chunk_size", 1)
        self.keep_chunks: int = check_int(keep_chunks, "keep_chunks", 0)
        if isinstance(backbone, str):
            backbone = _timm_model(backbone, pretrained, backbone_args or {})
        else:
            check_module(backbone, "backbone")
            if pretrained or backbone_args:
                raise ValueError("pretrained and backbone_args go with a timm name, got a module as backbone")
        dim = head_args.pop("dim", None)
        self.backbone: nn.Module = backbone
        self.head: APIHead = APIHead(_feature_dim(backbone) if dim is None else dim, num_classes, **head_args)
        self.dim: int = self.head.dim
        if {"device", "dtype"} & head_args.keys():
            self.backbone.to(device=head_args.get("device"), dtype=head_args.get("dtype"))
        self._batch_norm_fixed = False

    def forward(self, images: Tensor, labels: Tensor | None = None, **head_args: Any) -> Tensor | APIOutput | LossTerms:
        """Class logits [B,C] of images [B,3,H,W]; with labels [B] an APIOutput for `api_loss`.

        Further arguments (`criterion`, `pairs`, `keys`, ...) are those of `APIHead.forward`.
        """
        if self.chunk_size is None:
            features = self.backbone(images)
        else:
            features = run_in_chunks(self.backbone, images, self.chunk_size, self.keep_chunks)
        output: Tensor | APIOutput | LossTerms = self.head(features, labels, **head_args)
        return output

    def parameter_groups(
        self, lr: float, backbone_lr: float | None = None, weight_decay: float = 5e-4
    ) -> list[dict[str, Any]]:
        """Parameter groups of backbone and head for any torch optimiser; the defaults are the published settings.

        Args:
            lr: learning rate of the head, and of the backbone if `backbone_lr` is None.
            backbone_lr: learning rate of the backbone.
            weight_decay: of all parameters, biases and norms included.

        Examples:
            >>> import torch
            >>> net = APINet("resnet18", num_classes=10)
            >>> optimizer = torch.optim.SGD(net.parameter_groups(0.01, backbone_lr=0.001), momentum=0.9)
        """
        lr = check_number(lr, "lr", 0)
        rates = {"backbone": lr if backbone_lr is None else check_number(backbone_lr, "backbone_lr", 0), "head": lr}
        decay = check_number(weight_decay, "weight_decay", 0)
        return [
            {"name": name, "params": list(getattr(self, name).parameters()), "lr": rate, "weight_decay": decay}
            for name, rate in rates.items()
        ]

    def to_deploy(self) -> nn.Module:
        """A copy of backbone and classifier as a plain timm model in eval mode, which does not need apinet-head.

        Its logits [B,C] are the same, and its state dict loads into `timm.create_model(backbone, num_classes=C)`. For
        other backbones it is a Sequential. Parametrisations are folded into the weights, `torch.compile` is removed.

        Raises:
            ValueError: the classifier is not a plain linear layer (none at all, an adapter, a hook), or the timm model
                has no single place for it (models with two classifiers for distillation).

        Examples:
            >>> import torch
            >>> net = APINet("test_resnet", num_classes=10).eval()
            >>> images = torch.randn(2, 3, 64, 64)
            >>> torch.equal(net.to_deploy()(images), net(images))
            True
        """
        head, classifier = _uncompiled(self.head), _uncompiled(self.head.classifier)
        # The older weight_norm, spectral_norm and prune are hooks, with which a module may not even be copied.
        linear = _plain_copy(classifier) if is_plain(classifier, type(classifier)) else classifier
        if not is_plain(head, APIHead) or not is_plain_linear(linear):
            raise ValueError(
                f"to_deploy needs an APIHead with a plain linear classifier, got {type(classifier).__name__} in "
                f"{type(head).__name__}: set num_classes, remove hooks (prune.remove, remove_weight_norm), merge "
                f"adapters (peft: merge_and_unload), or {OTHERWISE}"
            )
        return _with_classifier(_plain_copy(self.backbone), linear)

    def freeze_backbone(self: Self, frozen: bool = True, *, batch_norm: str = "train") -> Self:
        """Freeze the backbone's weights, or unfreeze them.

        Freezing also clears their gradients, so that the optimiser skips them, weight decay included.

        Args:
            frozen: False unfreezes the whole backbone, and its BatchNorm.
            batch_norm: mode of the frozen backbone's BatchNorm while the net trains. "train", as published: normalise
                by the batch and update the running statistics. "eval": normalise by the running statistics and leave
                them unchanged, by `torch.optim.swa_utils.update_bn` too.
        """
        if batch_norm not in ("train", "eval"):
            raise ValueError(f"batch_norm must be 'train' or 'eval', got {batch_norm!r}")
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(not frozen)
            if frozen:
                parameter.grad = None
        for module in self.backbone.modules():
            module.__dict__.pop("reset_running_stats", None)  # see train
        self._batch_norm_fixed = frozen and batch_norm == "eval"
        return self.train(self.training)

    def train(self: Self, mode: bool = True) -> Self:
        """As nn.Module.train, but BatchNorm fixed by `freeze_backbone` stays in eval mode."""
        super().train(mode)
        for module in self.backbone.modules():
            if self._batch_norm_fixed and isinstance(module, _BatchNorm):
                module.eval()
                # update_bn resets the statistics of every BatchNorm, but would not recompute these.
                module.reset_running_stats = _keep_statistics  # type: ignore[method-assign]
        return self

    # The interface of timm's models.

    @property
    def num_classes(self) -> int:
        """C; 0 for no classifier."""
        return self.head.num_classes

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`, which in timm may differ from D."""
        return int(getattr(self.backbone, "num_features", self.dim))

    @property
    def pretrained_cfg(self) -> Any:
        """The backbone's image size, mean, std etc."""
        return self.backbone.pretrained_cfg

    def get_classifier(self) -> nn.Module:
        """The head's classifier, nn.Identity if there is none."""
        return self.head.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one for `num_classes` classes, 0 for none. Optimisers must be recreated."""
        num_classes, like = check_int(num_classes, "num_classes", 0), next(self.parameters())
        self.head.classifier = (
            nn.Linear(self.dim, num_classes, device=like.device, dtype=like.dtype) if num_classes else nn.Identity()
        )
        self.head.num_classes = num_classes
        if "num_classes" in self._arguments:  # a subclass may not have this one
            self._arguments["num_classes"] = num_classes

    def forward_features(self, images: Tensor) -> Tensor:
        """The backbone's features before pooling; the pooled ones [B,D] if it is not a timm model."""
        run: Callable[[Tensor], Tensor] = getattr(self.backbone, "forward_features", self.backbone)
        return run(images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Class logits [B,C] from the output of `forward_features`, or with pre_logits the pooled features [B,D]."""
        pooled: Tensor = getattr(self.backbone, "forward_head", nn.Identity())(features)
        logits: Tensor = pooled if pre_logits else self.head(pooled)
        return logits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable gradient checkpointing in the backbone."""
        self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]

    def no_weight_decay(self) -> set[str]:
        """Names, or patterns of names, of the backbone's parameters without weight decay."""
        prefix = "backbone." if _uncompiled(self.backbone) is self.backbone else "backbone._orig_mod."
        return {prefix + name for name in getattr(self.backbone, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """A function from a parameter's name to its layer's number, for layer decay; the head is the last layer."""
        from timm.models._manipulate import group_with_matcher

        backbone, head = cast(Any, _uncompiled(self.backbone)), "the head"
        matcher = getattr(backbone, "group_matcher", lambda coarse: {"all": f"(?!{head})"})(coarse)
        # For a name that nothing matches, timm returns the layer of the classifier.
        names = [*((_plain_name(name), None) for name, _ in backbone.named_parameters()), (head, None)]
        layers = group_with_matcher(iter(names), matcher, reverse=True)
        return lambda name: layers.get(_plain_name(name).removeprefix("backbone."), layers[head])

    # Saving and loading. All arguments are kept here, as huggingface_hub silently drops those that JSON cannot hold.

    _arguments: dict[str, Any]
    _own_modules: dict[str, str]  # arguments that are modules, and their types

    def __new__(cls: type[Self], *args: Any, **kwargs: Any) -> Self:
        net: Self = super().__new__(cls)
        given = _plain(dict(zip(list(cls._hub_mixin_init_parameters)[1:], args, strict=False)) | kwargs)
        net._own_modules = {name: _kind(value) for name, value in given.items() if isinstance(value, nn.Module)}
        net._arguments = {
            name: _without_files(value) if name == "backbone_args" else value
            for name, value in given.items()
            if name not in ("device", "dtype", *net._own_modules)
        }
        if not isinstance(given.get("gather", True), bool):  # a process group
            net._arguments["gather"] = True
        return net

    def save_pretrained(self, save_directory: str | Path, *, config: Any = None, **kwargs: Any) -> str | None:
        """Write weights and arguments to a folder, see huggingface_hub; used by `push_to_hub` too.

        Your own modules (the backbone, `mutual`) must be passed to `from_pretrained` again, only their weights are
        saved. Devices, process groups and local files in `backbone_args` are not saved.

        Raises:
            ValueError: the net could not be loaded as it is; the message names the part.
        """
        url: str | None = super().save_pretrained(save_directory, config=config or self._config(), **kwargs)
        return url

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {_plain_name(name): value for name, value in self.state_dict().items()}
        save_torch_state_dict(state, save_directory, max_shard_size=2**60)  # the mixin loads a single file only

    def _config(self) -> dict[str, Any]:
        """The arguments for config.json; ValueError if they would not recreate this net."""
        if lost := [
            f"{name}{keystr(path)}={shown(value)}"
            for name, argument in self._arguments.items()
            for path, value in tree_flatten_with_path(argument)[0]
            if not _is_saveable(path, value)
        ]:
            raise ValueError(
                f"config.json cannot hold {' and '.join(lost)}: take a name that timm knows "
                f"(act_layer='silu'), pass the module itself as backbone, or {BY_HAND}"
            )
        config, parameters = dict(self._arguments), self._hub_mixin_init_parameters
        config |= {name: getattr(self, name) for name in ("chunk_size", "keep_chunks") if name in parameters}
        dtypes = {parameter.dtype for parameter in self.parameters()}
        if len(dtypes) == 1 and any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
            config["dtype"] = str(dtypes.pop()).removeprefix("torch.")
        if self._own_modules.keys() <= {"backbone", "mutual"}:
            self._check_comes_back(config)
        return config | ({"own_modules": self._own_modules} if self._own_modules else {})

    def _check_comes_back(self, config: dict[str, Any]) -> None:
        """Raise ValueError if a net created from the config differs from this one."""
        own = {"backbone": self.backbone, "mutual": self.head.mutual}
        arguments = _from_json(config) | {name: own[name] for name in self._own_modules}
        with torch.random.fork_rng(devices=[]):
            try:
                with torch.device("meta"):
                    loaded = type(self)(**arguments)
            except Exception:  # some models read values of their weights in __init__
                loaded = type(self)(**arguments)
        here, there = _parts(self), _parts(loaded)
        for name in here | there:
            if here.get(name) != there.get(name):
                raise ValueError(
                    f"{name or 'the net'} is {here.get(name, 'not there')} and would come back as "
                    f"{there.get(name, 'nothing')}: it was changed after the net was created. Use an argument of "
                    "APINet instead (for another number of classes: reset_classifier), unwrap the layer "
                    f"(remove_parametrizations, merge_and_unload), or {BY_HAND}"
                )

    @classmethod
    def from_pretrained(cls: type[Self], pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load what `save_pretrained` or `push_to_hub` wrote, in eval mode, see huggingface_hub.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hub.
            **kwargs: of the Hub (`revision`, `token`, ...); arguments of APINet that replace the saved ones; your own
                modules (`backbone=`, `mutual=`).

        Raises:
            FileNotFoundError: there is no such folder or name, or no APINet in it.
            ValueError: one of your own modules is missing.
            RuntimeError: the weights do not fit the net.
        """
        path = os.fspath(pretrained_model_name_or_path)
        try:
            net: Self = super().from_pretrained(path, **kwargs)
        except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError) as error:
            raise FileNotFoundError(NOT_FOUND.format(path)) from error
        return net

    @classmethod
    def _from_pretrained(
        cls: type[Self], *, model_id: str, strict: bool = True, config: dict[str, Any] | None = None, **kwargs: Any
    ) -> Self:
        own = (config or {}).get("own_modules", {})
        if missing := sorted(own.keys() - kwargs.keys()):
            raise ValueError(
                f"{model_id} was saved with your own {', '.join(f'{name}={own[name]}' for name in missing)}: create it "
                f"again and pass from_pretrained(..., {', '.join(f'{name}=module' for name in missing)})"
            )
        inits = list(cls._hub_mixin_init_parameters.values())[1:]
        needed = {one.name for one in inits if one.default is one.empty and one.kind != one.VAR_KEYWORD}
        if not needed <= kwargs.keys():
            raise FileNotFoundError(NOT_FOUND.format(model_id))
        # Strict by default, unlike in the mixin.
        net: Self = super()._from_pretrained(model_id=model_id, strict=strict, **_from_json(kwargs))
        return net.eval()  # huggingface_hub before 1.0 does this for some formats only


OTHERWISE = "deploy nn.Sequential(net.backbone, net.head.classifier)"
NOT_FOUND = (
    "{!r} is neither a folder with an APINet's config.json nor the name of an APINet on the Hub that can be reached"
)
BY_HAND = "save net.state_dict() with torch.save and create the net in your own code"
LOSS_ARGS = ("margin", "rank_weight", "label_smoothing", "class_weight", "rows")


def _check_head_args(head_args: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(APIHead).parameters if name != "num_classes"]
    for name in head_args:
        if name in LOSS_ARGS:
            raise TypeError(f"{name} is an argument of the loss: api_loss(output, {name}=...) or APILoss({name}=...)")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise TypeError(
                f"APINet has no argument {name!r}{f', did you mean {near[0]!r}?' if near else ''}: the head's are "
                f"{', '.join(known)}; those of timm.create_model go in backbone_args={{{name!r}: ...}}"
            )


def _timm_model(name: str, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    import timm

    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **_plain(arguments))
    except RuntimeError as error:
        if not re.match("Unknown model|Invalid pretrained tag", str(error)):
            raise
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_models(pretrained=True), 5)
        advice = f", but {', '.join(near)}" if near else "; timm.list_models() lists all"
        raise ValueError(f"timm has no model {name!r}{advice}") from None
    return model


def _feature_dim(backbone: nn.Module) -> int:
    # Some architectures in timm have a hidden layer between pooling and classifier, which widens the features.
    for name in ("head_hidden_size", "num_features"):
        dim = getattr(backbone, name, None)
        if isinstance(dim, int) and dim > 0:
            return dim
    raise ValueError(
        f"the number of feature channels is unknown: {type(backbone).__name__} has no num_features; pass dim=, as in "
        "APINet(backbone, num_classes, dim=2048)"
    )


def _keep_statistics() -> None:
    """Replaces `reset_running_stats`; at module level, so that nets can be pickled."""


# Saving and loading.


def _plain(value: Any) -> Any:
    """A copy with numpy's numbers converted to Python's."""
    return tree_map(lambda item: item.item() if isinstance(item, np.generic) else item, value)


def _without_files(arguments: Any) -> Any:
    """`backbone_args` without the local files that weights were loaded from."""
    if not isinstance(arguments, dict):
        return arguments
    files = ("checkpoint_path", "cache_dir", "file")
    return {name: _without_files(value) for name, value in arguments.items() if name not in files}


def _is_saveable(path: tuple[Any, ...], value: Any) -> bool:
    """Whether a value and the keys of the dicts around it survive JSON."""
    if isinstance(value, str) and value.startswith("local-dir:"):  # in timm, a folder that defines the model
        return False
    keys = [entry.key for entry in path if isinstance(entry, MappingKey)]
    return isinstance(value, (bool, int, float, str, type(None))) and all(isinstance(key, str) for key in keys)


def _from_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of config.json as `APINet` takes them; weights come from the file, not from timm."""
    arguments = {name: value for name, value in arguments.items() if name != "own_modules"}
    if "pretrained" in arguments:
        arguments["pretrained"] = False
    if isinstance(dtype := arguments.get("dtype"), str):
        arguments["dtype"] = getattr(torch, dtype)
    if "backbone_args" in arguments:
        arguments["backbone_args"] = _tuples(arguments["backbone_args"])
    return arguments


def _tuples(value: Any) -> Any:
    """JSON's lists converted to tuples, which timm uses."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _parts(net: nn.Module) -> dict[str, str]:
    """Type and settings of each module, dtype and shape of each tensor, by name."""
    modules = net.named_modules(remove_duplicate=False)
    parts = {name: f"{_kind(module)}({module.extra_repr()})" for name, module in modules}
    parts |= {name: describe(value).split(" on ")[0] for name, value in net.state_dict().items()}
    return {_plain_name(name): text for name, text in parts.items()}


def _kind(module: nn.Module) -> str:
    # SyncBatchNorm has the same weights as BatchNorm, and loads as that.
    return "BatchNorm" if isinstance(module, _BatchNorm) else type(_uncompiled(module)).__name__


def _plain_name(name: str) -> str:
    """The name of a parameter or module without the prefix of torch.compile."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, or the module itself."""
    return getattr(module, "_orig_mod", module)


# Deployment.


def _plain_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode without torch.compile, with parametrisations folded into the weights."""
    copied = copy.deepcopy(_uncompiled(module)).eval()
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            setattr(parent, name, _uncompiled(child))
        if parametrize.is_parametrized(parent):
            # remove_parametrizations would modify the class that the copy shares with the original.
            weights = {name: getattr(parent, name).detach() for name in parent.parametrizations}  # type: ignore[union-attr]
            del parent.parametrizations
            parent.__class__ = type(parent).__bases__[0]
            for name, weight in weights.items():
                parent.register_parameter(name, nn.Parameter(weight))
    return copied


def _with_classifier(model: nn.Module, classifier: nn.Linear) -> nn.Module:
    """The model with its classifier: in timm's place for it, or behind the model in a Sequential."""
    if not hasattr(model, "reset_classifier"):
        return nn.Sequential(model, classifier).eval()
    trained = model.state_dict()
    pool = getattr(model, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)  # a layer with the name as attribute, or the name
    keep_pool = {"global_pool": pool} if isinstance(pool, str) else {}
    model.reset_classifier(classifier.out_features, **keep_pool)  # type: ignore[operator]
    # Some models recreate their whole head: restore the trained weights; those missing belong to the classifier.
    left_out = model.load_state_dict(trained, strict=False).missing_keys
    place = left_out[0].rpartition(".")[0] if left_out else ""
    own = model.get_submodule(place)
    shapes = {name: value.shape for name, value in own.named_parameters()}
    weight = (classifier.out_features, classifier.in_features)
    if sorted(left_out) != [f"{place}.bias", f"{place}.weight"] or shapes["weight"][:2] != weight:
        raise ValueError(
            f"{type(model).__name__} has not one place for a classifier {list(weight)}, but {', '.join(left_out)}: "
            f"{OTHERWISE}"
        )
    # timm's classifier always has a bias, and may be a 1 x 1 convolution.
    values = {"bias": torch.zeros_like(classifier.weight[:, 0]), **classifier.state_dict()}
    own.load_state_dict({name: value.reshape(shapes[name]) for name, value in values.items()})
    return model.to(classifier.weight).eval()
