"""A training step on fake tensors, which have shapes and no data: its peak of memory, without a device to run it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def peak_of_step(
    net: nn.Module, images: tuple[int, ...], chunk_size: int | None, amp: torch.dtype | None, loss: Loss
) -> tuple[int, int, int]:
    """Bytes at the peak of forward, `zero_grad()` and backward; of parameters and buffers; of those that learn.

    The gradients of the step before are there until `zero_grad()`.

    Args:
        net: stays as it is.
        images: the shape of a batch.
        chunk_size: to be put into the net; None for the whole batch.
        amp: the dtype of autocast.
        loss: of the net, images and labels.
    """
    tracker = _tracker()
    try:
        # The tensors are on the CPU, whatever the device: autograd would ask a fake CUDA tensor's device for a thread,
        # and without a GPU there is none. Operations, shapes and dtypes are the same, and so are the bytes.
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            net = fake_copy(net, mode).train()
            _run_step(net, images, chunk_size, amp, loss, tracker)
            learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
            peak = sum(parts["Total"] for parts in tracker.get_tracker_snapshot("peak").values())
    except DataDependentOutputException as error:
        raise ValueError(f"no estimate without data: the net reads values of its tensors ({error})") from error
    return peak, _bytes([*net.parameters(), *net.buffers()]), _bytes(learning)


def _run_step(
    net: nn.Module,
    images: tuple[int, ...],
    chunk_size: int | None,
    amp: torch.dtype | None,
    loss: Loss,
    tracker: Any,
) -> None:
    autocast = torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None)
    if amp is not None:
        _float32_as_on_cuda(net)
    with autocast:
        _set_chunk_size(net, torch.empty(images), chunk_size)
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.grad = torch.empty_like(parameter)
    tracker.track_external(net)
    with tracker:
        batch, labels = torch.empty(images), torch.zeros(images[0], dtype=torch.int64)
        with autocast:
            value = loss(net, batch, labels)
        for parameter in learning:
            parameter.grad = None
        value.backward()  # type: ignore[no-untyped-call]


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _tracker() -> Any:
    """torch's MemTracker, without the accounts of each module, which take most of its time."""
    try:
        from torch.distributed._tools.mem_tracker import MemTracker
    except ImportError as error:
        raise RuntimeError(
            "an estimate needs torch.distributed._tools.mem_tracker, which is in torch 2.5 and newer, and torch "
            f"{torch.__version__} has none ({error}): take a number for chunk_size, such as 15"
        ) from error

    def nothing(*_: Any) -> None:
        pass

    tracker = MemTracker()
    for hook in ("_pre_fw_hook", "_post_fw_hook", "_pre_bw_hook", "_post_bw_hook"):
        setattr(tracker, hook, nothing)  # a version that calls them otherwise is slower, not wrong
    return tracker


def _float32_as_on_cuda(net: nn.Module) -> None:
    """Have modules compute in float32 that do so in CUDA's autocast but not in the CPU's."""

    def convert(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].float(), *inputs[1:])

    for module in net.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.Softmax)):
            module.register_forward_pre_hook(convert)


def fake_copy(net: nn.Module, mode: FakeTensorMode | None = None) -> nn.Module:
    """The net with fake parameters and buffers on the CPU: nothing is allocated for them."""
    mode = mode or FakeTensorMode()

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    copied = copy.deepcopy(net, {id(tensor): fake(tensor) for tensor in (*net.parameters(), *net.buffers())})
    gathering: list[Any] = [module for module in copied.modules() if getattr(module, "gather", False) is True]
    for module in gathering:
        module.gather = False  # the other ranks take no part in this
    return copied


def _set_chunk_size(net: nn.Module, images: Tensor, chunk_size: int | None) -> None:
    """Put the chunk size into the net, and spare its backbone chunks that are like others."""
    chunked: Any = next((m for m in net.modules() if hasattr(m, "chunk_size") and hasattr(m, "backbone")), None)
    if chunked is not None:
        chunked.chunk_size = len(images) if chunk_size is None else chunk_size
        if len(images) > chunked.chunk_size:
            chunked.backbone = _LastChunks(chunked.backbone, images, chunked.chunk_size)
    elif chunk_size is not None:
        raise ValueError(
            f"chunk_size={chunk_size} is for an APINet, or a net with a ChunkedBackbone in it: {type(net).__name__} "
            "has neither"
        )


class _LastChunks(nn.Module):
    """Runs a backbone on the last two chunks of a batch, and takes the features of the others out of thin air.

    The others have no higher peak. In forward, all other features are there when the last chunks run. Backward begins
    with the last chunk, which may be smaller; the one before it is there together with the gradient of all features,
    and with the parameters' gradients of the last, as all others are.
    """

    def __init__(self, backbone: nn.Module, images: Tensor, chunk_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.chunks, self.calls = -(-len(images) // chunk_size), 0
        with torch.no_grad():
            self.like = backbone(images[:chunk_size])
        self.learning = next((parameter for parameter in backbone.parameters() if parameter.requires_grad), None)

    def forward(self, images: Tensor) -> Any:
        self.calls += 1
        # Calls beyond the number of chunks recompute, which is asked of chunks alone that kept something.
        if self.calls >= self.chunks - 1 or not isinstance(self.like, Tensor):
            return self.backbone(images)
        return _ThinAir.apply((len(images), *self.like.shape[1:]), self.like.dtype, self.learning)


class _ThinAir(torch.autograd.Function):
    """A tensor that depends on a parameter, as far as autograd knows; neither pass keeps or computes anything."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], dtype: torch.dtype, parameter: Tensor | None) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[None, None, None]:
        return None, None, None
