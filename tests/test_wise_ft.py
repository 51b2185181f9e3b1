"""wise_ft.py: exact ends, the linear-classifier identity, BatchNorm, one decode per image, the script and its figure."""
import copy
import json

import numpy as np
import open_clip
import pytest
import torch

import common
import wise_ft
from conftest import complaint, run, write_tree


def ends(model_dir, folded=True):
    """Two classifiers with different random weights."""
    models = []
    for seed in (0, 1):
        clip = open_clip.create_model(model_dir).eval()
        torch.manual_seed(seed)
        model = common.ImageClassifier(clip.visual, torch.randn(4, clip.visual.output_dim), 1.0, bias=folded).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        models.append(model)
    return models


def test_interpolate_against_float64_and_bit_equal_ends():
    a = {"w": torch.randn(3, 4), "mask": torch.tensor([0.0, -torch.inf]), "n": torch.tensor(3)}
    b = {"w": torch.randn(3, 4), "mask": torch.tensor([0.0, -torch.inf]), "n": torch.tensor(9)}
    for alpha in (0.1, 0.5, 0.7):
        merged = wise_ft.interpolate(a, b, alpha)
        for i in range(3):
            for j in range(4):
                want = (1 - alpha) * a["w"][i, j].double().item() + alpha * b["w"][i, j].double().item()
                assert merged["w"][i, j].item() == pytest.approx(want, abs=1e-6)
        assert merged["mask"].tolist() == [0, -torch.inf] and merged["n"].item() == 9
    for alpha, end in ((0, a), (1, b), (0.0, a), (1.0, b)):
        merged = wise_ft.interpolate(a, b, alpha)
        assert all(torch.equal(merged[k], end[k]) for k in end)
    with pytest.raises(ValueError, match="extra"):
        wise_ft.interpolate(a, {**b, "extra": torch.ones(1)}, 0.5)
    with pytest.raises(ValueError, match="w"):
        wise_ft.interpolate(a, {**b, "w": torch.ones(4, 3)}, 0.5)


def test_linear_classifier_wise_is_the_logit_ensemble(tiny_vit):
    theta_0, other = ends(tiny_vit)
    theta_1 = copy.deepcopy(theta_0)
    theta_1.head.data, theta_1.bias.data = other.head.data, other.bias.data
    x = torch.randn(5, 3, 32, 32)
    rows = wise_ft.all_alphas(theta_0, theta_1, [0, 0.3, 1])
    with torch.no_grad():
        z0, z1, merged = theta_0(x)[0], theta_1(x)[0], rows(x, lambda z: z)
    assert (merged["WiSE-FT 0.3"] - (0.7 * z0 + 0.3 * z1)).abs().max() <= 1e-5
    assert (merged["zero-shot"] - z0).abs().max() <= 1e-6 and (z0 - z1).abs().max() > 0.1


@pytest.mark.parametrize("tower", ["tiny_vit", "tiny_resnet"])
def test_all_alphas_equal_models_loaded_one_by_one(tower, request):
    theta_0, theta_1 = ends(request.getfixturevalue(tower))
    if tower == "tiny_resnet":  # give BatchNorm statistics of its own to the fine-tuned end
        theta_1.train()(torch.randn(8, 3, 32, 32))
        theta_1.eval()
        assert any(k.endswith("num_batches_tracked") for k in theta_1.state_dict())
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        rows = wise_ft.all_alphas(theta_0, theta_1, [0, 0.5, 1])(x, lambda z: z)
        middle = copy.deepcopy(theta_0)
        middle.load_state_dict(wise_ft.interpolate(theta_0.state_dict(), theta_1.state_dict(), 0.5))
        for name, model in (("zero-shot", theta_0), ("WiSE-FT 0.5", middle), ("fine-tuned", theta_1)):
            assert (rows[name] - model(x)[0]).abs().max() <= 1e-5
        assert (rows["WiSE-FT 0.5"] - rows["fine-tuned"]).abs().max() > 1e-3
        middle.load_state_dict(wise_ft.interpolate(theta_0.state_dict(), theta_1.state_dict(), 0.3))
        assert (common.merged(theta_0, theta_1, 0.3)(x)[0] - middle(x)[0]).abs().max() <= 1e-6


def test_eleven_alphas_decode_each_image_once(tmp_path, tiny_vit, monkeypatch):
    tree, reads = write_tree(tmp_path / "tree"), []
    flags = ["--data", "folder", "--data-dir", str(tree), "--model", tiny_vit, "--workers", "0", "--out",
             str(tmp_path / "out")]
    setup = common.start(common.parse(common.parser(""), "wise_ft", wise_ft.RECIPES, flags))
    read = common.ImageSet.read
    monkeypatch.setattr(common.ImageSet, "read", staticmethod(lambda path: reads.append(path) or read(path)))
    alphas = [i / 10 for i in range(11)]
    results = common.evaluate(wise_ft.all_alphas(*ends_for(setup), alphas), setup)
    assert len(results) == 11 and sorted(reads) == sorted(sum((t.images for t in setup.data.tests.values()), []))


def ends_for(setup):
    theta_0 = setup.classifier(folded=True)
    theta_1 = copy.deepcopy(theta_0)
    with torch.no_grad():
        for p in theta_1.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return theta_0, theta_1


@pytest.mark.parametrize("freeze", ["none", "encoder"])
def test_script_selects_saves_and_draws(tmp_path, tiny_vit, freeze):
    tree = write_tree(tmp_path / "tree")
    results = run("wise_ft.py", "--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--freeze", freeze, "--steps",
                  20, "--lr", 1e-2 if freeze == "encoder" else 1e-3, "--select", "--shots", 8, "--out", "w", "--alphas", 0.25,
                  0.5, 0.75, "--alpha", 0, "--batch-size", 8, cwd=tmp_path)
    names = [r["name"] for r in results["rows"]]
    assert names == ["zero-shot", "WiSE-FT 0.25", "WiSE-FT 0.5", "WiSE-FT 0.75", "fine-tuned"]
    assert results["selected"]["alpha"] == results["saved_alpha"] and len(results["selected"]["held_out_accuracy"]) == 5
    accuracy = results["selected"]["held_out_accuracy"]
    assert accuracy[f"{results['saved_alpha']:g}"] == max(accuracy.values()) > accuracy["0"]
    assert (tmp_path / "w" / "curve.png").stat().st_size > 10_000
    rows = {r["name"]: r["tests"] for r in results["rows"]}
    again = run("wise_ft.py", "--finetuned", "w", "--alphas", 1, "--out", "again", cwd=tmp_path)
    assert again["rows"][-1]["tests"]["test"]["nll"] == pytest.approx(
        rows[wise_ft.row_name(results["saved_alpha"])]["test"]["nll"], abs=1e-4)
    if freeze == "encoder":
        towers = [{k: v for k, v in common.load_tensors(p / "open_clip_model.safetensors")[0].items()
                   if k.startswith("visual.")} for p in (tmp_path / "w" / "fine-tuned",)]
        clip = open_clip.create_model(tiny_vit).state_dict()
        assert all(torch.equal(v, clip[k]) for k, v in towers[0].items())


def test_mistakes(tmp_path, tree, tiny_vit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "at most 1" in complaint("wise_ft.py", "--alphas", 0, 1.5)
    assert "at least 0" in complaint("wise_ft.py", "--alpha", -0.1)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "args.json").write_text(json.dumps({"method": "wise_ft", "data": "shapes"}))
    assert "not finished" in complaint("wise_ft.py", "--finetuned", "half")
