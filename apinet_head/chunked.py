"""Runs a batch through the backbone in chunks: the memory of some of them, the gradient of the whole batch."""

import random
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from apinet_head._checks import check_int, check_module, describe

RUNNING = ("running_mean", "running_var", "num_batches_tracked")


class ChunkedBackbone(nn.Module):
    """Runs `backbone` on `chunk_size` images at a time, and recomputes all but the last chunks in the backward pass.

    Of a recomputed chunk only images and features are kept in between. Peak memory is that of `keep` chunks, and of one
    at least; the cost is another forward pass of the others. The last chunk is kept at no cost in memory, because its
    backward pass comes first.

    Features and gradients are exactly those of the chunks one after the other, and so are buffers in the end: BatchNorm
    normalises each chunk by its own statistics, and 8 chunks of 15 are what the published training computes on 8 GPUs.
    A chunk is recomputed under the autocast, the buffers and the random states that it first saw: those of torch, numpy
    and Python, and `torch.Generator`s that are attributes of modules. Buffers are copied for this once, and those that
    change once for each chunk. Other state that forward changes, such as a counter in a plain attribute, is not
    replayed; nor are changes of weights or buffers through `.data` noticed, nor those of a buffer through a view of it.

    Without gradients nothing is recomputed. Compile the backbone, not this module, whose chunks `torch.compile` leaves
    alone (a last chunk of another size runs uncompiled). Gradient checkpointing of the backbone's
    own counts its BatchNorm's running statistics twice, as it does without chunks. Under the transforms of `torch.func`
    and `functional_call`, gradients are the same, but no memory is saved.

    Args:
        backbone: maps images [B,...] to features [B,...], each image by itself but for BatchNorm; or to a tuple, list,
            dict or transformers output of such tensors.
        chunk_size: number of images in a chunk.
        keep: number of chunks, the last ones, that keep what they computed and are not run again.

    Raises:
        ValueError: chunk_size is below 1, or keep below 0.
        RuntimeError: in the backward pass, if images, weights or `train()` and `eval()` have changed since forward, or
            if the backbone computes something else then.
        TypeError: chunk_size or keep is not an int, or backbone is not a module.

    Examples:
        >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> features = ChunkedBackbone(backbone, chunk_size=4)(torch.randn(12, 3, 16, 16))
        >>> features.sum().backward()
        >>> features.shape
        torch.Size([12, 8])
    """

    def __init__(self, backbone: nn.Module, chunk_size: int, *, keep: int = 1) -> None:
        super().__init__()
        check_module(backbone, "backbone")
        self.backbone = backbone
        self.chunk_size: int = check_int(chunk_size, "chunk_size", 1)
        self.keep: int = check_int(keep, "keep", 0)

    def forward(self, images: Tensor) -> Any:
        return run_in_chunks(self.backbone, images, self.chunk_size, self.keep)

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}, keep={self.keep}"


# The compiler cannot trace what replays running statistics. torch.compiler.disable would import the compiler, which
# takes a second; this waits for the first call.
@_disable_dynamo
def run_in_chunks(backbone: nn.Module, images: Tensor, chunk_size: int, keep: int = 1) -> Any:
    """The functional form of `ChunkedBackbone`.

    Raises:
        ValueError: a chunk has one image and BatchNorm is in train mode, or the chunks' outputs cannot be concatenated.
        TypeError: images are not a tensor [B, ...].
    """
    if not isinstance(images, Tensor) or images.ndim == 0:
        raise TypeError(f"images must be a tensor [B, ...] to go in chunks, got {describe(images)}")
    chunk_size = check_int(chunk_size, "chunk_size", 1)  # as an attribute it may have been set to anything
    if len(images) <= chunk_size:
        return backbone(images)
    modules = list(backbone.modules())
    if 1 in (chunk_size, len(images) % chunk_size) and any(isinstance(m, _BatchNorm) and m.training for m in modules):
        raise ValueError(
            f"chunk_size={chunk_size} leaves a chunk of one image of {describe(images)}, too few for BatchNorm in "
            "train mode: take another chunk_size or batch, or put BatchNorm in eval mode"
        )
    chunks, parameters = torch.split(images, chunk_size), list(backbone.parameters())
    learns = torch.is_grad_enabled() and (images.requires_grad or any(p.requires_grad for p in parameters))
    # torch.func allows no hooks on saved tensors; the parameters of functional_call are gone in the backward pass.
    functional = torch._C._are_functorch_transforms_active() or not all(isinstance(p, nn.Parameter) for p in parameters)
    if functional or not learns:
        outputs = [backbone(chunk) for chunk in chunks]
    else:
        first_pass = _FirstPass(modules, images.device)
        outputs = []
        for place, chunk in enumerate(chunks):
            # A last chunk of another size would be compiled anew, maybe to a graph that saves other tensors.
            run: Callable[[Tensor], Any] = backbone if len(chunk) == chunk_size else partial(_uncompiled, backbone)
            if place < len(chunks) - keep:
                run = _Recomputed(run, first_pass)
            outputs.append(run(chunk))
    return tree_map(_join, *outputs)


def _uncompiled(backbone: nn.Module, chunk: Tensor) -> Any:
    """Runs the backbone in eager mode even if it is compiled."""
    with torch.compiler.set_stance("force_eager"):
        return backbone(chunk)


Buffers = list[dict[str, Tensor | None]]  # of each module, by name


class _FirstPass:
    """What a forward pass over the chunks began with, and copies of the buffers as it goes on."""

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self.modules = modules
        self.default_device = torch.get_default_device()
        self.autocasts = [_autocast(kind) for kind in {"cpu", device.type} if torch.amp.is_autocast_available(kind)]
        self.training = [module.training for module in modules]
        self.weights = [{name: (p, _version(p)) for name, p in m._parameters.items() if p is not None} for m in modules]
        self.randomness = _randomness(modules, device)
        self.copies: dict[int, tuple[Tensor, int | None, Tensor]] = {}  # of a buffer by its id: itself, version, copy

    def buffers(self) -> Buffers:
        """Copies of the buffers as they are now; what has not changed since the last time is not copied again."""
        stale, copies = {}, {}
        for module in self.modules:
            for name, buffer in module._buffers.items():
                known = self.copies.get(id(buffer))
                # Kernels change running statistics behind the back of the version.
                if known is not None and name not in RUNNING and known[1] == _version(known[0]) is not None:
                    copies[id(buffer)] = known
                elif buffer is not None:
                    stale[id(buffer)] = buffer
        for buffer, copied in zip(stale.values(), _copies(stale.values()), strict=True):
            copies[id(buffer)] = buffer, _version(buffer), copied
        self.copies = copies
        return [
            {name: None if one is None else copies[id(one)][2] for name, one in module._buffers.items()}
            for module in self.modules
        ]

    def check_unchanged(self) -> None:
        """RuntimeError if the recomputation would not be of what forward computed."""
        for module, training, weights in zip(self.modules, self.training, self.weights, strict=True):
            if module.training != training:
                raise RuntimeError(
                    f"{type(module).__name__} of the backbone was in {'train' if training else 'eval'} mode in the "
                    "forward pass and is not in its backward pass, which recomputes chunks: call train() or eval() "
                    "after backward(), or keep all chunks"
                )
            for name, (weight, version) in weights.items():
                now = module._parameters.get(name)
                # FSDP exchanges its shards, which are DTensors, and the whole weight.
                exchanged = now is not weight and type(now) is type(weight) is nn.Parameter
                if exchanged or version not in (None, _version(weight)):
                    raise RuntimeError(
                        f"{name} {list(weight.shape)} of the backbone's {type(module).__name__} was "
                        f"{'exchanged' if exchanged else 'changed'} between the forward pass and its backward pass, "
                        "which recomputes chunks with it: call backward() before the optimiser's step, and within "
                        "what exchanges weights"
                    )


class _Recomputed:
    """Runs a chunk for which autograd saves no tensors: the backward pass runs it again, and takes them from there.

    As `torch.utils.checkpoint` does, with less Python for each tensor, of which a ResNet-101 saves 934.
    """

    def __init__(self, run: Callable[[Tensor], Any], first_pass: _FirstPass) -> None:
        self.run, self.first_pass, self.buffers = run, first_pass, first_pass.buffers()
        self.random = [get() for get, _ in first_pass.randomness]
        self.saved: list[tuple[torch.Size, torch.dtype]] = []
        self.task, self.tensors = -1, dict[int, Tensor]()  # what a backward pass has not yet asked for

    def __call__(self, chunk: Tensor) -> Any:
        self.chunk, self.version = chunk, _version(chunk)
        with saved_tensors_hooks(self._leave_out, self._find):
            return self.run(chunk)

    def _leave_out(self, tensor: Tensor) -> int:
        self.saved.append((tensor.shape, tensor.dtype))
        return len(self.saved) - 1

    def _find(self, place: int) -> Tensor:
        task = torch._C._current_graph_task_id()  # of this backward pass, which may be repeated (`retain_graph=True`)
        if task != self.task or place not in self.tensors:
            self.task, self.tensors = task, dict(enumerate(self._recompute()))
        return self.tensors.pop(place)

    @_disable_dynamo
    def _recompute(self) -> list[Tensor]:
        """The tensors that autograd saved, in that order."""
        self.first_pass.check_unchanged()
        if _version(self.chunk) != self.version:
            raise RuntimeError(
                f"the images {describe(self.chunk)} were changed between the forward pass and its backward pass, which "
                "recomputes chunks of them: call backward() before"
            )
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            tensor = tensor.detach() if tensor.requires_grad else tensor
            found.append(tensor)
            return tensor

        with self._as_first_seen(), torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
            self.run(self.chunk)
        if [(tensor.shape, tensor.dtype) for tensor in found] != self.saved:
            raise RuntimeError(
                "the backbone computed something else when a chunk was recomputed in the backward pass: autograd saved "
                f"{len(self.saved)} tensors in the forward pass, then {len(found)}, or some of other shapes or dtypes. "
                "Its forward depends on state that is not replayed, see ChunkedBackbone: keep all chunks"
            )
        return found

    @contextmanager
    def _as_first_seen(self) -> Iterator[None]:
        """Within it the backbone is as the chunk first saw it; on exit it is as it was found."""
        first_pass = self.first_pass
        found = [dict(module._buffers) for module in first_pass.modules]
        random_found = [get() for get, _ in first_pass.randomness]
        # Other tensors in the buffers' places, not other values in the buffers, which other graphs may have saved.
        distinct = {id(one): one for buffers in self.buffers for one in buffers.values() if one is not None}
        fresh = dict(zip(distinct, _copies(distinct.values()), strict=True))
        with ExitStack() as stack:
            for autocast in first_pass.autocasts:
                stack.enter_context(autocast)
            if torch.get_default_device() != first_pass.default_device:  # backward may run in another thread
                stack.enter_context(first_pass.default_device)
            try:
                self._put(
                    [{name: fresh.get(id(one)) for name, one in own.items()} for own in self.buffers], self.random
                )
                yield
            finally:
                self._put(found, random_found)

    def _put(self, buffers: Buffers, random_states: list[Any]) -> None:
        for module, own in zip(self.first_pass.modules, buffers, strict=True):
            if own or module._buffers:
                module._buffers.clear()
                module._buffers.update(own)
        for (_, put), state in zip(self.first_pass.randomness, random_states, strict=True):
            put(state)


def _version(tensor: Tensor) -> int | None:
    """The number of changes in place that autograd knows of; None if it does not count them."""
    return None if is_lazy(tensor) or tensor.is_inference() else tensor._version


def _copies(tensors: Collection[Tensor]) -> list[Tensor]:
    """Copies of tensors, in few launches of kernels: a ResNet-101 has 312 buffers."""
    with torch.no_grad():
        # Lazy ones have no values yet, and DTensors can't be copied in groups.
        copies = [
            one if is_lazy(one) else torch.empty_like(one) if type(one) is Tensor else one.clone() for one in tensors
        ]
        pairs = [pair for pair in zip(copies, tensors, strict=True) if type(pair[1]) is Tensor]
        for dtype in {old.dtype for _, old in pairs}:
            new, old = zip(*(pair for pair in pairs if pair[1].dtype == dtype), strict=True)
            torch._foreach_copy_(new, old)
    return copies


def _autocast(device_type: str) -> torch.autocast:
    """Autocast as it is now."""
    return torch.autocast(
        device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type),
        torch.is_autocast_cache_enabled(),
    )  # fmt: skip


def _randomness(
    modules: list[nn.Module], device: torch.device
) -> list[tuple[Callable[[], Any], Callable[[Any], object]]]:
    """How to read and how to set the random states that forward may use."""
    found: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [(random.getstate, random.setstate)]
    found.append((torch.get_rng_state, torch.set_rng_state))
    if device.type not in ("cpu", "meta"):
        of_device = torch.get_device_module(device)
        at = {} if device.index is None else {"device": device}  # MPS has one device
        found.append((partial(of_device.get_rng_state, **at), partial(of_device.set_rng_state, **at)))
    if numpy := sys.modules.get("numpy"):
        found.append((numpy.random.get_state, numpy.random.set_state))
    values = [value for module in modules for value in vars(module).values()]
    generators = {value for value in values if issubclass(type(value), torch.Generator)}  # isinstance takes 4 times it
    return found + [(generator.get_state, generator.set_state) for generator in generators]


def _join(*parts: Any) -> Any:
    """Concatenates one leaf of the outputs of all chunks; leaves that are not tensors must be equal in all."""
    if all(isinstance(part, Tensor) and part.ndim for part in parts):
        return torch.cat(parts)
    if any(isinstance(part, Tensor) or part != parts[0] for part in parts):
        shown = " and ".join(describe(part) if isinstance(part, Tensor) else repr(part) for part in parts[:2])
        raise ValueError(
            f"the backbone's output cannot be joined over chunks: it has {shown}, where tensors [B, ...] were expected"
        )
    return parts[0]
