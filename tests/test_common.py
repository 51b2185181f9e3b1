"""common.py: heads, metrics, choices, schedule, order, images, flags, files of a run."""
import importlib
import json
import math
import os
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision import transforms

import common
from tests.conftest import (
    CONFIG,
    METHODS,
    SCRIPTS,
    TEXT,
    args_of,
    complaint,
    data_flags,
    here,
    log_of,
    printed,
    write_tree,
)


def image_set(labels, **how):
    """An ImageSet of paths that are not read."""
    return common.ImageSet("t", [f"{i}.jpg" for i in range(len(labels))], labels, **how)


def names_of(images):
    return [os.fsdecode(path) for path in images.images]


# ------------------------------------ Heads and texts ------------------------------------


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
        theirs = open_clip.build_zero_shot_classifier(clip, tokenizer, names, templates)
        want = clip.logit_scale.exp() * clip.encode_image(x, normalize=True) @ theirs
        s = clip.logit_scale.exp().item()
        unit = common.ImageClassifier(clip.visual, W, s)
        folded = common.ImageClassifier(clip.visual, s * W, bias=True)
        for model in (unit, folded):
            logits, features = model(x)
            assert (logits - want).abs().max() <= 1e-4 * s
            assert (features.norm(dim=1) - 1).abs().max() <= 1e-6
    # The template of most tokens is not that of most letters; only it exceeds the 77 positions.
    templates = ["an extraordinarily photorealistic {}", "a b c d e f g h i j k l m n {}"]
    common.zero_shot_head(clip, tokenizer, ["x " * 60], templates)
    with pytest.raises(common.Fail, match="longer than the 77 tokens"):
        common.zero_shot_head(clip, tokenizer, ["x " * 62], templates)


@pytest.mark.parametrize("custom", [False, True])
def test_encode_texts_equals_open_clip_at_all_77_positions(tiny_vit, custom):
    clip = open_clip.create_model(tiny_vit, force_custom_text=custom).eval()
    assert hasattr(clip, "text") == custom
    random = torch.Generator().manual_seed(0)
    for lengths in ([1, 4, 9], [20] * 3, [75, 2, 40]):  # ids between SOT and EOT
        tokens = torch.zeros(len(lengths), 77, dtype=torch.long)
        for row, n in zip(tokens, lengths):
            ids = torch.randint(1, 49406, (n,), generator=random)
            row[:n + 2] = torch.cat([torch.tensor([49406]), ids, torch.tensor([49407])])
        with torch.no_grad():
            want = clip.encode_text(tokens, normalize=True)
            for given in (tokens, tokens[:, :max(lengths) + 2]):  # padded, and cut at the last EOT
                assert (common.encode_texts(clip, given) - want).abs().max() <= 1e-6
        assert (want[0] - want[1]).abs().max() > 1e-3  # the texts do differ
    with pytest.raises(ValueError, match="78 tokens for a text tower of 77"):
        common.encode_texts(clip, torch.zeros(1, 78, dtype=torch.long))


@pytest.mark.parametrize("change", [
    dict(no_causal_mask=True), dict(pool_type="last"), dict(pool_type="eos", eos_id=49407)])
def test_a_tower_that_needs_its_full_context_gets_it(tiny_vit, change):
    torch.manual_seed(0)
    clip = open_clip.CustomTextCLIP(**{**CONFIG, "text_cfg": {**TEXT, **change}}).eval()
    tokens = open_clip.get_tokenizer(tiny_vit)(["a cat", "a photo of a dog"])
    with torch.no_grad():
        want = F.normalize(clip.encode_text(tokens), dim=-1)
        assert (common.encode_texts(clip, tokens) - want).abs().max() <= 1e-6
    with pytest.raises(ValueError, match="10 tokens for a text tower of 77"):
        common.encode_texts(clip, tokens[:, :10])


# ------------------------------------ Metrics and choices ------------------------------------


def test_calibration_error_against_a_loop():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4) * 0.5, size=500)
    probs[0] = [1, 0, 0, 0]
    guesses = rng.integers(4, size=500)
    labels = np.where(probs.max(1) < 0.6, probs.argmax(1), guesses)  # gaps of both signs
    want = 0.0
    for b in range(15):
        inside = [i for i in range(500) if b / 15 < probs[i].max() <= (b + 1) / 15]
        if inside:
            accuracy = sum(probs[i].argmax() == labels[i] for i in inside) / len(inside)
            confidence = sum(probs[i].max() for i in inside) / len(inside)
            want += len(inside) / 500 * abs(accuracy - confidence)
    confidence, predicted = torch.tensor(probs).max(dim=1)
    got = common.calibration_error(confidence, predicted == torch.tensor(labels))
    assert got == pytest.approx(want, abs=1e-9)
    border = common.calibration_error(torch.tensor([0.5, 0.9]), torch.tensor([True, False]), bins=2)
    assert border == pytest.approx((0.5 + 0.9) / 2)  # 0.5 belongs to the lower bin
    sure = torch.full((4,), 0.75)  # three of four right
    assert common.calibration_error(sure, torch.tensor([True, True, True, False])) == 0


def test_metrics_of_hand_worked_logits():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    scores = common.image_scores(logits + 7, torch.tensor([0, 2]))
    assert scores.dtype == torch.double
    for row, want in zip(scores.T, ([0.5, 0.8], [0, 1], [math.log(2), math.log(10)])):
        assert row.tolist() == pytest.approx(want)
    m = common.metrics(scores, image_set([0, 2]))
    assert m["acc"] == 50 and m["n"] == 2
    assert m["nll"] == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2)
    assert m["ece"] == pytest.approx(100 * (0.5 * abs(1 - 0.5) + 0.5 * abs(0 - 0.8)))
    broken = common.image_scores(torch.full((2, 3), math.nan), torch.tensor([0, 2]))
    with pytest.raises(common.Fail, match="not numbers"):
        common.metrics(broken, image_set([0, 2]))


def test_projection_takes_the_largest_logit_of_a_label():
    logits = torch.tensor([[1.0, 5.0, 2.0, 9.0]])
    images = image_set([0], classes=[[2], [0, 1]])
    assert images.project(logits).tolist() == [[2.0, 5.0]]
    assert image_set([0]).project(logits) is logits


def test_log_probabilities_and_their_scores_are_exact():
    p = torch.tensor([[0.25, 0.75], [1.0, 0.0]]).double()
    log_p = common.log_probabilities(p)
    assert log_p[0].tolist() == [math.log(0.25), math.log(0.75)]
    assert log_p[1].tolist() == [0.0, math.log(2.0 ** -1022)]  # the smallest positive double
    nll = common.image_scores(log_p, torch.tensor([0, 1]))[:, 2]
    assert nll.tolist() == pytest.approx([math.log(4), 1022 * math.log(2)], rel=1e-12)


def test_the_choice_on_held_out_images_by_hand():
    assert common.choose([80.0, 88.0, 89.5, 90.0, 85.0], [0.0, 0.3, 0.6, 0.9, 1.0]) == 3
    assert common.choose([90, 90, 90], [0.0, 0.4, 0.9]) == 1  # of equals the nearest to 0.5
    assert common.choose([90, 90, 89], [1.0, 0.2, 0.5]) == 1


def test_rows_of_one_number_an_image_stay_as_they_are(tiny_vit):
    pixels = np.random.default_rng(0).integers(256, size=(260, 32, 32, 3), dtype=np.uint8)
    images = common.ImageSet("t", pixels, np.arange(260) % 3)
    images.prepare(PreprocessCfg(size=32))

    def rows(x, project):
        return {"logits": x[:, :, 0, 0], "mean": x.mean(dim=(1, 2, 3))}
    setup = SimpleNamespace(args=SimpleNamespace(workers=0))
    found = common.evaluate(rows, setup, {"t": images})
    x = images.normalized(torch.tensor(pixels).permute(0, 3, 1, 2))
    assert torch.allclose(found["mean"]["t"], x.mean(dim=(1, 2, 3)))
    right = (x[:, :, 0, 0].argmax(1) == images.labels).double().mean().item()
    assert found["logits"]["t"]["acc"] == pytest.approx(100 * right)


# ------------------------------------ Steps, order, images ------------------------------------


def test_schedule():
    def at(t):
        return common.learning_rate(t, 110, 1.0, 10)
    assert [at(0), at(9), at(10), at(60)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    assert 0 < at(109) < 1e-3
    assert common.learning_rate(0, 100, 3.0, 0.0) == 3.0
    assert common.learning_rate(4, 100, 1.0, 0.1) == pytest.approx(0.5)


def test_stream_is_epochs_end_to_end_whatever_the_split(monkeypatch):
    def batches(n, accum, world, first=0, last=6):
        """[images of each step over all ranks and parts], [images of each part over all ranks]"""
        parts = [[] for _ in range((last - first) * accum)]
        for rank in range(world):
            monkeypatch.setattr(common, "RANK", rank)
            monkeypatch.setattr(common, "WORLD", world)
            args = SimpleNamespace(batch_size=8, accum=accum, seed=3)
            own = list(common.shuffled_epochs(n, args, first, last))
            assert {len(b) for b in own} == {8 // accum // world}
            for part, batch in zip(parts, own, strict=True):
                part += batch
        steps = [sum(parts[t:t + accum], []) for t in range(0, len(parts), accum)]
        return [sorted(step) for step in steps], [sorted(part) for part in parts]
    whole, _ = batches(10, 1, 1)
    assert whole == batches(10, 2, 2)[0] == batches(10, 2, 1)[0] == batches(10, 1, 4)[0]
    assert batches(10, 2, 1)[1] == batches(10, 2, 2)[1]  # a part, too, is the same on any ranks
    assert whole[2:] == batches(10, 1, 1, first=2)[0]
    seen = [i for b in whole for i in b]
    assert len(seen) == 48
    for epoch in range(4):
        assert sorted(i for e, i in seen if e == epoch) == list(range(10))
    args = SimpleNamespace(batch_size=10, accum=1, seed=3)
    monkeypatch.setattr(common, "RANK", 0)
    monkeypatch.setattr(common, "WORLD", 1)
    orders = [[i for _, i in batch] for batch in common.shuffled_epochs(10, args, 0, 3)]
    assert len({tuple(order) for order in [*orders, range(10)]}) == 4  # shuffled anew each epoch
    args.seed = 4
    assert [i for _, i in next(common.shuffled_epochs(10, args, 0, 1))] != orders[0]


def by_hand(augment, mean, std):
    """torchvision's own steps for a PIL image of any size, with 32 x 32 pixels at the end."""
    bicubic = transforms.InterpolationMode.BICUBIC
    crop = {"none": [transforms.Resize(32, bicubic), transforms.CenterCrop(32)],
            "crop": [transforms.RandomResizedCrop(32, (0.9, 1.0), interpolation=bicubic)],
            "crop-flip": [transforms.RandomHorizontalFlip(),
                          transforms.RandomResizedCrop(32, (0.08, 1.0), interpolation=bicubic)]}
    return transforms.Compose([*crop[augment], transforms.ToTensor(),
                               transforms.Normalize(mean, std)])


@pytest.mark.parametrize("augment", ["none", "crop", "crop-flip"])
def test_images_are_those_of_open_clip_s_transform(augment):
    preprocess = PreprocessCfg(size=32)
    ours, images = common.image_transform(preprocess, augment), image_set([0])
    images.prepare(preprocess)
    wants = [by_hand(augment, preprocess.mean, preprocess.std)]
    if augment != "crop-flip":  # open_clip's has no flip
        scale = {"scale": (0.9, 1.0)} if augment == "crop" else None
        wants.append(image_transform_v2(preprocess, augment == "crop", scale))
    rng, seen = np.random.default_rng(0), []
    for seed, size in enumerate([(40, 60), (32, 32), (90, 33), (20, 25)]):
        image = Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8))
        torch.manual_seed(seed)
        pixels = ours(image)
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 32, 32)
        got = images.normalized(pixels[None])[0]
        for want in wants:
            torch.manual_seed(seed)  # the same draws
            assert (got - want(image)).abs().max() <= 1e-6
        torch.manual_seed(seed + 100)
        seen.append(torch.equal(ours(image), pixels))
    assert all(seen) == (augment == "none")  # the others do draw


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    pixels = np.random.default_rng(0).integers(256, size=(4, 40, 40, 3), dtype=np.uint8)
    pixels[1:] = pixels[0]  # four times the same image
    images = common.ImageSet("train", pixels, [0] * 4)
    images.prepare(PreprocessCfg(size=32))
    draws = images.augmented("crop-flip", 5)
    x = draws[(2, 1)][0]
    torch.rand(7)  # what others draw does not matter, and is not disturbed
    state = torch.get_rng_state()
    assert torch.equal(draws[(2, 1)][0], x) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draws[(3, 1)][0], x) and not torch.equal(draws[(2, 3)][0], x)
    assert not torch.equal(images.augmented("crop-flip", 6)[(2, 1)][0], x)
    assert torch.equal(images[1][0], images.augmented("none", 5)[(2, 1)][0])
    assert torch.equal(images[1][0], images[3][0])  # the set itself is as it was


def test_every_group_of_an_optimizer_is_scheduled_and_all_are_clipped_together(tmp_path):
    """A second group once kept its first rate and was not clipped."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss_fn(forward, batch):
        return 100 * forward(batch.images).square().sum(), {}
    batch = common.Batch(torch.randn(5, 3), None, None, 0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    common.optimizer_step(model, loss_fn, [batch], optimizer, scaler, 1.0)
    moved = {name: (before[name] - p) / (0.5 if name[0] == "0" else 0.1)
             for name, p in model.named_parameters()}
    assert sum(g.square().sum() for g in moved.values()).sqrt().item() == pytest.approx(1, abs=1e-4)

    args = SimpleNamespace(steps=4, batch_size=2, accum=1, lr=0.1, wd=0.0, warmup=0.0, seed=0,
                           augment="none", keep="last", save_every=9, workers=0, grad_clip=0,
                           finetuned="", grad_checkpointing=False, compile=False)
    images = common.ImageSet("train", np.zeros((4, 8, 8, 3), np.uint8), [0] * 4)
    images.prepare(PreprocessCfg(size=8))
    data = SimpleNamespace(train=images, val=[])
    setup = SimpleNamespace(args=args, data=data, amp=None, out=tmp_path)
    rates = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "make_optimizer", lambda m, a: torch.optim.SGD(
            [{"params": m.a, "lr": 0.5}, {"params": m.b}], lr=0.1))
        step = common.optimizer_step

        def recorded(runner, loss_fn, parts, optimizer, *rest):
            rates.append([group["lr"] for group in optimizer.param_groups])
            return step(runner, loss_fn, parts, optimizer, *rest)
        patch.setattr(common, "optimizer_step", recorded)
        model = torch.nn.Module()
        model.a, model.b = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
        trained = common.train(model, lambda m, b: ((m.a * m.b).sum(), {}), setup)
    factors = [(1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]
    assert np.allclose(rates, [[0.5 * f, 0.1 * f] for f in factors])
    assert model.a == model.b == 1 != trained.a  # train() leaves what it is given as it is


def test_frozen_parts_stay_as_they_are(tiny_resnet):
    """BatchNorm included, whose statistics move in train mode."""
    visual = open_clip.create_model(tiny_resnet).visual
    model = common.ImageClassifier(visual, torch.randn(3, 32))
    args = SimpleNamespace(finetuned="", grad_checkpointing=False, compile=False)
    for frozen, moves in ((("visual.",), False), ((), True)):
        copied, runner = common.trainable(model, args, frozen)
        assert copied.training and runner is copied
        before = copied.visual.bn1.running_mean.clone()
        copied(torch.randn(4, 3, 32, 32))[0].sum().backward()
        assert torch.equal(copied.visual.bn1.running_mean, before) != moves
        assert (copied.visual.conv1.weight.grad is None) != moves
        assert copied.head.grad is not None and model.head.grad is None


def test_a_broken_or_strange_file_is_named(tmp_path, monkeypatch):
    Image.effect_noise((300, 300), 50).convert("RGB").save(tmp_path / "good.jpg")
    good = (tmp_path / "good.jpg").read_bytes()
    for name, content in {"header.jpg": good[:100], "pixels.jpg": good[:-2000], "empty.jpg": b"",
                          "text.jpg": b"<html>404</html>"}.items():
        (tmp_path / name).write_bytes(content)
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "int.tif")
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tif")
    Image.new("RGB", (1, 30_000)).save(tmp_path / "line.png")
    files = sorted(path for path in tmp_path.iterdir() if path.name != "good.jpg")
    images = common.ImageSet("t", [tmp_path / "good.jpg", *files], [0] * (len(files) + 1))
    images.prepare(PreprocessCfg(size=32))
    assert images[0][0].shape == (3, 32, 32) and len(files) == 8
    for i, file in enumerate(files, 1):
        with pytest.raises(common.Fail) as error:
            images[i]
        assert str(error.value).startswith(f"{file}: cannot be read"), file
        assert "\n" not in str(error.value)
    for raised in (RuntimeError("decoder"), MemoryError(), KeyError("x")):  # by decoders
        monkeypatch.setattr(common, "read_image", mock.Mock(side_effect=raised))
        with pytest.raises(common.Fail, match="good.jpg: cannot be read as an image"):
            images[0]


def test_holdout_and_shots_are_balanced_and_disjoint():
    labels = np.repeat([0, 1, 2], [10, 20, 5])
    train = image_set(labels)
    kept, held = common.hold_out(train, 0.2)
    mine, others = set(names_of(kept)), set(names_of(held))
    assert np.bincount(held.labels).tolist() == [2, 4, 1] and not mine & others
    assert mine | others == set(names_of(train))
    for part in (kept, held):  # an image keeps its label
        numbers = [int(name.removesuffix(".jpg")) for name in names_of(part)]
        assert labels[numbers].tolist() == part.labels.tolist()

    def few(seed):
        return common.sample_classes(train, seed, lambda n: 3).tolist()
    assert np.bincount(labels[few(1)]).tolist() == [3, 3, 3]
    assert few(1) == few(1) != few(2)
    _, held = common.hold_out(train, 0.95)
    assert np.bincount(held.labels).tolist() == [9, 19, 4]  # a class keeps one image
    _, held = common.hold_out(train, 0.5, most=4)
    assert np.bincount(held.labels).tolist() == [4, 4, 2]


# ------------------------------------ Flags and recipes ------------------------------------


def test_few_shots_have_no_warm_up_and_hold_out_at_most_4_images_a_class(base):
    for data, flags, warmup in ((base, [], 0.1), (base, ["--shots", 4], 0),
                                (["--data", "imagenet"], [], 500),
                                (["--data", "imagenet"], ["--shots", 4], 0),
                                (base, ["--shots", 4, "--warmup", 0.2], 0.2)):
        assert args_of("wise_ft.py", *data, *flags).warmup == warmup
    for shots, share, want in ((1, 0.5, 1), (3, 0.5, 3), (8, 0.5, 4), (3, 0.1, 2), (0, 0.5, 10)):
        args = args_of("lipsum_ft.py", *base, "--shots", shots, "--holdout", share)
        data = common.load_data(args)
        assert np.bincount(data.val.labels).tolist() == [want] * 3, shots
        assert np.bincount(data.train.labels).tolist() == [shots or 20 - want] * 3
        assert not set(data.val.images.tolist()) & set(data.train.images.tolist())


def test_parts_and_warm_up_fit_the_steps(monkeypatch):
    data = SimpleNamespace(train=range(100), val=[])
    args = SimpleNamespace(finetuned="", batch_size=8, accum=4, steps=40, epochs=None,
                           warmup=500.0, keep="last")

    def check(ranks=1, **changes):
        monkeypatch.setattr(common, "WORLD", ranks)
        common.check_steps(SimpleNamespace(**{**vars(args), **changes}), data)
    for changes, said in ((dict(batch_size=10), "--batch-size 10: .* 4 --accum"),
                          (dict(), "--warmup 500"), (dict(ranks=3), "3 ranks"),
                          (dict(warmup=40.0), "would not end"),
                          (dict(warmup=0.0, keep="best"), "--keep best")):
        with pytest.raises(common.Fail, match=said):
            check(**changes)
    for steps, warmup in ((40, 4.0), (40, 39.0), (40, 0.99), (1, 0.1), (5, 0.0)):
        check(steps=steps, warmup=warmup)


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_values_of_the_recipe(method):
    def shown(*flags):
        text = printed(f"{method}.py", *flags, "--help")
        return " ".join(text[text.index("\noptions:"):].split())
    imagenet, shapes = shown("--data", "imagenet"), shown()
    assert "--lr" in shown("--finetuned", "a run", "--predict", "images")
    recipe = importlib.import_module(method).RECIPES["imagenet"]
    assert f"peak learning rate of AdamW (default: {recipe['lr']})" in imagenet
    assert f"--accum parts (default: {recipe['batch_size']})" in imagenet
    assert "at most 4 a class (default: 0.02)" in imagenet
    assert "--accum parts (default: 64)" in shapes and "(default: shapes-clip)" in shapes


def test_a_method_must_give_every_flag_a_value_and_every_key_a_flag(monkeypatch):
    """What a new method may forget is said at its first run."""
    def run(recipe, flag=None, data="shapes"):
        monkeypatch.setattr("sys.argv", ["new.py", "--data", data])
        p = common.parser("")
        if flag:
            p.add("--mu", *flag, type=float)
        return common.parse(p, "new", {"shapes": recipe})
    good = {"batch_size": 64}
    assert run(good, (0.5, "")).mu == 0.5 and run({**good, "mu": 2.0}, (None, "")).mu == 2
    for recipe, flag in ((good, (None, "")), ({**good, "momentum": 1}, None)):
        with pytest.raises(common.Fail, match="mu|momentum"):
            run(recipe, flag)
    with pytest.raises(common.Fail, match="cifar10"):
        run(good, data="cifar10")


def test_a_flag_that_a_method_does_not_use_is_refused():
    args = SimpleNamespace(method="new", predict="somewhere", finetuned="a run")
    with pytest.raises(common.Fail, match="--predict"):
        common.start(args, None)
    with pytest.raises(common.Fail, match="--finetuned"):
        common.trainable(torch.nn.Linear(2, 2), args, ())


# ------------------------------------ Files ------------------------------------


def test_log_goes_on_where_the_checkpoint_does(tmp_path):
    lines = [json.dumps({"step": i}) + "\n" for i in range(5)]
    cut = '{"step": 5, "lo'  # a line cut off by a kill
    path = tmp_path / "log.jsonl"
    path.write_text("".join(lines) + cut)
    log = common.open_log(path, sum(map(len, lines[:3])))
    assert path.read_text() == "".join(lines[:3])
    log.write("next\n")
    assert path.read_text().splitlines()[3:] == ["next"]
    path.unlink()  # one that was lost is not filled with zeros
    common.open_log(path, 100).write("new\n")
    assert path.read_text() == "new\n"


def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path):
    log = common.open_log(tmp_path / "log.jsonl", 0)
    unread = [({"step": i}, {"loss": torch.tensor(x)}) for i, x in enumerate([1.0, math.inf, 2.0])]
    with pytest.raises(common.Fail, match="step 1: the loss is inf; lower --lr"):
        common.write_log(log, unread)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 0, "loss": 1.0}\n'


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_good_one(tmp_path, monkeypatch):
    def parts():
        model = torch.nn.Linear(2, 2)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()),
                "scaler": torch.amp.GradScaler("cpu", enabled=False)}
    path, mine = tmp_path / "last.ckpt", parts()
    assert common.load_checkpoint(path, mine) is None
    common.save_checkpoint(path, mine, (3, {"accuracy": 50.0}, 7))
    before = {name: x.clone() for name, x in mine["model"].state_dict().items()}

    def full_disk(_, file):
        (tmp_path / "last.ckpt.tmp").write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    mine["model"].weight.data.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(common.Fail, match="last.ckpt: could not be written"):
            common.save_checkpoint(path, mine, (4, {}, 9))
    mine["model"].weight.data.fill_(math.nan)
    with pytest.raises(common.Fail, match="not finite"):
        common.save_checkpoint(path, mine, (5, {}, 9))
    again = parts()
    assert common.load_checkpoint(path, again) == (3, {"accuracy": 50.0}, 7)
    assert all(torch.equal(again["model"].state_dict()[name], before[name]) for name in before)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(common.Fail, match="last.ckpt: cannot be read .*remove it"):
        common.load_checkpoint(path, again)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_moments_of_a_gpu_go_on_anywhere(tmp_path, monkeypatch, layout):
    """A GPU's AdamW is fused, reads moments by the layout of their parameter, and both are
    channels_last there; on a CPU parameters are not, and it must not stay fused."""
    monkeypatch.setattr(common, "CUDA", layout == torch.channels_last)

    def parts(layout=torch.channels_last):
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 8, 3).to(memory_format=layout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        return {"model": model, "optimizer": optimizer}

    def step(run, seed):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        run["model"](x).square().sum().backward()
        run["optimizer"].step()
        run["optimizer"].zero_grad()
    whole, again = parts(), parts(layout)
    for seed in range(2):
        step(whole, seed)
    common.save_checkpoint(tmp_path / "last.ckpt", whole, (2, {}, 0))
    common.load_checkpoint(tmp_path / "last.ckpt", again)
    for run in (whole, again):
        step(run, 2)
    torch.testing.assert_close(again["model"].weight, whole["model"].weight)


def test_results_and_logs_are_plain_json(tmp_path, tiny_vit):
    tree, out = write_tree(tmp_path / "tree", train=6, test=3), tmp_path / "r"
    shutil.rmtree(tree / "shifts")  # without a shift OOD is no number, and JSON has no NaN
    here("lipsum_ft.py", *data_flags(tree, tiny_vit), "--steps", 22, "--batch-size", 4, "--lam", 0,
         "--out", out)
    results = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["args"]["method"] == "lipsum_ft"
    assert [r["name"] for r in results["rows"]] == ["zero-shot", "fine-tuned"]
    row = results["rows"][1]
    assert row["id"] == row["tests"]["test"]["acc"] and row["ood"] is None
    for step, line in enumerate(log_of(out, "loss")):
        assert line.keys() == {"step", "lr", "loss", "ce"} and line["step"] == step
        assert line["lr"] == pytest.approx(common.learning_rate(step, 22, 1e-5, 0.1))
    assert step == 21  # also those after the last 20
    held_out = [line["step"] for line in log_of(out, "held_out_acc")]
    assert held_out == [4, 8, 12, 15, 19, 22]  # 15 images an epoch, 4 a step


def test_run_folders_are_numbered_and_nothing_is_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = SimpleNamespace(resume="", finetuned="", out="", method="vrf", data="shapes", seed=3)
    assert [common.run_folder(args).name for _ in range(3)] == [
        "vrf-shapes-s3", "vrf-shapes-s3-2", "vrf-shapes-s3-3"]
    args.finetuned = "runs/wise_ft-shapes-s0"
    assert common.run_folder(args).name == "vrf-of-wise_ft-shapes-s0"
    args.out = "mine"
    assert common.run_folder(args).name == "mine"
    assert "mine: is not empty" in complaint("vrf.py", "--out", "mine")


def test_saved_files_are_readable_like_any_other(tmp_path):
    common.save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    (tmp_path / "b").write_text("")
    modes = {(tmp_path / name).stat().st_mode for name in ("a.safetensors", "b")}
    assert len(modes) == 1


def test_mistakes_in_flags_are_one_line_and_leave_nothing(tmp_path, tree, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("all my work")
    data = base[:4]
    cases = [("--data", "cifar11"), ("--bogus", 1), ("--lra", 1), ("--lr", -1), ("--lr", "nan"),
             ("--lr", "inf"), ("--lr", "fast"), ("--wd", -0.1), ("--epochs", 0), ("--steps", 0),
             ("--steps", 1.5), ("--batch-size", 0), ("--accum", 0), ("--warmup", -1),
             ("--grad-clip", -1), ("--holdout", 1), ("--shots", -1), ("--shots", 99),
             ("--workers", -2), ("--seed", -1), ("--lam", -1), ("--texts", 0), ("--text-length", 0),
             ("--augment", "mixup"), ("--freeze", "all"), ("--precision", "int8"),
             ("--precision", "fp16"), ("--limit", -5), ("--tests", "night"), ("--save-every", -1),
             ("--keep", "all"), ("--out", "taken"), ("--resume", "taken"), ("--resume", "gone"),
             ("--finetuned", "gone"), ("--predict", tree),
             ("--model", "ViT-B-17"), ("--model", "local-dir:nowhere"), ("--data-dir", "nowhere"),
             ("--model", "hf-hub:nobody/nothing"), ("--pretrained", "openai")]
    for flag, value in cases:
        line = complaint("lipsum_ft.py", *base, "--out", "new", flag, value)
        assert flag in line or str(value) in line, (flag, value, line)
        assert not (tmp_path / "new").exists(), flag
    for script, flags, words in [
            ("lipsum_ft.py", [*data, "--steps", 5, "--epochs", 1], "--epochs"),
            ("lipsum_ft.py", ["--data-dir", tree], "--data"),
            ("lipsum_ft.py", [*data, "--model", "ViT-B-32", "--pretrained", "openia"], "openia"),
            ("lipsum_ft.py", [*base, "--text-length", 99], "--text-length"),
            ("wise_ft.py", ["--alphas", 0, 1.5], "--alphas"),
            ("wise_ft.py", ["--alpha", -1], "--alpha"),
            ("wise_ft.py", ["--alpha", 0.3, "--select"], "--alpha"),
            ("wise_ft.py", [*data, "--select", "--holdout", 0], "--select"),
            ("vrf.py", [*data, "--holdout", 0], "--holdout"),
            ("vrf.py", ["--a", 1], "--a"), ("vrf.py", ["--b", -1], "--b"),
            ("vrf.py", ["--k", -1], "--k"), ("vrf.py", ["--k", 3, "--k-rule", "paper"], "--k"),
            *((script, ["--predict", tree], "--finetuned") for script in SCRIPTS)]:
        assert words in complaint(script, *flags, "--out", "new2"), flags
    assert not (tmp_path / "new2").exists()
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "all my work"
