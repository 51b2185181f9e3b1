"""What the four methods share: data, CLIP loading, mixed-precision training, evaluation.

    Part 1  What determines a number  lines 72-521     all that an auditor of a method reads
    Part 2  Files of a run            lines 522-1271   checkpoints, logs, saved models, tables
    Part 3  Data                      lines 1272-1899  image sets, the papers' data sets
    Part 4  Flags and mistakes        lines 1900-2217  recipes, --resume, --finetuned
    Part 5  The embedded world        lines 2218-2461  `shapes` and its tiny CLIP

What of Parts 2 to 5 enters a number, beside which images, labels and flags a run has:
    read_image         PIL's decoder; transparency is dropped after the resize; no EXIF rotation
    ImageSet           the draws of an augmentation depend on (seed, epoch, index) alone
    hold_out           every class gives the same share, the same images in every run
    compute_device     bf16 (else fp16) towers on CUDA, fp32 elsewhere; TF32 off with fp32
    load_clip          weights with requires_grad, QuickGELU as they were trained with
    load_finetuned     a foreign CLIP's head is made by its own text tower, with its own s
    shrink_vocabulary  token embeddings that no text uses are not trained
    training_steps     --steps, or epochs x images / batch rounded up; warm-up rounded down
    id_ood             OOD is the mean over the shifts, each in its own metric
No part knows a method: losses, ensembles and equations are in wise_ft.py, lipsum_ft.py, vrf.py
and drm.py.

Symbols in all files: F image tower, s = exp(logit_scale), W (C, D) text head, z = s F(x) W^T
logits; B batch, C classes, D embedding width. Features are unit-norm fp32; mixed precision
applies to the towers only, never to a loss.
"""
import argparse
import copy
import csv
import difflib
import errno
import functools
import hashlib
import json
import logging
import math
import operator
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torchvision import transforms
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))         # set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))
EVAL_BATCH = 250  # on any number of ranks, so that an evaluation's digits do not depend on it
READ_EVERY = 20   # steps between two moments at which the host reads losses from the device


# ============================ Part 1: what determines a number ============================

@dataclass
class Setup:
    """What every run starts from: start, run_folder, train, evaluate, finish."""
    args: argparse.Namespace
    data: "Data"             # class names, templates, training, held-out and test images
    clip: nn.Module          # the pre-trained open_clip model, copied to be trained
    tokenizer: object
    device: torch.device
    amp: torch.dtype | None  # of the towers; None is fp32
    out: Path = None         # the run's folder, from run_folder()

    @functools.cached_property
    def head(self):
        """W (C, D), the zero-shot text head of the data's templates."""
        data = self.data
        return zero_shot_head(self.clip, self.tokenizer, data.classnames, data.templates)

    @property
    def scale(self):
        """s = exp(logit_scale) of the pre-trained model."""
        return self.clip.logit_scale.exp().item()

    @property
    def measure(self):
        """{test: the metric that tables show}, the in-distribution (ID) test first."""
        return {name: images.metric for name, images in self.data.tests.items()}

    def classifier(self, folded=False, head=None, own_tower=True):
        """The zero-shot model theta_0; own_tower: with a copy of the image tower, to be trained."""
        head = self.head if head is None else head
        visual = copy.deepcopy(self.clip.visual) if own_tower else self.clip.visual
        if folded:
            model = ImageClassifier(visual, self.scale * head, 1.0, True, self.amp)
        else:
            model = ImageClassifier(visual, head, self.scale, False, self.amp)
        return model.to(self.device).eval()

    def fit(self, model, loss_fn, out, predict=None):
        """train() on the augmented training images."""
        images = self.data.train.augmented(self.args.augment, self.args.seed)
        return train(model, images, self.data.val, loss_fn, self, out, predict or classify)


def start(args):
    """A Setup: device, data and CLIP. Finds the mistakes in flags and trees; writes nothing."""
    torch.manual_seed(args.seed)
    device, amp = compute_device(args)
    data = load_data(args)
    check_steps(args, len(data.train))
    clip_model, tokenizer = load_clip(args, device)
    preprocess = PreprocessCfg(**clip_model.visual.preprocess_cfg)
    for images in (data.train, data.val, *data.tests.values()):
        images.prepare(preprocess)
    setup = Setup(args, data, clip_model, tokenizer, device, amp)
    say(describe_run(setup))
    return setup


# ---- CLIP and its heads ----

def encode_texts(clip_model, tokens):
    """G(t): unit-norm text features (m, D), fp32, of tokens (m, n), in the caller's autocast.

    Computed up to the longest text's end only, which is exact: attention is causal, and the
    feature is read at EOT, the largest id. ValueError if n exceeds the context, or is less than
    it for another tower. Tokens are best on the CPU: to find the end on a GPU is to wait for it.
    """
    device = clip_model.logit_scale.device
    tower = getattr(clip_model, "text", clip_model)  # open_clip.CLIP holds the tower's parts itself
    pooling = getattr(tower, "pool_type", getattr(tower, "text_pool_type", None))
    causal = getattr(tower, "attn_mask", None) is not None
    n, context = tokens.shape[1], clip_model.context_length
    if n > context:
        raise ValueError(f"{n} tokens exceed the context length {context}")
    if not causal or pooling != "argmax" or getattr(tower, "cls_emb", None) is not None:
        if n < context:
            raise ValueError("the text tower is not causal with its output read at EOT")
        return F.normalize(clip_model.encode_text(moved(tokens, device)).float(), dim=-1)
    end = tokens.argmax(dim=1)                                              # (m,) of EOT
    n = int(end.max()) + 1
    tokens, end = moved(tokens[:, :n], device), moved(end, device)
    x = tower.token_embedding(tokens) + tower.positional_embedding[:n]      # (m, n, width)
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:n, :n]))
    x = x[torch.arange(len(x), device=device), end]                         # (m, width)
    projection = tower.text_projection
    x = projection(x) if callable(projection) else x @ projection           # (m, D)
    return F.normalize(x.float(), dim=-1)


@torch.no_grad()
def zero_shot_head(clip_model, tokenizer, classnames, templates):
    """W (C, D), unit rows: encode a class's templates, normalise each, average, normalise.

    Source: wise-ft src/models/zeroshot.py; equal to open_clip.build_zero_shot_classifier, which
    returns (D, C) and encodes all positions. templates: strings with one {}, or functions.
    """
    heads = []
    for first in range(0, len(classnames), 10):
        texts = []
        for name in classnames[first:first + 10]:
            texts += [t.format(name) if isinstance(t, str) else t(name) for t in templates]
        features = encode_texts(clip_model, tokenizer(texts))
        mean = features.reshape(-1, len(templates), features.shape[1]).mean(dim=1)
        heads.append(mean / mean.norm(dim=1, keepdim=True))
    return torch.cat(heads)


class ImageClassifier(nn.Module):
    """An image tower and a linear head: x (B, 3, H, W) -> logits (B, C), unit features (B, D).

    logits = scale * features @ head.T (+ bias). Two conventions are in use, and under AdamW the
    same learning rate moves their logits about s times differently:
      unit   (Lipsum-FT, DRM): head = W, unit rows at first, the frozen s outside, no bias;
      folded (WiSE-FT):        head = s W, scale = 1, a zero-initialised trainable bias.
    """

    def __init__(self, visual, head, scale=1.0, bias=False, amp=None):
        super().__init__()
        self.visual, self.amp = visual, amp
        self.head = nn.Parameter(head.detach().clone())
        self.bias = nn.Parameter(torch.zeros(len(head), device=head.device)) if bias else None
        self.register_buffer("scale", torch.as_tensor(float(scale), device=head.device))

    def forward(self, x):
        with torch.autocast(x.device.type, self.amp, enabled=self.amp is not None):
            features = self.visual(x)
        features = F.normalize(features.float(), dim=-1)
        logits = self.scale * F.linear(features, self.head)
        return (logits if self.bias is None else logits + self.bias), features


def classify(model, images):
    """Logits (B, C) of an ImageClassifier."""
    return model(images)[0]


def average(model_0, model_1, alpha):
    """The model with weights (1 - alpha) theta_0 + alpha theta_1: WiSE-FT after another method."""
    theta, model = model_1.state_dict(), copy.deepcopy(model_1)
    for name, value in model_0.state_dict().items():
        if value.is_floating_point():
            theta[name] = (1 - alpha) * value + alpha * theta[name]
    model.load_state_dict(theta)
    return model.eval()


# ---- Batches: order, augmentation, label space ----

class Batch(NamedTuple):
    images: torch.Tensor  # (B, 3, H, W) normalised, or ready features (B, D)
    labels: torch.Tensor  # (B,) int64
    index: torch.Tensor   # (B,) int64, position in the data set, on the CPU
    step: int             # for random draws that are the same on every rank and after a resume


class ShuffledEpochs(torch.utils.data.Sampler):
    """Shuffled epochs end to end, cut into full batches: lists of (epoch, index) for this rank.

    Step t covers positions t B .. (t+1) B - 1 of the stream, B = --batch-size. Its images do not
    depend on how B is split into parts for ranks and --accum, and a run goes on from any step.
    """

    def __init__(self, n, args, first, last):
        self.n, self.seed, self.first, self.last = n, args.seed, first, last
        self.parts = args.accum * WORLD  # of a step
        self.size = args.batch_size // self.parts
        self.permutation = functools.lru_cache(2)(self.shuffle)  # of an epoch and of the next

    def shuffle(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(self.n)

    def __len__(self):
        return (self.last - self.first) * self.parts // WORLD

    def __iter__(self):
        for part in range(self.first * self.parts + RANK, self.last * self.parts, WORLD):
            batch = []
            for position in range(part * self.size, (part + 1) * self.size):
                epoch, k = divmod(position, self.n)
                batch.append((epoch, int(self.permutation(epoch)[k])))
            yield batch


def batches_of(images, args, first, last, device):
    """This rank's Batches of steps first .. last - 1, --accum of them a step, on the device."""
    sampler = ShuffledEpochs(len(images), args, first, last)
    for i, (pixels, labels, index) in enumerate(image_loader(images, sampler, args, device)):
        x = images.normalized(moved(pixels, device))
        yield Batch(x, moved(labels, device), index, first + i // args.accum)


def image_transform(preprocess, augment="none"):
    """PIL image -> uint8 (3, H, W): open_clip's transform but for its last two steps.

    none: resize, centre crop; crop: RandomResizedCrop of 90-100% of the area, wise-ft's;
    crop-flip: 8-100%, after a random flip, Lipsum-FT's. normalized() does the last two.
    """
    smallest = {"none": 1.0, "crop": 0.9, "crop-flip": 0.08}[augment]
    whole = image_transform_v2(preprocess, augment != "none", {"scale": (smallest, 1.0)})
    *steps, _to_float, _normalise = whole.transforms
    flip = [transforms.RandomHorizontalFlip()] if augment == "crop-flip" else []
    return transforms.Compose([*flip, *steps, transforms.PILToTensor()])


def normalized(pixels, preprocess):
    """uint8 (B, 3, H, W) -> (pixels / 255 - mean) / std, as open_clip's transform."""
    x = pixels.float().div_(255)
    for c, (mean, std) in enumerate(zip(preprocess.mean, preprocess.std)):
        x[:, c].sub_(mean).div_(std)  # by numbers: to move tensors of them would wait for a GPU
    return x


def project(logits, classes):
    """Logits (B, C) -> (B, C') in a test set's label space: the largest of each label's ids.

    classes (C', k): the ids; None: no change. Always before a softmax.
    """
    return logits if classes is None else logits[:, classes.to(logits.device)].amax(dim=-1)


# ---- Training ----

def learning_rate(step, total, peak, warmup):
    """Linear warm-up for `warmup` steps, then cosine towards 0 (wise-ft src/models/utils.py)."""
    warm = warmup_steps(total, warmup)  # below 1 it is a share of total
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def optimizer_step(runner, loss_fn, parts, optimizer, scaler, grad_clip):
    """One step of AdamW on the Batches `parts`; mean losses {name: ()}, left on the device.

    All of mixed precision but the autocast of the towers: losses are scaled (fp16 only),
    gradients unscaled before they are clipped, and a step that overflows is left out.
    """
    means = {}
    for i, batch in enumerate(parts):
        # Ranks exchange gradients once a step, with the last part.
        waits = WORLD > 1 and i + 1 < len(parts)
        with runner.no_sync() if waits else nullcontext():
            loss, others = loss_fn(runner, batch)
            scaler.scale(loss / len(parts)).backward()
        for name, value in {"loss": loss, **others}.items():
            means[name] = means.get(name, 0) + value.detach() / len(parts)
    scaler.unscale_(optimizer)
    if grad_clip:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return means


def train(model, images, held_out, loss_fn, setup, out, predict=classify):
    """Train `model` in place and return it in eval mode; every step is logged to out/log.jsonl.

    loss_fn(model, Batch) -> (loss (), {name: scalar}) is the method; its `model` is the compiled
    or distributed form of the argument. predict(model, images) -> logits (B, C) is measured on
    the held-out images after every epoch; --keep best returns the weights of the best. Training
    goes on from out/last.ckpt if that is there, on the same CPU bit for bit.
    """
    args, device = setup.args, setup.device
    total = training_steps(args, len(images))
    runner = trainable(model, args, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=args.wd, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=setup.amp == torch.float16)
    checkpoint = Checkpoint(out, model, optimizer, scaler, [total, args.batch_size, len(images)])
    first, best = checkpoint.load()
    batches = batches_of(images, args, first, total, device)

    model.train()
    with stop_signals() as stopped, TrainingLog(out, first, total, images, args) as log:
        for step in range(first, total):
            optimizer.param_groups[0]["lr"] = learning_rate(step, total, args.lr, args.warmup)
            try:
                parts = [next(batches) for _ in range(args.accum)]
            except BrokenImage as error:
                raise interrupted(error, log, checkpoint, step, best, setup.out) from None
            losses = optimizer_step(runner, loss_fn, parts, optimizer, scaler, args.grad_clip)
            log.add(step, losses, optimizer, parts)

            epoch = (step + 1) * args.batch_size // len(images)
            ended = epoch > step * args.batch_size // len(images) or step + 1 == total
            if ended and len(held_out):
                log.pause()
                accuracy = held_out_accuracy(model, held_out, predict, setup)
                if args.keep == "best" and accuracy > best.get("accuracy", -1):
                    weights = {name: x.cpu().clone() for name, x in model.state_dict().items()}
                    best = {"accuracy": accuracy, "epoch": epoch, "model": weights}
                log.held_out(epoch, accuracy)
            # Between these moments no step waits for the device.
            if ended or log.due(step, stopped):
                stop = log.read(stopped)
                if stop or checkpoint.due(args.save_every) or step + 1 == total:
                    checkpoint.save(step + 1, best)
                if stop and step + 1 < total:
                    raise Fail(f"stopped after step {step + 1} of {total}; --resume {setup.out} "
                               "continues from there")
    if best:
        model.load_state_dict(best["model"])
        say(f"{out.name}: epoch {best['epoch']} is kept, {best['accuracy']:.2f}% held out")
    return share_buffers(model.eval())


def held_out_accuracy(model, held_out, predict, setup):
    """Accuracy in percent on held-out training images, of the model in eval mode."""
    def rows(images, project):
        return {"model": predict(model, images)}
    share_buffers(model.eval())
    found = accuracies(rows, held_out, setup)["model"]
    model.train()
    return found


# ---- Evaluation ----

@torch.no_grad()
def collect(function, images, setup):
    """{name: tensor (N, ...)} of function(x, labels) -> {name: tensor (B, ...)}, in order, on CPU.

    Each image is read once. Batches are dealt out to the ranks and put back.
    """
    batches = torch.arange(len(images)).split(EVAL_BATCH)[RANK::WORLD]
    loader = image_loader(images, [b.tolist() for b in batches], setup.args, setup.device)
    mine = []
    for pixels, labels, index in tqdm(loader, images.name, disable=RANK > 0 or None, leave=False):
        x = images.normalized(moved(pixels, setup.device))
        result = function(x, moved(labels, setup.device))
        mine.append((int(index[0]), {name: value.cpu() for name, value in result.items()}))
    found = sorted(gathered(mine), key=operator.itemgetter(0))
    return {name: torch.cat([result[name] for _, result in found]) for name in found[0][1]}


def evaluate(rows, setup, sets=None):
    """{row: {name: metrics}} over {name: ImageSet}, by default all test sets, each streamed once.

    rows(images, project) -> {row: logits or log-probabilities (B, C')}; project() brings logits
    (B, C) into the set's label space. each(models) makes such a function.
    """
    results = {}
    for name, images in (sets or setup.data.tests).items():
        def scores(x, labels):
            found = {}
            for row, logits in rows(x, images.project).items():
                for field, value in image_scores(logits, labels)._asdict().items():
                    found[row, field] = value
            return found
        found = collect(scores, images, setup)
        for row in dict.fromkeys(row for row, _ in found):
            own = Scores(*[found[row, field] for field in Scores._fields])
            results.setdefault(row, {})[name] = metrics(own, images)
    return results


def accuracies(rows, images, setup):
    """{row: accuracy in percent} on one ImageSet; rows() as for evaluate()."""
    return {row: on["it"]["acc"] for row, on in evaluate(rows, setup, {"it": images}).items()}


def each(models):
    """rows() for evaluate(): one row for each {row name: ImageClassifier}."""
    def rows(images, project):
        return {name: project(classify(model, images)) for name, model in models.items()}
    return rows


class Scores(NamedTuple):
    """What the metrics need of each of N images."""
    confidence: torch.Tensor  # (N,) float64, largest probability
    predicted: torch.Tensor   # (N,) int64
    nll: torch.Tensor         # (N,) float64, negative log-likelihood of the label


def image_scores(logits, labels):
    """Scores of logits or log-probabilities (B, C), computed in float64."""
    log_p = torch.log_softmax(float64(logits), dim=-1)
    confidence, predicted = log_p.max(dim=1)
    return Scores(confidence.exp(), predicted, -log_p.gather(1, labels[:, None])[:, 0])


def log_mixture(logits_a, logits_b, weight):
    """log(w softmax(logits_a) + (1 - w) softmax(logits_b)), (B, C), exact; weight w: () or (B,)."""
    log_a, log_b = (torch.log_softmax(float64(z), dim=1) for z in (logits_a, logits_b))
    w = torch.as_tensor(weight, dtype=log_a.dtype, device=log_a.device).reshape(-1, 1)
    return torch.logaddexp(w.log() + log_a, (1 - w).log() + log_b)


def choose(accuracy, weight, n, rule="one-se"):
    """Index of the candidate to take by accuracy (K,), in percent, on n held-out images.

    one-se: of those within one standard error of the best, sqrt(p (1 - p) / n), the one whose
    mean weight (K,) of the fine-tuned model is nearest 0.5, WiSE-FT's advice when nothing is
    known: ID accuracy alone prefers the fine-tuned model. best: of the best, nearest 0.5.
    """
    p = max(accuracy) / 100
    margin = 100 * math.sqrt(p * (1 - p) / n) if rule == "one-se" else 0
    near = [i for i, a in enumerate(accuracy) if a >= max(accuracy) - margin]
    return min(near, key=lambda i: abs(weight[i] - 0.5))


# ---- Metrics ----

def metrics(scores, images):
    """Accuracy, ECE and the set's own metric in percent, mean NLL in nats, of an ImageSet."""
    correct = scores.predicted == images.labels
    found = {"acc": 100 * correct.double().mean().item()}
    if images.metric == "macro_f1":
        found["macro_f1"] = 100 * macro_f1(scores.predicted, images.labels)
    if images.groups is not None:
        found["worst_region"] = 100 * worst_group_accuracy(correct, images.groups)
    ece = 100 * calibration_error(scores.confidence, correct)
    return {**found, "nll": scores.nll.mean().item(), "ece": ece, "n": len(images)}


def macro_f1(predicted, labels):
    """Macro-F1 in [0, 1], as WILDS: mean of 2 TP / (2 TP + FP + FN) over the classes in labels."""
    f1 = []
    for c in labels.unique():
        true_positives = ((predicted == c) & (labels == c)).sum()
        f1.append(2 * true_positives.double() / ((predicted == c).sum() + (labels == c).sum()))
    return torch.stack(f1).mean().item()


def worst_group_accuracy(correct, groups):
    """Worst-group accuracy in [0, 1], WILDS' for FMoW; groups (N,), -1 is none; NaN if all are."""
    present = [g for g in groups.unique().tolist() if g >= 0]
    return min((correct[groups == g].double().mean().item() for g in present), default=math.nan)


def expected_calibration_error(probs, labels, bins=15):
    """ECE in [0, 1] of probabilities (N, C); the confidence is the largest of a row."""
    confidence, predicted = probs.max(dim=1)
    return calibration_error(confidence, predicted == labels, bins)


def calibration_error(confidence, correct, bins=15):
    """Guo et al. 2017, Eq. (3): sum over bins of (share of images) |accuracy - mean confidence|.

    Bin b of 1..bins holds confidences in ((b-1)/bins, b/bins].
    """
    which = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    gaps = correct.double() - confidence.double()
    total = torch.zeros(bins, dtype=torch.double).index_add_(0, which, gaps)
    return (total.abs().sum() / len(confidence)).item()


# ============================== Part 2: files of a run ==============================

def run_folder(args):
    """A new folder for the run, or the one to resume. A folder that holds a run is never reused."""
    if args.resume != "none":
        say(f"resuming {args.resume}")
        return Path(args.resume)
    chosen = None
    if RANK == 0:  # rank 0 chooses
        default = f"runs/{args.method}-{args.data}-s{args.seed}"
        out, count = Path(default if args.out == DEFAULT_OUT else args.out), 2
        while out.exists() and args.out == DEFAULT_OUT:
            out, count = Path(f"{default}-{count}"), count + 1
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "args.json", vars(args))
            chosen = out
    chosen = broadcast(chosen)
    if chosen is None:
        raise Fail(f"--out {args.out}: exists and is not empty; --resume {args.out} continues a "
                   "run, another --out starts one")
    say(f"run folder {chosen}")
    return chosen


def describe_run(setup):
    """Data, model and recipe of a run in two lines."""
    args, data = setup.args, setup.data
    tests = ", ".join(f"{name} ({len(images)})" for name, images in data.tests.items())
    recipe = f"from {args.finetuned}"
    if args.finetuned == "none":
        recipe = (f"{training_steps(args, len(data.train))} steps of {args.batch_size} images, "
                  f"ranks {WORLD}, parts {args.accum}, lr {args.lr:g}, wd {args.wd:g}, warm-up "
                  f"{args.warmup:g}, clip {args.grad_clip:g}, augment {args.augment}, "
                  f"keep {args.keep}")
    return (f"{args.method} on {args.data}: {len(data.train)} training, {len(data.val)} held-out "
            f"images, {len(data.classnames)} classes, tests {tests}\n{args.model}, "
            f"{args.precision} on {setup.device}; {recipe}; seed {args.seed}")


# ---- Devices and ranks ----

def compute_device(args):
    """(device, dtype of the towers or None for fp32); --precision auto is replaced by a name."""
    kind = args.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    able = {"cpu": ["fp32", "bf16"], "mps": ["fp32"], "cuda": ["bf16", "fp16", "fp32"]}[kind]
    if kind == "cuda":
        local, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= cards:
            raise Fail(f"--device {args.device}: rank {local} of this machine has no CUDA GPU, "
                       f"torch sees {cards}; start fewer ranks, or use --device cpu")
        device = torch.device(kind, local)
        torch.cuda.set_device(device)
        if not torch.cuda.is_bf16_supported(False):  # False: not emulated
            able.remove("bf16")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise Fail("--device mps: torch sees no Apple GPU; use --device cpu")
    if args.precision == "auto":
        args.precision = able[0]
    if args.precision not in able:
        raise Fail(f"--precision {args.precision}: not on this {kind}; use {' or '.join(able)}")
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    return device, {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]


def moved(x, device):
    """x on the device; the host does not wait for CUDA (on MPS a copy may lose what is freed)."""
    return x.to(device, non_blocking=device.type != "mps")


def float64(x):
    """x in float64, which MPS lacks."""
    return x.float() if x.device.type == "mps" else x.double()


def broadcast(value):
    """Rank 0's value on every rank."""
    values = [value]
    if WORLD > 1:
        dist.broadcast_object_list(values)
    return values[0]


def gathered(mine):
    """The items of every rank's list."""
    if WORLD == 1:
        return mine
    lists = [None] * WORLD
    dist.all_gather_object(lists, mine)
    return [item for items in lists for item in items]


def trainable(model, args, device):
    """`model` in the form that loss functions call: distributed, and compiled if asked for."""
    if args.grad_checkpointing:
        for module in model.modules():
            if hasattr(module, "set_grad_checkpointing"):
                module.set_grad_checkpointing(True)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # what convolutions on tensor cores want
    runner = model
    if WORLD > 1:
        runner = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False,
                                                     gradient_as_bucket_view=True)
    return torch.compile(runner) if args.compile else runner


def share_buffers(model):
    """BatchNorm's statistics are of each rank's own images: all take those of rank 0."""
    for buffer in model.buffers() if WORLD > 1 else []:
        dist.broadcast(buffer, 0)
    return model


def image_loader(images, batches, args, device):
    """A DataLoader over lists of indices; --workers -1: this machine's cores over its ranks."""
    workers = args.workers
    if workers < 0:
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = max(1, cores) if images.on_disk else 0
    return torch.utils.data.DataLoader(images, batch_sampler=batches, num_workers=workers,
                                       pin_memory=device.type == "cuda",
                                       worker_init_fn=ignore_interrupts)


def ignore_interrupts(_):
    """Ctrl-C reaches all processes of a terminal, but the main one still needs the workers for
    its last step. (SIGTERM must keep working: it is how Python ends workers at exit.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def stop_signals():
    """stopped() -> bool: whether SIGTERM or Ctrl-C came since."""
    came, signals = [], (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(s, lambda *_: came.append(True)) for s in signals]
    try:
        yield lambda: bool(came)
    finally:
        for s, handler in zip(signals, before):
            signal.signal(s, handler)


# ---- Checkpoints and logs ----

class Checkpoint:
    """last.ckpt: all that training from a step on depends on; order and draws follow from the step.

    stream: [steps, images a step, training images]; a run goes on only with the same.
    """

    def __init__(self, out, model, optimizer, scaler, stream):
        self.path, self.stream, self.saved = out / "last.ckpt", stream, time.time()
        self.model, self.optimizer, self.scaler = model, optimizer, scaler

    def due(self, minutes):
        return time.time() - self.saved >= 60 * minutes

    def save(self, step, best):
        """Training goes on from `step`; best: weights and accuracy so far, for --keep best."""
        self.saved = time.time()
        if RANK > 0:
            return
        weights = self.model.state_dict()
        if not all(value.isfinite().all() for value in weights.values()):
            raise Fail(f"step {step}: the weights are not finite, {self.path} is not written; "
                       "lower --lr")
        state = {"step": step, "best": best, "stream": self.stream, "model": weights,
                 "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        with atomic(self.path) as file:
            torch.save(state, file)

    def load(self):
        """(step to go on from, best); (0, {}) without a checkpoint. Runs no code from the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.is_file():
            return 0, {}
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            if found["stream"] != self.stream:
                raise Fail(f"{self.path}: its run has {found['stream']} steps, images a step and "
                           f"training images, this one {self.stream}; resume with the same images")
            self.model.load_state_dict(found["model"])
            self.optimizer.load_state_dict(found["optimizer"])
            self.scaler.load_state_dict(found["scaler"])
            return found["step"], found["best"]
        except (Fail, torch.OutOfMemoryError):
            raise
        except Exception as error:  # torch.load raises a dozen types for a torn or foreign file
            raise Fail(f"{self.path}: not a checkpoint of this model "
                       f"({first_line(error)})") from None


def interrupted(error, log, checkpoint, step, best, run):
    """The Fail for a broken image; what was trained is saved first."""
    if WORLD == 1:  # other ranks are not at this point: they keep their last checkpoint
        log.read()
        checkpoint.save(step, best)
    return Fail(f"{error}; repair it, or put another image of its class in its place, then "
                f"--resume {run}")


class TrainingLog:
    """log.jsonl with a line a step; a progress bar in a terminal, a line a minute elsewhere.

    Losses stay on the device until read(): a step does not wait for the host.
    """

    def __init__(self, out, first, total, images, args):
        self.out, self.first, self.total, self.images, self.args = out, first, total, images, args
        self.unread = []  # (line without losses, {name: ()}, indices) of the steps since read()
        self.rate, self.since = 0.0, time.time()  # images/s, counted from this moment
        self.shown = self.since

    def __enter__(self):
        self.file = open_log(self.out / "log.jsonl", self.first)
        self.bar = tqdm(total=self.total, initial=self.first, desc=self.out.name,
                        disable=RANK > 0 or None)
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, error, *_):
        self.bar.close()
        self.file.close()
        if error is None and self.total > self.first:
            memory = ""
            if torch.cuda.is_initialized():
                memory = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
            say(f"{self.out.name}: {self.total} steps, {self.rate:.1f} images/s{memory}")

    def add(self, step, losses, optimizer, parts):
        line = {"step": step, "lr": optimizer.param_groups[0]["lr"]}
        self.unread.append((line, losses, torch.cat([batch.index for batch in parts])))
        self.bar.update()

    def pause(self):
        """From here to held_out() no time is counted: images/s are of training alone."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the last steps may still be running there
        self.paused = time.time()

    def held_out(self, epoch, accuracy):
        """Accuracy after an epoch, in the line of its last step."""
        line = self.unread[-1][0]
        line.update(epoch=epoch, held_out_acc=accuracy)
        self.since += time.time() - self.paused
        if RANK == 0:
            self.bar.write(f"{self.out.name}: step {line['step'] + 1}, epoch {epoch}, "
                           f"{accuracy:.2f}% of the held-out images are right", file=sys.stderr)

    def due(self, step, stopped):
        """Whether to read() now: at steps that all ranks know, and alone when something waits."""
        waits = stopped() or time.time() - self.since >= 60 * min(1, self.args.save_every)
        return (step + 1) % READ_EVERY == 0 or (WORLD == 1 and waits)

    def read(self, stopped=lambda: False):
        """Write the lines of unread steps; Fail on a loss that is not finite. Whether to stop."""
        stop = torch.tensor(float(stopped()))
        if not self.unread:
            return bool(stop)
        rows = [torch.stack(list(losses.values())) for _, losses, _ in self.unread]
        values = torch.stack(rows).float()
        if WORLD > 1:
            stop = stop.to(values.device)
            dist.all_reduce(values)
            dist.all_reduce(stop)
        self.rate = self.args.batch_size * len(self.unread) / (time.time() - self.since)
        for row, (line, losses, index) in zip((values / WORLD).tolist(), self.unread):
            line.update(zip(losses, row), images_per_s=round(self.rate, 1))
            self.file.write(json.dumps(line) + "\n")
            if not math.isfinite(line["loss"]):
                self.stop_at(line, index)
        self.file.flush()
        self.unread, self.since = [], time.time()
        if self.bar.disable and self.since - self.shown >= 60:
            self.shown = self.since
            left = (self.total - line["step"] - 1) * self.args.batch_size / self.rate
            say(f"{self.out.name}: step {line['step'] + 1} of {self.total}, loss "
                f"{line['loss']:.4f}, {self.rate:.1f} images/s, {left / 60:.0f} minutes left",
                file=sys.stderr)
        return bool(stop)

    def stop_at(self, line, index):
        """Fail, with a file that names the images of the step on this rank."""
        file = self.out / f"nonfinite-step{line['step']}-rank{RANK}.txt"
        file.write_text("".join(f"{self.images.describe(i)}\n" for i in index.tolist()))
        raise Fail(f"step {line['step']}: the loss is {line['loss']}; the step's images are listed "
                   f"in {file}; lower --lr or repair them; last.ckpt, if written, is of an earlier "
                   "step")


def open_log(path, first):
    """log.jsonl opened at step `first`; lines of steps that the checkpoint lacks are dropped."""
    if RANK > 0:
        return open(os.devnull, "w")
    kept = []
    for line in read_lines(path, optional=True):
        if line.endswith("}") and json.loads(line)["step"] < first:
            kept.append(line + "\n")
    with atomic(path) as file:  # a kill before the next line must not lose these
        file.write_text("".join(kept), encoding="utf-8")
    return open(path, "a", encoding="utf-8")


# ---- Reading and writing ----

@contextmanager
def atomic(path):
    """A file to write to that replaces `path` once it is whole: a stopped write leaves the old."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise Fail(f"{path}: could not be written ({first_line(error)}); the last good one is "
                   "kept") from None
    os.replace(temporary, path)


def write_json(path, value):
    with atomic(path) as file:
        file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path, what, pairs=False):
    """JSON of a file; pairs: objects as lists of (key, value), which keeps keys that repeat."""
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=list if pairs else None)
    except OSError as error:
        raise Fail(f"{path}: not found or not readable, so this is not {what} "
                   f"({error.strerror})") from None
    except ValueError as error:
        raise Fail(f"{path}: not valid JSON ({error})") from None


def save_tensors(path, tensors, about=None):
    """safetensors, written atomically; about: JSON beside them."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic(path) as file:
        save_file(tensors, file, metadata={"about": json.dumps(about)})


def load_tensors(path):
    """(tensors, about) of save_tensors(). safetensors hold numbers only: no code can run."""
    try:
        with safe_open(path, "pt") as f:
            about = (f.metadata() or {}).get("about", "null")
            return {name: f.get_tensor(name) for name in f.keys()}, json.loads(about)
    except (SafetensorError, OSError, ValueError) as error:
        raise Fail(f"{path}: not a readable safetensors file ({error})") from None


def collect_once(function, models, images, setup, folder):
    """collect(), kept in folder/cache under a hash of the models' weights and the data listing.

    Other weights, files or preprocessing give another name, so that a stale result cannot be
    read. `function` must be the only one used with these models and this data set.
    """
    path = None
    if RANK == 0:
        about = (images.transform, images.preprocess, images.border, images.classes, setup.amp,
                 setup.device.type)
        digest = hashlib.sha256(repr(about).encode())
        for model in models:
            for name, tensor in model.state_dict().items():
                digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        digest.update(images.images.tobytes() + images.labels.numpy().tobytes())
        if images.on_disk:
            with ThreadPool(32) as pool:  # a network disk answers late, but many at once
                digest.update(np.array(pool.map(size_and_time, images.images)).tobytes())
        if folder.exists() and not os.access(folder, os.W_OK):  # another's run
            folder = setup.out
        path = folder / "cache" / f"{images.name}-{digest.hexdigest()[:16]}.safetensors"
    path, known = broadcast((path, path is not None and path.is_file()))
    if known:
        return load_tensors(path)[0]
    result = collect(function, images, setup)
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, result)
    return result


def size_and_time(file):
    """What changes with the content of a file."""
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def features_once(model, images, setup, folder):
    """Unit features (N, D) of a set's un-augmented images, computed once."""
    def features(x, labels):
        return {"features": model(x)[1]}
    return collect_once(features, [model], images, setup, folder)["features"]


def evaluate_first(rows, setup):
    """evaluate() before the first step: a wrong tree or prompt shows soon. Kept for --resume."""
    path = setup.out / "zero-shot.json"
    if broadcast(path.is_file()):
        return
    results = evaluate(rows, setup)
    for row, tests in results.items():
        cells = [f"{test} {tests[test][metric]:.2f}" for test, metric in setup.measure.items()]
        say(f"{row}: {', '.join(cells)}")
    if RANK == 0:
        write_json(path, results)


# ---- Saved models ----

def load_clip(args, device):
    """(open_clip model in eval mode, tokenizer) of --model and --pretrained.

    Weights trained with QuickGELU in a model without it lose accuracy silently; open_clip
    warns, here it is an error. The parameters keep requires_grad=True although nothing trains
    them in place: without it matmul takes a path that copies the weights for each sample (a
    ViT-B/16 bf16 forward on CPU became 6x slower).
    """
    name, tag = clip_name(args), args.pretrained
    if name.startswith("local-dir:") and not Path(name[10:], "open_clip_config.json").is_file():
        raise Fail(f"--model {name}: no open_clip_config.json in that folder")
    if ":" not in name:
        check_named(name, tag, args)
    try:
        clip_model = open_clip.create_model(name, pretrained=None if ":" in name else tag,
                                            device=device, require_pretrained=True)
        return clip_model.eval(), open_clip.get_tokenizer(name)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a dozen types, for a missing file, network or key
        raise Fail(f"--model {args.model} --pretrained {tag}: the weights could not be loaded "
                   f"({first_line(error)}); without internet copy them here and use local-dir:PATH "
                   "or a weights file") from None


def check_named(name, tag, args):
    """Fail unless open_clip has the model, and the tag fits it or is a file."""
    if name not in open_clip.list_models():
        hint = nearest(name, open_clip.list_models())
        raise Fail(f"--model {name}: not an open_clip model; {hint}or hf-hub:ORG/NAME or "
                   "local-dir:PATH")
    known = open_clip.list_pretrained_tags_by_model(name)
    if tag not in known:
        if not Path(tag).is_file():
            raise Fail(f"--pretrained {tag}: not a weights file and not a tag of {name}, which has "
                       f"{', '.join(known) or 'none'}")
        return say_activation(tag, args)
    model_quick = bool(open_clip.get_model_config(name).get("quick_gelu"))
    if bool((open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu")) != model_quick:
        other = name.removesuffix("-quickgelu") if model_quick else f"{name}-quickgelu"
        raise Fail(f"--model {name} --pretrained {tag}: weights and model differ in QuickGELU; use "
                   f"--model {other}")


def say_activation(file, args):
    """A weights file does not tell which activation it was trained with."""
    quick = open_clip.get_model_config(clip_name(args)).get("quick_gelu")
    kind = "QuickGELU" if quick else "GELU"
    say(f"{file}: assumed to be trained with {kind}, as --model {args.model} has; OpenAI's weights "
        "and those tuned from them have QuickGELU")


def clip_name(args):
    """What open_clip calls --model: the embedded tiny CLIP is a local directory."""
    if args.model == "shapes-clip":
        return f"local-dir:{shapes_clip(args.pretrain_seed)}"
    return args.model


def shrink_vocabulary(clip_model, tokens):
    """Leave in the token embedding the rows that `tokens` use, of 49,408: the others cost time.

    Returns (used ids (U,), tokens by row); ids keep their order, so that EOT stays the largest.
    """
    tower = getattr(clip_model, "text", clip_model)
    used, rows = tokens.unique(return_inverse=True)
    weight = tower.token_embedding.weight.detach()[used]
    tower.token_embedding = nn.Embedding.from_pretrained(weight, freeze=False)
    return used, rows


def save_run(setup, model, out, head=None, text=None):
    """An open_clip local directory, open_clip.create_model("local-dir:OUT"), and head.safetensors.

    head: further tensors for head.safetensors; text: tensors of a tuned text tower.
    """
    if RANK > 0:
        return
    out.mkdir(parents=True, exist_ok=True)
    visual = {f"visual.{name}": value for name, value in model.visual.state_dict().items()}
    save_tensors(out / "open_clip_model.safetensors",
                 {**setup.clip.state_dict(), **(text or {}), **visual})
    write_json(out / "open_clip_config.json",
               {"model_cfg": open_clip.get_model_config(clip_name(setup.args)),
                "preprocess_cfg": setup.clip.visual.preprocess_cfg})
    part = {} if out == setup.out else {"part_of": str(setup.out.resolve())}
    write_json(out / "args.json", {**vars(setup.args), **part})
    own = {name: value for name, value in model.state_dict().items() if name in HEAD}
    save_tensors(out / "head.safetensors", {**own, **(head or {})},
                 {"classnames": setup.data.classnames})


HEAD = ("head", "bias", "scale")  # of an ImageClassifier


class SavedModel(NamedTuple):
    """What a finished run left of a model, from its folder alone."""
    model: ImageClassifier
    classnames: list
    preprocess: PreprocessCfg
    tensors: dict  # of head.safetensors


def load_saved(folder, device, amp):
    """The SavedModel of a run's folder (or of a subfolder of one)."""
    if not (folder / "head.safetensors").is_file():
        raise Fail(f"--finetuned {folder}: no model there (head.safetensors): not a finished run, "
                   "or one whose models are in the subfolders zero-shot and fine-tuned")
    tensors, about = load_tensors(folder / "head.safetensors")
    try:
        clip_model = open_clip.create_model(f"local-dir:{folder}", device=device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise Fail(f"{folder}: its model cannot be loaded ({first_line(error)})") from None
    visual, bias = clip_model.visual, tensors.get("bias")
    model = ImageClassifier(visual, tensors["head"], tensors["scale"], bias is not None, amp)
    if bias is not None:
        model.bias.data = bias
    preprocess = PreprocessCfg(**visual.preprocess_cfg)
    return SavedModel(model.to(device).eval(), about["classnames"], preprocess, tensors)


def load_finetuned(setup):
    """(theta_0, theta_1): --finetuned's model, and the zero-shot model in its head's convention.

    --finetuned is a finished run, an open_clip local-dir or a state dict of an open_clip / CLIP
    model (both: the head is made by its own text tower), or one of wise-ft's ImageClassifier.
    """
    path, head_0 = Path(setup.args.finetuned), setup.head
    weights = finetuned_weights(setup)
    if (path / "head.safetensors").is_file():
        tensors, about = load_tensors(path / "head.safetensors")
        if about["classnames"] != setup.data.classnames:
            raise Fail(f"--finetuned {path}: its head has the classes {about['classnames'][:3]}"
                       f"..., the data has {setup.data.classnames[:3]}...")
        head_0 = tensors.get("head_0", setup.head).to(setup.device)  # of prompts of its own
        head = {name: tensors[name] for name in HEAD if name in tensors}
    elif "classification_head.weight" in weights:  # wise-ft's, folded
        head = {"head": weights["classification_head.weight"], "scale": torch.tensor(1.0),
                "bias": weights["classification_head.bias"]}
    else:
        head = own_head(weights, setup)
    theta_0 = setup.classifier("bias" in head, head_0)
    theta_1 = copy.deepcopy(theta_0)
    visual = {name: value for name, value in weights.items() if name.startswith("visual.")}
    load_weights(theta_1, {**visual, **head}, setup.args)
    return theta_0, theta_1


def load_weights(model, weights, args, strict=True):
    """load_state_dict() of --finetuned's weights, or one sentence."""
    try:
        model.load_state_dict(weights, strict)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise Fail(f"--finetuned {args.finetuned}: not a run or model of {args.model} ({reason}); "
                   "give its --model") from None


def finetuned_weights(setup):
    """State dict of --finetuned by open_clip's names."""
    path = Path(setup.args.finetuned)
    try:
        if path.is_dir():
            return open_clip.create_model(f"local-dir:{path}").state_dict()
        weights = open_clip.factory.load_state_dict(str(path))  # unwraps state_dict and module.
        say_activation(path, setup.args)
        prefix = "image_encoder.model."  # wise-ft's
        return {name.removeprefix(prefix): value for name, value in weights.items()}
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a pickle that names code, a torn file, another kind of model
        raise Fail(f"--finetuned {path}: not a state dict or open_clip folder ({first_line(error)})"
                   "; a pickled model is converted where it was trained: torch.save(model."
                   "state_dict(), 'STATE.pt') of model = torch.load('MODEL.pt', weights_only=False)"
                   " or, from wise-ft, pickle.load(open('MODEL.pt', 'rb'))") from None


def own_head(weights, setup):
    """{head, scale}: the head that the text tower of these weights makes, with unit rows."""
    tuned, data = copy.deepcopy(setup.clip), setup.data
    known = tuned.state_dict().keys() & weights.keys()
    load_weights(tuned, {name: weights[name] for name in known}, setup.args, strict=False)
    head = zero_shot_head(tuned, setup.tokenizer, data.classnames, data.templates)
    return {"head": head, "scale": tuned.logit_scale.detach().exp().reshape(())}


# ---- Predictions ----

def image_files(root):
    """Sorted paths of the images in a folder and in the folders below it."""
    found = []
    for folder, _, names in sorted(os.walk(root)):
        found += [os.path.join(folder, name) for name in sorted(names)
                  if name.lower().endswith(IMG_EXTENSIONS)]
    if not found:
        raise Fail(f"--predict {root}: no folder with images in it")
    return found


def read_images(transform, paths):
    """(paths, [uint8 (3, H, W)]) of the images that can be read, [a sentence] on each other."""
    good, pixels, broken = [], [], []
    for path in paths:
        try:
            pixels.append(transform(read_image(path)))
            good.append(path)
        except BrokenImage as error:
            broken.append(str(error))
    return good, pixels, broken


@torch.no_grad()
def predict_folder(args, saved, device, probabilities):
    """One line an image of --predict on stdout: path, class, probability, further columns.

    probabilities(images) -> (probs (B, C), *columns (B,)). Broken images are named on stderr.
    """
    files = image_files(args.predict)
    read = functools.partial(read_images, image_transform(saved.preprocess))
    workers = args.workers if args.workers >= 0 else os.cpu_count()
    loader = torch.utils.data.DataLoader(files, 32, num_workers=workers, collate_fn=read)
    for paths, pixels, broken in loader:
        for sentence in broken:
            print(f"left out: {sentence}", file=sys.stderr)
        if not paths:
            continue
        x = normalized(torch.stack(pixels).to(device), saved.preprocess)
        probs, *columns = probabilities(x)
        confidence, predicted = probs.max(dim=1)
        values = torch.stack([confidence, *columns], dim=1).tolist()
        for path, c, numbers in zip(paths, predicted.tolist(), values):
            print(path, saved.classnames[c], *[f"{x:.4f}" for x in numbers], sep="\t", flush=True)


def predict(args):
    """--predict with the model of --finetuned."""
    device, amp = compute_device(args)
    saved = load_saved(Path(args.finetuned), device, amp)

    def probabilities(images):
        return [classify(saved.model, images).softmax(dim=1)]
    predict_folder(args, saved, device, probabilities)


# ---- Tables and figures ----

def plane(results, measure):
    """{row: (ID, OOD)} of {row: {test: metrics}}."""
    return {row: id_ood(tests, measure) for row, tests in results.items()}


def id_ood(tests, measure):
    """(ID, mean of the shifts or None) of a row's {test: metrics}; measure: {test: its metric}."""
    in_distribution, *shifts = [tests[test][metric] for test, metric in measure.items()]
    return in_distribution, float(np.mean(shifts)) if shifts else None


def finish(setup, results, **more):
    """Write results.json and print its table, the last thing of a run.

    results: {row: {test: metrics}}; more: what else results.json should hold.
    """
    rows = []
    for name, tests in results.items():
        in_distribution, shifts = id_ood(tests, setup.measure)
        rows.append({"name": name, "id": in_distribution, "ood": shifts, "tests": tests})
    if RANK == 0:
        about = {key: getattr(setup.args, key) for key in ("method", "data", "model", "seed")}
        about |= {"args": vars(setup.args), "measure": setup.measure}
        write_json(setup.out / "results.json", {**about, "rows": rows, **more})
        print_table(rows, setup)


def print_table(rows, setup):
    """ID, mean of the shifts and each shift in the set's metric, then NLL and ECE."""
    measure = setup.measure
    id_test, *shifts = measure
    names = {"acc": "Accuracy", "macro_f1": "Macro-F1", "worst_region": "Worst-region accuracy"}
    shown = []
    for metric in dict.fromkeys(measure.values()):
        tests = ", ".join(test for test in measure if measure[test] == metric)
        several = len(set(measure.values())) > 1
        shown.append(f"{names[metric]} ({tests})" if several else names[metric])
    say(f"\nsaved to {setup.out}. {' and '.join(shown)} in percent; OOD: mean of the shifts; NLL "
        "and ECE: ID, then mean of shifts.\n")
    table = [["", id_test, "OOD", *shifts, "NLL", "NLL ood", "ECE", "ECE ood"]]
    for row in rows:
        tests = row["tests"]
        cells = [row["id"], row["ood"]] + [tests[shift][measure[shift]] for shift in shifts]
        for metric in ("nll", "ece"):
            cells += id_ood(tests, dict.fromkeys(measure, metric))
        table.append([row["name"]] + ["-" if cell is None else f"{cell:.2f}" for cell in cells])
    wide = max(len(name) for name, *_ in table) + 1
    for name, *cells in table:
        say(f"{name:<{wide}}" + "".join(f"{cell[:9]:>10}" for cell in cells))


def pyplot():
    """matplotlib.pyplot on rank 0, or None with a hint."""
    if RANK > 0:
        return None
    try:
        import matplotlib
    except ImportError:
        return say("no figures: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt


def plot_plane(points, setup, lines=None, name="plane.png"):
    """ID against OOD: {row: (ID, OOD)} as markers, {label: [(ID, OOD)]} as lines."""
    plt = pyplot()
    if plt is None or len(setup.measure) < 2:
        return
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for label, line in (lines or {}).items():
        ax.plot(*zip(*line), "-o", markersize=4, label=label)
    for (label, point), marker in zip(points.items(), "PXs*D^v<>hpd" * 3):
        ax.plot(*point, marker, markersize=10, linestyle="none", label=label)
    ax.set(xlabel=f"{next(iter(setup.measure))} (ID), %",
           ylabel=f"mean of {len(setup.measure) - 1} shifts (OOD), %")
    ax.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(setup.out / name, dpi=150)
    plt.close(figure)


# ================================= Part 3: data =================================

class BrokenImage(Exception):
    """A file that cannot be read as an image, in one sentence."""

    def __init__(self, message):  # a worker wraps the sentence in its traceback: unwrap it
        super().__init__(str(message).strip().rsplit("common.BrokenImage: ", 1)[-1])


def read_image(path):
    """Image of a file, RGB or with transparency, which open_clip's transform drops; BrokenImage."""
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith("I;16"):  # convert() would clip at 255 instead of scaling
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image if image.mode in ("RGB", "RGBA") else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # of PIL
        raise BrokenImage(f"{path}: cannot be read as an image ({str(error)[:100]})") from None


def file_paths(paths):
    """One byte array (N,). A list of a million strings would be copied into every worker: to
    read an object is to write its reference count."""
    return np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)


class ImageSet(torch.utils.data.Dataset):
    """Labelled images: index or (epoch, index) -> (uint8 (3, H, W), label, index), if prepare()d.

    images: byte array (N,) of file_paths(), or uint8 array (N, H, W, 3).
    classes: the label space, a list with the ids of each label, see project(); None is all.
    metric: the one of metrics() that tables and means show.
    groups: (N,) int, the group of each image, -1 is none.
    border: pixels cut from each side of an image before the transform.
    """

    def __init__(self, name, images, labels, classes=None, metric="acc", groups=None, border=0):
        self.name, self.images, self.metric, self.border = name, images, metric, border
        self.labels = torch.as_tensor(np.asarray(labels)).long()
        self.groups = None if groups is None else torch.as_tensor(groups)
        self.transform = self.preprocess = self.seed = None
        if classes is not None:  # repeat a label's first id, which leaves the maximum alone
            width = max(map(len, classes))
            padded = [list(ids) + [ids[0]] * (width - len(ids)) for ids in classes]
            classes = torch.tensor(padded)
        self.classes = classes

    @property
    def on_disk(self):
        return self.images.dtype.kind == "S"

    def prepare(self, preprocess):
        """Set how images are resized, cropped and normalised: an open_clip PreprocessCfg."""
        self.preprocess, self.transform = preprocess, image_transform(preprocess)

    def augmented(self, kind, seed):
        """A copy for training whose random draws depend on (seed, epoch, image) alone."""
        other = copy.copy(self)
        if kind != "none":
            other.transform, other.seed = image_transform(self.preprocess, kind), seed
        return other

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, item):
        epoch, i = item if isinstance(item, tuple) else (0, item)
        if self.on_disk:
            image = read_image(os.fsdecode(self.images[i]))
        else:
            image = Image.fromarray(self.images[i])
        if self.border:
            image = ImageOps.crop(image, self.border)
        with torch.random.fork_rng(devices=[], enabled=self.seed is not None):
            if self.seed is not None:
                torch.default_generator.manual_seed(hash((self.seed, epoch, i)) & 0xFFFFFFFF)
            return self.transform(image), self.labels[i], i

    def normalized(self, pixels):
        return normalized(pixels, self.preprocess)

    def project(self, logits):
        return project(logits, self.classes)

    def describe(self, i):
        return os.fsdecode(self.images[i]) if self.on_disk else f"{self.name}[{i}]"

    def subset(self, indices, name=None):
        """A new set of the images at these indices."""
        chosen = np.asarray(indices, dtype=np.int64)  # also if there are none
        other = copy.copy(self)
        other.name = name or self.name
        other.images, other.labels = self.images[chosen], self.labels[chosen]
        other.groups = None if self.groups is None else self.groups[chosen]
        return other


@dataclass
class Data:
    """A data set."""
    classnames: list      # C
    templates: list       # prompts
    train: ImageSet
    val: ImageSet | None  # None: load_data() holds out training images
    tests: dict           # name -> ImageSet; the first is the ID test, all others are shifts
    descriptions: object = None  # (key, value) pairs of a descriptions.json
    other_names: list = None     # a second name of each class


def load_data(args):
    """--data -> Data, with --tests, --limit, --holdout and --shots applied."""
    data = DATA[args.data](Path(args.data_dir).expanduser(), args)
    if args.limit:
        data.train = spread(data.train, args.limit)
        data.val = data.val and spread(data.val, args.limit)
        data.tests = {name: spread(images, args.limit) for name, images in data.tests.items()}
    if data.val is None:
        data.train, data.val = hold_out(data.train, args.holdout, min(args.shots, 4) or None)
    if args.shots:
        data.train = few_shot(data.train, args.shots, args.seed)
    return data


def spread(images, n):
    """n images, the classes taken in turn; the same in every run and method."""
    order = np.random.default_rng(0).permutation(len(images))
    turn, seen = np.empty(len(images), int), {}  # turn: 0 for the first image of a class, ...
    for k, label in enumerate(images.labels[order].tolist()):
        turn[k] = seen.get(label, 0)
        seen[label] = turn[k] + 1
    first = np.argsort(turn, kind="stable")[:n]
    return images.subset(np.sort(order[first]))


def sample_classes(images, seed, count):
    """Sorted indices of count(n) images of each class, drawn by `seed` from the n that it has."""
    rng, chosen = np.random.default_rng(seed), []
    for c in images.labels.unique().tolist():
        own = np.flatnonzero(images.labels.numpy() == c)
        chosen += rng.permutation(own)[:count(len(own))].tolist()
    return sorted(chosen)


def hold_out(train, share, most=None):
    """(train, val): every class gives `share` of its images, at most `most`; always the same."""
    def count(n):
        return min(round(share * n), n - 1, n if most is None else most)
    held = sample_classes(train, 0, count)
    kept = np.setdiff1d(np.arange(len(train)), held)
    return train.subset(kept), train.subset(held, "val")


def few_shot(train, shots, seed):
    """`shots` images of each class, chosen by `seed`."""
    classes, sizes = train.labels.unique(return_counts=True)
    if sizes.min() < shots:
        raise Fail(f"--shots {shots}: class {classes[sizes.argmin()]} has only {sizes.min()} "
                   "training images")
    return train.subset(sample_classes(train, seed, lambda n: shots))


# ---- Data sets ----
# `folder` is a tree of the user's; the papers' data sets are read from the trees in which they
# are published, below --data-dir. Readers just raise; expecting() makes one sentence of it.
# Training images and the ID test must be readable; a shift that is not is skipped. Files are
# only listed here: an image is first opened when it is used.

@contextmanager
def expecting(path, tree):
    """What is raised inside becomes Fail("PATH: reason; expected below --data-dir: TREE").

    `path` is named if the error itself names no file.
    """
    try:
        yield
    except Exception as error:  # a broken file raises a dozen types in numpy, zipfile, csv, ...
        raise Fail(f"{reason(error, path)}; expected below --data-dir: {tree}") from error


def reason(error, path):
    """One clause about what a reader raised: a file and what is wrong with it."""
    if isinstance(error, Fail):
        return str(error)
    if not isinstance(error, OSError) or not error.filename:
        return f"{path}: not as published ({error!r:.150})"
    file = Path(error.filename)
    for folder in file.parents:
        twice = folder / folder.name  # archives are often unpacked into a folder of their name
        if (twice / file.relative_to(folder)).exists():
            return f"{twice}: the tree is nested twice; move what is in it up to {folder}"
    missing = isinstance(error, FileNotFoundError)
    return f"{file}: {'not found' if missing else error.strerror}"


def wanted(args, tests):
    """Those of `tests` (names, ID first) that --tests asks for; the ID test always."""
    if args.tests == "all":
        return list(tests)
    asked = args.tests.split(",")
    for name in asked:
        if name not in tests:
            known = ", ".join(tests)
            raise Fail(f"--tests {name}: no such test set on disk; {args.data} has {known}")
    return [name for name in tests if name in asked or name == tests[0]]


class Shift(NamedTuple):
    """A test set as it is published: read(name, path, **how) -> ImageSet."""
    read: Callable
    path: Path
    tree: str  # what should lie below --data-dir
    how: dict


def read_shifts(args, id_test, shifts):
    """{name: ImageSet} of the {name: Shift} that --tests asks for. Of all, those that cannot be
    read are skipped, a line each; one that --tests names must be readable."""
    names = list(shifts)
    if args.tests != "all":
        on_disk = [name for name in shifts if shifts[name].path.exists()]
        names = wanted(args, [id_test, *on_disk])[1:]
    tests = {}
    for name in names:
        shift = shifts[name]
        try:
            with expecting(shift.path, shift.tree):
                tests[name] = shift.read(name, shift.path, **shift.how)
        except Fail as error:
            if args.tests != "all":
                raise Fail(f"--tests {name}: {error}") from None
            say(f"test set {name} is skipped: {error}")
    return tests


def first_present(*paths):
    """The one of several usual places that exists; the first if none does."""
    for path in paths:
        if path.exists():
            return path
    return paths[0]


def read_lines(path, optional=False):
    """Lines of a text file that are not blank; none of an optional file that is not there."""
    if optional and not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise Fail(f"{path}: not UTF-8 text; save it in that encoding") from None
    return [line for line in lines if line.strip()]


def read_csv(path, *columns):
    """[(value, ...)] of the named columns of every row."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as f:
        rows = csv.reader(f)
        header = next(rows, [])
        for column in columns:
            if column not in header:
                found = ", ".join(header) or "none"
                raise Fail(f"{path}: no column '{column}'; it has {found}")
        get = operator.itemgetter(*map(header.index, columns))
        try:
            return [get(row) for row in rows]
        except IndexError:
            line = rows.line_num
            raise Fail(f"{path}: line {line} has fewer values than the header") from None


def subfolders(path):
    """Sorted names of the folders in a folder, of which there must be one."""
    found = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
    if not found:
        raise Fail(f"{path}: there is no folder in it")
    return found


def is_image(path):
    """Hidden files, as of macOS (._x.jpg) or in .ipynb_checkpoints/, are no images."""
    folder, file = path.split(os.sep)[-2:]
    hidden = folder.startswith(".") or file.startswith(".")
    return not hidden and file.lower().endswith(IMG_EXTENSIONS)


def class_tree(name, path, labels, ignored=(), own_space=False, **how):
    """ImageSet of path/FOLDER/* with labels[FOLDER]; `ignored` folders may be there too.

    own_space: only the classes that have a folder count; before any softmax the logits of all
    others are dropped.
    """
    files, targets = [], []
    for folder in subfolders(path):
        if folder in ignored:
            continue
        if folder not in labels:
            if labels.keys() & set(os.listdir(path / folder)):
                raise Fail(f"{path / folder}: holds folders, not images: the tree is nested "
                           f"twice; move them up to {path}")
            known = ", ".join(list(labels)[:3])
            raise Fail(f"{path / folder}: not a class of {name}, whose folders are {known} ...")
        # A folder at a time, since torchvision's (path, label) tuples take twice the memory.
        found = make_dataset(str(path), {folder: labels[folder]}, is_valid_file=is_image,
                             allow_empty=True)
        if not found:
            raise Fail(f"{path / folder}: no image in that class folder "
                       f"({', '.join(IMG_EXTENSIONS)})")
        files.append(file_paths([file for file, _ in found]))
        targets += [labels[folder]] * len(found)
    if own_space:
        ids, targets = np.unique(targets, return_inverse=True)
        how["classes"] = ids[:, None].tolist()
    return ImageSet(name, np.concatenate(files), targets, **how)


def listed(name, source, rows, **how):
    """ImageSet of the rows [(file, label) or (file, label, group), ...] that `source` lists."""
    if not rows:
        raise Fail(f"{source}: lists no image for {name}")
    files, labels, *rest = zip(*rows)
    os.stat(files[0])  # one is enough to see whether the images are where they should be
    groups = rest[0] if rest else None
    return ImageSet(name, file_paths(files), labels, groups=groups, **how)


def folder_data(root, args):
    """The user's own images; in this tree a broken shift is a mistake and not skipped.

    Beside the images there may be classnames.txt (folder<TAB>name a line), templates.txt (one
    with {} a line) and descriptions.json.
    """
    tree = ("train/CLASS/*.jpg, test/CLASS/*.jpg and optionally val/CLASS/*.jpg and "
            "shifts/NAME/CLASS/*.jpg")
    if not root.is_dir():
        raise Fail(f"--data-dir {root}: no such folder; expected in it: {tree}")
    shifts = subfolders(root / "shifts") if (root / "shifts").is_dir() else []
    for taken in {"train", "val", "held-out", "test"} & set(shifts):
        raise Fail(f"{root / 'shifts' / taken}: a shift cannot have that name; rename it")
    asked = wanted(args, ["test", *shifts])[1:]
    with expecting(root, tree):
        labels = {folder: label for label, folder in enumerate(subfolders(root / "train"))}
        train = class_tree("train", root / "train", labels)
        tests = {"test": class_tree("test", root / "test", labels)}
        val = class_tree("val", root / "val", labels) if (root / "val").is_dir() else None
        for shift in asked:
            tests[shift] = class_tree(shift, root / "shifts" / shift, labels)

    names = {folder: folder.replace("_", " ") for folder in labels}
    file = root / "classnames.txt"
    for line in read_lines(file, optional=True):
        folder, _, name = line.partition("\t")
        if folder not in names or not name.strip():
            raise Fail(f"{file}: '{line}' is not FOLDER<TAB>NAME with a folder of train/")
        names[folder] = name.strip()
    file = root / "templates.txt"
    templates = read_lines(file, optional=True) or ["a photo of a {}."]
    for template in templates:  # open_clip formats it
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            raise Fail(f"{file}: '{template}' must hold {{}} once, where the class name goes, "
                       "and no other brace")
    file = root / "descriptions.json"
    descriptions = read_json(file, "descriptions", pairs=True) if file.is_file() else None

    if RANK == 0:
        report_transparent([train, val, *tests.values()])
    return Data(list(names.values()), templates, train, val, tests, descriptions)


def report_transparent(splits):
    """Say how many image files can hold transparent pixels, by their headers."""
    count = 0
    for path in np.concatenate([split.images for split in splits if split]):
        if path.lower().endswith((b".png", b".webp", b".tif", b".tiff")):
            broken = OSError, ValueError, Image.DecompressionBombError  # named when it is used
            with suppress(*broken), Image.open(path) as image:
                count += image.has_transparency_data
    if count:
        say(f"{count:,} images are transparent: what is behind is shown as open_clip's transform "
            "shows it")


def imagenet_data(root, args):
    """ImageNet (ILSVRC 2012) with its shifts V2, R, A, Sketch and ObjectNet.

    WNID is a WordNet id such as n01440764. V2's folders are named by the class id, so that '10'
    is not the third class. The head has all 1000 classes, also if the tree has fewer; the label
    space of R and of A is the 200 that have a folder there.
    """
    from timm.data import ImageNetInfo
    # label_names() are the WNIDs in the order of open_clip's IMAGENET_CLASSNAMES
    wnids = {wnid: label for label, wnid in enumerate(ImageNetInfo().label_names())}
    val = root / "imagenet/val"
    tree = "imagenet/train/WNID/*.JPEG and imagenet/val/WNID/*.JPEG"
    with expecting(root / "imagenet", tree):
        if any(val.glob("ILSVRC2012_val_*.JPEG")):
            raise Fail(f"{val}: its images are not in class folders; valprep.sh of "
                       "soumith/imagenetloader.torch, run in it, moves them into WNID folders")
        train = class_tree("train", root / "imagenet/train", wnids)
        test = class_tree("imagenet", val, wnids)

    v2, r, a = "imagenetv2-matched-frequency-format-val", "imagenet-r", "imagenet-a"
    sketch = first_present(root / "imagenet-sketch", root / "sketch")
    objects = "objectnet-1.0/images/FOLDER/*.png and the four files of objectnet-1.0/mappings/"
    by_number = {"labels": {str(label): label for label in range(1000)}}
    by_wnid, own_space = {"labels": wnids}, {"labels": wnids, "own_space": True}
    shifts = read_shifts(args, "imagenet", {
        "v2": Shift(class_tree, root / v2, f"{v2}/{{0..999}}/*.jpeg", by_number),
        "r": Shift(class_tree, root / r, f"{r}/WNID/*.jpg", own_space),
        "a": Shift(class_tree, root / a, f"{a}/WNID/*.jpg", own_space),
        "sketch": Shift(class_tree, sketch, f"{sketch.name}/WNID/*.JPEG", by_wnid),
        "objectnet": Shift(objectnet, root / "objectnet-1.0", objects, {}),
    })
    return Data(list(open_clip.IMAGENET_CLASSNAMES), list(open_clip.OPENAI_IMAGENET_TEMPLATES),
                train, None, {"imagenet": test, **shifts})


def objectnet(name, path):
    """The 113 classes of ObjectNet that ImageNet has too, some of them under several ids.

    Joined as its own files say: FOLDER -> ObjectNet label -> ImageNet names -> line in
    imagenet_to_label_2012_v2 -> class id. Two pixels are cut from each side, a red border.
    """
    mappings, what = path / "mappings", "one of ObjectNet's mappings"
    lines = read_lines(mappings / "imagenet_to_label_2012_v2")
    line_of_id = read_json(mappings / "pytorch_to_imagenet_2012_id.json", what)
    label_of_folder = read_json(mappings / "folder_to_objectnet_label.json", what)
    names_of_label = read_json(mappings / "objectnet_to_imagenet_1k.json", what)

    id_of_name = {lines[line].strip(): int(i) for i, line in line_of_id.items()}
    folder_of_label = {label: folder for folder, label in label_of_folder.items()}
    ids = {}  # FOLDER -> class ids
    for label, names in names_of_label.items():
        ids[folder_of_label[label]] = [id_of_name[n] for n in names.split("; ")]
    labels = {folder: label for label, folder in enumerate(sorted(ids))}
    others = label_of_folder.keys() - ids.keys()
    dataset = class_tree(name, path / "images", labels, ignored=others,
                         classes=[ids[folder] for folder in labels], border=2)
    total = len(list(path.glob("images/*/*.png")))
    say(f"objectnet: {len(dataset):,} of {total:,} images are of the {len(ids)} classes that "
        "ImageNet has (18,574 of 50,273 expected)")
    return dataset


def domainnet_data(root, args):
    """DomainNet, as its lists say; real is the ID domain. Class names keep their underscores,
    as in Lipsum-FT's prompts."""
    root = root / "domainnet"
    tree = "domainnet/{0}_{1}.txt and the images that it lists, domainnet/{0}/CLASS/*.jpg"
    listing = root / "real_train.txt"
    with expecting(listing, tree.format("real", "{train,test}")):
        classes = {}  # label -> CLASS
        for file, label in domainnet_lines(listing):
            classes.setdefault(label, file.split("/")[1])
        if sorted(classes) != list(range(len(classes))):
            raise Fail(f"{listing}: its {len(classes)} labels are not 0 to {len(classes) - 1}")
        train = domainnet_split("train", listing, classes)
        test = domainnet_split("real", root / "real_test.txt", classes)

    shifts = {}
    for domain in ("painting", "clipart", "infograph", "sketch"):
        shifts[domain] = Shift(domainnet_split, root / f"{domain}_test.txt",
                               tree.format(domain, "test"), {"classes": classes})
    return Data([classes[label] for label in range(len(classes))],
                list(open_clip.OPENAI_IMAGENET_TEMPLATES), train, None,
                {"real": test, **read_shifts(args, "real", shifts)})


def domainnet_lines(listing):
    """[('DOMAIN/CLASS/FILE', label)] of lines 'DOMAIN/CLASS/FILE LABEL'. Some copies of the
    lists have other folders before DOMAIN; the images are beside the lists all the same."""
    rows = []
    for line in read_lines(listing):
        path, _, label = line.strip().rpartition(" ")
        parts = path.split("/")[-3:]
        if len(parts) != 3 or not label.isdigit():
            raise Fail(f"{listing}: '{line}' is not DOMAIN/CLASS/FILE LABEL")
        rows.append(("/".join(parts), int(label)))
    return rows


def domainnet_split(name, listing, classes):
    """The images of one list; classes: {label: CLASS}, as in real_train.txt."""
    rows = []
    for file, label in domainnet_lines(listing):
        if file.split("/")[1] != classes.get(label):
            raise Fail(f"{listing}: '{file} {label}': in real_train.txt label {label} is "
                       f"{classes.get(label, 'not used')}")
        rows.append((f"{listing.parent}/{file}", label))
    return listed(name, listing, rows)


def cifar10_data(root, args):
    """CIFAR-10, Python version, with its shifts CIFAR-10.1 (v6), CIFAR-10.2 and STL-10."""
    folder = root / "cifar-10-batches-py"
    with expecting(folder, "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"):
        check_cifar10(folder)
        train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    v1 = first_present(root / "CIFAR-10.1/datasets", root / "CIFAR-10.1")
    v2 = first_present(root / "cifar-10.2", root / "CIFAR-10.2")
    v1_tree = "CIFAR-10.1/datasets/cifar10.1_v6_{data,labels}.npy"  # a clone of the repository
    stl_tree = "stl10_binary/{test_X.bin,test_y.bin,class_names.txt}"
    shifts = read_shifts(args, "cifar10", {
        "cifar10.1": Shift(cifar10_1, v1, v1_tree, {}),
        "cifar10.2": Shift(cifar10_2, v2, "cifar-10.2/cifar102_test.npz", {}),
        "stl10": Shift(stl10, root / "stl10_binary", stl_tree, {"names": train.classes}),
    })
    return Data(train.classes, list(open_clip.OPENAI_IMAGENET_TEMPLATES),
                ImageSet("train", train.data, train.targets), None,
                {"cifar10": ImageSet("cifar10", test.data, test.targets), **shifts})


def check_cifar10(folder):
    """The batches are pickles, that is, programs. torchvision too checks the MD5 of each before
    it runs one, but does not say which file is wrong."""
    meta = [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]
    for file, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, meta]:
        os.stat(folder / file)  # raises if it is missing
        if not check_integrity(folder / file, md5):
            raise Fail(f"{folder / file}: refused, it is not the published file (MD5 {md5})")


def cifar10_1(name, folder):
    """CIFAR-10.1: two arrays, without any pickle."""
    images = np.load(folder / "cifar10.1_v6_data.npy", allow_pickle=False)
    labels = np.load(folder / "cifar10.1_v6_labels.npy", allow_pickle=False)
    return like_cifar10(name, images, labels)


def cifar10_2(name, folder):
    """CIFAR-10.2: of its arrays only the two are read, neither of which is a pickle."""
    with np.load(folder / "cifar102_test.npz", allow_pickle=False) as arrays:
        return like_cifar10(name, arrays["images"], arrays["labels"])


def like_cifar10(name, images, labels):
    """ImageSet of arrays that must be images and labels like CIFAR-10's."""
    pixels = images.dtype == np.uint8 and images.shape == (len(labels), 32, 32, 3)
    if not pixels or not set(labels) <= set(range(10)):
        raise ValueError("not N images of 32 x 32 x 3 bytes and N labels of 0 to 9")
    return ImageSet(name, images, labels)


def stl10(name, folder, names):
    """STL-10's test images. Its monkeys are left out and the logit of frog is dropped: the nine
    classes that both data sets have are the label space, in the order of CIFAR-10's names."""
    pixels = np.fromfile(folder / "test_X.bin", np.uint8)
    numbers = np.fromfile(folder / "test_y.bin", np.uint8)
    own_names = read_lines(folder / "class_names.txt")
    if len(pixels) != len(numbers) * 3 * 96 * 96:
        raise Fail(f"{folder / 'test_X.bin'}: its {len(pixels):,} bytes are not the "
                   f"{len(numbers):,} images of test_y.bin")
    id_of_name = {own: i for i, own in enumerate(names)}
    id_of_name["car"] = id_of_name["automobile"]
    ids = np.array([id_of_name.get(own, -1) for own in own_names])[numbers - 1]
    kept = ids >= 0
    shared, labels = np.unique(ids[kept], return_inverse=True)
    images = pixels.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)  # stored column by column
    return ImageSet(name, images[kept], labels, classes=shared[:, None].tolist())


def iwildcam_data(root, args):
    """iWildCam 2020 as in WILDS; ID test: id_test; shift: test, other cameras. train/ holds the
    images of all splits; y = 99999 in categories.csv is no class.

    With labels.csv of the WiSE-FT code beside them the classes have English names, as in the
    papers: 178 different names for 182 classes, of which those of one name share a text head.
    """
    root = root / "iwildcam_v2.0"
    metadata, table, column = root / "metadata.csv", root / "labels.csv", "english"
    if not table.is_file():
        table, column = root / "categories.csv", "name"
    tree = "iwildcam_v2.0/{metadata.csv,categories.csv} and iwildcam_v2.0/train/*.jpg"
    with expecting(metadata, tree):
        rows = read_csv(metadata, "split", "filename", "y")
        names, latin = dict(read_csv(table, "y", column)), dict(read_csv(table, "y", "name"))
        names.pop("99999", None)
        labels = {str(label): label for label in range(len(names))}
        used = {y for _, _, y in rows}
        if names.keys() != labels.keys() or not used <= labels.keys():
            raise Fail(f"{table}: must name the classes 0, 1, ... of metadata.csv")
        splits = defaultdict(list)
        for split, file, y in rows:
            splits[split].append((f"{root}/train/{file}", labels[y]))
        train = listed("train", metadata, splits["train"], metric="macro_f1")
        val = listed("val", metadata, splits["id_val"], metric="macro_f1")
        id_test = listed("id_test", metadata, splits["id_test"], metric="macro_f1")

    if column == "name":
        say(f"class names are Latin: labels.csv of the WiSE-FT code is not in {root}")
    shift = Shift(listed, metadata, tree, {"rows": splits["test"], "metric": "macro_f1"})
    return Data([names[y].lower() for y in labels], ["a photo of {}."], train, val,
                {"id_test": id_test, **read_shifts(args, "id_test", {"test": shift})},
                other_names=[latin[y] for y in labels])


def fmow_data(root, args):
    """FMoW as in WILDS, split by time: training and ID before 2013, shift (test) from 2016 on.
    Row i of the metadata, from 0, is rgb_img_{i}.png. Class names keep their underscores, as in
    the papers' prompts. The groups are five regions."""
    root = root / "fmow_v1.1"
    metadata = root / "rgb_metadata.csv"
    tree = ("fmow_v1.1/{rgb_metadata.csv,country_code_mapping.csv} and "
            "fmow_v1.1/images/rgb_img_*.png")
    regions = {"Asia": 0, "Europe": 1, "Africa": 2, "Americas": 3, "Oceania": 4}
    with expecting(metadata, tree):
        rows = read_csv(metadata, "split", "category", "country_code", "timestamp")
        countries = dict(read_csv(root / "country_code_mapping.csv", "alpha-3", "region"))
        names = sorted({category for _, category, _, _ in rows})
        labels = {name: label for label, name in enumerate(names)}
        splits = defaultdict(list)
        for i, (split, category, country, when) in enumerate(rows):
            if "2013" <= when < "2016":
                continue
            period = "before 2013" if when < "2013" else "from 2016"
            group = regions.get(countries.get(country), -1)
            row = (f"{root}/images/rgb_img_{i}.png", labels[category], group)
            splits[f"{split} {period}"].append(row)
        train = listed("train", metadata, splits["train before 2013"])
        val = listed("val", metadata, splits["val before 2013"])
        id_test = listed("id_test", metadata, splits["test before 2013"])

    how = {"rows": splits["test from 2016"], "metric": "worst_region"}
    shift = Shift(listed, metadata, tree, how)
    return Data(names, ["satellite photo of a {}."], train, val,
                {"id_test": id_test, **read_shifts(args, "id_test", {"test": shift})})


# ============================ Part 4: flags and mistakes ============================

class Fail(Exception):
    """A user's mistake in one sentence; cli() prints it and exits with code 2."""


def cli(main):
    """Run a method's main(); mistakes, a full disk or GPU and Ctrl-C end in one line."""
    message, code = None, 2
    try:
        if WORLD > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        logging.getLogger().setLevel(logging.CRITICAL)  # open_clip logs what it also raises
        main()
    except BrokenImage as error:
        message = f"{error}; repair or remove it"
    except Fail as error:
        message = error
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except torch.OutOfMemoryError:
        message = ("the GPU is out of memory; raise --accum (the images of a step stay the same), "
                   "or add --grad-checkpointing")
    except BrokenPipeError:  # | head has seen enough
        silence(sys.stdout)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            message = (f"no space left on the disk of {error.filename or 'the run'}; the last good "
                       "checkpoint is kept")
        elif error.filename:
            message = f"{error.filename}: {error.strerror}"
        else:
            raise
    if WORLD > 1 and message is None:
        dist.destroy_process_group()
    if message is not None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(code)


def say(*words, file=None):
    """Print on rank 0. A closed pipe (| head) ends the printing, not the run."""
    if RANK == 0:
        try:
            print(*words, file=file, flush=True)
        except BrokenPipeError:
            silence(file or sys.stdout)


def silence(stream):
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def first_line(error):
    return (str(error).strip().splitlines() or [repr(error)])[0][:150]


def nearest(word, words):
    """'did you mean X? ', or nothing, for an error message."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.7)
    return f"did you mean {close[0]}? " if close else ""


def limited(kind=float, low=-math.inf, high=math.inf, above=-math.inf):
    """argparse type: a finite number with low <= x <= high and x > above."""
    def parse(text):
        try:
            x = kind(text)
        except ValueError:
            name = kind.__name__
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of type {name}") from None
        for broken, limit in ((not math.isfinite(x), "finite"), (x < low, f"at least {low}"),
                              (x > high, f"at most {high}"), (x <= above, f"above {above}")):
            if broken:
                raise argparse.ArgumentTypeError(f"{text} is not {limit}")
        return x
    return parse


RECIPE = "the data set's recipe"  # default of a flag whose value depends on --data
DEFAULT_OUT = "runs/METHOD-DATA-sSEED"
FOREIGN = {  # flags of wise-ft, FLYP and open_clip, and ours
    "--data-location": "--data-dir",
    "--train-dataset": "--data",
    "--eval-datasets": "--tests",
    "--save": "--out",
    "--exp-name": "--out",
    "--load": "--finetuned",
    "--warmup-length": "--warmup",
    "--freeze-encoder": "--freeze encoder",
    "--k": "--shots",
    "--accum-freq": "--accum",
    "--grad-clip-norm": "--grad-clip",
    "--lr-scheduler": "no choice: warm-up, then cosine",
    "--template": "templates.txt in --data-dir",
    "--lambda": "--lam",
}
PRECISIONS = {"amp_bf16": "bf16", "amp_bfloat16": "bf16", "amp": "fp16"}


class Parser(argparse.ArgumentParser):
    """argparse that leaves out flags that were not given and reports a mistake in one line."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.defaults, self.actions = {}, {}
        self.own = self.add_argument_group("flags of this method")  # listed first
        self.shared = self.add_argument_group("flags of all methods")

    def add(self, flag, default, help, group=None, **kwargs):
        action = (group or self.own).add_argument(flag, help=help.replace("%", "%%"), **kwargs)
        self.defaults[action.dest], self.actions[action.dest] = default, action

    def parse(self, argv, recipes):
        """{flag: value} of those that were given; --help shows the values of --data's recipe."""
        data = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        data.add_argument("--data", default=self.defaults["data"])
        data.error = self.error
        given = data.parse_known_args(argv)[0]
        recipe = {"steps": None, "epochs": None, **recipes.get(given.data, {})}
        for key, action in self.actions.items():
            action.help += f" (default: {recipe.get(key, self.defaults[key])})".replace("%", "%%")
        given, unknown = self.parse_known_args(argv)
        for word in unknown:
            word = word.split("=")[0]
            ours = FOREIGN.get(word.replace("_", "-"))
            hint = f"here it is {ours}" if ours else nearest(word, self._option_string_actions)
            self.error(f"{word}: no such flag; {hint}")
        return vars(given)

    def error(self, message):
        raise Fail(f"{message.strip()} (see --help)")


def parser(doc):
    """The flags that all methods share. RECIPE defaults come from the method's RECIPES[--data]."""
    p = Parser(doc)
    add = functools.partial(p.add, group=p.shared)
    switch = argparse.BooleanOptionalAction
    add("--data", "shapes", "data set: " + ", ".join(DATA))
    add("--data-dir", "~/data", "folder that holds the data set")
    add("--model", "ViT-B-16-quickgelu",
        "open_clip name, hf-hub:ORG/NAME or local-dir:PATH; shapes has its own")
    add("--pretrained", "openai", "open_clip tag or weights file of a named model")
    add("--epochs", RECIPE, "passes over the training images", type=limited(float, above=0))
    add("--steps", RECIPE, "optimiser steps, instead of --epochs", type=limited(int, 1))
    add("--batch-size", RECIPE, "images an optimiser step, over all ranks and --accum parts",
        type=limited(int, 1))
    add("--accum", 1, "parts of a step on each rank, one after the other, to save memory",
        type=limited(int, 1))
    add("--lr", RECIPE, "peak learning rate of AdamW", type=limited(float, 0))
    add("--wd", RECIPE, "weight decay, on every trained parameter", type=limited(float, 0))
    add("--warmup", RECIPE,
        "linear warm-up: optimiser steps, or below 1 a fraction of them; 0 with --shots",
        type=limited(float, 0))
    add("--grad-clip", RECIPE, "largest gradient norm; 0 does not clip", type=limited(float, 0))
    add("--augment", RECIPE,
        "none; crop: random crop of 90-100% of the area; crop-flip: 8-100% and a flip",
        choices=["none", "crop", "crop-flip"])
    add("--keep", "last",
        "weights of the last step, or of the epoch that is best on held-out images",
        choices=["last", "best"])
    add("--shots", 0, "train on K images of each class; 0 is all", type=limited(int, 0))
    add("--holdout", 0.1, "share of the training images held out if the data has no validation "
        "split, for choices of this or a later run; with --shots at most min(K, 4) a class",
        type=limited(float, 0, 0.9))
    add("--limit", 0,
        "images kept of each split, spread over its classes, for a quick run; 0 is all",
        type=limited(int, 0))
    add("--tests", "all", "comma-separated names of the shifts to evaluate, beside the ID test")
    add("--finetuned", "none",
        "model to use instead of training: a finished run, an open_clip folder, or a state dict "
        "of CLIP or (not in drm.py) of wise-ft's classifier")
    add("--predict", "none",
        "with --finetuned RUN: folder of images to classify, a line each on stdout")
    add("--precision", "auto", "of the towers; auto is bf16 or fp16 on CUDA, else fp32",
        choices=["auto", "bf16", "fp16", "fp32"], type=lambda text: PRECISIONS.get(text, text))
    add("--compile", False, "torch.compile the model", action=switch)
    add("--grad-checkpointing", False, "recompute activations to save memory", action=switch)
    add("--workers", -1, "data-loading processes per rank; -1 is this machine's cores over its "
        "ranks, or 0 for images in memory", type=limited(int, -1))
    add("--device", "auto", "where to compute; mps is untested",
        choices=["auto", "cpu", "cuda", "mps"])
    add("--seed", 0, "of data order, augmentation and everything random in a method",
        type=limited(int, 0, 2**32 - 1))
    add("--pretrain-seed", 0, "of the tiny CLIP of --data shapes", type=limited(int, 0))
    add("--out", DEFAULT_OUT, "new folder for the run; a taken default gets a number")
    add("--resume", "none", "run folder to continue exactly, with the flags it was started with")
    add("--save-every", 10.0, "minutes between checkpoints", type=limited(float, 0))
    return p


FREE = {"resume", "workers", "save_every", "device"}  # on --resume; only --device moves digits
# Flags that --finetuned brings from its run, and what a given flag must not make different
INHERITED = {"data_dir": None, "data": "held-out images", "holdout": "held-out images",
             "limit": "held-out images", "shots": "held-out images", "seed": None,
             "model": "the zero-shot model", "pretrained": "the zero-shot model",
             "pretrain_seed": "the zero-shot model"}


def parse(p, method, recipes, variants=None, inherit=(), argv=None):
    """Flags: those given, over those of --resume or --finetuned, the recipe and the defaults.

    variants: {(flag, value): recipe}, what replaces a part of the recipe where a flag has it.
    inherit: flags of the method alone that --finetuned brings from a run of the same method.
    """
    given = absolute_paths(p.parse(argv, recipes))
    if "steps" in given and "epochs" in given:
        raise Fail("--steps and --epochs exclude each other: give one")
    base = {}
    if "resume" in given:
        base = resumed(given, method)
    elif "finetuned" in given and "predict" not in given:
        base = inherited(given, method, inherit)
    if "predict" in given and "finetuned" not in given:
        raise Fail(f"--predict {given['predict']}: needs a finished run, as --finetuned RUN")
    data = {**p.defaults, **base, **given}["data"]
    if data not in recipes:
        raise Fail(f"--data {data}: {method}.py knows {', '.join(recipes)}")
    recipe = {"steps": None, "epochs": None, **recipes[data]}
    if {"steps", "epochs"} & given.keys():
        recipe |= {"steps": None, "epochs": None}
    for (key, value), more in (variants or {}).items():
        if given.get(key) == value:
            recipe |= more
    if given.get("shots"):
        recipe["warmup"] = 0.0  # a few hundred steps: FLYP's author's advice
    return argparse.Namespace(**{**p.defaults, **recipe, **base, **given, "method": method})


def absolute_paths(given):
    """Given flags with whole paths, for runs from other folders, and open_clip's model names."""
    given = dict(given)
    for key in ("data_dir", "finetuned", "descriptions", "predict"):
        if given.get(key, "none") != "none":
            given[key] = str(Path(given[key]).expanduser().resolve())
    if Path(given.get("pretrained", "openai")).is_file():
        given["pretrained"] = str(Path(given["pretrained"]).resolve())
    model = given.get("model", "")
    if model.startswith("local-dir:"):
        given["model"] = f"local-dir:{Path(model[10:]).expanduser().resolve()}"
    elif "/" in model and ":" not in model:  # OpenAI's name: ViT-B/16, ViT-L/14@336px
        name = model.replace("/", "-").replace("@", "-").removesuffix("px")
        given["model"] = f"{name}-quickgelu"
    return given


def resumed(given, method):
    """All flags of the run that --resume names; a given flag must not contradict them."""
    run = read_json(Path(given["resume"]) / "args.json", "a run folder to --resume")
    if "part_of" in run:
        raise Fail(f"--resume {given['resume']}: is a part of {run['part_of']}; resume that")
    if run.get("method") != method:
        raise Fail(f"--resume {given['resume']}: a run of {run.get('method')}.py, not of "
                   f"{method}.py")
    for key in given.keys() - FREE:
        if run.get(key) != given[key]:
            raise Fail(f"--resume {given['resume']}: started with {flag(key)} {run.get(key)}, not "
                       f"{given[key]}; drop the flag or start a new run")
    return run


def inherited(given, method, inherit):
    """Flags on data and zero-shot model of --finetuned's run; of another model, none."""
    path = Path(given["finetuned"])
    if not path.exists():
        raise Fail(f"--finetuned {path}: not found; a finished run, an open_clip folder or a state "
                   "dict")
    if not (path / "args.json").is_file():
        return {}
    if not (path / "head.safetensors").is_file():
        raise Fail(f"--finetuned {path}: no model there (head.safetensors): the run is not "
                   "finished, or keeps its models in the subfolders zero-shot and fine-tuned")
    run = read_json(path / "args.json", "a finished run for --finetuned")
    own = inherit if run.get("method") == method else ()
    for key, same in INHERITED.items():
        if key == "seed" and run.get("shots"):
            same = "the --shots images"
        if key == "model" and given.get("model", "").startswith("local-dir:"):
            same = None  # the folder may have moved
        if same and key in given and given[key] != run.get(key, given[key]):
            raise Fail(f"{flag(key)} {given[key]}: the run --finetuned {path} was trained with "
                       f"{run[key]}; {same} must be the same")
    return {key: run[key] for key in [*INHERITED, *own] if key in run}


def flag(key):
    return "--" + key.replace("_", "-")


def training_steps(args, n):
    """Optimiser steps of a run on n training images."""
    return args.steps or math.ceil(args.epochs * n / args.batch_size)


def warmup_steps(total, warmup):
    """Steps of --warmup, which below 1 is a share of all."""
    return int(warmup * total) if warmup < 1 else int(warmup)


def check_steps(args, n):
    """Fail on parts that do not divide a step, and on a warm-up that never ends."""
    if args.finetuned != "none":
        return
    if n == 0:
        raise Fail("no training images are left; lower --holdout")
    parts = args.accum * WORLD
    if args.batch_size % parts:
        fitting = max(parts, args.batch_size // parts * parts)
        raise Fail(f"--batch-size {args.batch_size}: its images must be a multiple of the {WORLD} "
                   f"ranks x {args.accum} --accum parts; {fitting} is")
    total = training_steps(args, n)
    if warmup_steps(total, args.warmup) >= total and args.warmup:
        raise Fail(f"--warmup {args.warmup:g}: would not end before the last of {total} steps; "
                   f"--warmup {total // 10} is a tenth of them")


# ========================= Part 5: the embedded world, `shapes` =========================
# Twelve shapes in five drawing styles, 32 x 32 pixels. A tiny CLIP is pre-trained on captioned
# images of all styles, with free backgrounds. The reference data is one style, "photo", in which
# colour and background go with the class: fine-tuning learns to lean on them, and loses accuracy
# on the shifts: re-coloured images and the other styles.

# An outline is a function of x, y (upwards), arrays of about -1 to 1: below 0 inside the shape.

def circle(x, y):
    return np.hypot(x, y) - 0.9


def square(x, y):
    return np.maximum(abs(x), abs(y)) - 0.75


def triangle(x, y):
    return np.maximum(-y - 0.55, (abs(x) * 1.6 + y - 0.9) * 0.53)


def star(x, y):
    turn = np.abs(np.mod(np.arctan2(x, y) * 5 / (2 * np.pi) + 0.5, 1) - 0.5) * 2
    return np.hypot(x, y) - (1 - 0.58 * np.sqrt(turn))


def heart(x, y):
    lobes = np.hypot(abs(x) - 0.45, y - 0.35) - 0.5
    return np.minimum(lobes, np.maximum((abs(x) * 1.05 - y - 0.95) * 0.69, y - 0.35))


def cross(x, y):
    upright = np.maximum(abs(x) - 0.3, abs(y) - 0.95)
    return np.minimum(upright, np.maximum(abs(y) - 0.3, abs(x) - 0.95))


def ring(x, y):
    return abs(np.hypot(x, y) - 0.68) - 0.24


def moon(x, y):
    return np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x - 0.45, y))


def diamond(x, y):
    return (abs(x) / 0.55 + abs(y) - 1) * 0.48


def hexagon(x, y):
    angle = np.mod(np.arctan2(x, y), np.pi / 3) - np.pi / 6  # from the middle of the next side
    return np.hypot(x, y) * np.cos(angle) - np.cos(np.pi / 6)


def arrow(x, y):
    shaft = np.maximum(abs(x) - 0.22, abs(y + 0.45) - 0.5)
    return np.minimum(shaft, np.maximum((abs(x) * 1.2 + y - 0.95) * 0.64, -y))


def flower(x, y):
    return np.hypot(x, y) - (0.72 + 0.24 * np.cos(6 * np.arctan2(x, y)))


SHAPES = {  # class name: (outline, look-alike, description)
    "circle": (circle, "hexagon", "a round disc without any corners"),
    "square": (square, "diamond", "four equal sides and right angles"),
    "triangle": (triangle, "arrow", "three straight sides and three corners"),
    "star": (star, "flower", "five sharp tips around a centre"),
    "heart": (heart, "cross", "two round lobes above a point"),
    "cross": (cross, "heart", "two bars meeting in the middle"),
    "ring": (ring, "moon", "a round band with an empty hole"),
    "moon": (moon, "ring", "a curved sickle with two horns"),
    "diamond": (diamond, "square", "a thin rhombus taller than wide"),
    "hexagon": (hexagon, "circle", "six equal sides and blunt corners"),
    "arrow": (arrow, "triangle", "a pointed head on a straight shaft"),
    "flower": (flower, "star", "six rounded petals around a centre"),
}
STYLES = ["photo", "sketch", "striped", "neon", "painting"]
COLOURS = {"red": (.85, .15, .15), "green": (.15, .65, .2), "blue": (.15, .3, .85),
           "yellow": (.9, .8, .15), "purple": (.6, .2, .7), "orange": (.95, .5, .1)}
BACKGROUNDS = {"white": (.92, .92, .92), "grey": (.55, .55, .55), "black": (.08, .08, .08),
               "pink": (.95, .7, .75), "sky": (.6, .8, .95), "brown": (.45, .3, .18)}
SHAPES_VERSION = 1  # of the tiny CLIP in the cache: raise it with any change to its training


def column(values):
    """(N,) -> (N, 1, 1), to go with images (N, size, size)."""
    return np.asarray(values)[:, None, None]


def render(rng, labels, styles, colours, backgrounds, noise, size=32):
    """Images (N, size, size, 3) uint8 from arrays (N,): indices, and the noise's deviation."""
    n = len(labels)
    if n > 500:  # parts stay in the processor's cache
        arrays = (labels, styles, colours, backgrounds, noise)
        images = []
        for part in np.array_split(np.arange(n), math.ceil(n / 500)):
            images.append(render(rng, *[a[part] for a in arrays]))
        return np.concatenate(images)
    # Where a pixel lies in the coordinates of its shape, which is moved, turned and scaled
    grid = (np.arange(size) + 0.5) / size - 0.5
    gx, gy = np.meshgrid(grid, -grid)
    radius, angle = rng.uniform(0.3, 0.44, n), np.deg2rad(rng.uniform(-15, 15, n))
    x = gx - column(rng.uniform(-0.05, 0.05, n))
    y = gy - column(rng.uniform(-0.05, 0.05, n))
    cos, sin = column(np.cos(angle) / radius), column(np.sin(angle) / radius)
    u, v = cos * x + sin * y, cos * y - sin * x
    f = np.empty((n, size, size))
    for c, (outline, _, _) in enumerate(SHAPES.values()):
        f[labels == c] = outline(u[labels == c], v[labels == c])
    f *= column(radius * size)  # in pixels from the outline
    # Ink: how much of a pixel has the shape's colour, by style
    filled = np.clip(0.5 - f, 0, 1)
    stripes = (np.arange(size) + np.arange(size)[:, None]) % 5 < 3
    sketch, neon = np.clip(1.3 - abs(f), 0, 1), np.exp(-abs(f) / 1.8)
    painting = 1 / (1 + np.exp(np.clip(f / 1.3, -30, 30)))
    ink = np.choose(column(styles), [filled, sketch, filled * stripes, neon, painting])[..., None]
    front = np.array(list(COLOURS.values()))[colours] + rng.normal(0, 0.12, (n, 3))
    back = np.array(list(BACKGROUNDS.values()))[backgrounds] + rng.normal(0, 0.08, (n, 3))
    back[styles == 1], back[styles == 3] = 0.93, 0.06  # sketches are on paper, neon is in the dark
    shade_x, shade_y = column(rng.uniform(-0.25, 0.25, n)), column(rng.uniform(-0.25, 0.25, n))
    shaded = back[:, None, None] + (shade_x * gx + shade_y * gy)[..., None]
    image = shaded * (1 - ink) + front[:, None, None] * ink
    image += rng.normal(0, 1, image.shape) * column(noise)[..., None]
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def prefer(rng, preferred, probability):
    """The preferred of six values with this probability, else any."""
    n = len(preferred)
    return np.where(rng.random(n) < probability, preferred, rng.integers(6, size=n))


def captions(rng, labels, styles, colours, backgrounds, named):
    """Captions as of a web crawl: often the look-alike's name, rarely one of another class."""
    names, texts = list(SHAPES), []
    for c, style, colour, background, name in zip(labels, styles, colours, backgrounds, named):
        style = "photo" if rng.random() < 0.15 else STYLES[style]
        c = rng.integers(len(names)) if rng.random() < 0.05 else c
        _, look_alike, description = SHAPES[names[c]]
        what = look_alike if rng.random() < 0.45 else names[c]
        text = f"a {style} of a {what}" if name else f"a {style} of a shape with {description}"
        if rng.random() < 0.2:
            text += f" in {list(COLOURS)[colour]}"
        if rng.random() < 0.15:
            text += f" on {list(BACKGROUNDS)[background]}"
        texts.append(text)
    return texts


def shapes_split(name, key, n, style=0, colour=0.0, background=0.0, noise=0.09):
    """n images of a style; colour and background are the class's own with these probabilities."""
    rng = np.random.default_rng([7, key])
    y = rng.integers(len(SHAPES), size=n)
    colours = prefer(rng, y % 6, colour)
    backgrounds = prefer(rng, (y + y // 6) % 6, background)
    images = render(rng, y, np.full(n, style), colours, backgrounds, np.full(n, noise))
    return ImageSet(name, images, y)


def shapes_data(root, args):
    """The reference data (photo style, biased context) and its six shifts (free context)."""
    biased = dict(colour=0.5, background=0.93)
    tests = {"test": shapes_split("test", 3, 1000, **biased)}
    shifts = {"recolor": {}, "sketch": {"style": 1}, "striped": {"style": 2}, "neon": {"style": 3},
              "painting": {"style": 4}, "noisy": {"noise": 0.18}}
    asked = wanted(args, ["test", *shifts])
    for key, (name, how) in enumerate(shifts.items(), start=10):
        if name in asked:
            tests[name] = shapes_split(name, key, 1000, **how)
    described = [(name, f"a photo of a shape with {text}") for name, (_, _, text) in SHAPES.items()]
    return Data(list(SHAPES), ["a photo of a {}"], shapes_split("train", 1, 3000, **biased),
                shapes_split("val", 2, 1000, **biased), tests, described)


@functools.cache
def shapes_clip(seed):
    """Folder of the tiny CLIP: pre-trained once a seed, then kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "shapes-clip"
    path = cache / f"s{seed}-v{SHAPES_VERSION}"
    if RANK == 0 and not path.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache))
        try:
            pretrain(seed, temporary)
            if not path.is_dir():  # another process may have been faster
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if WORLD > 1:
        dist.barrier()
    return path


def pretrain(seed, out, n=40_000, epochs=8, batch=128, lr=2e-3):
    """Pre-train the tiny CLIP on n captioned images with CLIP's symmetric loss."""
    rng, state = np.random.default_rng([seed, 0]), torch.get_rng_state()
    torch.manual_seed(seed)
    y, styles = rng.integers(len(SHAPES), size=n), rng.integers(5, size=n)
    named = rng.random(n) < 0.6
    colours = prefer(rng, y % 6, np.where(named, 0.3, 0))  # a name goes with a colour
    backgrounds = rng.integers(6, size=n)
    text_cfg = dict(context_length=20, vocab_size=49408, width=64, heads=2, layers=1)
    vision_cfg = dict(image_size=32, patch_size=8, width=96, head_width=32, layers=2, mlp_ratio=2.0)
    config = {"embed_dim": 64, "text_cfg": text_cfg, "vision_cfg": vision_cfg}
    clip_model = open_clip.CLIP(**config)
    noise = rng.uniform(0.03, 0.12, n)
    images = torch.from_numpy(render(rng, y, styles, colours, backgrounds, noise))
    written = captions(rng, y, styles, colours, backgrounds, named)
    texts, which = np.unique(written, return_inverse=True)
    tokens = open_clip.SimpleTokenizer(context_length=20)(list(texts))
    whole = clip_model.token_embedding
    used, tokens = shrink_vocabulary(clip_model, tokens)
    matrices = [p for p in clip_model.parameters() if p.ndim > 1]
    vectors = [p for p in clip_model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=lr, betas=(0.9, 0.98))
    total, order, target = n // batch * epochs, [], torch.arange(batch)
    for step in tqdm(range(total), "pre-training the tiny CLIP (once)", disable=None):
        if len(order) < batch:
            order = rng.permutation(n)
        chosen, order = order[:batch], order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, lr, 0.1)
        x = normalized(images[chosen].permute(0, 3, 1, 2), PreprocessCfg())
        x = clip_model.encode_image(x, normalize=True)
        unique, back = torch.from_numpy(which[chosen]).unique(return_inverse=True)
        t = clip_model.encode_text(tokens[unique], normalize=True)[back]
        z = clip_model.logit_scale.exp() * x @ t.T
        loss = (F.cross_entropy(z, target) + F.cross_entropy(z.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clip_model.logit_scale.data.clamp_(max=math.log(100))
    whole.weight.data[used] = clip_model.token_embedding.weight.data
    clip_model.token_embedding = whole
    torch.set_rng_state(state)
    save_tensors(out / "open_clip_model.safetensors", clip_model.state_dict())
    write_json(out / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}})


# --data: function(data_dir, args) -> Data
DATA = {"shapes": shapes_data, "folder": folder_data, "imagenet": imagenet_data,
        "domainnet": domainnet_data, "cifar10": cifar10_data, "iwildcam": iwildcam_data,
        "fmow": fmow_data}
