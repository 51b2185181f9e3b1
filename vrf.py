"""VRF: robust fine-tuning of zero-shot models via variance reduction (arXiv 2411.06966).

Ensemble a zero-shot and a fine-tuned model with a weight for each image: the nearer an image is
to training images that only the fine-tuned model gets right, the more that model counts.

Equations
    Eq. (1)  output-space ensemble OSE   alpha p_ft + (1 - alpha) p_zs                  ensemble
    Eq. (2)  weight-space ensemble WSE   (1 - alpha) theta_zs + alpha theta_ft   weight_ensemble
    Eq. (3)  zero-shot failures          V = {v_i : y_i = argmax f_ft(x_i),
                                              y_i != argmax f_zs(x_i)}        zero_shot_failures
    Eq. (4)  distance                    d(x) = ||v - v_(k)||_2, k-th nearest of V  knn_distance
    Eq. (5)  ensemble                    p_vrf = omega p_ft + (1 - omega) p_zs          ensemble
    Eq. (6)  weight                      omega(x) = sigmoid(-(d(x) - a) / b)           ft_weight
Symbols: f_zs, f_ft logits and p_zs, p_ft probabilities of the two models; v unit feature of the
    fine-tuned model; V bank of the failures' features; omega weight of the fine-tuned model;
    a, b > 0; T_zs, T_ft temperatures.

Deviations (released code: knn_distance.py, models/calibration.py, main.py, baselines.py)
    1. From the paper, with the code: d is squared (faiss IndexFlatL2), to which a = 1.5, b = 0.6
       belong; --distance l2. The paper's own values differ: b = 0.5 for ViT-B/16 in Table 7, and
       in Table 10 61.8 on the shifts at (1.5, 0.6), 61.7 at (1.5, 0.5); a = b = 0.3 for CIFAR-10.
    2. From the paper, with the code: k = round(1000 |V| / |train|), not floor(0.1% |V|): --k-rule
       paper, the default for shapes and folder, since the code's k = 1000 |V| / |train| is a
       large part of V where |train| is small. From both: k is kept within [1, |V|], and where V
       is empty VRF is OSE, with a warning.
    3. From the paper, with the code: logits are first divided by temperatures at which mean
       confidence equals accuracy; --no-calibrate. Ours is a bisection, theirs an unbounded
       interpolation search that stops within 0.001 of the accuracy.
    4. From the code: everything is chosen on held-out training images (2% of ImageNet's and
       DomainNet's, 10% of CIFAR-10's and of a folder without val/), which are not in V either,
       not on the ID test set; --select-on-test. OSE's and WSE's alpha are of 0, 0.1, ..., 1 as
       in the paper; the code's of 0.1, ..., 0.9. OSE is calibrated like VRF, theirs is not.
    5. From the code, with the paper's Section 3.2: a, b are swept, except on ImageNet; a among
       quantiles of d, b among fractions of its spread, since d differs between data sets. From
       both: what is chosen is not the best held-out accuracy (--choose best), which is ID
       accuracy and prefers the fine-tuned model: of the candidates within one standard error of
       it, the one whose mean weight is nearest 0.5.
    6. From the code: the fine-tuned model is trained here, with WiSE-FT's recipe and its
       deviations (header of wise_ft.py); theirs for ViT-B/16 is WiSE-FT's checkpoint, which
       --finetuned takes as a state dict.
    7. Figure 1b: bins of equal count over all test images; App. C.7 has windows d +- 0.1 and, in
       Figure 13, a curve a test set.
    8. knn_distance ranks in fp32: see there.

Usage
    python vrf.py                                                # embedded data, fine-tunes first
    python vrf.py --finetuned runs/wise_ft-shapes-s0/fine-tuned  # a run, or MINE.pt with --data
    python vrf.py --data imagenet --data-dir ~/data              # the paper's main experiment
    python vrf.py --finetuned runs/vrf-shapes-s0 --predict MY_IMAGES  # with d and omega a line
Expected result: README.md, "Results"; the paper's Table 2 for ViT-B/16 on ImageNet / mean of five
    shifts (not run by us): zero-shot 68.3/58.4, fine-tuned 81.3/53.7, WSE 82.5/60.6 (alpha 0.7,
    chosen on ID), OSE 82.2/60.2, VRF 82.3/61.8.
"""
import argparse
import copy
import functools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import common

# ---------------------------------------- Args ----------------------------------------

PAPER = dict(epochs=10, batch_size=512, lr=3e-5, wd=0.1, warmup=500, grad_clip=1.0,
             augment="crop", sweep=True, k_rule="code")
RECIPES = {
    "shapes": dict(PAPER, model="shapes-clip", batch_size=64, lr=6e-4, warmup=0.1,
                   augment="none", k_rule="paper"),
    "folder": dict(PAPER, batch_size=64, lr=1e-5, warmup=0.1, k_rule="paper"),
    "imagenet": dict(PAPER, holdout=0.02, sweep=False),
    "cifar10": PAPER,
    "iwildcam": PAPER,  # this and the next two are not in the paper
    "fmow": PAPER,
    "domainnet": dict(PAPER, holdout=0.02),
}
ALPHAS = [round(0.1 * i, 1) for i in range(11)]  # of OSE and WSE, as in the paper


def get_args():
    switch = argparse.BooleanOptionalAction
    p = common.parser(__doc__)
    p.add("--distance", "squared", "squared as the code, l2 as the paper",
          choices=["squared", "l2"])
    p.add("--k-rule", common.RECIPE, "k = round(1000 |V| / |train|) as the code, floor(0.1% |V|) "
          "as the paper", choices=["code", "paper"])
    p.add("--k", 0, "k itself; 0 follows --k-rule", type=common.limited(int, 0))
    p.add("--a", 1.5, "distance at which both models count the same, without --sweep (paper: 1.5)",
          type=common.limited(above=0))
    p.add("--b", 0.6, "width of the change, without --sweep (paper: 0.6)",
          type=common.limited(above=0))
    p.add("--sweep", common.RECIPE, "choose a and b on held-out images", action=switch)
    p.add("--choose", "one-se", "alpha, a and b: within one standard error of the best held-out "
          "accuracy the mean weight nearest 0.5, or the best accuracy as the paper",
          choices=["one-se", "best"])
    p.add("--calibrate", True, "temperatures at which confidence equals accuracy", action=switch)
    p.add("--space", "probabilities", "what is averaged; logits is the paper's Section 5.3",
          choices=["probabilities", "logits"])
    p.add("--freeze", "none", "part that is not trained", choices=["none", "head"])
    p.add("--select-on-test", False, "choose on the ID test set, as the released code does for "
          "temperatures and alpha", action=switch)
    return common.parse(p, "vrf", RECIPES)


# ------------------------------------- Equations -------------------------------------

def weight_ensemble(theta_zs, theta_ft, alpha):
    """Eq. (2): (1 - alpha) theta_zs + alpha theta_ft of two state dicts.

    Integer entries are theta_ft's. Source: released code, src/models/modeling.py. For
    0 < alpha < 1 equal to WiSE-FT's Eq. (1).
    """
    theta = dict(theta_ft)
    for name, value in theta_ft.items():
        if value.is_floating_point():
            theta[name] = (1 - alpha) * theta_zs[name] + alpha * value
    return theta


def zero_shot_failures(logits_zs, logits_ft, labels):
    """Eq. (3): (N,) bool, images that are right fine-tuned and wrong zero-shot; logits (N, C)."""
    return (logits_ft.argmax(1) == labels) & (logits_zs.argmax(1) != labels)


def neighbours(failures, images, rule="code"):
    """k of a bank with |V| = failures among |train| = images, kept within [1, |V|]; 0 if |V| is.

    code: round(1000 |V| / |train|); paper: floor(0.1% |V|).
    """
    k = round(failures / max(images, 1) * 1000) if rule == "code" else failures // 1000
    return min(max(k, 1), failures)


@torch.no_grad()
def knn_distance(queries, bank, k, squared=True, chunk=None):
    """Eq. (4): distance of queries (Q, D) to their k-th nearest row of bank (N, D): (Q,).

    squared: as faiss IndexFlatL2 and the released code; else the paper's L2 norm. `chunk` queries
    at a time; by default as many as fit 2^26 distances (256 MB). Rows are ranked in the precision
    that is given: in fp32, of rows whose d^2 differs by less than about 1e-6 either may count as
    the k-th. ValueError unless 1 <= k <= N.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k = {k} is not within 1 and the {len(bank)} rows of the bank")
    chunk = chunk or max(1, 2**26 // len(bank))
    norms, found = bank.square().sum(1), []
    # One buffer for all chunks: fresh pages are slow.
    buffer = queries.new_empty(min(chunk, len(queries)), len(bank))
    for q in queries.split(chunk):
        # |b|^2 - 2 q.b = d^2 - |q|^2 ranks a row as d does; as a distance it would cancel.
        rank = torch.addmm(norms, q, bank.T, alpha=-2, out=buffer[:len(q)])
        kth = bank[rank.topk(k, largest=False).indices[:, -1]]
        found.append((q - kth).square().sum(1))
    d = torch.cat(found) if found else queries.new_zeros(0)
    return d if squared else d.sqrt()


def ft_weight(d, a=1.5, b=0.6):
    """Eq. (6): omega = sigmoid(-(d - a) / b), (Q,), the fine-tuned model's weight at d (Q,)."""
    return torch.sigmoid(-(d - a) / b)


def calibration_temperature(logits, labels, low=1e-3, high=1e3):
    """T at which the mean confidence of softmax(logits / T) equals the accuracy.

    logits (N, C), labels (N,). Source: released code, models/calibration.py. Confidence falls as
    T grows, so this bisects log T; an accuracy that no T in [low, high] reaches (1, or at most
    1/C) gives that end of the bracket.
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
    """Eq. (5): weight p_ft + (1 - weight) p_zs, (N, C); weight (N,), or a number for Eq. (1).

    p = softmax(logits / T), with logits already in the test set's label space. space="logits"
    averages logits / T and then takes the softmax (paper, Section 5.3).
    """
    w = torch.as_tensor(weight, dtype=logits_zs.dtype, device=logits_zs.device).reshape(-1, 1)
    if space == "logits":
        return (w * logits_ft / t_ft + (1 - w) * logits_zs / t_zs).softmax(dim=1)
    return w * (logits_ft / t_ft).softmax(dim=1) + (1 - w) * (logits_zs / t_zs).softmax(dim=1)


# ------------------------------------- Inference -------------------------------------

class Outputs(NamedTuple):
    """What the ensembles need of N images."""
    logits_zs: torch.Tensor  # (N, C') in the set's label space
    logits_ft: torch.Tensor  # (N, C')
    v: torch.Tensor          # (N, D) unit features of the fine-tuned model
    d: torch.Tensor          # (N,) distance to the failures, NaN if there are none
    labels: torch.Tensor     # (N,)


def failures_of(zero_shot, fine_tuned, setup, folder):
    """V (|V|, D): unit features of the zero-shot failures among un-augmented training images."""
    def outputs(images, labels):
        logits_ft, v = fine_tuned(images)
        return {"failure": zero_shot_failures(zero_shot(images)[0], logits_ft, labels), "v": v}
    models = [zero_shot, fine_tuned]
    seen = common.collect_once(outputs, models, setup.data.train, setup, folder)
    return seen["v"][seen["failure"]]


def outputs_of(zero_shot, fine_tuned, images, bank, k, setup, folder):
    """Outputs of an ImageSet; all but the distance is computed once for these two models."""
    def outputs(x, labels):
        logits_ft, v = fine_tuned(x)
        return {"logits_zs": images.project(zero_shot(x)[0]),
                "logits_ft": images.project(logits_ft), "v": v}
    found = common.collect_once(outputs, [zero_shot, fine_tuned], images, setup, folder)
    place = setup.device if setup.device.type == "cuda" else torch.device("cpu")
    found["d"] = distances(found["v"], bank, k, setup.args.distance, place)
    found["labels"] = images.labels
    return Outputs(**{name: value.to(place) for name, value in found.items()})


def distances(v, bank, k, kind, device):
    if not len(bank):
        return torch.full((len(v),), torch.nan, device=device)
    return knn_distance(v.to(device), bank.to(device), k, kind == "squared")


def log_ensemble(outputs, weight, t_zs, t_ft, space):
    """Logarithm of Eq. (1) or (5), exact, (N, C'); weight: (N,), or one number."""
    if space == "logits":
        mean = ensemble(outputs.logits_zs, outputs.logits_ft, weight, t_zs, t_ft, space)
        return mean.log()
    return common.log_mixture(outputs.logits_ft / t_ft, outputs.logits_zs / t_zs, weight)


def accuracy(log_probs, labels):
    return 100 * (log_probs.argmax(1) == labels).double().mean().item()


def temperatures(outputs, name):
    """(T_zs, T_ft) at which confidence equals accuracy on these Outputs."""
    found = []
    for model, logits in (("zero-shot", outputs.logits_zs), ("fine-tuned", outputs.logits_ft)):
        t = calibration_temperature(logits, outputs.labels)
        if not 1.01e-3 < t < 0.99e3:
            common.say(f"warning: no temperature gives the {model} model's accuracy on {name}; "
                       f"{t:.3g} is used")
        found.append(t)
    return found


def choose_alpha(mix, outputs, rule):
    """OSE's alpha, on these Outputs."""
    scores = [accuracy(mix(outputs, alpha), outputs.labels) for alpha in ALPHAS]
    return ALPHAS[common.choose(scores, ALPHAS, len(outputs.labels), rule)]


def choose_wse_alpha(zero_shot, fine_tuned, images, rule, setup):
    """WSE's alpha, on this ImageSet."""
    scores = common.accuracies(wse_rows(zero_shot, fine_tuned), images, setup)
    return ALPHAS[common.choose(list(scores.values()), ALPHAS, len(images), rule)]


def wse_rows(zero_shot, fine_tuned):
    """rows(images, project) -> {alpha as text: logits}; eleven models at once would fill a GPU."""
    theta_zs, theta_ft = zero_shot.state_dict(), copy.deepcopy(fine_tuned.state_dict())
    model = copy.deepcopy(fine_tuned)

    def rows(images, project):
        found = {}
        for alpha in ALPHAS:
            model.load_state_dict(weight_ensemble(theta_zs, theta_ft, alpha))
            found[str(alpha)] = project(common.classify(model, images))
        return found
    return rows


def sweep_weight(mix, outputs, rule):
    """(a, b), on these Outputs: a among quantiles of d, b among fractions of its spread.

    The paper sweeps a grid (Section 3.2). mix(outputs, weight) -> (N, C), whose argmax counts.
    """
    d = outputs.d.double()
    spread = max(d.std(correction=0).item(), 1e-6)
    steps = torch.linspace(0, 1, 21, dtype=torch.double, device=d.device)
    grid, scores, weights = [], [], []
    for a in d.quantile(steps).clamp(min=1e-6).tolist():
        for b in (0.25 * spread, 0.5 * spread, spread, 2 * spread):
            omega = ft_weight(outputs.d, a, b)
            grid.append((a, b))
            scores.append(accuracy(mix(outputs, omega), outputs.labels))
            weights.append(omega.mean().item())
    return grid[common.choose(scores, weights, len(d), rule)]


# -------------------------------------- Figure --------------------------------------

def plot_ratio(tests, state, path, bins=12):
    """Figure 1b: Acc_ft / Acc_zs in bins of d(x) over all test images, and the curve omega(d)."""
    plt = common.pyplot()
    if plt is None or not state["failures"]:
        return
    d = torch.cat([o.d for o in tests]).cpu()
    right_zs = torch.cat([o.logits_zs.argmax(1) == o.labels for o in tests]).cpu()
    right_ft = torch.cat([o.logits_ft.argmax(1) == o.labels for o in tests]).cpu()
    x, ratio = [], []
    for part in d.argsort().tensor_split(bins):
        if right_zs[part].any():
            x.append(d[part].mean())
            ratio.append(right_ft[part].sum() / right_zs[part].sum())
    figure, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    points = ax.plot(x, ratio, "o-", label=r"Acc$_{ft}$ / Acc$_{zs}$, bins of equal count")
    ax.axhline(1, color="grey", linewidth=0.8)
    ax.set(xlabel=f"d(x), {state['distance']} distance to neighbour {state['k']} of "
           f"{state['failures']} failures", ylabel=r"Acc$_{ft}$ / Acc$_{zs}$")
    twin, x = ax.twinx(), torch.linspace(d.min(), d.max(), 200)
    a, b = state["a"], state["b"]
    curve = twin.plot(x, ft_weight(x, a, b), "--", color="tab:red",
                      label=rf"$\omega$(d), a = {a:.3g}, b = {b:.3g}")
    twin.set(ylabel=r"weight $\omega$ of the fine-tuned model", ylim=(0, 1))
    figure.legend(handles=points + curve, loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---------------------------------------- main ----------------------------------------

def fine_tune(setup, zero_shot, out):
    """Plain end-to-end fine-tuning as in the paper: WiSE-FT's recipe and head."""
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch.images)[0], batch.labels), {}
    fine_tuned = copy.deepcopy(zero_shot)
    for parameter in (fine_tuned.head, fine_tuned.bias):
        parameter.requires_grad_(setup.args.freeze != "head")
    setup.fit(fine_tuned, loss_fn, out)
    return fine_tuned


def two_models(setup):
    """(zero-shot, fine-tuned), of --finetuned or trained now; leaves both in the new run."""
    if setup.args.finetuned != "none":
        zero_shot, fine_tuned = common.load_finetuned(setup)
        setup.out = common.run_folder(setup.args)
    else:
        setup.out = common.run_folder(setup.args)
        zero_shot = setup.classifier(folded=True)
        common.evaluate_first(common.each({"zero-shot": zero_shot}), setup)
        fine_tuned = fine_tune(setup, zero_shot, setup.out / "fine-tuned")
    common.save_run(setup, zero_shot, setup.out / "zero-shot")
    common.save_run(setup, fine_tuned, setup.out / "fine-tuned")
    return zero_shot, fine_tuned


def images_to_choose_on(setup):
    """(name, ImageSet) for temperatures, alpha, a and b: held-out training images."""
    args, name, images = setup.args, "held-out", setup.data.val
    if args.select_on_test:
        name, images = next(iter(setup.data.tests.items()))
        common.say(f"--select-on-test: temperatures, alpha and, with --sweep, a and b are chosen "
                   f"on the test set {name}; its accuracy is then no estimate for new images")
    if (args.calibrate or args.sweep) and not len(images):
        raise common.Fail("no held-out images to calibrate and sweep on: set --holdout where the "
                          "model is trained, or pass --no-calibrate --no-sweep, or "
                          "--select-on-test")
    return name, images


def main():
    args = get_args()
    if args.predict != "none":
        return predict(args)
    if args.sweep and (args.a, args.b) != (1.5, 0.6):
        raise common.Fail(f"--a {args.a:g} --b {args.b:g}: would be replaced by the sweep; add "
                          "--no-sweep")
    setup = common.start(args)
    chosen_on, images = images_to_choose_on(setup)
    zero_shot, fine_tuned = two_models(setup)

    # Step 1: the zero-shot failures V, and what the ensembles need: both logits, v, d
    given = Path(args.finetuned)
    folder = given if given.is_dir() else setup.out  # other runs find its cache
    bank = failures_of(zero_shot, fine_tuned, setup, folder)
    k = args.k or neighbours(len(bank), len(setup.data.train), args.k_rule)
    of = functools.partial(outputs_of, zero_shot, fine_tuned, bank=bank, k=min(k, len(bank)),
                           setup=setup, folder=folder)
    tests = {name: of(images=test) for name, test in setup.data.tests.items()}
    held_out = of(images=images) if len(images) else None

    # Step 2: temperatures, then alpha, then a and b, on held-out training images
    t_zs, t_ft = temperatures(held_out, chosen_on) if args.calibrate else (1.0, 1.0)
    mix = functools.partial(log_ensemble, t_zs=t_zs, t_ft=t_ft, space=args.space)
    alpha = alpha_wse = 0.5
    if held_out:
        alpha = choose_alpha(mix, held_out, args.choose)
        alpha_wse = choose_wse_alpha(zero_shot, fine_tuned, images, args.choose, setup)
    a, b = args.a, args.b
    if args.sweep and len(bank):
        a, b = sweep_weight(mix, held_out, args.choose)

    # Step 3: the ensembles on the test sets
    results = {"zero-shot": {}, "fine-tuned": {}, "OSE": {}, "WSE": {}, "VRF": {}}
    ose = {str(weight): {} for weight in ALPHAS}
    for name, outputs in tests.items():
        test = setup.data.tests[name]
        omega = ft_weight(outputs.d, a, b) if len(bank) else alpha
        results["zero-shot"][name] = score(outputs.logits_zs, test)  # as it is, not calibrated
        results["fine-tuned"][name] = score(outputs.logits_ft, test)
        results["OSE"][name] = score(mix(outputs, alpha), test)
        results["VRF"][name] = score(mix(outputs, omega), test)
        for weight in ALPHAS:
            ose[str(weight)][name] = score(mix(outputs, weight), test)
    wse = common.evaluate(wse_rows(zero_shot, fine_tuned), setup)
    results["WSE"] = wse[str(alpha_wse)]

    state = {"failures": len(bank), "k": min(k, len(bank)), "t_zs": t_zs, "t_ft": t_ft, "a": a,
             "b": b, "alpha": alpha, "alpha_wse": alpha_wse, "distance": args.distance,
             "space": args.space, "chosen_on": chosen_on}
    curves = {"ose_curve": common.plane(ose, setup.measure),
              "wse_curve": common.plane(wse, setup.measure)}
    if common.RANK == 0:
        leave(setup, bank, state, tests, results, curves)
    common.finish(setup, results, vrf=state, **curves)


def score(log_probs, images):
    scores = common.image_scores(log_probs, images.labels.to(log_probs.device))
    return common.metrics(common.Scores(*[x.cpu() for x in scores]), images)


def leave(setup, bank, state, tests, results, curves):
    """What else a run leaves: vrf.json and the bank for --predict, and the two figures."""
    values = ", ".join(f"{key} {value:.3g}" for key, value in list(state.items())[1:8])
    common.say(f"V: {len(bank)} of {len(setup.data.train)} training images; chosen on "
               f"{state['chosen_on']}: {values}")
    if not len(bank):
        common.say("warning: no training image is right fine-tuned and wrong zero-shot, so VRF "
                   "falls back to OSE")
    common.write_json(setup.out / "vrf.json", state)
    common.save_tensors(setup.out / "vrf.safetensors", {"bank": bank})
    plot_ratio(tests.values(), state, setup.out / "ratio.png")
    rows = {row: results[row] for row in ("zero-shot", "fine-tuned", "VRF")}
    points = common.plane(rows, setup.measure)
    lines = {r"OSE, $\alpha$ from 0 to 1": curves["ose_curve"].values(),
             r"WSE, $\alpha$ from 0 to 1": curves["wse_curve"].values()}
    common.plot_plane(points, setup, lines)  # the paper's Figure 1a


def predict(args):
    """--predict with the ensemble of the run --finetuned; d and omega are further columns."""
    run = Path(args.finetuned)
    state = common.read_json(run / "vrf.json", "a finished run of vrf.py")
    bank = common.load_tensors(run / "vrf.safetensors")[0]["bank"]
    device, amp = common.compute_device(args)
    zero_shot = common.load_saved(run / "zero-shot", device, amp)
    fine_tuned = common.load_saved(run / "fine-tuned", device, amp)

    def probabilities(images):
        logits_zs, (logits_ft, v) = zero_shot.model(images)[0], fine_tuned.model(images)
        d = distances(v, bank, state["k"], state["distance"], device)
        if len(bank):
            omega = ft_weight(d, state["a"], state["b"])
        else:
            omega = torch.full_like(d, state["alpha"])
        t_zs, t_ft = state["t_zs"], state["t_ft"]
        return ensemble(logits_zs, logits_ft, omega, t_zs, t_ft, state["space"]), d, omega
    common.predict_folder(args, fine_tuned, device, probabilities)


if __name__ == "__main__":
    common.cli(main)
