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
       confidence equals accuracy; --no-calibrate. Ours is a bisection, and 1 with a warning where
       no temperature does; theirs an unbounded interpolation search that stops within 0.001.
    4. From the code: everything is chosen on held-out training images (in the paper's 3.2 and
       5.1 an "ID validation set"): 2% of ImageNet's and DomainNet's, 10% of CIFAR-10's and of a
       folder without val/, which are not in V either; by accuracy whatever the set's metric. The
       code chooses T and alpha on the ID test set: --select-on-test. alpha is of 0, 0.1, ..., 1
       as in the paper, in the code 0.1, ..., 0.9; of equals it is the one nearest 0.5, in the
       code the smallest. OSE is calibrated like VRF, theirs and the paper's is not:
       --no-calibrate.
    5. From the code, with the paper's Section 3.2: a, b are chosen, except on ImageNet (there
       --a 0 --b 0); a among quantiles of d, b among 0.25 to 2 times its spread, since d differs
       between data sets; of equals, the pair whose mean omega is nearest 0.5. For ImageNet C.2
       names a from 1.2 to 1.8, b from 0.5 to 1.0.
    6. From the code: the fine-tuned model is trained here, with WiSE-FT's recipe and its
       deviations (header of wise_ft.py); theirs for ViT-B/16 is WiSE-FT's checkpoint, which
       --finetuned takes as a state dict.
    7. Figure 1b: bins of equal count over all test images; App. C.7 has windows d +- 0.1 and, in
       Figure 13, a curve a test set.
    8. knn_distance ranks in fp32: see there. On STL-10 the paper removes the class monkey; that
       the logit of frog is dropped is ours.
    9. Absent: LP-FT models, ensembles of logits, the other weights of 5.3, Entity-30.

Usage
    python vrf.py                                                # embedded data, fine-tunes first
    python vrf.py --finetuned runs/wise_ft-shapes-s0/fine-tuned  # a run, or MINE.pt with --data
    python vrf.py --data imagenet --data-dir ~/data              # the paper's main experiment
    python vrf.py --finetuned runs/vrf-shapes-s0 --predict MY_IMAGES  # with d and omega a line
Expected result: README.md, "Results"; the paper's Table 2 for ViT-B/16 on ImageNet / mean of five
    shifts (not run by us): zero-shot 68.3/58.4, fine-tuned 81.3/53.7, WSE 82.5/60.6 (alpha 0.7,
    chosen on ID), OSE 82.2/60.2 (--no-calibrate), VRF 82.3/61.8.
"""
import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import common

# ---------------------------------------- Args ----------------------------------------

PAPER = dict(epochs=10, batch_size=512, lr=3e-5, wd=0.1, warmup=500, grad_clip=1.0,
             augment="crop", k_rule="code")  # WiSE-FT's
RECIPES = {
    "imagenet": dict(PAPER, a=1.5, b=0.6), "cifar10": PAPER,
    "iwildcam": PAPER, "fmow": PAPER, "domainnet": PAPER,  # these and the next are ours
    "folder": dict(PAPER, k_rule="paper"), "shapes": dict(PAPER, k_rule="paper"),
}  # what the data brings to every method is in common.OF_DATA
ALPHAS = [round(0.1 * i, 1) for i in range(11)]  # of OSE and WSE, as in the paper


def get_args():
    p = common.parser(__doc__)
    p.add("--distance", "squared", "squared as the code, l2 as the paper",
          choices=["squared", "l2"])
    k = p.add_mutually_exclusive_group()
    p.add("--k-rule", "code", "k = round(1000 |V| / |train|) as the code, floor(0.1%% |V|) as the "
          "paper", k, choices=["code", "paper"])
    p.add("--k", 0, "k itself; 0 follows --k-rule", k)
    p.add("--a", 0.0, "distance at which both models count the same (paper: 1.5); 0: a and b are "
          "chosen on held-out images")
    p.add("--b", 0.0, "width of the change from one model to the other (paper: 0.6)")
    p.add("--calibrate", True, "temperatures at which confidence equals accuracy")
    p.add("--select-on-test", False, "choose on the ID test set, as the released code does for "
          "temperatures and alpha")
    args = common.parse(p, "vrf", RECIPES)
    if (args.a > 0) != (args.b > 0):
        raise common.Fail("--a and --b: give both, or neither")
    return args


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


def neighbours(failures, n, rule="code"):
    """k of a bank with |V| = failures among |train| = n, kept within [1, |V|]; 0 if |V| is.

    code: round(1000 |V| / |train|); paper: floor(0.1% |V|).
    """
    k = round(failures / max(n, 1) * 1000) if rule == "code" else failures // 1000
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
    # One buffer for all chunks: fresh pages are slow
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


def ensemble(logits_zs, logits_ft, weight, t_zs=1.0, t_ft=1.0):
    """Eq. (5): weight p_ft + (1 - weight) p_zs, (N, C); weight (N,), or a number for Eq. (1).

    p = softmax(logits / T), with logits already in the test set's label space.
    """
    w = torch.as_tensor(weight, dtype=logits_zs.dtype, device=logits_zs.device).reshape(-1, 1)
    p_zs, p_ft = (logits_zs / t_zs).softmax(dim=1), (logits_ft / t_ft).softmax(dim=1)
    return w * p_ft + (1 - w) * p_zs


# ------------------------------------- Inference -------------------------------------

def failures_of(zero_shot, fine_tuned, setup):
    """V (|V|, D): unit features of the zero-shot failures among un-augmented training images."""
    def outputs(images, labels):
        logits_ft, v = fine_tuned(images)
        return {"V": v[zero_shot_failures(zero_shot(images)[0], logits_ft, labels)]}
    return common.collect(outputs, setup.data.train, setup)["V"]


def distance_to(bank, k, kind):
    """v (B, D) -> d (B,) to a bank (N, D), float64; NaN if it is empty."""
    bank = bank.to(common.DEVICE)
    if not len(bank):
        print("warning: V is empty, so VRF is OSE", file=sys.stderr)

    def distance(v):
        if not len(bank):
            return v.new_full((len(v),), torch.nan).double()
        return knn_distance(v, bank, k, kind == "squared").double()
    return distance


def outputs_of(zero_shot, fine_tuned, distance, images, project):
    """logits_zs, logits_ft (B, C') and d (B,) of images, in float64."""
    logits_ft, v = fine_tuned(images)
    return project(zero_shot(images)[0]).double(), project(logits_ft).double(), distance(v)


def omega(d, a, b, alpha):
    """Eq. (6), or OSE's alpha where there is no distance."""
    return ft_weight(d, a, b).nan_to_num(alpha)


def temperature(model, logits, images):
    """calibration_temperature() of a model, or 1 where none gives its accuracy on these images."""
    t = calibration_temperature(logits, images.labels)
    if 1.01e-3 < t < 0.99e3:
        return t
    common.say(f"warning: no temperature gives the {model} model's accuracy on {images.name}, "
               f"{len(images)} images; 1 is used")
    return 1.0


def weight_grid(d):
    """[(a, b), ...]: a among quantiles of the distances d (N,), b among fractions of their spread.

    Our grid: deviation 5.
    """
    a = d.quantile(torch.linspace(0, 1, 21).double()).clamp(min=1e-6)
    spread = d.std(correction=0).clamp(min=1e-6)
    return torch.cartesian_prod(a, spread * torch.tensor([0.25, 0.5, 1, 2]).double()).tolist()


def accuracy(probs, labels):
    return 100 * (probs.argmax(1) == labels).double().mean().item()


def wse_rows(zero_shot, fine_tuned):
    """rows(images, project) -> {"WSE ALPHA": logits}; eleven models at once would fill a GPU."""
    theta_zs, theta_ft = zero_shot.state_dict(), fine_tuned.state_dict()
    model = copy.deepcopy(fine_tuned)

    def rows(images, project):
        found = {}
        for alpha in ALPHAS:
            model.load_state_dict(weight_ensemble(theta_zs, theta_ft, alpha))
            found[f"WSE {alpha:g}"] = project(common.logits_of(model, images))
        return found
    return rows


def table_rows(zero_shot, fine_tuned, distance, mix, alpha, grid):
    """rows(images, project) of all models and ensembles, and of each image d and both classes."""
    wse = wse_rows(zero_shot, fine_tuned)

    def rows(images, project):
        zs, ft, d = outputs_of(zero_shot, fine_tuned, distance, images, project)
        weights = {f"OSE {weight:g}": weight for weight in ALPHAS}
        for i, (a, b) in enumerate(grid):
            weights[f"VRF {i}"] = omega(d, a, b, alpha)
        found = {"zero-shot": zs, "fine-tuned": ft, **wse(images, project)}
        for name, weight in weights.items():
            found[name] = common.log_probabilities(mix(zs, ft, weight))
        return found | {"d": d, "zs": zs.argmax(1), "ft": ft.argmax(1)}
    return rows


# -------------------------------------- Figure --------------------------------------

def plot_ratio(d, right_zs, right_ft, state, path, bins=12):
    """Figure 1b: Acc_ft / Acc_zs in bins of d(x) over all test images, and the curve omega(d).

    d, right_zs, right_ft (N,): the last two whether that model is right.
    """
    figure = common.new_figure(6, 4.5)
    if figure is None or not state["failures"]:
        return
    ax = figure.subplots()
    parts = [part for part in d.argsort().tensor_split(bins) if right_zs[part].any()]
    ratio, = ax.plot([d[part].mean() for part in parts],
                     [right_ft[part].sum() / right_zs[part].sum() for part in parts], "o-")
    ax.set(xlabel=f"d(x), distance to neighbour {state['k']} of {state['failures']} failures",
           ylabel=r"Acc$_{ft}$ / Acc$_{zs}$ in bins of equal count")
    x, weights = torch.linspace(d.min(), d.max(), 200), ax.twinx()
    curve, = weights.plot(x, ft_weight(x, state["a"], state["b"]), "C1--")
    weights.set(ylabel=r"weight $\omega$(d) of the fine-tuned model", ylim=(0, 1))
    ax.legend([ratio, curve], ["ratio of accuracies", r"$\omega$(d)"])
    figure.savefig(path, dpi=150)


# ---------------------------------------- main ----------------------------------------

def cross_entropy(model, batch):
    """loss_fn(model, batch) of plain end-to-end fine-tuning, as WiSE-FT's."""
    return F.cross_entropy(model(batch.images)[0], batch.labels), {}


def two_models(setup):
    """(zero-shot, fine-tuned), of --finetuned or trained now; leaves both in the new run."""
    if setup.args.finetuned:
        zero_shot, fine_tuned = common.load_finetuned(setup)
    else:
        W, s = setup.head, setup.scale
        zero_shot = common.ImageClassifier(setup.clip.visual, s * W, bias=True,
                                           amp=setup.amp).eval()
        common.preview(common.each({"zero-shot": zero_shot}), setup)
        fine_tuned = common.train(zero_shot, cross_entropy, setup, setup.out / "fine-tuned")
    common.save_run(setup, zero_shot, setup.out / "zero-shot")
    common.save_run(setup, fine_tuned, setup.out / "fine-tuned")
    return zero_shot, fine_tuned


def main():
    args = get_args()
    if args.predict:
        return predict(args)
    data = common.load_data(args)
    images = next(iter(data.tests.values())) if args.select_on_test else data.val
    if not len(images):
        raise common.Fail("no held-out images to choose on: raise --holdout, or --select-on-test")
    setup = common.start(args, data)
    zero_shot, fine_tuned = two_models(setup)

    # The paper's Steps 1 and 2: the zero-shot failures V, and d of the images to choose on
    bank = failures_of(zero_shot, fine_tuned, setup)
    k = min(args.k or neighbours(len(bank), len(data.train), args.k_rule), len(bank))
    distance = distance_to(bank, k, args.distance)

    def outputs(x, labels):
        found = outputs_of(zero_shot, fine_tuned, distance, x, images.project)
        return dict(zip(("zs", "ft", "d"), found))
    zs, ft, d = common.collect(outputs, images, setup).values()

    # Choices: temperatures, then alpha, then a and b
    t_zs = t_ft = 1.0
    if args.calibrate:
        t_zs, t_ft = temperature("zero-shot", zs, images), temperature("fine-tuned", ft, images)

    def mix(logits_zs, logits_ft, weight):
        return ensemble(logits_zs, logits_ft, weight, t_zs, t_ft)

    def score(weight):
        return accuracy(mix(zs, ft, weight), images.labels)
    alpha = ALPHAS[common.choose([score(alpha) for alpha in ALPHAS], ALPHAS)]
    wse = common.evaluate(wse_rows(zero_shot, fine_tuned), setup, {"chosen on": images}).values()
    alpha_wse = ALPHAS[common.choose([sets["chosen on"]["acc"] for sets in wse], ALPHAS)]
    grid = [(args.a, args.b)] if args.a or not len(bank) else weight_grid(d)
    weights = [omega(d, a, b, alpha) for a, b in grid]
    best = common.choose([score(w) for w in weights], [w.mean().item() for w in weights])
    state = {
        "failures": len(bank), "k": k, "distance": args.distance,
        "t_zs": t_zs, "t_ft": t_ft,
        "a": grid[best][0], "b": grid[best][1],
        "alpha": alpha, "alpha_wse": alpha_wse, "chosen_on": images.name,
    }
    common.say(f"V: {len(bank)} of {len(data.train)} training images; {state}")

    # Step 3: the ensembles, on the test sets
    every = common.evaluate(table_rows(zero_shot, fine_tuned, distance, mix, alpha, grid), setup)
    about = {}
    for row in ("d", "zs", "ft"):
        about[row] = torch.cat(list(every.pop(row).values()))
    results = {"zero-shot": every["zero-shot"], "fine-tuned": every["fine-tuned"],
               "OSE": every[f"OSE {alpha:g}"], "WSE": every[f"WSE {alpha_wse:g}"],
               "VRF": every[f"VRF {best}"]}
    points, curves = common.plane(every, setup.measure), {}
    for name in ("OSE", "WSE"):
        curves[name] = {f"{alpha:g}": points[f"{name} {alpha:g}"] for alpha in ALPHAS}
    if common.RANK == 0:
        labels = torch.cat([test.labels for test in data.tests.values()])
        plot_ratio(about["d"], about["zs"] == labels, about["ft"] == labels, state,
                   setup.out / "ratio.png")
        common.write_json(setup.out / "vrf.json", state)
        common.save_tensors(setup.out / "vrf.safetensors", {"bank": bank})
    common.finish(setup, results, {f"{name}, alpha": line for name, line in curves.items()},
                  vrf=state, **curves,
                  grid=[(a, b, *points[f"VRF {i}"]) for i, (a, b) in enumerate(grid)])


def predict(args):
    """--predict with the ensemble of the run --finetuned; d and omega are further columns."""
    run, amp = Path(args.finetuned), common.tower_precision(args)
    zero_shot, _, _ = common.load_run(run / "zero-shot", amp)
    fine_tuned, classnames, _ = common.load_run(run / "fine-tuned", amp)
    state, bank = common.read_json(run / "vrf.json"), common.load_file(run / "vrf.safetensors")
    distance = distance_to(bank["bank"], state["k"], state["distance"])

    def probabilities(images):
        zs, ft, d = outputs_of(zero_shot, fine_tuned, distance, images, lambda logits: logits)
        weight = omega(d, state["a"], state["b"], state["alpha"])
        return ensemble(zs, ft, weight, state["t_zs"], state["t_ft"]), d, weight
    common.predict(args, fine_tuned, classnames, probabilities, ("d", "omega"))


if __name__ == "__main__":
    common.cli(main)
