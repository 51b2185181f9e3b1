"""vrf.py against naive float64 loops, closed forms, edge cases; its script, cache, predictions."""
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import complaint, printed, write_tree

import common
import vrf


def unit(rng, n, d):
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_knn_distance_against_a_loop():
    rng = np.random.default_rng(0)
    q, b = unit(rng, 23, 8), unit(rng, 40, 8)
    q[0] = b[7]
    for k in (1, 5, 40):
        want = [sorted(sum((q[i, j] - b[n, j]) ** 2 for j in range(8)) for n in range(40))[k - 1]
                for i in range(23)]
        for chunk in (None, 1, 7):
            got = vrf.knn_distance(torch.tensor(q).float(), torch.tensor(b).float(), k, chunk=chunk)
            assert np.abs(got.numpy() - want).max() <= 1e-6
        l2 = vrf.knn_distance(torch.tensor(q), torch.tensor(b), k, squared=False)
        assert np.abs(l2.numpy() - np.sqrt(want)).max() <= 1e-9
    # no cancellation error
    assert vrf.knn_distance(torch.tensor(q).float(), torch.tensor(b).float(), 1)[0] == 0
    for k in (0, 41):
        with pytest.raises(ValueError, match="bank"):
            vrf.knn_distance(torch.tensor(q), torch.tensor(b), k)
    assert vrf.knn_distance(torch.zeros(0, 8), torch.tensor(b).float(), 1).shape == (0,)


def test_failures_weight_and_k():
    zs = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
    ft = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [2.0, 1.0]])
    assert vrf.zero_shot_failures(zs, ft, torch.tensor([0, 1, 1, 1])).tolist() == [False, True,
                                                                                   False, False]
    d = torch.tensor([1.5, 0.9, 2.1], dtype=torch.double)
    want = [1 / (1 + math.exp((x - 1.5) / 0.6)) for x in d.tolist()]
    assert vrf.ft_weight(d).tolist() == pytest.approx(want, abs=1e-12) and want[0] == 0.5
    assert vrf.neighbours(200_000, 1_281_167) == 156
    assert vrf.neighbours(200_000, 1_281_167, "paper") == 200
    assert vrf.neighbours(3, 1_000_000) == 1 == vrf.neighbours(490, 3000, "paper")
    assert vrf.neighbours(9, 10) == 9


def test_ensemble_against_a_loop():
    rng = np.random.default_rng(1)
    zs, ft, w, t_zs, t_ft = rng.normal(size=(6, 4)), rng.normal(size=(6,
                                                                      4)), rng.random(6), 0.7, 1.9
    def softmax(z):
        e = [math.exp(x - max(z)) for x in z]
        return [x / sum(e) for x in e]
    p = vrf.ensemble(torch.tensor(zs), torch.tensor(ft), torch.tensor(w), t_zs, t_ft)
    z = vrf.ensemble(torch.tensor(zs), torch.tensor(ft), torch.tensor(w), t_zs, t_ft,
                     space="logits")
    for i in range(6):
        a, b = softmax([x / t_ft for x in ft[i]]), softmax([x / t_zs for x in zs[i]])
        assert p[i].tolist() == pytest.approx([w[i] * a[c] + (1 - w[i]) * b[c] for c in range(4)],
                                              abs=1e-12)
        mixed = softmax([w[i] * ft[i][c] / t_ft + (1 - w[i]) * zs[i][c] / t_zs for c in range(4)])
        assert z[i].tolist() == pytest.approx(mixed, abs=1e-12)
    fixed = vrf.ensemble(torch.tensor(zs), torch.tensor(ft), 1.0)  # Eq. (1) with alpha = 1
    assert torch.allclose(fixed, torch.tensor(ft).softmax(1))
    assert torch.allclose(p.sum(1), torch.ones(6).double())


def test_calibration_has_its_closed_form():
    """Two classes, gap g: confidence 1/(1 + exp(-g/T)) is the accuracy q at T = g / ln(q/(1-q))."""
    g, n, right = 3.0, 1000, 800
    logits = torch.tensor([[g, 0.0]] * n)
    labels = torch.tensor([0] * right + [1] * (n - right))
    assert vrf.calibration_temperature(logits, labels) == pytest.approx(g / math.log(4), rel=1e-6)
    all_right, all_wrong = torch.zeros(n).long(), torch.ones(n).long()
    assert vrf.calibration_temperature(logits, all_right) == pytest.approx(1e-3, rel=0.1)
    assert vrf.calibration_temperature(logits, all_wrong) == pytest.approx(1e3, rel=1e-6)
    z = torch.randn(500, 5) * 4
    y = torch.where(torch.rand(500) < 0.6, z.argmax(1), torch.randint(5, (500,)))
    t = vrf.calibration_temperature(z, y)
    confidence = (z.double() / t).softmax(1).amax(1).mean().item()
    assert confidence == pytest.approx((z.argmax(1) == y).double().mean().item())


def of_held_out(zs, ft, d, labels):
    return vrf.Outputs(logits_zs=zs, logits_ft=ft, v=torch.zeros(len(d), 2), d=d, labels=labels)


def mix(outputs, weight):
    return vrf.ensemble(outputs.logits_zs, outputs.logits_ft, weight)


def test_sweep_finds_the_boundary():
    """Far images are right only zero-shot, near ones only fine-tuned: it must fall between them."""
    d = torch.cat([torch.linspace(0, 0.4, 50), torch.linspace(0.6, 1.0, 50)])
    labels, far = torch.zeros(100).long(), (d > 0.5)[:, None]
    zs = torch.where(far, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    outputs = of_held_out(zs, 1 - zs, d, labels)
    for rule in ("one-se", "best"):
        a, b = vrf.sweep_weight(mix, outputs, rule)
        right = mix(outputs, vrf.ft_weight(d, a, b)).argmax(1) == labels
        assert 0.4 <= a <= 0.6 and right.all()
    same = vrf.sweep_weight(mix, of_held_out(zs, zs, torch.full((100,), 0.3), labels), "one-se")
    one = vrf.sweep_weight(mix, of_held_out(zs[:1], zs[:1], torch.tensor([0.3]), labels[:1]),
                           "best")
    zero = vrf.sweep_weight(mix, of_held_out(zs, zs, torch.zeros(100), labels), "best")
    assert all(math.isfinite(x) and x > 0 for x in (*same, *one, *zero))


def test_sweep_and_alpha_follow_the_rule_of_one_standard_error():
    """All near, as held-out images are, where the fine-tuned model is the better one: by hand."""
    rng = np.random.default_rng(3)
    d, y = torch.tensor(rng.uniform(0, 1, 400)), torch.tensor(rng.integers(3, size=400))
    zs, ft = (torch.tensor(rng.normal(size=(400, 3))) + gain * F.one_hot(y, 3) for gain in (1, 3))
    outputs = of_held_out(zs, ft, d, y)
    p_zs, p_ft = zs.softmax(1).numpy(), ft.softmax(1).numpy()

    def accuracy(omega):
        p = omega[:, None] * p_ft + (1 - omega[:, None]) * p_zs
        return (p.argmax(1) == y.numpy()).mean()
    grid = []
    for a in np.quantile(d, np.linspace(0, 1, 21)):
        for b in np.array([0.25, 0.5, 1, 2]) * d.numpy().std():
            omega = 1 / (1 + np.exp((d.numpy() - a) / b))
            grid.append((accuracy(omega), omega.mean(), a, b))
    line = [(accuracy(np.full(400, alpha)), alpha) for alpha in vrf.ALPHAS]
    chosen = {}
    for rule in ("one-se", "best"):
        want = []
        for tried in (grid, line):
            best = max(tried)[0]
            margin = math.sqrt(best * (1 - best) / 400) if rule == "one-se" else 0
            near = [t for t in tried if t[0] >= best - margin - 1e-12]
            want.append(min(near, key=lambda t: abs(t[1] - 0.5)))
        chosen[rule] = vrf.sweep_weight(mix, outputs, rule)
        assert chosen[rule] == pytest.approx(want[0][2:])
        assert vrf.choose_alpha(mix, outputs, rule) == want[1][1]
    assert chosen["one-se"] != chosen["best"]


# sky is right before
NAMES = {"blue_square": "sky", "green_square": "grass", "red_square": "blood"}


def here(script, *flags):
    """results.json of a method run in this process."""
    printed(script, *flags, "--workers", 0)
    out = flags[flags.index("--out") + 1]
    return json.loads((out / "results.json").read_text())


def predictions(folder, run):
    """Columns of the lines of --predict."""
    lines = printed("vrf.py", "--finetuned", run, "--predict", folder, "--workers", 0).splitlines()
    return [line.split("\t") for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """A tree, a plain fine-tuned run and a VRF run on it."""
    tmp = tmp_path_factory.mktemp("vrf")
    tree, model = write_tree(tmp / "tree"), request.getfixturevalue("tiny_vit")
    names = "".join(f"{folder}\t{name}\n" for folder, name in NAMES.items())
    (tree / "classnames.txt").write_text(names)
    here("wise_ft.py", "--data", "folder", "--data-dir", tree, "--model", model, "--steps", 25,
         "--lr", 1e-3, "--batch-size", 16, "--alphas", 1, "--alpha", 1, "--out", tmp / "ft")
    return tmp, tree, here("vrf.py", "--finetuned", tmp / "ft", "--out", tmp / "v")


def setup_of(tmp, run):
    """The Setup of vrf.py --finetuned `run`."""
    argv = ["--finetuned", str(tmp / run), "--out", str(tmp / "none")]
    return common.start(common.parse(common.parser(""), "vrf", vrf.RECIPES, argv=argv))


def test_script_rows_figures_and_predictions(finished):
    tmp, tree, results = finished
    rows = {r["name"]: r for r in results["rows"]}
    assert list(rows) == ["zero-shot", "fine-tuned", "OSE", "WSE", "VRF"]
    for name in ("ratio.png", "plane.png"):
        assert (tmp / "v" / name).stat().st_size > 10_000
    state = common.read_json(tmp / "v" / "vrf.json", "")
    bank = common.load_tensors(tmp / "v" / "vrf.safetensors")[0]["bank"]
    setup = setup_of(tmp, "ft")
    zero_shot, fine_tuned = common.load_finetuned(setup)
    failures, train = [], setup.data.train
    with torch.no_grad():
        for pixels, y, _ in train:
            x = train.normalized(pixels[None])
            zs, (ft, v) = zero_shot(x)[0], fine_tuned(x)
            failures += [v[0]] * (ft.argmax().item() == y != zs.argmax().item())
    assert 0 < len(failures) < len(train)
    assert (torch.stack(failures) - bank).abs().max() <= 1e-5
    assert len(bank) == state["failures"] and state["chosen_on"] == "held-out"
    lines = predictions(tree / "test", tmp / "v")
    assert len(lines) == 30
    right = sum(NAMES[path.split("/")[-2]] == name for path, name, *_ in lines)
    assert 100 * right / 30 == pytest.approx(rows["VRF"]["id"])
    d, w = (np.array([float(x[i]) for x in lines]) for i in (3, 4))
    assert np.abs(w - 1 / (1 + np.exp((d - state["a"]) / state["b"]))).max() < 2e-3


def test_both_models_are_kept_and_a_run_of_vrf_is_a_start_again(finished):
    tmp, tree, results = finished
    setup = setup_of(tmp, "ft")
    for want, part in zip(common.load_finetuned(setup), ("zero-shot", "fine-tuned")):
        saved = common.load_saved(tmp / "v" / part, torch.device("cpu"), None)
        assert saved.classnames == list(NAMES.values())
        got = saved.model.state_dict()
        assert all(torch.equal(value, got[key]) for key, value in want.state_dict().items())
    again = here("vrf.py", "--finetuned", tmp / "v" / "fine-tuned", "--out", tmp / "again")
    for key, value in results["vrf"].items():
        same = value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
        assert again["vrf"][key] == same, key
    for a, b in zip(again["rows"], results["rows"]):
        assert all(a["tests"][t] == pytest.approx(b["tests"][t], abs=1e-5) for t in a["tests"])
    message = complaint("vrf.py", "--finetuned", tmp / "v", "--out", tmp / "new")
    assert "zero-shot and fine-tuned" in message and not (tmp / "new").exists()


def test_script_cache_is_bound_to_weights_and_files(finished):
    tmp, tree, results = finished
    cache = tmp / "ft" / "cache"
    before = {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    assert len(before) == 4  # training, held-out and two test sets
    again = here("vrf.py", "--finetuned", tmp / "ft", "--space", "logits", "--out", tmp / "v2")
    after = {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    assert after == before  # all found again
    for i in (0, 1):
        assert again["rows"][i]["tests"] == results["rows"][i]["tests"]
    shutil.copytree(tmp / "ft", tmp / "other")
    weights, about = common.load_tensors(tmp / "other" / "head.safetensors")
    weights["bias"][0] += 1e-3
    common.save_tensors(tmp / "other" / "head.safetensors", weights, about)
    flags = ["--finetuned", tmp / "other", "--select-on-test"]
    here("vrf.py", *flags, "--k", 2, "--out", tmp / "v3")
    cache = tmp / "other" / "cache"
    assert len(list(cache.iterdir())) == len(before) - 1 + len(before)  # held-out ones are not used
    fixed = here("vrf.py", *flags, "--no-sweep", "--a", 0.5, "--out", tmp / "v4")["vrf"]
    assert (fixed["a"], fixed["b"]) == (0.5, 0.6)
    os.utime(tree / "test" / "red_square" / "000.jpg", (1, 1))
    kept = len(list(cache.iterdir()))
    here("vrf.py", *flags, "--no-sweep", "--a", 0.5, "--out", tmp / "v5")
    assert len(list(cache.iterdir())) == kept + 1


def test_empty_bank_falls_back_to_ose(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree")
    here("wise_ft.py", "--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--steps", 1,
         "--lr", 0, "--alphas", 1, "--out", tmp_path / "same")  # both models are equal: V is empty
    results = here("vrf.py", "--finetuned", tmp_path / "same", "--out", tmp_path / "v")
    rows = {r["name"]: r["tests"] for r in results["rows"]}
    assert rows["VRF"] == rows["OSE"] and results["vrf"]["failures"] == 0
    lines = predictions(tree / "test", tmp_path / "v")
    assert len(lines) == 30
    assert {omega for *_, omega in lines} == {f"{results['vrf']['alpha']:.4f}"}


@pytest.mark.parametrize("flags", [["--no-calibrate", "--no-sweep"], ["--select-on-test"]])
def test_without_held_out_images(tmp_path, tiny_vit, flags):
    tree = write_tree(tmp_path / "tree")
    base = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--holdout", 0]
    results = here("vrf.py", *base, "--steps", 3, *flags, "--out", tmp_path / "v")
    chosen_on = "test" if len(flags) == 1 else "held-out"
    assert len(results["rows"]) == 5 and results["vrf"]["chosen_on"] == chosen_on
    if len(flags) == 2:
        assert results["vrf"]["t_zs"] == results["vrf"]["t_ft"] == 1
        assert "no held-out images" in complaint("vrf.py", *base, "--out", tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_a_broken_image_is_one_line_and_the_run_goes_on_from_there(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree")
    broken = tree / "test" / "red_square" / "000.jpg"
    good = broken.read_bytes()
    broken.write_text("no image")
    flags = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--steps", 3]
    line = complaint("vrf.py", *flags, "--workers", 0, "--out", tmp_path / "v")
    assert f"{broken}: cannot be read as an image" in line and "repair or remove it" in line
    broken.write_bytes(good)
    printed("vrf.py", "--resume", tmp_path / "v", "--workers", 0)
    results = json.loads((tmp_path / "v" / "results.json").read_text())
    assert results["rows"][-1]["tests"]["test"]["n"] == 30


def test_mistakes(tmp_path, tree, tiny_vit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--a" in complaint("vrf.py", "--a", 0) and "above 0" in complaint("vrf.py", "--b", -1)
    assert "--finetuned RUN" in complaint("vrf.py", "--predict", tree)
    assert "--no-sweep" in complaint("vrf.py", "--a", 9)
    assert "vrf.json" in complaint("vrf.py", "--finetuned", tree, "--predict", tree)
