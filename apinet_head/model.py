"""A timm backbone with the API-Net head on its pooled features: a whole classifier in one module."""

import copy
import difflib
import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils._pytree import MappingKey, keystr, tree_flatten_with_path, tree_map

from apinet_head._checks import check_int, check_module, check_number, describe, shown
from apinet_head.chunked import check_chunk_size, run_in_chunks
from apinet_head.head import APIHead, APIOutput
from apinet_head.loss import LossTerms

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

    timm's functions take it for a model of timm: `timm.data.resolve_model_data_config(net)`,
    `timm.optim.create_optimizer_v2(net, layer_decay=0.7)`.

    Args:
        backbone: a timm name, or a module that maps images to features [B,D].
        num_classes: C; 0 for no classifier.
        pretrained: take timm's weights for the backbone.
        chunk_size: images that go through the backbone at a time, to save memory, see `ChunkedBackbone`; None for all.
        backbone_args: further arguments of `timm.create_model`.
        **head_args: further arguments of `APIHead`. `dim` is needed for a module that has no `num_features`; `device`
            and `dtype` are those of the backbone too.

    Raises:
        ValueError: the channels of the backbone's features are unknown, timm has no model of that name, or an argument
            doesn't fit.
        TypeError: the backbone is neither a name nor a module, a number none, or there is no such argument.

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
        num_classes, chunk_size, backbone_args, head_args = _plain((num_classes, chunk_size, backbone_args, head_args))
        _check_head_args(head_args)
        self.chunk_size: int | None = None if chunk_size is None else check_chunk_size(chunk_size)
        if isinstance(backbone, str):
            backbone = _timm_model(backbone, pretrained, backbone_args or {})
        else:
            check_module(backbone, "backbone")
            if pretrained or backbone_args:
                raise ValueError("pretrained and backbone_args go with a timm name, got a module as backbone")
        dim = head_args.pop("dim", None)
        self.dim: int = _feature_dim(backbone) if dim is None else dim
        self.backbone: nn.Module = backbone
        self.head: APIHead = APIHead(self.dim, num_classes, **head_args)
        if {"device", "dtype"} & head_args.keys():
            self.backbone.to(device=head_args.get("device"), dtype=head_args.get("dtype"))
        self._batch_norm_fixed = False

    def forward(self, images: Tensor, labels: Tensor | None = None, **head_args: Any) -> Tensor | APIOutput | LossTerms:
        """Class logits [B,C] of images [B,3,H,W]; with labels [B] an APIOutput for `api_loss`.

        Further arguments (`criterion`, `pairs`, `keys`, ...) go to the head.
        """
        if self.chunk_size is None:
            features = self.backbone(images)
        else:
            features = run_in_chunks(self.backbone, images, self.chunk_size)
        output: Tensor | APIOutput | LossTerms = self.head(features, labels, **head_args)
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
        lr = check_number(lr, "lr", 0)
        rates = {"backbone": lr if backbone_lr is None else check_number(backbone_lr, "backbone_lr", 0), "head": lr}
        decay = check_number(weight_decay, "weight_decay", 0)
        return [
            {"name": name, "params": list(getattr(self, name).parameters()), "lr": rate, "weight_decay": decay}
            for name, rate in rates.items()
        ]

    def to_deploy(self) -> nn.Module:
        """What is left of the net at test time: a copy of backbone and classifier, as a plain timm model in eval mode.

        It gives the same logits [B,C], needs no apinet-head, and its state dict loads into
        `timm.create_model(backbone, num_classes=C)`. Around a module that is not of timm it is a Sequential. What
        `torch.compile` put around modules is left out, and parametrisations are computed into the weights.

        Raises:
            ValueError: the net has no linear classifier, or something else computes in it (an adapter, a hook); or the
                timm model has not one place for it (models with two classifiers for distillation, say).

        Examples:
            >>> import torch
            >>> net = APINet("test_resnet", num_classes=10).eval()
            >>> images = torch.randn(2, 3, 64, 64)
            >>> torch.equal(net.to_deploy()(images), net(images))
            True
        """
        head, classifier = _uncompiled(self.head), _uncompiled(self.head.classifier)
        for module, name in ((head, "head"), (classifier, "classifier")):
            # Old forms of weight_norm, spectral_norm and prune are hooks, too; some tools replace forward itself.
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                raise ValueError(
                    f"a hook computes in the {name}, which no plain model would have: remove it (prune.remove, "
                    f"remove_weight_norm, handle.remove()), or {OTHERWISE}"
                )
        linear = _written(classifier)
        if type(head) is not APIHead or type(linear) is not nn.Linear:
            raise ValueError(
                f"to deploy needs an APIHead with a linear classifier, got {type(classifier).__name__} in "
                f"{type(head).__name__}: make the net with num_classes of at least 1, merge what was put around the "
                f"layer (peft: merge_and_unload), or {OTHERWISE}"
            )
        return _with_classifier(_written(self.backbone), linear)

    def freeze_backbone(self: Self, frozen: bool = True, *, batch_norm: str = "train") -> Self:
        """Keep the backbone's weights as they are, or let them learn again.

        Freezing clears their gradients too, so that no optimiser moves them, not by weight decay either.

        Args:
            frozen: True, or False to let all of the backbone learn again and end a `batch_norm="eval"`.
            batch_norm: what the backbone's BatchNorm does in train mode while frozen. "train", as in the published
                training: it normalises by the batch and goes on updating its running statistics. "eval": it
                normalises by its running statistics, which stay as they are; `torch.optim.swa_utils.update_bn` does
                not reset them either.

        Returns:
            The net itself.
        """
        if batch_norm not in ("train", "eval"):
            raise ValueError(f"batch_norm must be 'train' or 'eval', got {batch_norm!r}")
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(not frozen)
            if frozen:
                parameter.grad = None
        for module in self.backbone.modules():
            vars(module).pop("reset_running_stats", None)
        self._batch_norm_fixed = frozen and batch_norm == "eval"
        return self.train(self.training)

    def train(self: Self, mode: bool = True) -> Self:
        """As nn.Module's, but BatchNorm fixed by `freeze_backbone` stays in eval mode."""
        super().train(mode)
        if self._batch_norm_fixed:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
                    # update_bn resets the statistics of every BatchNorm, and no batch would bring these back.
                    vars(module)["reset_running_stats"] = _keep_running_stats
        return self

    # What timm asks of a model.

    @property
    def num_classes(self) -> int:
        """C; 0 for no classifier."""
        return self.head.num_classes

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`, as timm counts them; D for a backbone that is not of timm."""
        return int(getattr(self.backbone, "num_features", self.dim))

    @property
    def pretrained_cfg(self) -> Any:
        """The backbone's: image size, mean, std and the like."""
        return self.backbone.pretrained_cfg

    def get_classifier(self) -> nn.Module:
        """The head's classifier, nn.Identity if there is none."""
        return self.head.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Take a new classifier for `num_classes` classes, 0 for none. An optimiser has to be made anew."""
        num_classes, like = check_int(num_classes, "num_classes", 0), next(self.parameters())
        self.head.classifier = (
            nn.Linear(self.dim, num_classes, device=like.device, dtype=like.dtype) if num_classes else nn.Identity()
        )
        self.head.num_classes = num_classes
        if "num_classes" in self._arguments:  # a subclass may not have this one
            self._arguments["num_classes"] = num_classes

    def forward_features(self, images: Tensor) -> Tensor:
        """The backbone's features before pooling, of all images at once; all that it gives, if it is not of timm."""
        run: Callable[[Tensor], Tensor] = getattr(self.backbone, "forward_features", self.backbone)
        return run(images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Class logits [B,C] of what `forward_features` gives; with pre_logits the pooled features [B,D]."""
        pooled: Tensor = getattr(self.backbone, "forward_head", nn.Identity())(features)
        logits: Tensor = pooled if pre_logits else self.head(pooled)
        return logits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let the backbone recompute its layers in the backward pass, where it can."""
        self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]

    def no_weight_decay(self) -> set[str]:
        """Names, or patterns of names, of the parameters that are to have no weight decay: the backbone's."""
        prefix = "backbone." if _uncompiled(self.backbone) is self.backbone else "backbone._orig_mod."
        return {prefix + name for name in getattr(self.backbone, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """For layer decay: from a parameter's name to the number of its layer; all of the head is in the last."""
        from timm.models._manipulate import group_with_matcher

        backbone, head = cast(Any, _uncompiled(self.backbone)), "the head"
        matcher = getattr(backbone, "group_matcher", lambda coarse: {"all": f"(?!{head})"})(coarse)
        # With a name that nothing matches timm says itself where it would put the classifier.
        names = [*((_plain_name(name), None) for name, _ in backbone.named_parameters()), (head, None)]
        layers = group_with_matcher(iter(names), matcher, reverse=True)
        return lambda name: layers.get(_plain_name(name).removeprefix("backbone."), layers[head])

    # Saving and loading. huggingface_hub keeps the arguments of __init__ for config.json, but leaves out, without a
    # word, those that JSON can't hold.

    _arguments: dict[str, Any]
    _own_modules: dict[str, str]
    _unsaveable: list[str]

    def __new__(cls: type[Self], *args: Any, **kwargs: Any) -> Self:
        given = _plain(dict(zip(list(cls._hub_mixin_init_parameters)[1:], args, strict=False)) | kwargs)
        given = {name: _without_files(value) for name, value in given.items() if name not in ("device", "dtype")}
        net: Self = super().__new__(cls, **given)
        net._arguments = vars(net).setdefault("_hub_mixin_config", {})
        net._own_modules = {name: _kind(value) for name, value in given.items() if isinstance(value, nn.Module)}
        net._unsaveable = [
            f"{name}{keystr(path)}={shown(value)}"
            for name, argument in given.items()
            for path, value in tree_flatten_with_path(argument)[0]
            if not _is_saveable(path, value) and name not in net._own_modules
        ]
        return net

    def save_pretrained(self, save_directory: str | Path, *, config: Any = None, **kwargs: Any) -> str | None:
        """Write weights and arguments to a folder, as huggingface_hub describes; `push_to_hub` does it too.

        Modules of your own are not in it (the backbone, `mutual`): `from_pretrained` takes them again. Of local files
        that `backbone_args` names nothing is kept, nor of a device.

        Raises:
            ValueError: from what is written the net would not come back as it is; the message names the part.
        """
        config = self._checked_config() if config is None else config
        url: str | None = super().save_pretrained(save_directory, config=config, **kwargs)
        return url

    def _save_pretrained(self, save_directory: Path) -> None:
        from safetensors.torch import save_model

        # Of a module save_model takes the state dict alone; this one has no names of torch.compile.
        state = {_plain_name(name): value for name, value in self.state_dict().items()}
        named: Any = SimpleNamespace(state_dict=lambda: state)
        save_model(named, str(save_directory / "model.safetensors"))

    def _checked_config(self) -> dict[str, Any]:
        """The arguments for config.json; ValueError unless they make this net again."""
        if self._unsaveable:
            raise ValueError(
                f"config.json cannot hold {' and '.join(self._unsaveable)}: take a name, a number or a string, if timm "
                f"knows one for it (act_layer='silu'), make the backbone first and pass that module, or {BY_HAND}"
            )
        now = {"pretrained": False, "chunk_size": self.chunk_size}  # a subclass may not have these arguments
        config = {name: now.get(name, value) for name, value in self._arguments.items()}
        dtypes = {parameter.dtype for parameter in self.parameters()}
        parameters = self._hub_mixin_init_parameters.values()
        if len(dtypes) == 1 and any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            config["dtype"] = str(dtypes.pop()).removeprefix("torch.")
        if self._own_modules.keys() <= {"backbone", "mutual"}:
            is_, becomes = _parts(self), _parts(self._made_again(config))
            if changed := [name for name in is_ | becomes if is_.get(name) != becomes.get(name)]:
                name = changed[0]
                raise ValueError(
                    f"{name or 'the net'} is {is_.get(name, 'not there')} and would come back as "
                    f"{becomes.get(name, 'nothing')}: it was changed after the net was made. Give an argument of "
                    "APINet instead (for another number of classes: reset_classifier), undo what was put around a "
                    f"layer (remove_parametrizations, merge_and_unload), or {BY_HAND}"
                )
        return config | ({"own_modules": self._own_modules} if self._own_modules else {})

    def _made_again(self: Self, config: dict[str, Any]) -> Self:
        """A net of the same arguments; where that works, on the meta device, without values."""
        modules = {"backbone": self.backbone, "mutual": self.head.mutual}
        arguments = _from_json(config) | {name: modules[name] for name in self._own_modules}
        try:
            with torch.device("meta"):
                return type(self)(**arguments)
        except Exception:
            with torch.random.fork_rng(devices=[]):
                return type(self)(**arguments)

    @classmethod
    def from_pretrained(cls: type[Self], pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """A net that `save_pretrained` or `push_to_hub` wrote, in eval mode, as huggingface_hub describes.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hub.
            **kwargs: the Hub's (`revision`, `token`, ...); arguments of APINet in place of the saved ones; modules of
                your own (`backbone=`, `mutual=`).

        Raises:
            FileNotFoundError: there is no such folder, or no net in it.
            ValueError: a module is to be given.
            RuntimeError: the weights are those of another net.
        """
        path = os.fspath(pretrained_model_name_or_path)
        try:
            net: Self = super().from_pretrained(path, **kwargs)
        except HFValidationError:  # it only knows of names on the Hub
            raise FileNotFoundError(NOT_FOUND.format(path)) from None
        except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:
            raise FileNotFoundError(NOT_FOUND.format(path)) from error
        return net

    @classmethod
    def _from_pretrained(
        cls: type[Self], *, model_id: str, strict: bool = True, config: dict[str, Any] | None = None, **kwargs: Any
    ) -> Self:
        own = (config or {}).get("own_modules", {})
        if missing := own.keys() - kwargs.keys():
            raise ValueError(
                f"{model_id} was saved from a net with {', '.join(f'{name}={own[name]}' for name in sorted(missing))} "
                "of its own: make that again and pass it, as "
                f"from_pretrained(..., {', '.join(f'{name}=module' for name in sorted(missing))})"
            )
        inits = list(cls._hub_mixin_init_parameters.values())[1:]
        needed = {one.name for one in inits if one.default is one.empty and one.kind != one.VAR_KEYWORD}
        if not needed <= kwargs.keys():
            raise FileNotFoundError(NOT_FOUND.format(model_id))
        # What the file lacks is an error, not a random weight.
        net: Self = super()._from_pretrained(model_id=model_id, strict=strict, **_from_json(kwargs))
        return net.eval()  # huggingface_hub before 1.0 does this for some formats only


OTHERWISE = "deploy nn.Sequential(net.backbone, net.head.classifier)"
NOT_FOUND = "{!r} is no folder with an APINet's config.json, nor the name of an APINet on the Hub that can be reached"
BY_HAND = "save net.state_dict() with torch.save, and make the net by your own code before you load it"
# Of `api_loss` and `APILoss`: the loss is computed from what the net gives.
LOSS_ARGS = ("margin", "rank_weight", "label_smoothing", "class_weight", "rows")


def _check_head_args(head_args: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(APIHead).parameters if name != "num_classes"]
    for name in head_args:
        if name in LOSS_ARGS:
            raise TypeError(
                f"{name} is an argument of the loss: api_loss(net(images, labels), {name}=...), or APILoss({name}=...)"
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise TypeError(
                f"APINet has no argument {name!r}{f', did you mean {near[0]!r}?' if near else ''}: those of the head "
                f"are {', '.join(known)}; those of timm.create_model go in backbone_args={{{name!r}: ...}}"
            )


def _timm_model(name: str, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    import timm

    if not isinstance(arguments, Mapping):
        raise TypeError(f"backbone_args must be a dict, got {shown(arguments)}")
    if doubled := {"model_name", "pretrained", "num_classes"} & arguments.keys():
        raise ValueError(f"{', '.join(sorted(doubled))}: an argument of APINet itself, got it in backbone_args")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except RuntimeError as error:
        if not re.match("Unknown model|Invalid pretrained tag", str(error)):
            raise
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_models(pretrained=True), 5)
        raise ValueError(
            f"timm has no model {name!r}"
            + (f", but {', '.join(near)}" if near else "; timm.list_models('*resnet*') lists the ResNets, for example")
        ) from None
    return model


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


def _keep_running_stats() -> None:
    """In place of `reset_running_stats` of a fixed BatchNorm; a function of the module, which can be pickled."""


# Saving and loading.


def _plain(value: Any) -> Any:
    """The same with Python's own numbers in place of numpy's, in copies of dicts, lists and tuples."""
    return tree_map(lambda item: item.item() if isinstance(item, np.generic) else item, value)


def _without_files(argument: Any) -> Any:
    """Of `backbone_args` what makes the model: not the files that its weights came from."""
    if not isinstance(argument, dict):
        return argument
    kept = {name: value for name, value in argument.items() if name not in ("checkpoint_path", "cache_dir", "file")}
    return {
        name: _without_files(value) if name in ("pretrained_cfg", "pretrained_cfg_overlay") else value
        for name, value in kept.items()
    }


def _is_saveable(path: tuple[Any, ...], value: Any) -> bool:
    """Whether a value comes back from JSON as it was, the keys of the dicts around it too."""
    keys = [entry.key for entry in path if isinstance(entry, MappingKey)]
    if isinstance(value, str) and value.startswith("local-dir:"):  # timm: the folder says what model it is
        return False
    return isinstance(value, (bool, int, float, str, NoneType)) and all(isinstance(key, str) for key in keys)


def _from_json(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of config.json as `APINet` takes them; the weights come from the file, not from timm once more."""
    arguments = {name: value for name, value in arguments.items() if name != "own_modules"}
    if arguments.get("pretrained"):
        arguments["pretrained"] = False
    if isinstance(dtype := arguments.get("dtype"), str):
        arguments["dtype"] = getattr(torch, dtype)
    if "backbone_args" in arguments:
        arguments["backbone_args"] = _tuples(arguments["backbone_args"])
    return arguments


def _tuples(value: Any) -> Any:
    """The same with tuples, which timm writes, for the lists that JSON made of them."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _parts(net: nn.Module) -> dict[str, str]:
    """What a net consists of, by name: modules, with what they show of themselves; shapes and dtypes of weights."""
    modules = net.named_modules(remove_duplicate=False)
    layers = {name: f"{_kind(module)}({module.extra_repr()})" for name, module in modules}
    weights = {name: describe(value).split(" on ")[0] for name, value in net.state_dict().items()}
    return {_plain_name(name): text for name, text in (layers | weights).items()}


def _kind(module: nn.Module) -> str:
    # SyncBatchNorm has the weights of BatchNorm, and computes the same.
    return "BatchNorm" if isinstance(module, _BatchNorm) else type(_uncompiled(module)).__name__


def _plain_name(name: str) -> str:
    """The name that a parameter or module has without torch.compile."""
    return re.sub(r"(^|\.)_orig_mod(?=\.|$)", "", name).removeprefix(".")


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module itself, or the one that torch.compile was given."""
    return getattr(module, "_orig_mod", module)


# Deployment.


def _written(module: nn.Module) -> nn.Module:
    """A copy of the module as it was written: without torch.compile, parametrisations computed into the weights."""
    written = copy.deepcopy(_uncompiled(module)).eval()
    for parent in list(written.modules()):
        for name, child in list(parent.named_children()):
            setattr(parent, name, _uncompiled(child))
        if parametrize.is_parametrized(parent):
            # remove_parametrizations would do it in the class, too, which the copy has in common with the original.
            weights = {name: getattr(parent, name).detach() for name in parent.parametrizations}  # type: ignore[union-attr]
            del parent.parametrizations
            parent.__class__ = type(parent).__bases__[0]
            for name, weight in weights.items():
                parent.register_parameter(name, nn.Parameter(weight))
    return written


def _with_classifier(model: nn.Module, classifier: nn.Linear) -> nn.Module:
    """Both as one module from images [B,3,H,W] to class logits [B,C], in eval mode, with nothing of this package.

    A timm model gets the classifier in the place and under the name that timm gives it; any other module comes before
    it in a Sequential.
    """
    if not hasattr(model, "reset_classifier"):
        return nn.Sequential(model, classifier).eval()
    trained = model.state_dict()
    pool = getattr(model, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)  # a layer that knows its name, or the name
    keep_pool = {"global_pool": pool} if isinstance(pool, str) else {}
    model.reset_classifier(classifier.out_features, **keep_pool)  # type: ignore[operator]
    # Some models make their whole head anew for another number of classes: the trained weights come back first. What
    # they leave out is the classifier.
    left_out = model.load_state_dict(trained, strict=False).missing_keys
    place, _, _ = left_out[0].rpartition(".") if left_out else ("", "", "")
    own = model.get_submodule(place)
    shapes = {name: tuple(value.shape) for name, value in own.named_parameters()}
    weight = (classifier.out_features, classifier.in_features)
    if sorted(left_out) != [f"{place}.bias", f"{place}.weight"] or shapes["weight"][:2] != weight:
        raise ValueError(
            f"{type(model).__name__} has not one place for a classifier {list(weight)}, but {', '.join(left_out)}: "
            f"{OTHERWISE}"
        )
    # A classifier may be a convolution of 1 x 1; and timm's has a bias.
    values = {name: value.reshape(shapes[name]) for name, value in classifier.state_dict().items()}
    own.load_state_dict({"bias": torch.zeros_like(classifier.weight[:, 0]), **values})
    return model.to(classifier.weight).eval()
