"""WiSE-FT: robust fine-tuning of zero-shot models (arXiv 2109.01903, CVPR 2022).

Fine-tune a zero-shot model, then average its weights with those it started from. On the line between the two ends
there are models that keep most of the gain on the reference data and are more robust than either end.

Equations
    Step 1 (Section 3)  minimise cross-entropy over theta = [V_enc, W_classifier] (end-to-end), or over W_classifier
                        alone (linear classifier: --freeze encoder)                                   make_loss
    Step 2, Eq. (1)     wse(x, alpha) = f(x, (1 - alpha) theta_0 + alpha theta_1), all weights and the head  interpolate
Symbols: theta_0 zero-shot, theta_1 fine-tuned weights; alpha the mixing coefficient, 0.5 when nothing is known.
    The head starts as s W, with s = exp(logit_scale) folded in, and a trainable bias at 0 (official zeroshot.py).

Deviations
    1. From the code: --select chooses alpha on held-out training images; the official scripts show all alphas on the
       test sets and leave the choice to the reader. Without --select, alpha is 0.5.
    2. From the code: 2% of ImageNet's training images, and 10% of a set without a validation split, are held out for
       that; --holdout 0 trains on all, as theirs.
    3. From the code: bf16 or fp16 towers on CUDA; --precision fp32 is theirs.
    4. From the code: alpha 0 and 1 are the ends bit for bit, integer buffers are theta_1's; no Fisher-weighted merge.
    5. From the code: batches are always full (epochs end to end), so an epoch's last, smaller batch does not exist.
    6. From the code: few-shot subsets are seeded and shuffled; theirs are drawn unseeded and visited in class order.
    7. From the code: iWildCam and FMoW have one template each, DRM's; theirs have 2 and 16.
    8. From both: --data shapes, folder and the sets that RECIPES marks use recipes of their own.

Usage
    python wise_ft.py                                            # the embedded data: minutes on two CPU cores
    python wise_ft.py --data imagenet --data-dir ~/data          # the paper's main experiment
    python wise_ft.py --finetuned runs/lipsum_ft-shapes-s0       # interpolate towards any finished run
    python wise_ft.py --shots 16 --lr 1e-5                       # few-shot, with the paper's learning rate for it
Expected result: README.md, "Results"; the paper's ViT-B/16 on ImageNet at alpha 0.5 (not run by us): see README.md.
"""
import argparse
import copy

import torch
import torch.nn.functional as F
from torch.func import functional_call

import common

# ------------------------------------------------------ Args ------------------------------------------------------

PAPER = dict(epochs=10, batch_size=512, lr=3e-5, wd=0.1, warmup=500, grad_clip=1.0, augment="crop")  # official README
RECIPES = {
    "shapes": dict(model="shapes-clip", epochs=10, batch_size=64, lr=6e-4, wd=0.1, warmup=0.1, grad_clip=1.0,
                   augment="none"),
    "folder": dict(PAPER, batch_size=64, lr=1e-5, warmup=0.1),
    "imagenet": dict(PAPER, holdout=0.02),
    **{data: PAPER for data in ("domainnet", "cifar10", "iwildcam", "fmow")},  # ImageNet's recipe, not tuned
}


def get_args():
    p = common.parser(__doc__, freeze=["none", "encoder", "head"])
    p.add("--alpha", 0.5, "coefficient of the model that is saved (paper: 0.5)", type=common.number(low=0, high=1))
    p.add("--alphas", [round(0.1 * i, 1) for i in range(11)], "coefficients of the curve", nargs="+",
          type=common.number(low=0, high=1))
    p.add("--select", False, "save the alpha that is best on held-out training images",
          action=argparse.BooleanOptionalAction)
    p.add("--logit-axes", False, "scale the figure's axes by logit, as the paper's Figure 1",
          action=argparse.BooleanOptionalAction)
    return common.parse(p, "wise_ft", RECIPES)


# ---------------------------------------------------- Equations ----------------------------------------------------

def interpolate(theta_0, theta_1, alpha):
    """Eq. (1): (1 - alpha) theta_0 + alpha theta_1 of two state dicts with the same names and shapes.

    alpha 0 and 1 return the ends bit for bit (0 * -inf in a masked buffer would be NaN); integer buffers, such as
    BatchNorm's counters, are theta_1's. ValueError names entries that do not match.
    """
    shapes = [{k: tuple(v.shape) for k, v in theta.items()} for theta in (theta_0, theta_1)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"weights that differ in name or shape: {sorted(dict(shapes[0].items() ^ shapes[1].items()))}")
    if alpha in (0, 1):
        return dict(theta_1 if alpha else theta_0)
    return {k: (1 - alpha) * theta_0[k] + alpha * theta_1[k] if theta_1[k].is_floating_point() else theta_1[k]
            for k in theta_1}


# ------------------------------------------------------ Loss ------------------------------------------------------

def make_loss():
    """Step 1: loss_fn(model, batch) -> cross-entropy."""
    def loss_fn(model, batch):
        ce = F.cross_entropy(model(batch.images)[0], batch.labels)
        return ce, {}
    return loss_fn


def fine_tune(setup, out):
    """(theta_0, theta_1) as models with the folded head; with --freeze encoder, on features computed once."""
    theta_0 = setup.classifier(folded=True)
    if setup.args.freeze != "encoder":
        theta_1 = setup.fit(copy.deepcopy(theta_0), make_loss(), out)
        common.save_run(setup, theta_1, out)
        return theta_0, theta_1
    head_only = copy.deepcopy(theta_0)
    head_only.visual, head_only.amp = torch.nn.Identity(), None
    features = common.ImageSet("train", common.train_features(theta_0, setup, out), setup.data.train.labels)
    common.train(head_only, features, make_loss(), setup.args, out, setup.out)
    theta_1 = copy.deepcopy(theta_0)
    theta_1.load_state_dict({**theta_0.state_dict(), **head_only.state_dict()})
    common.save_run(setup, theta_1, out)
    return theta_0, theta_1


# ---------------------------------------------------- Inference ----------------------------------------------------

def all_alphas(theta_0, theta_1, alphas):
    """rows(images, project) -> {row name: logits}: one batch through the models of all alphas.

    If the ends share the encoder, its features are computed once and only the heads are interpolated.
    """
    ends = [m.state_dict() for m in (theta_0, theta_1)]
    shared = all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0] if k.startswith("visual."))
    model = copy.deepcopy(theta_1)
    if shared:
        tower, model.visual, model.amp = theta_1, torch.nn.Identity(), None
        ends = [{k: v for k, v in end.items() if not k.startswith("visual.")} for end in ends]

    def logits(alpha, x):  # weights are made for a batch and dropped: eleven models at once would fill a GPU
        state = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in interpolate(*ends, alpha).items()}
        return functional_call(model, state, (x,))[0]  # why requires_grad: see load_clip

    def rows(images, project):
        x = tower(images)[1] if shared else images
        return {row_name(a): project(logits(a, x)) for a in alphas}
    return rows


def row_name(alpha):
    return {0: "zero-shot", 1: "fine-tuned"}.get(alpha, f"WiSE-FT {alpha:g}")


def select_alpha(theta_0, theta_1, alphas, setup):
    """(alpha with the best accuracy on the held-out images, {alpha: accuracy}); of equals, the nearest to 0.5."""
    rows, val = all_alphas(theta_0, theta_1, alphas), setup.data.val
    right = common.collect(lambda x, y: {k: z.argmax(1) == y for k, z in rows(x, val.project).items()}, val,
                           setup.args, setup.device)
    accuracy = {a: 100 * right[row_name(a)].double().mean().item() for a in alphas}
    return max(alphas, key=lambda a: (accuracy[a], -abs(a - 0.5))), accuracy


def plot_curve(results, alphas, measure, chosen, path, logit_axes=False):
    """Accuracy on the reference test (x) against mean accuracy on the shifts (y), a marker per alpha."""
    plt = common.pyplot()
    if plt is None or len(measure) < 2:
        return
    points = [common.id_ood(results[row_name(a)], measure) for a in alphas]
    figure, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    ax.plot(*zip(*points), "-o", color="tab:blue", markersize=5, label=r"WiSE-FT, $\alpha$ from 0 to 1")
    for a, marker, colour, label in ((0, "*", "tab:purple", "zero-shot"), (1, "s", "tab:orange", "fine-tuned"),
                                     (chosen, "D", "tab:green", rf"saved, $\alpha$ = {chosen:g}")):
        ax.plot(*points[alphas.index(a)], marker, color=colour, markersize=13 if marker == "*" else 9, label=label,
                linestyle="none")
    for a, point in zip(alphas, points):
        ax.annotate(f"{a:g}", point, textcoords="offset points", xytext=(6, 5), fontsize=8)
    common.percent_axes(ax, points, f"accuracy on {next(iter(measure))} (reference), %",
                        f"mean accuracy on {len(measure) - 1} shifts, %", logit_axes)
    ax.legend()
    figure.savefig(path, dpi=150)


# ------------------------------------------------------ main ------------------------------------------------------

def main():
    args = get_args()
    if args.freeze == "encoder":
        args.augment = "none"  # the features are computed once

    def check(setup):
        if args.select and not len(setup.data.val):
            raise common.Fail("--select: no held-out images to select on; raise --holdout of the training run")
    setup = common.start(args, check)
    theta_0, theta_1 = setup.finetuned or fine_tune(setup, setup.out / "fine-tuned")
    alphas, chosen, accuracy = sorted({0, 1, args.alpha, *args.alphas}), args.alpha, None
    if args.select:
        chosen, accuracy = select_alpha(theta_0, theta_1, alphas, setup)
        common.say(f"--select: alpha {chosen:g} with {accuracy[chosen]:.2f}% on {len(setup.data.val)} held-out images")
    results = common.evaluate(all_alphas(theta_0, theta_1, alphas), setup)
    saved = copy.deepcopy(theta_1)
    saved.load_state_dict(interpolate(theta_0.state_dict(), theta_1.state_dict(), chosen))
    common.save_run(setup, saved, setup.out)
    plot_curve(results, alphas, setup.measure, chosen, setup.out / "curve.png", args.logit_axes)
    common.finish(setup, results, alpha=args.alpha, saved_alpha=chosen,
                  selected=accuracy and {"alpha": chosen, "held_out_accuracy": accuracy})


if __name__ == "__main__":
    common.cli(main)
