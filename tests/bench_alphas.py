"""WiSE-FT's eleven alphas in one pass over the images against eleven evaluations: python tests/bench_alphas.py [...]

A generated folder of JPEGs (500x375) and random weights. One pass: wise_ft.all_alphas in common.evaluate. Separately:
for each alpha, load the interpolated weights into a model and common.evaluate it, which reads every image again. The
two alternate in one run; the ratio is of the medians. Also printed: the largest difference of any accuracy and NLL.
"""
import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import wise_ft

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--model", default="ViT-S-32-alt", help="open_clip model, e.g. ViT-B-32")
p.add_argument("--images", type=int, default=80)
p.add_argument("--classes", type=int, default=100)
p.add_argument("--rounds", type=int, default=2)
p.add_argument("--workers", type=int, default=0)
a = p.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
rng = np.random.default_rng(0)
visual = open_clip.create_model(a.model, device=device).visual
theta_0 = common.ImageClassifier(visual, 50 * torch.randn(a.classes, visual.output_dim, device=device).renorm(2, 0, 1),
                                 bias=True).eval()
theta_1 = copy.deepcopy(theta_0)
with torch.no_grad():
    for w in theta_1.parameters():  # a second end that predicts otherwise
        w.add_(torch.randn_like(w) * 0.3 * w.std(correction=0))
alphas = [round(0.1 * i, 1) for i in range(11)]

with tempfile.TemporaryDirectory() as folder:
    paths = [f"{folder}/{i:05}.jpg" for i in range(a.images)]
    for path in paths:  # smooth colours and some grain: about the bytes of a photo
        image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        grainy = np.asarray(image) + rng.normal(0, 12, (375, 500, 3))
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(path)
    test = common.ImageSet("test", paths, rng.integers(a.classes, size=a.images))
    test.transform = image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False)
    setup = SimpleNamespace(data=SimpleNamespace(tests={"test": test}), args=SimpleNamespace(workers=a.workers),
                            device=device)

    def one_pass():
        return common.evaluate(wise_ft.all_alphas(theta_0, theta_1, alphas), setup)

    def separately():
        model, results = copy.deepcopy(theta_1), {}
        for alpha in alphas:
            model.load_state_dict(wise_ft.interpolate(theta_0.state_dict(), theta_1.state_dict(), alpha))
            results |= common.evaluate({wise_ft.row_name(alpha): model}, setup)
        return results

    sweeps = {"one pass": one_pass, "separately": separately}
    common.evaluate({"warm-up": theta_0}, setup)  # reads the images into the page cache
    seconds, found = {name: [] for name in sweeps}, {}
    for _ in range(a.rounds):
        for name, sweep in sweeps.items():
            begun = time.perf_counter()
            found[name] = sweep()
            seconds[name].append(time.perf_counter() - begun)

median = {name: statistics.median(s) for name, s in seconds.items()}
print(f"{a.model} on {device}, {len(alphas)} alphas, {a.images} images, {a.workers} workers, "
      f"{torch.get_num_threads()} threads")
for name in sweeps:
    print(f"{name:10} {median[name]:8.2f} s (rounds: {', '.join(f'{s:.2f}' for s in seconds[name])})")
gap = {key: max(abs(found["one pass"][row]["test"][key] - found["separately"][row]["test"][key])
                for row in found["one pass"]) for key in ("acc", "nll")}
print(f"one pass is {median['separately'] / median['one pass']:.2f} x as fast; largest difference: accuracy "
      f"{gap['acc']:.1e}, NLL {gap['nll']:.1e}")
