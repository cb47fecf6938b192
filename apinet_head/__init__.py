"""API-Net as a drop-in head: fine-grained image classification by comparing pairs of images.

Zhuang, Wang, Qiao: "Learning Attentive Pairwise Interaction for Fine-Grained Classification", AAAI 2020.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from apinet_head.chunked import ChunkedBackbone
from apinet_head.distributed import gather_features
from apinet_head.feature_memory import FeatureMemory
from apinet_head.head import APIHead, APIOutput
from apinet_head.loss import APILoss, LossTerms, api_loss, api_loss_terms
from apinet_head.pairs import Pairs, mine_pairs, random_pairs
from apinet_head.sampler import BalancedBatchSampler

if TYPE_CHECKING:
    from apinet_head.explain import PairExplanation, explain_pair
    from apinet_head.model import APINet
    from apinet_head.official import load_official_checkpoint

__version__ = "0.1.0"

__all__ = [
    "APIHead",
    "APILoss",
    "APINet",
    "APIOutput",
    "BalancedBatchSampler",
    "ChunkedBackbone",
    "FeatureMemory",
    "LossTerms",
    "PairExplanation",
    "Pairs",
    "api_loss",
    "api_loss_terms",
    "explain_pair",
    "gather_features",
    "load_official_checkpoint",
    "mine_pairs",
    "random_pairs",
]


# Imported on first use, as they import huggingface_hub and timm, which the head does not need.
_ON_FIRST_USE = {
    "APINet": "apinet_head.model",
    "PairExplanation": "apinet_head.explain",
    "explain_pair": "apinet_head.explain",
    "load_official_checkpoint": "apinet_head.official",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ON_FIRST_USE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
