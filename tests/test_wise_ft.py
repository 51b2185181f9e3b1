"""wise_ft.py: exact ends, the linear-classifier identity, BatchNorm, one decode an image."""
import copy

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from safetensors.torch import load_file

import common
import vrf
import wise_ft
from tests.conftest import NAMES, args_of, here, printed, rows_of


def moved(model):
    """A copy with other weights."""
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return model


def ends(model_dir):
    """Two classifiers with different random weights."""
    visual = open_clip.create_model(model_dir).visual
    heads = torch.randn(2, 4, visual.output_dim)
    return [moved(common.ImageClassifier(visual, head, bias=True)).eval() for head in heads]


def test_interpolate_against_float64_and_bit_equal_ends():
    a = {"w": torch.randn(3, 4), "mask": torch.tensor([0.0, -torch.inf]), "n": torch.tensor(3)}
    b = {"w": torch.randn(3, 4), "mask": torch.tensor([0.0, -torch.inf]), "n": torch.tensor(9)}
    for alpha in (0.1, 0.5, 0.7):
        merged = wise_ft.interpolate(a, b, alpha)
        want = (1 - alpha) * a["w"].double() + alpha * b["w"].double()
        assert (merged["w"] - want).abs().max() <= 1e-6
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
        for name, model in (("zero-shot", theta_0), ("WiSE-FT 0.5", middle),
                            ("fine-tuned", theta_1)):
            assert (rows[name] - model(x)[0]).abs().max() <= 1e-5
        assert (rows["WiSE-FT 0.5"] - rows["fine-tuned"]).abs().max() > 1e-3
        ours = vrf.weight_ensemble(theta_0.state_dict(), theta_1.state_dict(), 0.3)  # VRF's Eq. (2)
        theirs = wise_ft.interpolate(theta_0.state_dict(), theta_1.state_dict(), 0.3)
        assert all((ours[name] - theirs[name]).abs().max() <= 1e-6 for name in theirs)


@pytest.fixture
def reads(monkeypatch):
    """Paths of the images that are read, as they are read."""
    paths, read = [], common.read_image
    monkeypatch.setattr(common, "read_image", lambda path: paths.append(path) or read(path))
    return paths


def test_eleven_alphas_decode_each_image_once(base, reads):
    args = args_of("wise_ft.py", *base, "--workers", 0)
    setup = common.start(args, common.load_data(args))
    theta_0 = common.ImageClassifier(setup.clip.visual, setup.head, setup.scale)
    alphas = [i / 10 for i in range(11)]
    results = common.evaluate(wise_ft.all_alphas(theta_0, moved(theta_0), alphas), setup)
    files = [path.decode() for images in setup.data.tests.values() for path in images.images]
    assert len(results) == 11 and len(reads) == 60 and sorted(reads) == sorted(files)


@pytest.mark.parametrize("freeze", ["none", "encoder", "head"])
def test_script_selects_and_saves(base, tmp_path, tiny_vit, freeze):
    results = here("wise_ft.py", *base, "--freeze", freeze, "--steps", 20, "--batch-size", 8,
                   "--shots", 8, "--lr", 1e-2 if freeze == "encoder" else 1e-3, "--select",
                   "--alphas", 0.25, 0.5, 0.75, "--out", tmp_path / "w")
    rows = rows_of(results)
    assert list(rows) == ["zero-shot", "WiSE-FT 0.25", "WiSE-FT 0.5", "WiSE-FT 0.75", "fine-tuned"]
    accuracy = {float(alpha): x for alpha, x in results["held_out_accuracy"].items()}
    assert set(accuracy) == {0, 0.25, 0.5, 0.75, 1} and max(accuracy.values()) > accuracy[0]
    best = [alpha for alpha in accuracy if accuracy[alpha] == max(accuracy.values())]
    assert results["saved_alpha"] == min(best, key=lambda alpha: abs(alpha - 0.5))
    curve = [results["curve"][alpha] for alpha in ("0", "0.25", "0.5", "0.75", "1")]
    assert curve == [[row["id"], row["ood"]] for row in results["rows"]]
    again = rows_of(here("wise_ft.py", "--finetuned", tmp_path / "w", "--alphas", 1, "--out",
                         tmp_path / "again"))
    want = rows[wise_ft.row_name(results["saved_alpha"])]["test"]["nll"]
    assert again["fine-tuned"]["test"]["nll"] == pytest.approx(want, abs=1e-4)
    saved = {**load_file(tmp_path / "w" / "fine-tuned" / "open_clip_model.safetensors"),
             **load_file(tmp_path / "w" / "fine-tuned" / "head.safetensors")}
    start = open_clip.create_model(tiny_vit).state_dict()
    towers = [torch.equal(saved[k], start[k]) for k in start if k.startswith("visual.")]
    assert all(towers) == (freeze == "encoder") and any(towers) == (freeze == "encoder")
    assert (saved["bias"] == 0).all() == (freeze == "head")


def test_the_linear_classifier_is_trained_on_features_read_once(tmp_path, base, tiny_resnet, reads):
    """As logistic regression written out; BatchNorm is still."""
    printed("wise_ft.py", *base, "--model", tiny_resnet, "--freeze", "encoder", "--steps", 30,
            "--batch-size", 18, "--wd", 0, "--warmup", 0, "--grad-clip", 0, "--alphas", 1, "--out",
            tmp_path / "w")
    train = [path for path in reads if "/train/" in path]
    assert len(train) == len(set(train)) == 60  # 54 of them, and 6 held out, for ten epochs
    args = common.read_json(tmp_path / "w" / "args.json")
    assert (args["lr"], args["augment"]) == (0.1, "none")  # D.3's

    images = common.load_data(args_of("wise_ft.py", *base)).train
    images.prepare(PreprocessCfg(size=32))
    clip = open_clip.create_model(tiny_resnet).eval()
    x = torch.stack([images[i][0] for i in range(54)])
    with torch.no_grad():
        f = F.normalize(clip.encode_image(images.normalized(x)), dim=-1)
    head = open_clip.build_zero_shot_classifier(clip, open_clip.get_tokenizer(tiny_resnet), NAMES,
                                                ["a photo of a {}."]).T
    W = torch.nn.Parameter(clip.logit_scale.exp().item() * head)
    b = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([W, b], lr=0.1, weight_decay=0)
    order = np.concatenate([np.random.default_rng([0, e]).permutation(54) for e in range(10)])
    for step in range(30):
        optimizer.param_groups[0]["lr"] = common.learning_rate(step, 30, 0.1, 0)
        chosen = order[18 * step:18 * step + 18]
        F.cross_entropy(f[chosen] @ W.T + b, images.labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = load_file(tmp_path / "w" / "fine-tuned" / "head.safetensors")
    assert (saved["head"] - W).abs().max() <= 1e-3 < 0.1 < (W - 100 * head).abs().max()
    assert (saved["bias"] - b).abs().max() <= 1e-3
    tower = load_file(tmp_path / "w" / "open_clip_model.safetensors")
    start = clip.state_dict()
    assert all(torch.equal(tower[k], start[k]) for k in start if k.startswith("visual."))
