"""What takes another way on GPUs than on CPUs gives the same numbers there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lib_lora_train.model.family import SD1
from lib_lora_train.model.ops.linear import LoRADelta, shared_linears
from lib_lora_train.model.ops.recipes import GroupNorm, LayerNorm, made
from lib_lora_train.model.sd.components import unet_tensors
from lib_lora_train.model.sd.detection import unet_config
from lib_lora_train.model.sd.unet import UNet
from tests.model.plain_lora import lora, nhwc
from tests.model.small_checkpoints import CONTEXT, HINTS, checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def near(ours: Tensor, exact: Tensor, *, bound: float) -> bool:
    return bool((ours.detach().double().cpu() - exact.detach()).abs().max() <= bound * exact.detach().abs().max())


@pytest.mark.parametrize("order", [torch.Tensor.contiguous, nhwc], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float16, 1e-2)])
def test_norms_in_either_order_are_near_the_exact_ones(order: object, dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x, scale, shift, direction = (torch.randn(*shape, generator=generator).to(dtype) for shape in (
        (2, 64, 6, 5), (64,), (64,), (2, 64, 6, 5)))
    ours = order(x.cuda()).requires_grad_()
    exact = x.double().requires_grad_()
    y = made(GroupNorm(scale.cuda(), shift.cuda(), 1e-5, silu=True), ours)
    expected = F.silu(F.group_norm(exact, 32, scale.double(), shift.double(), 1e-5))
    rows = made(LayerNorm(scale.cuda(), shift.cuda()), ours.permute(0, 2, 3, 1))
    expected_rows = F.layer_norm(exact.permute(0, 2, 3, 1), (64,), scale.double(), shift.double())
    for result, right, along in ((y, expected, direction), (rows, expected_rows, direction.permute(0, 2, 3, 1))):
        assert result.dtype == dtype and near(result, right, bound=bound)
        (found,), (exactly,) = (torch.autograd.grad(result, ours, along.cuda()),
                                torch.autograd.grad(right, exact, along.double()))
        assert near(found, exactly, bound=bound)


def test_a_fused_layer_in_fp16_is_near_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight, down, up, direction = (torch.randn(*shape, generator=generator) for shape in (
        (2, 9, 32), (24, 32), (4, 32), (24, 4), (2, 9, 24)))
    given = [x.half().cuda().requires_grad_(), *(side.cuda().requires_grad_() for side in (down, up))]
    exact = [side.detach().double().cpu().requires_grad_() for side in given]
    low = LoRADelta(given[1], given[2], 0.5, (given[1].detach().half(), given[2].detach().half()))
    y = shared_linears(given[0], [(weight.half().cuda(), None)], [low])[0]
    expected = lora(exact[0], weight.half().double(), None, exact[1], exact[2], 0.5)
    assert near(y, expected, bound=1e-2)
    found = torch.autograd.grad(y, given, direction.half().cuda())
    right = torch.autograd.grad(expected, exact, direction.half().double())
    assert all(near(a, b, bound=1e-2) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("order", [torch.Tensor.contiguous, nhwc], ids=["NCHW", "NHWC"])
def test_the_unet_predicts_the_same_on_either_device_and_with_kernels_in_either_order(order: object) -> None:
    tensors = {name: tensor.detach() for name, tensor in unet_tensors(checkpoint("sd1")).items()}
    config = unet_config(tensors, family=SD1, hints=HINTS["sd1"])
    there = {name: order(tensor.cuda()) if tensor.ndim == 4 else tensor.cuda() for name, tensor in tensors.items()}
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), torch.randn(2, 77, CONTEXT["sd1"])
    expected = UNet(tensors, config)(x, t, context).double()
    found = UNet(there, config)(x.cuda(), t.cuda(), context.cuda())
    assert near(found, expected, bound=1e-2) and found.is_contiguous()  # TF32 may be on
