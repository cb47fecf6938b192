"""What an API-Net is at test time: a plain classifier, without a line of this package in it."""

import copy

from torch import nn


def plain_classifier(backbone: nn.Module, classifier: nn.Module) -> nn.Module:
    """A copy of both as one module from images [B,3,H,W] to class logits [B,C], in eval mode.

    A timm model gets the classifier in the place and under the name that timm gives it; any other module comes before
    it in a Sequential.

    Raises:
        ValueError: there is no linear classifier, or the timm model has not one place for it.
    """
    if not isinstance(classifier, nn.Linear):
        raise ValueError(
            f"to deploy needs a linear classifier, got {type(classifier).__name__}: make the net with num_classes of "
            "at least 1"
        )
    if not hasattr(backbone, "reset_classifier"):
        return nn.Sequential(copy.deepcopy(backbone), copy.deepcopy(classifier)).eval()
    model = copy.deepcopy(backbone)
    _reset_classifier(model, classifier.out_features)
    # Some models make their whole head anew for another number of classes: the trained weights come back first. What
    # they leave out is the classifier.
    left_out = model.load_state_dict(backbone.state_dict(), strict=False).missing_keys
    place, _, _ = left_out[0].rpartition(".") if left_out else ("", "", "")
    own = model.get_submodule(place)
    shapes = {name: tuple(value.shape) for name, value in own.named_parameters()}
    weight = (classifier.out_features, classifier.in_features)
    if sorted(left_out) != [f"{place}.bias", f"{place}.weight"] or shapes["weight"][:2] != weight:
        raise ValueError(
            f"{type(model).__name__} has not one place for a classifier {list(weight)}, but {', '.join(left_out)}: "
            "deploy nn.Sequential(net.backbone, net.head.classifier)"
        )
    # A classifier may be a convolution of 1 x 1.
    values = {name: value.reshape(shapes[name]) for name, value in classifier.state_dict().items()}
    own.load_state_dict(values)
    return model.to(classifier.weight).eval()


def _reset_classifier(model: nn.Module, num_classes: int) -> None:
    pool = getattr(model, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)  # a layer that knows its name, or the name
    if isinstance(pool, str):
        model.reset_classifier(num_classes, global_pool=pool)  # type: ignore[operator]
    else:
        model.reset_classifier(num_classes)  # type: ignore[operator]
