"""vrf.py against float64 by hand, closed forms, edge cases; its script and predictions."""
import csv
import io
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
import vrf
from tests.conftest import (
    args_of,
    complaint,
    data_flags,
    here,
    printed,
    rows_of,
    write_tree,
)


def unit(rng, n, d):
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_knn_distance_against_all_distances():
    rng = np.random.default_rng(0)
    q, b = unit(rng, 23, 8), unit(rng, 40, 8)
    q[0] = b[7]
    for k in (1, 5, 40):
        want = np.sort(((q[:, None] - b) ** 2).sum(axis=2))[:, k - 1]
        for chunk in (None, 1, 7):
            got = vrf.knn_distance(torch.tensor(q).float(), torch.tensor(b).float(), k, chunk=chunk)
            assert np.abs(got.numpy() - want).max() <= 1e-6
        l2 = vrf.knn_distance(torch.tensor(q), torch.tensor(b), k, squared=False)
        assert np.abs(l2.numpy() - np.sqrt(want)).max() <= 1e-9
    # no cancellation error
    q, b = torch.tensor(q).float(), torch.tensor(b).float()
    assert vrf.knn_distance(q, b, 1)[0] == 0
    for k in (0, 41):
        with pytest.raises(ValueError, match="bank"):
            vrf.knn_distance(q, b, k)
    assert vrf.knn_distance(q[:0], b, 1).shape == (0,)


def test_failures_weight_and_k():
    zs = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
    ft = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [2.0, 1.0]])
    failed = vrf.zero_shot_failures(zs, ft, torch.tensor([0, 1, 1, 1]))
    assert failed.tolist() == [False, True, False, False]
    d = torch.tensor([1.5, 0.9, 2.1], dtype=torch.double)
    want = [1 / (1 + math.exp((x - 1.5) / 0.6)) for x in d.tolist()]
    assert vrf.ft_weight(d).tolist() == pytest.approx(want, abs=1e-12) and want[0] == 0.5
    assert vrf.neighbours(200_000, 1_281_167) == 156
    assert vrf.neighbours(200_000, 1_281_167, "paper") == 200
    assert vrf.neighbours(3, 1_000_000) == 1 == vrf.neighbours(490, 3000, "paper")
    assert vrf.neighbours(9, 10) == 9


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_ensemble_by_hand():
    rng = np.random.default_rng(1)
    zs, ft, w = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)), rng.random(6)
    p = vrf.ensemble(torch.tensor(zs), torch.tensor(ft), torch.tensor(w), 0.7, 1.9)
    want = w[:, None] * softmax(ft / 1.9) + (1 - w[:, None]) * softmax(zs / 0.7)
    assert np.abs(p.numpy() - want).max() <= 1e-12
    fixed = vrf.ensemble(torch.tensor(zs), torch.tensor(ft), 1.0)  # Eq. (1) with alpha = 1
    assert torch.allclose(fixed, torch.tensor(ft).softmax(1))
    nll = -vrf.ensemble(torch.tensor([[700.0, 0]]).double(), torch.tensor([[0.0, 0]]).double(),
                        0.0).log()[0, 1]
    assert nll.item() == pytest.approx(700, rel=1e-12)  # in float64 its logarithm is exact


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


def test_a_temperature_at_an_end_of_the_bracket_is_1_with_a_warning(capsys):
    """All held-out images right: T was 0.001, and the NLL of a wrong test image 18 and more."""
    images = common.ImageSet("val", ["a.jpg"] * 3, [0, 1, 2])
    assert vrf.temperature("zero-shot", 3 * torch.eye(3), images) == 1
    assert "3 images" in capsys.readouterr().out
    z = torch.tensor([[3.0, 0, 0], [0, 3, 0], [3, 0, 0]])
    assert vrf.temperature("zero-shot", z, images) == vrf.calibration_temperature(z, images.labels)
    assert not capsys.readouterr().out


def test_the_grid_has_the_boundary():
    """Far images are right only zero-shot, near ones only fine-tuned: it must fall between them."""
    d = torch.cat([torch.linspace(0, 0.4, 50), torch.linspace(0.6, 1.0, 50)]).double()
    labels, far = torch.zeros(100).long(), (d > 0.5)[:, None]
    zs = torch.where(far, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    grid = vrf.weight_grid(d)
    spread = d.numpy().std()
    want = [(a, share * spread) for a in np.quantile(d, np.linspace(0, 1, 21))
            for share in (0.25, 0.5, 1, 2)]
    assert np.allclose(grid[4:], want[4:]) and len(grid) == 84
    scores = [vrf.accuracy(vrf.ensemble(zs, 1 - zs, vrf.ft_weight(d, a, b)), labels)
              for a, b in grid]
    a, b = grid[common.choose(scores, [0.5] * 84)]
    assert 0.4 <= a <= 0.6 and max(scores) == 100
    for same in (torch.full((100,), 0.3), torch.tensor([0.3]), torch.zeros(100)):
        grid = vrf.weight_grid(same.double())
        assert all(math.isfinite(x) and x > 0 for pair in grid for x in pair)


# sky is right before
NAMES = {"blue_square": "sky", "green_square": "grass", "red_square": "blood"}


def predictions(folder, run):
    """Columns of the lines of --predict."""
    text = printed("vrf.py", "--finetuned", run, "--predict", folder)
    header, *lines = csv.reader(io.StringIO(text), "excel-tab")
    assert header == ["path", "class", "probability", "d", "omega"]
    return lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_vit):
    """(Folder of a tree, of a fine-tuned run ft and of a VRF run v on it, results.json of v, the
    Setup of v)"""
    tmp = tmp_path_factory.mktemp("vrf")
    tree = write_tree(tmp / "tree")
    names = "".join(f"{folder}\t{name}\n" for folder, name in NAMES.items())
    (tree / "classnames.txt").write_text(names)
    here("wise_ft.py", *data_flags(tree, tiny_vit), "--steps", 25, "--lr", 1e-3, "--batch-size", 16,
         "--alphas", 1, "--alpha", 1, "--out", tmp / "ft")
    results = here("vrf.py", "--finetuned", tmp / "ft", "--out", tmp / "v")
    args = args_of("vrf.py", "--finetuned", tmp / "ft", "--workers", 0)
    return tmp, results, common.start(args, common.load_data(args))


def test_script_rows_and_predictions(finished):
    """The table, by hand: logits and features of every image, then each ensemble in float64."""
    tmp, results, setup = finished
    rows, state = rows_of(results), common.read_json(tmp / "v" / "vrf.json")
    assert list(rows) == ["zero-shot", "fine-tuned", "OSE", "WSE", "VRF"]
    bank = load_file(tmp / "v" / "vrf.safetensors")["bank"]
    assert state == results["vrf"]
    zero_shot, fine_tuned = common.load_finetuned(setup)

    @torch.no_grad()
    def outputs(images):
        x = images.normalized(torch.stack([images[i][0] for i in range(len(images))]))
        zs, (ft, v) = zero_shot(x)[0].double(), fine_tuned(x)
        return zs.numpy(), ft.double().numpy(), v, images.labels.numpy()
    zs, ft, v, y = outputs(setup.data.train)
    failed = (ft.argmax(1) == y) & (zs.argmax(1) != y)
    assert 0 < failed.sum() == len(bank) == state["failures"] < len(y) and state["k"] == 1
    assert (v[torch.tensor(failed)] - bank).abs().max() <= 1e-5

    def ensembles(zs, ft, v, weight):
        d = (v.double()[:, None] - bank.double()).square().sum(dim=2).amin(dim=1).numpy()
        omega = 1 / (1 + np.exp((d - weight[0]) / weight[1]))[:, None]
        p_zs, p_ft = softmax(zs / state["t_zs"]), softmax(ft / state["t_ft"])
        mixed = omega * p_ft + (1 - omega) * p_zs
        return state["alpha"] * p_ft + (1 - state["alpha"]) * p_zs, mixed
    for test, images in setup.data.tests.items():
        zs, ft, v, y = outputs(images)
        weight = state["a"], state["b"]
        for row, p in zip(("OSE", "VRF"), ensembles(zs, ft, v, weight)):
            assert rows[row][test]["acc"] == pytest.approx(100 * (p.argmax(1) == y).mean()), row
            nll = -np.log(p[np.arange(len(y)), y]).mean()
            assert rows[row][test]["nll"] == pytest.approx(nll, rel=1e-4), row
    zs, ft, v, y = outputs(setup.data.val)
    scores = [(ensembles(zs, ft, v, point[:2])[1].argmax(1) == y).mean() for point in
              results["grid"]]
    best = [point[:2] for point, score in zip(results["grid"], scores) if score == max(scores)]
    assert [state["a"], state["b"]] in best and len(scores) == 84
    chosen = [point[2:] for point in results["grid"] if point[:2] == [state["a"], state["b"]]]
    assert chosen[0] == [results["rows"][-1]["id"], results["rows"][-1]["ood"]]
    assert results["OSE"].keys() == results["WSE"].keys() == {f"{a:g}" for a in vrf.ALPHAS}

    lines = predictions(tmp / "tree" / "test", tmp / "v")
    right = sum(NAMES[path.split("/")[-2]] == name for path, name, *_ in lines)
    assert len(lines) == 30 and 100 * right / 30 == pytest.approx(rows["VRF"]["test"]["acc"])


def test_both_models_are_kept_and_a_run_of_vrf_is_a_start_again(finished):
    tmp, results, setup = finished
    for want, part in zip(common.load_finetuned(setup), ("zero-shot", "fine-tuned")):
        model, classnames, _ = common.load_run(tmp / "v" / part, None)
        assert classnames == list(NAMES.values())
        got = model.state_dict()
        assert all(torch.equal(value, got[key]) for key, value in want.state_dict().items())
    again = here("vrf.py", "--finetuned", tmp / "v" / "fine-tuned", "--out", tmp / "again")
    for key, value in results["vrf"].items():
        same = value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
        assert again["vrf"][key] == same, key
    rows = rows_of(again)
    for row, tests in rows_of(results).items():
        for test, found in tests.items():
            assert rows[row][test]["acc"] == found["acc"]
            assert rows[row][test]["nll"] == pytest.approx(found["nll"], abs=1e-5)
    for more in (["--out", tmp / "new"], ["--predict", tmp / "tree"]):
        assert "head.safetensors" in complaint("wise_ft.py", "--finetuned", tmp / "v", *more)
    assert not (tmp / "new").exists()


def test_given_values_are_used(finished):
    tmp, results, _ = finished
    fixed = here("vrf.py", "--finetuned", tmp / "ft", "--a", 0.5, "--b", 0.2, "--k", 2,
                 "--distance", "l2", "--no-calibrate", "--select-on-test", "--out", tmp / "fixed")
    want = dict(a=0.5, b=0.2, k=2, distance="l2", t_zs=1, t_ft=1, chosen_on="test")
    assert want.items() <= fixed["vrf"].items()
    assert len(fixed["grid"]) == 1 and fixed["grid"][0][:2] == [0.5, 0.2]
    assert fixed["rows"][0]["tests"] == results["rows"][0]["tests"]


def test_an_empty_bank_falls_back_to_ose(tree, base, tmp_path):
    # with a rate of 0 both models are equal: V is empty
    results = here("vrf.py", *base, "--steps", 1, "--lr", 0, "--out", tmp_path / "v")
    rows = rows_of(results)
    assert rows["VRF"] == rows["OSE"] and results["vrf"]["failures"] == 0
    lines = predictions(tree / "test", tmp_path / "v")
    assert len(lines) == 30
    assert {omega for *_, omega in lines} == {f"{results['vrf']['alpha']:.4f}"}


def test_without_held_out_images(base, tmp_path):
    flags = [*base, "--holdout", 0, "--out", tmp_path / "v"]
    assert "--holdout" in complaint("vrf.py", *flags) and not (tmp_path / "v").exists()
    results = here("vrf.py", *flags, "--steps", 3, "--select-on-test")
    assert len(results["rows"]) == 5 and results["vrf"]["chosen_on"] == "test"
