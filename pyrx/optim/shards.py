"""Weights in shards, as fully_shard makes them: what of a mask is whose, and where a step is local."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyrx._checks import fail
from pyrx.ops.nm_sparsity import packed_shape

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_shard(tensor: Tensor | None) -> bool:
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Any:
    """The own part of a shard, the same memory; what is none as it is."""
    return tensor.to_local() if is_shard(tensor) else tensor


def _cut(param: Any) -> tuple[int, int, int]:
    """(the dimension that is cut, the size of a part, how many are before the own one); (0, all, 0) of one not cut."""
    for i, placement in enumerate(param.placements):
        if placement.is_shard():
            dim = placement.dim
            return dim, -(-param.shape[dim] // param.device_mesh.size(i)), param.device_mesh.get_local_rank(i)
    return 0, param.shape[0], 0


def check_shard(op: str, argument: str, param: Any, m: int, dim: int) -> None:
    """Raises where a group, or a byte of the mask, would lie in two shards; the same on every rank."""
    from torch.distributed.tensor import Replicate, Shard

    dims, along = param.dim(), [each for each in param.placements if type(each) is not Replicate]
    if len(along) > 1 or any(type(each) is not Shard for each in along):
        fail(op, argument, "cut along one dimension, or whole on every rank", param.placements, RuntimeError)
    cut, part, _ = _cut(param)
    unit = m if cut == dim % dims else 1
    if part % unit != 0 and part < param.shape[cut]:
        expected = f"in shards of whole groups of m = {m}"
        fail(op, argument, expected, f"{part} of {param.shape[cut]} along dimension {cut} in each", RuntimeError)
    if cut == dims - 1 and part % 8 != 0 and part < param.shape[cut]:
        expected = "in shards of whole bytes of the mask, eight along the last dimension"
        fail(op, argument, expected, f"{part} of {param.shape[cut]} in each", RuntimeError)


def own_bits(whole: Tensor, param: Any) -> Tensor:
    """The own part of a mask of the whole weight, the same memory."""
    cut, part, before = _cut(param)
    if cut == param.dim() - 1:
        part = -(-part // 8)
    size = whole.shape[cut]
    first = min(part * before, size)
    return whole.narrow(cut, first, min(part, size - first))


def as_shard(bits: Tensor, param: Any) -> DTensor:
    """The own part of a mask as a shard, laid out over the ranks as the weight; the same memory."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size(packed_shape(param.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(bits, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride)
