"""What the four methods share: flags, CLIP, data, mixed-precision training, evaluation, checkpoints.

Nothing in this file knows a method: losses, ensembles and their equations are in wise_ft.py, lipsum_ft.py, vrf.py and
drm.py. Order: errors and flags - CLIP and heads - data - batches - training - evaluation - files of a run - `shapes`.

Symbols in all files: F image tower, s = exp(logit_scale), W (C, D) text head, z = s F(x) W^T logits; B batch,
C classes, D embedding width. Features are unit-norm fp32; mixed precision applies to the towers only, never to a loss.
"""
import argparse
import copy
import csv
import errno
import functools
import hashlib
import inspect
import json
import logging
import math
import operator
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from tqdm import tqdm

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
EVAL_BATCH = 250  # the same on any number of ranks, so that an evaluation's digits do not depend on it


# ---------------------------------------------- errors and flags ----------------------------------------------

class Fail(Exception):
    """A user's mistake in one sentence; cli() prints it and exits with code 2."""

    def __init__(self, message):  # a data-loader worker wraps the sentence in its traceback: unwrap it
        super().__init__(str(message).strip().rsplit("common.Fail: ", 1)[-1])


def cli(main):
    """Run a method's main(); mistakes, a full disk or GPU and Ctrl-C end in one line instead of a traceback."""
    message, code = None, 2
    try:
        if WORLD > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        logging.getLogger().setLevel(logging.CRITICAL)  # open_clip logs routine steps as warnings, and what it raises
        main()
    except Fail as error:
        message = error
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except torch.OutOfMemoryError:
        message = "the GPU is out of memory; lower --batch-size and raise --accum, or add --grad-checkpointing"
    except OSError as error:
        if error.errno == errno.ENOSPC:
            message = f"no space left on the disk of {error.filename or 'the run'}; the last good checkpoint is kept"
        elif error.filename:
            message = f"{error.filename}: {error.strerror}"
        else:
            raise
    if WORLD > 1 and message is None:
        dist.destroy_process_group()
    if message is not None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(code)


def say(*words):
    if RANK == 0:
        print(*words, flush=True)


def number(kind=float, low=-math.inf, high=math.inf, above=-math.inf):
    """argparse type: a finite number with low <= x <= high and x > above."""
    def parse(text):
        try:
            x = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of type {kind.__name__}") from None
        if not (math.isfinite(x) and low <= x <= high and x > above):
            limits = [f"at least {low}" * (low > -math.inf), f"at most {high}" * (high < math.inf),
                      f"above {above}" * (above > -math.inf)]
            raise argparse.ArgumentTypeError(f"{text} is not {' and '.join(filter(None, limits)) or 'finite'}")
        return x
    return parse


RECIPE = "the data set's recipe"  # default of a flag whose value depends on --data


class Parser(argparse.ArgumentParser):
    """argparse that tells given flags from defaults (for --resume) and reports a mistake in one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.defaults = {}

    def add(self, flag, default, help, **kwargs):
        self.defaults[flag.lstrip("-").replace("-", "_")] = default
        self.add_argument(flag, default=None, help=f"{help} (default: {default})".replace("%", "%%"), **kwargs)

    def error(self, message):
        raise Fail(f"{message} (see --help)")


def parser(doc, freeze=("none", "head")):
    """The flags that all methods share. RECIPE defaults come from the method's RECIPES[--data]."""
    p = Parser(doc)
    p.add("--data", "shapes", "data set: " + ", ".join(DATA))
    p.add("--data-dir", "~/data", "folder that holds the data set")
    p.add("--model", "ViT-B-16-quickgelu", "open_clip name, hf-hub:ORG/NAME or local-dir:PATH; shapes has its own")
    p.add("--pretrained", "openai", "open_clip tag or weights file of a named model")
    p.add("--epochs", RECIPE, "passes over the training images", type=number(float, above=0))
    p.add("--steps", RECIPE, "optimiser steps, instead of --epochs", type=number(int, 1))
    p.add("--batch-size", RECIPE, "images per forward pass on each rank", type=number(int, 1))
    p.add("--accum", 1, "forward passes per optimiser step", type=number(int, 1))
    p.add("--lr", RECIPE, "peak learning rate of AdamW", type=number(float, 0))
    p.add("--wd", RECIPE, "weight decay, on every trained parameter", type=number(float, 0))
    p.add("--warmup", RECIPE, "linear warm-up: optimiser steps, or below 1 a fraction of them", type=number(float, 0))
    p.add("--grad-clip", RECIPE, "largest gradient norm; 0 does not clip", type=number(float, 0))
    p.add("--augment", RECIPE, "none; crop: random crop of 90-100% of the area; crop-flip: 8-100% and a flip",
          choices=["none", "crop", "crop-flip"])
    if freeze:
        p.add("--freeze", "none", "part that is not trained", choices=freeze)
    p.add("--shots", 0, "train on K images of each class; 0 is all", type=number(int, 0))
    p.add("--holdout", 0.1, "share of the training images held out if the data has no validation split, for choices of "
          "this or a later run; recipes differ", type=number(float, 0, 0.9))
    p.add("--limit", 0, "images kept of each split, spread over its classes, for a quick run; 0 is all",
          type=number(int, 0))
    p.add("--skip-bad-images", False, "check all images first and leave broken ones out, counted and listed",
          action=argparse.BooleanOptionalAction)
    p.add("--tests", "all", "comma-separated names of the shifts to evaluate, beside the ID test")
    p.add("--finetuned", "none", "finished run to start from instead of training")
    p.add("--precision", "auto", "of the towers; auto is bf16 or fp16 on CUDA, fp32 on CPU",
          choices=["auto", "bf16", "fp16", "fp32"])
    p.add("--compile", False, "torch.compile the model", action=argparse.BooleanOptionalAction)
    p.add("--grad-checkpointing", False, "recompute activations to save memory", action=argparse.BooleanOptionalAction)
    p.add("--workers", -1, "data-loading processes per rank; -1 is one a core (at most 8), 0 for images in memory",
          type=number(int, -1))
    p.add("--bench-data", False, "print images/s of the training input pipeline alone and exit", action="store_true")
    p.add("--device", "auto", "where to compute", choices=["auto", "cpu", "cuda"])
    p.add("--seed", 0, "of data order, augmentation and everything random in a method", type=number(int, 0, 2**32 - 1))
    p.add("--pretrain-seed", 0, "of the tiny CLIP of --data shapes", type=number(int, 0))
    p.add("--out", "runs/METHOD-DATA-sSEED", "new folder for the run; a taken default gets a number")
    p.add("--resume", "none", "run folder to continue exactly, with the flags it was started with")
    p.add("--save-every", 10.0, "minutes between checkpoints", type=number(float, 0))
    return p


FREE = {"resume", "workers", "save_every", "predict", "device"}  # may change on --resume; only --device moves digits
INHERITED = ["data", "data_dir", "model", "pretrained", "pretrain_seed", "holdout", "limit", "shots", "seed",
             "skip_bad_images", "descriptions", "prompt"]


def parse(p, method, recipes, argv=None):
    """Flags -> Namespace: given flags over those of --resume / --finetuned over the recipe over the defaults."""
    given = {k: v for k, v in vars(p.parse_args(argv)).items() if v is not None}
    for key in ("data_dir", "finetuned", "descriptions", "pretrained"):  # a run can be found again from any folder
        if given.get(key, "none") != "none" and (key != "pretrained" or Path(given[key]).is_file()):
            given[key] = str(Path(given[key]).expanduser().resolve())
    if given.get("model", "").startswith("local-dir:"):
        given["model"] = f"local-dir:{Path(given['model'][10:]).expanduser().resolve()}"
    stored, inherited = {}, {}
    if "resume" in given:
        stored = read_json(Path(given["resume"]) / "args.json", "a run folder to --resume")
        if "part_of" in stored:
            raise Fail(f"--resume {given['resume']}: is a part of the run {stored['part_of']}; resume that")
        if stored.get("method") != method:
            raise Fail(f"--resume {given['resume']}: a run of {stored.get('method')}.py, not of {method}.py")
        for key in given.keys() - FREE:
            if stored.get(key) != given[key]:
                raise Fail(f"--resume {given['resume']}: started with {flag(key)} {stored.get(key)}, not {given[key]}; "
                           "drop the flag or start a new run")
    elif "finetuned" in given:
        run = read_json(Path(given["finetuned"]) / "args.json", "a finished run for --finetuned")
        inherited = {k: run[k] for k in INHERITED if k in run and k in p.defaults}
        same = dict.fromkeys(("data", "holdout", "limit", "shots", "skip_bad_images"), "held-out images")
        same |= dict.fromkeys(("model", "pretrained", "pretrain_seed"), "the zero-shot model")
        if given.get("model", "").startswith("local-dir:"):
            del same["model"]  # the folder may have moved
        if inherited.get("shots"):
            same["seed"] = "the --shots images"
        for key in same.keys() & given.keys() & inherited.keys():
            if given[key] != inherited[key]:
                raise Fail(f"{flag(key)} {given[key]}: the run --finetuned {given['finetuned']} was trained with "
                           f"{inherited[key]}; {same[key]} must be the same")
        if not (Path(given["finetuned"]) / "head.safetensors").is_file():
            raise Fail(f"--finetuned {given['finetuned']}: no model there (head.safetensors): the run is not finished, "
                       "or it is one of vrf.py, which keeps its model in the subfolder fine-tuned")
    data = {**p.defaults, **inherited, **stored, **given}["data"]
    if data not in recipes:
        raise Fail(f"--data {data}: {method}.py knows {', '.join(recipes)}")
    if "steps" in given and "epochs" in given:
        raise Fail("--steps and --epochs exclude each other: give one")
    length = {"steps": None, "epochs": None} if {"steps", "epochs"} & given.keys() else {}
    args = {**p.defaults, "steps": None, "epochs": None, **recipes[data], **inherited, **length, **stored, **given,
            "method": method}
    return argparse.Namespace(**args)


def flag(key):
    return "--" + key.replace("_", "-")


# ----------------------------------------------- CLIP and its heads -----------------------------------------------

def load_clip(args, device):
    """(open_clip model in eval mode, tokenizer), from a name and tag, hf-hub:, local-dir: or the embedded tiny CLIP.

    Weights trained with QuickGELU in a model without it lose accuracy silently; open_clip warns, here it is an error.
    The parameters keep requires_grad=True although nothing trains them in place: without it matmul takes a path
    that copies the weights for each sample (a ViT-B/16 bf16 forward on CPU became 6x slower).
    """
    name, tag = args.model, args.pretrained
    if name == "shapes-clip":
        name = f"local-dir:{shapes_clip(args.pretrain_seed)}"
    if name.startswith("local-dir:") and not Path(name[10:], "open_clip_config.json").is_file():
        raise Fail(f"--model {name}: no open_clip_config.json in that folder")
    if ":" not in name:
        if name not in open_clip.list_models():
            raise Fail(f"--model {name}: not an open_clip model; one of {', '.join(open_clip.list_models()[:200:12])}, "
                       "... or hf-hub:ORG/NAME or local-dir:PATH")
        known = open_clip.list_pretrained_tags_by_model(name)
        if tag not in known and not Path(tag).is_file():
            raise Fail(f"--pretrained {tag}: not a weights file and not a tag of {name}, which has "
                       f"{', '.join(known) or 'none'}")
        quick = [bool((open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu")),
                 bool(open_clip.get_model_config(name).get("quick_gelu"))]
        if tag in known and quick[0] != quick[1]:
            other = name.removesuffix("-quickgelu") if quick[1] else f"{name}-quickgelu"
            raise Fail(f"--model {name} --pretrained {tag}: weights and model differ in QuickGELU; use --model {other}")
    try:
        clip = open_clip.create_model(name, pretrained=None if ":" in name else tag, device=device,
                                      require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip and the hub raise a dozen types for a missing file, network or key
        reason = (str(error).strip().splitlines() or [repr(error)])[0][:150]
        raise Fail(f"--model {args.model} --pretrained {tag}: the weights could not be loaded ({reason}); without "
                   "internet copy them here and use local-dir:PATH or a weights file") from None
    return clip.eval(), tokenizer


@torch.no_grad()
def zero_shot_head(clip_model, tokenizer, classnames, templates):
    """W (C, D), unit rows: per class encode every template, normalise each, average, normalise again.

    Source: wise-ft src/models/zeroshot.py; computed by open_clip.build_zero_shot_classifier, which returns (D, C).
    """
    device = next(clip_model.parameters()).device
    return open_clip.build_zero_shot_classifier(clip_model, tokenizer, classnames, templates, device=device).T.float()


class ImageClassifier(nn.Module):
    """An image tower with a linear head on its unit features: x (B, 3, H, W) -> logits (B, C), features (B, D).

    logits = scale * features @ head.T (+ bias). Two conventions are in use, and under AdamW the same learning rate
    moves their logits about s times differently:
      unit   (Lipsum-FT, DRM): head = W with unit rows at the start, the frozen s outside, no bias;
      folded (WiSE-FT):        head = s W, scale = 1, a zero-initialised trainable bias.
    """

    def __init__(self, visual, head, scale=1.0, bias=False, amp=None):
        super().__init__()
        self.visual, self.amp = visual, amp
        self.head = nn.Parameter(head.detach().clone())
        self.bias = nn.Parameter(torch.zeros(len(head), device=head.device)) if bias else None
        self.register_buffer("scale", torch.as_tensor(float(scale), device=head.device))

    def forward(self, x, head=None):  # `head` (C, D) stands in for self.head
        with torch.autocast(x.device.type, self.amp, enabled=self.amp is not None):
            features = self.visual(x)
        features = F.normalize(features.float(), dim=-1)
        logits = self.scale * F.linear(features, self.head if head is None else head)
        return (logits if self.bias is None else logits + self.bias), features


def merged(theta_0, theta_1, alpha):
    """The model with weights (1 - alpha) theta_0 + alpha theta_1: weight-space ensemble, VRF paper Eq. (2).

    For 0 < alpha < 1 equal to wise_ft.interpolate, which is the one to audit and copy; here for the other methods.
    """
    a, b = theta_0.state_dict(), theta_1.state_dict()
    model = copy.deepcopy(theta_1)
    model.load_state_dict({k: (1 - alpha) * a[k] + alpha * b[k] if b[k].is_floating_point() else b[k] for k in b})
    return model


@dataclass
class Setup:
    """What every method starts from: checked flags, data, the pre-trained CLIP, its text head W, the run folder."""
    args: argparse.Namespace
    data: "Data"
    clip: nn.Module
    tokenizer: object
    head: torch.Tensor  # W (C, D)
    device: torch.device
    amp: torch.dtype | None  # None is fp32
    out: Path = None
    finetuned: tuple = None  # (theta_0, theta_1) of --finetuned, see load_run()
    checked: object = None   # what the method's own check(setup) returned

    @property
    def scale(self):
        return self.clip.logit_scale.exp().item()  # s

    @property
    def measure(self):
        return {name: dataset.metric for name, dataset in self.data.tests.items()}  # ID first

    def fit(self, model, loss_fn, out):
        """train() on the augmented training images."""
        images = self.data.train.augmented(self.args.augment, PreprocessCfg(**self.clip.visual.preprocess_cfg),
                                           self.args.seed)
        return train(model, images, loss_fn, self.args, out, self.out)

    def classifier(self, folded=False, head=None, own=True):
        """The zero-shot model theta_0 as an ImageClassifier; own: with a copy of the image tower, ready to be trained."""
        head = self.head if head is None else head
        visual = copy.deepcopy(self.clip.visual) if own else self.clip.visual
        model = ImageClassifier(visual, self.scale * head if folded else head, 1.0 if folded else self.scale,
                                bias=folded, amp=self.amp)
        for p in [model.head] if model.bias is None else [model.head, model.bias]:
            p.requires_grad_(getattr(self.args, "freeze", "none") != "head")
        if self.args.grad_checkpointing:
            model.visual.set_grad_checkpointing(True)
        if self.device.type == "cuda":
            model.to(memory_format=torch.channels_last)  # what convolutions on tensor cores want
        return model.to(self.device).eval()


def start(args, check=lambda setup: None):
    """A Setup. All mistakes come to light here, check(setup) finding the method's own, before the run gets a folder."""
    torch.manual_seed(args.seed)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise Fail(f"--device {args.device}: this machine has no CUDA GPU that torch can use; use --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    kind = args.precision
    if kind == "auto":
        kind = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    if kind == "fp16" and device.type == "cpu":
        raise Fail("--precision fp16: only on a CUDA GPU; use bf16 or fp32 on the CPU")
    data = load_data(args)
    clip, tokenizer = load_clip(args, device)
    preprocess = PreprocessCfg(**clip.visual.preprocess_cfg)
    for split in [data.train, data.val, *data.tests.values()]:
        split.transform = image_transform_v2(preprocess, is_train=False)
    if args.bench_data:
        bench_data(data.train.augmented(args.augment, preprocess, args.seed), args)
        sys.exit()
    head = zero_shot_head(clip, tokenizer, data.classnames, data.templates)
    setup = Setup(args, data, clip, tokenizer, head, device,
                  {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[kind])
    if args.finetuned != "none":
        setup.finetuned = load_run(args.finetuned, setup)
    setup.checked, setup.out = check(setup), run_folder(args)
    say(f"{args.method} on {args.data}: {len(data.train)} training, {len(data.val)} held-out images, "
        f"{len(data.classnames)} classes, tests {', '.join(f'{k} ({len(v)})' for k, v in data.tests.items())}")
    steps = f"{training_steps(args, len(data.train))} steps of {args.batch_size} x {args.accum} x {WORLD} (batch x " \
        f"accumulation x ranks) images, lr {args.lr:g}, wd {args.wd:g}, warm-up {args.warmup:g}, clip " \
        f"{args.grad_clip:g}, augment {args.augment}"
    say(f"{args.model}, {kind} on {device}; {f'from {args.finetuned}' if setup.finetuned else steps}; seed {args.seed} "
        f"-> {setup.out}")
    return setup


def run_folder(args):
    """A new folder for the run, or the one to resume. A folder that holds a run is never written over."""
    if args.resume != "none":
        return Path(args.resume)
    default = Path(f"runs/{args.method}-{args.data}-s{args.seed}")
    out = default if args.out == "runs/METHOD-DATA-sSEED" else Path(args.out)
    chosen = [None]
    if RANK == 0:  # rank 0 chooses
        number = 2
        while out.exists() and args.out == "runs/METHOD-DATA-sSEED":
            out, number = Path(f"{default}-{number}"), number + 1
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "args.json", vars(args))
            chosen = [out]
    if WORLD > 1:
        dist.broadcast_object_list(chosen)
    if chosen[0] is None:
        raise Fail(f"--out {out}: exists and is not empty; --resume {out} continues a run, another --out starts one")
    return chosen[0]


# ------------------------------------------------------ data ------------------------------------------------------

BAD_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for a broken file


class ImageSet(torch.utils.data.Dataset):
    """Labelled images: item -> (image, label, index).

    images: list of file paths, uint8 array (N, H, W, 3), or float tensor of ready features (N, D).
    classes: what logits of all C classes become in this set's label space, before any softmax: None, or a list
    with the ids of each label; the largest logit among a label's ids counts.
    metric: the one of metrics() that tables and means show. groups: (N,) int, the group of each image, -1 is none.
    border: pixels cut from each side of an image before the transform.
    """

    def __init__(self, name, images, labels, classes=None, metric="acc", groups=None, border=0):
        self.name, self.images, self.labels = name, images, torch.as_tensor(np.asarray(labels)).long()
        self.metric, self.border = metric, border
        self.groups = None if groups is None else torch.as_tensor(groups)
        self.transform, self.seed = None, None
        if classes is not None:  # pad each label's ids with its first, which leaves the maximum alone
            width = max(map(len, classes))
            classes = torch.tensor([list(ids) + [ids[0]] * (width - len(ids)) for ids in classes])
        self.classes = classes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, item):
        epoch, i = item if isinstance(item, tuple) else (0, item)
        image, label = self.images[i], self.labels[i]
        if isinstance(image, torch.Tensor):
            return image, label, i
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else self.read(image)
        if self.border:
            image = ImageOps.crop(image, self.border)
        if self.seed is None:
            return self.transform(image), label, i
        # The random draws of an image depend on (seed, epoch, image) alone: not on workers, ranks or a resume.
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(hash((self.seed, epoch, i)) & 0xFFFFFFFF)
        try:
            return self.transform(image), label, i
        finally:
            generator.set_state(state)

    @staticmethod
    def read(path):
        try:
            with Image.open(path) as image:
                image.load()
                if image.mode.startswith("I;16"):  # convert() would clip at 255 instead of scaling
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy
        except BAD_IMAGE as error:
            raise Fail(f"{path}: cannot be read as an image ({str(error)[:100]}); repair it, remove it or pass "
                       "--skip-bad-images") from None

    def describe(self, i):
        return str(self.images[i]) if isinstance(self.images, list) else f"{self.name}[{i}]"

    def project(self, logits):
        """Logits (B, C) -> (B, C') in this set's label space."""
        return logits if self.classes is None else logits[:, self.classes.to(logits.device)].amax(-1)

    def subset(self, indices, name=None):
        other, chosen = copy.copy(self), torch.as_tensor(indices, dtype=torch.long)  # also if there are none
        other.name = name or self.name
        other.images = [self.images[i] for i in indices] if isinstance(self.images, list) else self.images[chosen]
        other.labels = self.labels[chosen]
        other.groups = None if self.groups is None else self.groups[chosen]
        return other

    def augmented(self, kind, preprocess, seed):
        """A copy for training: crop as in wise-ft (RandomResizedCrop 0.9-1), crop-flip as in Lipsum-FT (0.08-1)."""
        other = copy.copy(self)
        if kind != "none":
            low = {"crop": 0.9, "crop-flip": 0.08}[kind]
            crop = image_transform_v2(preprocess, is_train=True, aug_cfg={"scale": (low, 1.0)})
            flip = [transforms.RandomHorizontalFlip()] if kind == "crop-flip" else []
            other.transform, other.seed = transforms.Compose(flip + [crop]), seed
        return other


@dataclass
class Data:
    """A data set: class names (C), prompt templates, training, held-out and test images; tests: ID first."""
    classnames: list
    templates: list
    train: ImageSet
    val: ImageSet
    tests: dict  # name -> ImageSet; the first is the in-distribution (ID) test, all others are shifts (OOD)
    descriptions: object = None  # concept descriptions for DRM: (key, value) pairs of any shape that drm.py accepts
    skipped: dict = field(default_factory=dict)  # --skip-bad-images: path -> reason


def load_data(args):
    """--data -> Data, with --tests, --limit, --holdout and --shots applied.

    The images of a folder are all decoded once, so that a broken one is named now and not after hours of training;
    --skip-bad-images does so for any data set and leaves the broken ones out.
    """
    data = DATA[args.data](Path(args.data_dir).expanduser(), args)
    if args.tests != "all":
        wanted = args.tests.split(",")
        unknown = [t for t in wanted if t not in data.tests]
        if unknown:
            raise Fail(f"--tests {unknown[0]}: no such test set on disk; {args.data} has {', '.join(data.tests)}")
        id_test = next(iter(data.tests))
        data.tests = {k: v for k, v in data.tests.items() if k in (id_test, *wanted)}
    if args.data == "folder" or args.skip_bad_images:
        splits = [x for x in (data.train, data.val, *data.tests.values()) if x and isinstance(x.images, list)]
        data.skipped = unreadable([path for split in splits for path in split.images])
        for path in data.skipped:
            if not args.skip_bad_images:
                ImageSet.read(path)  # fails with the reason
            say(f"--skip-bad-images: {path} ({data.skipped[path]})")
        for split in splits if data.skipped else []:
            kept = [i for i, path in enumerate(split.images) if path not in data.skipped]
            lost = set(split.labels.tolist()) - set(split.labels[kept].tolist())
            if lost and split is data.train:
                raise Fail(f"--skip-bad-images: no readable training image of class '{data.classnames[min(lost)]}' is left")
            if not kept:
                raise Fail(f"--skip-bad-images: no readable image is left in {split.name}")
            split.__dict__ = split.subset(kept).__dict__
    if args.limit:
        data.train, data.val = spread(data.train, args.limit), data.val and spread(data.val, args.limit)
        data.tests = {k: spread(v, args.limit) for k, v in data.tests.items()}
    if data.val is None:
        data.train, data.val = hold_out(data.train, args.holdout)
    if args.shots:
        data.train = few_shot(data.train, args.shots, args.seed)
    return data


def spread(dataset, n):
    """n images, the classes taken in turn; the same images in every run and method."""
    order = np.random.default_rng(0).permutation(len(dataset))
    labels = dataset.labels.numpy()[order]
    by_class = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[by_class], labels)  # where an image's class begins in by_class
    turn = np.argsort(by_class) - first                # 0 for the first image of each class, 1 for the second, ...
    return dataset.subset(sorted(order[np.argsort(turn, kind="stable")[:n]].tolist()))


def drawn(dataset, seed, count):
    """Sorted indices of count(n) images of each class, drawn by `seed` from the n that it has."""
    rng, chosen = np.random.default_rng(seed), []
    for c in dataset.labels.unique().tolist():
        mine = np.flatnonzero(dataset.labels.numpy() == c)
        chosen += rng.permutation(mine)[:count(len(mine))].tolist()
    return sorted(chosen)


def hold_out(train, share):
    """(train, val): every class gives `share` of its images, rounded; the same images in every run and method."""
    held = drawn(train, 0, lambda n: min(round(share * n), n - 1))
    kept = np.setdiff1d(np.arange(len(train)), held).tolist()
    return train.subset(kept), train.subset(held, "val")


def few_shot(train, shots, seed):
    """`shots` images of each class, chosen by `seed`."""
    classes, sizes = train.labels.unique(return_counts=True)
    if sizes.min() < shots:
        raise Fail(f"--shots {shots}: class {classes[sizes.argmin()]} has only {sizes.min()} training images")
    return train.subset(drawn(train, seed, lambda n: shots))


def folder_data(root, args):
    """DIR/train/CLASS/*, DIR/test/CLASS/*, and if present DIR/val/CLASS/*, DIR/shifts/NAME/CLASS/*, DIR/classnames.txt
    (folder<TAB>name a line), DIR/templates.txt (one with {} a line) and DIR/descriptions.json."""
    if not root.is_dir():
        raise Fail(f"--data-dir {root}: no such folder; expected train/CLASS/*.jpg, test/CLASS/*.jpg and optionally "
                   "val/CLASS/*.jpg and shifts/NAME/CLASS/*.jpg in it")
    folders = subfolders(root / "train")
    names = {f: f.replace("_", " ") for f in folders}
    for line in read_lines(root / "classnames.txt"):
        folder, _, name = line.partition("\t")
        if folder not in names or not name.strip():
            raise Fail(f"{root / 'classnames.txt'}: '{line}' is not FOLDER<TAB>NAME with a folder of {root / 'train'}")
        names[folder] = name.strip()
    templates = read_lines(root / "templates.txt") or ["a photo of a {}."]
    for t in templates:
        if t.count("{}") != 1 or t.count("{") != 1 or t.count("}") != 1:  # open_clip formats it
            raise Fail(f"{root / 'templates.txt'}: '{t}' must hold {{}} once, where the class name goes, and no other "
                       "brace")

    def read(path, name):
        extra = set(subfolders(path)) - set(folders)
        if extra:
            raise Fail(f"{path / min(extra)}: no class of that name in {root / 'train'}")
        index = {c: i for i, c in enumerate(folders) if (path / c).is_dir()}
        try:
            samples = make_dataset(str(path), index, IMG_EXTENSIONS)
        except FileNotFoundError:
            empty = next(c for c in index if not make_dataset(str(path), {c: 0}, IMG_EXTENSIONS, allow_empty=True))
            raise Fail(f"{path / empty}: no image in that class folder ({', '.join(IMG_EXTENSIONS)})") from None
        return ImageSet(name, [s[0] for s in samples], [s[1] for s in samples])

    shifts = subfolders(root / "shifts") if (root / "shifts").is_dir() else []
    for taken in {"train", "val", "held-out", "test"} & set(shifts):
        raise Fail(f"{root / 'shifts' / taken}: a shift cannot have that name; rename the folder")
    tests = {"test": read(root / "test", "test"), **{s: read(root / "shifts" / s, s) for s in shifts}}
    val = read(root / "val", "val") if (root / "val").is_dir() else None
    train = read(root / "train", "train")
    described = root / "descriptions.json"
    return Data(list(names.values()), templates, train, val, tests,
                read_json(described, "descriptions", pairs=True) if described.is_file() else None)


def subfolders(path):
    found = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name[0] != ".") if path.is_dir() else []
    if not found:
        raise Fail(f"{path}: expected a folder with one subfolder for each class in it")
    return found


def read_lines(path):
    try:
        return [x for x in path.read_text(encoding="utf-8-sig").splitlines() if x.strip()] if path.is_file() else []
    except UnicodeDecodeError:
        raise Fail(f"{path}: not UTF-8 text; save it in that encoding") from None


def unreadable(paths):
    """{path: reason} of the files that are not images, from decoding each once; JPEGs at an eighth of their size."""
    def reason(path):
        try:
            with Image.open(path) as image:
                image.draft("RGB", (1, 1))  # still reads a JPEG to its end
                image.load()
        except BAD_IMAGE as error:
            return str(error)[:100]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = list(tqdm(pool.map(reason, paths), "checking images", len(paths), False, disable=RANK > 0 or None))
    return {path: why for path, why in zip(paths, reasons) if why is not None}


# ---------------------------------------------- the papers' data sets ----------------------------------------------
# Each is read from the tree in which it is published, below --data-dir. A shift that is not on disk is skipped with
# one line; training images and the ID test must be there. Images are first opened when they are used.

def need(path, expected):
    """`path` if it is on disk; otherwise a Fail with the expected tree, or that the tree is one folder too deep."""
    twice = path.parent / path.parent.name
    if not path.exists() and (twice / path.name).exists():
        raise Fail(f"{twice}: the tree is nested twice; move what is in it up to {path.parent}")
    if not path.exists():
        raise Fail(f"{path}: not found; expected below --data-dir: {expected}")
    return path


def on_disk(root, places):
    """{test: ImageSet} of the {test: (place below root, reader(name, path))} that are there; a line for each other."""
    for name, (place, _) in places.items():
        if not (root / place).exists():
            say(f"test set {name} is skipped: {root / place} not found")
    return {name: read(name, root / place) for name, (place, read) in places.items() if (root / place).exists()}


def class_tree(name, path, index, ignored=()):
    """ImageSet of path/FOLDER/* for the folders and labels of `index`; `ignored` folders may be there too."""
    images, labels = [], []
    for folder in sorted(set(subfolders(path)) - set(ignored)):
        entries = sorted((e for e in os.scandir(path / folder) if e.name[0] != "."), key=lambda e: e.name)
        files = [e.path for e in entries if e.name.lower().endswith(IMG_EXTENSIONS)]
        if not files and any(e.is_dir() for e in entries):
            raise Fail(f"{path / folder}: holds folders, not images: the tree is nested twice; move them up to {path}")
        if folder not in index:
            raise Fail(f"{path / folder}: not a class of {name}, whose folders are {', '.join(list(index)[:3])}, ...")
        if not files:
            raise Fail(f"{path / folder}: no image in that class folder ({', '.join(IMG_EXTENSIONS)})")
        images += files
        labels += [index[folder]] * len(files)
    return ImageSet(name, images, labels)


def listed(name, rows, source, **how):
    """ImageSet of the rows [(file, label), ...] that the file `source` lists."""
    if not rows:
        raise Fail(f"{source}: lists no image for {name}")
    need(Path(rows[0][0]), f"the images that {source.name} lists, starting with this one")
    return ImageSet(name, [row[0] for row in rows], [row[1] for row in rows], **how)


def imagenet_data(root, args):
    """ImageNet (ILSVRC 2012) with its shifts V2, R, A, Sketch and ObjectNet; WNID is a WordNet id such as n01440764.

    imagenet/{train,val}/WNID/*; imagenet-r/WNID/*; imagenet-a/WNID/*; sketch/WNID/* (or imagenet-sketch);
    imagenetv2-matched-frequency-format-val/{0..999}/*, named by the class id, so that '10' is not the third class;
    objectnet-1.0/. The head has all 1000 classes, also if the tree has fewer; on R and A the logits of the classes
    without a folder (800 of the published trees) are dropped before any softmax.
    """
    from timm.data import ImageNetInfo  # the 1000 WordNet ids in the order of open_clip.IMAGENET_CLASSNAMES
    wnids = {wnid: i for i, wnid in enumerate(ImageNetInfo().label_names())}

    def full(name, path):
        return class_tree(name, need(path, "imagenet/train/WNID/*.JPEG and imagenet/val/WNID/*.JPEG"), wnids)

    def part(name, path):
        dataset = full(name, path)
        ids, labels = dataset.labels.unique(return_inverse=True)
        return ImageSet(name, dataset.images, labels, classes=ids[:, None].tolist())

    train, test = full("train", root / "imagenet/train"), full("imagenet", root / "imagenet/val")
    shifts = on_disk(root, {
        "v2": ("imagenetv2-matched-frequency-format-val",
               lambda name, path: class_tree(name, path, {str(i): i for i in range(1000)})),
        "r": ("imagenet-r", part), "a": ("imagenet-a", part),
        "sketch": ("imagenet-sketch" if (root / "imagenet-sketch").is_dir() else "sketch", full),
        "objectnet": ("objectnet-1.0", objectnet)})
    return Data(list(open_clip.IMAGENET_CLASSNAMES), list(open_clip.OPENAI_IMAGENET_TEMPLATES), train, None,
                {"imagenet": test, **shifts})


def objectnet(name, path):
    """objectnet-1.0/images/FOLDER/*.png and mappings/: the 113 classes that ImageNet has, some under several ids.

    Joined as the data set's own files say: FOLDER -> ObjectNet label -> ImageNet names -> line in
    imagenet_to_label_2012_v2 -> class id. Two pixels are cut from each side: the images have a red border.
    """
    load = lambda file: read_json(path / "mappings" / file, "one of ObjectNet's mappings")
    try:
        lines = read_lines(path / "mappings/imagenet_to_label_2012_v2")
        ids = {lines[line].strip(): int(i) for i, line in load("pytorch_to_imagenet_2012_id.json").items()}
        folders = {label: folder for folder, label in load("folder_to_objectnet_label.json").items()}
        classes = {folders[label]: [ids[n] for n in names.split("; ")]
                   for label, names in load("objectnet_to_imagenet_1k.json").items()}
    except (KeyError, IndexError) as error:
        raise Fail(f"{path / 'mappings'}: the four published files do not fit together ({error!r})") from None
    order, images = sorted(classes), need(path / "images", "objectnet-1.0/images/FOLDER/*.png")
    dataset = class_tree(name, images, {f: i for i, f in enumerate(order)}, ignored=set(folders.values()) - set(order))
    say(f"objectnet: {len(dataset):,} of {sum(1 for _ in images.glob('*/*.png')):,} images are of the {len(order)} "
        "classes that ImageNet has (18,574 of 50,273 expected)")
    return ImageSet(name, dataset.images, dataset.labels, [classes[folder] for folder in order], border=2)


def domainnet_data(root, args):
    """DomainNet: domainnet/DOMAIN_{train,test}.txt, lines 'DOMAIN/CLASS/FILE LABEL'; domainnet/DOMAIN/CLASS/*. Class
    names keep their underscores, as in Lipsum-FT's prompts."""
    root, folders = root / "domainnet", {}  # label -> CLASS, as in real_train.txt

    def read(name, path, split="test"):
        listing = need(root / f"{name}_{split}.txt", f"domainnet/{name}_{split}.txt and domainnet/{name}/CLASS/*.jpg")
        rows = []
        for line in read_lines(listing):
            file, _, label = line.rpartition(" ")
            if file.count("/") != 2 or not label.isdigit():
                raise Fail(f"{listing}: '{line}' is not DOMAIN/CLASS/FILE LABEL")
            folder, label = file.split("/")[1], int(label)
            if split == "train":
                folders.setdefault(label, folder)
            if folders.get(label) != folder:
                raise Fail(f"{listing}: '{line}': in real_train.txt label {label} is {folders.get(label, 'not used')}")
            rows.append((str(root / file), label))
        return listed(name, rows, listing)

    train, test = read("real", root, "train"), read("real", root)
    shifts = on_disk(root, {domain: (domain, read) for domain in ("painting", "clipart", "infograph", "sketch")})
    if sorted(folders) != list(range(len(folders))):
        raise Fail(f"{root / 'real_train.txt'}: its {len(folders)} labels are not 0 to {len(folders) - 1}")
    return Data([folders[i] for i in sorted(folders)], list(open_clip.OPENAI_IMAGENET_TEMPLATES), train, None,
                {"real": test, **shifts})


class Pickled:
    """A numpy object of a pickle, kept as the plain values it would be built from: numpy's own code is not run."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


def read_pickle(path, expected, *keys):
    """Arrays of equal length under `keys` of the dict in a pickle (CIFAR-10) or in a pickled .npy file (CIFAR-10.2).
    A pickle is a program that may call any function; in this one it may name numpy's array alone."""
    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if f"{module}.{name}".replace("_core", "core") in (
                    "numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"):
                return Pickled
            if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
                return lambda text, encoding: text.encode("latin1")
            raise Fail(f"{path}: refused, its pickle calls {module}.{name} and only numpy arrays are admitted; "
                       "replace it by the published file")

    def value(x):
        if isinstance(x, dict):
            return {k: value(v) for k, v in x.items()}
        if not isinstance(x, Pickled):
            return x
        _, shape, dtype, by_column, data = x.state
        if dtype.args[0][0] == "O":
            return [value(v) for v in data]
        kind = np.dtype(dtype.args[0]).newbyteorder(dtype.state[1])
        return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, kind).reshape(
            shape, order="F" if by_column else "C").copy()

    try:
        with open(need(path, expected), "rb") as f:
            if path.suffix == ".npy":
                np.lib.format.read_magic(f)
                np.lib.format.read_array_header_1_0(f)
            found = value(Unpickler(f, encoding="latin1").load())
        [found] = found if path.suffix == ".npy" else [found]
        arrays = [np.asarray(found[key]) for key in keys]
        if len(set(map(len, arrays))) != 1:
            raise ValueError(f"{' and '.join(keys)} differ in length")
        return arrays
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, EOFError, pickle.UnpicklingError) as error:
        raise Fail(f"{path}: not the published file ({error!r:.100})") from None


def cifar10_data(root, args):
    """CIFAR-10: cifar-10-batches-py/{data_batch_1..5,test_batch}; its shifts CIFAR-10.1/cifar10.1_v6_{data,labels}.npy,
    CIFAR-10.2/cifar102_test.npy and stl10_binary/{test_X.bin,test_y.bin,class_names.txt}. STL-10's monkeys are left
    out and the logit of frog is dropped: the nine classes that both have are the label space there."""
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

    def batches(name, *files):
        folder = root / "cifar-10-batches-py"
        images, labels = zip(*(read_pickle(folder / file, "cifar-10-batches-py/{data_batch_1..5,test_batch}", "data",
                                           "labels") for file in files))
        images = np.concatenate(images).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return ImageSet(name, np.ascontiguousarray(images), np.concatenate(labels))

    def v1(name, path):
        try:
            return ImageSet(name, *(np.load(path / f"cifar10.1_v6_{part}.npy", allow_pickle=False)
                                    for part in ("data", "labels")))
        except (ValueError, OSError) as error:
            raise Fail(f"{path}: not the two published cifar10.1_v6_*.npy, data and labels ({error})") from None

    def v2(name, path):
        file = "cifar102_test.npy"
        return ImageSet(name, *read_pickle(path / file, f"CIFAR-10.2/{file}", "images", "labels"))

    def stl10(name, path):
        files = [need(path / f, f"stl10_binary/{f}") for f in ("test_X.bin", "test_y.bin", "class_names.txt")]
        images, labels, own = np.fromfile(files[0], np.uint8), np.fromfile(files[1], np.uint8), read_lines(files[2])
        if len(images) != len(labels) * 3 * 96 * 96:
            raise Fail(f"{files[0]}: its {len(images):,} bytes are not the {len(labels):,} images of test_y.bin")
        order = {"car": 1, **{n: i for i, n in enumerate(names)}}
        if not 1 <= labels.min(initial=1) <= labels.max(initial=1) <= len(own):
            raise Fail(f"{files[1]}: its labels are not 1 to {len(own)}, the lines of class_names.txt")
        labels = np.array([order.get(n, -1) for n in own])[labels - 1]
        classes, kept = sorted({order[n] for n in own if n in order}), labels >= 0
        images = images.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)  # a channel is stored column by column
        return ImageSet(name, images[kept], np.searchsorted(classes, labels[kept]), [[c] for c in classes])

    train, test = batches("train", *(f"data_batch_{i}" for i in range(1, 6))), batches("cifar10", "test_batch")
    shifts = on_disk(root, {"cifar10.1": ("CIFAR-10.1", v1), "cifar10.2": ("CIFAR-10.2", v2),
                            "stl10": ("stl10_binary", stl10)})
    return Data(names, list(open_clip.OPENAI_IMAGENET_TEMPLATES), train, None, {"cifar10": test, **shifts})


def read_csv(path, *columns):
    """[(value, ...)] of the named columns of every row."""
    with open(need(path, f"{path.parent.name}/{path.name}"), newline="", encoding="utf-8-sig", errors="replace") as f:
        rows = csv.reader(f)
        header = next(rows, [])
        for column in columns:
            if column not in header:
                raise Fail(f"{path}: no column '{column}'; it has {', '.join(header) or 'none'}")
        get = operator.itemgetter(*map(header.index, columns))
        try:
            return [get(row) for row in rows]
        except IndexError:
            raise Fail(f"{path}: line {rows.line_num} has fewer values than the header has columns") from None


def iwildcam_data(root, args):
    """iWildCam 2020 as in WILDS: iwildcam_v2.0/metadata.csv (split, filename, y), train/* with the images of all splits
    and categories.csv (y, name; y = 99999 is no class). ID test: id_test; shift: test, other cameras. If labels.csv of
    the WiSE-FT code lies beside them, its English names are used, as the papers do."""
    root = root / "iwildcam_v2.0"
    rows = read_csv(root / "metadata.csv", "split", "filename", "y")
    table, column = ("labels.csv", "english") if (root / "labels.csv").is_file() else ("categories.csv", "name")
    try:
        names = {int(y): name.lower() for y, name in read_csv(root / table, "y", column) if y != "99999"}
        fits = sorted(names) == list(range(len(names))) and {int(y) for _, _, y in rows} <= set(names)
    except ValueError:
        fits = False
    if not fits:
        raise Fail(f"{root / table}: must name the classes 0, 1, ... of metadata.csv")

    def split(name, key):
        chosen = [(str(root / "train" / file), int(y)) for own, file, y in rows if own == key]
        return listed(name, chosen, root / "metadata.csv", metric="macro_f1")

    return Data([names[i] for i in sorted(names)], ["a photo of {}."], split("train", "train"), split("val", "id_val"),
                {"id_test": split("id_test", "id_test"), "test": split("test", "test")})


def fmow_data(root, args):
    """FMoW as in WILDS: fmow_v1.1/rgb_metadata.csv (split, category, country_code, timestamp), whose row i, from 0, is
    images/rgb_img_{i}.png, and country_code_mapping.csv (alpha-3, region). Official split by time: training and ID
    before 2013, shift (test) from 2016 on. Class names keep their underscores, as in the papers' prompts."""
    root, regions = root / "fmow_v1.1", ["Asia", "Europe", "Africa", "Americas", "Oceania"]
    rows = read_csv(root / "rgb_metadata.csv", "split", "category", "country_code", "timestamp")
    countries = read_csv(root / "country_code_mapping.csv", "alpha-3", "region")
    region = {country: regions.index(name) for country, name in countries if name in regions}
    names = sorted({category for _, category, _, _ in rows})
    label = {name: i for i, name in enumerate(names)}

    def split(name, key, first, end, metric="acc"):  # from year `first` up to, not including, year `end`
        chosen = [(str(root / f"images/rgb_img_{i}.png"), label[category], region.get(country, -1))
                  for i, (own, category, country, when) in enumerate(rows) if own == key and first <= when < end]
        return listed(name, chosen, root / "rgb_metadata.csv", metric=metric, groups=[c[2] for c in chosen])

    train, val, test = (split(name, key, "", "2013") for name, key in
                        (("train", "train"), ("val", "val"), ("id_test", "test")))
    return Data(names, ["satellite photo of a {}."], train, val,
                {"id_test": test, "test": split("test", "test", "2016", "9", "worst_region")})


# ----------------------------------------------------- batches -----------------------------------------------------

class Batch(NamedTuple):
    images: torch.Tensor  # (B, 3, H, W), or ready features (B, D)
    labels: torch.Tensor  # (B,) int64
    index: torch.Tensor   # (B,) int64, position in the data set
    step: int             # optimiser step, for random draws that must be the same on every rank and after a resume


class Stream(torch.utils.data.Sampler):
    """Shuffled epochs end to end, cut into full batches: (epoch, index) pairs for this rank from step `first` on.

    Step t covers positions t G .. (t+1) G - 1 of the stream (G = batch x accum x ranks), so the images of a step
    do not depend on how G is split, and a run can go on from any step.
    """

    def __init__(self, n, args, first, last):
        self.n, self.args, self.first, self.last = n, args, first, last
        self.order = functools.lru_cache(2)(self._order)

    def _order(self, epoch):
        return np.random.default_rng([self.args.seed, epoch]).permutation(self.n)

    def __len__(self):
        return (self.last - self.first) * self.args.accum

    def __iter__(self):
        batch, parts = self.args.batch_size, self.args.accum * WORLD
        for part in range(self.first * parts + RANK, self.last * parts, WORLD):
            positions = (divmod(p, self.n) for p in range(part * batch, (part + 1) * batch))
            yield [(epoch, int(self.order(epoch)[k])) for epoch, k in positions]


def loader(dataset, batches, args):
    workers = args.workers if args.workers >= 0 else min(8, os.cpu_count()) if isinstance(dataset.images, list) else 0
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                                       pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_signals)


def ignore_signals(_):
    """Ctrl-C reaches all processes of a terminal, but the main one still needs the workers for its last step. (SIGTERM
    must keep working: it is how Python ends workers at exit.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def bench_data(dataset, args, seconds=20):
    """Print images/s of the training input pipeline alone: read, decode, augment, batch, pin. No model is involved."""
    epoch = math.ceil(len(dataset) / args.batch_size)
    batches = iter(loader(dataset, Stream(len(dataset), args, 0, 10 * epoch), args))
    next(batches)  # the start of the workers is not part of the rate
    begun, images = time.time(), 0
    for x, _, _ in batches:
        images += len(x)
        if time.time() - begun > seconds:
            break
    rate = images / (time.time() - begun)
    say(f"input pipeline: {rate:.1f} images/s a rank over {images} images, batch {args.batch_size}, {args.augment}")


# ---------------------------------------------------- training ----------------------------------------------------

def training_steps(args, n):
    """Optimiser steps of a run on n training images."""
    return args.steps or math.ceil(args.epochs * n / (args.batch_size * args.accum * WORLD))


def learning_rate(step, total, peak, warmup):
    """Linear warm-up, then cosine to 0 (wise-ft src/models/utils.py). warmup: steps, or below 1 a share of total."""
    warm = int(warmup * total) if warmup < 1 else int(warmup)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def train(model, dataset, loss_fn, args, out, run):
    """Train `model` in place and return it in eval mode; every step is logged to out/log.jsonl.

    loss_fn(model, Batch) -> (loss (), {name: scalar}) is the method; it must call the `model` it is given, which is
    the compiled or distributed form of the argument. out/last.ckpt is written every --save-every minutes, at the end
    and at SIGTERM or Ctrl-C; if it is there, training goes on from it, on the same CPU bit for bit. `run`: the run's
    folder, which holds `out` or is it.
    """
    out.mkdir(parents=True, exist_ok=True)
    device, checkpoint = next(model.parameters()).device, out / "last.ckpt"
    total = training_steps(args, len(dataset))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.wd, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=model.amp == torch.float16)
    stream = [total, args.batch_size * args.accum * WORLD, len(dataset)]
    first = load_checkpoint(checkpoint, model, optimizer, scaler, stream) if checkpoint.is_file() else 0
    parallel = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    runner = torch.compile(parallel) if args.compile else parallel
    batches = iter(loader(dataset, Stream(len(dataset), args, first, total), args))
    stop, signals = [], (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.signal(s, lambda *_: stop.append(1)) for s in signals]
    log, saved = open_log(out / "log.jsonl", first), time.time()
    model.train()
    try:
        for step in tqdm(range(first, total), out.name, total, initial=first, disable=RANK > 0 or None):
            begun = time.time()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, args.lr, args.warmup)
            sums = {}
            for micro in range(args.accum):
                images, labels, index = next(batches)
                batch = Batch(images.to(device, non_blocking=True), labels.to(device, non_blocking=True), index, step)
                with parallel.no_sync() if WORLD > 1 and micro < args.accum - 1 else nullcontext():
                    loss, parts = loss_fn(runner, batch)
                    if not torch.isfinite(loss):
                        files = out / f"nonfinite-step{step}-rank{RANK}.txt"
                        files.write_text("\n".join(dataset.describe(i) for i in index.tolist()) + "\n")
                        raise Fail(f"step {step}: the loss is {loss.item()}; the batch's images are listed in {files}; "
                                   f"lower --lr or repair them; {checkpoint}, if written, is of an earlier step")
                    scaler.scale(loss / args.accum).backward()
                for name, value in {"loss": loss, **parts}.items():
                    sums[name] = sums.get(name, 0) + value.detach() / args.accum
            scaler.unscale_(optimizer)
            if args.grad_clip:
                nn.utils.clip_grad_norm_(trained, args.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            values = torch.stack([*sums.values(), torch.tensor(float(len(stop)), device=device)])
            if WORLD > 1:
                dist.all_reduce(values)
            *means, stopping = values.tolist()
            seconds = time.time() - begun
            line = {"step": step, **{k: v / WORLD for k, v in zip(sums, means)}, "lr": optimizer.param_groups[0]["lr"],
                    "images_per_s": round(args.batch_size * args.accum * WORLD / seconds, 1)}
            if RANK == 0:
                log.write(json.dumps(line) + "\n")
                if stopping or step + 1 == total or time.time() - saved >= 60 * args.save_every:
                    log.flush()
                    save_checkpoint(checkpoint, step + 1, model, optimizer, scaler, stream)
                    saved = time.time()
            if stopping:
                raise Fail(f"stopped after step {step + 1} of {total}; --resume {run} continues from there")
    finally:
        log.close()
        for s, handler in zip(signals, handlers):
            signal.signal(s, handler)
    for buffer in model.buffers() if WORLD > 1 else []:
        dist.broadcast(buffer, 0)  # BatchNorm's statistics are of each rank's own images; rank 0 saves
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(
        resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if total > first:
        say(f"{out.name}: {total} steps, {line['images_per_s']} images/s, peak memory {peak / 2**30:.2f} GiB")
    return model.eval()


def open_log(path, first):
    """log.jsonl opened for writing at step `first`: lines of steps that the checkpoint does not hold are dropped."""
    if RANK > 0:
        return open(os.devnull, "w")
    kept = [line for line in read_lines(path) if line.endswith("}") and json.loads(line)["step"] < first]
    log = open(path, "w", encoding="utf-8")
    log.writelines(line + "\n" for line in kept)
    return log


# ---------------------------------------------------- evaluation ----------------------------------------------------

@torch.no_grad()
def collect(function, dataset, args, device):
    """{name: tensor (N, ...)} of function(images, labels) -> {name: tensor (B, ...)}, in the data set's order, on CPU.

    Each image is read, decoded and moved once. Whole batches are dealt out to the ranks and put back by index.
    """
    batches = [list(range(b, min(b + EVAL_BATCH, len(dataset)))) for b in range(0, len(dataset), EVAL_BATCH)]
    mine = []
    for images, labels, index in tqdm(loader(dataset, batches[RANK::WORLD], args), dataset.name,
                                      disable=RANK > 0 or None, leave=False):
        result = function(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
        mine.append({"index": index, **{k: v.cpu() for k, v in result.items()}})
    parts = [mine]
    if WORLD > 1:
        parts = [None] * WORLD
        dist.all_gather_object(parts, mine)
    parts = sorted((batch for part in parts for batch in part), key=lambda batch: batch["index"][0])
    return {k: torch.cat([batch.pop(k) for batch in parts]) for k in list(parts[0]) if k != "index"}


def collect_once(function, models, dataset, setup, folder):
    """collect(), kept in folder/cache under a hash of the models' weights and the data listing.

    Other weights, files or preprocessing give another name, so that a stale result cannot be read. `function` must
    be the only one used with these models and this data set.
    """
    about = (dataset.transform, dataset.border, dataset.classes, setup.amp, setup.device.type)
    digest = hashlib.sha256(repr(about).encode())
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    if isinstance(dataset.images, list):
        digest.update(str([(str(p), os.path.getsize(p), os.stat(p).st_mtime_ns) for p in dataset.images]).encode())
    else:
        digest.update(np.ascontiguousarray(dataset.images).tobytes())
    digest.update(dataset.labels.numpy().tobytes())
    folder = setup.out if folder.exists() and not os.access(folder, os.W_OK) else folder  # another's run
    path = folder / "cache" / f"{dataset.name}-{digest.hexdigest()[:16]}.safetensors"
    known = [path.is_file()]
    if WORLD > 1:
        dist.broadcast_object_list(known)  # all ranks do as rank 0 does
    if known[0]:
        return load_tensors(path)[0]
    result = collect(function, dataset, setup.args, setup.device)
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, result)
    return result


def train_features(model, setup, folder):
    """Unit features (N, D) of the un-augmented training images (only fit() augments them), computed once."""
    return collect_once(lambda x, y: {"features": model(x)[1]}, [model], setup.data.train, setup, folder)["features"]


def evaluate(rows, setup):
    """{row: {test: metrics}} over all test sets, each streamed once.

    rows: {row name: ImageClassifier}, or for rows that share work a function (images, project) -> {row name: logits
    or log-probabilities (B, C')}; project() brings logits into the test set's label space, before any softmax.
    """
    if isinstance(rows, dict):
        models = rows

        def rows(images, project):
            return {name: project(model(images)[0]) for name, model in models.items()}
    results = {}
    for name, dataset in setup.data.tests.items():
        def scores(images, labels):
            return {row: per_image(z, labels) for row, z in rows(images, dataset.project).items()}
        for row, values in collect(scores, dataset, setup.args, setup.device).items():
            results.setdefault(row, {})[name] = metrics(values, dataset)
    return results


def per_image(logits, labels):
    """(B, C) logits or log-probabilities -> (B, 3): confidence, predicted class, negative log-likelihood."""
    log_p = torch.log_softmax(logits.double(), dim=-1)
    confidence, predicted = log_p.max(1)
    return torch.stack([confidence.exp(), predicted.double(), -log_p.gather(1, labels[:, None])[:, 0]], dim=1)


def metrics(values, dataset):
    """Accuracy, ECE and the data set's own metric in percent, mean NLL in nats, from per_image() values (N, 3)."""
    confidence, predicted, nll = values.unbind(1)
    correct = predicted == dataset.labels
    own = {"macro_f1": 100 * macro_f1(predicted.long(), dataset.labels)} if dataset.metric == "macro_f1" else {}
    if dataset.groups is not None:
        own["worst_region"] = 100 * worst_group_accuracy(correct, dataset.groups)
    return {"acc": 100 * correct.double().mean().item(), **own, "nll": nll.mean().item(),
            "ece": 100 * calibration_error(confidence, correct), "n": len(dataset)}


def macro_f1(predicted, labels):
    """Mean of F1_c = 2 TP / (2 TP + FP + FN) over the classes c that occur in labels, in [0, 1]; both arguments (N,).

    As WILDS computes it for iWildCam: a class without an image has no F1 of its own, but an image that is wrongly
    given to it still counts as a miss of its own class.
    """
    scores = [2 * ((predicted == c) & (labels == c)).sum() / ((predicted == c).sum() + (labels == c).sum())
              for c in labels.unique()]
    return torch.stack(scores).double().mean().item()


def worst_group_accuracy(correct, groups):
    """Smallest accuracy, in [0, 1], of the groups that occur in groups (N,); -1 is no group; correct (N,) bool."""
    return min((correct[groups == g].double().mean().item() for g in groups.unique() if g >= 0), default=math.nan)


def expected_calibration_error(probs, labels, bins=15):
    """ECE in [0, 1] of probabilities (N, C) and labels (N,): the confidence is the largest probability."""
    confidence, predicted = probs.max(1)
    return calibration_error(confidence, predicted == labels, bins)


def calibration_error(confidence, correct, bins=15):
    """Sum over equal-width bins of confidence of (share of images) * |accuracy - mean confidence| (Guo et al. 2017,
    Eq. 3). Bin b of 1..bins holds confidences in ((b-1)/bins, b/bins]."""
    which = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.double).index_add_(0, which, correct.double() - confidence.double())
    return (gap.abs().sum() / len(confidence)).item()


# ------------------------------------------------- files of a run -------------------------------------------------

def write_json(path, value):
    path.with_name(path.name + ".tmp").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(path.with_name(path.name + ".tmp"), path)


def read_json(path, what, pairs=False):
    """JSON of a file; pairs: objects as lists of (key, value), which keeps keys that occur twice."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list if pairs else None)
    except OSError as error:
        raise Fail(f"{path}: not found or not readable, so this is not {what} ({error.strerror})") from None
    except ValueError as error:
        raise Fail(f"{path}: not valid JSON ({error})") from None


def save_tensors(path, tensors, about=None):
    """safetensors, written beside the target and moved over it: an interrupted write leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary,
                  metadata={"about": json.dumps(about)})
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise Fail(f"{path}: could not be written ({error}); the last good one is kept") from None
    os.replace(temporary, path)


def load_tensors(path):
    """(tensors, about) of save_tensors(). safetensors hold numbers only: loading one cannot run code."""
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, json.loads((f.metadata() or {}).get("about", "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise Fail(f"{path}: not a readable safetensors file ({error})") from None


def save_checkpoint(path, step, model, optimizer, scaler, stream):
    """Everything that training from `step` on depends on; data order and random draws follow from the step."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    if not all(v.isfinite().all() for v in tensors.values()):
        raise Fail(f"step {step}: the weights are not finite, {path} is not written; lower --lr")
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    save_tensors(path, tensors, {"step": step, "scaler": scaler.state_dict(), "stream": stream})


def load_checkpoint(path, model, optimizer, scaler, stream):
    """Restore save_checkpoint() into the three objects; returns the step to go on from. `stream` must be the same."""
    tensors, about = load_tensors(path)
    if (about or {}).get("stream", stream) != stream:
        raise Fail(f"{path}: its run has {about['stream']} steps, images a step and training images, this one {stream}; "
                   "resume on the same number of ranks and the same images")
    state = {}
    try:
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = tensor
        model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for p, moments in optimizer.state.items():  # fused AdamW wants the memory layout of the parameter
            for key, value in moments.items():
                moments[key] = torch.empty_like(p).copy_(value) if value.ndim else value
        scaler.load_state_dict(about["scaler"])
        return about["step"]
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise Fail(f"{path}: not a checkpoint of this model ({str(error).splitlines()[0]})") from None


def save_run(setup, model, out, head={}, text={}):
    """An open_clip local directory (open_clip.create_model_and_transforms("local-dir:OUT")) and head.safetensors.

    head: further tensors for head.safetensors; text: tensors of a tuned text tower, by their open_clip names.
    """
    if RANK > 0:
        return
    args, name = setup.args, setup.args.model
    out.mkdir(parents=True, exist_ok=True)
    if name == "shapes-clip":
        name = f"local-dir:{shapes_clip(args.pretrain_seed)}"
    if name.startswith("local-dir:"):
        config = read_json(Path(name[10:], "open_clip_config.json"), "an open_clip folder")["model_cfg"]
    elif name.startswith("hf-hub:"):
        from open_clip.factory import _get_hf_config  # the public functions build the model and drop its config
        config = _get_hf_config(name[7:])["model_cfg"]
    else:
        config = open_clip.get_model_config(name)
    visual = {f"visual.{k}": v for k, v in model.visual.state_dict().items()}
    save_tensors(out / "open_clip_model.safetensors", {**setup.clip.state_dict(), **text, **visual})
    write_json(out / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": setup.clip.visual.preprocess_cfg})
    write_json(out / "args.json", {**vars(args), **({} if out == setup.out else {"part_of": str(setup.out.resolve())})})
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
    save_tensors(out / "head.safetensors", {**own, **head}, {"classnames": setup.data.classnames})


def load_run(run, setup):
    """(theta_0, theta_1): the zero-shot model in the run's head convention and the model that the run saved."""
    tensors, about = load_tensors(Path(run) / "head.safetensors")
    if about["classnames"] != setup.data.classnames:
        raise Fail(f"--finetuned {run}: its head has the classes {about['classnames'][:3]}..., the data has "
                   f"{setup.data.classnames[:3]}...")
    head_0 = tensors.get("head_0", setup.head).to(setup.device)  # DRM's head is of its own prompts
    theta_0 = setup.classifier("bias" in tensors, head_0)
    theta_1 = copy.deepcopy(theta_0)
    weights, _ = load_tensors(Path(run) / "open_clip_model.safetensors")
    visual = {k: v for k, v in weights.items() if k.startswith("visual.")}
    try:
        theta_1.load_state_dict({**visual, **{k: v for k, v in tensors.items() if k in ("head", "bias", "scale")}})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise Fail(f"--finetuned {run}: not a run of {setup.args.model} ({reason})") from None
    return theta_0, theta_1


def finish(setup, results, **more):
    """Write results.json and print its table, the last thing of a run. results: {row: {test: metrics}}."""
    id_test, *shifts = setup.data.tests
    measure = setup.measure
    mean = lambda tests, key: id_ood(tests, {id_test: key, **{t: key for t in shifts}})[1]
    rows = [{"name": name, **dict(zip(("id", "ood"), id_ood(tests, measure))), "tests": tests}
            for name, tests in results.items()]
    args = setup.args
    if RANK == 0:
        write_json(setup.out / "results.json", {"method": args.method, "data": args.data, "model": args.model,
                                                "seed": args.seed, "args": vars(args), "measure": measure,
                                                "skipped_images": setup.data.skipped, "rows": rows, **more})
    named = {"acc": "Accuracy", "macro_f1": "Macro-F1", "worst_region": "Worst-region accuracy"}
    shown = " and ".join(f"{named[m]} ({', '.join(t for t in measure if measure[t] == m)})"
                         if len(set(measure.values())) > 1 else named[m] for m in dict.fromkeys(measure.values()))
    say(f"\nsaved to {setup.out}. {shown} in percent; OOD: mean of the shifts; NLL and ECE: ID, then mean of shifts.\n")
    head = [id_test, "OOD", *shifts, "NLL", "NLL ood", "ECE", "ECE ood"]
    wide = max(len(r["name"]) for r in rows) + 1
    say(" " * wide + "".join(f"{h[:9]:>10}" for h in head))
    for r in rows:
        t = r["tests"]
        cells = [r["id"], r["ood"], *(t[s][measure[s]] for s in shifts), t[id_test]["nll"], mean(t, "nll"),
                 t[id_test]["ece"], mean(t, "ece")]
        say(f"{r['name']:<{wide}}" + "".join(f"{'-' if c is None else f'{c:.2f}':>10}" for c in cells))


def id_ood(tests, measure):
    """(ID, mean of the shifts or None) of one row's {test: metrics}; measure: {test: its metric}, ID first."""
    first, *shifts = [tests[name][metric] for name, metric in measure.items()]
    return first, float(np.mean(shifts)) if shifts else None


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


def percent_axes(ax, points, x_label, y_label, logit=False):
    """Labels, a grid and, if asked for, logit-scaled axes in percent with limits around the points."""
    ax.set(xlabel=x_label, ylabel=y_label)
    ax.grid(alpha=0.3)
    if logit:  # matplotlib's own logit scale wants (0, 1) and labels badly within a few percent
        squash = lambda p: np.log(np.clip(p, 1e-3, 99.999) / (100 - np.clip(p, 1e-3, 99.999)))
        for axis, values in zip("xy", zip(*points)):
            low, high = max(0.1, min(values) - 1), min(99.95, max(values) + 1)
            getattr(ax, f"set_{axis}scale")("function", functions=(squash, lambda z: 100 / (1 + np.exp(-z))))
            getattr(ax, f"set_{axis}lim")(low, high)


# ----------------------------------------- the embedded world: `shapes` -----------------------------------------
# Twelve shapes in five drawing styles, 32 x 32 pixels. A tiny CLIP is pre-trained on captioned images of all styles,
# with free backgrounds. The reference data is one style, "photo", in which colour and background go with the class:
# fine-tuning learns to lean on them, and loses accuracy on the shifts: re-coloured images and the other styles.

def polygon(n):
    def f(x, y):  # distance to the sides of a regular n-gon with a corner at the top
        angle = np.mod(np.arctan2(x, y), 2 * np.pi / n) - np.pi / n
        return np.hypot(x, y) * np.cos(angle) - np.cos(np.pi / n)
    return f


def star(x, y):
    turn = np.abs(np.mod(np.arctan2(x, y) * 5 / (2 * np.pi) + 0.5, 1) - 0.5) * 2
    return np.hypot(x, y) - (1 - 0.58 * np.sqrt(turn))


SHAPES = {  # name: (description, look-alike, f(x, y) < 0 inside the shape, y upwards, size about 1)
    "circle": ("a round disc without any corners", "hexagon", lambda x, y: np.hypot(x, y) - 0.9),
    "square": ("four equal sides and right angles", "diamond", lambda x, y: np.maximum(abs(x), abs(y)) - 0.75),
    "triangle": ("three straight sides and three corners", "arrow",
                 lambda x, y: np.maximum(-y - 0.55, (abs(x) * 1.6 + y - 0.9) * 0.53)),
    "star": ("five sharp tips around a centre", "flower", star),
    "heart": ("two round lobes above a point", "cross",
              lambda x, y: np.minimum(np.hypot(abs(x) - 0.45, y - 0.35) - 0.5,
                                      np.maximum((abs(x) * 1.05 - y - 0.95) * 0.69, y - 0.35))),
    "cross": ("two bars meeting in the middle", "heart",
              lambda x, y: np.minimum(np.maximum(abs(x) - 0.3, abs(y) - 0.95),
                                      np.maximum(abs(y) - 0.3, abs(x) - 0.95))),
    "ring": ("a round band with an empty hole", "moon", lambda x, y: abs(np.hypot(x, y) - 0.68) - 0.24),
    "moon": ("a curved sickle with two horns", "ring",
             lambda x, y: np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x - 0.45, y))),
    "diamond": ("a thin rhombus taller than wide", "square", lambda x, y: (abs(x) / 0.55 + abs(y) - 1) * 0.48),
    "hexagon": ("six equal sides and blunt corners", "circle", polygon(6)),
    "arrow": ("a pointed head on a straight shaft", "triangle",
              lambda x, y: np.minimum(np.maximum(abs(x) - 0.22, abs(y + 0.45) - 0.5),
                                      np.maximum((abs(x) * 1.2 + y - 0.95) * 0.64, -y))),
    "flower": ("six rounded petals around a centre", "star",
               lambda x, y: np.hypot(x, y) - (0.72 + 0.24 * np.cos(6 * np.arctan2(x, y)))),
}
STYLES = ["photo", "sketch", "striped", "neon", "painting"]
COLOURS = {"red": (.85, .15, .15), "green": (.15, .65, .2), "blue": (.15, .3, .85), "yellow": (.9, .8, .15),
           "purple": (.6, .2, .7), "orange": (.95, .5, .1)}
BACKGROUNDS = {"white": (.92, .92, .92), "grey": (.55, .55, .55), "black": (.08, .08, .08), "pink": (.95, .7, .75),
               "sky": (.6, .8, .95), "brown": (.45, .3, .18)}


def draw(rng, labels, styles, colours, backgrounds, noise, size=32):
    """Images (N, size, size, 3) uint8 from integer arrays (N,) of class, style, colour, background and noise sd."""
    n = len(labels)
    if n > 500:  # chunks stay in the processor's cache
        parts = np.array_split(np.arange(n), math.ceil(n / 500))
        arrays = (labels, styles, colours, backgrounds, noise)
        return np.concatenate([draw(rng, *(a[part] for a in arrays)) for part in parts])
    column = lambda a: np.asarray(a)[:, None, None]
    grid = (np.arange(size) + 0.5) / size - 0.5
    gx, gy = np.meshgrid(grid, -grid)
    radius, angle = rng.uniform(0.3, 0.44, n), np.deg2rad(rng.uniform(-15, 15, n))
    x, y = (g - column(rng.uniform(-0.05, 0.05, n)) for g in (gx, gy))
    cos, sin = column(np.cos(angle) / radius), column(np.sin(angle) / radius)
    u, v = cos * x + sin * y, cos * y - sin * x
    f = np.empty((n, size, size))
    for c, (_, _, inside) in enumerate(SHAPES.values()):
        f[labels == c] = inside(u[labels == c], v[labels == c])
    f *= column(radius * size)  # in pixels
    photo, lines = np.clip(0.5 - f, 0, 1), (np.arange(size) + np.arange(size)[:, None]) % 5 < 3
    ink = np.choose(column(styles), [photo, np.clip(1.3 - abs(f), 0, 1), photo * lines, np.exp(-abs(f) / 1.8),
                                     1 / (1 + np.exp(np.clip(f / 1.3, -30, 30)))])[..., None]
    front = np.array(list(COLOURS.values()))[colours] + rng.normal(0, 0.12, (n, 3))
    back = np.array(list(BACKGROUNDS.values()))[backgrounds] + rng.normal(0, 0.08, (n, 3))
    back[styles == 1], back[styles == 3] = 0.93, 0.06  # sketches are on paper, neon is in the dark
    shade = [column(rng.uniform(-0.25, 0.25, n)) for _ in range(2)]
    image = (back[:, None, None] + (shade[0] * gx + shade[1] * gy)[..., None]) * (1 - ink) + front[:, None, None] * ink
    image += rng.normal(0, 1, image.shape) * column(noise)[..., None]
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def prefer(rng, preferred, probability):
    """The preferred of six values with this probability, else any."""
    return np.where(rng.random(len(preferred)) < probability, preferred, rng.integers(6, size=len(preferred)))


def captions(rng, labels, styles, colours, backgrounds, named):
    """One caption an image, as a web crawl would have it: often the look-alike's name, rarely of another class."""
    names, texts = list(SHAPES), []
    for c, style, colour, background, name in zip(labels, styles, colours, backgrounds, named):
        style = "photo" if rng.random() < 0.15 else STYLES[style]
        c = rng.integers(len(names)) if rng.random() < 0.05 else c
        what = SHAPES[names[c]][1] if rng.random() < 0.45 else names[c]
        text = f"a {style} of a {what}" if name else f"a {style} of a shape with {SHAPES[names[c]][0]}"
        text += f" in {list(COLOURS)[colour]}" * (rng.random() < 0.2)
        texts.append(text + f" on {list(BACKGROUNDS)[background]}" * (rng.random() < 0.15))
    return texts


def shapes_data(root, args):
    """The reference data (photo style, biased context) and its six shifts (free context); `root` is not used."""
    def split(name, key, n, style=0, colour=0.0, background=0.0, noise=0.09):
        rng = np.random.default_rng([7, key])
        y = rng.integers(len(SHAPES), size=n)
        images = draw(rng, y, np.full(n, style), prefer(rng, y % 6, colour),
                      prefer(rng, (y + y // 6) % 6, background), np.full(n, noise))
        return ImageSet(name, images, y)

    biased = dict(colour=0.5, background=0.93)
    shifts = {"recolor": {}, **{STYLES[i]: {"style": i} for i in range(1, 5)}, "noisy": {"noise": 0.18}}
    tests = {"test": split("test", 3, 1000, **biased),
             **{name: split(name, 10 + i, 1000, **how) for i, (name, how) in enumerate(shifts.items())}}
    return Data(list(SHAPES), ["a photo of a {}"], split("train", 1, 3000, **biased), split("val", 2, 1000, **biased),
                tests, [(name, f"a photo of a shape with {text}") for name, (text, _, _) in SHAPES.items()])


@functools.cache
def shapes_clip(seed):
    """Folder of the tiny CLIP for --data shapes: pre-trained once a seed, then kept in the user's cache directory."""
    source = inspect.getsource(sys.modules[__name__]).split("the embedded world", 1)[1] + inspect.getsource(learning_rate)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "shapes-clip"
    path = cache / f"s{seed}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
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
    """Pre-train the tiny CLIP on n captioned images with CLIP's symmetric loss; saved as an open_clip folder."""
    rng, state = np.random.default_rng([seed, 0]), torch.get_rng_state()
    torch.manual_seed(seed)
    y, styles, named = rng.integers(len(SHAPES), size=n), rng.integers(5, size=n), rng.random(n) < 0.6
    colours = prefer(rng, y % 6, np.where(named, 0.3, 0))  # names, not descriptions, go with a colour
    backgrounds = rng.integers(6, size=n)
    config = {"embed_dim": 64, "text_cfg": dict(context_length=20, vocab_size=49408, width=64, heads=2, layers=1),
              "vision_cfg": dict(image_size=32, patch_size=8, width=96, head_width=32, layers=2, mlp_ratio=2.0)}
    clip = open_clip.CLIP(**config)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PreprocessCfg.mean, PreprocessCfg.std))
    images = torch.from_numpy(draw(rng, y, styles, colours, backgrounds, rng.uniform(0.03, 0.12, n)))
    texts, which = np.unique(captions(rng, y, styles, colours, backgrounds, named), return_inverse=True)
    tokens = open_clip.SimpleTokenizer(context_length=20)(list(texts))
    # Train the embeddings of the few ids in use: the optimiser would spend its time on 49,408 rows otherwise.
    used, compact = tokens.unique(return_inverse=True)
    embedding = clip.token_embedding
    clip.token_embedding = nn.Embedding.from_pretrained(embedding.weight.detach()[used], freeze=False)
    matrices = [p for p in clip.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": [p for p in clip.parameters() if p.ndim < 2], "weight_decay": 0.0}],
                                  lr=lr, betas=(0.9, 0.98))
    total, order, target = n // batch * epochs, [], torch.arange(batch)
    for step in tqdm(range(total), "pre-training the tiny CLIP (once)", disable=None):
        if len(order) < batch:
            order = rng.permutation(n)
        chosen, order = order[:batch], order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, lr, 0.1)
        pixels = (images[chosen].permute(0, 3, 1, 2) / 255 - mean) / std
        unique, back = torch.from_numpy(which[chosen]).unique(return_inverse=True)
        z = clip.logit_scale.exp() * clip.encode_image(pixels, normalize=True) @ clip.encode_text(
            compact[unique], normalize=True)[back].T
        loss = (F.cross_entropy(z, target) + F.cross_entropy(z.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clip.logit_scale.data.clamp_(max=math.log(100))
    embedding.weight.data[used] = clip.token_embedding.weight.data
    clip.token_embedding = embedding
    torch.set_rng_state(state)
    save_tensors(out / "open_clip_model.safetensors", clip.state_dict())
    write_json(out / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}})


# --data: function(data_dir, args) -> Data
DATA = {"shapes": shapes_data, "folder": folder_data, "imagenet": imagenet_data, "domainnet": domainnet_data,
        "cifar10": cifar10_data, "iwildcam": iwildcam_data, "fmow": fmow_data}
