"""Images/s of the training input pipeline against torchvision's ImageFolder with the same transform and workers.

Writes a tree of JPEGs of ImageNet's usual size and reads it with both, in turns, in one process; no model is involved.
    python tests/bench_data.py [--workers 2] [--rounds 10] [--images 600]
"""
import argparse
import resource
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
        coarse = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.BICUBIC)) + rng.normal(0, 14, (height, width, 1))
        folder = root / f"class_{i % 10}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{i:04d}.JPEG", quality=88)


def measure(batches):
    """(images/s, processor ms an image in the workers) of one pass, from the start of the workers to their end."""
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # user and system time of ended processes
    cpu, begun = spent(), time.perf_counter()
    images = sum(len(batch[0]) for batch in batches)
    return images / (time.perf_counter() - begun), 1000 * (spent() - cpu) / images


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in {"--workers": 2, "--rounds": 10, "--images": 600, "--batch-size": 32}.items():
        p.add_argument(flag, type=int, default=default)
    p.add_argument("--augment", default="crop-flip", choices=["none", "crop", "crop-flip"])
    args = p.parse_args()
    args.accum, preprocess, rounds = 1, PreprocessCfg(), []
    with tempfile.TemporaryDirectory() as folder:
        write_tree(Path(folder), args.images)
        size = sum(f.stat().st_size for f in Path(folder).rglob("*.JPEG")) / args.images
        dataset = common.class_tree("train", Path(folder), {f"class_{c}": c for c in range(10)})
        dataset.transform = common.image_transform_v2(preprocess, is_train=False)
        dataset = dataset.augmented(args.augment, preprocess, seed=0)
        theirs = torch.utils.data.DataLoader(
            ImageFolder(folder, dataset.transform), args.batch_size, shuffle=True, drop_last=True,
            num_workers=args.workers, pin_memory=torch.cuda.is_available())
        for args.seed in range(args.rounds + 1):  # who goes first changes; round 0 fills the disk cache and is dropped
            stream = common.Stream(len(dataset), args, 0, len(theirs))
            pair = {"ours": common.loader(dataset, stream, args), "ImageFolder": theirs}
            rounds.append({name: measure(pair[name]) for name in sorted(pair, reverse=args.seed % 2 == 0)})
    rounds = rounds[1:]
    for name in pair:
        rates, cpu = zip(*(r[name] for r in rounds))
        print(f"{name:12} {statistics.median(rates):6.1f} images/s, {statistics.median(cpu):.2f} ms of processor "
              f"an image; images/s of the rounds: {' '.join(f'{r:.0f}' for r in rates)}")
    speed, cpu = (statistics.median(r["ours"][k] / r["ImageFolder"][k] for r in rounds) for k in (0, 1))
    print(f"ours / ImageFolder, median over rounds: speed {speed:.3f}, processor time {cpu:.3f}   ({args.images} JPEGs "
          f"of {size / 1000:.0f} kB, {args.augment}, batch {args.batch_size}, {args.workers} workers)")


if __name__ == "__main__":
    main()
