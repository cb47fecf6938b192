"""A training step on fake tensors, which have shapes and no data: its peak of memory, without a device to run it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from apinet_head.head import APIHead

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def peak_of_step(
    net: nn.Module, images: tuple[int, ...], chunk_size: int | None, keep: int, amp: torch.dtype | None, loss: Loss
) -> tuple[int, int, int]:
    """Bytes at the peak of forward, `zero_grad()` and backward; of parameters and buffers; of those that learn.

    The gradients of the step before are there until `zero_grad()`. `images` is the shape of a batch.
    """
    tracker, autocast = _tracker(), torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None)
    try:
        # On the CPU: autograd would ask a fake CUDA tensor's device for a thread. Shapes and bytes are the same.
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, _AsOnCuda():
            net = fake_copy(net, mode).train()
            with autocast:
                _set_chunks(net, torch.empty(images), chunk_size, keep)
            learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
            for parameter in learning:
                parameter.grad = torch.empty_like(parameter)
            tracker.track_external(net)
            with tracker:
                batch, labels = torch.empty(images), torch.zeros(images[0], dtype=torch.int64)
                with autocast:
                    value = loss(net, batch, labels)
                net.zero_grad()
                # As value.backward(), which would leave _AsOnCuda.
                run_backward = torch.autograd.Variable._execution_engine.run_backward
                run_backward((value,), (torch.ones_like(value),), False, False, (), True, accumulate_grad=True)
            peak = sum(parts["Total"] for parts in tracker.get_tracker_snapshot("peak").values())
    except DataDependentOutputException as error:
        raise ValueError(f"no estimate without data: the net reads values of its tensors ({error})") from error
    return peak, _bytes([*net.parameters(), *net.buffers()]), _bytes(learning)


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _tracker() -> Any:
    """torch's MemTracker, without the accounts of each module, which take most of its time."""
    try:
        from torch.distributed._tools.mem_tracker import MemTracker
    except ImportError as error:
        raise RuntimeError(
            f"an estimate needs torch's MemTracker, which torch {torch.__version__} does not have ({error}): take a "
            "number for chunk_size, such as 15"
        ) from error
    tracker = MemTracker()
    for hook in ("_pre_fw_hook", "_post_fw_hook", "_pre_bw_hook", "_post_bw_hook"):
        setattr(tracker, hook, lambda *_: None)  # a version that calls them otherwise is slower, not wrong
    return tracker


def fake_copy(net: nn.Module, mode: FakeTensorMode | None = None) -> nn.Module:
    """The net with fake parameters and buffers on the CPU, and without other ranks: nothing is allocated for it."""

    def fake(tensor: Tensor) -> Tensor:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    with mode or FakeTensorMode():
        fakes = {id(tensor): fake(tensor) for tensor in (*net.parameters(), *net.buffers())}
    copied: Any = copy.deepcopy(net, fakes)
    for module in copied.modules():
        if getattr(module, "gather", False) is True:
            module.gather = False
        if isinstance(module, APIHead):
            vars(module)["_remember"] = lambda *_: None  # takes features of all ranks, which are small beside a step
    return copied  # type: ignore[no-any-return]


def _set_chunks(net: nn.Module, images: Tensor, chunk_size: int | None, keep: int) -> None:
    """Put chunk size and number of kept chunks into the net, and leave out chunks that are like others."""
    chunked: Any = next((m for m in net.modules() if hasattr(m, "chunk_size") and hasattr(m, "backbone")), None)
    if chunked is not None:
        chunked.chunk_size = len(images) if chunk_size is None else chunk_size
        chunked.keep = chunked.keep_chunks = keep  # one for a ChunkedBackbone, the other for an APINet
        if len(images) > chunked.chunk_size:
            chunked.backbone = _LastChunks(chunked.backbone, images, chunked.chunk_size, keep)
    elif chunk_size is not None:
        raise ValueError(
            f"chunk_size={chunk_size} is for an APINet, or a net with a ChunkedBackbone in it: {type(net).__name__} "
            "has neither"
        )


class _LastChunks(nn.Module):
    """Runs a backbone on the last chunks of a batch; the features of the others are empty, which saves time.

    The others have no higher peak. In forward, all other features are there when the last chunks run. Backward begins
    with the kept chunks, of which the last may be smaller; one that is recomputed has the gradients of the last beside
    it, as all others.
    """

    def __init__(self, backbone: nn.Module, images: Tensor, chunk_size: int, keep: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.left_out, self.calls = -(-len(images) // chunk_size) - max(keep + 1, 2), 0
        with torch.no_grad():
            self.like = backbone(images[:chunk_size])

    def forward(self, images: Tensor) -> Any:
        self.calls += 1
        # Calls beyond the number of chunks recompute, which only those do that were run.
        if self.calls > self.left_out or not isinstance(self.like, Tensor):
            return self.backbone(images)
        # A leaf that learns: the gradient of all features is whole before that of the last chunks comes.
        learns = any(parameter.requires_grad for parameter in self.backbone.parameters())
        return self.like.new_empty((len(images), *self.like.shape[1:]), requires_grad=learns)


FLOAT32 = (  # in CUDA's autocast, but not in the CPU's
    F.layer_norm, F.group_norm, F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, Tensor.softmax,
    Tensor.log_softmax,
)  # fmt: skip


class _AsOnCuda(TorchFunctionMode):
    """Has functions take dtypes and kernels of CUDA on the CPU.

    Attention is one of them: where the CPU would compute and keep its [N,N] weights, CUDA's kernel keeps none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        if func is F.scaled_dot_product_attention and args[0].ndim == 4 and args[0].dtype is not torch.float64:
            func = _attention_on_cuda
        return func(*args, **(kwargs or {}))


def _attention_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` as it prepares its tensors for the kernel on CUDA."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if enable_gqa:
        key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
    if attn_mask is not None:
        length = attn_mask.shape[-1]
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype) if attn_mask.dtype is torch.bool else attn_mask
        attn_mask = F.pad(attn_mask.to(query.dtype), (0, -length % 8))[..., :length]
        attn_mask = attn_mask.expand(*query.shape[:3], length)
    learns = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    out: Tensor = attend(query, key, value, attn_mask, learns, dropout_p, is_causal, scale=scale)[0]
    return out
