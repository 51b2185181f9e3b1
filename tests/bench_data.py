"""Images/s of the training input pipeline against torchvision's ImageFolder.

    python tests/bench_data.py [--augment crop] [--workers 2] [--rounds 10] [--images 600]
    python tests/bench_data.py --list 1280000    # a listing of ImageNet's size: seconds and memory

Writes a tree of JPEGs of ImageNet's usual size and reads it in turns, in one process; no model is
involved. ImageFolder has open_clip's own float transform with the same augmentation, normalised in
the workers. Ours is common.batches_of: uint8 from the workers, normalised on the device; `loader`
is the same without the normalisation, which a GPU does in passing, but a CPU with the cores that
also decode. All end with batches on the device. Processor time is that of all processes.

--list N builds a tree of N hard links in 1,000 folders (10 below N = 10,000) and lists it with
common.class_tree; then eight loader workers touch every path and label, and their memory (PSS:
a page that k processes share counts as 1/k in each) is read while all of them live.
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
import common  # noqa: E402

SMALLEST = {"crop": 0.9, "crop-flip": 0.08}  # share of an image's area


# ---- Speed ----

def write_tree(root, n):
    """n JPEGs of about 500 x 375 in 10 folders: smooth colours and noise, about 100 kB each."""
    rng = np.random.default_rng(0)
    for i in range(n):
        width, height = rng.integers(470, 531), rng.integers(345, 406)
        coarse = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.BICUBIC))
        pixels = np.clip(smooth + rng.normal(0, 14, (height, width, 1)), 0, 255).astype(np.uint8)
        folder = root / f"class_{i % 10}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i:04d}.JPEG", quality=88)


def float_transform(preprocess, augment):
    """open_clip's transform to normalised fp32, with the augmentation of common.py."""
    if augment == "none":
        return image_transform_v2(preprocess, is_train=False)
    whole = image_transform_v2(preprocess, True, {"scale": (SMALLEST[augment], 1.0)})
    flip = [transforms.RandomHorizontalFlip()] if augment == "crop-flip" else []
    return transforms.Compose([*flip, *whole.transforms])


def processor_time():
    """Seconds of user and system time of this process and of its children that have ended."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(own[:2]) + sum(ended[:2])


def measure(batches):
    """(images/s, processor ms an image) of one pass, from the workers' start to their end."""
    spent, begun = processor_time(), time.perf_counter()
    images = sum(len(x) for x in batches)
    return images / (time.perf_counter() - begun), 1000 * (processor_time() - spent) / images


def on_device(loader, device):
    for x, y, *_ in loader:
        y.to(device, non_blocking=True)
        yield x.to(device, non_blocking=True)


def ours(dataset, args, steps, device):
    for batch in common.batches_of(dataset, args, 0, steps, device):
        yield batch.images


def loader(dataset, args, steps, device):
    sampler = common.ShuffledEpochs(len(dataset), args, 0, steps)
    return on_device(common.image_loader(dataset, sampler, args, device), device)


def compare(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preprocess, rounds = PreprocessCfg(), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_tree(root, args.images)
        size = sum(f.stat().st_size for f in root.rglob("*.JPEG")) / args.images
        dataset = common.class_tree("train", root, {f"class_{c}": c for c in range(10)})
        dataset.prepare(preprocess)
        dataset = dataset.augmented(args.augment, 0)
        theirs = torch.utils.data.DataLoader(
            ImageFolder(folder, float_transform(preprocess, args.augment)), args.batch_size,
            shuffle=True, drop_last=True, num_workers=args.workers,
            pin_memory=device.type == "cuda")
        for seed in range(args.rounds + 1):  # round 0 fills the disk cache and is dropped
            args.seed = seed  # another order in every round
            found = {}
            for turn in range(3):  # who goes first changes
                name = ("loader", "ours", "ImageFolder")[(seed + turn) % 3]
                if name == "ImageFolder":
                    found[name] = measure(on_device(theirs, device))
                else:
                    read = {"loader": loader, "ours": ours}[name]
                    found[name] = measure(read(dataset, args, len(theirs), device))
            rounds.append(found)
    rounds = rounds[1:]
    print(f"{args.images} JPEGs of {size / 1000:.0f} kB, {args.augment}, batch {args.batch_size}, "
          f"{args.workers} workers, {device}; ratios to ImageFolder are medians over rounds")
    for name in ("ImageFolder", "loader", "ours"):
        rates, cpu = zip(*[found[name] for found in rounds])
        speed, time_spent = [statistics.median(found[name][k] / found["ImageFolder"][k]
                                               for found in rounds) for k in (0, 1)]
        print(f"{name:12}{statistics.median(rates):7.1f} images/s ({speed:.3f} x), "
              f"{statistics.median(cpu):.2f} ms of processor an image ({time_spent:.3f} x); "
              f"rounds: {' '.join(f'{rate:.0f}' for rate in rates)}")


# ---- A long listing ----

class Touch(torch.utils.data.Dataset):
    """Item i: reads all paths and labels of an ImageSet, waits for the others, returns its PSS."""

    def __init__(self, images, barrier):
        self.images, self.barrier = images, barrier

    def __getitem__(self, _):
        length = 0
        for i in range(len(self.images)):
            length += len(os.fsdecode(self.images.images[i])) + int(self.images.labels[i])
        self.barrier.wait()
        found = pss()
        self.barrier.wait()  # all are alive until the last has looked
        return found


def pss():
    """MiB of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024


def peak():
    """MiB that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def list_tree(n, workers=8):
    folders = 1000 if n >= 10_000 else 10
    with tempfile.TemporaryDirectory() as root:
        for c in range(folders):
            folder = f"{root}/n{c:08}"
            os.mkdir(folder)
            first = f"{folder}/n{c:08}_0.JPEG"
            Image.new("RGB", (8, 8)).save(first)
            for i in range(1, n // folders):
                os.link(first, f"{folder}/n{c:08}_{i}.JPEG")
        before, begun = peak(), time.perf_counter()
        images = common.class_tree("train", Path(root), {f"n{c:08}": c for c in range(folders)})
        seconds, after = time.perf_counter() - begun, peak()
        print(f"{len(images)} files in {folders} folders: listed in {seconds:.1f} s, peak RSS "
              f"{after:.0f} MiB, {after - before:.0f} above that before the listing; paths "
              f"{images.images.nbytes / 2**20:.0f} MiB, labels {images.labels.nbytes / 2**20:.0f}")
        touch = Touch(images, multiprocessing.Barrier(workers))
        small = Touch(images.subset(range(10)), multiprocessing.Barrier(workers))
        for what, dataset in (("10 files", small), (f"{len(images)} files", touch)):
            loader = torch.utils.data.DataLoader(dataset, 1, sampler=range(workers),
                                                 num_workers=workers)
            found = [value.item() for value in loader]
            print(f"{workers} workers after touching {what}: {sum(found):.0f} MiB of PSS in all")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--images", type=int, default=600)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--augment", default="crop-flip", choices=["none", "crop", "crop-flip"])
    p.add_argument("--list", type=int, metavar="N", help="list a tree of N files instead")
    args = p.parse_args()
    args.accum = 1
    if args.list:
        list_tree(args.list)
    else:
        compare(args)


if __name__ == "__main__":
    main()
