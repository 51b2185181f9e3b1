"""vrf.py against naive float64 loops, closed forms, edge cases, and the script with its caches and predictions."""
import math
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import vrf
from conftest import command, complaint, run, write_tree


def unit(rng, n, d):
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_knn_distance_against_a_loop():
    rng = np.random.default_rng(0)
    q, b = unit(rng, 23, 8), unit(rng, 40, 8)
    q[0] = b[7]
    for k in (1, 5, 40):
        want = [sorted(sum((q[i, j] - b[n, j]) ** 2 for j in range(8)) for n in range(40))[k - 1] for i in range(23)]
        for chunk in (None, 1, 7):
            got = vrf.knn_distance(torch.tensor(q).float(), torch.tensor(b).float(), k, chunk=chunk)
            assert np.abs(got.numpy() - want).max() <= 1e-6
        l2 = vrf.knn_distance(torch.tensor(q), torch.tensor(b), k, squared=False)
        assert np.abs(l2.numpy() - np.sqrt(want)).max() <= 1e-9
    assert vrf.knn_distance(torch.tensor(q).float(), torch.tensor(b).float(), 1)[0] == 0  # no cancellation error
    for k in (0, 41):
        with pytest.raises(ValueError, match="bank"):
            vrf.knn_distance(torch.tensor(q), torch.tensor(b), k)
    assert vrf.knn_distance(torch.zeros(0, 8), torch.tensor(b).float(), 1).shape == (0,)


def test_failures_weight_and_k():
    zs = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
    ft = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [2.0, 1.0]])
    assert vrf.zero_shot_failures(zs, ft, torch.tensor([0, 1, 1, 1])).tolist() == [False, True, False, False]
    d = torch.tensor([1.5, 0.9, 2.1], dtype=torch.double)
    want = [1 / (1 + math.exp((x - 1.5) / 0.6)) for x in d.tolist()]
    assert vrf.ft_weight(d).tolist() == pytest.approx(want, abs=1e-12) and want[0] == 0.5
    assert vrf.neighbours(200_000, 1_281_167) == 156 and vrf.neighbours(200_000, 1_281_167, "paper") == 200
    assert vrf.neighbours(3, 1_000_000) == 1 == vrf.neighbours(490, 3000, "paper") and vrf.neighbours(9, 10) == 9


def test_ensemble_against_a_loop():
    rng = np.random.default_rng(1)
    zs, ft, w, t_zs, t_ft = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)), rng.random(6), 0.7, 1.9
    def softmax(z):
        e = [math.exp(x - max(z)) for x in z]
        return [x / sum(e) for x in e]
    p = vrf.ensemble(torch.tensor(zs), torch.tensor(ft), torch.tensor(w), t_zs, t_ft)
    z = vrf.ensemble(torch.tensor(zs), torch.tensor(ft), torch.tensor(w), t_zs, t_ft, space="logits")
    for i in range(6):
        a, b = softmax([x / t_ft for x in ft[i]]), softmax([x / t_zs for x in zs[i]])
        assert p[i].tolist() == pytest.approx([w[i] * a[c] + (1 - w[i]) * b[c] for c in range(4)], abs=1e-12)
        mixed = softmax([w[i] * ft[i][c] / t_ft + (1 - w[i]) * zs[i][c] / t_zs for c in range(4)])
        assert z[i].tolist() == pytest.approx(mixed, abs=1e-12)
    fixed = vrf.ensemble(torch.tensor(zs), torch.tensor(ft), 1.0)  # Eq. (1) with alpha = 1
    assert torch.allclose(fixed, torch.tensor(ft).softmax(1)) and torch.allclose(p.sum(1), torch.ones(6).double())


def test_calibration_has_its_closed_form():
    """Two classes, logit gap g: confidence 1/(1 + exp(-g/T)) equals the accuracy q at T = g / ln(q/(1-q))."""
    g, n, right = 3.0, 1000, 800
    logits = torch.tensor([[g, 0.0]] * n)
    labels = torch.tensor([0] * right + [1] * (n - right))
    assert vrf.calibration_temperature(logits, labels) == pytest.approx(g / math.log(4), rel=1e-6)
    assert vrf.calibration_temperature(logits, torch.zeros(n).long()) == pytest.approx(1e-3, rel=0.1)  # accuracy 1
    assert vrf.calibration_temperature(logits, torch.ones(n).long()) == pytest.approx(1e3, rel=1e-6)  # accuracy 0
    z = torch.randn(500, 5) * 4
    y = torch.where(torch.rand(500) < 0.6, z.argmax(1), torch.randint(5, (500,)))
    t = vrf.calibration_temperature(z, y)
    assert (z.double() / t).softmax(1).amax(1).mean().item() == pytest.approx((z.argmax(1) == y).double().mean().item())


def test_sweep_prefers_the_zero_shot_model_within_the_tolerance():
    """Far images are right only zero-shot, near ones only fine-tuned: the boundary must fall between them."""
    d = torch.cat([torch.linspace(0, 0.4, 50), torch.linspace(0.6, 1.0, 50)])
    labels = torch.zeros(100).long()
    zs = torch.where(d[:, None] > 0.5, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    mix = lambda w: vrf.ensemble(zs, 1 - zs, w)
    a, b = vrf.sweep_weight(mix, d, labels, tolerance=0)
    assert 0.4 <= a <= 0.6 and vrf.accuracy(mix(vrf.ft_weight(d, a, b)), labels) == 100
    same = vrf.sweep_weight(lambda w: vrf.ensemble(zs, zs, w), torch.full((100,), 0.3), labels, 0)  # all distances equal
    one = vrf.sweep_weight(lambda w: vrf.ensemble(zs[:1], zs[:1], w), torch.tensor([0.3]), labels[:1], 0)
    assert all(math.isfinite(x) and x > 0 for x in (*same, *one))
    rng = np.random.default_rng(3)  # all near, as held-out images are: the tolerance decides
    d, y = torch.tensor(rng.uniform(0, 1, 400)), torch.tensor(rng.integers(3, size=400))
    zs, ft = (torch.tensor(rng.normal(size=(400, 3))) + gain * F.one_hot(y, 3) for gain in (1, 3))
    mix, chosen = lambda w: vrf.ensemble(zs, ft, w), []
    for tolerance in (0, 3):
        tried = []
        for a in np.quantile(d, np.linspace(0, 1, 21)):
            for b in np.array([0.25, 0.5, 1, 2]) * d.numpy().std():
                omega = 1 / (1 + np.exp((d.numpy() - a) / b))
                p = omega[:, None] * ft.softmax(1).numpy() + (1 - omega[:, None]) * zs.softmax(1).numpy()
                tried.append((100 * (p.argmax(1) == y.numpy()).mean(), omega.mean(), a, b))
        near = [t for t in tried if t[0] >= max(tried)[0] - tolerance]
        chosen.append(vrf.sweep_weight(mix, d, y, tolerance))
        assert chosen[-1] == pytest.approx(min(near, key=lambda t: t[1])[2:])
    assert chosen[0] != chosen[1]


NAMES = {"blue_square": "sky", "green_square": "grass", "red_square": "blood"}  # zero-shot gets the blue ones right


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """A tree, a plain fine-tuned run and a VRF run on it."""
    tmp = tmp_path_factory.mktemp("vrf")
    tree, model = write_tree(tmp / "tree"), request.getfixturevalue("tiny_vit")
    (tree / "classnames.txt").write_text("".join(f"{folder}\t{name}\n" for folder, name in NAMES.items()))
    run("wise_ft.py", "--data", "folder", "--data-dir", tree, "--model", model, "--steps", 25, "--lr", 1e-3, "--out", "ft",
        "--batch-size", 16, "--alphas", 1, "--alpha", 1, cwd=tmp)
    return tmp, tree, run("vrf.py", "--finetuned", "ft", "--out", "v", cwd=tmp)


def test_script_rows_figures_and_predictions(finished):
    tmp, tree, results = finished
    rows = {r["name"]: r for r in results["rows"]}
    assert list(rows) == ["zero-shot", "fine-tuned", "OSE", "WSE", "VRF"]
    for name in ("ratio.png", "plane.png"):
        assert (tmp / "v" / name).stat().st_size > 10_000
    state = common.read_json(tmp / "v" / "vrf.json", "")
    bank = common.load_tensors(tmp / "v" / "vrf.safetensors")[0]["bank"]
    args = common.parse(common.parser(""), "vrf", vrf.RECIPES, ["--finetuned", str(tmp / "ft"), "--out", str(tmp / "x")])
    setup = common.start(args)
    failures = []
    with torch.no_grad():
        for x, y, _ in setup.data.train:
            zs, (ft, v) = setup.finetuned[0](x[None])[0], setup.finetuned[1](x[None])
            failures += [v[0]] * (ft.argmax().item() == y != zs.argmax().item())
    assert 0 < len(failures) < len(setup.data.train) and (torch.stack(failures) - bank).abs().max() <= 1e-5
    assert len(bank) == state["failures"] and state["chosen_on"] == "held-out"
    done = subprocess.run(command("vrf.py", "--resume", "v", "--predict", tree / "test"), cwd=tmp, capture_output=True, text=True)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == 30 and done.returncode == 0, done.stderr
    right = sum(NAMES[path.split("/")[-2]] == name for path, name, *_ in lines)
    assert 100 * right / 30 == pytest.approx(rows["VRF"]["id"])
    d, w = (np.array([float(x[i]) for x in lines]) for i in (3, 4))
    assert np.abs(w - 1 / (1 + np.exp((d - state["a"]) / state["b"]))).max() < 2e-3


def test_script_cache_is_bound_to_weights_and_files(finished):
    tmp, tree, results = finished
    cache = tmp / "ft" / "cache"
    before = {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    again = run("vrf.py", "--finetuned", "ft", "--out", "v2", "--space", "logits", cwd=tmp)
    assert {p.name: p.stat().st_mtime_ns for p in cache.iterdir()} == before  # all found again
    assert again["rows"][0]["tests"] == results["rows"][0]["tests"]
    weights, about = common.load_tensors(tmp / "ft" / "head.safetensors")
    weights["bias"][0] += 1e-3
    common.save_tensors(tmp / "ft" / "head.safetensors", weights, about)
    run("vrf.py", "--finetuned", "ft", "--out", "v3", "--select-on-test", "--k", 2, cwd=tmp)
    assert len(list(cache.iterdir())) == 2 * len(before)  # nothing stale was used
    fixed = run("vrf.py", "--finetuned", "ft", "--out", "v4", "--no-sweep", "--a", 0.5, "--select-on-test", cwd=tmp)["vrf"]
    assert (fixed["a"], fixed["b"]) == (0.5, 0.6) and 0.5 not in (fixed["alpha"], fixed["alpha_wse"])  # chosen all the same


def test_empty_bank_falls_back_to_ose(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree")
    run("wise_ft.py", "--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--steps", 1, "--lr", 0, "--out", "same",
        "--alphas", 1, cwd=tmp_path)  # a fine-tuned model equal to the zero-shot one: V is empty
    results = run("vrf.py", "--finetuned", "same", "--out", "v", cwd=tmp_path)
    rows = {r["name"]: r["tests"] for r in results["rows"]}
    assert rows["VRF"] == rows["OSE"] and results["vrf"]["failures"] == 0


@pytest.mark.parametrize("flags", [["--no-calibrate", "--no-sweep"], ["--select-on-test"]])
def test_without_held_out_images(tmp_path, tiny_vit, flags):
    tree = write_tree(tmp_path / "tree")
    results = run("vrf.py", "--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--holdout", 0, "--steps", 3, *flags,
                  "--out", "v", cwd=tmp_path)
    assert len(results["rows"]) == 5 and results["vrf"]["chosen_on"] == ("test" if len(flags) == 1 else "held-out")
    (tmp_path / "v").rename(tmp_path / "moved")  # a run can be moved
    (tree / "test" / "red_square" / "000.jpg").write_text("no image")
    done = subprocess.run(command("vrf.py", "--resume", "moved", "--predict", tree / "shifts"), cwd=tmp_path, text=True,
                          capture_output=True)
    assert "000.jpg: cannot be read" in done.stderr and done.returncode == 2  # the run's own data are looked at too
    Image.new("RGB", (40, 40)).save(tree / "test" / "red_square" / "000.jpg")
    (tree / "shifts" / "broken.png").write_text("no image")
    done = subprocess.run(command("vrf.py", "--resume", "moved", "--predict", tree / "shifts"), cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 30 and "broken.png is left out" in done.stderr


def test_mistakes(tmp_path, tree, tiny_vit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--a" in complaint("vrf.py", "--a", 0) and "above 0" in complaint("vrf.py", "--b", -1)
    assert "--resume RUN" in complaint("vrf.py", "--predict", tree)
    assert "--no-sweep" in complaint("vrf.py", "--a", 9)
