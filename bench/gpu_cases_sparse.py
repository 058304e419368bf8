"""What gpu_model.py prices of sparsity: N:M masks, masked optimizers, attention over blocks. See gpu_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_cases import BF16, F32, HALF, SINGLE, Case, Cost, Cuda, Triton, empty, grad_of
from torch import Tensor


def sparsity_cases() -> list[Case]:
    import pyrx

    n = 8192.0 * 8192
    bool_mask = Cost(HALF * n + n)
    # integer operations an element, as the loop of sm_90's code has them: bfloat16, then float32
    counts = {(2, 4): (3.7, 6.9), (4, 8): (6.9, 12.0), (1, 16): (4.9, 7.5), (2, 32): (8.5, 13.0), (4, 16): (10.0, 20.0)}
    # how rank_chunks serves them
    kinds = {(2, 4): "2, 4", (4, 8): "4, 8", (1, 16): "1, 0", (2, 32): "2, 0", (4, 16): "0, 0"}

    def scores(dtype: torch.dtype = BF16) -> Tensor:
        return empty(8192, 8192, dtype=dtype)

    def mask(ratio: tuple[int, int], dtype: torch.dtype = BF16) -> Case:
        single = dtype == F32
        cost = Cost((SINGLE if single else HALF) * n + n, alu=counts[ratio][single] * n)
        word = "unsigned int" if single else "unsigned short"
        return Case(
            f"nm_mask {ratio[0]}:{ratio[1]}, 8192 x 8192, {str(dtype)[6:]}",
            lambda: pyrx.nm_mask(scores(dtype), *ratio, backend="triton"),
            (Cuda("nm_rows_kernel", f"nm_rows_kernel<{word}, {kinds[ratio]}, false>", 256, cost),),
            (Triton("nm_sparsity:_flat_kernel", cost),),
        )

    columns = bool_mask._replace(alu=4.5 * n)
    any_rows = bool_mask._replace(alu=(3 * 12 + 30) * n)
    forward = Cost((2 * HALF + 1 / 8) * n, alu=5.0 * n)
    backward = Cost((3 * HALF + 1 / 8) * n, alu=2 * n, fma=2 * n)
    exact = bool_mask._replace(alu=380 * n / 16)
    greedy = bool_mask._replace(alu=8 * 25 * n / 8)
    pack = Cost(n + n / 8, alu=3 * n)
    kept = HALF * n / 2 + n / 2 + n / 8  # values, indices, bits
    compress = Cost(kept, alu=130 * n)
    decompress = Cost(HALF * n / 2 + n / 2 + HALF * n, alu=12 * n)
    row_bits = (empty(8192, 8192), torch.zeros(8192, 1024, dtype=torch.uint8))

    def sr_ste() -> None:
        grad_of(lambda w: pyrx.nm_sparsify(w, 2, 4, estimator="sr-ste", backend="triton"), scores())

    def packed() -> None:
        from pyrx._triton import nm_packed

        nm_packed.nm_decompress(*nm_packed.nm_compress(*row_bits, 2, 4), 2, 4)

    def masks(name: str, dim: int, ratio: tuple[int, int], kernel: Cuda, triton: str) -> Case:
        return Case(
            f"nm_mask {ratio[0]}:{ratio[1]} {name}, 8184 x 8184, bfloat16",
            lambda: pyrx.nm_mask(empty(8184, 8184), *ratio, dim=dim, backend="triton"),
            (kernel,),
            (Triton(triton, kernel.cost),),
        )

    def transposable(n_: int, m: int, bits: bool, cuda: tuple[Cuda, ...], triton: tuple[Triton, ...]) -> Case:
        return Case(
            f"nm_transposable_mask {n_}:{m}{', bits' if bits else ''}, 8192 x 8192, bfloat16",
            lambda: pyrx.nm_transposable_mask(scores(), n_, m, packed=bits, backend="triton"),
            cuda,
            triton,
        )

    names = ("nm_rows_kernel", "nm_apply_kernel")
    instances = ("nm_rows_kernel<__nv_bfloat16, 2, 4, true>", "nm_apply_kernel<__nv_bfloat16>")
    greedy_shared = 16 * 8 * 9 * 2  # greedy_shared_bytes(8, 16, 2)
    return [
        *(mask(ratio) for ratio in counts),
        *(mask(ratio, F32) for ratio in ((2, 4), (2, 32), (4, 16))),
        masks(
            "along columns", 0, (2, 4),
            Cuda("nm_columns_kernel", "nm_columns_kernel<unsigned short, 2, 4, false>", 256, columns),
            "nm_sparsity:_columns_kernel",
        ),
        masks(
            "along rows", 1, (2, 12),
            Cuda("nm_any_rows_kernel", "nm_any_rows_kernel<unsigned short, false>", 256, any_rows),
            "nm_sparsity:_rows_kernel",
        ),
        masks(
            "along columns", 0, (3, 12),
            Cuda("nm_any_columns_kernel", "nm_any_columns_kernel<unsigned short, false>", 256, any_rows, 256 * 12 * 2),
            "nm_sparsity:_columns_kernel",
        ),
        Case(
            "nm_sparsify 2:4 by SR-STE, forward and backward, 8192 x 8192, bfloat16", sr_ste,
            tuple(Cuda(*each, 256, cost) for *each, cost in zip(names, instances, (forward, backward), strict=True)),
            (Triton("nm_sparsity:_flat_kernel", forward), Triton("nm_sparsity:_apply_kernel", backward)),
        ),
        transposable(
            2, 4, False,
            (Cuda("nm_transposable_exact_kernel", "nm_transposable_exact_kernel<__nv_bfloat16, true>", 256, exact),),
            (Triton("nm_transposable:_exact_kernel", exact),),
        ),
        transposable(
            4, 8, True,
            (
                Cuda("nm_transposable_greedy_kernel", "greedy_kernel<__nv_bfloat16>", 128, greedy, greedy_shared),
                Cuda("nm_transposable_pack_kernel", "nm_transposable_pack_kernel(", 256, pack),
            ),
            (Triton("nm_transposable:_greedy_kernel", greedy), Triton("nm_transposable:_pack_kernel", pack)),
        ),
        Case(
            "nm_compress 2:4 and back, 8192 x 8192, bfloat16", packed,
            (
                Cuda("nm_compress_kernel", "nm_compress_kernel<__nv_bfloat16>", 256, compress),
                Cuda("nm_decompress_kernel", "nm_decompress_kernel<__nv_bfloat16>", 256, decompress),
            ),
            (Triton("nm_packed:_compress_kernel", compress), Triton("nm_packed:_decompress_kernel", decompress)),
        ),
    ]  # fmt: skip


def optimizer_cases() -> list[Case]:
    from pyrx.optim import MaskedAdamW, MaskedSGD

    n = 8192.0 * 8192

    def stepped(
        optimizer: Any, shape: tuple[int, ...], dtype: torch.dtype, n_: int, m: int, **options: Any
    ) -> Callable[[], Any]:
        """A step after the first, which makes the mask."""
        weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        weight.grad = torch.zeros(shape, dtype=dtype)
        made = optimizer([weight], lr=1e-3, n=n_, m=m, backend="triton", **options)
        made.step()
        return made.step

    def case(name: str, dtype: torch.dtype, kernel: str, instance: str, moments: int, **options: Any) -> Case:
        width = SINGLE if dtype == F32 else HALF
        adamw = moments == 2
        cost = Cost(
            (width * (3 + 2 * moments) + 0.25) * n, alu=(40.0 if adamw else 25.0) * n, fma=35.0 * n, mufu=2.0 * n
        )
        triton = (Triton(f"masked_update:{'_adamw_kernel' if adamw else '_sgd_kernel'}", cost),)
        if options.get("dim", -1) != -1:  # ranked apart
            triton += (Triton("nm_sparsity:_columns_kernel", Cost(width * n + n / 8)),)
        ratio = options.pop("ratio", (2, 4))
        optimizer = MaskedAdamW if adamw else MaskedSGD
        return Case(
            f"{name}, 8192 x 8192, {str(dtype)[6:]}",
            lambda: stepped(optimizer, (8192, 8192), dtype, *ratio, **options),
            (Cuda(kernel, instance, 256, cost),),
            triton,
        )

    plain = Cost(14.25 * n, alu=70 * n, fma=35 * n, mufu=2 * n)
    rows, columns, elements = "update_rows_kernel", "update_columns_kernel", "update_elements_kernel"
    adamw = "pyrx::cuda::AdamW"
    return [
        case("MaskedAdamW 2:4", BF16, rows, f"{rows}<{adamw}, __nv_bfloat16, 2, 4>", 2),
        case("MaskedAdamW 2:4", F32, rows, f"{rows}<{adamw}, float, 2, 4>", 2),
        case("MaskedAdamW 2:32", F32, rows, f"{rows}<{adamw}, float, 2, 0>", 2, ratio=(2, 32)),
        case("MaskedAdamW 2:4 along columns", BF16, columns, f"{columns}<{adamw}, __nv_bfloat16, 2, 4>", 2, dim=0),
        case("MaskedSGD 2:4", F32, rows, f"{rows}<pyrx::cuda::SGD, float, 2, 4>", 1, momentum=0.9),
        Case(
            "MaskedAdamW, masks kept, rows that 8 does not divide, 8192 x 8191, bfloat16", None,
            (Cuda(elements, f"{elements}<{adamw}, __nv_bfloat16>", 256, plain),),
        ),
    ]  # fmt: skip


ATTENTION = (1, 24, 32768, 128)


def attention_cases() -> list[Case]:
    import pyrx
    from pyrx._attention import Logits
    from pyrx.ops.block_mass import block_mass, block_recall

    batch, heads, tokens, size = ATTENTION
    pairs, rows = float(batch * heads * tokens * tokens), float(batch * heads * tokens)
    blocks = batch * heads * (tokens / 128) ** 2
    tensor = rows * size * HALF  # bytes of query, key, value or the result

    def qkv(short: int = 4096) -> tuple[Tensor, ...]:
        """Fewer tokens, which the compiled kernels do not depend on."""
        return tuple(empty(1, heads, short, size) for _ in range(3))

    def mask() -> Any:
        return pyrx.BlockMask.from_dense(torch.ones(1, 1, 32, 32, dtype=torch.bool), (4096, 4096), 128)

    def forward_of(share: float) -> Cost:
        seen = share * pairs
        return Cost(4 * tensor + 4 * rows, tensor=4 * size * seen, mufu=seen, fma=5 * seen)

    def backward_of(share: float) -> tuple[Cost, Cost, Cost]:
        """Deltas, the keys' and values' gradients, the queries'."""
        seen = share * pairs
        delta = Cost(2 * tensor + 12 * rows, fma=2 * rows * size)
        keys = Cost(6 * tensor, tensor=8 * size * seen, mufu=seen, fma=6 * seen)
        return delta, keys, Cost(5 * tensor, tensor=6 * size * seen, mufu=seen, fma=6 * seen)

    def attend(**options: Any) -> Callable[[], Any]:
        return lambda: pyrx.block_sparse_attention(*qkv(), mask(), backend="triton", **options)

    file = "block_sparse_attention"

    def both(**options: Any) -> Callable[[], Any]:
        function = lambda q, k, v: pyrx.block_sparse_attention(q, k, v, mask(), backend="triton", **options)  # noqa: E731
        return lambda: grad_of(function, *qkv())

    def biased(dtype: torch.dtype) -> None:
        query, bias = empty(1, 2, 1024, 256, dtype=dtype), empty(1, 2, 1024, 1024, dtype=dtype)
        part = pyrx.BlockMask.from_dense(torch.ones(1, 1, 8, 8, dtype=torch.bool), (1024, 1024), 128)
        grad_of(lambda own: pyrx.block_sparse_attention(query, query, query, part, bias=own, backend="triton"), bias)

    def forward(share: float) -> Case:
        name = f"attention forward, density {share:g}, (1, 24, 32768, 128), bfloat16"
        return Case(name, attend(), (), (Triton(f"{file}:_forward_kernel", forward_of(share)),))

    backward = tuple(f"{file}_backward:{name}" for name in ("_delta_kernel", "_key_value_kernel", "_query_kernel"))
    listed = 24 * 512 * 512.0
    dense = Logits(-1, -1, None, None, None, None, None, size**-0.5, 0.0)
    lists = Cost(listed + 8 * listed, alu=4 * listed)
    chosen = Cost(5 * listed, alu=14 * 3 * listed)
    pool = Cost(rows * size * HALF + rows / 64 * (size + 1) * 4, fma=6 * rows * size, mufu=rows)
    mass = Cost(2 * tensor + 4 * rows + 4 * blocks, tensor=2 * size * pairs, mufu=pairs, fma=3 * pairs)
    recall = mass._replace(bytes=2 * tensor + 4 * rows + blocks, fma=6 * pairs)
    bias_pairs = 2 * 1024 * 1024.0
    plain = Cost(4 * bias_pairs, plain=4 * 256 * bias_pairs, mufu=bias_pairs, fma=12 * bias_pairs)

    def searched() -> None:
        query, key, _ = qkv()
        block_mass(query, key, torch.zeros(1, heads, 4096), (128, 128), dense, "triton")

    def recalled() -> None:
        query, key, _ = qkv()
        block_recall(query, key, torch.ones(1, heads, 32, 32, dtype=torch.bool), (128, 128), dense, "triton")

    def bias_case(dtype: torch.dtype) -> Case:
        narrow = dtype == BF16
        own = plain._replace(plain=0.0, tensor=plain.plain) if narrow else plain
        return Case(
            f"attention with a bias and its gradient, (1, 2, 1024, 256), {str(dtype)[6:]}",
            lambda: biased(dtype),
            (),
            (
                Triton(f"{file}:_forward_kernel", own),
                Triton(backward[0], Cost(4.0 * 2048 * 256 * 2)),
                Triton(f"{file}_backward:_bias_kernel", own),
            ),
        )

    return [
        forward(1.0), forward(0.2),
        Case(
            "attention forward + backward, density 0.2, (1, 24, 32768, 128), bfloat16", both(), (),
            (
                Triton(f"{file}:_forward_kernel", forward_of(0.2)),
                *(Triton(*each) for each in zip(backward, backward_of(0.2), strict=True)),
            ),
        ),
        bias_case(BF16), bias_case(F32),
        Case(
            "LSE-cached search, (1, 24, 32768, 128), bfloat16", searched, (), (Triton("block_mass:_mass_kernel", mass),)
        ),
        Case("recall, (1, 24, 32768, 128), bfloat16", recalled, (), (Triton("block_mass:_recall_kernel", recall),)),
        Case(
            "a mask from block scores, 1 x 24 x 512 x 512", None,
            (
                Cuda("select_blocks_kernel", "select_blocks_kernel<16, false, false>", 256, chosen),
                Cuda("block_lists_kernel", "block_lists_kernel(", 256, lists),
            ),
        ),
        Case(
            "block_pool, (1, 24, 32768, 128), bfloat16", None,
            (Cuda("block_pool_kernel", "block_pool_kernel<__nv_bfloat16>", 256, pool),),
        ),
    ]  # fmt: skip
