"""drm.py against the paper's formulas in naive loops, FLYP written out, wrong description files."""
import copy
import json
import math
import os
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
from PIL import Image
from safetensors.torch import load_file

import common
import drm
from tests.conftest import (
    NAMES,
    RANKS,
    ROOT,
    TEXT,
    args_of,
    complaint,
    data_flags,
    here,
    log_of,
    printed,
    results_of,
    rows_of,
    run,
    save_clip,
    write_tree,
)

TOLD = {"red square": "a red patch", "blue square": "a blue patch",
        "green square": ["a green patch of five by five", "grass"]}
PROMPTS = [f"a photo of a {name}." for name in NAMES]
TEXTS = [["a blue patch"], TOLD["green square"], ["a red patch"]]
TOKENIZER = open_clip.get_tokenizer("ViT-B-32")
CLASSES, INDICES = [f"class {i}" for i in range(12)], [str(i) for i in range(12)]
FOLDERS = sorted(INDICES)  # 0, 1, 10, 11, 2, ...
STEPS = ["--batch-size", 16, "--augment", "none", "--keep", "last"]


def rows(out, *flags, script="drm.py"):
    """{row: {test: metrics}} of the run in `out`; flags: it is made first."""
    return rows_of(here(script, *flags, "--out", out) if flags else results_of(out))


def same(a, b, abs=1e-4):
    """Whether two rows {test: {metric: value}} agree."""
    return a.keys() == b.keys() and all(
        a[test][m] == pytest.approx(b[test][m], abs=abs) for test in a for m in a[test])


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_vit):
    """A tree, flags for it, its images, and a short run with its rows."""
    tree = write_tree(tmp_path_factory.mktemp("world") / "tree")
    (tree / "templates.txt").write_text("art of the {} in my garden\n")  # not DRM's prompts
    (tree / "descriptions.json").write_text(json.dumps(TOLD))
    base, out = data_flags(tree, tiny_vit), tree.parent / "run"
    found = rows(out, *base, *STEPS, "--steps", 12, "--lr", 2e-3, "--baseline", "--alpha", 0.4)
    return SimpleNamespace(tree=tree, model=tiny_vit, base=base, out=out, rows=found,
                           data=common.load_data(args_of("drm.py", *base)))


@torch.no_grad()
def heads_by_hand(clip):
    """W_df, W_cd (C, D), from all 77 positions."""
    df, *cd = [clip.encode_text(TOKENIZER(own), normalize=True) for own in (PROMPTS, *TEXTS)]
    return df, F.normalize(torch.stack([own.mean(dim=0) for own in cd]), dim=1)


@torch.no_grad()
def both_heads(clip, x):
    """Eq. (5): p_df, p_cd (B, C) in float64."""
    f, s = clip.encode_image(x, normalize=True), clip.logit_scale.exp()
    return [torch.softmax((s * f @ w.T).double(), 1) for w in heads_by_hand(clip)]


def load(name):
    """(CLIP in eval mode, function that reads files) of a local-dir:, by open_clip alone."""
    clip, _, preprocess = open_clip.create_model_and_transforms(name)
    return clip.eval(), lambda files: torch.stack(
        [preprocess(Image.open(os.fsdecode(file)).convert("RGB")) for file in files])


def brute_force_targets(A, labels, low, high, scale, tau):
    """Eq. (8), (9) as they are printed, xi = exp(A / tau) with as many digits as that needs."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 60, 10**9, -10**9
        p_c = []
        for x, y in enumerate(labels):
            a = A[x][y], low[y], high[y]
            xi, least, most = ((Decimal(value) / Decimal(tau)).exp() for value in a)
            gamma = float((xi - least) / (most - least)) if most > least else 1.0
            others = [math.exp(scale * a) if c != y else 0.0 for c, a in enumerate(A[x])]
            p_c.append([(1 - gamma) * other / sum(others) for other in others])
            p_c[x][y] = gamma
        return p_c


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-6)])
@pytest.mark.parametrize("tau", [1e-6, 1e-3, 1 / 11, 1.0, 1e6])
def test_targets_are_equations_8_and_9(tau, dtype, tolerance):
    rng, s, C = np.random.default_rng(0), 11.0, 5
    labels = [0] * 9 + [1] * 7 + [2] * 2 + [3]  # many images of a class, two, one; of 4 none
    y = torch.tensor(labels)
    f0, w = (torch.tensor(rng.normal(size=(n, 8)) / 5) for n in (len(y), C))
    A = (f0 @ w.T).to(dtype)
    own = [[A[n, c].item() for n in range(len(y)) if labels[n] == c] for c in range(4)]
    bounds = [[*map(min, own), math.inf], [*map(max, own), -math.inf]]
    for got, want in zip(drm.affinity_extremes(f0, y, w), bounds):
        assert got.tolist() == pytest.approx(want, abs=1e-7)
    low, high = (torch.tensor(b, dtype=dtype) for b in bounds)
    p_c = drm.core_targets(A, y, low, high, s, tau)
    assert p_c.dtype == dtype and p_c.isfinite().all() and p_c.min() >= 0 and p_c.max() <= 1
    want = brute_force_targets(A.tolist(), labels, *bounds, s, tau)
    # At a large tau doubles of xi are near 1 and near each other.
    assert np.abs(p_c.numpy() - want).max() <= max(tolerance, 1e-15 * tau)
    assert (p_c.sum(1) - 1).abs().max() <= tolerance
    gamma = p_c.gather(1, y[:, None])[:, 0].tolist()
    assert gamma[-1] == 1 and sorted(gamma[16:18]) == [0, 1]  # one image; two images
    # Section 4.2: in every class
    assert min(gamma[:9]) == 0 and max(gamma[:9]) == max(gamma[9:16]) == 1
    for outside, want in ((high[:3] + 1e-3, 1.0), (low[:3] - 1e-3, 0.0)):  # a little, by rounding
        p_c = drm.core_targets(outside[:, None].expand(3, C), torch.arange(3), low, high, s, tau)
        assert p_c.diagonal().tolist() == [want] * 3


def test_a_class_s_offset_spoils_direct_targets_but_not_equation_9():
    """Section 4.2: affinities that differ among classes for no reason of the image."""
    g, C, s = torch.Generator().manual_seed(0), 10, 100.0
    y = torch.arange(600) % C
    f0 = (0.8 * torch.randn(600, C, generator=g) + 3.5 * F.one_hot(y, C)) / s
    f0, right = torch.cat([f0, torch.ones(600, 1)], 1), []
    for offset in (torch.zeros(C, 1), 1.9 * torch.randn(C, 1, generator=g) / s):
        w = torch.cat([torch.eye(C), offset], 1)
        p_c = drm.core_targets(f0 @ w.T, y, *drm.affinity_extremes(f0, y, w), s)
        for c in range(C):  # Eq. (8) of the affinities without the offset
            xi = f0[y == c, c].double().exp()
            gamma = (xi - xi.min()) / (xi.max() - xi.min())
            assert (p_c[y == c, c] - gamma).abs().max() <= 1e-4  # rounding of 1e-8 over 0.03
        right.append(((f0 @ w.T).argmax(1) == y).double().mean().item())
    assert right[0] > 0.9 and right[1] < right[0] - 0.2, right


def test_losses_and_mixture_are_the_printed_sums():
    rng, s, beta = np.random.default_rng(0), 7.0, 0.7
    f, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 6, 8)))
    logits = rng.normal(size=(2, 6, 4)) * 3
    t[4] = t[1]  # two images of a class: the other's caption counts as wrong
    z = [[s * sum(f[i] * t[j]) for j in range(6)] for i in range(6)]
    ways = [sum(math.log(sum(map(math.exp, row))) - row[i] for i, row in enumerate(way)) / 6
            for way in (z, list(zip(*z)))]
    f, t, df, cd = map(torch.tensor, (f, t, *logits))
    for want in (sum(ways) / 2, open_clip.ClipLoss()(f, t, s).item()):
        assert drm.contrastive_loss(f, t, s).item() == pytest.approx(want, rel=1e-12)
    assert ways[0] != pytest.approx(ways[1], rel=1e-2)
    p_df, p_cd = (np.array([np.exp(row) / sum(np.exp(row)) for row in x]) for x in logits)
    for p_c in (rng.dirichlet(np.ones(4), size=6), np.eye(4)[[0] * 6]):
        risk = sum(-p_c[i][c] * math.log(p_cd[i][c]) for i in range(6) for c in range(4)) / 6
        got = drm.worst_case_risk(cd, torch.tensor(p_c)).item()
        assert got == pytest.approx(risk, rel=1e-12)
    p, want = drm.mixture(df, cd, beta), beta * p_df + (1 - beta) * p_cd
    assert np.abs(p.numpy() - want).max() <= 1e-12
    assert np.abs(common.log_probabilities(p).numpy() - np.log(want)).max() <= 1e-12
    p = drm.mixture(*torch.tensor([[[500.0, 0.0]]] * 2), beta)  # the second underflows
    assert common.log_probabilities(p).tolist() == [[0, math.log(sys.float_info.min)]]


def two_headed(model):
    clip = open_clip.create_model(model).eval()
    df, cd = (drm.encode(texts, SimpleNamespace(tokenizer=TOKENIZER, clip=clip))
              for texts in ([[prompt] for prompt in PROMPTS], TEXTS))
    return clip, drm.DualPrompts(clip, df, cd, 3)


@torch.no_grad()
def test_heads_are_the_normalised_means_of_unit_features(tiny_vit):
    clip, model = two_headed(tiny_vit)
    f, w_df, w_cd, s = model.eval()(torch.randn(2, 3, 32, 32), torch.tensor([2]))
    want_df, want_cd = heads_by_hand(clip)
    theirs = open_clip.build_zero_shot_classifier(
        clip, TOKENIZER, ["x"], [lambda name, text=text: text for text in TEXTS[1]])
    for got, want in ((w_df, want_df[2:]), (w_cd, want_cd), (w_cd[1], theirs[:, 0]),
                      (f.norm(dim=1), torch.ones(2)), (s, clip.logit_scale.exp())):
        assert got.shape == want.shape and (got - want).abs().max() <= 1e-6
    tokens = torch.zeros(600, 77, dtype=torch.long)  # more than are encoded at once, mixed lengths
    for row, n in zip(tokens, torch.randint(1, 30, (600,)).tolist()):
        row[:n + 2] = torch.tensor([49406, *torch.randint(1, 49406, (n,)), 49407])
    owner = torch.cat([torch.arange(290), torch.randint(290, (310,))]).sort().values
    features = clip.encode_text(tokens, normalize=True)
    want = F.normalize(torch.stack([features[owner == c].mean(dim=0) for c in range(290)]), dim=1)
    for classes in (torch.arange(290), torch.arange(3, 290, 7)):
        got = drm.text_head(clip, drm.Texts(tokens, owner), classes)
        assert (got - want[classes]).abs().max() <= 1e-6


@pytest.mark.parametrize("erm", ["flyp", "ce"])
@pytest.mark.parametrize("targets", ["paper", "softmax", "onehot"])
def test_objective_is_equation_7(tiny_vit, erm, targets):
    clip, model = two_headed(tiny_vit)
    torch.manual_seed(3)
    labels, images = torch.tensor([2, 0, 2, 2, 0, 1, 0]), torch.randn(7, 3, 32, 32)
    df, cd = heads_by_hand(clip)
    F_0, s_0, lam, tau = F.normalize(torch.randn(7, 32), dim=1), 9.0, 3.0, 0.4
    index = torch.tensor([4, 0, 2])  # rows of F_0 go by index, not by place in the batch
    batch = common.Batch(images[index], labels[index], index, 0)
    A = F_0 @ cd.T
    own = [A[labels == c, c].tolist() for c in range(3)]
    p_c = {"paper": brute_force_targets(A.tolist(), labels.tolist(), [*map(min, own)],
                                        [*map(max, own)], s_0, tau),
           "softmax": torch.softmax(s_0 * A, 1), "onehot": F.one_hot(labels, 3)}[targets]
    with torch.no_grad():
        f, s = clip.encode_image(images[index], normalize=True), clip.logit_scale.exp()
        log_p = torch.log_softmax(s * f @ cd.T, 1)
        worst = -(torch.as_tensor(p_c)[index] * log_p).sum().item() / 3
        risk = {"flyp": open_clip.ClipLoss()(f, df[labels[index]], s),
                "ce": F.cross_entropy(s * f @ df.T, labels[index])}[erm].item()
    for value, parts in ((lam, {"wrm": worst}), (0, {})):
        loss_fn = drm.make_loss(value, F_0, labels, cd, s_0, targets, tau, erm)
        loss, found = loss_fn(model.train(), batch)
        found = {name: x.item() for name, x in found.items()}
        assert found == pytest.approx({"erm": risk, "s": s.item(), **parts}, abs=1e-5)
        assert loss.item() == pytest.approx(risk + value * worst, abs=2e-5)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())  # ranks would wait for others


def test_lambda_0_is_flyp_step_for_step(world, tmp_path):
    """FLYP written out: all parameters, 77 positions, open_clip's ClipLoss, AdamW, cosine."""
    steps, B, lr, wd, out = 14, 16, 3e-4, 0.3, tmp_path / "r"
    printed("drm.py", *world.base, *STEPS, "--steps", steps, "--batch-size", B, "--lr", lr, "--wd",
            wd, "--warmup", 3, "--lam", 0, "--out", out)
    clip, read = load(world.model)
    images, labels = world.data.train.images, world.data.train.labels  # which 54 of the 60
    assert len(images) == 54 < steps * B / 2  # more than two epochs
    start, captions = clip.token_embedding.weight.detach().clone(), TOKENIZER(PROMPTS)
    optimizer, losses, shrink = torch.optim.AdamW(clip.parameters(), weight_decay=wd), [], 1.0
    order = np.concatenate([np.random.default_rng([0, e]).permutation(54) for e in range(6)])
    clip.train()
    for step in range(steps):
        done = (step - 3) / (steps - 3)
        rate = lr * ((step + 1) / 3 if step < 3 else (1 + math.cos(math.pi * done)) / 2)
        optimizer.param_groups[0]["lr"], shrink = rate, shrink * (1 - rate * wd)
        chosen = order[step * B:(step + 1) * B]
        loss = open_clip.ClipLoss()(*clip(read(images[chosen]), captions[labels[chosen]]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    log = log_of(out, "loss")
    assert [line["loss"] for line in log] == pytest.approx(losses, abs=1e-5)
    assert [line["step"] for line in log] == [*range(steps)] and losses[0] - losses[-1] > 1e-2
    saved = load_file(out / "open_clip_model.safetensors")
    for name, want in clip.state_dict().items():
        got = saved[name]
        if name.endswith("in_proj_bias"):  # the gradient of the keys' is rounding
            got, want = (torch.stack(x.chunk(3))[[0, 2]] for x in (got, want))
        assert (got - want).abs().max() <= 1e-5, name
    moved = saved["token_embedding.weight"] / start
    used = captions.unique()[1:]  # [0] is padding, which has no gradient
    assert (moved[used] - 1).abs().amax(dim=1).min() > 1e-2
    moved[used] = shrink  # others: weight decay alone
    assert (moved - shrink).abs().max() < 1e-5 < 1e-4 < 1 - shrink


def test_the_first_step_of_parts_and_of_variants(world, tmp_path):
    """Parts are contrastive batches of their own. Each variant has another loss."""
    flags, first = [*world.base, *STEPS, "--steps", 1, "--no-baseline"], []
    for more in (["--accum", 1], ["--accum", 2], ["--targets", "softmax"], ["--targets", "onehot"],
                 ["--erm", "ce"], ["--tau", 1e-3]):
        out = tmp_path / str(len(first))
        printed("drm.py", *flags, *more, "--out", out)
        first += log_of(out, "loss")
    one, two, *_ = first
    assert one.keys() == {"step", "lr", "loss", "erm", "wrm", "s"}
    assert min(np.diff(sorted(line["loss"] for line in first))) > 1e-3, first
    assert one["wrm"] == pytest.approx(two["wrm"], abs=1e-5)
    clip, read = load(world.model)
    batch = world.data.train.subset(np.random.default_rng([0, 0]).permutation(54)[:16])
    with torch.no_grad():
        f, s = clip.encode_image(read(batch.images), normalize=True), clip.logit_scale.exp()
        t = heads_by_hand(clip)[0][batch.labels]
        whole, *halves = [open_clip.ClipLoss()(f[i], t[i], s).item()
                          for i in (slice(16), slice(8), slice(8, 16))]
    assert one["erm"] == pytest.approx(whole, abs=1e-5)
    assert two["erm"] == pytest.approx(sum(halves) / 2, abs=1e-5) and whole - two["erm"] > 0.3
    for parts in (1, 8):  # a part of one image, whose loss would be 0
        few = [*flags, "--accum", parts, "--batch-size", parts, "--out", tmp_path / "few"]
        assert "--accum" in complaint("drm.py", *few) and not (tmp_path / "few").exists()
        for more in (["--erm", "ce"], ["--batch-size", 2 * parts]):
            assert args_of("drm.py", *few, *more)


def recorded(*flags):
    """Train; out/gradients.pt has the gradients of the first step, before they are clipped."""
    file, clip = f"{flags[-1]}/gradients.pt", torch.nn.utils.clip_grad_norm_

    def clipped(parameters, largest):
        if common.RANK == 0 and not os.path.exists(file):
            torch.save([p.grad for p in parameters], file)
        return clip(parameters, largest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
        patch.setattr(sys, "argv", ["drm.py", *map(str, flags)])
        drm.main()


def test_two_ranks_are_one_process(world, tmp_path):
    """Losses, weights, every gradient, temperature included; CLIPs with a logit_bias train too."""
    config = dict(vision_cfg=dict(image_size=32, patch_size=16, width=64, layers=1), embed_dim=16,
                  text_cfg=TEXT, init_logit_bias=-10.0)
    flags = [*world.base, "--steps", 10, "--batch-size", 12, "--lr", 3e-4, "--grad-clip", 2,
             "--warmup", 0.1, "--lam", 2, "--workers", 0, "--no-baseline"]
    biased = [*flags, "--model", save_clip(tmp_path / "clip", config), "--steps", 3]
    runs = [[*flags, "--out", tmp_path / "two"], [*biased, "--out", tmp_path / "biased"]]
    ranks = [*RANKS, "--module", "tests.test_drm", json.dumps(runs, default=str)]
    workers = subprocess.Popen(ranks, cwd=ROOT)
    recorded(*flags, "--out", tmp_path / "one")
    assert workers.wait(timeout=300) == 0
    want, got = (torch.load(tmp_path / run / "gradients.pt") for run in ("one", "two"))
    for a, b in zip(want, got, strict=True):  # the temperature's is the one number
        assert (a - b).abs().max() <= 1e-6 * (a.ndim > 0) + 1e-5 * a.abs().max()
    assert min(a.abs() for a in want if not a.ndim) > 1e-3
    one, two = (log_of(tmp_path / run, "loss") for run in ("one", "two"))
    best, other = (log_of(tmp_path / run, "held_out_acc") for run in ("one", "two"))
    assert len(one) == len(two) == 10 and len(best) == 3 and best == other
    for name in ("loss", "erm", "wrm"):
        assert [a[name] for a in one] == pytest.approx([b[name] for b in two], abs=1e-5), name
    assert one[0]["loss"] - one[-1]["loss"] > 1e-2
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert all(same(one[name], two[name], 1e-3) for name in one)
    saved = load_file(tmp_path / "biased" / "open_clip_model.safetensors")
    assert saved["logit_bias"].item() == -10  # softmax does not see it


def test_the_epoch_that_is_best_held_out_is_kept(world, tmp_path, monkeypatch):
    """Early stopping measures the mixture; accuracies that decide are made up: 90% comes twice."""
    real, made_up, seen = common.evaluate, [10, 50, 90, 90, 20, 89, 33], []
    noise, out = torch.randn(5, 3, 32, 32), tmp_path / "r"

    def evaluate(rows, setup, sets=None):
        found = real(rows, setup, sets)
        if sets:  # the held-out images
            seen.append((found["model"]["val"]["acc"], rows(noise, None)["model"].detach().exp()))
            found["model"]["val"]["acc"] = made_up[(len(seen) - 1) % 7]
        return found
    monkeypatch.setattr(common, "evaluate", evaluate)
    flags = [*world.base, *STEPS, "--holdout", 0.4, "--keep", "best", "--beta", 0.3]
    printed("drm.py", *flags, "--batch-size", 18, "--epochs", 7, "--lr", 1e-3, "--warmup", 13,
            "--baseline", "--out", out)
    val = common.load_data(args_of("drm.py", *flags)).val
    for folder, own, beta in ((out / "erm", seen[:7], 1), (out, seen[7:], 0.3)):  # ERM: df alone
        assert log_of(folder, "held_out_acc") == [{"step": 2 * i, "held_out_acc": accuracy}
                                     for i, accuracy in enumerate(made_up, 1)]
        clip, read = load(f"local-dir:{folder}")
        df, cd = both_heads(clip, noise)
        far = [(p - beta * df - (1 - beta) * cd).abs().max().item() for _, p in own]
        assert far.pop(2) <= 1e-5 < 1e-3 < min(far), far  # of equals the first
        df, cd = both_heads(clip, read(val.images))
        right = (beta * df + (1 - beta) * cd).argmax(1) == val.labels
        assert 100 * right.double().mean().item() == pytest.approx(own[2][0]) and len(val) == 24


def test_rows_are_those_of_the_saved_folder_and_of_the_average_by_hand(world):
    models = ["zero-shot", "ERM", "DRM", "DRM + WiSE 0.4"]
    assert list(world.rows) == [f"{m} {h}" for m in models for h in ("df", "cd", "mixture")]
    (zero_shot, read), (erm, _), (tuned, _) = map(load, (
        world.model, f"local-dir:{world.out / 'erm'}", f"local-dir:{world.out}"))
    start, end, between = zero_shot.state_dict(), tuned.state_dict(), copy.deepcopy(tuned)
    # both towers and the temperature; heads are made anew
    between.load_state_dict({name: 0.6 * start[name] + 0.4 * end[name] for name in start})
    for test, images in world.data.tests.items():
        x, y = read(images.images), images.labels
        for name, clip in zip(models, (zero_shot, erm, tuned, between)):
            df, cd = both_heads(clip, x)
            for head, p in (("df", df), ("cd", cd), ("mixture", (df + cd) / 2)):
                row = world.rows[f"{name} {head}"][test]
                right, nll = (p.argmax(1) == y).double(), -p[range(len(y)), y].log()
                assert row["acc"] == pytest.approx(100 * right.mean().item()), (name, head, test)
                assert row["nll"] == pytest.approx(nll.mean().item(), abs=1e-4), (name, head, test)
    assert len({row["test"]["nll"] for row in world.rows.values()}) == 12
    head = load_file(world.out / "head.safetensors")
    want = *heads_by_hand(tuned), heads_by_hand(zero_shot)[0], tuned.logit_scale.exp()
    for name, value in zip(("head", "head_cd", "head_0", "scale"), want):
        assert (head[name] - value).abs().max() <= 1e-5, name
    assert (want[0] - want[2]).abs().max() > 1e-3 and start["logit_scale"] != end["logit_scale"]


def test_a_finished_run_gives_its_rows_to_every_method(world, tmp_path):
    done = ["--finetuned", world.out]
    again = rows(tmp_path / "again", *done, "--alpha", 0.4)
    assert list(again) == [name for name in world.rows if not name.startswith("ERM")]
    assert all(same(again[name], world.rows[name]) for name in again)
    wise = rows(tmp_path / "wise", *done, "--alphas", 0, 0.5, 1, script="wise_ft.py")
    vrf = rows(tmp_path / "vrf", *done, "--k", 1, "--no-calibrate", script="vrf.py")
    first, *_, last = wise.values()
    for zero_shot, tuned in ((first, last), (vrf["zero-shot"], vrf["fine-tuned"])):
        assert same(zero_shot, world.rows["zero-shot df"])
        assert same(tuned, world.rows["DRM df"])
    clip = shutil.copytree(world.out, tmp_path / "clip",  # as if tuned elsewhere: without heads
                           ignore=shutil.ignore_patterns("args.json", "head.safetensors"))
    foreign = rows(tmp_path / "foreign", *world.base, "--finetuned", clip)
    assert same(foreign["DRM mixture"], world.rows["DRM mixture"])


def test_a_run_of_another_method_or_of_other_texts_is_refused(world, tmp_path):
    printed("wise_ft.py", *world.base, *STEPS, "--steps", 1, "--out", tmp_path / "other")
    other = ["--finetuned", tmp_path / "other" / "fine-tuned"]
    for more in (["--out", tmp_path / "new"], ["--predict", world.tree / "test"]):
        assert f"{other[1]}: " in complaint("drm.py", *other, *more)
    assert not (tmp_path / "new").exists()
    done, tree = (shutil.copytree(path, tmp_path / path.name) for path in (world.out, world.tree))
    (done / "results.json").unlink()
    flags = ["--data-dir", tree, "--resume", done]
    printed("drm.py", *flags)
    assert rows(done) == world.rows
    (tree / "descriptions.json").write_text(json.dumps({**TOLD, "red square": "a ruby patch"}))
    said = complaint("drm.py", *flags)
    assert str(done) in said and said.endswith(": texts"), said


def test_predictions_are_the_mixture_of_the_run(world, tmp_path):
    """As a user runs it; beta is that of the run's lambda, unless it is given."""
    out, done = tmp_path / "r", ["--finetuned", tmp_path / "r"]
    (tmp_path / "head.safetensors").touch()  # of --finetuned only one is read
    assert run("drm.py", *world.base, *STEPS, "--steps", 6, "--lr", 1e-3, "--lam", 3, "--out", "r",
               "--no-baseline", cwd=tmp_path)["args"]["beta"] == 0.25
    clip, read = load(f"local-dir:{out}")
    test = world.data.tests["test"]
    df, cd = both_heads(clip, read(test.images))
    for more, beta in (([], 0.25), (["--beta", 0.9], 0.9)):
        p = beta * df + (1 - beta) * cd
        said = printed("drm.py", *done, "--predict", world.tree / "test", *more)
        head, *lines = [line.split("\t") for line in said.splitlines()]
        assert head == ["path", "class", "probability"]
        assert [line[0] for line in lines] == [os.fsdecode(file) for file in test.images]
        assert [float(line[2]) for line in lines] == pytest.approx(p.amax(1).tolist(), abs=1e-4)
        assert all(row[NAMES.index(line[1])] >= row.max() - 1e-4 for row, line in zip(p, lines))
        again = rows(tmp_path / str(beta), *done, *more)["DRM mixture"]
        nll = -p[range(len(p)), test.labels].log().mean().item()
        assert again["test"]["nll"] == pytest.approx(nll, abs=1e-4)
        assert same(again, rows(out)["DRM mixture"]) == (not more)


def join(folder, pairs, names, aliases=None):
    """descriptions() of pairs in folder/d.json, with a byte-order mark; keys may repeat."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs]
    (folder / "d.json").write_text(f"{{{', '.join(lines)}}}", encoding="utf-8-sig")
    args = SimpleNamespace(descriptions=str(folder / "d.json"), prompt="a {} {x}", data="any")
    data = SimpleNamespace(classnames=names, aliases=aliases, descriptions=None)
    prompts, found = drm.read_texts(args, data)
    assert prompts == [[f"a {name} {{x}}"] for name in names]
    return found


@pytest.mark.parametrize("names, aliases, told, said", [
    (["a", "b"], None, {"b": ["1"], "a": ["0"]}, ""),
    (["A", "B", "c"], None, {"C": "2", "A": "0", "b": "1"}, ""),  # in another case
    (["Cat", "cat"], None, {"cat": "1", "Cat": "0"}, ""),  # twins: the exact name
    (["Cat", "cat"], None, {"Cat": "0", "cat": "1"}, ""),
    (["cat", "Cat"], None, {"CAT": "1", "cat": "0"}, ""),
    (["ant", "bee"], ["apis", "formica"], {"Formica": "1", "ant": "0"}, ""),  # second names
    (["Crane", "bird"], ["a", "crane"], {"crane": "1", "CRANE": "0"}, ""),  # exactly, before case
    (["cat", "dog"], ["dog", "cat"], {"dog": "1", "cat": "0"}, ""),  # folders renamed crosswise
    (["strasse", "\u00e9"], None, {"e\u0301": "1", "stra\u00dfe": "0"}, ""),
    (CLASSES, None, {i: i for i in reversed(INDICES)}, "keys are indices"),
    (FOLDERS, None, {i: str(FOLDERS.index(i)) for i in INDICES}, ""),
    (CLASSES, FOLDERS, {i: str(FOLDERS.index(i)) for i in INDICES}, ""),
    *((CLASSES, None, [*zip(CLASSES[:5], INDICES), (key, "5"), *zip(CLASSES[6:], INDICES[6:])],
       f"'{key}' for 'class 5'") for key in ("clas 5", "class 4"))])  # a typo; a key twice
def test_descriptions_are_joined_by_name_index_or_place(names, aliases, told, said, capsys,
                                                        tmp_path):
    pairs = told.items() if isinstance(told, dict) else told
    assert join(tmp_path, pairs, names, aliases) == [[str(c)] for c in range(len(names))]
    out = capsys.readouterr().out
    assert said in out and bool(said) == bool(out)  # joined by name: nothing to look at


def test_classes_of_one_name(capsys, tmp_path):
    """As the authors' files: ImageNet's two "missile"; iWildCam's Latin keys, with typos."""
    names, own = list(open_clip.IMAGENET_CLASSNAMES), [[f"text {i}"] for i in range(1000)]
    assert names[657] == names[744] == "missile" and len(set(names)) == 998
    single = [(name, f"of {name}") for name in dict.fromkeys(names)]  # one key per name
    for pairs in (single, single[::-1], single[500:] + single[:500]):
        assert join(tmp_path, pairs, names) == [[f"of {name}"] for name in names]
    assert join(tmp_path, zip(names, sum(own, [])), names) == own and capsys.readouterr().out == ""
    for at in (657, 744):
        keys = ["projectile" if i == at else name for i, name in enumerate(names)]
        assert join(tmp_path, zip(keys, sum(own, [])), names) == own
        assert "'projectile' for 'missile'" in capsys.readouterr().out
    english = [f"animal {i}" for i in [*range(178), 0, 1, 1, 2]]
    latin, own = [f"genus species{i}" for i in range(182)], own[:182]
    raw = [(f"Genus species{i}" + "b" * (60 < i < 79), f"text {i}") for i in range(182)]
    assert join(tmp_path, raw, english, latin) == own  # a tenth
    assert "'Genus species77b' for 'animal 77'" in capsys.readouterr().out
    mixed = [(english[i] if i % 2 else key, text) for i, (key, text) in enumerate(raw)]
    index = [(str(i), f"text {i}") for i in reversed(range(182))]
    assert join(tmp_path, mixed, english, latin) == join(tmp_path, index, english, latin) == own
    for wrong in (raw[1:] + raw[:1], [("typo", "text 0"), *raw[1:]]):  # no place; over a tenth
        with pytest.raises(common.Fail, match="d.json"):
            join(tmp_path, wrong, english, latin)


def test_classes_of_one_description_are_said(capsys, tmp_path):
    """The cd head gives them equal logits. Of one name they may be: ImageNet's two "missile"."""
    names, told = ["ant", "bee", "cow", "ant"], [("ant", "A"), ("bee", "B"), ("cow", "B")]
    assert join(tmp_path, told, names) == [["A"], ["B"], ["B"], ["A"]]
    assert capsys.readouterr().out.count("cannot tell apart ['bee', 'cow']") == 1


@pytest.mark.parametrize("pairs, words", [
    *(([(key, "text") for key in keys.split()], words) for keys, words in (
        ("ant", "bee cow"), ("", "ant bee cow"), ("cat ant bee", "cow cat"),  # missing, unknown
        ("ant bee cat", "cow cat"), ("1 2 3", "ant 3"),  # more than a tenth at equal places
        ("ant bee cow dog", "dog"), ("ant bee cow ant", "ant"), ("ant cow ant", "bee ant"))),
    *(([("cow", "C"), ("bee", value), ("ant", "A")], "'bee'") for value in (
        7, None, " ", "", [], ["B", 1], ["B", ""], {"x": "B"}))])
def test_wrong_descriptions_are_refused(pairs, words, tmp_path):
    with pytest.raises(common.Fail, match="d.json: ") as error:
        join(tmp_path, pairs, ["ant", "bee", "cow"])
    said = str(error.value).split("d.json: ")[1]
    assert all(word in said for word in words.split()), said


def test_mistakes_are_one_line_and_leave_no_folder(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base += ["--out", "new"]
    (tmp_path / "tree" / "descriptions.json").unlink()
    assert "--descriptions" in complaint("drm.py", *base)
    base += ["--descriptions", "d.json"]
    assert "d.json" in complaint("drm.py", *base)
    long = {**TOLD, "red square": "very " * 76}
    for told, words in (("{", "d.json"), ("[1, 2]", "--descriptions"), ("3", "--descriptions"),
                        ('{"red square": "a"}', "d.json"), (json.dumps(long), "'very very")):
        (tmp_path / "d.json").write_text(told)
        assert words in complaint("drm.py", *base)
    (tmp_path / "d.json").write_text(json.dumps(TOLD))
    for flag, value in (("--prompt", "a photo"), ("--prompt", "a {} or {}"), ("--lam", -1),
                        ("--beta", 1.5), ("--tau", 0), ("--alpha", 2), ("--targets", "minmax"),
                        ("--erm", "kl"), ("--holdout", 0)):
        assert flag in complaint("drm.py", *base, flag, value)
    assert "'very very" in complaint("drm.py", *base, "--prompt", "very " * 75 + "{}")
    assert common.tokenize(["very " * 75], TOKENIZER, 77)[0, 76] == 49407  # the end of text
    assert not (tmp_path / "new").exists()


def test_recipes_are_those_of_appendix_f():
    want = dict(batch_size=256, lr=1e-5, warmup=500, grad_clip=0, augment="crop", keep="best",
                lam=1, beta=0.5)
    for data, epochs, wd, prompt in (("imagenet", 10, 0.1, "a good photo of the {}."),
                                     ("iwildcam", 20, 0.2, "a photo of {}."),
                                     ("fmow", 20, 0.2, "satellite photo of a {}.")):
        want |= dict(epochs=epochs, wd=wd, prompt=prompt)
        assert want.items() <= vars(args_of("drm.py", "--data", data)).items()
    given = ["--lam", 4, "--beta", 0], ["--beta", 0.4], ["--lam", 0]
    assert [args_of("drm.py", *flags).beta for flags in given] == [1 / 5, 0.4, 1]  # Section 4.3


if __name__ == "__main__":  # a rank of test_two_ranks_are_one_process
    common.cli(lambda: [recorded(*flags) for flags in json.loads(sys.argv[1])])
