"""What the four methods share: data, CLIP loading, mixed-precision training, evaluation.

    Part 1  What determines a number    all that an auditor of a method reads
    Part 2  Files of a run              checkpoints, logs, saved models, predictions, tables
    Part 3  Data sets                   trees and lists, as they are published
    Part 4  Flags and mistakes          recipes, --resume, --finetuned

Of Parts 2 to 4 these enter a number too, besides the choice of images, labels and flags:
    tower_precision    bf16 (else fp16) towers on CUDA, fp32 elsewhere; TF32 is off with fp32
    train_mode         a frozen part stays in eval mode
    share_buffers      BatchNorm's statistics are rank 0's
    load_clip          a tag's QuickGELU must be the model's; a weights file cannot tell its own
    load_finetuned     a foreign CLIP's head is made by its own text tower, with its own s
    id_ood             OOD is the mean over the shifts, each in its own metric
    OF_DATA            what a data set brings to every method's recipe

No part knows a method: losses, ensembles and equations are in wise_ft.py, lipsum_ft.py, vrf.py
and drm.py. Symbols in all files: F(x) unit image feature, s = exp(logit_scale), W (C, D) text head,
z = s F(x) W^T logits; B batch, C classes, D embedding width. Features are fp32; mixed precision
applies to the towers only, never to a loss.
"""
import argparse
import copy
import csv
import functools
import hashlib
import itertools
import json
import logging
import math
import operator
import os
import signal
import sys
import time
import unicodedata
import warnings
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.data import BatchSampler
from torchvision import transforms
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))         # set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")
EVAL_BATCH = 250  # on any number of ranks, so that an evaluation's digits do not depend on it
READ_EVERY = 20   # steps between two readings of the losses from the device


# ============================ Part 1: what determines a number ============================

@dataclass
class Setup:
    """What a run starts from. A run is: load_data, start, preview, train, evaluate, finish."""
    args: argparse.Namespace
    data: "Data"             # class names, prompts, training, held-out and test images
    clip: nn.Module          # the pre-trained open_clip model, which stays as it is
    tokenizer: object
    amp: torch.dtype | None  # of the towers; None is fp32

    @functools.cached_property
    def out(self):
        """The run's folder, made when it is first needed: a mistake leaves nothing behind."""
        return run_folder(self.args)

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


def start(args, data):
    """A Setup, with CLIP. Finds every mistake that it can; writes nothing but downloads."""
    if args.predict:
        raise Fail(f"--predict: {args.method}.py does not use it")
    torch.manual_seed(args.seed)
    amp = tower_precision(args)
    check_steps(args, data)
    clip_model, tokenizer = load_clip(args)
    describe(args, data)
    check_same(args, data, clip_model, amp)
    preprocess = PreprocessCfg(**clip_model.visual.preprocess_cfg)
    for images in (data.train, data.val, *data.tests.values()):
        images.prepare(preprocess)
    return Setup(args, data, clip_model, tokenizer, amp)


# ---- CLIP and its heads ----

def encode_texts(clip_model, tokens):
    """G(t): unit-norm text features (m, D), fp32, of tokens (m, n) on the CPU.

    Causal towers are computed up to the longest text's end only, which is exact: their feature is
    read at EOT, the largest id. Others need the whole context. ValueError if n is more, or less
    where it may not be.
    """
    device, context = clip_model.logit_scale.device, clip_model.context_length
    tower = getattr(clip_model, "text", clip_model)  # open_clip.CLIP holds the tower's parts itself
    pooling = getattr(tower, "pool_type", getattr(tower, "text_pool_type", None))
    causal = getattr(tower, "attn_mask", None) is not None and pooling == "argmax"
    causal = causal and getattr(tower, "cls_emb", None) is None  # CoCa reads a token of its own
    if tokens.shape[1] > context or (tokens.shape[1] < context and not causal):
        raise ValueError(f"{tokens.shape[1]} tokens for a text tower of {context} positions")
    if not causal:
        tokens = tokens.to(device, non_blocking=True)
        return F.normalize(clip_model.encode_text(tokens).float(), dim=-1)
    end = tokens.argmax(dim=1)                                              # (m,) of EOT
    n = int(end.max()) + 1
    tokens, end = tokens[:, :n].to(device, non_blocking=True), end.to(device, non_blocking=True)
    x = tower.token_embedding(tokens) + tower.positional_embedding[:n]      # (m, n, width)
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:n, :n]))
    x = x[torch.arange(len(x), device=device), end]                         # (m, width)
    projection = tower.text_projection
    x = projection(x) if callable(projection) else x @ projection           # (m, D)
    return F.normalize(x.float(), dim=-1)


def tokenize(texts, tokenizer, context):
    """Tokens (m, context) of texts. One that would be cut is refused, and two that become one."""
    tokens, of_tokens = tokenizer(texts, context_length=context + 1), {}
    pad = getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", 0)
    for text, key in zip(texts, map(tuple, tokens.tolist())):
        if key[context] != pad:
            raise Fail(f"longer than the {context} tokens of the text tower: '{text[:80]}...'")
        if of_tokens.setdefault(key, text) != text:  # in case or spaces
            raise Fail(f"'{of_tokens[key]}' and '{text}' are one text to the tokenizer")
    return tokens[:, :context]


def zero_shot_head(clip_model, tokenizer, classnames, templates):
    """W (C, D), unit rows: encode a class's templates, normalise each, average, normalise.

    Source: open_clip; wise-ft src/models/zeroshot.py is the same times s. templates: strings with
    one {}, or functions of the name.
    """
    device, context = clip_model.logit_scale.device, clip_model.context_length
    texts = [t if isinstance(t, str) else t("{}") for t in templates]
    tokens = tokenizer(texts, context_length=context + 1)
    lengths = (tokens != tokens[:, -1:]).sum(dim=1)  # a short text ends in padding
    longest = texts[int(lengths.argmax())]
    # Refuses what open_clip would cut without a word
    tokenize([longest.format(name) for name in classnames], tokenizer, context)
    return open_clip.build_zero_shot_classifier(clip_model, tokenizer, classnames, templates,
                                                device=device).T


class ImageClassifier(nn.Module):
    """An image tower and a linear head: x (B, 3, H, W) -> logits (B, C), unit features (B, D).

    logits = scale * features @ head.T (+ bias). Two conventions are in use, and under AdamW the
    same learning rate moves their logits about s times differently:
      unit (Lipsum-FT; DRM's df head as saved, tuned s): head = W, s outside, no bias;
      folded (WiSE-FT, VRF): head = s W, scale = 1, a zero-initialised trainable bias.
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


def logits_of(model, images):
    """Logits (B, C) of an ImageClassifier."""
    return model(images)[0]


# ---- Images: which, how they are read, their label space ----

def seed_of(*key):
    """A seed for torch from numbers alone, whatever was drawn before."""
    return int(np.random.default_rng(key).integers(2**63))


def read_image(path):
    """RGB image of a file, by PIL's convert("RGB") as in torchvision's loader.

    So transparency is dropped, and what a camera says of its rotation (EXIF) is not applied.
    """
    with Image.open(path) as image:
        if image.mode.startswith("I") or image.mode == "F":
            raise ValueError(f"not 8 bits a channel: PIL's mode {image.mode}")
        if max(image.size) > 100 * min(image.size):
            raise ValueError(f"{image.size[0]} x {image.size[1]} pixels")
        return image.convert("RGB")


class ImageSet(torch.utils.data.Dataset):
    """Labelled images: index or (epoch, index) -> (uint8 (3, H, W), label, index), if prepare()d.

    images: paths (N,), or uint8 array (N, H, W, 3).
    classes: the label space, a list with the ids of each label, see project(); None is all.
    metric: the one of metrics() that tables and means show.
    groups: (N,) int, the group of each image, -1 (the default) is none.
    border: pixels cut from each side of an image before the transform.
    """
    transform = preprocess = seed = None

    def __init__(self, name, images, labels, classes=None, metric="acc", groups=None, border=0):
        if not len(labels) or len(labels) != len(images):
            raise Fail(f"{name}: {len(images)} images, {len(labels)} labels")
        if not isinstance(images, np.ndarray):
            # One array of bytes: every worker process would copy a list of a million strings.
            images = np.array([os.fsencode(path) for path in images])
        if classes is not None:  # padded with a label's first id, which cannot change its maximum
            most = max(map(len, classes))
            classes = torch.tensor([[*ids, *ids[:1] * (most - len(ids))] for ids in classes])
        self.name, self.images, self.metric, self.border = name, images, metric, border
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        self.groups = torch.as_tensor([-1] * len(labels) if groups is None else groups)
        self.classes, self.on_disk = classes, images.ndim == 1

    def but(self, **changes):
        """A copy in which some attributes are others."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def prepare(self, preprocess):
        """Set how images are resized, cropped and normalised: an open_clip PreprocessCfg."""
        self.preprocess, self.transform = preprocess, image_transform(preprocess)

    def augmented(self, kind, seed):
        """A copy for training whose random draws depend on (seed, epoch, image) alone."""
        return self.but(transform=image_transform(self.preprocess, kind), seed=seed)

    def subset(self, indices):
        """A copy of the images at these indices."""
        return self.but(images=self.images[indices], labels=self.labels[indices],
                        groups=self.groups[indices])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, item):
        epoch, i = item if isinstance(item, tuple) else (0, item)
        with torch.random.fork_rng(devices=[], enabled=self.seed is not None):
            if self.seed is not None:
                torch.default_generator.manual_seed(seed_of(self.seed, epoch, i))
            return self.pixels(i), self.labels[i], i

    def pixels(self, i):
        """uint8 (3, H, W) of image i; whatever a file raises is one sentence that names it."""
        if not self.on_disk:
            return self.transform(Image.fromarray(self.images[i]))
        path = os.fsdecode(self.images[i])
        with told(f"{path}: cannot be read as an image",
                  "; put a readable one of that name in its place"):
            return self.transform(ImageOps.crop(read_image(path), self.border))

    def normalized(self, pixels):
        """uint8 (B, 3, H, W) -> (pixels / 255 - mean) / std, as open_clip's transform."""
        x = pixels.float().div_(255)
        for c, (mean, std) in enumerate(zip(self.preprocess.mean, self.preprocess.std)):
            x[:, c].sub_(mean).div_(std)  # by numbers: to move tensors of them would wait
        return x

    def project(self, logits):
        """Logits (B, C) -> (B, C') in this set's label space: the largest of each label's ids.

        Always before a softmax.
        """
        if self.classes is None:
            return logits
        return logits[:, self.classes.to(logits.device)].amax(dim=2)


@dataclass
class Data:
    """A data set."""
    classnames: list      # C
    templates: list       # prompts
    train: ImageSet
    val: ImageSet | None  # None: load_data() holds out training images
    tests: dict           # name -> ImageSet; the first is the ID test, all others are shifts
    descriptions: list = None  # (key, value) pairs of a descriptions.json
    aliases: list = None       # a second name of each class, for them
    texts: list = None         # further texts of a method, which --resume must find again

    def counts(self):
        """[(class, training images), ...]"""
        counts = self.train.labels.bincount(minlength=len(self.classnames)).tolist()
        return list(zip(self.classnames, counts))


def load_data(args):
    """--data -> Data, with --limit, --holdout and --shots applied."""
    with as_published(args.data_dir):
        data = DATA[args.data](Path(args.data_dir), args)
    for images in (data.train, data.val or data.train, *data.tests.values()):
        space = data.classnames if images.classes is None else images.classes
        if images.labels.max() >= len(space):
            raise Fail(f"{images.name}: label {images.labels.max()} of {len(space)} classes")
    if data.val is None:
        most = min(args.shots, 4) or math.inf
        data.train, data.val = hold_out(data.train, args.holdout, most)
    if args.shots:
        for name, n in data.counts():
            if n < args.shots:
                raise Fail(f"--shots {args.shots}: '{name}' has {n} training images beside those "
                           f"held out, {len(data.val)} in all")
        data.train = data.train.subset(sample_classes(data.train, args.seed, lambda n: args.shots))
    if args.limit:
        data.train, data.val = limited(data.train, args.limit), limited(data.val, args.limit)
        data.tests = {name: limited(images, args.limit) for name, images in data.tests.items()}
    return data


def limited(images, n):
    """n images, the same in every run and method."""
    return images.subset(np.random.default_rng(0).permutation(len(images))[:n])


def sample_classes(images, seed, count):
    """Sorted indices of count(n) images of each class, drawn by `seed` from the n that it has."""
    rng, chosen = np.random.default_rng(seed), []
    for c in images.labels.unique().tolist():
        own = np.flatnonzero(images.labels.numpy() == c)
        chosen += rng.permutation(own)[:count(len(own))].tolist()
    return np.array(sorted(chosen), dtype=np.int64)


def hold_out(train, share, most=math.inf):
    """(train, val): every class gives `share` of its images, never its last and at most `most`;
    the same whatever the seed."""
    held = sample_classes(train, 0, lambda n: min(round(share * n), n - 1, most))
    kept = np.setdiff1d(np.arange(len(train)), held)
    return train.subset(kept), train.subset(held).but(name="val")


# ---- Batches: order, augmentation ----

class Batch(NamedTuple):
    images: torch.Tensor  # (B, 3, H, W) normalised
    labels: torch.Tensor  # (B,) int64
    index: torch.Tensor   # (B,) int64, position in the data set, on the CPU
    step: int             # for random draws that are the same on every rank and after a resume


def shuffled_epochs(n, args, first, last):
    """Epochs end to end, cut into full batches: this rank's lists of (epoch, index).

    Step t covers positions t B .. (t+1) B - 1 of the stream, B = --batch-size. Its images do not
    depend on how B is split into parts for ranks and --accum, and a run goes on from any step.
    """
    @functools.lru_cache(2)  # this epoch and the next
    def permutation(epoch):
        return np.random.default_rng([args.seed, epoch]).permutation(n)

    parts = args.accum * WORLD  # of a step
    size = args.batch_size // parts
    for part in range(first * parts + RANK, last * parts, WORLD):
        positions = range(part * size, (part + 1) * size)
        yield [(p // n, int(permutation(p // n)[p % n])) for p in positions]


def batches_of(images, args, first, last):
    """This rank's Batches of steps first .. last - 1, --accum of them a step, on the device."""
    order = shuffled_epochs(len(images), args, first, last)
    for i, (pixels, labels, index) in enumerate(image_loader(images, order, args.workers)):
        x = images.normalized(pixels.to(DEVICE, non_blocking=True))
        yield Batch(x, labels.to(DEVICE, non_blocking=True), index, first + i // args.accum)


def image_transform(preprocess, augment="none"):
    """PIL image -> uint8 (3, H, W): open_clip's transform but for ToTensor and Normalize.

    none: resize, centre crop; crop: RandomResizedCrop of 90-100% of the area, wise-ft's;
    crop-flip: 8-100%, after a random flip, for Lipsum-FT. All bicubic, antialiased; crops are 3:4
    to 4:3 in shape. ImageSet.normalized() does the rest.
    """
    smallest = {"none": 1.0, "crop": 0.9, "crop-flip": 0.08}[augment]
    whole = image_transform_v2(preprocess, augment != "none", {"scale": (smallest, 1.0)})
    flip = [transforms.RandomHorizontalFlip()] if augment == "crop-flip" else []
    return transforms.Compose([*flip, *whole.transforms[:-2], transforms.PILToTensor()])


# ---- Training ----

def training_steps(args, n):
    """Optimiser steps of a run on n training images."""
    return args.steps or math.ceil(args.epochs * n / args.batch_size)


def learning_rate(step, total, peak, warmup):
    """Linear warm-up, then cosine towards 0 (wise-ft src/models/utils.py).

    warmup: steps, or below 1 a share of total.
    """
    warm = int(warmup * total) if warmup < 1 else int(warmup)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def make_optimizer(model, args):
    """AdamW on every trained parameter. Another one may have groups with rates of their own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.wd, fused=CUDA)


def optimizer_step(runner, loss_fn, parts, optimizer, scaler, grad_clip):
    """One step on the Batches `parts`; mean losses {name: ()}, left on the device.

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
        nn.utils.clip_grad_norm_(list(runner.parameters()), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return means


def train(model, loss_fn, setup, out=None, predict=logits_of, frozen=()):
    """A trained copy of `model` in eval mode; every step is logged to out/log.jsonl.

    loss_fn(forward, Batch) -> (loss (), {name: scalar}) is the method; forward is the model's,
    compiled or distributed. predict(model, images) -> logits (B, C) is measured on the held-out
    images after every epoch; --keep best returns the weights of the best. frozen: a tuple of
    prefixes of the parameters that are not trained. Training goes on from out/last.ckpt if that
    is there, on the same CPU bit for bit.
    """
    args, out = setup.args, out or setup.out
    images = setup.data.train.augmented(args.augment, args.seed)
    n, B, total = len(images), args.batch_size, training_steps(args, len(images))
    model, runner = trainable(model, args, frozen)
    optimizer = make_optimizer(model, args)
    peaks = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=setup.amp == torch.float16)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    first, best, written = load_checkpoint(out / "last.ckpt", state) or (0, {}, 0)
    log, unread, saved = open_log(out / "log.jsonl", written), [], time.time()
    batches = batches_of(images, args, first, total)

    def save():
        write_log(log, unread)
        save_checkpoint(out / "last.ckpt", state, (step, best, log.tell()))

    with stop_signals() as stop, progress(first, total, out.name) as bar:
        for step in range(first, total + 1):  # steps done; the last turn only saves and measures
            ended = step and (step * B % n < B or step == total)  # an epoch, or all
            reads = ended or step % READ_EVERY == 0  # no other step waits for the device
            if reads:
                write_log(log, unread)
            if step == total or reads and time.time() - saved >= 60 * args.save_every:
                save()
                saved = time.time()
            stops = (reads or WORLD == 1) and any(gathered([bool(stop)]))
            try:
                if stops:
                    raise Fail("stopped")
                parts = list(itertools.islice(batches, args.accum))
                if ended and len(setup.data.val):
                    best = held_out(model, predict, setup, best, log, step)
            except (Fail, RuntimeError) as error:  # a broken image; a signal that hit a worker too
                if not (stop or isinstance(error, Fail)):
                    raise
                if stops or WORLD == 1:
                    save()
                raise Fail(f"{error if isinstance(error, Fail) else 'stopped'}; "
                           f"--resume {setup.out} goes on") from None
            if parts:
                for group, peak in zip(optimizer.param_groups, peaks):
                    group["lr"] = learning_rate(step, total, peak, args.warmup)
                losses = optimizer_step(runner, loss_fn, parts, optimizer, scaler, args.grad_clip)
                unread.append(({"step": step, "lr": group["lr"]}, losses))
                bar.update()
    if best:
        model.load_state_dict(best["model"])
    return share_buffers(model.eval())


def held_out(model, predict, setup, best, log, step):
    """Log the accuracy on held-out images after some steps; the best so far, for --keep best."""
    def rows(images, project):
        return {"model": predict(model, images)}
    share_buffers(model.eval())
    accuracy = evaluate(rows, setup, {"val": setup.data.val})["model"]["val"]["acc"]
    train_mode(model)
    say(f"step {step}: {accuracy:.2f}% of the held-out images are right")
    log.write(json.dumps({"step": step, "held_out_acc": accuracy}) + "\n")
    if setup.args.keep == "last" or accuracy <= best.get("accuracy", -1):
        return best
    weights = {name: x.cpu().clone() for name, x in model.state_dict().items()}
    return {"accuracy": accuracy, "model": weights}


# ---- Evaluation ----

@torch.no_grad()
def collect(function, images, setup):
    """{name: tensor (N, ...)} of function(x, labels) -> {name: tensor (B, ...)}, in order, on CPU.

    Each image is read once. Batches are dealt out to the ranks and put back.
    """
    batches = list(BatchSampler(range(len(images)), EVAL_BATCH, False))[RANK::WORLD]
    loader, found = image_loader(images, batches, setup.args.workers), []
    for pixels, labels, index in tqdm(loader, images.name, disable=RANK > 0 or None, leave=False):
        x = images.normalized(pixels.to(DEVICE, non_blocking=True))
        result = function(x, labels.to(DEVICE, non_blocking=True))
        found.append((int(index[0]), {name: value.cpu() for name, value in result.items()}))
    columns = defaultdict(list)
    for _, result in sorted(gathered(found)):  # by their first images, of which no two are equal
        for name, value in result.items():
            columns[name].append(value)
    return {name: torch.cat(values) for name, values in columns.items()}


def evaluate(rows, setup, sets=None):
    """{row: {name: metrics}} over {name: ImageSet}, by default all test sets, each streamed once.

    rows(images, project) -> {row: logits or log-probabilities (B, C')}; project() brings logits
    (B, C) into the set's label space; a row (B,) stays as it is, (N,). each(models) makes such a
    function.
    """
    results = {}
    for name, images in (sets or setup.data.tests).items():
        def scores(x, labels):
            found = rows(x, images.project)
            return {row: image_scores(z, labels) if z.ndim == 2 else z for row, z in found.items()}
        for row, found in collect(scores, images, setup).items():
            results.setdefault(row, {})[name] = metrics(found, images) if found.ndim == 2 else found
    return results


def features_of(model, images, setup):
    """Unit features (N, D) of a set's un-augmented images."""
    return collect(lambda x, labels: {"features": model(x)[1]}, images, setup)["features"]


def each(models):
    """rows() for evaluate(): one row for each {row name: ImageClassifier}."""
    def rows(images, project):
        return {name: project(logits_of(model, images)) for name, model in models.items()}
    return rows


def log_probabilities(p):
    """log p (B, C) in float64 for evaluate(); an underflow is the smallest normal double."""
    return p.double().clamp(min=torch.finfo(torch.double).tiny).log()


def image_scores(logits, labels):
    """(B, 3) float64: largest probability, its class, negative log-likelihood of the label.

    logits (B, C): or log-probabilities.
    """
    log_p = logits.double().log_softmax(dim=1)
    confidence, predicted = log_p.max(dim=1)
    nll = -log_p.gather(1, labels[:, None])[:, 0]
    return torch.stack([confidence.exp(), predicted, nll], dim=1)


def choose(accuracy, weight):
    """Index of the best accuracy (K,); of equals, whose mean weight (K,) is nearest 0.5."""
    return max(range(len(weight)), key=lambda i: (accuracy[i], -abs(weight[i] - 0.5)))


# ---- Metrics ----

def metrics(scores, images):
    """Accuracies, ECE and the set's own metric in percent, mean NLL in nats.

    scores: image_scores (N, 3). class_acc: by label, NaN without images.
    """
    confidence, predicted, nll = scores.unbind(dim=1)
    if confidence.isnan().any():
        raise Fail(f"{images.name}: the model's outputs are not numbers; its weights are broken, "
                   "or --lr was too high")
    correct = predicted == images.labels
    of_classes = images.labels.bincount(100 * correct.double()) / images.labels.bincount()
    found = {"acc": 100 * correct.double().mean().item(), "nll": nll.mean().item(),
             "ece": 100 * calibration_error(confidence, correct), "n": len(images),
             "class_acc": of_classes.round(decimals=2).tolist()}
    if images.metric == "macro_f1":
        found["macro_f1"] = 100 * macro_f1(predicted, images.labels)
    if images.metric == "worst_region" or images.groups.max() >= 0:
        found["worst_region"] = 100 * worst_group_accuracy(correct, images.groups)
    return found


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
    """A new folder for the run, or the one to resume. Nothing is written over."""
    if args.resume:
        return Path(args.resume)
    name = args.finetuned and f"{args.method}-of-{Path(args.finetuned).name}"
    default = Path("runs", name or f"{args.method}-{args.data}-s{args.seed}")
    out, number = Path(args.out or default), 1
    if RANK == 0:
        while out.exists() and not args.out:
            number += 1
            out = Path(f"{default}-{number}")
        out.mkdir(parents=True, exist_ok=bool(args.out))
        write_json(out / "args.json", vars(args))
    return gathered([out])[0]


def write_json(path, value):
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)  # JSON has no NaN
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path, pairs=None):
    """JSON of a file; pairs=list: objects as lists of (key, value), for keys that repeat."""
    with told(f"{path}: not valid JSON", "", OSError):
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=pairs)


# ---- Devices and ranks ----

def tower_precision(args):
    """dtype of the towers, None for fp32."""
    auto = "fp32"
    if CUDA:
        if DEVICE.index >= torch.cuda.device_count():
            raise Fail(f"rank {RANK}: this machine has no GPU {DEVICE.index}; start fewer ranks")
        torch.cuda.set_device(DEVICE)
        auto = "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"  # False: not emulated
    name = auto if args.precision == "auto" else args.precision
    if name == "fp16" and not CUDA:
        raise Fail("--precision fp16: needs a GPU; use bf16 or fp32")
    torch.backends.cudnn.allow_tf32 = name != "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def gathered(mine):
    """The items of every rank's list, rank 0's first."""
    if WORLD == 1:
        return mine
    lists = [None] * WORLD
    dist.all_gather_object(lists, mine)
    return sum(lists, [])


def trainable(model, args, frozen):
    """A copy of `model` in train mode, and its form that loss functions call: distributed, and
    compiled if asked for."""
    if args.finetuned:
        raise Fail(f"--finetuned: {args.method}.py does not use it")
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    train_mode(model)
    if args.grad_checkpointing:
        for module in model.modules():
            if hasattr(module, "set_grad_checkpointing"):
                module.set_grad_checkpointing(True)
    if CUDA:
        model.to(memory_format=torch.channels_last)  # what convolutions on tensor cores want
    runner = model
    if WORLD > 1:
        runner = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False,
                                                     gradient_as_bucket_view=True)
    return model, torch.compile(runner) if args.compile else runner


def train_mode(model):
    """Train mode; a frozen part stays in eval mode, or its BatchNorm would move."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def share_buffers(model):
    """BatchNorm's statistics are of each rank's own images: all take those of rank 0."""
    for buffer in model.buffers() if WORLD > 1 else []:
        dist.broadcast(buffer, 0)
    return model


def image_loader(images, batches, workers, collate=None):
    """A DataLoader over lists of indices; --workers -1: the cores that a rank may use."""
    if workers < 0 and images.on_disk:
        allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
        workers = max(1, len(allowed) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return torch.utils.data.DataLoader(images, batch_sampler=batches, num_workers=max(0, workers),
                                       pin_memory=CUDA, collate_fn=collate,
                                       worker_init_fn=own_group)


def own_group(_):
    """Signals to a terminal's or torchrun's processes reach the main one, which saves first."""
    os.setpgrp()


@contextmanager
def stop_signals():
    """A list that SIGTERM, SIGHUP and Ctrl-C fill, instead of ending the process."""
    came, before = [], {}

    def note(number, _):
        came.append(number)
    for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(s) != signal.SIG_IGN:  # as under nohup
            before[s] = signal.signal(s, note)
    try:
        yield came
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class Lines(tqdm):
    """A progress bar as lines, for log files."""

    @staticmethod
    def status_printer(file):
        return lambda text: print(text, file=file, flush=True)


def progress(first, total, name):
    """A progress bar in a terminal, a line a minute elsewhere."""
    bar, seconds = (tqdm, 0.1) if sys.stderr.isatty() else (Lines, 60)
    return bar(desc=name, total=total, initial=first, disable=RANK > 0, mininterval=seconds,
               maxinterval=60)


# ---- Checkpoints and logs ----

def load_checkpoint(path, parts):
    """What save_checkpoint() was given as next_, or None; parts take their state; runs no code."""
    if not path.is_file():
        return None
    with told(f"{path}: cannot be read", "; remove it to train from the start"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = CUDA  # a CPU's fused kernel takes a GPU's moments in another order
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["next"]


def save_checkpoint(path, parts, next_):
    """All that training goes on from: order and draws follow from the step. A kill while this is
    written, or weights that are not finite, leave the last one."""
    state = {name: part.state_dict() for name, part in parts.items()}
    if not all(x.isfinite().all() for x in state["model"].values()):
        raise Fail(f"step {next_[0]}: the weights are not finite; lower --lr")
    if RANK == 0:
        with told(f"{path}: could not be written", "; is the disk full? The one before is kept"):
            torch.save({**state, "next": next_}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)


def open_log(path, size):
    """log.jsonl, to be written on; what the checkpoint, written at `size` bytes, lacks goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = open(path if RANK == 0 else os.devnull, "a", buffering=1)
    if RANK == 0:
        whole = path.read_bytes()[:size]
        log.truncate(whole.rfind(b"\n") + 1)  # a full disk may have torn its last line too
        log.seek(0, os.SEEK_END)
    return log


def write_log(log, unread):
    """Lines of log.jsonl, [(line, {name: loss}), ...]: losses are means over the ranks.

    Fail at the first that is not finite.
    """
    if not unread:
        return
    values = torch.stack([torch.stack(list(losses.values())) for _, losses in unread])
    if WORLD > 1:
        dist.all_reduce(values)
    for (line, losses), row in zip(unread, (values / WORLD).tolist()):
        line |= zip(losses, row)
        if not math.isfinite(line["loss"]):
            raise Fail(f"step {line['step']}: the loss is {line['loss']}; lower --lr")
        log.write(json.dumps(line) + "\n")
    unread.clear()


# ---- Saved models ----

def load_clip(args):
    """(open_clip model in eval mode, tokenizer) of --model and --pretrained.

    The parameters keep requires_grad=True although nothing trains them in place: without it
    matmul takes a path that copies the weights for each sample.
    """
    name, tag = args.model, args.pretrained or "openai"
    own = name == "shapes-clip" or ":" in name  # local-dir: or hf-hub:
    if own and args.pretrained:
        raise Fail(f"--pretrained {tag}: --model {name} brings its own weights")
    if name == "shapes-clip":
        return embedded().shapes_clip(DEVICE), open_clip.SimpleTokenizer(context_length=20)
    file = not own and not open_clip.get_pretrained_cfg(name, tag) and Path(tag).is_file()
    # Weights trained with QuickGELU in a model without it lose accuracy silently.
    warnings.filterwarnings("error", message="QuickGELU mismatch")
    source = name if own else f"{name} --pretrained {tag}"
    with told(f"--model {source}: cannot be loaded"):
        clip_model = open_clip.create_model(name, None if own or file else tag, device=DEVICE,
                                            require_pretrained=not file)
    if file:
        take(clip_model, read_weights(Path(tag)), tag)
    clip_model.visual.output_tokens = False  # CoCa's: its features alone
    return clip_model.eval(), open_clip.get_tokenizer(name)


def save_tensors(path, tensors, **about):
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(save(tensors, {"about": json.dumps(about)}))  # save_file(): mode 0600


def clip_config(setup):
    """open_clip_config.json of --model."""
    shapes = setup.args.model == "shapes-clip"
    model_cfg = embedded().SHAPES_CLIP if shapes else open_clip.get_model_config(setup.args.model)
    return {"model_cfg": model_cfg, "preprocess_cfg": setup.clip.visual.preprocess_cfg}


def save_run(setup, model, out, head=None, text=None):
    """An open_clip local directory, open_clip.create_model("local-dir:OUT"), and head.safetensors.

    head: further tensors for head.safetensors; text: tensors of a tuned text tower.
    """
    if RANK > 0:
        return
    visual = {f"visual.{name}": value for name, value in model.visual.state_dict().items()}
    save_tensors(out / "open_clip_model.safetensors",
                 {**setup.clip.state_dict(), **(text or {}), **visual})
    write_json(out / "open_clip_config.json", clip_config(setup))
    own = {name: value for name, value in model.state_dict().items() if name in HEAD}
    save_tensors(out / "head.safetensors", {**own, **(head or {})},
                 classnames=setup.data.classnames)
    if (out / "log.jsonl").is_file():
        plot_training(out)


HEAD = {"head", "bias", "scale"}  # of an ImageClassifier
WISE_FT = {"classification_head.weight": "head", "classification_head.bias": "bias"}
OPENAI = {"input_resolution", "context_length", "vocab_size", "attn_mask"}  # beside its weights


def read_weights(path):
    """State dict of a .safetensors or .pt file; runs no code.

    What training code puts around it goes: a dict under state_dict, model_state_dict or model,
    and the prefixes of DistributedDataParallel, torch.compile and Lightning. wise-ft's names
    become ours.
    """
    path.stat()  # the system's sentence on a missing file
    with told(f"{path}: not a state dict that can be read as numbers alone",
              "; save model.state_dict() where it was trained"):  # a pickle that names code, ...
        found = load_file(path) if path.suffix == ".safetensors" else \
            torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model_state_dict", "model"):
            found = found.get(key, found)
        for prefix in ("module.", "_orig_mod.", "module.", "model."):
            if all(name.startswith(prefix) for name in found):
                found = {name.removeprefix(prefix): value for name, value in found.items()}
        return {WISE_FT.get(name, name.removeprefix("image_encoder.model.")): value
                for name, value in found.items()}


def take(model, weights, source):
    """model.load_state_dict(weights): every entry, of the right shape, and finite; returns it."""
    weights = {name: value for name, value in weights.items() if name not in OPENAI}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # a line for each kind of fault; its first name will do
        faults = [line.split(",")[0].strip() for line in str(error).splitlines()[1:4]]
        raise Fail(f"{source}: {'; '.join(faults)[:200]}; is it whole, and of --model?") from None
    for name, value in weights.items():
        if not value.isfinite().all():
            raise Fail(f"{source}: {name} is not finite; the weights are broken")
    return model


def is_run(path):
    """Whether a path is a run's folder, or one of its models'."""
    return (path / "head.safetensors").is_file() or (path / "args.json").is_file()


def load_run(folder, amp):
    """(ImageClassifier, class names, tensors of head.safetensors) of a finished run's folder."""
    if not (folder / "head.safetensors").is_file():
        raise Fail(f"--finetuned {folder}: no head.safetensors there: not a finished run, or one "
                   "whose models are in its subfolders")
    with told(f"--finetuned {folder}: cannot be read"):
        clip_model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        tensors = load_file(folder / "head.safetensors")
        with safe_open(folder / "head.safetensors", "pt") as f:
            classnames = json.loads(f.metadata()["about"])["classnames"]
    take(clip_model, read_weights(folder / "open_clip_model.safetensors"), folder)
    clip_model.visual.output_tokens = False
    model = ImageClassifier(clip_model.visual, tensors["head"], tensors["scale"],
                            "bias" in tensors, amp)
    if "bias" in tensors:
        model.bias.data = tensors["bias"]
    return model.to(DEVICE).eval(), classnames, tensors


def load_finetuned(setup):
    """(theta_0, theta_1): the zero-shot model and --finetuned's, with heads of one convention.

    --finetuned: a finished run; the state dict of wise-ft's ImageClassifier; or an open_clip
    folder or state dict of a CLIP, whose head is made by its own text tower.
    """
    path, head_0, s = Path(setup.args.finetuned), setup.head, setup.scale
    data, weights = setup.data, {} if path.is_dir() else read_weights(path)
    if is_run(path):
        theta_1, classnames, tensors = load_run(path, setup.amp)
        if classnames != data.classnames:
            raise Fail(f"--finetuned {path}: has the classes {classnames[:3]} ...")
        head_0 = tensors.get("head_0", head_0).to(DEVICE)  # of prompts of its own
        say(f"{path}: the model of a run, with its head")
    elif "head" in weights:
        theta_1 = ImageClassifier(copy.deepcopy(setup.clip.visual), s * head_0, bias=True,
                                  amp=setup.amp)
        for name in setup.clip.state_dict():  # its text tower makes no number
            if not name.startswith("visual."):
                weights.pop(name, None)
        take(theta_1, {"bias": theta_1.bias, "scale": theta_1.scale, **weights}, path)
        say(f"{path}: wise-ft's classifier, with its head")
    else:
        tuned = load_tuned_clip(setup)
        head = zero_shot_head(tuned, setup.tokenizer, data.classnames, data.templates)
        scale = tuned.logit_scale.exp().item()
        theta_1 = ImageClassifier(tuned.visual, head, scale, amp=setup.amp)
        say(f"the head is made by its text tower, s = {scale:.4g}")
    folded = theta_1.bias is not None
    theta_0 = ImageClassifier(setup.clip.visual, s * head_0 if folded else head_0,
                              1.0 if folded else s, folded, setup.amp)
    return theta_0.to(DEVICE).eval(), theta_1.to(DEVICE).eval()


def load_tuned_clip(setup):
    """The whole CLIP of --finetuned, an open_clip folder or a state dict, in --model's form."""
    path = file = Path(setup.args.finetuned)
    if path.is_dir():
        file = path / "open_clip_model.safetensors"
        theirs = of_weights(read_json(path / "open_clip_config.json"))
        ours = of_weights(clip_config(setup))
        differ = [key for key in ours if ours[key] != theirs[key]]
        if differ:
            raise Fail(f"--finetuned {path}: differs from --model {setup.args.model} in {differ}")
    tuned = take(copy.deepcopy(setup.clip), read_weights(file), path)
    say(f"{path}: a CLIP, both towers")
    return tuned


def of_weights(config):
    """What belongs to weights beside their values, of an open_clip_config.json: how images are
    resized and normalised, and the activation."""
    quick = bool(config["model_cfg"].get("quick_gelu"))
    found = {**asdict(PreprocessCfg()), **config["preprocess_cfg"], "size": 0, "quick_gelu": quick}
    return json.loads(json.dumps(found))  # no tuples


# ---- Predictions ----

class Pictures(ImageSet):
    """Images to classify: one that cannot be read is named, and None."""

    def __getitem__(self, i):
        try:
            return super().__getitem__(i)
        except Fail as error:
            print(f"left out: {error}", file=sys.stderr)


@torch.no_grad()
def predict(args, model, classnames, probabilities, columns=()):
    """A table of --predict on stdout, tabs between its columns: path, class, probability, more.

    probabilities(images) -> (probs (B, C), *columns (B,)).
    """
    root = Path(args.predict)
    root.stat()  # the system's sentence on a missing one
    found = sorted(p for p in [root, *root.rglob("*")] if p.is_file())
    files = [p for p in found if is_image(p) and not any(map(hidden, p.relative_to(root).parts))]
    images = Pictures(f"--predict {root}", files, [0] * len(files))
    images.prepare(PreprocessCfg(**model.visual.preprocess_cfg))
    batches = list(BatchSampler(range(len(images)), 32, False))[RANK::WORLD]
    table = csv.writer(sys.stdout, "excel-tab", lineterminator="\n")
    if RANK == 0:
        print(f"{len(found) - len(files)} files are no images by their names", file=sys.stderr)
        table.writerow(["path", "class", "probability", *columns])
    for read in image_loader(images, batches, args.workers, list):
        if read := list(filter(None, read)):
            pixels, _, index = zip(*read)
            probs, *more = probabilities(images.normalized(torch.stack(pixels).to(DEVICE)))
            confidence, predicted = probs.max(dim=1)
            if confidence.isnan().any():
                raise Fail(f"--finetuned {args.finetuned}: its outputs are not numbers")
            numbers = torch.stack([confidence, *more], dim=1).tolist()
            for i, c, row in zip(index, predicted.tolist(), numbers):
                table.writerow([files[i], classnames[c], *[f"{x:.4f}" for x in row]])
            sys.stdout.flush()


def predict_with_head(args):
    """--predict with the head of the run --finetuned."""
    model, classnames, tensors = load_run(Path(args.finetuned), tower_precision(args))
    if tensors.keys() - HEAD:
        raise Fail(f"--finetuned {args.finetuned}: has two heads; use the script that made it")
    predict(args, model, classnames, lambda images: [logits_of(model, images).softmax(dim=1)])


# ---- Tables and figures ----

def id_ood(tests, measure):
    """(ID, mean of the shifts or NaN) of a row's {test: metrics}; measure: {test: its metric}."""
    in_distribution, *shifts = [tests[test][metric] for test, metric in measure.items()]
    return in_distribution, float(np.mean(shifts)) if shifts else math.nan


def plane(results, measure):
    """{row: (ID, OOD)} of {row: {test: metrics}}."""
    return {row: id_ood(tests, measure) for row, tests in results.items()}


def finish(setup, results, lines=None, marked=None, **more):
    """results.json, plane.png and the table, the last thing of a run.

    results: {row: {test: metrics}}; lines: curves for the figure, see plot_plane(); marked: rows
    that the figure marks, by default all; more: for results.json.
    """
    out, points = setup.out, plane(results, setup.measure)
    if RANK > 0:
        return
    rows = [{"name": row, "id": points[row][0], "ood": points[row][1], "tests": tests}
            for row, tests in results.items()]
    versions = {"python": sys.version, "torch": torch.__version__,
                "open_clip": open_clip.__version__}
    write_json(out / "results.json", {"args": vars(setup.args), "measure": setup.measure,
                                      "versions": versions, "rows": rows, **more})
    marks = {row: points[row] for row in marked or points}
    plot_plane(marks, lines or {}, setup.measure, out / "plane.png")
    say(f"saved to {out}")
    print_table(results, setup.measure)


def preview(rows, setup):
    """Rows of the table before the first step: a wrong tree or prompt shows soon."""
    if not setup.args.resume:
        print_table(evaluate(rows, setup), setup.measure)


def print_table(results, measure):
    """Percent, each test in its own metric; OOD: mean of the shifts; NLL in nats."""
    id_test, *shifts = measure
    titles = [id_test, "OOD", *shifts, "NLL", "NLL ood", "ECE", "ECE ood"]
    wide = max(map(len, results)) + 1
    say(" " * wide + "".join(f"{title[:9]:>10}" for title in titles))
    for row, tests in results.items():
        cells = [*id_ood(tests, measure), *[tests[shift][measure[shift]] for shift in shifts]]
        for metric in ("nll", "ece"):
            cells += id_ood(tests, dict.fromkeys(measure, metric))
        say(f"{row:<{wide}}" + "".join(f"{cell:>10.2f}" for cell in cells))


def new_figure(*size):
    """A figure of matplotlib, or None with a hint."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say("no figures: pip install matplotlib")
    return Figure(size, layout="constrained")


def plot_training(out):
    """Loss and held-out accuracy against steps, of log.jsonl."""
    figure = new_figure(6, 3.5)
    if figure is None:
        return
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    ax = figure.subplots()
    sides = (ax, "loss", "C0-"), (ax.twinx(), "held_out_acc", "C1o-")
    for axis, key, style in sides:
        points = [(line["step"], line[key]) for line in lines if key in line]
        axis.plot(*np.array(points).reshape(-1, 2).T, style, markersize=4, linewidth=1)
        axis.set(xlabel="step", ylabel=key)
    figure.savefig(out / "training.png", dpi=150)


def plot_plane(points, lines, measure, path):
    """ID against OOD: {row: (ID, OOD)} as markers, {label: {text: (ID, OOD)}} as lines.

    The points of a line have their texts beside them where there is room.
    """
    figure = new_figure(8, 4.5)
    if figure is None:
        return
    ax = figure.subplots()
    for (label, point), marker in zip(points.items(), "PXs*D^v<>hpd" * 3):
        ax.plot(*point, marker, markersize=10, label=label, zorder=3)
    texts = []  # of the points of lines
    for label, line in lines.items():
        drawn, = ax.plot(*zip(*line.values()), "-o", markersize=4, label=label)
        texts += [(text, point, drawn.get_color()) for text, point in line.items()]
    ax.set(xlabel=f"{next(iter(measure))} (ID), %", ylabel="mean of the shifts (OOD), %")
    ax.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.draw_without_rendering()  # only now it is known where a point is on the page
    taken = list(ax.transData.transform(list(points.values())))
    for text, point, colour in texts:
        here = ax.transData.transform(point)
        if all(math.dist(here, other) > 20 for other in taken):
            ax.annotate(text, point, (4, 3), textcoords="offset points", fontsize=7, color=colour)
            taken.append(here)
    figure.savefig(path, dpi=150)


# ================================= Part 3: data =================================

def embedded():
    """tests/shapes.py, the embedded world."""
    try:
        from tests import shapes
    except ImportError:
        raise Fail("--data shapes: needs tests/shapes.py beside common.py") from None
    return shapes


# ---- Data sets ----
# `folder` is a tree of the user's; the papers' data sets are read from the trees in which they
# are published, below --data-dir (README.md has a table). Files are only listed here.

def as_published(what):
    """Names what is not as published. An OSError passes: it names its file itself."""
    return told(f"{what}: not as published", "; README.md has the trees", OSError)


def read_tests(args, tests):
    """{name: ImageSet} of {name: (reader, path, *more)}, the ID test first.

    Besides the ID test all shifts that are on disk, or those that --tests names. A path of None
    is in memory.
    """
    id_test, found, skipped = next(iter(tests)), {}, []
    asked = list(tests) if args.tests == "all" else [id_test, *args.tests.split(",")]
    if set(asked) - tests.keys():
        raise Fail(f"--tests {args.tests}: {args.data} has {', '.join(tests)}")
    for name, (reader, path, *more) in tests.items():
        if args.tests == "all" and name != id_test and path and not path.exists():
            skipped.append(f"{name} ({path})")
        elif name in asked:
            with as_published(path):
                found[name] = reader(name, path, *more)
    if skipped:
        say(f"test sets that are skipped, since they are not there: {', '.join(skipped)}")
    return found


LEFT_BY_SYSTEMS = {"@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX"}


def hidden(name):
    """What systems and programs leave beside images: .x, ._x, @eaDir, ..."""
    return name.startswith(".") or name in LEFT_BY_SYSTEMS


def subfolders(path):
    """Sorted names of the folders in a folder, of which there must be one."""
    found = []
    for p in path.iterdir():
        if not p.exists():
            raise Fail(f"{p}: a link to what is not there")
        if p.is_dir() and not hidden(p.name):
            found.append(p.name)
    if not found:
        raise Fail(f"{path}: there is no folder in it, such as those of classes")
    return sorted(found, key=plain)


def is_image(entry):
    """Whether an os.DirEntry is an image by its name, and a regular file."""
    known = (*IMG_EXTENSIONS, ".gif", ".jfif", ".avif")
    return not hidden(entry.name) and entry.name.lower().endswith(known) and entry.is_file()


def plain(name):
    """One form of a name: é may be one character or two."""
    return unicodedata.normalize("NFC", name)


def numbered(names):
    """{name: its place among them}"""
    return {name: place for place, name in enumerate(names)}


def class_tree(name, path, labels, own_space=False, **how):
    """ImageSet of path/FOLDER/*.jpg with labels[FOLDER]; a folder in FOLDER is refused.

    A folder with the label None is left out. own_space: only the classes that have a folder
    count; before any softmax the logits of all others are dropped.
    """
    files, targets, others = [], [], [os.fsencode(p) for p in path.iterdir() if is_image(p)]
    folders = subfolders(path)
    absent = labels.keys() - set(map(plain, folders))
    if absent and not own_space:
        say(f"{name}: {len(absent)} classes have no folder, such as {sorted(absent)[:3]}")
    for folder in folders:
        if plain(folder) not in labels:
            raise Fail(f"{path / folder}: not a class of {name}, whose folders are "
                       f"{', '.join(list(labels)[:3])} ...")
        label, own = labels[plain(folder)], []
        if label is None:
            continue
        for entry in sorted(os.scandir(path / folder), key=lambda entry: entry.name):
            if hidden(entry.name):
                continue
            if entry.is_dir():
                raise Fail(f"{entry.path}: a folder where images are expected")
            (own if is_image(entry) else others).append(os.fsencode(entry.path))
        if not own:
            raise Fail(f"{path / folder}: there is no image in it")
        files.append(np.array(own))
        targets += [label] * len(own)
    if others:
        say(f"{path}: {len(others)} files are left out, such as {os.fsdecode(others[0])}")
    if own_space:
        ids, targets = np.unique(targets, return_inverse=True)
        how["classes"] = ids[:, None].tolist()
        say(f"{name}: its label space are the {len(ids)} classes that have a folder")
    return ImageSet(name, np.concatenate(files), targets, **how)


def folder_data(root, args):
    """The user's own images.

    Beside the images there may be classnames.txt (folder<TAB>name a line), templates.txt (one
    with {} a line) and descriptions.json.
    """
    if not (root / "train").is_dir() or not (root / "test").is_dir():
        raise Fail(f"--data-dir {root}: expected in it train/CLASS/*.jpg, test/CLASS/*.jpg and "
                   "optionally val/CLASS/*.jpg and shifts/NAME/CLASS/*.jpg")
    if unread := sorted(set(subfolders(root)) - {"train", "val", "test", "shifts"}):
        say(f"{root}: not read: {', '.join(unread)}; read are train, val, test and shifts/NAME")
    folders = [plain(folder) for folder in subfolders(root / "train")]
    labels = numbered(folders)
    tests = {"test": (class_tree, root / "test", labels)}
    for name in subfolders(root / "shifts") if (root / "shifts").exists() else []:
        if name.lower() in {"train", "val", "test", "ood", "nll", "nll ood", "ece", "ece ood"}:
            raise Fail(f"{root / 'shifts' / name}: something else has that name; rename it")
        tests[name] = class_tree, root / "shifts" / name, labels
    tests = read_tests(args, tests)
    train = class_tree("train", root / "train", labels)
    val = class_tree("val", root / "val", labels) if (root / "val").exists() else None

    names, named = {folder: folder.replace("_", " ") for folder in folders}, set()
    for line in optional_lines(root / "classnames.txt"):
        folder, _, name = plain(line).partition("\t")
        if folder not in names.keys() - named or not name.strip() or "\t" in name:
            raise Fail(f"classnames.txt: '{line}' is not FOLDER<TAB>NAME with a folder of train/, "
                       "or that folder's second line")
        names[folder] = name.strip()
        named.add(folder)
    (name, n), = Counter([names[folder] for folder in folders]).most_common(1)
    if n > 1:
        raise Fail(f"--data-dir {root}: {n} classes have the name '{name}'")
    templates = optional_lines(root / "templates.txt") or ["a photo of a {}."]
    for template in templates:
        if template.count("{}") != 1 or template.count("{") + template.count("}") != 2:
            raise Fail(f"templates.txt: '{template}' must hold {{}} once, where the name goes")
    file = root / "descriptions.json"
    descriptions = read_json(file, list) if file.is_file() else None
    return Data(list(names.values()), templates, train, val, tests, descriptions, folders)


def optional_lines(path):
    """Lines of a text file that are not blank; none if there is no file."""
    with as_published(path):
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    return [line for line in text.splitlines() if line.strip()]


def imagenet_data(root, args):
    """ImageNet (ILSVRC 2012) with its shifts V2, R, A, Sketch and ObjectNet.

    WNID is a WordNet id such as n01440764. V2's folders are named by the class id, so that '10'
    is not the third class. The head has all 1000 classes; the label space of R and of A is the
    200 that have a folder there.
    """
    from timm.data import ImageNetInfo
    # label_names() are the WNIDs in the order of open_clip's IMAGENET_CLASSNAMES
    wnids, numbers = numbered(ImageNetInfo().label_names()), numbered(map(str, range(1000)))
    tests = read_tests(args, {
        "imagenet": (class_tree, root / "imagenet/val", wnids),
        "v2": (class_tree, root / "imagenetv2-matched-frequency-format-val", numbers),
        "r": (class_tree, root / "imagenet-r", wnids, True),
        "a": (class_tree, root / "imagenet-a", wnids, True),
        "sketch": (class_tree, root / "imagenet-sketch", wnids),
        "objectnet": (objectnet, root / "objectnet-1.0"),
    })
    train = class_tree("train", root / "imagenet/train", wnids)
    return Data(list(open_clip.IMAGENET_CLASSNAMES), open_clip.OPENAI_IMAGENET_TEMPLATES, train,
                None, tests)


def objectnet(name, path):
    """The 113 classes of ObjectNet that ImageNet has too, some of them under several ids.

    Joined as its own files say: FOLDER -> ObjectNet label -> ImageNet names -> line in
    imagenet_to_label_2012_v2 -> class id. Two pixels are cut from each side, a red border.
    """
    mappings = path / "mappings"
    lines = (mappings / "imagenet_to_label_2012_v2").read_text().splitlines()
    line_of_id = read_json(mappings / "pytorch_to_imagenet_2012_id.json")
    names_of_label = read_json(mappings / "objectnet_to_imagenet_1k.json")
    label_of_folder = read_json(mappings / "folder_to_objectnet_label.json")

    id_of_name = {lines[line].strip(): int(i) for i, line in line_of_id.items()}
    ids = {}  # FOLDER -> class ids
    for folder, label in sorted(label_of_folder.items()):
        if label in names_of_label:
            ids[folder] = [id_of_name[n] for n in names_of_label[label].split("; ")]
    say(f"{name}: its label space are the {len(ids)} classes that its mappings join")
    labels = {**dict.fromkeys(label_of_folder), **numbered(ids)}
    return class_tree(name, path / "images", labels, classes=list(ids.values()), border=2)


def domainnet_data(root, args):
    """DomainNet, as its lists say; real is the ID domain. Class names keep their underscores,
    as in Lipsum-FT's prompts."""
    root = root / "domainnet"
    domains, classes = ("real", "painting", "clipart", "infograph", "sketch"), {}
    train = domainnet_list("train", root / "real_train.txt", classes)
    tests = {d: (domainnet_list, root / f"{d}_test.txt", classes) for d in domains}
    return Data([classes[label] for label in range(len(classes))],
                open_clip.OPENAI_IMAGENET_TEMPLATES, train, None, read_tests(args, tests))


def domainnet_list(name, listing, classes):
    """The images of a list of lines 'DOMAIN/CLASS/FILE LABEL', which lie beside it.

    classes: {label: CLASS} of the lists before, on which all must agree; filled here.
    """
    files, labels = [], []
    for line in listing.read_text().splitlines():
        file, label = line.rsplit(" ", 1)
        folder = file.split("/")[-2]
        if classes.setdefault(int(label), folder) != folder:
            raise Fail(f"{listing}: '{line}': label {label} is {classes[int(label)]} in another "
                       "list")
        files.append(f"{listing.parent}/{file}")
        labels.append(int(label))
    return ImageSet(name, files, labels)


def cifar10_data(root, args):
    """CIFAR-10, Python version, with its shifts CIFAR-10.1 (v6), CIFAR-10.2 and STL-10.

    CIFAR-10's files are pickles, that is, programs: torchvision checks their MD5 first.
    """
    with as_published(root / "cifar-10-batches-py"):
        train, test = CIFAR10(root, train=True), CIFAR10(root, train=False)
    tests = read_tests(args, {
        "cifar10": (ImageSet, test.data, test.targets),
        "cifar10.1": (cifar10_1, root / "CIFAR-10.1/datasets"),
        "cifar10.2": (cifar10_2, root / "cifar-10.2/cifar102_test.npz"),
        "stl10": (stl10, root / "stl10_binary", train.classes),
    })
    return Data(train.classes, open_clip.OPENAI_IMAGENET_TEMPLATES,
                ImageSet("train", train.data, train.targets), None, tests)


def cifar10_1(name, folder):
    return ImageSet(name, np.load(folder / "cifar10.1_v6_data.npy"),
                    np.load(folder / "cifar10.1_v6_labels.npy"))


def cifar10_2(name, file):
    with np.load(file) as found:
        return ImageSet(name, found["images"], found["labels"])


def stl10(name, folder, names):
    """STL-10's test images. Its monkeys are left out and the logit of frog is dropped: the nine
    classes that both data sets have are the label space, in the order of CIFAR-10's names."""
    pixels = np.fromfile(folder / "test_X.bin", np.uint8).reshape(-1, 3, 96, 96)
    numbers = np.fromfile(folder / "test_y.bin", np.uint8)
    id_of_name = numbered(names)
    id_of_name["car"] = id_of_name["automobile"]
    own_names = (folder / "class_names.txt").read_text().split()
    ids = np.array([id_of_name.get(own, -1) for own in own_names])[numbers - 1]
    kept = ids >= 0
    shared, labels = np.unique(ids[kept], return_inverse=True)
    images = pixels.transpose(0, 3, 2, 1)  # stored column by column
    return ImageSet(name, images[kept], labels, classes=shared[:, None].tolist())


def read_csv(path, *columns):
    """[(value, ...)] of the named columns of every row."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as f, as_published(path):
        return [operator.itemgetter(*columns)(row) for row in csv.DictReader(f)]


def wilds_split(name, metadata, rows, metric="acc"):
    """ImageSet of the rows [(file, label) or (file, label, group), ...] of a WILDS data set."""
    if not rows:
        raise Fail(f"{metadata}: lists no image for {name}")
    files, labels, *groups = zip(*rows)
    return ImageSet(name, files, labels, None, metric, *groups)


def iwildcam_data(root, args):
    """iWildCam 2020 as in WILDS; ID test: id_test; shift: test, other cameras. train/ holds the
    images of all splits; y = 99999 in categories.csv is no class.

    With labels.csv of the WiSE-FT code beside them the classes have English names, as in the
    papers: 178 different names for 182 classes, of which those of one name share a text head.
    """
    root = root / "iwildcam_v2.0"
    metadata, rows = root / "metadata.csv", defaultdict(list)

    def class_names(file, column):
        found = read_csv(root / file, "y", column)
        found = {int(y): name.lower() for y, name in found if y != "99999"}
        return [found[y] for y in range(len(found))]
    names = latin = class_names("categories.csv", "name")
    if (root / "labels.csv").is_file():
        names = class_names("labels.csv", "english")
    else:
        say(f"class names are Latin: labels.csv of the WiSE-FT code is not in {root}")
    for split, file, y in read_csv(metadata, "split", "filename", "y"):
        rows[split].append((f"{root}/train/{file}", int(y)))
    split = functools.partial(wilds_split, metric="macro_f1")
    tests = read_tests(args, {test: (split, metadata, rows[test]) for test in ("id_test", "test")})
    return Data(names, ["a photo of {}."], split("train", metadata, rows["train"]),
                split("val", metadata, rows["id_val"]), tests, aliases=latin)


def fmow_data(root, args):
    """FMoW as in WILDS, split by time: training and ID before 2013, shift (test) from 2016 on.
    Row i of the metadata, from 0, is rgb_img_{i}.png. Class names keep their underscores, as in
    the papers' prompts. The groups are five regions."""
    root = root / "fmow_v1.1"
    metadata = root / "rgb_metadata.csv"
    regions = numbered(["Asia", "Europe", "Africa", "Americas", "Oceania"])
    countries = dict(read_csv(root / "country_code_mapping.csv", "alpha-3", "region"))
    images = read_csv(metadata, "split", "category", "country_code", "timestamp")
    names = sorted({category for _, category, _, _ in images})
    labels, rows = numbered(names), defaultdict(list)
    for i, (split, category, country, when) in enumerate(images):
        group = regions.get(countries.get(country), -1)
        row = f"{root}/images/rgb_img_{i}.png", labels[category], group
        if when < "2013" or when >= "2016":
            rows[split, when >= "2016"].append(row)
    tests = read_tests(args, {
        "id_test": (wilds_split, metadata, rows["test", False]),
        "test": (wilds_split, metadata, rows["test", True], "worst_region"),
    })
    return Data(names, ["satellite photo of a {}."],
                wilds_split("train", metadata, rows["train", False]),
                wilds_split("val", metadata, rows["val", False]), tests)


# ============================ Part 4: flags and mistakes ============================

class Fail(Exception):
    """A user's mistake in one sentence; cli() prints it and exits with code 2."""

    def __init__(self, message):  # a data worker wraps the sentence in its traceback: unwrap it
        super().__init__(str(message).strip().rsplit("Fail: ", 1)[-1])


def cli(main):
    """Run a method's main(); a user's mistake ends in one line."""
    sys.stdout.reconfigure(errors="surrogateescape")  # file names need not be UTF-8
    warnings.simplefilter("ignore", FutureWarning)    # between torch and open_clip
    logging.disable(logging.WARNING)  # open_clip's of random weights, where take() follows
    try:
        if WORLD > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo")
        main()
        if WORLD > 1:  # after a mistake it would wait for ranks that are gone
            dist.destroy_process_group()
        return
    except BrokenPipeError:  # `| head`
        os._exit(0)
    except (Fail, KeyboardInterrupt) as error:
        message = str(error) or "interrupted"
    except torch.OutOfMemoryError:
        message = ("the GPU is out of memory; training needs less with --accum (the images of a "
                   "step stay the same) or --grad-checkpointing")
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else error
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def say(text):
    """Print on rank 0, above a progress bar. A reader that goes away does not end the run."""
    if RANK == 0:
        try:
            (tqdm.write if sys.stderr.isatty() else print)(text)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def told(what, advice="", *passing):
    """Whatever is raised in it, but Fail and the types `passing`, as a Fail with its first
    sentence: the next may advise what is unsafe."""
    try:
        yield
    except (Fail, *passing):
        raise
    except Exception as error:  # readers and decoders raise a dozen types
        text = repr(error) if isinstance(error, LookupError) else str(error)
        reason = " ".join(text.split()).split(". ")[0][:150] or repr(error)
        raise Fail(f"{what} ({reason}){advice}") from None


def absolute(path):
    """argparse type: a whole path, for a run that goes on from another folder."""
    return path and str(Path(path).expanduser().resolve())


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The header as it is, and a default for every flag."""


class Parser(argparse.ArgumentParser):
    def add(self, name, default, help, group=None, low=0, high=1e9, **how):
        """A flag of its default's type; numbers are from low to high."""
        key, kind = name[2:].replace("-", "_"), type(default)
        if not how:
            how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        (group or self).add_argument(name, default=argparse.SUPPRESS, help=help, **how)
        self.defaults[key] = default
        if how.get("type") in (int, float):
            self.limits[key] = low, high

    def error(self, message):
        raise Fail(f"{message} (see --help)")


def parser(doc):
    """The flags that all methods share. What is None here comes from RECIPES[--data]."""
    p = Parser(description=doc, allow_abbrev=False, formatter_class=Help, add_help=False)
    p.defaults, p.limits, length = {}, {}, p.add_mutually_exclusive_group()
    p.add("--help", False, "show this, with the values of --data's recipe", action="store_true")
    p.add("--data", "shapes", "data set", choices=DATA)
    p.add("--data-dir", absolute("~/data"), "folder that holds the data set", type=absolute)
    p.add("--model", "ViT-B-16-quickgelu",
          "open_clip name, hf-hub:ORG/NAME or local-dir:PATH; shapes has its own")
    p.add("--pretrained", "", "open_clip tag, or weights file, of a named model; '' is openai")
    p.add("--epochs", None, "passes over the training images", length, 1e-6, type=float)
    p.add("--steps", None, "optimiser steps, instead of --epochs", length, 1, type=int)
    p.add("--batch-size", 256, "images an optimiser step, over all ranks and --accum parts", low=1)
    p.add("--accum", 1, "parts of a step on each rank, to save memory", low=1)
    p.add("--lr", 1e-5, "peak learning rate of AdamW")
    p.add("--wd", 0.0, "weight decay, on every trained parameter")
    p.add("--warmup", 0.1,
          "linear warm-up: optimiser steps, or below 1 a share of them; 0 with --shots")
    p.add("--grad-clip", 0.0, "largest gradient norm; 0 does not clip")
    p.add("--augment", "crop", "crop: random crop of 90-100%% of the area; crop-flip: 8-100%% and "
          "a flip", choices=["none", "crop", "crop-flip"])
    p.add("--keep", "last", "weights of the last step, or of the epoch that is best on held-out "
          "images", choices=["last", "best"])
    p.add("--shots", 0, "train on K images of each class; 0 is all")
    p.add("--holdout", 0.1, "share of the training images held out for choices, if the data has "
          "no validation split; with --shots at most 4 a class", high=0.9)
    p.add("--limit", 0, "images kept of each split, for a quick run; 0 is all")
    p.add("--tests", "all", "comma-separated shifts to evaluate, beside the ID test")
    p.add("--finetuned", "", "model to use instead of training: a finished run, an open_clip "
          "folder, or a state dict of CLIP or of wise-ft's classifier", type=absolute)
    p.add("--predict", "", "with --finetuned RUN: image, or folder of images, to classify",
          type=absolute)
    p.add("--precision", "auto", "of the towers; auto is bf16 or fp16 on CUDA, else fp32",
          choices=["auto", "bf16", "fp16", "fp32"])
    p.add("--compile", False, "torch.compile the model")
    p.add("--grad-checkpointing", False, "less memory, more time")
    p.add("--workers", -1, "data-loading processes a rank; -1 is this machine's cores over its "
          "ranks, or 0 for images in memory", low=-1)
    p.add("--seed", 0, "of data order, augmentation and random draws")
    p.add("--out", "", "new folder for the run; '' is runs/METHOD-DATA-sSEED")
    p.add("--resume", "", "run folder to continue exactly, with its flags", type=absolute)
    p.add("--save-every", 10.0, "minutes between checkpoints")
    return p


# What the data brings to every method's recipe
OF_DATA = {"shapes": dict(model="shapes-clip", epochs=10, batch_size=64, lr=6e-4, wd=0.1,
                          warmup=0.1, augment="none"),
           "folder": dict(epochs=10, batch_size=64, lr=1e-5, warmup=0.1),
           "imagenet": dict(holdout=0.02), "domainnet": dict(holdout=0.02)}
FREE = {"data_dir", "resume", "workers", "save_every"}  # may differ from the run's
# What --finetuned brings from its run: it tells the held-out images and theta_0.
INHERITED = {"data", "data_dir", "found", "holdout", "limit", "shots", "seed", "model",
             "pretrained"}
# Flags that --finetuned, which trains nothing, does not read
OF_TRAINING = {"epochs", "steps", "batch_size", "accum", "lr", "wd", "warmup", "grad_clip",
               "augment", "keep", "compile", "grad_checkpointing", "save_every"}


def parse(p, method, recipes, inherited=(), variant=None):
    """Flags: those given, over those of --resume or --finetuned's run, the recipe, the defaults.

    recipes: {--data: {flag: value}}; inherited: flags of the method that --finetuned brings from
    its run, and that may be given; variant: a flag whose values may have recipes too.
    """
    given, defaults = vars(p.parse_args()) | {"method": method}, p.defaults
    run, free, unread = {}, FREE, set()
    if "resume" in given:
        run = run_flags(Path(given["resume"]))
    elif "finetuned" in given:
        path = Path(given["finetuned"])
        folders = [folder for folder in (path, path.parent) if (folder / "args.json").is_file()]
        run = run_flags(folders[0]) if folders else {}
        run = {key: run[key] for key in run.keys() & {*INHERITED, *inherited}}
        free, unread = FREE | {*inherited}, OF_TRAINING
    elif "predict" in given:
        raise Fail("--predict: needs a finished run, as --finetuned RUN")
    if "predict" in given:
        read = {"help", "finetuned", "predict", "precision", "workers", *inherited}
        unread = defaults.keys() - read
    if unused := given.keys() & unread:
        raise Fail(f"{', '.join(map(flag, sorted(unused)))}: would do nothing, nothing is trained")
    for key in run.keys() & given.keys() - free:
        if given[key] != run[key]:
            raise Fail(f"{flag(key)} {given[key]}: the run has {run[key]!r}")
    data = {**defaults, **run, **given}["data"]
    if "data_dir" in given and data == "shapes":
        raise Fail(f"--data-dir {given['data_dir']}: of which --data?")
    if data not in recipes:
        raise Fail(f"--data {data}: {method}.py has recipes for {', '.join(recipes)}")
    recipe = {**recipes[data], **OF_DATA.get(data, {}), **recipes.get(given.get(variant), {})}
    if given.keys() & {"epochs", "steps"}:
        recipe |= {"epochs": None, "steps": None}
    if given.get("shots"):
        recipe["warmup"] = 0.0  # a few hundred steps: FLYP's author's advice
    args = {**defaults, **recipe, **run, **given}
    if args.pop("help"):
        p.set_defaults(**args)
        sys.exit(p.print_help())
    if args["out"] and not args["resume"] and any(Path(args["out"]).glob("*")):
        raise Fail(f"--out {args['out']}: is not empty; --resume continues a run")
    wrong = sorted(recipe.keys() - defaults.keys()) or [k for k, v in args.items() if v is None]
    if wrong not in (["epochs"], ["steps"]):
        raise Fail(f"{method}.py, --data {data}: no flag, or no value: {', '.join(wrong)}")
    check_values(args, p.limits)
    return argparse.Namespace(**args)


def check_values(args, limits):
    """Fail on a number outside of limits[flag], or on what is no number."""
    for key, (low, high) in limits.items():
        for number in args[key] if isinstance(args[key], list) else [args[key]]:
            if number is not None and not (isinstance(number, (int, float))
                                           and low <= number <= high):
                raise Fail(f"{flag(key)} {number}: not a number from {low:g} to {high:g}")


def check_steps(args, data):
    """Fail on parts that do not divide a step, a warm-up that never ends, nothing to choose on."""
    if args.finetuned:
        return
    if args.keep == "best" and not len(data.val):
        raise Fail("--keep best: there are no held-out images; raise --holdout, or --keep last")
    if args.batch_size % (args.accum * WORLD):
        raise Fail(f"--batch-size {args.batch_size}: must be a multiple of {WORLD} ranks x "
                   f"{args.accum} --accum parts")
    total = training_steps(args, len(data.train))
    if total <= args.warmup:
        raise Fail(f"--warmup {args.warmup:g}: would not end before the last of {total} steps; "
                   "0.1 is a tenth of them")


def flag(key):
    return "--" + key.replace("_", "-")


def run_flags(folder):
    """Flags of the run in a folder."""
    flags = read_json(folder / "args.json")
    if not isinstance(flags, dict) or "method" not in flags:
        raise Fail(f"{folder / 'args.json'}: not the flags of a run")
    return flags


def check_same(args, data, clip_model, amp):
    """What a resumed run must find as it was; the run of --finetuned should have started from the
    same weights, and held out the images that are held out now."""
    weights = hashlib.sha256()
    for value in clip_model.state_dict().values():
        weights.update(value.cpu().numpy().tobytes())
    found = {"class names": repr(data.classnames), "precision": str(amp),
             "starting weights": weights.hexdigest(), "texts": repr(
        ([t if isinstance(t, str) else t("{}") for t in data.templates], data.texts))}
    for images in (data.train, data.val):
        names = images.images.tobytes()
        if images.on_disk:  # by names below --data-dir, which may move
            names = b"\n".join(images.images.tolist()).replace(os.fsencode(args.data_dir), b"")
        found[f"{images.name} images"] = names + images.labels.numpy().tobytes()
    for name, value in found.items():
        value = value if isinstance(value, bytes) else value.encode()
        found[name] = hashlib.sha256(value).hexdigest()[:16]
    run, args.found = getattr(args, "found", found), found
    differ = [name for name in found if found[name] != run.get(name)]
    if differ and args.resume:
        raise Fail(f"--resume {args.resume}: not as the run found them: {', '.join(differ)}")
    if any("images" in name or "weights" in name for name in differ):
        say(f"warning: not as the run {args.finetuned} found them: {', '.join(differ)}; it may "
            "have been trained on what is held out now, or from other weights")


def describe(args, data):
    """Say which images, classes and flags a run has."""
    sizes = {images.name: len(images) for images in (data.train, data.val, *data.tests.values())}
    classes = ", ".join(f"{name} {n}" for name, n in data.counts())
    say(f"images: {sizes}\n{len(data.classnames)} classes: {classes[:1000]}\n{vars(args)}")


# --data: function(data_dir, args) -> Data
DATA = {"shapes": lambda *about: embedded().shapes_data(*about), "folder": folder_data,
        "imagenet": imagenet_data, "domainnet": domainnet_data, "cifar10": cifar10_data,
        "iwildcam": iwildcam_data, "fmow": fmow_data}
