"""WiSE-FT's eleven alphas in one pass over the images against eleven evaluations.

    python tests/bench_alphas.py [--model ViT-B-32] [--images 80] [--rounds 2] [--workers 0]

A generated folder of JPEGs (500 x 375) and random weights. One pass: wise_ft.all_alphas in
common.evaluate. Separately: for each alpha, load the interpolated weights into a model and
common.evaluate it, which reads every image again. The two alternate in one run; the ratio is of
the medians. Also printed: the largest difference of any accuracy and NLL.
"""
import argparse
import copy
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import wise_ft  # noqa: E402

ALPHAS = [round(0.1 * i, 1) for i in range(11)]


def write_images(folder, n, rng):
    """Paths of n JPEGs of smooth colours and some grain: about the bytes of a photo."""
    paths = []
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.BICUBIC))
        grainy = (smooth + rng.normal(0, 12, (375, 500, 3))).clip(0, 255).astype(np.uint8)
        paths.append(f"{folder}/{i:05}.jpg")
        Image.fromarray(grainy).save(paths[-1])
    return paths


def two_ends(visual, classes, device):
    """theta_0 with random weights, and a theta_1 that predicts otherwise."""
    head = 50 * F.normalize(torch.randn(classes, visual.output_dim, device=device), dim=1)
    theta_0 = common.ImageClassifier(visual, head, bias=True).eval()
    theta_1 = copy.deepcopy(theta_0)
    with torch.no_grad():
        for w in theta_1.parameters():
            w.add_(torch.randn_like(w) * 0.3 * w.std(correction=0))
    return theta_0, theta_1


def one_pass(theta_0, theta_1, setup):
    return common.evaluate(wise_ft.all_alphas(theta_0, theta_1, ALPHAS), setup)


def separately(theta_0, theta_1, setup):
    model, results = copy.deepcopy(theta_1), {}
    for alpha in ALPHAS:
        state = wise_ft.interpolate(theta_0.state_dict(), theta_1.state_dict(), alpha)
        model.load_state_dict(state)
        results |= common.evaluate(common.each({wise_ft.row_name(alpha): model}), setup)
    return results


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="ViT-S-32-alt", help="open_clip model, e.g. ViT-B-32")
    p.add_argument("--images", type=int, default=80)
    p.add_argument("--classes", type=int, default=100)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--workers", type=int, default=0)
    args = p.parse_args()
    logging.disable()  # open_clip warns of random weights
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    visual = open_clip.create_model(args.model, device=device).visual
    ends = two_ends(visual, args.classes, device)
    sweeps = {"one pass": one_pass, "separately": separately}
    seconds, found = {name: [] for name in sweeps}, {}
    with tempfile.TemporaryDirectory() as folder:
        paths = common.file_paths(write_images(folder, args.images, rng))
        test = common.ImageSet("test", paths, rng.integers(args.classes, size=args.images))
        test.prepare(PreprocessCfg(**visual.preprocess_cfg))
        setup = SimpleNamespace(data=SimpleNamespace(tests={"test": test}), args=args,
                                device=device)
        common.evaluate(common.each({"warm-up": ends[0]}), setup)  # fills the disk cache
        for _ in range(args.rounds):
            for name, sweep in sweeps.items():
                begun = time.perf_counter()
                found[name] = sweep(*ends, setup)
                seconds[name].append(time.perf_counter() - begun)

    print(f"{args.model} on {device}, {len(ALPHAS)} alphas, {args.images} images, {args.workers} "
          f"workers, {torch.get_num_threads()} threads")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        rounds = ", ".join(f"{value:.2f}" for value in values)
        print(f"{name:10} {median[name]:8.2f} s (rounds: {rounds})")
    gap = {"acc": 0.0, "nll": 0.0}
    for row, tests in found["one pass"].items():
        for key in gap:
            difference = abs(tests["test"][key] - found["separately"][row]["test"][key])
            gap[key] = max(gap[key], difference)
    print(f"one pass is {median['separately'] / median['one pass']:.2f} x as fast; largest "
          f"difference: accuracy {gap['acc']:.1e}, NLL {gap['nll']:.1e}")


if __name__ == "__main__":
    main()
