"""Cost of a training step against plain fine-tuning: python tests/bench_step.py [--model ViT-B-32] [--batch 32] ...

Random weights and images; plain and method steps alternate in one run, and the ratio is of the medians. On CUDA the
towers run in bf16. "Lipsum-FT" computes the teacher's features at every step, as it must with augmentation; "cached"
looks them up, as --augment none does. --only NAME prints the peak memory of one method (of the GPU on CUDA).
"""
import argparse
import copy
import logging
import resource
import statistics
import sys
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import drm
import lipsum_ft

p = argparse.ArgumentParser()
p.add_argument("--model", default="ViT-B-32")
p.add_argument("--batch", type=int, default=32)
p.add_argument("--classes", type=int, default=1000)
p.add_argument("--steps", type=int, default=10)
p.add_argument("--compile", action="store_true")
p.add_argument("--only", choices=["plain", "Lipsum-FT", "cached", "DRM"])
a = p.parse_args()
logging.disable()  # open_clip warns of random weights
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
amp = torch.bfloat16 if device.type == "cuda" else None
torch.manual_seed(0)
clip = open_clip.create_model(a.model, device=device).eval()
tokenizer = open_clip.get_tokenizer(a.model)
W = F.normalize(torch.randn(a.classes, clip.text_projection.shape[1], device=device), dim=-1)
new = lambda: common.ImageClassifier(copy.deepcopy(clip.visual), W, 100.0, amp=amp)
zero_shot = common.ImageClassifier(clip.visual, W, 100.0, amp=amp).eval()
features_0 = F.normalize(torch.randn(a.batch, W.shape[1]), dim=1)
losses = {"plain": lambda model, batch: (F.cross_entropy(model(batch.images)[0], batch.labels), {}),
          "Lipsum-FT": lipsum_ft.make_loss(clip, torch.compile(zero_shot) if a.compile else zero_shot, tokenizer, 1.0, 80,
                                           8, 0),
          "cached": lipsum_ft.make_loss(clip, zero_shot, tokenizer, 1.0, 80, 8, 0, features_0),
          "DRM": drm.make_loss(features_0, W, 100.0, "softmax", 1.0)}
model = new().train()
two_heads = common.ImageClassifier(model.visual, torch.cat([W, W.roll(1, 0)]), 100.0, amp=amp).train()
two_heads.head.requires_grad_(False)  # one set of tower weights and one optimizer for all
runners = {"plain": model, "Lipsum-FT": model, "cached": model, "DRM": two_heads}
if a.compile:
    runners = {k: torch.compile(m) for k, m in runners.items()}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")
losses = {k: f for k, f in losses.items() if a.only in (None, k)}
seconds, memory = {k: [] for k in losses}, {}
for step in range(-2, a.steps):  # two rounds of warm-up
    for name, loss_fn in losses.items():
        size = clip.visual.image_size if isinstance(clip.visual.image_size, tuple) else (clip.visual.image_size,) * 2
        batch = common.Batch(torch.randn(a.batch, 3, *size, device=device),
                             torch.randint(a.classes, (a.batch,), device=device), torch.arange(a.batch), step + 2)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        begun = time.perf_counter()
        loss_fn(runners[name], batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
            memory[name] = torch.cuda.max_memory_allocated() / 2**30
        if step >= 0:
            seconds[name].append(time.perf_counter() - begun)
plain = statistics.median(next(iter(seconds.values())))
if a.only and device.type == "cpu":
    memory[a.only] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
for name, values in seconds.items():
    t = statistics.median(values)
    peak = f", peak memory {memory[name]:.2f} GiB" if memory else ""
    ratio = "" if a.only else f", {t / plain:.3f} x plain"
    print(f"{name:10} {1000 * t:9.1f} ms a step, {a.batch / t:8.1f} images/s{ratio}{peak}")
