"""Cost of a training step against plain fine-tuning, measured and counted.

    python tests/bench_step.py                 # ViT-B-16; on CUDA 256 images and 1,000 classes
    python tests/bench_step.py --count         # counts alone, runs nothing
    python tests/bench_step.py --hours         # hours and memory of the ImageNet recipes, computed
    python tests/bench_step.py --only DRM      # one method alone: its peak memory

Random weights, images and texts; steps of all methods alternate in one run and a ratio is that of
the medians. On CUDA the towers run in bf16. Without a GPU the case is 64 times smaller, 4 images
and 16 classes, and AdamW, which the counts leave out, and the 80 random texts weigh more.

    plain      cross-entropy of the image tower and a head
    Lipsum-FT  the teacher's features at every step, as with augmentation
    cached     the same with features looked up, as --augment none does
    FLYP       as its authors run it: a caption an image, padded to 77 positions, both towers
    DRM        lambda = 1 with FLYP's loss; descriptions of all classes at every step, both towers

The lengths of texts are those of ImageNet, SOT and EOT included: the longest caption of a batch's
classes has 16 positions; of the authors' descriptions, sorted by length as drm.py encodes them, 256
at a time up to the longest's end, the longest have 11, 13, 16 and 38 (the mean of all is 14).
"""
import argparse
import copy
import logging
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import drm  # noqa: E402
import lipsum_ft  # noqa: E402
import wise_ft  # noqa: E402

NAMES = ["plain", "Lipsum-FT", "cached", "FLYP", "DRM"]
CARDS = {"H100": 989, "A100": 312, "4090": 165}  # published dense bf16 peak in TFLOP/s (H100: SXM)
CONTEXT, CHUNK = 77, 256                         # positions of a text; texts drm.py encodes at once
RANDOM_TEXTS, RANDOM_POSITIONS = 80, 10          # of Lipsum-FT: SOT, 8 random tokens, EOT


# ---- Counting ----

class Case(NamedTuple):
    config: dict   # open_clip's of the model
    batch: int
    classes: int
    caption: int   # positions of a caption of DRM
    longest: list  # positions of the longest description of every CHUNK, ascending

    def lengths(self):
        """Positions at which each description is encoded; few classes have the longest."""
        missing = len(self.longest) - math.ceil(self.classes / CHUNK)
        return [self.longest[max(0, missing + i // CHUNK)] for i in range(self.classes)]

    def captions(self):
        """Expected number of different classes in a batch."""
        return self.classes * (1 - (1 - 1 / self.classes) ** self.batch)


def transformer(cfg, n):
    """Multiply-adds of one forward pass over n positions: projections and MLP, then attention."""
    w = cfg["width"]
    return cfg["layers"] * (12 * w * w * n + 2 * w * n * n)


def patches(config):
    vision = config["vision_cfg"]
    return (vision["image_size"] // vision["patch_size"]) ** 2


def image_cost(config):
    """Multiply-adds of the forward pass of an image."""
    vision, n = config["vision_cfg"], patches(config)
    embedding = n * 3 * vision["patch_size"] ** 2 * vision["width"]
    return embedding + transformer(vision, n + 1) + vision["width"] * config["embed_dim"]


def text_cost(config, n):
    """Multiply-adds of the forward pass of a text of n positions."""
    text = config["text_cfg"]
    return transformer(text, n) + text["width"] * config["embed_dim"]


def count(case):
    """{method: multiply-adds of a step}: 3 forward passes of what is trained, 1 of what is frozen.

    Towers only; the product of features and head is below 0.1% of them.
    """
    config, batch = case.config, case.batch
    images = batch * image_cost(config)
    random_texts = RANDOM_TEXTS * text_cost(config, RANDOM_POSITIONS)
    padded = batch * text_cost(config, CONTEXT)
    captions = case.captions() * text_cost(config, case.caption)
    described = sum(text_cost(config, n) for n in case.lengths())
    return {"plain": 3 * images, "Lipsum-FT": 4 * images + random_texts,
            "cached": 3 * images + random_texts, "FLYP": 3 * (images + padded),
            "DRM": 3 * (images + captions + described)}


def print_counts(name, case):
    found = count(case)
    print(f"{name}, {case.batch} images, {case.classes} classes, captions of {case.caption}, "
          f"descriptions of {case.longest} positions; GMAC: image "
          f"{image_cost(case.config) / 1e9:.2f}, text at {CONTEXT} "
          f"{text_cost(case.config, CONTEXT) / 1e9:.2f}")
    for method, macs in found.items():
        print(f"{method:10} {macs / 1e12:8.2f} TMAC a step, {macs / found['plain']:.3f} x plain, "
              f"{macs / found['FLYP']:.3f} x FLYP")
    within = 0
    for n in range(1, CONTEXT + 1):
        if count(case._replace(longest=[n]))["DRM"] <= 1.2 * found["FLYP"]:
            within = n
    at_50 = count(case._replace(longest=[50]))["DRM"] / found["FLYP"]
    print(f"DRM is at most 1.20 x FLYP with all descriptions at up to {within} positions; at 50 "
          f"it is {at_50:.3f} x")


# ---- Hours and memory of the ImageNet recipes ----

def memory(case, drm_texts, copies):
    """Estimated GB at the end of a forward pass: weights, AdamW and saved activations.

    A trained parameter has 18 bytes: weight, gradient and two moments in fp32, a bf16 copy; each
    of `copies` frozen CLIPs has 4. With autocast, flash attention and QuickGELU the backward pass
    needs 44 w bytes a position and layer of width w: two inputs of LayerNorm in fp32 (8 w), its
    two outputs (4 w), q, k, v (6 w), attention's output (2 w), and three of the MLP's 4 w wide
    hidden values in bf16 (24 w): before QuickGELU, its sigmoid, and after.
    """
    vision, text = case.config["vision_cfg"], case.config["text_cfg"]
    image_weights = vision["layers"] * 12 * vision["width"] ** 2
    text_weights = text["layers"] * 12 * text["width"] ** 2 + text["vocab_size"] * text["width"]
    trained = image_weights + (text_weights if drm_texts else 0)
    positions = case.batch * (patches(case.config) + 1)
    saved = 44 * vision["width"] * vision["layers"] * positions
    if drm_texts:
        positions = case.captions() * case.caption + sum(case.lengths())
        saved += 44 * text["width"] * text["layers"] * positions
    return (18 * trained + 4 * copies * (image_weights + text_weights) + saved) / 1e9


def print_hours(caption, longest, use=0.4):
    images = round(1_281_167 * 0.98)
    print(f"ImageNet, {images} training images; computed from counts at {use:.0%} of the published "
          f"bf16 peak of one card, evaluation left out")
    print(f"{'':22}{'batch':>6}{'steps':>8}" + "".join(f"{card + ' h':>9}" for card in CARDS)
          + f"{'memory GB':>11}")
    for name in ("ViT-B-16", "ViT-L-14"):
        config = open_clip.get_model_config(name)
        case = {batch: Case(config, batch, 1000, caption, longest) for batch in (256, 512)}
        once = images * image_cost(config)  # a forward pass over the training images
        ten = {batch: math.ceil(10 * images / batch) for batch in case}
        rows = {"WiSE-FT": (512, ten[512], "plain", 0, 2), "VRF": (512, ten[512], "plain", 2, 2),
                "Lipsum-FT": (256, 50_000, "Lipsum-FT", 0, 1), "DRM": (256, ten[256], "DRM", 1, 2)}
        for method, (batch, steps, kind, passes, copies) in rows.items():
            macs = steps * count(case[batch])[kind] + passes * once
            hours = [2 * macs / (use * peak * 1e12) / 3600 for peak in CARDS.values()]
            gb = memory(case[batch], method == "DRM", copies)
            print(f"{name + ' ' + method:22}{batch:>6}{steps:>8}"
                  + "".join(f"{h:>9.1f}" for h in hours) + f"{gb:>11.0f}")
    print("memory: above that of the card, --accum or --grad-checkpointing is needed")


# ---- Measuring ----

class Captioned(nn.Module):
    """FLYP's model: images (B, 3, H, W), tokens (B, 77) -> unit features of both, s."""

    def __init__(self, clip, amp):
        super().__init__()
        self.clip, self.amp = copy.deepcopy(clip), amp

    def forward(self, images, tokens):
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            f, g = self.clip.visual(images), self.clip.encode_text(tokens)
        f, g = F.normalize(f.float(), dim=-1), F.normalize(g.float(), dim=-1)
        return f, g, self.clip.logit_scale.exp()


def flyp_loss(tokens):
    """loss_fn(model, batch) of FLYP; tokens (C, 77), the caption of each class."""
    def loss_fn(model, batch):
        return drm.contrastive_loss(*model(batch.images, tokens[batch.labels])), {}
    return loss_fn


def texts(lengths):
    """Random texts of these lengths, padded to the context: (C, 77)."""
    tokens = torch.zeros(len(lengths), CONTEXT, dtype=torch.long)
    for row, n in zip(tokens, lengths):
        row[:n] = torch.cat([torch.tensor([49406]), torch.randint(1, 49406, (n - 2,)),
                             torch.tensor([49407])])
    return tokens


class Contender(NamedTuple):
    runner: nn.Module  # what the loss calls: perhaps compiled
    loss_fn: object
    optimizer: object


def contenders(a, case, labels, device, amp):
    """{method: Contender} of those asked for; the first three share their tower and optimizer."""
    clip = open_clip.create_model(a.model, device=device).eval()
    tokenizer = open_clip.get_tokenizer(a.model)
    width = case.config["embed_dim"]
    head = F.normalize(torch.randn(case.classes, width, device=device), dim=1)
    features_0 = F.normalize(torch.randn(case.batch, width), dim=1)
    zero_shot = common.ImageClassifier(clip.visual, head, 100.0, amp=amp).eval()
    teacher = torch.compile(zero_shot) if a.compile else zero_shot
    about = SimpleNamespace(compile=a.compile, grad_checkpointing=False)

    def lipsum(features):
        return lipsum_ft.make_loss(clip, teacher, tokenizer, 1.0, RANDOM_TEXTS,
                                   RANDOM_POSITIONS - 2, 0, features)

    def prepared(model):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6,
                                      fused=device.type == "cuda")
        return common.trainable(model, about, device), optimizer

    found, asked = {}, [a.only] if a.only else NAMES
    if set(asked) & {"plain", "Lipsum-FT", "cached"}:
        visual = copy.deepcopy(clip.visual)
        runner, optimizer = prepared(common.ImageClassifier(visual, head, 100.0, amp=amp))
        losses = {"plain": wise_ft.make_loss(), "Lipsum-FT": lipsum(None),
                  "cached": lipsum(features_0)}
        for name in losses.keys() & set(asked):
            found[name] = Contender(runner, losses[name], optimizer)
    captions = texts([case.caption] * case.classes)
    if "FLYP" in asked:
        runner, optimizer = prepared(Captioned(clip, amp))
        found["FLYP"] = Contender(runner, flyp_loss(captions.to(device)), optimizer)
    if "DRM" in asked:
        owner = torch.arange(case.classes)
        df, cd = drm.Texts(captions, owner), drm.Texts(texts(case.lengths()), owner)
        runner, optimizer = prepared(drm.DualPrompts(clip, df, cd, case.classes, amp=amp))
        loss_fn = drm.make_loss(1.0, features_0, labels, head, 100.0)
        found["DRM"] = Contender(runner, loss_fn, optimizer)
    return {name: found[name] for name in asked}


def measure(a, case, device):
    """{method: seconds of each step}"""
    amp = torch.bfloat16 if device.type == "cuda" else None
    labels = torch.randint(case.classes, (case.batch,))
    own = contenders(a, case, labels, device, amp)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    size, warm_up = case.config["vision_cfg"]["image_size"], 3 if device.type == "cuda" else 1
    seconds = {name: [] for name in own}
    for step in range(a.steps + warm_up):
        images = torch.randn(case.batch, 3, size, size, device=device)
        batch = common.Batch(images, labels.to(device), torch.arange(case.batch), step)
        for name, (runner, loss_fn, optimizer) in own.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            common.optimizer_step(runner, loss_fn, [batch], optimizer, scaler, 0.0)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if step >= warm_up:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def peak_memory(device):
    """GiB, of the GPU on CUDA and of this process else."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_alone(name):
    """peak_memory() of one method in a process of its own."""
    command = [sys.executable, *sys.argv, "--only", name, "--steps", "2"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-2])


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
    p.add_argument("--compile", action="store_true")
    p.add_argument("--only", choices=NAMES)
    p.add_argument("--count", action="store_true")
    p.add_argument("--hours", action="store_true")
    a = p.parse_args()
    logging.disable()  # open_clip warns of random weights
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    large = device.type == "cuda" or a.count
    case = Case(open_clip.get_model_config(a.model), a.batch or (256 if large else 4),
                a.classes or (1000 if large else 16), a.caption_length, a.description_length)
    if a.count:
        return print_counts(a.model, case)
    if a.hours:
        return print_hours(a.caption_length, a.description_length)
    torch.manual_seed(0)
    memory_of, card = {}, torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    if device.type == "cuda" and not a.only:
        memory_of = {name: peak_alone(name) for name in NAMES}  # before this process takes any
    seconds, counted = measure(a, case, device), count(case)
    if a.only:
        memory_of[a.only] = peak_memory(device)
    peaks = [peak for name, peak in CARDS.items() if name in card]
    print(f"{a.model} on {card}, {torch.get_num_threads()} threads, {case.batch} images, "
          f"{case.classes} classes, captions of {case.caption}, descriptions of {case.longest} "
          f"positions, {a.steps} steps{', compiled' if a.compile else ''}")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, t in median.items():
        line = f"{name:10}{1000 * t:9.1f} ms a step,{case.batch / t:8.1f} images/s"
        if not a.only:
            line += (f", {t / median['plain']:.3f} x plain (counted "
                     f"{counted[name] / counted['plain']:.3f})")
        if peaks:
            line += f", {2 * counted[name] / t / peaks[0] / 1e12:.0%} of the card's bf16 peak"
        if name in memory_of:
            line += f", peak memory {memory_of[name]:.2f} GiB"
        print(line)
    if not a.only:
        print(f"DRM is {median['DRM'] / median['FLYP']:.3f} x FLYP at {CONTEXT} positions "
              f"(counted {counted['DRM'] / counted['FLYP']:.3f})")


if __name__ == "__main__":
    main()
