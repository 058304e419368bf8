"""In other processes: the workers of a DataLoader, however they are started, and the children of a fork.

A forked child has none of the threads of its parent's OpenMP pool, so a parallel loop in it waits for ever, torch's own
too, until torch.set_num_threads(1): the workers of a DataLoader do that themselves.
"""

import multiprocessing
import os
import sys

import pytest
import torch
from calls import CALLS, MATMULS, run
from helpers import assert_same_bits, threads
from torch.utils.data import DataLoader, Dataset, default_collate

import pyrx

STARTS = ("fork", "spawn", "forkserver")
TIMEOUT = 120  # seconds, after which a process counts as hung


class Images(Dataset):
    """An image, a label, and a mask of patches drawn in the worker."""

    def __init__(self, seeded=True):
        self.seeded = seeded

    def __len__(self):
        return 32

    def __getitem__(self, index):
        image = torch.randint(0, 256, (3, 64, 48), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        # enough patches for several threads, were there any
        mask = pyrx.patch_mask((8, 32, 32), 0.6, method="block", seed=index if self.seeded else None)
        return image, index % 7, mask


def mixed(samples):
    """A batch of both mixes of a collate_fn, normalised, whose seed is its first label's."""
    images, labels, masks = default_collate(samples)
    first, target = pyrx.cutmix(images, labels, mean=0.5, std=0.5, dtype=torch.float32, seed=int(labels[0]))
    second, other = pyrx.mixup(first, labels, pairing="random", seed=int(labels[0]))
    return second, target, other, masks


def drawn(samples):
    images, labels, masks = default_collate(samples)
    return *pyrx.cutmix(images, labels), masks


def loaded(start, dataset, collate, workers=2, **options):
    options.setdefault("generator", torch.Generator().manual_seed(4))
    if workers:
        options.update(multiprocessing_context=start, timeout=TIMEOUT)
    return list(DataLoader(dataset, batch_size=8, num_workers=workers, collate_fn=collate, **options))


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_workers_of_a_dataloader(cpu, start):
    """Mixing as collate_fn and masks in a Dataset, after the parent has used its threads: the bits of no workers."""
    with threads(2):
        expected = loaded(None, Images(), mixed, workers=0)
        found = loaded(start, Images(), mixed, persistent_workers=True)
    assert len(found) == 4
    for (images, target, other, masks), (images_, target_, other_, masks_) in zip(found, expected, strict=True):
        assert isinstance(target, pyrx.MixedTarget) and isinstance(other, pyrx.MixedTarget)
        kept = [(one, two) for one, two in zip([*target, *other], [*target_, *other_], strict=True) if one is not None]
        assert len(kept) == 10
        for one, two in [(images, images_), (masks, masks_), *kept]:
            assert_same_bits(one, two)


def test_workers_draw_seeds_of_their_own(cpu):
    """From the generator that DataLoader seeds in each: other ones in every worker, the same ones in the next run."""
    first, again = (loaded("fork", Images(seeded=False), drawn) for _ in range(2))
    lams = torch.stack([target.lam for _, target, _ in first])
    assert lams.unique().numel() > 24, lams
    for (images, target, masks), (images_, target_, masks_) in zip(first, again, strict=True):
        assert torch.equal(images, images_) and torch.equal(target.lam, target_.lam) and torch.equal(masks, masks_)


class Objects(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        weight = torch.arange(64.0).reshape(4, 16) + index
        return pyrx.BlockMask.document([20, 30 + index], 16), pyrx.nm_compress(weight, 2, 4)


def test_masks_and_weights_come_out_of_workers(cpu):
    for index, (mask, packed) in enumerate(
        DataLoader(Objects(), None, num_workers=1, multiprocessing_context="fork", timeout=TIMEOUT)
    ):
        expected_mask, expected = Objects()[index]
        assert isinstance(mask, pyrx.BlockMask) and isinstance(packed, pyrx.NMPacked)
        assert torch.equal(mask.to_dense(), expected_mask.to_dense())
        assert torch.equal(mask.key_range, expected_mask.key_range)
        assert torch.equal(packed.to_dense(), expected.to_dense())


def child(expected):
    """Every op forward and backward; the status of the process is how many differ."""
    torch.set_num_threads(1)
    wrong = 0
    for (name, k), results in expected.items():
        found = run(name, k)
        same = torch.allclose if name in MATMULS else torch.equal
        if not all(same(one, other) for one, other in zip(found, results, strict=True)):
            print("differs:", name, k, file=sys.stderr)
            wrong += 1
    os._exit(wrong)


def fork_a_child():
    """After this process has used its threads, which it keeps."""
    with threads(2):
        expected = {(name, k): run(name, k) for name in CALLS for k in (1, 40)}
        process = multiprocessing.get_context("fork").Process(target=child, args=(expected,))
        process.start()
        process.join(TIMEOUT)
        hung = process.is_alive()
        if hung:
            process.kill()
            process.join()
        assert not hung, "expected the child to end, got one that hangs"
        assert process.exitcode == 0
        for (name, k), results in expected.items():
            assert len(run(name, k)) == len(results)
    print("the same")


@pytest.mark.cpu_kernels
def test_every_op_in_a_forked_child(cpu, python):
    """Of a fresh process: torch refuses backward passes to the children of one whose autograd has started threads."""
    assert "the same" in python("import test_fork; test_fork.fork_a_child()")
