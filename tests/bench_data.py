"""Images/s of the training input pipeline against torchvision's ImageFolder.

    python tests/bench_data.py [--augment crop] [--workers 2] [--rounds 10] [--images 600]
    python tests/bench_data.py --list 1280000    # a listing of ImageNet's size: seconds and memory

Reads JPEGs of ImageNet's usual size in turns; no model is involved. ImageFolder has open_clip's
float transform with the same augmentation, normalised in the workers. Ours is common.batches_of:
uint8 from the workers, normalised on the device; `loader` is the same without the normalisation,
which a GPU does in passing, but a CPU with the cores that also decode. All end with batches on the
device. Processor time is that of all processes.

--list N lists N hard links in 1,000 folders (10 below N = 10,000) with common.class_tree; then
eight workers touch every path and label, and their memory (PSS: a page that k processes share
counts as 1/k in each) is read while all of them live.
"""
import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common


def listed(root, n, classes=10):
    """ImageSet of n new JPEGs of about 500 x 375: smooth colours and noise, about 100 kB each."""
    rng, labels = np.random.default_rng(0), {f"{c:04}": c for c in range(min(n, classes))}
    for i in range(n):
        width, height = rng.integers(470, 531), rng.integers(345, 406)
        coarse = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.BICUBIC))
        pixels = np.clip(smooth + rng.normal(0, 14, (height, width, 1)), 0, 255).astype(np.uint8)
        folder = root / f"{i % classes:04}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i:04}.JPEG", quality=88)
    return common.class_tree("train", root, labels)


def float_transform(augment):
    """common.image_transform() but to normalised fp32."""
    smallest = {"none": 1.0, "crop": 0.9, "crop-flip": 0.08}[augment]  # share of an image's area
    whole = image_transform_v2(PreprocessCfg(), augment != "none", {"scale": (smallest, 1.0)})
    flip = [transforms.RandomHorizontalFlip()] if augment == "crop-flip" else []
    return transforms.Compose([*flip, *whole.transforms])


def measure(batches):
    """(images/s, processor ms an image) of one pass, from the workers' start to their end."""
    spent, begun = sum(os.times()[:4]), time.perf_counter()
    n = sum(len(x) for x, *_ in batches)
    return n / (time.perf_counter() - begun), 1000 * (sum(os.times()[:4]) - spent) / n


def moved(loader):
    for batch in loader:
        yield [x.to(common.DEVICE, non_blocking=True) for x in batch[:2]]


def compare(args):
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        images = listed(Path(folder), args.images)
        images.prepare(PreprocessCfg())
        images = images.augmented(args.augment, 0)
        size = sum(map(os.path.getsize, images.images)) / len(images)
        theirs = torch.utils.data.DataLoader(
            ImageFolder(folder, float_transform(args.augment)), args.batch_size, shuffle=True,
            drop_last=True, num_workers=args.workers, pin_memory=common.CUDA)

        def loader():
            order = common.shuffled_epochs(len(images), args, 0, len(theirs))
            return moved(common.image_loader(images, order, args.workers))
        reads = {"ImageFolder": lambda: moved(theirs), "loader": loader,
                 "ours": lambda: common.batches_of(images, args, 0, len(theirs))}
        for i in range(args.rounds + 1):  # in every round another order, and another goes first
            args.seed, turns = i, [list(reads)[(i + k) % 3] for k in range(3)]
            rounds.append({name: measure(reads[name]()) for name in turns})
    del rounds[0]  # it filled the disk cache
    print(f"{args.images} JPEGs of {size / 1000:.0f} kB, {args.augment}, batch {args.batch_size}, "
          f"{args.workers} workers, {common.DEVICE}; ratios to ImageFolder are medians over rounds")
    for name in reads:
        rates, cpu = zip(*[found[name] for found in rounds])
        speed, spent = (statistics.median(found[name][k] / found["ImageFolder"][k]
                                          for found in rounds) for k in (0, 1))
        print(f"{name:12}{statistics.median(rates):7.1f} images/s ({speed:.3f} x), "
              f"{statistics.median(cpu):.2f} ms of processor an image ({spent:.3f} x); "
              f"rounds: {' '.join(f'{rate:.0f}' for rate in rates)}")


class Touch(torch.utils.data.Dataset):
    """Item i: reads all paths and labels of an ImageSet, waits for the others, returns its PSS."""

    def __init__(self, images, barrier):
        self.images, self.barrier = images, barrier

    def __getitem__(self, _):
        for i in range(len(self.images)):
            os.fsdecode(self.images.images[i]), int(self.images.labels[i])
        self.barrier.wait()
        rollup = Path("/proc/self/smaps_rollup").read_text()
        self.barrier.wait()  # all are alive until the last has looked
        return int(rollup.split("\nPss:")[1].split()[0]) / 1024


def list_tree(n, workers=8):
    def peak():  # MiB that this process has had at most
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    folders = {f"n{c:08}": c for c in range(1000 if n >= 10_000 else 10)}
    with tempfile.TemporaryDirectory() as root:
        for folder in folders:
            path = f"{root}/{folder}/{folder}"
            os.mkdir(f"{root}/{folder}")
            Image.new("RGB", (8, 8)).save(f"{path}_0.JPEG")
            for i in range(1, n // len(folders)):
                os.link(f"{path}_0.JPEG", f"{path}_{i}.JPEG")
        before, begun = peak(), time.perf_counter()
        images = common.class_tree("train", Path(root), folders)
        print(f"{len(images)} files in {len(folders)} folders: listed in "
              f"{time.perf_counter() - begun:.1f} s, peak RSS {peak():.0f} MiB, "
              f"{peak() - before:.0f} above that before the listing; paths "
              f"{images.images.nbytes / 2**20:.0f} MiB, labels {images.labels.nbytes / 2**20:.0f}")
        for touched in (images.subset(range(10)), images):
            dataset = Touch(touched, multiprocessing.Barrier(workers))
            found = torch.utils.data.DataLoader(dataset, 1, sampler=range(workers),
                                                num_workers=workers)
            print(f"{workers} workers after touching {len(touched)} files: "
                  f"{sum(found).item():.0f} MiB of PSS in all")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(workers=2, rounds=10, images=600).items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--augment", default="crop-flip", choices=["none", "crop", "crop-flip"])
    p.add_argument("--list", type=int, metavar="N", help="list a tree of N files instead")
    args = p.parse_args(None, argparse.Namespace(accum=1))
    list_tree(args.list) if args.list else compare(args)


if __name__ == "__main__":
    main()
