"""WiSE-FT: robust fine-tuning of zero-shot models (arXiv 2109.01903, CVPR 2022).

Fine-tune a zero-shot model, then average its weights with those it started from. On the line
between the two ends there are models that keep most of the gain on the reference data and are
more robust than either end.

Equations
    Step 1  (Section 3)  minimise cross-entropy over theta = [V_enc, W_classifier] (end-to-end),
            or over W_classifier alone (linear classifier: --freeze encoder)         make_loss
    Step 2, Eq. (1)      wse(x, alpha) = f(x, (1 - alpha) theta_0 + alpha theta_1),
            all weights and the head                                               interpolate
Symbols: theta_0 zero-shot, theta_1 fine-tuned weights; alpha the mixing coefficient, 0.5 when
    nothing is known (Section 4). The head starts as s W, with s = exp(logit_scale) folded in,
    and a trainable bias at 0 (official zeroshot.py, modeling.py).

Deviations
    1. From the code: --select chooses alpha on held-out training images; the official scripts
       show all alphas on the test sets and leave the choice to the reader. Without --select,
       alpha is 0.5.
    2. From the code: 2% of ImageNet's and DomainNet's training images, 10% of CIFAR-10's and of a
       folder without val/, are held out for that, also without --select; --holdout 0 trains on
       all, as theirs.
    3. From the code: bf16 or fp16 towers on CUDA; --precision fp32 is theirs.
    4. From the code: alpha 0 and 1 are the ends bit for bit, integer buffers are theta_1's; no
       Fisher-weighted merge.
    5. From the code: batches are always full (epochs end to end), so an epoch's last, smaller
       batch does not exist.
    6. From the code: few-shot subsets are seeded and shuffled, without warm-up unless --warmup
       is given; theirs are drawn unseeded and visited in class order, and keep 500 warm-up steps
       where the run has about 320.
    7. From the code: iWildCam and FMoW have one template each, DRM's; theirs have 2 and 16.
    8. From the paper, with the code: images are cropped to 90-100% of the area in any shape;
       the paper's D.2 takes a random square.
    9. --freeze encoder: the rate of 0.1 and, on the papers' sets, the batch of 512 are VRF's
       (App. C.1); the paper searches 64 settings of rate and batch (D.3). Its features are
       computed once, so images are not augmented.
   10. CIFAR-10, iWildCam and FMoW use the paper's default (D.2). --data shapes, folder and the
       sets marked in RECIPES have recipes of their own.
   11. Absent: ImageNet-Vid-Robust and YTBB-Robust, Fisher and other merges, LP-FT.

Usage
    python wise_ft.py                                        # embedded data: minutes on a CPU
    python wise_ft.py --data imagenet --data-dir ~/data      # the paper's main experiment
    python wise_ft.py --finetuned runs/lipsum_ft-shapes-s0   # towards any finished run
    python wise_ft.py --finetuned MINE.pt --data folder --data-dir MY_IMAGES   # or state dict
    python wise_ft.py --data imagenet --shots 16 --lr 1e-5   # few-shot, with the paper's rate
Expected result: README.md, "Results"; the paper's ViT-B/16 on ImageNet / mean of five shifts at
    alpha 0.5 (not run by us): 81.7 / 63.0.
"""
import argparse
import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call

import common

# ---------------------------------------- Args ----------------------------------------

PAPER = dict(epochs=10, batch_size=512, lr=3e-5, wd=0.1, warmup=500, grad_clip=1.0,
             augment="crop")  # official README, D.2
RECIPES = {
    "shapes": dict(PAPER, model="shapes-clip", batch_size=64, lr=6e-4, warmup=0.1,
                   augment="none"),
    "folder": dict(PAPER, batch_size=64, lr=1e-5, warmup=0.1),
    "imagenet": dict(PAPER, holdout=0.02),
    "cifar10": PAPER,
    "iwildcam": PAPER,
    "fmow": PAPER,
    "domainnet": dict(PAPER, holdout=0.02),  # not in the paper
}
LINEAR = dict(lr=0.1, augment="none")  # --freeze encoder: on features computed once


def get_args():
    switch = argparse.BooleanOptionalAction
    p = common.parser(__doc__)
    p.add("--alpha", 0.5, "coefficient of the model that is saved (paper: 0.5)",
          type=common.limited(low=0, high=1))
    p.add("--alphas", [round(0.1 * i, 1) for i in range(11)], "coefficients of the curve",
          nargs="+", type=common.limited(low=0, high=1))
    p.add("--select", False, "save the alpha that is chosen on held-out training images",
          action=switch)
    p.add("--choose", "one-se", "--select: within one standard error of the best held-out "
          "accuracy the alpha nearest 0.5, or the best accuracy", choices=["one-se", "best"])
    p.add("--freeze", "none", "part that is not trained; encoder is the paper's linear "
          "classifier", choices=["none", "encoder", "head"])
    p.add("--logit-axes", False, "scale the figure's axes by logit, as the paper's Figure 1",
          action=switch)
    return common.parse(p, "wise_ft", RECIPES, {("freeze", "encoder"): LINEAR})


# ------------------------------------- Equations -------------------------------------

def interpolate(theta_0, theta_1, alpha):
    """Eq. (1): (1 - alpha) theta_0 + alpha theta_1 of two state dicts of the same shapes.

    alpha 0 and 1 return the ends bit for bit (0 * -inf in a masked buffer would be NaN); integer
    buffers, such as BatchNorm's counters, are theta_1's. ValueError names entries that differ.
    """
    shapes_0 = {name: tuple(value.shape) for name, value in theta_0.items()}
    shapes_1 = {name: tuple(value.shape) for name, value in theta_1.items()}
    if shapes_0 != shapes_1:
        differ = sorted(dict(shapes_0.items() ^ shapes_1.items()))
        raise ValueError(f"weights that differ in name or shape: {differ}")
    if alpha in (0, 1):
        return dict(theta_1 if alpha else theta_0)
    theta = dict(theta_1)
    for name, value in theta_1.items():
        if value.is_floating_point():
            theta[name] = (1 - alpha) * theta_0[name] + alpha * value
    return theta


# ---------------------------------------- Loss ----------------------------------------

def make_loss():
    """Step 1: loss_fn(model, batch) -> cross-entropy."""
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch.images)[0], batch.labels), {}
    return loss_fn


def fine_tune(setup, theta_0, out):
    """theta_1: theta_0 trained end-to-end or, with --freeze encoder, its head alone."""
    if setup.args.freeze == "encoder":
        theta_1 = linear_classifier(setup, theta_0, out)
    else:
        theta_1 = copy.deepcopy(theta_0)
        for parameter in (theta_1.head, theta_1.bias):
            parameter.requires_grad_(setup.args.freeze != "head")
        setup.fit(theta_1, make_loss(), out)
    common.save_run(setup, theta_1, out)
    return theta_1


def linear_classifier(setup, theta_0, out):
    """Step 1 over W_classifier alone, on unit features that are computed once."""
    sets = []
    for images in (setup.data.train, setup.data.val):
        features = np.zeros((0, theta_0.head.shape[1]), np.float32)
        if len(images):
            features = common.features_once(theta_0, images, setup, out).numpy()
        sets.append(FeatureSet(images.name, features, images.labels))
    linear = copy.deepcopy(theta_0)
    linear.visual, linear.amp = torch.nn.Identity(), None
    common.train(linear, *sets, make_loss(), setup, out)
    theta_1 = copy.deepcopy(theta_0)
    theta_1.load_state_dict({**theta_0.state_dict(), **linear.state_dict()})
    return theta_1


class FeatureSet(common.ImageSet):
    """Ready unit features (N, D) in the place of images."""

    def __getitem__(self, item):
        i = item[1] if isinstance(item, tuple) else item
        return self.images[i], self.labels[i], i

    def normalized(self, features):
        return features


# ------------------------------------- Inference -------------------------------------

def all_alphas(theta_0, theta_1, alphas):
    """rows(images, project) -> {row name: logits}: one batch through the models of all alphas.

    If the ends share the encoder, its features are computed once and only heads interpolated.
    """
    ends = [theta_0.state_dict(), theta_1.state_dict()]
    towers = [name for name in ends[0] if name.startswith("visual.")]
    shared = all(torch.equal(ends[0][name], ends[1][name]) for name in towers)
    model = copy.deepcopy(theta_1)
    if shared:
        model.visual, model.amp = torch.nn.Identity(), None
        for end in ends:
            for name in towers:
                del end[name]

    def logits(alpha, x):  # weights are made for a batch and dropped: eleven would fill a GPU
        theta = interpolate(*ends, alpha)
        for name, value in theta.items():  # why: see load_clip
            theta[name] = value.detach().requires_grad_(value.is_floating_point())
        return functional_call(model, theta, (x,))[0]

    def rows(images, project):
        x = theta_1(images)[1] if shared else images
        return {row_name(alpha): project(logits(alpha, x)) for alpha in alphas}
    return rows


def row_name(alpha):
    return {0: "zero-shot", 1: "fine-tuned"}.get(alpha, f"WiSE-FT {alpha:g}")


def select_alpha(theta_0, theta_1, alphas, setup):
    """(alpha chosen on the held-out images by --choose, {alpha: accuracy})."""
    accuracy = common.accuracies(all_alphas(theta_0, theta_1, alphas), setup.data.val, setup)
    values = [accuracy[row_name(alpha)] for alpha in alphas]
    best = common.choose(values, alphas, len(setup.data.val), setup.args.choose)
    return alphas[best], dict(zip(alphas, values))


# -------------------------------------- Figure --------------------------------------

def plot_curve(results, alphas, chosen, setup):
    """curve.png: reference accuracy (x) against the shifts' mean (y), a marker per alpha."""
    plt = common.pyplot()
    if plt is None or len(setup.measure) < 2:
        return
    plane = common.plane(results, setup.measure)
    points = [plane[row_name(alpha)] for alpha in alphas]
    figure, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    ax.plot(*zip(*points), "-o", markersize=5, label=r"WiSE-FT, $\alpha$ from 0 to 1")
    saved = rf"saved, $\alpha$ = {chosen:g}"
    ends = ((0, "*", "zero-shot"), (1, "s", "fine-tuned"), (chosen, "D", saved))
    for alpha, marker, label in ends:
        ax.plot(*points[alphas.index(alpha)], marker, markersize=10, label=label)
    for alpha, point in zip(alphas, points):
        ax.annotate(f"{alpha:g}", point, textcoords="offset points", xytext=(6, 5), fontsize=8)
    ax.set(xlabel=f"accuracy on {next(iter(setup.measure))} (reference), %",
           ylabel=f"mean accuracy on {len(setup.measure) - 1} shifts, %")
    ax.grid(alpha=0.3)
    if setup.args.logit_axes:
        scale_by_logit(ax, points)
    ax.legend()
    figure.savefig(setup.out / "curve.png", dpi=150)
    plt.close(figure)


def scale_by_logit(ax, points):
    """Logit-scaled axes in percent, as Figure 1; matplotlib's own wants (0, 1)."""
    def logit(p):
        p = np.clip(p, 1e-3, 99.999)
        return np.log(p / (100 - p))

    def percent(z):
        return 100 / (1 + np.exp(-z))
    for axis, values in zip("xy", zip(*points)):
        getattr(ax, f"set_{axis}scale")("function", functions=(logit, percent))
        getattr(ax, f"set_{axis}lim")(max(0.1, min(values) - 1), min(99.95, max(values) + 1))


# ---------------------------------------- main ----------------------------------------

def main():
    args = get_args()
    if args.predict != "none":
        return common.predict(args)
    setup = common.start(args)
    if args.select and not len(setup.data.val):
        raise common.Fail("--select: no held-out images to select on; raise --holdout of the "
                          "training run")

    # Step 1: theta_0, and theta_1 trained from it
    if args.finetuned != "none":
        theta_0, theta_1 = common.load_finetuned(setup)
        setup.out = common.run_folder(args)
    else:
        setup.out = common.run_folder(args)
        theta_0 = setup.classifier(folded=True)
        common.evaluate_first(common.each({"zero-shot": theta_0}), setup)
        theta_1 = fine_tune(setup, theta_0, setup.out / "fine-tuned")

    # Step 2: the models between them
    alphas, chosen, selected = sorted({0, 1, args.alpha, *args.alphas}), args.alpha, None
    if args.select:
        chosen, accuracy = select_alpha(theta_0, theta_1, alphas, setup)
        selected = {"alpha": chosen, "held_out_accuracy": accuracy}
        common.say(f"--select: alpha {chosen:g} with {accuracy[chosen]:.2f}% on "
                   f"{len(setup.data.val)} held-out images")
    results = common.evaluate(all_alphas(theta_0, theta_1, alphas), setup)
    saved = copy.deepcopy(theta_1)
    saved.load_state_dict(interpolate(theta_0.state_dict(), theta_1.state_dict(), chosen))
    common.save_run(setup, saved, setup.out)
    plot_curve(results, alphas, chosen, setup)
    common.finish(setup, results, alpha=args.alpha, saved_alpha=chosen, selected=selected)


if __name__ == "__main__":
    common.cli(main)
