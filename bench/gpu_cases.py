"""What gpu_model.py prices: every GPU kernel at the sizes of the benchmarks, with the bytes that it must move at the
least and the operations that it must do. Bytes and operations are formulas, counted by hand from the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BF16, F32, U8 = torch.bfloat16, torch.float32, torch.uint8
HALF, SINGLE = 2.0, 4.0  # bytes of an element

# integer and logical operations of one Philox call and eight comparisons, as sm_90's code has them
PHILOX = 100.0


class Cost(NamedTuple):
    """Of one call: bytes of device memory, and operations by the unit that does them (all scalars, not warps)."""

    bytes: float
    alu: float = 0.0  # integers, logic, comparisons, permutations
    fma: float = 0.0  # float32
    mufu: float = 0.0  # exponentials, roots, reciprocals
    tensor: float = 0.0  # floating-point operations of 16-bit matrix products
    plain: float = 0.0  # of float32 ones, which run on the plain units
    launches: int = 1


class Cuda(NamedTuple):
    """A __global__ of csrc/cuda, `instance` a part of its demangled name."""

    kernel: str
    instance: str
    threads: int
    cost: Cost
    dynamic: int = 0  # bytes of dynamic shared memory


class Triton(NamedTuple):
    """A @triton.jit kernel, as file:name; how it is launched is what the call launches."""

    kernel: str
    cost: Cost


class Case(NamedTuple):
    """A call, and what each backend launches for it. What a call returns is called too, and only its launches count.

    `library`: products that are left to cuBLAS, by Triton's backend where none of its kernels multiplies."""

    name: str
    call: Callable[[], Any] | None  # on Triton's backend; None: no Triton kernel
    cuda: tuple[Cuda, ...] = ()
    triton: tuple[Triton, ...] = ()
    library: tuple[Cost, ...] = ()


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def grad_of(function: Callable[..., Tensor], *leaves: Tensor) -> None:
    for each in leaves:
        each.requires_grad_()
    out = function(*leaves)
    torch.autograd.grad(out, leaves, torch.empty_like(out))


def ids(rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


def dropout_cases() -> list[Case]:
    import pyrx

    n = 4096 * 1024.0
    b, d, m = 128, 2048, 8
    copies = Cost(HALF * b * d * (1 + m), alu=(PHILOX + 20) * m * b * d / 8, fma=float(m * b * d))
    mask = Cost(n, alu=PHILOX * n / 8)
    bits = Cost(n / 8, alu=(PHILOX + 60) * n / 8)
    one = Cost(2 * HALF * n, alu=(PHILOX + 20) * n / 8, fma=2 * n)
    return [
        Case(
            "dropout, 4096 x 1024, bfloat16",
            lambda: pyrx.dropout(empty(4096, 1024), 0.5, seed=1, backend="triton"),
            (Cuda("dropout_kernel", "dropout_kernel<__nv_bfloat16>", 256, one),),
            (Triton("dropout:_copies_kernel", one),),
        ),
        Case(
            "dropout_mask, 4096 x 1024",
            lambda: pyrx.dropout_mask((4096, 1024), 0.5, 1, backend="triton"),
            (Cuda("mask_kernel", "cuda::mask_kernel(", 256, mask),),
            (Triton("dropout:_mask_kernel", mask),),
        ),
        Case(
            "dropout_mask, packed, 4096 x 1024",
            lambda: pyrx.dropout_mask((4096, 1024), 0.5, 1, packed=True, backend="triton"),
            (Cuda("packed_mask_kernel", "packed_mask_kernel(", 256, bits),),
            (Triton("dropout:_mask_kernel", bits),),
        ),
        Case(
            "multi_sample_dropout and its fold, 128 x 2048, M = 8, bfloat16",
            lambda: grad_of(lambda x: pyrx.multi_sample_dropout(x, m, 0.5, seed=1, backend="triton"), empty(b, d)),
            (
                Cuda("expand_kernel", "expand_kernel<__nv_bfloat16>", 256, copies),
                Cuda("fold_samples_kernel", "fold_samples_kernel<__nv_bfloat16>", 256, copies),
            ),
            (Triton("dropout:_copies_kernel", copies), Triton("dropout:_fold_kernel", copies)),
        ),
        Case(
            "thresholds of 1024 samples, each its own",
            None,
            (Cuda("upload_kernel", "upload_kernel(", 256, Cost(2.0 * 1024)),),
        ),
    ]


def head_case(b: int, d: int, c: int, m: int) -> Case:
    """Forward and backward of the head, bfloat16."""
    import pyrx

    rows, wide = m * b, c > 1024
    products = Cost(HALF * (rows * d + c * d + 2 * rows * c), tensor=2.0 * rows * d * c)
    logits = rows * c
    pack = Cost(HALF * b * d * (1 + m) + rows * d / 8, alu=(PHILOX + 20) * rows * d / 8)
    loss = Cost((4 + HALF) * logits, fma=(60.0 if wide else 20.0) * logits, mufu=(2.0 if wide else 1.0) * logits)
    fold = Cost(HALF * rows * d + rows * d / 8 + HALF * b * d + HALF * logits, alu=1.0 * rows * d, fma=2.0 * rows * d)
    finish = Cost(4.0 * (128 * c + 4 * b))
    scale = Cost(4.0)
    name = f"cross_entropy{'_wide' if wide else ''}_kernel"
    instance = f"cuda::{name}<__nv_bfloat16, false{'' if wide else ', false'}>"
    cuda = (
        Cuda("pack_kernel", "cuda::pack_kernel<__nv_bfloat16, true>", 256, pack),
        Cuda(name, instance, 256, loss),
        Cuda("fold_kernel", "fold_kernel<__nv_bfloat16, __nv_bfloat16, true>", 256, fold),
        Cuda("finish_kernel", "finish_kernel<__nv_bfloat16, __nv_bfloat16>", 256, finish),
        Cuda("scale_kernel", "cuda::scale_kernel<__nv_bfloat16>", 256, scale),
    )
    row = "multi_sample_dropout"
    common = (
        *((Triton("loss:weight_sum_kernel", Cost(12.0 * b)),) if logits > 2**23 else ()),  # several chunks
        Triton(f"{row}_loss:cross_entropy_kernel", loss),
        Triton(f"{row}_loss:finish_kernel", finish),
        Triton(f"{row}_loss:scale_kernel", scale),
    )
    if c > 128:
        bits = Triton(f"{row}_gemm:mask_bits_kernel", Cost(rows * d / 8, alu=PHILOX * rows * d / 8))
        plain = pack._replace(alu=3.0 * rows * d)
        triton = (bits, Triton(f"{row}_gemm:pack_kernel", plain), Triton(f"{row}_gemm:fold_kernel", fold))
    else:
        forward = products._replace(bytes=HALF * (b * d + c * d) + 4.0 * logits, alu=(PHILOX + 20) * rows * d / 8)
        backward = products._replace(bytes=HALF * (2 * b * d + 2 * c * d + logits), tensor=2 * products.tensor)
        triton = (Triton(f"{row}_gemm:logits_kernel", forward), Triton(f"{row}_gemm:gradients_kernel", backward))
        if d % 8:  # masks apart
            triton += (Triton(f"{row}_gemm:mask_bits_kernel", Cost(rows * d / 8, alu=PHILOX * rows * d / 8)),)

    def call() -> None:
        def loss_of(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
            return pyrx.multi_sample_dropout_cross_entropy(
                x, w, ids(b), linear_bias=bias, num_samples=m, p=0.5, seed=1, backend="triton"
            )

        grad_of(loss_of, empty(b, d), empty(c, d), empty(c))

    title = f"multi-sample dropout head, B, D, C, M = {b}, {d}, {c}, {m}, bfloat16"
    return Case(title, call, cuda, (*triton, *common), (products,) * 3)


def loss_case(rows: int, classes: int) -> Case:
    import pyrx

    n, wide = float(rows * classes), classes > 1024
    own = Cost(2 * HALF * n, fma=(42.0 if wide else 11.0) * n, mufu=(2.0 if wide else 1.0) * n)
    kernel = "mixed_cross_entropy_wide_kernel" if wide else "mixed_cross_entropy_kernel"
    instance = f"{kernel}<__nv_bfloat16, 8{'' if wide else ', false'}>"
    cuda = (
        Cuda(kernel, instance, 256, own),
        Cuda("mixed_loss_kernel", "mixed_loss_kernel<__nv_bfloat16>", 256, Cost(8.0 * rows / 8)),
        Cuda("mixed_scale_kernel", "mixed_scale_kernel<__nv_bfloat16, 8>", 256, Cost(4.0)),
    )
    if wide:
        cuda += (Cuda("mixed_weight_kernel", "mixed_weight_kernel<float>", 256, Cost(20.0 * rows)),)
    file = "mixed_cross_entropy"
    triton = (
        Triton(f"{file}:mixed_cross_entropy_kernel", own),
        Triton(f"{file}:mixed_loss_kernel", Cost(4.0 * rows)),
        Triton(f"{file}:mixed_scale_kernel", Cost(4.0)),
    )

    def call() -> None:
        target = pyrx.MixedTarget(ids(rows), ids(rows), torch.ones(rows))
        grad_of(lambda z: pyrx.mixed_cross_entropy(z, target, backend="triton"), empty(rows, classes))

    return Case(f"mixed_cross_entropy, {rows} x {classes}, bfloat16", call, cuda, triton)


def mix_cases() -> list[Case]:
    import pyrx

    n = 256 * 3 * 224 * 224.0
    share = 0.321  # of the pixels: CutMix's mean box at alpha 1
    whole = Cost(2 * HALF * n, alu=10 * n)
    swap = Cost(2 * HALF * share * n, alu=10 * share * n)
    mixup = Cost(2 * HALF * n, alu=6 * n, fma=8 * n)
    # each byte read once, each float written once
    normalised = Cost(5 * n, alu=10 * n, fma=6 * n)
    same = "mix_kernel<__nv_bfloat16, __nv_bfloat16, 8>"

    def images(dtype: torch.dtype = BF16) -> Tensor:
        return empty(256, 3, 224, 224, dtype=dtype)

    def call_normalised() -> None:
        pyrx.cutmix(
            images(U8).to(memory_format=torch.channels_last), ids(256), mean=(0.5,) * 3, std=(0.2,) * 3, dtype=F32,
            backend="triton",
        )  # fmt: skip

    def case(name: str, call: Callable[[], Any], kernel: str, instance: str, cost: Cost) -> Case:
        triton = (Triton("batch_mix:_mix_kernel", cost),)
        return Case(name, call, (Cuda(kernel, instance, 256, cost),), triton)

    size = "256 x 3 x 224 x 224"
    return [
        case(
            f"cutmix, {size}, bfloat16", lambda: pyrx.cutmix(images(), ids(256), backend="triton"), "mix_kernel", same,
            whole,
        ),
        case(
            f"cutmix in place, {size}, bfloat16",
            lambda: pyrx.cutmix(images(), ids(256), inplace=True, backend="triton"),
            "swap_kernel", "swap_kernel<__nv_bfloat16, 8>", swap,
        ),
        case(
            f"mixup, {size}, bfloat16", lambda: pyrx.mixup(images(), ids(256), backend="triton"), "mix_kernel", same,
            mixup,
        ),
        case(
            f"uint8 to normalised float32 + cutmix, {size}, channels_last", call_normalised, "mix_kernel",
            "mix_kernel<unsigned char, float, 4>", normalised,
        ),
    ]  # fmt: skip


def image_cases() -> list[Case]:
    import pyrx

    shape = (64, 3, 224, 224)
    n, pixels = 64 * 3 * 224 * 224.0, 64 * 224 * 224.0

    def images(*more: int) -> Tensor:
        return empty(*(more or shape), dtype=F32)

    blend = Cost(3 * SINGLE * n + SINGLE * pixels, fma=5 * n, alu=6 * n)
    backward = Cost(5 * SINGLE * n + 2 * SINGLE * pixels, fma=7 * n, alu=6 * n)
    erased = 0.5 * (0.02 + 1 / 3) / 2  # share of the pixels
    erase = Cost(2 * SINGLE * n, alu=20 * n * erased + 4 * n, fma=60 * n * erased)
    inside = Cost(SINGLE * erased * n, alu=75 * n * erased, fma=60 * n * erased)
    boxes = Cost(64 * 32.0, launches=1)
    noise = Cost(2 * SINGLE * n + SINGLE * pixels, alu=40 * n, fma=30 * n, mufu=1.0 * n)
    noise_back = Cost(SINGLE * n + SINGLE * pixels, alu=40 * n, fma=30 * n, mufu=1.0 * n)
    places = 64 * 64 * 112 * 112.0
    fill = Cost(2 * SINGLE * places, alu=10 * places + 40 * places / 2, fma=12 * places / 2)
    mask_bytes = 64 * 112 * 112.0
    fill_shared = 2 * 8 * 46 * 8 + 46 * 46 * 4 + 8 * 46 * 46 * 4  # fill_shared_bytes(7, 8, 4)

    def last(function: Callable[..., Tensor]) -> None:
        x, y = (images().to(memory_format=torch.channels_last) for _ in range(2))
        grad_of(function, x, y, images(64, 1, 224, 224))

    def blended(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
        return pyrx.blend(x, y, alpha, backend="triton")

    def patches(name: str, cost: Cost, **options: Any) -> Case:
        method = {"random": 0, "block": 1, "hard": 2}[name]
        value = "float"
        return Case(
            f"patch_mask, {name}, 256 x 14 x 14",
            lambda: pyrx.patch_mask((256, 14, 14), seed=1, backend="triton", **options),
            (Cuda("patch_mask_kernel", f"patch_mask_kernel<{method}, {value}>", 64, cost, 14 * 4),),
            (Triton("patch_mask:_patch_mask_kernel", cost),),
        )

    grids = 256 * 196.0
    return [
        Case(
            "blend, 64 x 3 x 224 x 224, float32, and its gradients",
            lambda: grad_of(blended, images(), images(), images(64, 1, 224, 224)),
            (
                Cuda("blend_kernel", "blend_kernel<float, float>", 256, blend),
                Cuda("blend_gradients_kernel", "blend_gradients_kernel<float, float>", 256, backward),
            ),
            (Triton("blend:_blend_kernel", blend), Triton("blend:_blend_gradients_kernel", backward)),
        ),
        Case(
            "the same, channels_last",
            lambda: last(blended),
            (
                Cuda("blend_kernel", "blend_kernel<float, float>", 256, blend),
                Cuda("blend_pixel_gradients_kernel", "blend_pixel_gradients_kernel<float, float>", 256, backward),
            ),
            (Triton("blend:_blend_kernel", blend), Triton("blend:_blend_gradients_kernel", backward)),
        ),
        Case(
            "random_erasing, pixel noise, 64 x 3 x 224 x 224, float32",
            lambda: pyrx.random_erasing(images(), mode="pixel", seed=1, backend="triton"),
            (Cuda("erase_kernel", "erase_kernel<float, 4>", 256, erase),),
            (Triton("random_erasing:_boxes_kernel", boxes), Triton("random_erasing:_erase_kernel", erase)),
        ),
        Case(
            "random_erasing in place, channel noise, the same images",
            lambda: pyrx.random_erasing(images(), mode="rand", inplace=True, seed=1, backend="triton"),
            (Cuda("erase_in_place_kernel", "erase_in_place_kernel<float>", 256, inside),),
            (
                Triton("random_erasing:_boxes_kernel", boxes),
                Triton("random_erasing:_channel_noise_kernel", Cost(64 * 3 * SINGLE)),
                Triton("random_erasing:_erase_kernel", inside),
            ),
        ),
        Case(
            "noise_mask, 64 x 3 x 224 x 224, float32, and the mask's gradient",
            lambda: grad_of(
                lambda mask: pyrx.noise_mask(images(), mask, seed=1, backend="triton"), images(64, 1, 224, 224)
            ),
            (
                Cuda("noise_mask_kernel", "noise_mask_kernel<float>", 256, noise),
                Cuda("noise_mask_backward_kernel", "noise_mask_backward_kernel<float>", 256, noise_back),
            ),
            (
                Triton("noise_mask:_noise_mask_kernel", noise),
                Triton("noise_mask:_noise_mask_backward_kernel", noise_back),
            ),
        ),
        patches("random", Cost(grids, alu=30 * 3 * grids)),
        patches("block", Cost(grids, alu=30 * 3 * grids), mask_ratio=0.4, method="block"),
        patches(
            "hard", Cost(grids * 5, alu=60 * 3 * grids), method="hard", hard_ratio=0.5,
            losses=empty(256, 14, 14, dtype=F32),
        ),
        Case(
            "neighbor_fill, 64 x 64 x 112 x 112, 7 iterations, float32",
            lambda: pyrx.neighbor_fill(
                images(64, 64, 112, 112), torch.ones(64, 1, 112, 112, dtype=torch.bool), 7, backend="triton"
            ),
            (Cuda("neighbor_fill_kernel", "neighbor_fill_kernel<float>", 256, fill, fill_shared),),
            (
                Triton("neighbor_fill:_distance_kernel", Cost(2 * mask_bytes)),
                Triton("neighbor_fill:_level_kernel", Cost(3 * mask_bytes)),
                Triton("neighbor_fill:_fill_kernel", fill),
            ),
        ),
    ]  # fmt: skip


def cases() -> list[Case]:
    return [
        *dropout_cases(),
        head_case(256, 2048, 1000, 8),
        head_case(128, 2048, 100, 8),
        head_case(128, 2044, 10, 8),
        head_case(128, 2048, 32000, 4),
        loss_case(1024, 1000),
        loss_case(1024, 32000),
        *mix_cases(),
        *image_cases(),
    ]
