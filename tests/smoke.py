"""Is the pyrx that this Python imports sound? Known masks, then every row of ops on every backend that serves here,
forward and backward, against the reference. It needs torch and pyrx alone, to run where only a wheel is installed.

python smoke.py [--need cpu,cuda,triton] [--installed]
"""

import argparse
import os
import sys
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F

import pyrx
from pyrx import _backends, _extension

# Triton's interpreter runs on the CPU
DEVICE = "cuda" if torch.cuda.is_available() and not _backends.TRITON_INTERPRETED else "cpu"
SEED = 0x0123456789ABCDEF
# of elements 0 to 15, and of sample 3: an element is kept where its u is at least 65536 p
KNOWN = [
    (0, 0, "e8d5 6627 c58d e169 ac4c bc57 dbd8 9b00 cca4 f8e4 00db 5cb2 74eb b1a5 ff67 097e"),
    (SEED, 3, "02a1 4f1c 88c3 4169 62d0 2e66 6a0e f08d"),
]


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def uniform(*shape, seed=2):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def graded(function, *inputs):
    """The result of `function`, and the gradient of each input under a random upstream gradient."""
    leaves = [each.clone().requires_grad_() for each in inputs]
    out = function(*leaves)
    out.backward(normal(*out.shape, seed=9))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def head():
    target = torch.arange(16, device=DEVICE) % 7
    return graded(
        lambda x, w, b: pyrx.multi_sample_dropout_cross_entropy(x, w, target, linear_bias=b, num_samples=4, seed=SEED),
        *(normal(16, 24), normal(7, 24), normal(7)),
    )


def mixing():
    images, labels = normal(4, 3, 17, 19), torch.arange(4, device=DEVICE)
    found = []
    for mix in (pyrx.cutmix, pyrx.mixup, pyrx.resizemix):
        mixed, target = mix(images, labels, seed=SEED)
        found += [mixed, target.a, target.b, target.lam]
    return found


def two_label_loss():
    a = torch.arange(16, device=DEVICE) % 7
    target = pyrx.MixedTarget(a, a.flip(0), uniform(16))
    return graded(lambda x: pyrx.mixed_cross_entropy(x, target, label_smoothing=0.1), normal(16, 7))


def erasing():
    erased, boxes = pyrx.random_erasing(normal(4, 3, 17, 19), prob=1.0, seed=SEED, return_boxes=True)
    return [erased, boxes]


def sparsity():
    weight = normal(16, 64)
    mask = pyrx.nm_mask(weight, 2, 4)
    return [mask, *graded(lambda w: pyrx.nm_sparsify(w, 1, 8, estimator="sr-ste"), weight)]


def packed():
    weight, x, bias = normal(16, 64), normal(5, 64, seed=3), normal(16)
    kept = pyrx.nm_compress(weight, 2, 4)
    return [kept.values, *graded(lambda x, b: pyrx.nm_linear(x, kept, b), x, bias)]


def optimizer():
    weight = torch.nn.Parameter(normal(16, 64))
    step = pyrx.optim.MaskedAdamW([weight], lr=0.1, n=2, m=4)
    for seed in (3, 4):
        weight.grad = normal(16, 64, seed=seed)
        step.step()
    return [weight.detach()]


def heads():
    return normal(1, 2, 128, 32), normal(1, 2, 128, 32, seed=2), normal(1, 2, 128, 32, seed=3)


def lists():
    mask = pyrx.BlockMask.sliding_window(128, 40, 32, device=DEVICE).whole() | pyrx.BlockMask.from_dense(
        uniform(1, 2, 4, 4) > 0.5, 128, 32
    )
    return [mask.to_dense(), mask.density()]


def attention():
    mask = pyrx.BlockMask.sliding_window(128, 40, 32, device=DEVICE)
    return graded(lambda q, k, v: pyrx.block_sparse_attention(q, k, v, mask, dropout_p=0.2, seed=SEED), *heads())


def searched():
    query, key, value = heads()
    _, lse = pyrx.block_sparse_attention(query, key, value, return_lse=True)
    mask = pyrx.search.lse_cached(query, key, lse, block_size=32, sparsity=0.5)
    return [mask.to_dense(), pyrx.search.recall(query, key, mask)]


# of every row of ops
CASES = {
    "dropout": lambda: graded(lambda x: pyrx.dropout(x, 0.3, seed=SEED), normal(33, 47)),
    "multi_sample_dropout": head,
    "batch_mix": mixing,
    "neighbor_fill": lambda: list(pyrx.neighbor_fill(normal(2, 3, 9, 9), uniform(2, 1, 9, 9) > 0.4, 2)),
    "mixed_cross_entropy": two_label_loss,
    "patch_mask": lambda: [pyrx.patch_mask((4, 14, 14), 0.6, seed=SEED, device=DEVICE)],
    "blend": lambda: graded(pyrx.blend, normal(2, 3, 9, 9), normal(2, 3, 9, 9, seed=3), uniform(2, 1, 9, 9)),
    "random_erasing": erasing,
    "noise_mask": lambda: graded(
        lambda x, m: pyrx.noise_mask(x, m, seed=SEED), normal(2, 3, 9, 9), uniform(2, 1, 9, 9)
    ),
    "nm_sparsity": sparsity,
    "nm_transposable": lambda: [pyrx.nm_transposable_mask(normal(16, 64), 2, 4)],
    "nm_packed": packed,
    "masked_update": optimizer,
    "block_mask": lists,
    "block_pool": lambda: [pyrx.search.topk_blocks(*heads()[:2], block_size=32, topk=2).to_dense()],
    "block_mass": searched,
    "block_sparse_attention": attention,
}


def run(row, backend):
    os.environ["PYRX_BACKEND"] = backend
    try:
        return CASES[row]()
    finally:
        del os.environ["PYRX_BACKEND"]


def check_known_masks(backend):
    for seed, sample, text in KNOWN:
        u = [int(each, 16) for each in text.split()]
        for p in (0.25, 0.5, 0.9):
            got = pyrx.dropout_mask((len(u),), p, seed, sample, device=DEVICE, backend=backend).tolist()
            assert got == [each >= round(65536 * p) for each in u], f"{backend}: seed {seed:#x}, p {p}: got {got}"


def check_row(row, backend):
    got, expected = run(row, backend), run(row, "reference")
    assert len(got) == len(expected), (len(got), len(expected))
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, i=index: f"result {i}: {text}")


def check_reference():
    """One row against PyTorch itself, so that the others have something to stand on."""
    x, w = normal(16, 24), normal(7, 24)
    target = torch.arange(16, device=DEVICE) % 7
    got = pyrx.multi_sample_dropout_cross_entropy(x, w, target, p=0.0, num_samples=2, backend="reference")
    torch.testing.assert_close(got, F.cross_entropy(F.linear(x, w), target))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--need", default="", help="backends that must serve, by commas")
    parser.add_argument(
        "--installed", action="store_true", help="pyrx must be this environment's own, not a source tree's"
    )
    asked = parser.parse_args()
    home = Path(pyrx.__file__).parent
    kernels = _extension.module.cpu_kernels() if _extension.module else _extension.error
    print(f"pyrx {pyrx.__version__} in {home}, torch {torch.__version__}, {DEVICE}; CPU kernels: {kernels}")
    if asked.installed and home.parent not in {Path(sysconfig.get_path(name)) for name in ("platlib", "purelib")}:
        sys.exit(f"expected pyrx in this environment's site-packages, got {home}")
    if missing := set(_backends.OPS) ^ set(CASES):
        sys.exit(f"expected a case for every row of ops, got another set: {sorted(missing)}")
    check_reference()
    failures, needed = [], {each for each in asked.need.split(",") if each}
    for backend in _backends.BACKENDS:
        served = [row for row in CASES if not _backends.reasons(row, backend, DEVICE)]
        absent = {row for row, name in _backends.ABSENT if name == backend}
        if backend in needed and set(CASES) - set(served) - absent:
            failures.append(
                f"{backend}: {'; '.join(_backends.reasons('dropout', backend, DEVICE)) or 'rows are missing'}"
            )
        if "dropout" in served:
            check_known_masks(backend)
        for row in served:
            try:
                check_row(row, backend)
            except Exception as error:
                failures.append(f"{backend}, {row}: {type(error).__name__}: {error}")
        print(f"{backend:<10} {len(served)} of {len(CASES)} rows of ops")
    print("\n".join(failures) or "sound")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
