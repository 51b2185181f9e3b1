"""VRF: robust fine-tuning of zero-shot models via variance reduction (arXiv 2411.06966, NeurIPS 2024).

Ensemble a zero-shot and a fine-tuned model with a weight for each image: the nearer an image is to training images
that only the fine-tuned model gets right, the more the fine-tuned model counts.

Equations
    Eq. (1)  output-space ensemble OSE   alpha p_ft + (1 - alpha) p_zs                        ensemble, fixed weight
    Eq. (2)  weight-space ensemble WSE   weights (1 - alpha) theta_zs + alpha theta_ft        common.merged
    Eq. (3)  zero-shot failures          V = {v_i : y_i = argmax f_ft(x_i), y_i != argmax f_zs(x_i)}  zero_shot_failures
    Eq. (4)  distance                    d(x) = ||v - v_(k)||_2 to the k-th nearest of V              knn_distance
    Eq. (5)  ensemble                    p_vrf = omega p_ft + (1 - omega) p_zs                        ensemble
    Eq. (6)  weight                      omega(x) = sigmoid(-(d(x) - a) / b)                          ft_weight
Symbols: f_zs, f_ft logits and p_zs, p_ft probabilities of the two models; v unit feature of the fine-tuned model;
    V bank of the failures' features; omega weight of the fine-tuned model; a, b > 0; T_zs, T_ft temperatures.

Deviations (released code: knn_distance.py, models/calibration.py, main.py, baselines.py)
    1. From the paper, with the code: d is squared (faiss IndexFlatL2), to which a = 1.5, b = 0.6 belong; --distance l2.
    2. From the paper, with the code: k = round(1000 |V| / |train|), not floor(0.1% |V|): --k-rule paper, the default
       for shapes and folder, where the code's k would be near |V|. From both: k is kept within [1, |V|], and where V
       is empty VRF is OSE, with a warning.
    3. From the paper, with the code: logits are first divided by temperatures at which mean confidence equals accuracy;
       --no-calibrate. Ours is a bisection, theirs an unbounded interpolation search with tolerance 0.001.
    4. From the code: everything is chosen on held-out training images (2% of ImageNet's, 10% of a set without a
       validation split), not on the ID test set; --select-on-test. OSE's alpha is one of 0, 0.05, ..., 1 and WSE's of
       0, 0.1, ..., 1, of equals the smallest; theirs of 0.1, ..., 0.9. OSE is calibrated like VRF, theirs is not.
    5. From the code, with the paper's Section 3.2: a, b are swept, except on ImageNet. From both: the sweep takes the
       smallest mean omega (the most zero-shot) whose held-out accuracy is within --tolerance of the best. Accuracy
       alone would pick omega = 1: held-out images are all in-distribution.
    6. From the code: the fine-tuned model is trained here, with WiSE-FT's recipe and its deviations (header of
       wise_ft.py); theirs is WiSE-FT's checkpoint.

Usage
    python vrf.py                                                     # the embedded data, fine-tunes first
    python vrf.py --finetuned runs/wise_ft-shapes-s0/fine-tuned       # on any run's model, here before the averaging
    python vrf.py --data imagenet --data-dir ~/data                   # the paper's main experiment
    python vrf.py --resume runs/vrf-shapes-s0 --predict MY_IMAGES     # path, class, probability, d, omega a line
Expected result: README.md, "Results"; the paper's Table 2 for ViT-B/16 on ImageNet / mean of 5 shifts (not run by us):
    zero-shot 68.3/58.4, fine-tuned 81.3/53.7, WSE 82.5/60.6, OSE 82.2/60.2, VRF 82.3/61.8.
"""
import argparse
import contextlib
import copy
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common

# ------------------------------------------------------ Args ------------------------------------------------------

PAPER = dict(epochs=10, batch_size=512, lr=3e-5, wd=0.1, warmup=500, grad_clip=1.0, augment="crop", sweep=True,
             k_rule="code")
RECIPES = {
    "shapes": dict(PAPER, model="shapes-clip", batch_size=64, lr=6e-4, warmup=0.1, augment="none", k_rule="paper"),
    "folder": dict(PAPER, batch_size=64, lr=1e-5, warmup=0.1, k_rule="paper"),
    "imagenet": dict(PAPER, holdout=0.02, sweep=False),
    **{data: PAPER for data in ("domainnet", "cifar10", "iwildcam", "fmow")},  # ImageNet's recipe, not tuned
}
ALPHAS = [round(0.05 * i, 2) for i in range(21)]  # of OSE and WSE


def get_args():
    p = common.parser(__doc__)
    p.add("--distance", "squared", "squared as the code, l2 as the paper", choices=["squared", "l2"])
    p.add("--k-rule", common.RECIPE, "k = round(1000 |V| / |train|) as the code, floor(0.1% |V|) as the paper",
          choices=["code", "paper"])
    p.add("--k", 0, "k itself; 0 follows --k-rule", type=common.number(int, 0))
    p.add("--a", 1.5, "distance at which both models count the same, without --sweep (paper: 1.5)",
          type=common.number(above=0))
    p.add("--b", 0.6, "width of the change, without --sweep (paper: 0.6)", type=common.number(above=0))
    p.add("--sweep", common.RECIPE, "choose a and b on held-out images",
          action=argparse.BooleanOptionalAction)
    p.add("--tolerance", 0.5, "held-out accuracy in percent that --sweep gives up for a smaller omega",
          type=common.number(low=0))
    p.add("--calibrate", True, "temperatures at which confidence equals accuracy",
          action=argparse.BooleanOptionalAction)
    p.add("--space", "probabilities", "what is averaged; logits is the paper's Section 5.3",
          choices=["probabilities", "logits"])
    p.add("--select-on-test", False, "calibrate and sweep on the ID test set, as the released code does",
          action=argparse.BooleanOptionalAction)
    p.add("--predict", "none", "with --resume of a finished run: folder of images to apply its ensemble to")
    return common.parse(p, "vrf", RECIPES)


# ---------------------------------------------------- Equations ----------------------------------------------------

def zero_shot_failures(logits_zs, logits_ft, labels):
    """Eq. (3): (N,) bool, images that the fine-tuned model gets right and the zero-shot model wrong; logits (N, C)."""
    return (logits_ft.argmax(1) == labels) & (logits_zs.argmax(1) != labels)


def neighbours(failures, images, rule="code"):
    """k of a bank with |V| = failures among |train| = images: code: round(1000 |V| / |train|); paper: floor(0.1% |V|);
    kept within [1, |V|]."""
    k = round(failures / images * 1000) if rule == "code" else failures // 1000
    return max(1, min(k, failures))


@torch.no_grad()
def knn_distance(queries, bank, k, squared=True, chunk=None):
    """Eq. (4): distance of queries (Q, D) to their k-th nearest row of bank (N, D), exact: (Q,).

    squared: as faiss IndexFlatL2 and the released code; else the paper's L2 norm. `chunk` queries at a time; by
    default as many as fit 2^26 distances (256 MB). ValueError unless 1 <= k <= N.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k = {k} is not within 1 and the {len(bank)} rows of the bank")
    norms, found, chunk = bank.square().sum(1), [], chunk or max(1, 2**26 // len(bank))
    buffer = queries.new_empty(min(chunk, len(queries)), len(bank))  # one for all chunks: fresh pages are slow
    for q in queries.split(chunk):
        order = torch.addmm(norms, q, bank.T, alpha=-2, out=buffer[:len(q)])  # |b|^2 - 2 q.b = d^2 - |q|^2 ranks a row
        kth = bank[order.topk(k, largest=False).indices[:, -1]]
        found.append((q - kth).square().sum(1))               # not from `order`: that difference would cancel
    d = torch.cat(found) if found else queries.new_zeros(0)
    return d if squared else d.sqrt()


def ft_weight(d, a=1.5, b=0.6):
    """Eq. (6): omega = sigmoid(-(d - a) / b), (Q,) in (0, 1), the weight of the fine-tuned model at distance d (Q,)."""
    return torch.sigmoid(-(d - a) / b)


def calibration_temperature(logits, labels, low=1e-3, high=1e3):
    """T at which the mean confidence of softmax(logits / T) equals the accuracy; logits (N, C), labels (N,).

    Source: released code, models/calibration.py. Confidence falls as T grows, so this bisects log T; an accuracy
    that no T in [low, high] reaches (1, or at most 1/C) gives that end of the bracket.
    """
    z = logits.double()
    accuracy = (z.argmax(1) == labels).double().mean()
    for _ in range(60):
        middle = (low * high) ** 0.5
        if torch.softmax(z / middle, dim=1).amax(1).mean() > accuracy:
            low = middle
        else:
            high = middle
    return (low * high) ** 0.5


def ensemble(logits_zs, logits_ft, weight, t_zs=1.0, t_ft=1.0, space="probabilities"):
    """Eq. (5): weight p_ft + (1 - weight) p_zs, probabilities (N, C); weight (N,), or a number as in Eq. (1).

    p = softmax(logits / T), with logits already in the test set's label space. space="logits" averages logits / T
    and then takes the softmax (paper, Section 5.3).
    """
    w = torch.as_tensor(weight, dtype=logits_zs.dtype, device=logits_zs.device).reshape(-1, 1)
    if space == "logits":
        return (w * logits_ft / t_ft + (1 - w) * logits_zs / t_zs).softmax(dim=1)
    return w * (logits_ft / t_ft).softmax(dim=1) + (1 - w) * (logits_zs / t_zs).softmax(dim=1)


# ---------------------------------------------------- Inference ----------------------------------------------------

def accuracy(probs, labels):
    return 100 * (probs.argmax(1) == labels).double().mean().item()


def sweep_weight(mix, d, labels, tolerance):
    """(a, b) on held-out images: of the grid's pairs within `tolerance` of the best accuracy, the smallest mean omega.

    mix(weight) -> probabilities (N, C); d (N,). The grid: a at quantiles of d, b at fractions of its spread.
    """
    spread = max(d.std(correction=0).item(), 1e-6)
    quantiles = d.double().quantile(torch.linspace(0, 1, 21, dtype=torch.double)).tolist()
    grid = [(max(a, 1e-6), b * spread) for a in quantiles for b in (0.25, 0.5, 1.0, 2.0)]
    scores = [(accuracy(mix(ft_weight(d, a, b)), labels), -ft_weight(d, a, b).mean().item(), (a, b)) for a, b in grid]
    best = max(s[0] for s in scores)
    return max(scores, key=lambda s: (s[0] >= best - tolerance, s[1]))[2]


def both(zero_shot, fine_tuned, images):
    """{logits_zs, logits_ft (B, C), v (B, D)} of a batch: both models' logits, the fine-tuned model's unit features."""
    logits_ft, v = fine_tuned(images)
    return {"logits_zs": zero_shot(images)[0], "logits_ft": logits_ft, "v": v}


def both_outputs(zero_shot, fine_tuned, dataset, setup, folder):
    """both() of a data set, with logits (N, C') in its label space; computed once for these models."""
    def outputs(images, labels):
        found = both(zero_shot, fine_tuned, images)
        return {k: dataset.project(x) if k != "v" else x for k, x in found.items()}
    return common.collect_once(outputs, [zero_shot, fine_tuned], dataset, setup, folder)


def failures_of(zero_shot, fine_tuned, setup, folder):
    """V (|V|, D): unit features of the zero-shot failures; setup.data.train is un-augmented, only fit() augments."""
    def outputs(images, labels):
        found = both(zero_shot, fine_tuned, images)
        return {"failure": zero_shot_failures(found["logits_zs"], found["logits_ft"], labels), "v": found["v"]}
    seen = common.collect_once(outputs, [zero_shot, fine_tuned], setup.data.train, setup, folder)
    return seen["v"][seen["failure"]]


def distances(v, bank, state, device):
    return knn_distance(v.to(device), bank.to(device), state["k"], state["distance"] == "squared").cpu()


# ----------------------------------------------------- Figures -----------------------------------------------------

def plot_ratio(d, right_zs, right_ft, state, path, bins=12):
    """The paper's Figure 1b: Acc_ft / Acc_zs in bins of d(x) over all test images, with the weight curve omega(d)."""
    plt = common.pyplot()
    if plt is None:
        return
    order = d.argsort()
    parts = [p for p in order.tensor_split(bins) if len(p) and right_zs[p].any()]
    figure, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    ax.plot([d[p].mean() for p in parts], [right_ft[p].double().mean() / right_zs[p].double().mean() for p in parts],
            "o-", color="tab:blue", label=r"Acc$_{ft}$ / Acc$_{zs}$, equal-count bins")
    ax.axhline(1, color="grey", linewidth=0.8)
    ax.set(xlabel=f"d(x), {state['distance']} distance to neighbour {state['k']} of {state['failures']} failures",
           ylabel=r"Acc$_{ft}$ / Acc$_{zs}$")
    twin, x = ax.twinx(), torch.linspace(d.min(), d.max(), 200)
    twin.plot(x, ft_weight(x, state["a"], state["b"]), "--", color="tab:red",
              label=rf"$\omega$(d), a = {state['a']:.3g}, b = {state['b']:.3g}")
    twin.set(ylabel=r"weight $\omega$ of the fine-tuned model", ylim=(0, 1))
    figure.legend(handles=[*ax.lines[:1], *twin.lines], loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=150)


def plot_plane(curves, points, measure, path):
    """The paper's Figure 1a: ID accuracy against mean shift accuracy, the curves of OSE and WSE and VRF's point."""
    plt = common.pyplot()
    if plt is None or len(measure) < 2:
        return
    figure, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for (name, values), style in zip(curves.items(), ("-o", "-s")):
        ax.plot(*zip(*values), style, markersize=4, label=rf"{name}, $\alpha$ from 0 to 1")
    for (name, value), marker in zip(points.items(), ("P", "X", "*")):
        ax.plot(*value, marker, markersize=16 if name == "VRF" else 10, linestyle="none", label=name,
                color={"VRF": "tab:red"}.get(name, "black"))
    common.percent_axes(ax, [], f"accuracy on {next(iter(measure))} (ID), %",
                        f"mean accuracy on {len(measure) - 1} shifts (OOD), %")
    ax.legend()
    figure.savefig(path, dpi=150)


# ------------------------------------------------------ main ------------------------------------------------------

def fine_tune(setup, out):
    """Plain end-to-end fine-tuning as in the paper: WiSE-FT's recipe and head. Returns (zero-shot, fine-tuned)."""
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch.images)[0], batch.labels), {}
    zero_shot = setup.classifier(folded=True)
    fine_tuned = setup.fit(copy.deepcopy(zero_shot), loss_fn, out)
    common.save_run(setup, fine_tuned, out)
    return zero_shot, fine_tuned


def choose(seen, chosen_set, bank, mix, wse_rows, setup, state):
    """Complete `state` with what is chosen on `chosen_set` from its outputs `seen`: temperatures, alphas, a and b."""
    args = setup.args
    if args.calibrate:
        for key, logits in (("t_zs", "logits_zs"), ("t_ft", "logits_ft")):
            state[key] = calibration_temperature(seen[logits], chosen_set.labels)
            if not 1.01e-3 < state[key] < 0.99e3:
                common.say(f"warning: no temperature gives {chosen_set.name}'s accuracy; {key} is {state[key]:.3g}")
    if seen:
        state["alpha"] = max(ALPHAS, key=lambda a: accuracy(mix(seen, a), chosen_set.labels))
        right = common.collect(lambda x, y: {a: z.argmax(1) == y for a, z in wse_rows(x, chosen_set.project).items()},
                               chosen_set, args, setup.device)
        state["alpha_wse"] = float(max(right, key=lambda a: right[a].double().mean()))
        if args.sweep and len(bank):
            state["a"], state["b"] = sweep_weight(lambda w: mix(seen, w), seen["d"], chosen_set.labels, args.tolerance)


def leave(setup, bank, outputs, state, results, curve, wse):
    """What else a run leaves: vrf.json and the bank for --predict, and the two figures."""
    tests, point = setup.data.tests, lambda row: common.id_ood(row, setup.measure)
    common.write_json(setup.out / "vrf.json", state)
    common.save_tensors(setup.out / state["bank"], {"bank": bank})
    if len(bank):
        right = [torch.cat([outputs[t][z].argmax(1) == tests[t].labels for t in tests])
                 for z in ("logits_zs", "logits_ft")]
        plot_ratio(torch.cat([outputs[t]["d"] for t in tests]), *right, state, setup.out / "ratio.png")
    plot_plane({"OSE": [point(row) for row in curve.values()], "WSE": [point(row) for row in wse.values()]},
               {k: point(results[k]) for k in ("zero-shot", "fine-tuned", "VRF")}, setup.measure,
               setup.out / "plane.png")


def main():
    args = get_args()
    if args.predict != "none":
        return predict_folder(args)
    if args.sweep and (args.a, args.b) != (1.5, 0.6):
        raise common.Fail(f"--a {args.a:g} --b {args.b:g}: would be replaced by the sweep; add --no-sweep")

    def check(setup):
        if (args.calibrate or args.sweep) and not args.select_on_test and not len(setup.data.val):
            raise common.Fail("no held-out images to calibrate and sweep on: set --holdout where the model is trained, "
                              "or pass --no-calibrate --no-sweep, or --select-on-test")
    setup = common.start(args, check)
    folder = Path(args.finetuned) if setup.finetuned else setup.out / "fine-tuned"
    zero_shot, fine_tuned = setup.finetuned or fine_tune(setup, folder)

    # Step 1: the zero-shot failures among the training images
    bank = failures_of(zero_shot, fine_tuned, setup, folder)
    k = min(args.k, len(bank)) if args.k else neighbours(len(bank), len(setup.data.train), args.k_rule)
    state = {"failures": len(bank), "k": k, "distance": args.distance, "space": args.space, "a": args.a, "b": args.b,
             "alpha": 0.5, "alpha_wse": 0.5, "t_zs": 1.0, "t_ft": 1.0, "chosen_on": "held-out",
             "bank": "vrf.safetensors", "finetuned": str(folder.resolve()) if setup.finetuned else folder.name}

    # Step 2: distances and weights, chosen on held-out images
    def mix(output, weight):
        return ensemble(output["logits_zs"], output["logits_ft"], weight, state["t_zs"], state["t_ft"], args.space)

    def wse_rows(images, project):  # one merged model at a time: eleven would fill a GPU
        return {str(a): project(common.merged(zero_shot, fine_tuned, a)(images)[0]) for a in ALPHAS[::2]}

    outputs = {name: both_outputs(zero_shot, fine_tuned, dataset, setup, folder)
               for name, dataset in {"held-out": setup.data.val, **setup.data.tests}.items() if len(dataset)}
    for output in outputs.values() if len(bank) else []:
        output["d"] = distances(output["v"], bank, state, setup.device)
    chosen_set = setup.data.val
    if args.select_on_test:
        state["chosen_on"], chosen_set = next(iter(setup.data.tests.items()))
        common.say(f"--select-on-test: temperatures, alpha, a and b are chosen on the test set {state['chosen_on']}, "
                   "as the released code does; its accuracy is then not an estimate for new images")
    choose(outputs.get(state["chosen_on"]), chosen_set, bank, mix, wse_rows, setup, state)
    if not len(bank):
        common.say("warning: no training image is right fine-tuned and wrong zero-shot, so VRF falls back to OSE")

    # Step 3: the ensembles on the test sets
    results = {"zero-shot": {}, "fine-tuned": {}, "OSE": {}, "WSE": {}, "VRF": {}}
    curve = {a: {} for a in ALPHAS}
    for name, dataset in setup.data.tests.items():
        output = outputs[name]
        score = lambda logits: common.metrics(common.per_image(logits, dataset.labels), dataset)
        log = lambda probs: probs.clamp_min(1e-30).log()
        for a in ALPHAS:
            curve[a][name] = score(log(mix(output, a)))
        omega = ft_weight(output["d"], state["a"], state["b"]) if len(bank) else state["alpha"]
        results["zero-shot"][name] = score(output["logits_zs"])  # these two as they are, not calibrated
        results["fine-tuned"][name] = score(output["logits_ft"])
        results["OSE"][name] = curve[state["alpha"]][name]
        results["VRF"][name] = score(log(mix(output, omega)))
    wse = common.evaluate(wse_rows, setup)
    results["WSE"] = wse[str(state["alpha_wse"])]
    if common.RANK == 0:
        leave(setup, bank, outputs, state, results, curve, wse)
    common.say(f"V: {len(bank)} of {len(setup.data.train)} training images; chosen on {state['chosen_on']}: "
               + ", ".join(f"{key} {state[key]:.3g}" for key in ("k", "t_zs", "t_ft", "a", "b", "alpha", "alpha_wse")))
    common.finish(setup, results, vrf=state,
                  ose_curve={str(a): common.id_ood(t, setup.measure) for a, t in curve.items()},
                  wse_curve={a: common.id_ood(t, setup.measure) for a, t in wse.items()})


def predict_folder(args):
    """One line an image of --predict DIR: path, class, probability, d, omega, with the ensemble of --resume RUN."""
    if args.resume == "none":
        raise common.Fail(f"--predict {args.predict}: needs the finished run, as --resume RUN")
    state = common.read_json(Path(args.resume) / "vrf.json", "a finished run of vrf.py")
    bank = common.load_tensors(Path(args.resume) / state["bank"])[0]["bank"]
    root = Path(args.predict)
    paths = sorted(str(p) for p in root.rglob("*") if p.suffix.lower() in common.IMG_EXTENSIONS)
    broken = common.unreadable(paths)
    for path, reason in broken.items():
        print(f"{path} is left out: {reason}", file=sys.stderr)
    paths = [path for path in paths if path not in broken]
    if not paths:
        raise common.Fail(f"--predict {root}: no folder with images in it")
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the lines alone
        setup = common.start(args)
    zero_shot, fine_tuned = common.load_run(Path(args.resume) / state["finetuned"], setup)
    images = common.ImageSet("predict", paths, np.zeros(len(paths)))
    images.transform = setup.data.val.transform

    output = common.collect(lambda x, y: both(zero_shot, fine_tuned, x), images, args, setup.device)
    d = distances(output["v"], bank, state, setup.device) if len(bank) else torch.full((len(paths),), torch.nan)
    omega = ft_weight(d, state["a"], state["b"]) if len(bank) else torch.full((len(paths),), state["alpha"])
    probs = ensemble(output["logits_zs"], output["logits_ft"], omega, state["t_zs"], state["t_ft"], state["space"])
    for path, p, di, w in zip(paths, probs, d.tolist(), omega.tolist()):
        common.say(f"{path}\t{setup.data.classnames[p.argmax()]}\t{p.max():.4f}\t{di:.4f}\t{w:.4f}")


if __name__ == "__main__":
    common.cli(main)
