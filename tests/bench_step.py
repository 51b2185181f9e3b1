"""Cost of a training step against plain fine-tuning, measured and counted.

    python tests/bench_step.py                 # ViT-B-16; on CUDA 256 images and 1,000 classes
    python tests/bench_step.py --count         # counts alone, runs nothing
    python tests/bench_step.py --hours         # hours and memory of the ImageNet recipes, computed
    python tests/bench_step.py --only DRM      # one method alone: its peak memory

Random weights, images and texts; steps of all methods alternate in one run and a ratio is that of
the medians. On CUDA the towers run in bf16. Without a GPU the case is 64 times smaller, 4 images
and 16 classes, and AdamW, which the counts leave out, and the 80 random texts weigh more. Counts
are half the FLOP of torch's FlopCounterMode in a step on the device "meta".

    plain      cross-entropy of the image tower and a head
    Lipsum-FT  the same, with the teacher's features and 80 random texts
    FLYP       as its authors run it: a caption an image, padded to 77 positions, both towers
    FLYP cut   drm.py --lam 0: captions of the batch's classes, each once and cut at its end
    DRM        lambda = 1 with FLYP cut; descriptions of all classes at every step

The lengths of texts are those of ImageNet, SOT and EOT included: the longest caption of a batch's
classes has 16 positions; of the authors' descriptions, sorted by length as drm.py encodes them, 256
at a time up to the longest's end, the longest have 11, 13, 16 and 38 (the mean of all is 14).
"""
import argparse
import functools
import logging
import math
import resource
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import drm
import lipsum_ft
import wise_ft

NAMES = ["plain", "Lipsum-FT", "FLYP", "FLYP cut", "DRM"]
CARDS = {"H100": 989, "A100": 312, "4090": 165}  # published dense bf16 peak in TFLOP/s (H100: SXM)
CONTEXT, CHUNK = 77, 256  # positions of a text; texts that drm.py encodes at once
# Distinct tokens, with padding, of 1,000 x "a good photo of the {}." (1,499) and of the authors'
# descriptions, prompts/imagenet_cd.json (2,034)
USED = 3032
FLAGS = dict(finetuned="", grad_checkpointing=False, lr=1e-6, wd=0.0)


class Case(NamedTuple):
    model: str
    batch: int
    classes: int
    caption: int   # positions of a caption of DRM
    longest: list  # positions of the longest description of every CHUNK, ascending

    def lengths(self):
        """Positions at which each description is encoded; few classes have the longest."""
        missing = len(self.longest) - math.ceil(self.classes / CHUNK)
        return [self.longest[max(0, missing + i // CHUNK)] for i in range(self.classes)]

    def batch_on(self, device, step=0):
        """A Batch, and the labels of all eight batches of the data set on the CPU."""
        labels = torch.randint(self.classes, (8 * self.batch,), generator=torch.Generator())
        index = torch.arange(self.batch) + self.batch * (step % 8)
        size = open_clip.get_model_config(self.model)["vision_cfg"]["image_size"]
        images = torch.randn(self.batch, 3, size, size, device=device)
        return common.Batch(images, labels[index].to(device), index, step), labels


# ---- Methods ----

class Captioned(nn.Module):
    """FLYP's model: images (B, 3, H, W), tokens (B, 77) -> unit features of both, s."""

    def __init__(self, clip, amp):
        super().__init__()
        self.clip, self.amp = clip, amp

    def forward(self, images, tokens):
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            f, g = self.clip.visual(images), self.clip.encode_text(tokens)
        f, g = F.normalize(f.float(), dim=-1), F.normalize(g.float(), dim=-1)
        return f, g, self.clip.logit_scale.exp()


def texts(lengths):
    """Random texts of these lengths, padded to the context: (C, 77)."""
    tokens = torch.zeros(len(lengths), CONTEXT, dtype=torch.long)
    for row, n in zip(tokens, lengths):
        row[:n] = torch.tensor([49406, *torch.randint(1, 49406, (n - 2,)), 49407])
    return tokens


def new_clip(name, device):
    with torch.device(device):
        return open_clip.create_model(name, device=device).eval()


def contenders(names, case, labels, device, amp=None, compiled=False):
    """{method: (what its loss calls, loss_fn)}; those that train the same share it."""
    clip, owner = new_clip(case.model, device), torch.arange(case.classes)
    head = F.normalize(torch.randn(case.classes, clip.text_projection.shape[1]), dim=1)
    features_0, captions = head[labels], texts([case.caption] * case.classes)
    zero_shot = common.ImageClassifier(clip.visual, head.to(device), 100.0, amp=amp).eval()
    df, cd = drm.Texts(captions, owner), drm.Texts(texts(case.lengths()), owner)
    captions, tokenizer = captions.to(device), open_clip.get_tokenizer(case.model)
    # "meta" has no values, but the extremes' are needed: there w_cd_0 and the estimate are on the
    # CPU, where its product is counted too.
    where, targets = ("cpu", "onehot") if device.type == "meta" else (device, "paper")
    about_0 = features_0, labels, head.to(where), 100.0, targets

    def flyp(model, batch):
        return drm.contrastive_loss(*model(batch.images, captions[batch.labels])), {}
    image, captioned = lambda: zero_shot, lambda: Captioned(clip, amp)
    dual = lambda: drm.DualPrompts(clip, df, cd, case.classes, amp)
    teacher = torch.compile(zero_shot) if compiled else zero_shot  # as lipsum_ft.py
    lipsum = lipsum_ft.make_loss(clip, teacher, tokenizer, 1.0, 80, 8, 0)
    every = {"plain": (image, wise_ft.cross_entropy), "Lipsum-FT": (image, lipsum),
             "FLYP": (captioned, flyp), "FLYP cut": (dual, drm.make_loss(0.0, *about_0)),
             "DRM": (dual, drm.make_loss(1.0, *about_0))}
    flags = argparse.Namespace(**FLAGS, compile=compiled)
    trained = functools.cache(lambda make: common.trainable(make(), flags, ())[1])
    return {name: (trained(every[name][0]), every[name][1]) for name in names}


# ---- Counting ----

def count(case, names=NAMES):
    """{method: multiply-adds of a step}"""
    device, found = torch.device("meta"), {}
    batch, labels = case.batch_on(device)
    with mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext()):  # knows no "meta"
        for name, (runner, loss_fn) in contenders(names, case, labels, device).items():
            with FlopCounterMode(display=False) as counter:
                loss_fn(runner, batch)[0].backward()
            found[name] = counter.get_total_flops() / 2
    return found


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def print_counts(case):
    found = count(case)
    print(case)
    for name, macs in found.items():
        print(f"{name:10} {macs / 1e12:8.2f} TMAC a step, {macs / found['plain']:.3f} x plain, "
              f"{macs / found['FLYP']:.3f} x FLYP")
    for n in (30, 50):
        macs = count(case._replace(longest=[n]), ["DRM"])["DRM"]
        print(f"DRM with all descriptions at {n} positions: {macs / found['FLYP']:.3f} x FLYP")
    clip = new_clip(case.model, "meta")
    rows, width = clip.token_embedding.weight.shape
    print(f"DRM with ImageNet's default prompts and the authors' descriptions, {USED} distinct "
          f"tokens of {rows} (counted once, not here), fp32:")
    for what, left_out in (("all token embeddings", 0), ("those of used tokens", rows - USED)):
        n = (parameters(clip) - left_out * width) / 1e6
        print(f"training {what}: {n:.1f} M parameters, AdamW's moments {8 * n:.0f} MB, gradients "
              f"that ranks exchange {4 * n:.0f} MB a step")


# ---- Hours and memory of the ImageNet recipes ----

def memory(case, drm_texts, copies):
    """Estimated GB at the end of a forward pass: weights, AdamW and saved activations.

    A trained parameter has 18 bytes: weight, gradient and two moments in fp32, a bf16 copy; each
    of `copies` frozen CLIPs has 4. With autocast, flash attention and QuickGELU the backward pass
    needs 44 w bytes a position and layer of width w: two inputs of LayerNorm in fp32 (8 w), its
    two outputs (4 w), q, k, v (6 w), attention's output (2 w), and three of the MLP's 4 w wide
    hidden values in bf16 (24 w): before QuickGELU, its sigmoid, and after.
    """
    clip, config = new_clip(case.model, "meta"), open_clip.get_model_config(case.model)
    vision, text = config["vision_cfg"], config["text_cfg"]
    positions = case.batch * ((vision["image_size"] // vision["patch_size"]) ** 2 + 1)
    saved = 44 * vision["width"] * vision["layers"] * positions
    if drm_texts:
        captions = case.classes * (1 - (1 - 1 / case.classes) ** case.batch)  # expected, distinct
        positions = captions * case.caption + sum(case.lengths())
        saved += 44 * text["width"] * text["layers"] * positions
    trained = parameters(clip if drm_texts else clip.visual)
    return (18 * trained + 4 * copies * parameters(clip) + saved) / 1e9


def print_hours(case, use=0.4):
    images = round(1_281_167 * 0.98)
    print(f"ImageNet, {images} training images; computed from counts at {use:.0%} of the published "
          "bf16 peak of one card, evaluation left out")
    print(f"{'':22}{'batch':>6}{'steps':>8}", *[f"{card + ' h':>8}" for card in CARDS],
          f"{'memory GB':>10}")
    ten = {batch: math.ceil(10 * images / batch) for batch in (256, 512)}  # epochs
    # Batch, steps, count, passes over the training images, frozen CLIPs
    rows = {"WiSE-FT": (512, ten[512], "plain", 0, 1), "VRF": (512, ten[512], "plain", 2, 1),
            "Lipsum-FT": (256, 50_000, "Lipsum-FT", 0, 1), "DRM": (256, ten[256], "DRM", 1, 2)}
    for model in ("ViT-B-16", "ViT-L-14"):
        for method, (batch, steps, name, passes, copies) in rows.items():
            own = case._replace(model=model, batch=batch)
            found = count(own, ["plain", name])
            once = images / batch * found["plain"] / 3  # a backward pass costs two forward ones
            flop = 2 * (steps * found[name] + passes * once)
            hours = [flop / (use * peak * 1e12) / 3600 for peak in CARDS.values()]
            print(f"{model + ' ' + method:22}{batch:>6}{steps:>8}", *[f"{h:>8.1f}" for h in hours],
                  f"{memory(own, method == 'DRM', copies):>10.0f}")
    print("memory: above that of the card, --accum or --grad-checkpointing is needed")


# ---- Measuring ----

def measure(names, case, steps, compiled):
    """{method: seconds of each step}"""
    device, amp = common.DEVICE, torch.bfloat16 if common.CUDA else None
    wait = torch.cuda.synchronize if common.CUDA else lambda: None
    own = contenders(names, case, case.batch_on(device)[1], device, amp, compiled)
    flags = argparse.Namespace(**FLAGS)
    optimizers = {runner: common.make_optimizer(runner, flags) for runner, _ in own.values()}
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    seconds, warm_up = {name: [] for name in own}, 3 if common.CUDA else 1
    for step in range(steps + warm_up):
        batch, _ = case.batch_on(device, step)
        for name, (runner, loss_fn) in own.items():
            wait()
            begun = time.perf_counter()
            common.optimizer_step(runner, loss_fn, [batch], optimizers[runner], scaler, 0.0)
            wait()
            if step >= warm_up:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def print_times(case, a):
    names = [a.only] if a.only else NAMES
    seconds, counted = measure(names, case, a.steps, a.compile), count(case, names)
    card = torch.cuda.get_device_name() if common.CUDA else "CPU"
    print(f"{card}, {torch.get_num_threads()} threads, {a.steps} steps, {case}")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, t in median.items():
        line = f"{name:10}{1000 * t:9.1f} ms a step,{case.batch / t:8.1f} images/s"
        line += f", {2e-12 * counted[name] / t:.2f} TFLOP/s"
        for other in ("plain", "FLYP") if not a.only else ():
            line += (f", {t / median[other]:.3f} x {other} (counted "
                     f"{counted[name] / counted[other]:.3f})")
        print(line)
    if a.only:
        peak = torch.cuda.max_memory_allocated() / 2**30 if common.CUDA else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
        print(f"peak memory {peak:.2f} GiB")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="ViT-B-16", help="open_clip's name of a ViT")
    p.add_argument("--batch", type=int, help="default: 256, without a GPU 4")
    p.add_argument("--classes", type=int, help="default: 1000, without a GPU 16")
    p.add_argument("--caption-length", type=int, default=16)
    p.add_argument("--description-length", type=int, default=[11, 13, 16, 38], nargs="+",
                   help="the longest of each 256 descriptions, ascending")
    p.add_argument("--steps", type=int, default=3, help="timed steps of each method")
    p.add_argument("--only", choices=NAMES)
    for flag in ("--count", "--hours", "--compile"):
        p.add_argument(flag, action="store_true")
    a = p.parse_args()
    logging.disable()  # open_clip warns of random weights
    torch.manual_seed(0)
    large = common.CUDA or a.count or a.hours
    case = Case(a.model, a.batch or (256 if large else 4), a.classes or (1000 if large else 16),
                a.caption_length, a.description_length)
    if a.count or a.hours:
        return print_counts(case) if a.count else print_hours(case)
    print_times(case, a)


if __name__ == "__main__":
    main()
