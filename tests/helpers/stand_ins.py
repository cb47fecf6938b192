"""What libraries and users put in the place of a Linear."""

import torch
import torch.nn.functional as F
from torch import nn


class LoRA(nn.Module):
    """As peft has it: the frozen layer, and beside it a product of two small ones."""

    def __init__(self, base_layer, dtype=None):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        dtype = dtype or base_layer.weight.dtype
        self.lora_a = nn.Linear(base_layer.in_features, 2, bias=False, dtype=dtype)
        self.lora_b = nn.Linear(2, base_layer.out_features, bias=False, dtype=dtype)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        low = self.lora_b(self.lora_a(x.to(self.lora_a.weight.dtype)))
        return self.base_layer(x) + low.to(x.dtype)


class StoredIn8Bits(nn.Module):
    """As bitsandbytes and others keep weights: integers, made into what the input is when called."""

    def __init__(self, layer):
        super().__init__()
        self.scale = float(layer.weight.detach().abs().max()) / 127
        weight = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(layer.bias.detach().float())

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias.to(x.dtype))


class Calling(nn.Module):
    """Any function as a module; `attributes` are what it has beside."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *inputs):
        return self.function(*inputs)


class DoublingTensor(torch.Tensor):
    """Says itself how a linear layer is computed, as DTensor and the tensors of torchao do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs)
        return 2 * result.as_subclass(torch.Tensor) if function is F.linear else result


def with_own_tensor(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(DoublingTensor))
    return layer


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def scaled(layer):
    layer.__class__ = Scaled
    return layer


def with_own_forward(layer):
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)
    return layer


def hooked(layer):
    layer.register_forward_hook(lambda _, inputs, output: output * 2)
    return layer


def prehooked(layer):
    layer.register_forward_pre_hook(lambda _, inputs: inputs[0] + 1)
    return layer
