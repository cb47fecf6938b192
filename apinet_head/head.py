"""The API-Net head: a classifier that is trained on pairs of images and deployed as one linear layer."""

import sys
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from apinet_head._checks import (
    check_device,
    check_dtype,
    check_features,
    check_int,
    check_labels,
    check_number,
    describe,
)
from apinet_head._gating import gated_features, gates_of, take
from apinet_head._modules import classify_groups, is_plain_linear
from apinet_head.distributed import gather_checked, group_name, mean_over_ranks, world_size
from apinet_head.feature_memory import FeatureMemory
from apinet_head.loss import APILoss, LossTerms
from apinet_head.mutual import MutualMLP, is_plain_mlp, make_mutual
from apinet_head.pairs import Keys, Pairs, check_pairs, checked_keys, find_pairs, searches_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

FEW = 0.75  # a head warns if a smaller share of the pairs of its first batch is valid


class APIOutput(NamedTuple):
    """Logits of the images of P pairs: rows [0,P) are the anchors, rows [P,2P) the partners.

    Attributes:
        logits_self: [2P,C], of features under their own gate; the gated features [2P,D] if there is no classifier.
        logits_other: [2P,C] or [2P,D], the same under the gate of the other image of the pair.
        labels: [2P], class indices.
        valid: [2P] bool, False for rows masked out of the loss, because the pair does not exist or one of its images
            has no class. Non-finite rows of images with a class stay valid, so that the loss shows them.
        pairs: the P pairs. Partners from the head's memory are numbered after the rows of the batch (of all ranks).
        num_rows: scalar by which the loss divides sums over rows; None for the number of valid rows. With gather, the
            mean of that number over the ranks, so that the mean of the ranks' losses is the loss of the whole batch.
        group: name of the process group of that mean; None for the default one.
        unclassified: True if there is no classifier, else None.
    """

    logits_self: Tensor
    logits_other: Tensor
    labels: Tensor
    valid: Tensor
    pairs: Pairs
    num_rows: Tensor | None = None
    group: str | None = None
    unclassified: bool | None = None


class APIHead(nn.Module):
    """Attentive pairwise interaction on the pooled features of any backbone (paper, section 3).

    With labels, each image is paired with its nearest of the same class and its nearest of another class. A mutual
    vector m of the pair gives a gate g = sigmoid(m * x) for each of the two images, and x + x * g is classified under
    the image's own gate and under the other one's, for `api_loss`. Without labels only the classifier runs.

    A head warns if more than a quarter of the pairs of its first training batch are not valid, which synchronises once
    with a GPU; compiled heads and heads with a memory do not check.

    Args:
        dim: channels D of the features.
        num_classes: C; 0 for no classifier (pass `classifier=` in the call, or use the gated features).
        hidden_dim: width of the mutual vector's MLP.
        dropout: probability, inside that MLP and before the classifier.
        mutual: the mutual vector: "mlp" as in the paper, or from its ablation "individual" (none: g = sigmoid(x)),
            "bilinear" (compact bilinear pooling), "square_diff", "sum", "product" or "weighted" (a sum weighted by an
            MLP); or a module that maps two [P,D] to [P,D].
        gate: "pair" for one gate per image; "single" for sigmoid(m) as the gate of both, where logits_other is
            logits_self: train with rank_weight=0.
        intra: partner of the same class, as `inter` of another: "similar", "dissimilar", "random" or None.
        gather: search partners among the features of all ranks, or of a ProcessGroup or one-dimensional DeviceMesh.
            After DDP's averaging, loss and gradients equal those of one process with the whole batch. All ranks must
            call the head with labels and with equally many images.
        memory: N > 0 also searches partners among the last N training images, kept in `head.memory`, a `FeatureMemory`;
            they get no gradient. All ranks store the images of all, so all must call the head with equally many.
        device: of the parameters, as `dtype`.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument has the wrong type.

    Examples:
        >>> from apinet_head import APIHead, api_loss
        >>> head = APIHead(dim=2048, num_classes=200)
        >>> features, labels = torch.randn(8, 2048), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
        >>> output = head(features, labels)
        >>> output.logits_self.shape  # two images of each of 2 * 8 pairs
        torch.Size([32, 200])
        >>> api_loss(output).backward()
        >>> head.eval()(features).shape
        torch.Size([8, 200])
    """

    def __init__(
        self,
        dim: int,
        num_classes: int = 0,
        *,
        hidden_dim: int = 512,
        dropout: float = 0.5,
        mutual: str | nn.Module = "mlp",
        gate: str = "pair",
        intra: str | None = "similar",
        inter: str | None = "similar",
        gather: "bool | ProcessGroup | DeviceMesh" = False,
        memory: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim: int = check_int(dim, "dim", 1)
        self.num_classes: int = check_int(num_classes, "num_classes", 0)
        hidden_dim, dropout = check_int(hidden_dim, "hidden_dim", 1), check_number(dropout, "dropout", 0, 1)
        memory = check_int(memory, "memory", 0)
        check_dtype(dtype)
        if gate not in ("pair", "single"):
            raise ValueError(f"gate must be 'pair' or 'single', got {gate!r}")
        if gate == "single" and mutual == "individual":
            raise ValueError("gate='single' is a function of the mutual vector, and mutual='individual' has none")
        searches_of(intra, inter)  # raises for an unknown value
        self.gate: str = gate
        self.intra: str | None = intra
        self.inter: str | None = inter
        self.gather: bool = gather is not False
        self._group: str | None = None if isinstance(gather, bool) else group_name(gather)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if not isinstance(mutual, nn.Module):
            mutual = make_mutual(mutual, self.dim, hidden_dim, dropout, **factory)
        self.mutual: nn.Module = mutual
        self.drop: nn.Dropout = nn.Dropout(dropout)
        self.classifier: nn.Module = nn.Linear(self.dim, self.num_classes, **factory) if num_classes else nn.Identity()
        self.memory: FeatureMemory | None = FeatureMemory(memory, self.dim, **factory) if memory else None
        self._has_checked_pairs = False

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        *,
        pairs: Pairs | None = None,
        classifier: nn.Module | None = None,
        criterion: APILoss | None = None,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
        key_offset: int | None = None,
    ) -> Tensor | APIOutput | LossTerms:
        """Class logits without labels, an APIOutput with them, in train and eval mode alike.

        Args:
            features: [B,D], floating point.
            labels: [B], class indices, integer dtype. A negative label means "no class": the image is never a partner,
                and its rows are masked out of the loss.
            pairs: used instead of mining; partners are rows of `keys`, or of `features` (of all ranks, with gather).
                The memory is then neither searched nor filled.
            classifier: maps [N,D] to [N,C], used instead of the head's; called once for all rows.
            criterion: an `APILoss` that computes the loss from the gated features: with `APILoss(rows=64)`, logits
                exist for 64 rows at a time.
            keys: with `key_labels` and `key_offset` as in `mine_pairs`; converted to the features' dtype.

        Returns:
            Logits [B,C] (features if there is no classifier), an APIOutput, or LossTerms if there is a criterion.

        Raises:
            ValueError: shapes, dtypes or devices do not match; the message shows what was passed.
            TypeError: an argument has the wrong type.
        """
        if classifier is not None and not callable(classifier):
            raise TypeError(
                f"classifier must be a module that maps [N, {self.dim}] to [N, C], got {type(classifier).__name__}; of "
                "a model with several classifiers, pass one"
            )
        classify = self.classifier if classifier is None else classifier
        has_classes = not isinstance(classify, nn.Identity)
        self._check_features(features)
        if labels is None:
            if any(argument is not None for argument in (pairs, criterion, keys, key_labels, key_offset)):
                raise ValueError("pairs, keys and criterion are for training and need labels, got labels=None")
            return classify(self.drop(features)) if has_classes else features
        check_labels(labels, features)
        table = checked_keys(features, labels, keys, key_labels, key_offset)
        if keys is not None and self.memory is not None:
            raise ValueError(f"a head with a memory searches partners there, got keys {describe(keys)}: use memory=0")
        if criterion is not None and not isinstance(criterion, APILoss):
            raise TypeError(f"criterion must be an APILoss, got {type(criterion).__name__}")
        if criterion is not None and not has_classes:
            raise ValueError(
                "criterion= needs logits, and this head has no classifier: pass num_classes= or classifier="
            )
        labels = labels.long()  # few operations support all integer dtypes
        trains = self.training and torch.is_grad_enabled()
        memory = self.memory if trains and pairs is None else None

        # Keys: where partners are searched.
        if keys is None:
            table = self._keys(features, labels, memory)

        # Pairs, and of each the two images and their labels.
        if pairs is not None:
            check_pairs(pairs, features, table.features)
        else:
            pairs = find_pairs(features, labels, searches_of(self.intra, self.inter), table)
            if trains and keys is None and memory is None and not self._has_checked_pairs:
                self._has_checked_pairs = _warn_if_few(features, labels, pairs)
        partner = None if table.is_batch(features) else table.take(pairs.partner)
        # Rows without a class are masked out, whatever they hold; in gradients, 0 * NaN would be NaN.
        known = features.masked_fill((labels < 0)[:, None], 0)
        images = _images(known, pairs, partner)
        row_labels = torch.cat([labels.index_select(0, pairs.anchor), table.labels.index_select(0, pairs.partner)])
        if memory is not None:
            self._remember(memory, features, labels, table)

        # The mutual vector of each pair, and the images under its gates.
        gated = gated_features(images.table, images.rows, self._mutual_vector(images), self.gate == "single")
        valid = _valid(pairs, row_labels, gated[0])
        gathers = self.gather and world_size(self._group) > 1
        num_rows = mean_over_ranks(valid.sum(), self._group) if gathers else None

        # Classes: all rows in one call, which is faster than two and takes less memory.
        rows = self.drop(gated) if has_classes else gated
        if criterion is not None:
            return criterion.of_features(rows, row_labels, valid, num_rows, classify, self._group)
        by_gate = classify_groups(rows, classify).unbind()  # own and other; one that is both with gate="single"
        unclassified = None if has_classes else True
        return APIOutput(by_gate[0], by_gate[-1], row_labels, valid, pairs, num_rows, self._group, unclassified)

    def gates(self, features: Tensor, pairs: Pairs, *, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gates of pairs of rows of features [B,D], or of features and keys [M,D] (paper, equation 2).

        Returns:
            sigmoid(m * x) of the anchors and of the partners, each [P,D]; sigmoid(m) twice with gate="single".
        """
        self._check_features(features)
        if keys is not None:
            check_features(keys, "keys", self.dim)
            check_device(keys, "keys", features, "features")
        check_pairs(pairs, features, features if keys is None else keys)
        images = _images(features, pairs, None if keys is None else keys.index_select(0, pairs.partner))
        anchor, partner = gates_of(images.take(), self._mutual_vector(images), self.gate == "single")
        return anchor, partner

    def _keys(self, features: Tensor, labels: Tensor, memory: FeatureMemory | None) -> Keys:
        """The batch, with gather that of all ranks, and the memory."""
        batch = gather_checked(features, labels, self._group) if self.gather else (features, labels, 0)
        if memory is None:
            return Keys(*batch)
        features, labels, offset = batch
        return Keys(features, torch.cat([labels, memory.labels]), offset, memory.features)

    def _remember(self, memory: FeatureMemory, features: Tensor, labels: Tensor, table: Keys) -> None:
        """Push the images of all ranks, so that all memories are equal: DDP broadcasts the buffers of one rank."""
        if self.gather:
            features, labels = table.features, table.labels[: table.features.shape[0]]
        else:
            features, labels, _ = gather_checked(features.detach(), labels)
        memory.push_unchecked(features, labels)

    def _mutual_vector(self, images: "_Images") -> Tensor:
        """The mutual vectors m [P,D] of pairs of images."""
        if images.shared and is_plain_mlp(self.mutual):
            return self.mutual.of_rows(images.table, images.rows)
        anchor, partner = images.take()
        mutual: Tensor = self.mutual(anchor, partner)
        if not isinstance(mutual, Tensor) or mutual.shape != anchor.shape:
            raise ValueError(f"mutual must map two [P, D] to [P, D], got {describe(mutual)} for {describe(anchor)}")
        return mutual

    def _check_features(self, features: Tensor) -> None:
        """Raise unless these are features that the head's first layer takes, if that is a plain Linear."""
        check_features(features, dim=self.dim)
        first = self.mutual.fc1 if isinstance(self.mutual, MutualMLP) else None
        plain = [layer for layer in (first, self.classifier) if is_plain_linear(layer)]
        if not plain:
            return
        weight = plain[0].weight
        check_device(features, "features", weight, "the head's weights")
        if features.dtype == weight.dtype:
            return
        # Autocast leaves float64 alone, and casts to a single dtype.
        device = features.device.type
        casts = weight.dtype != torch.float64 and torch.is_autocast_enabled(device)
        if not casts or features.dtype not in (torch.float32, torch.get_autocast_dtype(device)):
            raise ValueError(
                "features and the head's weights must be of one dtype outside autocast, and within it features float32 "
                f"or of autocast's dtype, got {describe(features)} and {describe(weight)}: convert one with .to()"
            )

    def extra_repr(self) -> str:
        names = ("dim", "num_classes", "gate", "intra", "inter", "gather")
        memory = 0 if self.memory is None else self.memory.size
        return ", ".join([*(f"{name}={getattr(self, name)!r}" for name in names), f"memory={memory}"])


class _Images(NamedTuple):
    """The images of P pairs as rows of a table, which take less memory to store than the images."""

    table: Tensor  # [N,D]
    rows: Tensor  # [2,P], anchors and partners
    shared: bool = False  # whether rows of the table are typically in several pairs

    def take(self) -> Tensor:
        """[2,P,D]."""
        return take(self.table, self.rows)


def _images(features: Tensor, pairs: Pairs, partner: Tensor | None) -> _Images:
    """The images of pairs of rows of features [B,D], or of such rows and given partners [P,D]."""
    if partner is None:
        return _Images(features, torch.stack([pairs.anchor, pairs.partner]), shared=True)
    # The partner of a pair that is not valid may be any row of keys; a non-finite one would make gradients 0 * x NaN.
    partner = partner.to(features.dtype).where(pairs.valid[:, None], features.index_select(0, pairs.anchor))
    rows = torch.arange(partner.shape[0], device=features.device) + features.shape[0]
    return _Images(torch.cat([features, partner]), torch.stack([pairs.anchor, rows]))


def _valid(pairs: Pairs, labels: Tensor, own: Tensor) -> Tensor:
    """Which rows [2P] are valid, given their labels [2P] and features [2P,D] under their own gates."""
    has_class = labels >= 0
    exists = pairs.valid & has_class.view(2, -1).all(0)
    # Non-finite images of pairs that do not exist stay: they may be the only ones that make the loss non-finite.
    return exists.repeat(2) | (has_class & ~own.detach().isfinite().all(1))


def _warn_if_few(features: Tensor, labels: Tensor, pairs: Pairs) -> bool:
    """Warn if few of the pairs of a head's first batch are valid; False if the values cannot be read."""
    if torch.compiler.is_compiling() or type(labels) is not Tensor or labels.is_meta or _get_current_dispatch_mode():
        return False
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    # One copy to the host, so one synchronisation. No warning for images without a class, which are meant to have no
    # pairs, nor for non-finite features, which the loss shows.
    finite = features.detach().isfinite().all().expand_as(pairs.valid)
    found = torch.stack([labels.index_select(0, pairs.anchor), pairs.valid, finite]).cpu()
    label, valid, finite = found[:, found[0] >= 0]
    if valid.sum() < FEW * len(valid) and finite.all():
        frame, level = sys._getframe(), 1  # the warning points to the caller's own code
        while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("apinet_head", "torch"):
            frame, level = frame.f_back, level + 1
        warnings.warn(
            f"{int((valid == 0).sum())} of the {len(valid)} pairs of the first batch are not valid and masked out: "
            f"it has {len(labels)} images, of {len(label.unique())} different classes. Draw several images of each "
            "class: DataLoader(dataset, batch_sampler=BalancedBatchSampler(labels)), not sampler= or shuffle=True.",
            stacklevel=level,
        )
    return True
