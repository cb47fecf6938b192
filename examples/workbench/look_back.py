"""Partners from past batches too: a memory beside the net, which the net's head searches in training."""

from typing import Any

import torch
from torch import nn

from apinet_head import APINet, FeatureMemory, gather_features


def look_back(net: APINet, size: int, device: torch.device) -> FeatureMemory:
    """Let the net's head search its partners in the batch and in the last `size` features, with every call from now on.

    The memory is used from the second batch on, without a warm-up. Of several processes, each keeps the features of
    all, so that the memories are alike.
    """
    memory = FeatureMemory(size, net.dim, device=device)

    # A hook, for only the head's caller has the features, and this way the loop calls the net as it does without.
    def search_memory(_: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
        features, labels = inputs
        if labels is None:
            return None
        batch, batch_labels, offset = gather_features(features, labels)
        keys, key_labels = torch.cat([batch, memory.features]), torch.cat([batch_labels, memory.labels])
        memory.push(batch, batch_labels)
        return inputs, arguments | {"keys": keys, "key_labels": key_labels, "key_offset": offset}

    net.head.register_forward_pre_hook(search_memory, with_kwargs=True)
    return memory
