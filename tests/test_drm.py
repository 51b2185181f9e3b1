"""drm.py against the paper's formulas in naive loops, FLYP written out, wrong description files."""
import contextlib
import copy
import importlib
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
from decimal import Decimal, localcontext
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import COLOURS, ROOT, TEXT, complaint, run, save_clip, write_tree
from PIL import Image

import common
import drm

NAMES = ["blue square", "green square", "red square"]
TOLD = {"red square": "a red patch", "blue square": "a blue patch",
        "green square": ["a green patch of five by five", "grass"]}
PROMPTS = [f"a photo of a {name}." for name in NAMES]
TEXTS = [TOLD[name] if isinstance(TOLD[name], list) else [TOLD[name]] for name in NAMES]
STEPS = ["--batch-size", 16, "--workers", 0, "--augment", "none", "--keep", "last"]


def here(script, *flags):
    """(results.json or None, what was printed) of a method run in this process, to be quick."""
    method, out = importlib.import_module(script.removesuffix(".py")), io.StringIO()
    silent = contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO())
    with silent[0], silent[1], pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        method.main()
    folder = [flags[i + 1] for i, f in enumerate(flags) if f == "--out"]
    return json.loads((folder[0] / "results.json").read_text()) if folder else None, out.getvalue()


def rows_of(results):
    return {row["name"]: row["tests"] for row in results["rows"]}


def log_of(path):
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def close(a, b, abs):
    """Whether two rows {test: {metric: value}} agree."""
    assert a.keys() == b.keys()
    for test in a:
        assert a[test] == pytest.approx(b[test], abs=abs), test
    return True


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_vit):
    """A tree with descriptions, and flags for it."""
    tree = write_tree(tmp_path_factory.mktemp("world") / "tree")
    # not the prompts of DRM's heads
    (tree / "templates.txt").write_text("art of the {} in my garden\n")
    (tree / "descriptions.json").write_text(json.dumps(TOLD))
    base = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit]
    return SimpleNamespace(tree=tree, model=tiny_vit, base=base)


def data_of(world, *flags):
    """Which images are trained on and held out; their pixels are read without it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["drm.py", *map(str, world.base), *flags])
        return common.load_data(drm.get_args())


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A short run of DRM, its rows and its folder."""
    out = tmp_path_factory.mktemp("trained") / "d"
    flags = [*STEPS, "--steps", 12, "--lr", 2e-3, "--baseline", "--alpha", 0.4]
    results, _ = here("drm.py", *world.base, *flags, "--out", out)
    return SimpleNamespace(out=out, rows=rows_of(results), results=results)


def text_features(clip, texts):
    """Unit features of all 77 positions."""
    with torch.no_grad():
        return F.normalize(clip.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts)), dim=-1)


def heads_by_hand(clip):
    df = text_features(clip, PROMPTS)
    cd = [text_features(clip, own).mean(dim=0) for own in TEXTS]
    return df, F.normalize(torch.stack(cd), dim=-1)


def split_by_hand(tree, split, preprocess):
    """(images, labels, files) of tree/split, through open_clip's own transform."""
    files = sorted((tree / split).rglob("*.jpg"))
    x = torch.stack([preprocess(Image.open(file).convert("RGB")) for file in files])
    return x, torch.tensor([NAMES.index(file.parent.name.replace("_", " "))
                            for file in files]), files


# ---- Equations ----

def brute_force_targets(A, labels, low, high, scale, tau):
    """Eq. (8), (9) as they are printed, xi = exp(A / tau) with as many digits as that needs."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 60, 10**9, -10**9
        rows = []
        for x, y in enumerate(labels):
            xi = (Decimal(A[x][y]) / Decimal(tau)).exp()
            least, most = ((Decimal(bound[y]) / Decimal(tau)).exp() for bound in (low, high))
            gamma = float((xi - least) / (most - least)) if most > least else 1.0
            others = [math.exp(scale * A[x][c]) if c != y else 0.0 for c in range(len(A[x]))]
            rest = (1 - gamma) / sum(others)
            rows.append([gamma if c == y else rest * others[c] for c in range(len(A[x]))])
        return rows


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-6)])
@pytest.mark.parametrize("tau", [1e-6, 1e-3, 1 / 11, 1.0, 1e6])
def test_targets_are_equations_8_and_9(tau, dtype, tolerance):
    rng = np.random.default_rng(0)
    labels = [0] * 9 + [1] * 7 + [2] * 2 + [3]  # many images of a class, two, one
    N, C, D, s = len(labels), 5, 8, 11.0        # class 4 has none
    f0, w = (torch.tensor(rng.normal(size=(n, D)) / 5) for n in (N, C))
    A = [[sum(float(f0[n, k]) * float(w[c, k]) for k in range(D)) for c in range(C)]
         for n in range(N)]
    A = torch.tensor(A, dtype=dtype).tolist()
    y = torch.tensor(labels)
    own = {c: [A[n][c] for n in range(N) if labels[n] == c] for c in range(4)}
    low, high = drm.affinity_extremes(f0, y, w)
    assert low[:4].tolist() == pytest.approx([min(own[c]) for c in range(4)], abs=1e-7)
    assert low[4] == math.inf
    assert high[:4].tolist() == pytest.approx([max(own[c]) for c in range(4)], abs=1e-7)
    assert high[4] == -math.inf

    low, high = ([f(own[c]) for c in range(4)] + [edge] for f,
                 edge in ((min, math.inf), (max, -math.inf)))
    bounds = [torch.tensor(b, dtype=dtype) for b in (low, high)]
    p_c = drm.core_targets(torch.tensor(A, dtype=dtype), y, *bounds, s, tau)
    assert p_c.dtype == dtype and p_c.isfinite().all() and p_c.min() >= 0 and p_c.max() <= 1
    assert np.abs(p_c.numpy() - brute_force_targets(A, labels, low, high, s,
                                                    tau)).max() <= tolerance
    assert (p_c.sum(1) - 1).abs().max() <= tolerance
    gamma = p_c.gather(1, y[:, None])[:, 0].tolist()
    # one image; two images
    assert gamma[-1] == 1 and sorted(gamma[16:18]) == [0, 1]
    # Section 4.2: in every class
    assert min(gamma[:9]) == 0 and max(gamma[:9]) == max(gamma[9:16]) == 1
    # images a little outside of the extremes: rounding
    for shift, want in ((1e-3, 1.0), (-1e-3, 0.0)):
        bound = high if want else low
        outside = torch.tensor([[b + shift if math.isfinite(b) else 0.0 for b in bound]] * 4,
                               dtype=dtype)
        p_c = drm.core_targets(outside, torch.arange(4), *bounds, s, tau)
        assert p_c.diagonal()[:3].tolist() == [want] * 3


def test_a_class_s_offset_spoils_direct_targets_but_not_equation_9():
    """Section 4.2: affinities that differ among classes for no reason of the image."""
    g, N, C, s = torch.Generator().manual_seed(0), 600, 10, 100.0
    y = torch.arange(N) % C
    f0 = torch.cat([(0.8 * torch.randn(N, C, generator=g) + 3.5 * F.one_hot(y, C)) / s,
                    torch.ones(N, 1)], 1)
    offsets = 1.9 * torch.randn(C, 1, generator=g) / s
    found = {}
    for name, last in (("plain", torch.zeros(C, 1)), ("offset", offsets)):
        w = torch.cat([torch.eye(C), last], 1)
        low, high = drm.affinity_extremes(f0, y, w)
        found[name] = drm.core_targets(f0 @ w.T, y, low, high, s), torch.softmax(s * f0 @ w.T, 1)
    right = {name: (direct.argmax(1) == y).double().mean().item() for name,
             (_, direct) in found.items()}
    assert right["plain"] > 0.9 and right["offset"] < right["plain"] - 0.2, right
    gamma = {name: paper.gather(1, y[:, None]) for name, (paper, _) in found.items()}
    # rounding of 1e-8 over a range of 0.03
    assert (gamma["plain"] - gamma["offset"]).abs().max() <= 1e-4
    a = f0[torch.arange(N), y].double() * 1.0
    for c in range(C):  # Eq. (8) of the affinities without the offset
        xi = a[y == c].exp()
        assert (gamma["offset"][y == c, 0] - (xi - xi.min()) /
                (xi.max() - xi.min())).abs().max() <= 1e-4


def test_losses_and_mixture_are_the_printed_sums():
    rng = np.random.default_rng(0)
    B, C, D, s, beta = 6, 4, 8, 7.0, 0.7
    f, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, B, D)))
    t[4] = t[1]  # two images of a class: the other's caption counts as wrong
    z = [[s * sum(f[i][k] * t[j][k] for k in range(D)) for j in range(B)] for i in range(B)]
    rows = [math.log(sum(math.exp(z[i][j]) for j in range(B))) - z[i][i] for i in range(B)]
    columns = [math.log(sum(math.exp(z[j][i]) for j in range(B))) - z[i][i] for i in range(B)]
    got = drm.contrastive_loss(torch.tensor(f), torch.tensor(t), s)
    assert got.item() == pytest.approx((sum(rows) / B + sum(columns) / B) / 2, rel=1e-12)
    theirs = open_clip.ClipLoss()(torch.tensor(f), torch.tensor(t), s)
    assert got.item() == pytest.approx(theirs.item(), rel=1e-12)
    assert sum(rows) != pytest.approx(sum(columns), rel=1e-2)

    df, cd = rng.normal(size=(2, B, C)) * 3
    p_c = rng.dirichlet(np.ones(C), size=B)
    p_df, p_cd = ([[math.exp(v) / sum(math.exp(u) for u in row) for v in row] for row in x]
                  for x in (df, cd))
    risk = sum(-p_c[i][c] * math.log(p_cd[i][c]) for i in range(B) for c in range(C)) / B
    got = drm.worst_case_risk(torch.tensor(cd), torch.tensor(p_c)).item()
    assert got == pytest.approx(risk, rel=1e-12)
    one = torch.eye(C).double()[[0] * B]
    risk = -sum(math.log(p[0]) for p in p_cd) / B
    assert drm.worst_case_risk(torch.tensor(cd), one).item() == pytest.approx(risk, rel=1e-12)
    p = drm.mixture(torch.tensor(df), torch.tensor(cd), beta)
    want = [[beta * p_df[i][c] + (1 - beta) * p_cd[i][c] for c in range(C)] for i in range(B)]
    assert np.abs(p.numpy() - want).max() <= 1e-12 and (p.sum(1) - 1).abs().max() <= 1e-12
    assert common.log_mixture(torch.tensor([[500.0, 0]]), torch.tensor([[500.0, 0]]),
                              beta).isfinite().all()


def two_headed(model, tune_text=True):
    """A DualPrompts with a list of texts for a class."""
    clip, tokenizer = open_clip.create_model(model).eval(), open_clip.get_tokenizer(model)
    df, cd = (drm.tokenize(texts, tokenizer, 77, "") for texts in (
        [[prompt] for prompt in PROMPTS], TEXTS))
    return clip, drm.DualPrompts(clip, df, cd, 3, tune_text)


def test_heads_are_the_normalised_means_of_unit_features(tiny_vit):
    clip, model = two_headed(tiny_vit)
    want = heads_by_hand(clip)
    for head, w in zip(model.eval().heads(), want):
        assert (head - w).abs().max() <= 1e-6
    some = model.head(model.cd, torch.tensor([0, 2]))
    assert (some - want[1][[0, 2]]).abs().max() <= 1e-6
    prompts = [lambda name: TOLD["green square"][0], lambda name: TOLD["green square"][1]]
    builder = open_clip.build_zero_shot_classifier(clip, open_clip.get_tokenizer(tiny_vit), ["x"],
                                                   prompts)
    assert (model.heads()[1][1] - builder[:, 0]).abs().max() <= 1e-6
    f, w_df, w_cd, s = model(torch.randn(2, 3, 32, 32), torch.tensor([2]))
    assert w_df.shape == (1, 32) and w_cd.shape == (3, 32)
    assert s.item() == pytest.approx(clip.logit_scale.exp().item())
    assert (f.norm(dim=1) - 1).abs().max() < 1e-5


@torch.no_grad()
def test_a_head_of_more_texts_than_are_encoded_at_once(tiny_vit):
    """600 texts of mixed lengths, of 290 classes: each class is the mean of its own texts."""
    clip = open_clip.create_model(tiny_vit).eval()
    torch.manual_seed(0)
    tokens = torch.zeros(600, 77, dtype=torch.long)
    for row, n in zip(tokens, torch.randint(1, 30, (600,)).tolist()):
        row[:n + 2] = torch.tensor([49406, *torch.randint(1, 49406, (n,)), 49407])
    owner = torch.cat([torch.arange(290), torch.randint(290, (310,))]).sort().values
    features = clip.encode_text(tokens, normalize=True)
    want = torch.stack([features[owner == c].mean(dim=0) for c in range(290)])
    want /= want.norm(dim=1, keepdim=True)
    for classes in (torch.arange(290), torch.arange(3, 290, 7)):
        got = drm.text_head(clip, drm.Texts(tokens, owner), classes)
        assert (got - want[classes]).abs().max() <= 1e-6


@pytest.mark.parametrize("erm", ["flyp", "ce"])
@pytest.mark.parametrize("targets", ["paper", "softmax", "onehot"])
def test_objective_is_equation_7(tiny_vit, erm, targets):
    _, model = two_headed(tiny_vit)
    torch.manual_seed(3)
    labels, images = torch.tensor([2, 0, 2, 2, 0, 1, 0]), torch.randn(7, 3, 32, 32)
    df, cd = heads_by_hand(open_clip.create_model(tiny_vit))
    F_0, s_0, lam, tau = F.normalize(torch.randn(7, 32), dim=1), 9.0, 3.0, 0.4
    index = torch.tensor([4, 0, 2])  # rows of F_0 go by index, not by place in the batch
    batch = common.Batch(images[index], labels[index], index, 0)
    A = (F_0 @ cd.T).tolist()
    own = [[A[n][c] for n in range(7) if labels[n] == c] for c in range(3)]
    low, high = [min(a) for a in own], [max(a) for a in own]
    p_c = {"paper": brute_force_targets(A, labels.tolist(), low, high, s_0, tau),
           "softmax": torch.softmax(s_0 * F_0 @ cd.T, 1).tolist(),
           "onehot": F.one_hot(labels, 3).tolist()}[targets]
    with torch.no_grad():
        f, s = F.normalize(model.clip.visual(images[index]), dim=-1), model.clip.logit_scale.exp()
        log_p = F.log_softmax(s * f @ cd.T, 1)
        worst = [p_c[n][c] * log_p[i, c].item() for i, n in enumerate(index.tolist())
                 for c in range(3)]
        worst = -sum(worst) / 3
        risk = F.cross_entropy(s * f @ df.T, labels[index])
        if erm == "flyp":
            risk = open_clip.ClipLoss()(f, df[labels[index]], s)
    for value in (lam, 0):
        loss_fn = drm.make_loss(value, F_0, labels, cd, s_0, targets, tau, erm)
        loss, parts = loss_fn(model.train(), batch)
        assert parts["erm"].item() == pytest.approx(risk.item(), abs=1e-5)
        assert loss.item() == pytest.approx(risk.item() + value * worst, abs=2e-5)
        assert parts.keys() == ({"erm", "wrm"} if value else {"erm"})
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, "ranks would wait for these"


# ---- Training ----

def test_lambda_0_is_flyp_step_for_step(world, tmp_path):
    """FLYP written out: all parameters, 77 positions, open_clip's ClipLoss, AdamW, cosine."""
    steps, B, lr, wd = 14, 16, 3e-4, 0.3
    out = tmp_path / "r"
    here("drm.py", *world.base, *STEPS, "--lam", 0, "--steps", steps, "--batch-size", B, "--lr",
         lr, "--wd", wd, "--warmup", 3, "--out", out)
    train = data_of(world).train  # which 54 of the 60 images
    files, labels = [os.fsdecode(file) for file in train.images], train.labels
    assert len(files) == 54 < steps * B / 2  # more than two epochs

    clip, _, preprocess = open_clip.create_model_and_transforms(world.model)
    start = copy.deepcopy(clip.state_dict())
    captions = open_clip.get_tokenizer(world.model)(PROMPTS)
    assert captions.shape == (3, 77)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, weight_decay=wd)
    loss_fn, losses = open_clip.ClipLoss(), []
    order = np.concatenate([np.random.default_rng([0, epoch]).permutation(54)
                            for epoch in range(6)])
    clip.train()
    for step in range(steps):
        done = (step - 3) / (steps - 3)
        factor = (step + 1) / 3 if step < 3 else (1 + math.cos(math.pi * done)) / 2
        optimizer.param_groups[0]["lr"] = lr * factor
        chosen = order[step * B:(step + 1) * B]
        x = torch.stack([preprocess(Image.open(files[i]).convert("RGB")) for i in chosen])
        loss = loss_fn(*clip(x, captions[labels[chosen]]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    log = log_of(out)
    assert len(log) == steps
    assert np.abs(np.array([line["loss"] for line in log]) - losses).max() <= 1e-5
    assert losses[0] - losses[-1] > 1e-2
    saved, want = common.load_tensors(out / "open_clip_model.safetensors")[0], clip.state_dict()
    described = open_clip.get_tokenizer(world.model)(sum(TEXTS, []))
    used = torch.cat([captions, described]).unique()
    rows = "token_embedding.weight"
    assert (saved[rows][used] - want[rows][used]).abs().max() <= 1e-5
    # [0] is padding, which has no gradient
    moved = (saved[rows] - start[rows])[captions.unique()[1:]]
    assert moved.abs().amax(dim=1).min() > 1e-3
    rest = torch.ones(len(want[rows]), dtype=torch.bool)
    rest[used] = False
    # deviation 2: there, weight decay shrinks them
    assert torch.equal(saved[rows][rest], start[rows][rest])
    assert want[rows][rest].norm() < start[rows][rest].norm() * (1 - 1e-4)
    for name in want:
        # whose gradient is rounding for the keys
        if name != rows and not name.endswith("in_proj_bias"):
            assert (saved[name] - want[name]).abs().max() <= 1e-5, name
    assert saved["logit_scale"] != start["logit_scale"]


def test_parts_of_a_step_are_contrastive_batches_of_their_own(world, tmp_path):
    """Deviation 3. All else of the first step is that of one part."""
    for parts in (1, 2):
        here("drm.py", *world.base, *STEPS, "--steps", 1, "--no-baseline", "--accum", parts,
             "--out",
             tmp_path / str(parts))
    one, two = (log_of(tmp_path / str(parts))[0] for parts in (1, 2))
    assert one["wrm"] == pytest.approx(two["wrm"], abs=1e-5)
    train = data_of(world).train
    clip, _, preprocess = open_clip.create_model_and_transforms(world.model)
    chosen = np.random.default_rng([0, 0]).permutation(len(train))[:16]
    x = torch.stack([preprocess(Image.open(os.fsdecode(train.images[i])).convert("RGB"))
                     for i in chosen])
    with torch.no_grad():
        f, s = clip.encode_image(x, normalize=True), clip.logit_scale.exp()
        t = heads_by_hand(clip)[0][train.labels[chosen]]
        halves = [open_clip.ClipLoss()(f[i:i + 8], t[i:i + 8], s).item() for i in (0, 8)]
        whole = open_clip.ClipLoss()(f, t, s).item()
    assert one["erm"] == pytest.approx(whole, abs=1e-5)
    assert two["erm"] == pytest.approx(sum(halves) / 2, abs=1e-5)
    assert one["erm"] - two["erm"] > 0.3


WORKER = """
import sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import common, drm
from test_drm import gradients

def main():
    torch.set_num_threads(1)
    found = gradients({model!r}, common.RANK, common.WORLD)
    if common.RANK == 0:
        torch.save(found, {out!r} + "/gradients.pt")
    for flags in {runs!r}:
        sys.argv = ["drm.py", *flags]
        drm.main()
common.cli(main)
"""


def gradients(model, rank, world):
    """Gradients of Eq. (7) of 12 images, of which this rank has its share."""
    _, dual = two_headed(model)
    torch.manual_seed(0)
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
    F_0 = F.normalize(torch.randn(12, 32), dim=1)
    mine = torch.arange(12).chunk(world)[rank]
    loss_fn = drm.make_loss(2.0, F_0, labels, heads_by_hand(open_clip.create_model(model))[1], 9.0)
    dual.train()
    runner = torch.nn.parallel.DistributedDataParallel(dual) if world > 1 else dual
    loss, _ = loss_fn(runner, common.Batch(images[mine], labels[mine], mine, 0))
    loss.backward()
    return {name: p.grad for name, p in dual.named_parameters() if p.grad is not None}


def test_two_ranks_are_one_process(world, tmp_path):
    """Losses, weights, every gradient, temperature included; CLIPs with a logit_bias train too."""
    vision = dict(image_size=32, patch_size=16, width=32, head_width=16, layers=1)
    config = dict(embed_dim=16, vision_cfg=vision, text_cfg=TEXT, init_logit_bias=-10.0)
    biased = save_clip(tmp_path / "biased", config)
    flags = [*world.base, "--steps", 20, "--batch-size", 12, "--lr", 1e-4, "--grad-clip", 2,
             "--lam", 2,
             "--workers", 0, "--no-baseline"]
    runs = [[*flags, "--out", tmp_path / "two"],
            [*world.base[:4], "--model", biased, *STEPS, "--steps", 3, "--no-baseline", "--out",
             tmp_path / "biased-run"]]
    runs = [[str(flag) for flag in run] for run in runs]
    code = WORKER.format(root=str(ROOT), model=world.model, out=str(tmp_path), runs=runs)
    (tmp_path / "worker.py").write_text(code)
    port = str(random.randint(20_000, 60_000))
    workers = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                                "--master_port", port, str(tmp_path / "worker.py")],
                               stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    here("drm.py", *flags, "--out", tmp_path / "one")
    want = gradients(world.model, 0, 1)
    _, stderr = workers.communicate(timeout=300)
    assert workers.returncode == 0, stderr[-3000:]

    got = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert got.keys() == want.keys() and want["clip.logit_scale"].abs() > 1e-3
    assert got["clip.logit_scale"].item() == pytest.approx(want["clip.logit_scale"].item(),
                                                           rel=1e-5)
    for name in want:
        assert (got[name] - want[name]).abs().max() <= 1e-6 + 1e-5 * want[name].abs().max(), name
    one, two = (log_of(tmp_path / run) for run in ("one", "two"))
    assert len(one) == len(two) == 20
    for name in ("loss", "erm", "wrm"):
        assert np.abs(np.array([a[name] - b[name] for a, b in zip(one, two)])).max() <= 1e-5, name
    assert one[0]["loss"] - one[-1]["loss"] > 1e-2
    assert [a.get("held_out_acc") for a in one] == [b.get("held_out_acc") for b in two]
    rows = [rows_of(json.loads((tmp_path / run / "results.json").read_text()))
            for run in ("one", "two")]
    assert all(close(rows[0][name], rows[1][name], 1e-3) for name in rows[0])
    assert len(log_of(tmp_path / "biased-run")) == 3
    saved = common.load_tensors(tmp_path / "biased-run" / "open_clip_model.safetensors")[0]
    assert saved["logit_bias"].item() == -10  # softmax does not see it


def test_the_epoch_that_is_best_held_out_is_kept(world, tmp_path, monkeypatch):
    """Early stopping measures the mixture; accuracies that decide are made up: 90% comes twice."""
    real, made_up, seen = common.held_out_accuracy, [10, 50, 90, 90, 20, 89, 33], []

    def measured(model, held_out, predict, setup):
        accuracy = real(model, held_out, predict, setup)
        x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            seen.append((accuracy, copy.deepcopy(model.state_dict()), predict(model.eval(), x)))
        model.train()
        return made_up[len(seen) - 1]
    monkeypatch.setattr(common, "held_out_accuracy", measured)
    flags = ["--epochs", 7, "--lr", 1e-3, "--warmup", 13, "--batch-size", 18, "--augment", "none",
             "--workers", 0, "--holdout", 0.4, "--no-baseline", "--beta", 0.3]
    here("drm.py", *world.base, *flags, "--out", tmp_path / "r")
    log = [line for line in log_of(tmp_path / "r") if "held_out_acc" in line]
    assert [(line["epoch"], line["held_out_acc"]) for line in log] == list(enumerate(made_up, 1))
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'r'}")
    accuracy, weights, predicted = seen[2]  # of equals the first
    visual = {name: value for name, value in clip.state_dict().items()
              if name.startswith("visual.")}
    assert all(torch.equal(value, weights[f"clip.{name}"]) for name, value in visual.items())
    assert clip.logit_scale == weights["clip.logit_scale"] != seen[3][1]["clip.logit_scale"]
    data = data_of(world, "--holdout", "0.4")
    assert len(data.val) == 24
    x = torch.stack([preprocess(Image.open(os.fsdecode(file)).convert("RGB"))
                     for file in data.val.images])
    noise = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for images, want in ((x, accuracy), (noise, None)):
        with torch.no_grad():
            f, s = clip.eval().encode_image(images, normalize=True), clip.logit_scale.exp()
        df, cd = (torch.softmax(s * f @ w.T, 1) for w in heads_by_hand(clip))
        p = 0.3 * df + 0.7 * cd
        if want is not None:
            right = (p.argmax(1) == data.val.labels).double().mean().item()
            assert 100 * right == pytest.approx(want)
        else:
            assert (predicted.softmax(1) - p).abs().max() <= 1e-5 < 1e-3 < (df - cd).abs().max()
    nothing = ["--holdout", 0, "--keep", "best", "--out", tmp_path / "none"]
    assert "raise --holdout" in complaint("drm.py", *world.base, *nothing)
    assert not (tmp_path / "none").exists()


# ---- Saved runs ----

def test_rows_are_those_of_the_saved_folder_and_of_the_average_by_hand(world, trained):
    models = ["zero-shot", "ERM", "DRM", "DRM + WiSE 0.4"]
    assert list(trained.rows) == [f"{m} {h}" for m in models for h in ("df", "cd", "mixture")]
    clips = {"zero-shot": open_clip.create_model(world.model).eval()}
    for name, folder in (("DRM", trained.out), ("ERM", trained.out / "erm")):
        clips[name], _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        clips[name].eval()
    start, tuned = (clips[name].state_dict() for name in ("zero-shot", "DRM"))
    between = open_clip.create_model(world.model).eval()
    between.load_state_dict({name: 0.6 * start[name] + 0.4 * tuned[name] for name in start})
    clips["DRM + WiSE 0.4"] = between  # both towers and the temperature; heads are made anew
    data = {name: split_by_hand(world.tree, split, preprocess)
            for name, split in (("test", "test"), ("dark", "shifts/dark"))}
    for name, clip in clips.items():
        heads = heads_by_hand(clip)
        for test, (x, y, _) in data.items():
            with torch.no_grad():
                f, s = clip.encode_image(x, normalize=True), clip.logit_scale.exp()
            df, cd = (torch.softmax((s * f @ w.T).double(), 1) for w in heads)
            for head, p in (("df", df), ("cd", cd), ("mixture", (df + cd) / 2)):
                row = trained.rows[f"{name} {head}"][test]
                accuracy, nll = (p.argmax(1) == y).double().mean(), -p[range(len(y)),
                                                                       y].log().mean()
                assert row["acc"] == pytest.approx(100 * accuracy.item()), (name, head, test)
                assert row["nll"] == pytest.approx(nll.item(), abs=1e-4), (name, head, test)
    losses = {row["test"]["nll"] for row in trained.rows.values()}
    assert len(losses) == 12 and max(losses) - min(losses) > 0.01

    head, about = common.load_tensors(trained.out / "head.safetensors")
    assert about["classnames"] == NAMES
    df, cd = heads_by_hand(clips["DRM"])
    assert (head["head"] - df).abs().max() <= 1e-5 and (head["head_cd"] - cd).abs().max() <= 1e-5
    assert (head["head_0"] - heads_by_hand(clips["zero-shot"])[0]).abs().max() <= 1e-5
    assert (head["head"] - head["head_0"]).abs().max() > 1e-3
    assert head["scale"].item() == pytest.approx(tuned["logit_scale"].exp().item(), rel=1e-6)
    assert tuned["logit_scale"] != start["logit_scale"]
    table = "token_embedding.weight"
    rows = (tuned[table] != start[table]).any(dim=1).nonzero()[:, 0]
    tokens = open_clip.get_tokenizer(world.model)(PROMPTS + sum(TEXTS, []))
    assert set(rows.tolist()) == set(tokens.unique().tolist())  # others keep theta_0


def test_a_finished_run_gives_its_rows_to_every_method(world, trained, tmp_path):
    again, _ = here("drm.py", "--finetuned", trained.out, "--alpha", 0.4, "--out",
                    tmp_path / "again")
    rows = rows_of(again)
    assert list(rows) == [name for name in trained.rows if not name.startswith("ERM")]
    assert all(close(rows[name], trained.rows[name], 1e-4) for name in rows)
    wise, _ = here("wise_ft.py", "--finetuned", trained.out, "--alphas", 0, 0.5, 1, "--out",
                   tmp_path / "wise")
    found = wise["rows"]
    assert close(found[0]["tests"], trained.rows["zero-shot df"], 1e-4)
    assert close(found[-1]["tests"], trained.rows["DRM df"], 1e-4)
    vrf, _ = here("vrf.py", "--finetuned", trained.out, "--k", 1, "--no-calibrate", "--workers", 0,
                  "--out",
                  tmp_path / "vrf")
    found = rows_of(vrf)
    assert close(found["zero-shot"], trained.rows["zero-shot df"], 1e-4)
    assert close(found["fine-tuned"], trained.rows["DRM df"], 1e-4)
    # as if tuned elsewhere: without heads
    other = open_clip.create_model(f"local-dir:{trained.out}")
    (tmp_path / "foreign").mkdir()
    common.save_tensors(tmp_path / "foreign" / "open_clip_model.safetensors", other.state_dict())
    shutil.copy(trained.out / "open_clip_config.json", tmp_path / "foreign")
    foreign, _ = here("drm.py", *world.base, "--finetuned", tmp_path / "foreign", "--out",
                      tmp_path / "f")
    assert close(rows_of(foreign)["DRM mixture"], trained.rows["DRM mixture"], 1e-4)

    shutil.copytree(trained.out, tmp_path / "other")  # as another method would have left it
    tensors, about = common.load_tensors(tmp_path / "other" / "head.safetensors")
    tensors.pop("head_cd")
    common.save_tensors(tmp_path / "other" / "head.safetensors", tensors, about)
    for more in (["--out", tmp_path / "new"], ["--predict", world.tree / "test"]):
        assert "not a run of drm.py" in complaint("drm.py", "--finetuned", tmp_path / "other",
                                                  *more)
    assert not (tmp_path / "new").exists()


def test_predictions_are_the_mixture_of_the_run(world, tmp_path):
    out = tmp_path / "r"
    flags = [*world.base, *STEPS, "--steps", 6, "--lr", 1e-3, "--lam", 3, "--no-baseline"]
    results, _ = here("drm.py", *flags, "--out", out)
    assert results["args"]["beta"] == 0.25  # Section 4.3: 1 / (1 + lambda)
    _, printed = here("drm.py", "--finetuned", out, "--predict", world.tree / "test", "--workers",
                      0)
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    x, y, files = split_by_hand(world.tree, "test", preprocess)
    with torch.no_grad():
        f, s = clip.eval().encode_image(x, normalize=True), clip.logit_scale.exp()
    df, cd = (torch.softmax(s * f @ w.T, 1) for w in heads_by_hand(clip))
    p = 0.25 * df + 0.75 * cd
    lines = [line.split("\t") for line in printed.splitlines()]
    got = {path: (name, float(value)) for path, name, value in lines}
    assert got.keys() == {str(file) for file in files}
    for file, row in zip(files, p):
        name, value = got[str(file)]
        assert value == pytest.approx(row.max().item(), abs=1e-4)
        assert row[NAMES.index(name)] >= row.max() - 1e-4
    # another weight would be seen
    assert (p.amax(1) - (df / 2 + cd / 2).amax(1)).abs().max() > 1e-3
    right = 100 * (p.argmax(1) == y).double().mean().item()
    assert rows_of(results)["DRM mixture"]["test"]["acc"] == pytest.approx(right)


def test_a_run_with_another_lambda_gives_its_mixture_again(world, tmp_path):
    out = tmp_path / "r"
    flags = [*world.base, *STEPS, "--steps", 2, "--lr", 1e-3, "--lam", 3, "--no-baseline"]
    results, _ = here("drm.py", *flags, "--out", out)
    again, _ = here("drm.py", "--finetuned", out, "--out", tmp_path / "again")
    assert close(rows_of(again)["DRM mixture"], rows_of(results)["DRM mixture"], 1e-4)
    assert (again["args"]["lam"], again["args"]["beta"]) == (3, 0.25)
    other, _ = here("drm.py", "--finetuned", out, "--beta", 1, "--out", tmp_path / "other")
    assert other["args"]["beta"] == 1  # a flag that is given counts
    assert close(rows_of(other)["DRM mixture"], rows_of(results)["DRM df"], 1e-4)


def test_variants_run_and_differ(world, trained, tmp_path):
    flags = [*world.base, *STEPS, "--steps", 12, "--lr", 2e-3, "--no-baseline"]
    found = {"paper": [line["loss"] for line in log_of(trained.out)]}
    for name, more in (("softmax", ["--targets", "softmax"]), ("onehot", ["--targets", "onehot"]),
                       ("ce", ["--erm", "ce"]),
                       ("tau", ["--tau", 1e-3]), ("frozen", ["--no-tune-text"])):
        here("drm.py", *flags, *more, "--alpha", 1, "--out", tmp_path / name)
        found[name] = [line["loss"] for line in log_of(tmp_path / name)]
    first = {name: losses[0] for name, losses in found.items()}
    # the same objective, fewer parameters
    assert first["frozen"] == pytest.approx(first["paper"], abs=1e-5)
    names = [name for name in found if name != "frozen"]
    assert all(abs(first[a] - first[b]) > 1e-3 for a in names for b in names if a < b), first
    assert abs(found["frozen"][-1] - found["paper"][-1]) > 1e-3
    start = open_clip.create_model(world.model).state_dict()
    for name in ("frozen", "ce"):
        saved = open_clip.create_model(f"local-dir:{tmp_path / name}").state_dict()
        changed = {key for key in saved if not torch.equal(saved[key], start[key])}
        assert any(key.startswith("visual.") for key in changed)
        assert all(key.startswith("visual.") for key in changed) == (name == "frozen"), name
        rows = rows_of(json.loads((tmp_path / name / "results.json").read_text()))
        # alpha: weight of the fine-tuned
        assert close(rows["DRM + WiSE 1 cd"], rows["DRM cd"], 1e-4)


# ---- Descriptions ----

def test_descriptions_join_by_name_index_or_position(capsys):
    names = ["ant", "bee", "cow"]

    def join(pairs, names=names, other=None):
        return drm.descriptions(pairs, names, "f.json", other)
    assert join([("cow", "C"), ("ant", "A"), ("bee", ["B1", "B2"])]) == [["A"], ["B1", "B2"], ["C"]]
    upper = [("Cow", "C"), ("ANT", "A"), ("bee", "B")]
    assert join(upper, ["Ant", "Bee", "cow"]) == [["A"], ["B"], ["C"]]
    assert join([("2", "C"), ("0", "A"), ("1", "B")]) == [["A"], ["B"], ["C"]]
    # classes named by numbers, in the order of folders: 0, 1, 10, 11
    numbers = sorted(map(str, range(12)))
    assert join([(str(i), f"text of {i}") for i in range(12)],
                numbers) == [[f"text of {n}"] for n in numbers]
    assert capsys.readouterr() == ("", "")

    twice = [f"n{i}" for i in range(18)] + ["missile", "missile"]
    raw = [(n, f"text {i}") for i, n in enumerate(twice)]
    assert join(raw, twice) == [[f"text {i}"] for i in range(20)]
    assert "differ: none" in "".join(capsys.readouterr())
    raw[18] = ("projectile", "text 18")  # as in the released ImageNet file
    assert join(raw, twice)[18:] == [["text 18"], ["text 19"]]
    assert "'projectile' for 'missile'" in "".join(capsys.readouterr())
    with pytest.raises(common.Fail, match="20 of 20 keys"):
        join(list(reversed(raw)), twice)
    index = [(str(i), f"text {i}") for i in reversed(range(20))]
    assert join(index, twice)[18:] == [["text 18"], ["text 19"]]


def test_descriptions_by_latin_name_in_another_case(capsys):
    """Like result_cd_iwildcam.json: 178 names for 182 classes, Latin keys, one typo."""
    english = [f"animal {i}" for i in range(178)] + ["animal 0", "animal 1", "animal 1", "animal 2"]
    latin = [f"genus species{i}" for i in range(182)]
    keys = ["Genus species%d" % i for i in range(182)]
    keys[77] = "Genus species77b"
    raw = [(key, f"text {i}") for i, key in enumerate(keys)]
    assert drm.descriptions(raw, english, "f.json", latin) == [[f"text {i}"] for i in range(182)]
    assert "differ: 'genus species77b' for 'animal 77'" in "".join(capsys.readouterr())
    mixed = [(english[i] if i % 2 else key, text) for i, (key, text) in enumerate(raw)]
    assert drm.descriptions(mixed, english, "f.json", latin)[181] == ["text 181"]
    with pytest.raises(common.Fail, match="182 of 182 keys"):
        drm.descriptions(raw, english, "f.json")
    with pytest.raises(common.Fail, match="keys are not the class at their position"):
        drm.descriptions(raw[1:] + raw[:1], english, "f.json", latin)
    index = [(str(i), f"text {i}") for i in reversed(range(182))]  # prompts/iwildcam_cd.json
    assert drm.descriptions(index, english, "f.json", latin) == [[f"text {i}"] for i in range(182)]


@pytest.mark.parametrize("bad, words", [
    ([("ant", "A")], "1 descriptions for 3"),
    ([("ant", "A"), ("bee", "B"), ("cat", "C")], "no description of class 'cow'"),
    ([("ant", "A"), ("bee", 7), ("cow", "C")], "'bee' is not a text"),
    ([("ant", "A"), ("bee", " "), ("cow", "C")], "'bee'"),
    ([("ant", "A"), ("bee", []), ("cow", "C")], "'bee'"),
    ([("ant", "A"), ("bee", ["B", 1]), ("cow", "C")], "'bee'"),
    ([("ant", "A"), ("bee", None), ("cow", "C")], "'bee'"),
    ([("ant", "A"), ("bee", [("x", "B")]), ("cow", "C")], "'bee'"),
    ([("1", "A"), ("2", "B"), ("3", "C")], "'ant'"),
    ([("ant", "A"), ("ant", "B"), ("cow", "C")], "1 of 3 keys"),
    (["A", "B", "C"], "JSON object"), ("A", "JSON object"), (None, "JSON object"),
    (3, "JSON object")])
def test_wrong_descriptions_are_refused(bad, words):
    with pytest.raises(common.Fail, match=words) as error:
        drm.descriptions(bad, ["ant", "bee", "cow"], "f.json")
    assert str(error.value).startswith("f.json")


def test_a_text_of_77_tokens_is_taken_and_one_of_78_refused():
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    texts = drm.tokenize([["so " * 75], ["a", "b"]], tokenizer, 77, "f.json")
    assert texts.tokens.shape == (3, 77) and texts.owner.tolist() == [0, 1, 1]
    assert texts.tokens[0, 76] == 49407
    with pytest.raises(common.Fail, match="f.json: longer than the 77 tokens.*'so so"):
        drm.tokenize([["so " * 76], ["a"]], tokenizer, 77, "f.json")


def test_bad_description_files_are_one_line(tmp_path, tree, tiny_vit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--out", "new"]
    assert "--descriptions FILE.json" in complaint("drm.py", *base)
    good = {"red square": "a", "green square": "b", "blue square": "c"}
    for content, words in (("{", "not valid JSON"), ("[1, 2]", "JSON object"),
                           (json.dumps({"red square": "a"}), "1 descriptions"),
                           (json.dumps({**good, "red square": 3}), "'red square'"),
                           (json.dumps({**TOLD, "red": TOLD["red square"]}),
                            "4 descriptions for 3"),
                           (json.dumps({"red": "a", "green square": "b", "blue square": "c"}),
                            "red square"),
                           (json.dumps({**good, "red square": "very " * 100}), "77 tokens")):
        (tmp_path / "d.json").write_text(content)
        message = complaint("drm.py", *base, "--descriptions", "d.json")
        assert words in message and "d.json" in message, message
    (tree / "descriptions.json").write_text(json.dumps({**good, "red square": "very " * 100}))
    assert "descriptions.json: longer than" in complaint("drm.py", *base)
    assert "not found" in complaint("drm.py", *base, "--descriptions", "nowhere.json")
    for prompt in ("a photo", "a {} or {}"):
        assert "--prompt" in complaint("drm.py", *base, "--prompt", prompt)
    for flag, value in (("--lam", -1), ("--beta", 1.5), ("--tau", 0), ("--alpha", 2),
                        ("--targets", "minmax"),
                        ("--erm", "kl")):
        assert flag in complaint("drm.py", *base, flag, value)
    assert not (tmp_path / "new").exists()


def test_print_prompt_names_the_classes_in_the_accepted_format(tree):
    _, text = here("drm.py", "--data", "folder", "--data-dir", tree, "--print-prompt")
    names = json.loads(text[text.index("["):])
    assert names == NAMES and "JSON object" in text
    for asked in ("shape", "background", "Leave out the class name"):  # Appendix C: the thing alone
        assert asked in text
    assert drm.descriptions([(n, "x") for n in names], names, "") == [["x"]] * 3


def test_recipes_are_those_of_appendix_f():
    for data, (epochs, wd, prompt) in {"imagenet": (10, 0.1, "a good photo of the {}."),
                                       "iwildcam": (20, 0.2, "a photo of {}."),
                                       "fmow": (20, 0.2, "satellite photo of a {}.")}.items():
        recipe = drm.RECIPES[data]
        assert (recipe["epochs"], recipe["wd"], recipe["prompt"]) == (epochs, wd, prompt)
        assert (recipe["batch_size"], recipe["lr"], recipe["warmup"]) == (256, 1e-5, 500)
        assert recipe["grad_clip"] == 0
        assert recipe["augment"] == "crop" and recipe["keep"] == "best"


def test_the_method_runs_from_the_command_line(world, tmp_path):
    results = run("drm.py", *world.base, *STEPS, "--steps", 2, "--lam", 4, "--baseline", "--out",
                  "d",
                  cwd=tmp_path)
    assert results["args"]["beta"] == 0.2
    assert set(rows_of(results)["DRM mixture"]) == {"test", "dark"} and len(COLOURS) == 3
