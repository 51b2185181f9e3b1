"""common.py: heads, metrics, schedule, data order, atomic files, and one line for every mistake."""
import json
import math
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import common
import lipsum_ft
from conftest import complaint, run


def test_zero_shot_logits_equal_open_clips(tiny_vit):
    clip = open_clip.create_model(tiny_vit).eval()
    tokenizer = open_clip.get_tokenizer(tiny_vit)
    names, templates = ["cat", "dog", "red car"], ["a photo of a {}", "art of a {}."]
    W = common.zero_shot_head(clip, tokenizer, names, templates)
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        rows = []
        for name in names:  # the definition: normalise, average, normalise
            e = clip.encode_text(tokenizer([t.format(name) for t in templates])).double()
            e = (e / e.norm(dim=1, keepdim=True)).mean(0)
            rows.append(e / e.norm())
        assert (W - torch.stack(rows)).abs().max() <= 1e-6
        want = clip.logit_scale.exp() * clip.encode_image(x, normalize=True) @ open_clip.build_zero_shot_classifier(
            clip, tokenizer, names, templates)
        s = clip.logit_scale.exp().item()
        unit, folded = common.ImageClassifier(clip.visual, W, s), common.ImageClassifier(clip.visual, s * W, bias=True)
        for model in (unit, folded):
            logits, features = model(x)
            assert (logits - want).abs().max() <= 1e-4 * s and (features.norm(dim=1) - 1).abs().max() <= 1e-6


def test_calibration_error_against_a_loop():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4) * 0.5, size=500)
    probs[0] = [1, 0, 0, 0]
    labels = np.where(probs.max(1) < 0.6, probs.argmax(1), rng.integers(4, size=500))  # gaps of both signs
    want = 0.0
    for b in range(15):
        inside = [i for i in range(500) if b / 15 < probs[i].max() <= (b + 1) / 15]
        if inside:
            accuracy = sum(probs[i].argmax() == labels[i] for i in inside) / len(inside)
            confidence = sum(probs[i].max() for i in inside) / len(inside)
            want += len(inside) / 500 * abs(accuracy - confidence)
    assert common.expected_calibration_error(torch.tensor(probs), torch.tensor(labels)) == pytest.approx(want, abs=1e-9)
    border = common.calibration_error(torch.tensor([0.5, 0.9]), torch.tensor([True, False]), bins=2)
    assert border == pytest.approx((0.5 + 0.9) / 2)  # 0.5 belongs to the lower bin
    sure = torch.tensor([[0.75, 0.25]] * 4)  # three of four right at confidence 0.75
    assert common.expected_calibration_error(sure, torch.tensor([0, 0, 0, 1])) == 0


def test_metrics_of_hand_worked_logits():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    m = common.metrics(common.per_image(logits + 7, torch.tensor([0, 2])), common.ImageSet("t", None, [0, 2]))
    assert m["acc"] == 50 and m["nll"] == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2) and m["n"] == 2
    assert m["ece"] == pytest.approx(100 * (0.5 * abs(1 - 0.5) + 0.5 * abs(0 - 0.8)))


def test_projection_takes_the_largest_logit_of_a_label():
    logits = torch.tensor([[1.0, 5.0, 2.0, 9.0]])
    assert common.ImageSet("t", None, [0], [[2], [0, 1]]).project(logits).tolist() == [[2.0, 5.0]]
    assert common.ImageSet("t", None, [0]).project(logits) is logits


def test_schedule():
    at = lambda t: common.learning_rate(t, 110, 1.0, 10)
    assert [at(0), at(9), at(10), at(60)] == pytest.approx([0.1, 1.0, 1.0, 0.5]) and 0 < at(109) < 1e-3
    assert common.learning_rate(0, 100, 3.0, 0.0) == 3.0
    assert common.learning_rate(4, 100, 1.0, 0.1) == pytest.approx(0.5)


def test_stream_is_epochs_end_to_end_whatever_the_split(monkeypatch):
    def batches(n, batch, accum, world, first=0, last=6):
        out = []
        for rank in range(world):
            monkeypatch.setattr(common, "RANK", rank)
            monkeypatch.setattr(common, "WORLD", world)
            args = SimpleNamespace(batch_size=batch, accum=accum, seed=3)
            out.append([b for b in common.Stream(n, args, first, last)])
        return [sorted(sum((r[t * accum + a] for r in out for a in range(accum)), [])) for t in range(last - first)]
    whole = batches(10, 8, 1, 1)
    assert whole == batches(10, 2, 2, 2) == batches(10, 4, 2, 1) and whole[2:] == batches(10, 8, 1, 1, first=2)
    seen = [i for b in whole for i in b]
    assert len(seen) == 48 and all(sorted(i for e, i in seen if e == epoch) == list(range(10)) for epoch in range(4))


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    pixels = np.random.default_rng(0).integers(256, size=(4, 40, 40, 3), dtype=np.uint8)
    pixels[1:] = pixels[0]  # four times the same image
    draws = common.ImageSet("train", pixels, [0] * 4).augmented("crop-flip", open_clip.transform.PreprocessCfg(size=32), 5)
    x = draws[(2, 1)][0]
    torch.rand(7)  # what others draw does not matter, and is not disturbed
    state = torch.get_rng_state()
    assert torch.equal(draws[(2, 1)][0], x) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draws[(3, 1)][0], x) and not torch.equal(draws[(2, 3)][0], x)
    draws.seed = 6
    assert not torch.equal(draws[(2, 1)][0], x)


def test_log_goes_on_where_the_checkpoint_does(tmp_path):
    lines = [json.dumps({"step": i}) for i in range(5)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')  # a line cut off by a kill
    with common.open_log(tmp_path / "log.jsonl", 3) as log:
        log.write("next\n")
    assert (tmp_path / "log.jsonl").read_text().splitlines() == [*lines[:3], "next"]


def test_holdout_and_shots_are_balanced_and_disjoint():
    labels = np.repeat([0, 1, 2], [10, 20, 5])
    train = common.ImageSet("train", [f"{i}.jpg" for i in range(35)], labels)
    kept, held = common.hold_out(train, 0.2)
    assert np.bincount(held.labels).tolist() == [2, 4, 1] and not set(kept.images) & set(held.images)
    assert set(kept.images) | set(held.images) == set(train.images)
    few = common.few_shot(train, 3, seed=1)
    assert np.bincount(few.labels).tolist() == [3, 3, 3]
    assert few.images == common.few_shot(train, 3, 1).images != common.few_shot(train, 3, 2).images
    with pytest.raises(common.Fail, match="class 2"):
        common.few_shot(train, 6, 0)


def test_failed_write_keeps_the_last_good_file(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    common.save_tensors(path, {"a": torch.ones(3)}, {"step": 1})

    def full(*_, **__):
        (tmp_path / "last.ckpt.tmp").write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(common, "save_file", full)
    with pytest.raises(common.Fail, match="No space left"):
        common.save_tensors(path, {"a": torch.zeros(3)}, {"step": 2})
    tensors, about = common.load_tensors(path)
    assert tensors["a"].sum() == 3 and about == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, tree, tiny_vit, monkeypatch):
    """Flags, trees and checkpoints that are wrong, by the words that the message must hold."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("all my work")
    base = ["--data", "folder", "--model", tiny_vit, "--out", "new"]
    cases = [
        (["--data", "cifar11"], ["cifar11", "shapes"]),
        (["--model", "ViT-B-17"], ["ViT-B-17", "local-dir:"]),
        (["--model", "ViT-B-32", "--pretrained", "openia"], ["openia", "laion2b_s34b_b79k"]),
        (["--model", "ViT-B-16", "--pretrained", "openai"], ["QuickGELU", "ViT-B-16-quickgelu"]),
        (["--model", "ViT-B-32-quickgelu"], ["ViT-B-32-quickgelu", "could not be loaded", "local-dir"]),
        (["--model", "local-dir:nowhere"], ["nowhere", "open_clip_config.json"]),
        (["--data-dir", "nowhere"], ["nowhere", "no such folder"]),
        (["--steps", 5, "--epochs", 1], ["--steps", "--epochs"]),
        (["--lr", "-1"], ["--lr", "at least 0"]),
        (["--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["--bogus"], ["--bogus"]),
        (["--tests", "night"], ["night", "dark"]),
        (["--shots", 99], ["--shots 99", "only"]),
        (["--out", "taken"], ["taken", "not empty"]),
        (["--resume", "taken"], ["taken", "not found"]),
        (["--finetuned", "nowhere"], ["nowhere"]),
        (["--precision", "fp16"], ["fp16"]),
        (["--device", "cuda"], ["cuda"]),
    ]
    if torch.cuda.is_available():
        cases = cases[:-2]
    for flags, words in cases:
        where = [] if "--data-dir" in flags else ["--data-dir", tree]
        message = complaint("lipsum_ft.py", *base, *where, *flags)
        assert all(str(w) in message for w in words), (flags, message)
    assert not (tmp_path / "new").exists() and (tmp_path / "taken" / "thesis.txt").read_text() == "all my work"


def test_wrong_trees_are_named(tmp_path, tree):
    """Each change to a good tree is found and named; the change is taken back afterwards."""
    def load(*flags):
        return common.load_data(common.parse(common.parser(""), "lipsum_ft", lipsum_ft.RECIPES,
                                             ["--data", "folder", "--data-dir", str(tree), *flags]))

    def complaint():
        with pytest.raises(common.Fail) as error:
            load()
        return str(error.value)
    load()
    (tree / "train" / "empty").mkdir()
    assert str(tree / "train" / "empty") in complaint()
    (tree / "train" / "empty").rmdir()
    (tree / "shifts" / "dark" / "unknown").mkdir()
    assert "unknown" in complaint() and "no class" in complaint()
    (tree / "shifts" / "dark" / "unknown").rmdir()
    bad = tree / "shifts" / "dark" / "red_square" / "000.jpg"
    good = bad.read_bytes()
    bad.write_bytes(good[:len(good) // 2])  # cut off in the header
    assert str(bad) in complaint()
    Image.effect_noise((300, 300), 50).save(bad)
    bad.write_bytes(bad.read_bytes()[:-2000])  # cut off in the pixels
    assert str(bad) in complaint()
    bad.write_text("<html>404</html>")
    assert str(bad) in complaint() and "--skip-bad-images" in complaint()
    data = load("--skip-bad-images")
    assert list(data.skipped) == [str(bad)] and len(data.tests["dark"]) == 29 and str(bad) not in data.tests["dark"].images
    bad.write_bytes(good)
    (tree / "classnames.txt").write_text("red_square Red Square\n")
    assert "classnames.txt" in complaint() and "TAB" in complaint()
    (tree / "classnames.txt").write_text("red_square\tscarlet tile\n")
    assert load().classnames == ["blue square", "green square", "scarlet tile"]
    (tree / "templates.txt").write_text("a photo of a\n")
    assert "templates.txt" in complaint()
    for template in ("a {{}} photo", "a photo {x} of {}"):
        (tree / "templates.txt").write_text(template)
        assert "templates.txt" in complaint()
    (tree / "templates.txt").write_bytes("un caf\xe9 {}".encode("latin-1"))
    assert "not UTF-8" in complaint()
    (tree / "templates.txt").write_text("\ufeffa sign of a {}.", encoding="utf-8")
    assert load().templates == ["a sign of a {}."]
    (tree / "templates.txt").unlink()
    for file in (tree / "train" / "red_square").iterdir():
        file.write_text("no image")
    with pytest.raises(common.Fail, match="no readable training image of class 'scarlet tile'"):
        load("--skip-bad-images")
    (tree / "test").rename(tree / "tset")
    assert str(tree / "test") in complaint()


def test_grey_images_of_16_bits_keep_their_light(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = np.asarray(common.ImageSet.read(tmp_path / "deep.png"))
    assert pixels.shape == (8, 8, 3) and (pixels[..., 1] == values // 256).all()


def test_results_and_logs_are_plain_json(tmp_path, tiny_vit):
    results = run("lipsum_ft.py", "--model", tiny_vit, "--steps", 2, "--tests", "test,neon", "--lam", 0, "--out",
                  tmp_path / "r")
    assert results["method"] == "lipsum_ft" and [r["name"] for r in results["rows"]] == ["zero-shot", "fine-tuned"]
    row = results["rows"][1]
    assert row["id"] == row["tests"]["test"]["acc"] and row["ood"] == row["tests"]["neon"]["acc"]
    lines = [json.loads(x) for x in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [0, 1] and {"loss", "ce", "lr", "images_per_s"} <= lines[0].keys()
