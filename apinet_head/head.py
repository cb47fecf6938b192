"""The API-Net head: a classifier that learns from pairs of images and at test time is one linear layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apinet_head._checks import (
    check_device,
    check_dtype,
    check_features,
    check_int,
    check_labels,
    check_not_inference,
    check_number,
    describe,
)
from apinet_head.distributed import gather_features, mean_over_ranks, world_size
from apinet_head.mutual import MutualMLP, make_mutual
from apinet_head.pairs import Pairs, check_pairs, mine_pairs, searches_of


class APIOutput(NamedTuple):
    """What the head makes of P pairs: rows [0,P) belong to the anchors, rows [P,2P) to the partners.

    Attributes:
        logits_self: [2P,C], of features under their own gate; without a classifier those features [2P,D].
        logits_other: [2P,C], of features under the gate of the other image of the pair; likewise.
        labels: [2P], class indices.
        valid: [2P] bool, False where the pair doesn't exist and the row is to count for nothing. A row that isn't
            finite counts all the same: as its gradient would not be finite either, the loss has to tell.
        pairs: the P pairs.
        num_rows: scalar that the loss divides its sums over rows by, None for the number of valid rows. Where one
            batch spans many ranks, it is their mean number of valid rows, so that the mean of the ranks' losses is
            the loss of the whole batch.
    """

    logits_self: Tensor
    logits_other: Tensor
    labels: Tensor
    valid: Tensor
    pairs: Pairs
    num_rows: Tensor | None = None


class APIHead(nn.Module):
    """Attentive pairwise interaction on the pooled features of any backbone (paper, section 3).

    With labels, every image of the batch is paired with its nearest of the same class and of another class. A mutual
    vector m is computed of the pair, gates g = sigmoid(m * x) of each image, and all of x + x * g are classified:
    under an image's own gate and under the other one's. `api_loss` turns the result into a loss. Without labels, in
    deployment, only the classifier runs.

    Args:
        dim: channels D of the features.
        num_classes: C; 0 for no classifier of its own (pass `classifier=` in the call, or take the features).
        hidden_dim: width of the mutual vector's MLP.
        dropout: probability, inside that MLP and before the classifier, in train mode only.
        mutual: the mutual vector m: "mlp", as in the paper, or of its ablation "individual" (none: g = sigmoid(x)),
            "bilinear" (compact bilinear pooling of the two), "square_diff", "sum", "product" or "weighted" (their sum
            weighted by an MLP); or a module of your own that maps two [P,D] to [P,D].
        gate: "pair", a gate sigmoid(m * x) for each of the two images; or "single", sigmoid(m) for both, so that
            logits_other is logits_self: train that with rank_weight=0.
        intra: partner of the same class: "similar", "dissimilar", "random" or None, see `mine_pairs`.
        inter: partner of another class, likewise.
        gather: take the batches of all ranks of torch.distributed for one: each rank searches the partners of its own
            images among the features of all. After DDP's averaging, loss and gradients are those of one process with
            the whole batch. Every rank must then call the head with labels, and with as many images as the others.
            Without a process group it changes nothing.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an argument is out of its range; the message shows it.
        TypeError: it is no number where one is due.

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
        gather: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("dim", dim, 1), ("num_classes", num_classes, 0), ("hidden_dim", hidden_dim, 1)):
            check_int(value, name, least)
        if gate not in ("pair", "single"):
            raise ValueError(f"gate must be 'pair' or 'single', got {gate!r}")
        check_number(dropout, "dropout", 0, 1)
        check_dtype(dtype)
        if gate == "single" and mutual == "individual":
            raise ValueError("gate='single' is a function of the mutual vector, and mutual='individual' has none")
        searches_of(intra, inter)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim: int = dim
        self.num_classes: int = num_classes
        self.gate: str = gate
        self.intra: str | None = intra
        self.inter: str | None = inter
        self.gather: bool = gather
        self.mutual: nn.Module = (
            mutual if isinstance(mutual, nn.Module) else make_mutual(mutual, dim, hidden_dim, dropout, **factory)
        )
        self.drop: nn.Dropout = nn.Dropout(dropout)
        self.classifier: nn.Module = nn.Linear(dim, num_classes, **factory) if num_classes else nn.Identity()

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        *,
        pairs: Pairs | None = None,
        classifier: nn.Module | None = None,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
        key_offset: int | None = None,
    ) -> Tensor | APIOutput:
        """Class logits without labels, all that the loss needs with them; in train and eval mode alike.

        Args:
            features: [B,D], floating point.
            labels: [B], class indices of an integer dtype.
            pairs: take these instead of mining; their partners are rows of `keys`, or of `features` (of all ranks',
                with gather=True).
            classifier: your own, mapping [N,D] to [N,C], in place of the head's.
            keys: [M,D], where partners are searched instead of in `features`, see `mine_pairs`.
            key_labels: [M], their classes.
            key_offset: the row of `keys` that holds query 0, if they hold the queries.

        Returns:
            Logits [B,C] (the features themselves, if there is no classifier), or an APIOutput.

        Raises:
            ValueError: shapes, dtypes or devices don't fit; the message shows what came.
            TypeError: it is no tensor, or pairs are no Pairs.
        """
        self._check(features)
        classify: Callable[[Tensor], Tensor] = classifier if classifier is not None else self.classifier
        if labels is None:
            if not (pairs is None and keys is None and key_labels is None and key_offset is None):
                raise ValueError("pairs and keys are for training and need labels, got labels=None")
            return features if isinstance(classify, nn.Identity) else classify(self.drop(features))

        check_labels(labels, features)
        if (keys is None) != (key_labels is None):
            raise ValueError(
                f"keys need key_labels and the other way round, got only {'key_labels' if keys is None else 'keys'}"
            )
        if keys is not None and key_labels is not None:
            check_features(keys, "keys", self.dim)
            check_labels(key_labels, keys, "key_labels", "keys")
        across_ranks = self.gather and world_size() > 1
        if across_ranks and keys is None:
            keys, key_labels, key_offset = gather_features(features, labels)
        if pairs is None:
            pairs = mine_pairs(
                features, labels, intra=self.intra, inter=self.inter,
                keys=keys, key_labels=key_labels, key_offset=key_offset,
            )  # fmt: skip
        table, rows, mutual = self._compare(features, pairs, keys)
        # What the gates make of the features takes more memory to keep for the backward pass than time to make again.
        gated: list[Tensor] = checkpoint(
            self._gated, table, rows, mutual, use_reentrant=False, preserve_rng_state=False
        )  # fmt: skip
        if not isinstance(classify, nn.Identity):
            gated = [classify(self.drop(features)) for features in gated]
        own, other = gated[0], gated[-1]
        if not isinstance(own, Tensor) or own.ndim != 2 or own.shape[0] != rows.shape[1] * 2:
            raise ValueError(f"the classifier must map [N, D] to [N, C], got {describe(own)} for N={rows.shape[1] * 2}")
        # A pair that doesn't exist is left out, but not the loss's only sign that an image of the batch isn't finite.
        valid = pairs.valid.repeat(2) | ~own.detach().isfinite().all(1)
        labels = labels.long()  # torch before 2.6 selects from few other dtypes
        partner_labels = labels if key_labels is None else key_labels.long()
        return APIOutput(
            logits_self=own,
            logits_other=other,
            labels=torch.cat([labels.index_select(0, pairs.anchor), partner_labels.index_select(0, pairs.partner)]),
            valid=valid,
            pairs=pairs,
            num_rows=mean_over_ranks(valid.sum()) if across_ranks else None,
        )

    def gates(self, features: Tensor, pairs: Pairs, *, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gates of pairs of rows of features [B,D], or of features and keys [M,D] (paper, equation 2).

        Returns:
            sigmoid(m * x) of the anchors and of the partners, each [P,D], in (0, 1); sigmoid(m) twice, with
            gate="single".
        """
        self._check(features)
        table, rows, mutual = self._compare(features, pairs, keys)
        anchor, partner = self._gates(_take(table, rows), mutual)
        return anchor, partner

    def _compare(self, features: Tensor, pairs: Pairs, keys: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """A table of features, the rows [2,P] in it of anchors and partners, and the pairs' mutual vectors [P,D]."""
        check_pairs(pairs, features)
        try:
            table, rows = self._images(features, pairs, keys)
            # Where each row is in several pairs, the quicker way; not for a subclass, which may compute otherwise.
            if keys is None and type(self.mutual) is MutualMLP:
                return table, rows, self.mutual.of_rows(table, *rows)
            images = _take(table, rows)
        except IndexError as error:  # a CPU looks at the rows; a GPU stops by itself
            raise ValueError(
                f"pairs must be rows of features {describe(features)}"
                + ("" if keys is None else f" and, the partners, of keys {describe(keys)}")
                + f", got {describe(pairs.anchor)} with others"
            ) from error
        mutual: Tensor = self.mutual(*images)
        if not isinstance(mutual, Tensor) or mutual.shape != images.shape[1:]:
            raise ValueError(f"mutual must map two [P, D] to [P, D], got {describe(mutual)} for {describe(images[0])}")
        return table, rows, mutual

    def _images(self, features: Tensor, pairs: Pairs, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """A table of features, and the rows [2,P] in it of the anchors and of the partners."""
        if keys is None:
            return features, torch.stack([pairs.anchor, pairs.partner])
        check_features(keys, "keys", self.dim)
        check_device(keys, "keys", features, "features")
        if torch.promote_types(keys.dtype, features.dtype) != features.dtype:
            self._check_dtype(keys, "keys")
        if (features.requires_grad or keys.requires_grad) and torch.is_grad_enabled():
            for rows in (pairs.anchor, pairs.partner, pairs.valid):
                check_not_inference(rows, "pairs")
        # A pair that doesn't exist points at any row of keys; were that one not finite, it would spoil the gradients
        # although the loss leaves the pair out.
        anchor = features.index_select(0, pairs.anchor)
        partner = keys.index_select(0, pairs.partner).where(pairs.valid[:, None], anchor)
        rows = torch.arange(partner.shape[0], device=features.device) + features.shape[0]
        return torch.cat([features, partner]), torch.stack([pairs.anchor, rows])

    def _gates(self, images: Tensor, mutual: Tensor) -> Tensor:
        """Gates of images [2,P,D], the anchors and the partners."""
        return torch.sigmoid(mutual.expand_as(images) if self.gate == "single" else mutual * images)

    def _gated(self, table: Tensor, rows: Tensor, mutual: Tensor) -> list[Tensor]:
        """The images under their own gates [2P,D] and, with two gates, then under each other's."""
        images = _take(table, rows)
        gates = self._gates(images, mutual)
        of_each = [gates, gates.flip(0)] if self.gate == "pair" else [gates]
        return [torch.addcmul(images, images, gate).flatten(0, 1) for gate in of_each]  # x + x * g

    def _check(self, features: Tensor) -> None:
        check_features(features, dim=self.dim)
        if (weight := self._weight()) is None:
            return
        check_device(features, "features", weight, "the head's weights")
        self._check_dtype(features, "features")
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            check_not_inference(features, "features")

    def _weight(self) -> nn.Parameter | None:
        weights = list(self.parameters())  # next() with a default is more than torch 2.5 can compile
        return weights[0] if weights else None

    def _check_dtype(self, features: Tensor, name: str) -> None:
        weight = self._weight()
        if weight is None or features.dtype == weight.dtype:
            return
        # Autocast leaves float64 alone, and knows but one dtype of half precision at a time.
        device = features.device.type
        cast = weight.dtype != torch.float64 and torch.is_autocast_enabled(device)
        if not cast or features.dtype not in (torch.float32, torch.get_autocast_dtype(device)):
            raise ValueError(
                f"{name} and the head's weights must be of one dtype outside autocast, and within it {name} float32 or "
                f"of autocast's dtype, got {describe(features)} and {describe(weight)}: convert the {name}, or the "
                "head with .to()"
            )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in ("dim", "num_classes", "gate", "intra", "inter"))


def _take(table: Tensor, rows: Tensor) -> Tensor:
    """table[rows], [2,P,D]; index_select has the quicker backward pass."""
    return table.index_select(0, rows.flatten()).view(*rows.shape, table.shape[1])
