"""Images/s of the training input pipeline against torchvision's ImageFolder with the same transform and workers.

Writes a tree of JPEGs of ImageNet's usual size and reads it with both, in turns, in one process; no model is involved.
    python tests/bench_data.py [--workers 2] [--rounds 7] [--images 600]
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402


def write_tree(root, n):
    """n JPEGs of about 500 x 375 in 10 folders: smooth colours and edges with noise, about 100 kB as in ImageNet."""
    rng = np.random.default_rng(0)
    for i in range(n):
        width, height = rng.integers(470, 531), rng.integers(345, 406)
        coarse = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
        pixels = np.asarray(coarse) + rng.normal(0, 14, (height, width, 1))
        folder = root / f"class_{i % 10}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{i:04d}.JPEG", quality=88)


def rate(batches, skip, count):
    """Images/s over `count` batches, after `skip` that may have been fetched while the other pipeline ran."""
    for _ in range(skip):
        next(batches)
    begun = time.perf_counter()
    images = sum(len(next(batches)[0]) for _ in range(count))
    return images / (time.perf_counter() - begun)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in {"--workers": 2, "--rounds": 7, "--images": 600, "--batch-size": 32}.items():
        p.add_argument(flag, type=int, default=default)
    p.add_argument("--augment", default="crop-flip", choices=["none", "crop", "crop-flip"])
    args = p.parse_args()
    args.seed, args.accum = 0, 1
    skip, count = 4 * max(1, args.workers), max(1, args.images // args.batch_size)
    total = (skip + count) * (args.rounds + 1)
    with tempfile.TemporaryDirectory() as folder:
        write_tree(Path(folder), args.images)
        size = sum(f.stat().st_size for f in Path(folder).rglob("*.JPEG")) / args.images
        index = {f"class_{c}": c for c in range(10)}
        dataset = common.class_tree("train", Path(folder), index)
        dataset.transform = common.image_transform_v2(PreprocessCfg(), is_train=False)
        dataset = dataset.augmented(args.augment, PreprocessCfg(), args.seed)
        ours = iter(common.loader(dataset, common.Stream(len(dataset), args, 0, total), args))
        theirs = ImageFolder(folder, dataset.transform)
        order = torch.utils.data.RandomSampler(theirs, num_samples=total * args.batch_size)
        theirs = iter(torch.utils.data.DataLoader(theirs, args.batch_size, sampler=order, num_workers=args.workers,
                                                  pin_memory=torch.cuda.is_available()))
        rate(ours, skip, count), rate(theirs, skip, count)  # warm-up: workers start, files enter the disk cache
        pairs = []
        for turn in range(args.rounds):  # who goes first changes, and what a round left unfinished ends in the skipped part
            rates = {p: rate(p, skip, count) for p in ((ours, theirs) if turn % 2 else (theirs, ours))}
            pairs.append((rates[ours], rates[theirs]))
    for name, rates in zip(("ours", "ImageFolder"), zip(*pairs)):
        print(f"{name:12} median {statistics.median(rates):7.1f} images/s   {' '.join(f'{r:.0f}' for r in rates)}")
    print(f"ours / ImageFolder: median ratio {statistics.median(a / b for a, b in pairs):.3f}   ({args.images} JPEGs of "
          f"{size / 1000:.0f} kB, {args.augment}, batch {args.batch_size}, {args.workers} workers)")


if __name__ == "__main__":
    main()
