"""WiSE-FT's eleven alphas in one pass over the images against eleven evaluations.

    python tests/bench_alphas.py [--model ViT-B-32] [--images 80] [--rounds 2] [--workers 0]

Generated JPEGs and random weights. One pass: wise_ft.all_alphas in common.evaluate. Separately:
for each alpha, load the interpolated weights into a model and common.evaluate it, which reads every
image again. The two alternate in one run; the ratio is of the medians.
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

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import wise_ft
from tests.bench_data import listed

ALPHAS = [round(0.1 * i, 1) for i in range(11)]


def one_pass(theta_0, theta_1, setup):
    return common.evaluate(wise_ft.all_alphas(theta_0, theta_1, ALPHAS), setup)


def separately(theta_0, theta_1, setup):
    model, results = copy.deepcopy(theta_1), {}
    for alpha in ALPHAS:
        ends = theta_0.state_dict(), theta_1.state_dict()
        model.load_state_dict(wise_ft.interpolate(*ends, alpha))
        results |= common.evaluate(common.each({wise_ft.row_name(alpha): model}), setup)
    return results


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="ViT-S-32-alt", help="open_clip model, e.g. ViT-B-32")
    for name, default in dict(images=80, classes=100, rounds=2, workers=0).items():
        p.add_argument(f"--{name}", type=int, default=default)
    args = p.parse_args()
    logging.disable()  # open_clip warns of random weights
    torch.manual_seed(0)
    visual = open_clip.create_model(args.model, device=common.DEVICE).visual
    head = 50 * F.normalize(torch.randn(args.classes, visual.output_dim), dim=1)
    theta_0 = common.ImageClassifier(visual, head.to(common.DEVICE), bias=True).eval()
    theta_1 = copy.deepcopy(theta_0)
    for w in theta_1.parameters():  # so that it predicts otherwise
        w.data.add_(torch.randn_like(w) * 0.3 * w.data.std(correction=0))
    seconds, found = {one_pass: [], separately: []}, {}
    with tempfile.TemporaryDirectory() as folder:
        test = listed(Path(folder), args.images, args.classes)
        test.prepare(PreprocessCfg(**visual.preprocess_cfg))
        setup = SimpleNamespace(data=SimpleNamespace(tests={"test": test}), args=args)
        common.evaluate(common.each({"warm-up": theta_0}), setup)  # fills the disk cache
        for _ in range(args.rounds):
            for sweep in seconds:
                begun = time.perf_counter()
                found[sweep] = sweep(theta_0, theta_1, setup)
                seconds[sweep].append(time.perf_counter() - begun)

    print(f"{args.model} on {common.DEVICE}, {len(ALPHAS)} alphas, {args.images} images, "
          f"{args.workers} workers, {torch.get_num_threads()} threads")
    for sweep, rounds in seconds.items():
        print(f"{sweep.__name__:10} {statistics.median(rounds):8.2f} s (rounds: "
              f"{', '.join(f'{x:.2f}' for x in rounds)})")
    speed = statistics.median(seconds[separately]) / statistics.median(seconds[one_pass])
    gap = {key: max(abs(tests["test"][key] - found[separately][row]["test"][key])
                    for row, tests in found[one_pass].items()) for key in ("acc", "nll")}
    print(f"one pass is {speed:.2f} x as fast; largest difference: accuracy {gap['acc']:.1e}, "
          f"NLL {gap['nll']:.1e}")


if __name__ == "__main__":
    main()
