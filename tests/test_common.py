"""common.py: heads, metrics, schedule, data order, images, atomic files, flags and recipes."""
import json
import math
import re
import time
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import complaint, printed
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision import transforms

import common
import drm
import lipsum_ft
import vrf
import wise_ft

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
    with pytest.raises(ValueError, match="78 tokens exceed the context length 77"):
        common.encode_texts(clip, torch.zeros(1, 78, dtype=torch.long))


@pytest.mark.parametrize("change", [dict(no_causal_mask=True), dict(pool_type="last")])
def test_a_tower_that_needs_its_full_context_gets_it(tiny_vit, change):
    cfg = json.loads(open(tiny_vit[10:] + "/open_clip_config.json").read())["model_cfg"]
    torch.manual_seed(0)
    clip = open_clip.CustomTextCLIP(**{**cfg, "text_cfg": {**cfg["text_cfg"], **change}}).eval()
    tokens = open_clip.get_tokenizer(tiny_vit)(["a cat", "a photo of a dog"])
    with torch.no_grad():
        want = F.normalize(clip.encode_text(tokens), dim=-1)
        assert (common.encode_texts(clip, tokens) - want).abs().max() <= 1e-6
    with pytest.raises(ValueError, match="not causal"):
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
    got = common.expected_calibration_error(torch.tensor(probs), torch.tensor(labels))
    assert got == pytest.approx(want, abs=1e-9)
    border = common.calibration_error(torch.tensor([0.5, 0.9]), torch.tensor([True, False]), bins=2)
    assert border == pytest.approx((0.5 + 0.9) / 2)  # 0.5 belongs to the lower bin
    sure = torch.tensor([[0.75, 0.25]] * 4)  # three of four right at confidence 0.75
    assert common.expected_calibration_error(sure, torch.tensor([0, 0, 0, 1])) == 0


def test_metrics_of_hand_worked_logits():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    scores = common.image_scores(logits + 7, torch.tensor([0, 2]))
    assert scores.confidence.tolist() == pytest.approx([0.5, 0.8])
    assert scores.predicted.tolist() == [0, 1]
    assert scores.nll.tolist() == pytest.approx([math.log(2), math.log(10)])
    assert scores.nll.dtype == scores.confidence.dtype == torch.double
    m = common.metrics(scores, common.ImageSet("t", None, [0, 2]))
    assert m["acc"] == 50 and m["n"] == 2
    assert m["nll"] == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2)
    assert m["ece"] == pytest.approx(100 * (0.5 * abs(1 - 0.5) + 0.5 * abs(0 - 0.8)))


def test_projection_takes_the_largest_logit_of_a_label():
    logits = torch.tensor([[1.0, 5.0, 2.0, 9.0]])
    assert common.ImageSet("t", None, [0], [[2], [0, 1]]).project(logits).tolist() == [[2.0, 5.0]]
    assert common.ImageSet("t", None, [0]).project(logits) is logits


def test_log_mixture_against_a_loop():
    rng = np.random.default_rng(0)
    a, b, w = rng.normal(0, 4, (6, 5)), rng.normal(0, 4, (6, 5)), rng.random(6)
    w[:2] = 0, 1
    got = common.log_mixture(torch.tensor(a), torch.tensor(b), torch.tensor(w))
    one = common.log_mixture(torch.tensor(a), torch.tensor(b), 0.3)
    for i in range(6):
        p = [math.exp(z) / sum(math.exp(other) for other in a[i]) for z in a[i]]
        q = [math.exp(z) / sum(math.exp(other) for other in b[i]) for z in b[i]]
        for c in range(5):
            want = math.log(w[i] * p[c] + (1 - w[i]) * q[c])
            assert got[i, c].item() == pytest.approx(want, abs=1e-12)
            want = math.log(0.3 * p[c] + 0.7 * q[c])
            assert one[i, c].item() == pytest.approx(want, abs=1e-12)


def test_log_mixture_of_very_unlike_logits_is_exact():
    sure, other = torch.tensor([[100.0, 0.0]]), torch.tensor([[1000.0, 0.0]])
    wrong = torch.tensor([1])
    for weight, want in ((1, 100.0), (0, 1000.0), (0.5, 100 + math.log(2))):  # e^-1000 is nothing
        nll = common.image_scores(common.log_mixture(sure, other, weight), wrong).nll
        assert nll.item() == pytest.approx(want, rel=1e-12), weight  # a clamped log gives 69.08
    masked = torch.tensor([[0.0, -math.inf]])
    assert common.log_mixture(masked, masked, 0.5).tolist() == [[0.0, -math.inf]]


def test_the_choice_on_held_out_images_by_hand():
    accuracy, weight = [80.0, 88.0, 89.5, 90.0, 85.0], [0.0, 0.3, 0.6, 0.9, 1.0]
    # One standard error of 90% on 100 images is 3 points, on 3600 it is 0.5, on 10,000 it is 0.3.
    assert common.choose(accuracy, weight, 100) == 2     # 0.6 is nearest 0.5 of 88, 89.5 and 90
    assert common.choose(accuracy, weight, 3600) == 2    # 89.5 lies on the border
    assert common.choose(accuracy, weight, 10_000) == 3  # 90 alone
    assert common.choose(accuracy, weight, 100, "best") == 3
    assert common.choose([90, 90, 90], [0.0, 0.4, 0.9], 50, "best") == 1
    assert common.choose([90, 90, 90], [1.0, 0.0, 0.7], 50, "one-se") == 2
    assert common.choose([100, 99], [1.0, 0.5], 10) == 0  # at 100% the standard error is 0


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
            sampler = common.ShuffledEpochs(n, args, first, last)
            own = list(sampler)
            assert len(sampler) == len(own) and {len(b) for b in own} == {8 // accum // world}
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
    orders = [[i for _, i in batch] for batch in common.ShuffledEpochs(10, args, 0, 3)]
    assert len({tuple(order) for order in [*orders, range(10)]}) == 4  # shuffled anew each epoch
    args.seed = 4
    assert [i for _, i in next(iter(common.ShuffledEpochs(10, args, 0, 1)))] != orders[0]


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
    ours = common.image_transform(preprocess, augment)
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
        got = common.normalized(pixels[None], preprocess)[0]
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


def test_grey_images_of_16_bits_keep_their_light(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = np.asarray(common.read_image(tmp_path / "deep.png"))
    assert pixels.shape == (8, 8, 3) and (pixels[..., 1] == values // 256).all()


def test_a_broken_file_is_named(tmp_path):
    Image.effect_noise((300, 300), 50).convert("RGB").save(tmp_path / "good.jpg")
    good = (tmp_path / "good.jpg").read_bytes()
    assert common.read_image(tmp_path / "good.jpg").size == (300, 300)
    cuts = {"header": good[:100], "pixels": good[:-2000], "empty": b"", "text": b"<html>404</html>"}
    for name, content in cuts.items():
        bad = tmp_path / f"{name}.jpg"
        bad.write_bytes(content)
        with pytest.raises(common.BrokenImage) as error:
            common.read_image(bad)
        assert str(bad) in str(error.value) and "\n" not in str(error.value), name


def test_holdout_and_shots_are_balanced_and_disjoint():
    labels = np.repeat([0, 1, 2], [10, 20, 5])
    train = common.ImageSet("train", common.file_paths([f"{i}.jpg" for i in range(35)]), labels)
    kept, held = common.hold_out(train, 0.2)
    mine, others = set(kept.images.tolist()), set(held.images.tolist())
    assert np.bincount(held.labels).tolist() == [2, 4, 1] and not mine & others
    assert mine | others == set(train.images.tolist())
    for part in (kept, held):  # an image keeps its label
        numbers = [int(part.describe(i).removesuffix(".jpg")) for i in range(len(part))]
        assert labels[numbers].tolist() == part.labels.tolist()
    few = common.few_shot(train, 3, seed=1)
    assert np.bincount(few.labels).tolist() == [3, 3, 3]
    assert (few.images == common.few_shot(train, 3, 1).images).all()
    assert (few.images != common.few_shot(train, 3, 2).images).any()
    with pytest.raises(common.Fail, match="class 2"):
        common.few_shot(train, 6, 0)
    _, held = common.hold_out(train, 0.9)
    assert np.bincount(held.labels).tolist() == [9, 18, 4]  # a class keeps one image
    _, held = common.hold_out(train, 0.5, most=4)
    assert np.bincount(held.labels).tolist() == [4, 4, 2]


# ------------------------------------ Flags and recipes ------------------------------------


def args_of(method, *flags):
    """The flags of a method as its get_args() makes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"{method.__name__}.py", *map(str, flags)])
        return method.get_args()


def test_few_shots_have_no_warm_up_and_hold_out_at_most_4_images_a_class(tree):
    flags = ["--data", "folder", "--data-dir", tree]
    assert args_of(lipsum_ft, *flags).warmup == 0.1
    assert args_of(lipsum_ft, *flags, "--shots", 4).warmup == 0
    assert args_of(wise_ft, "--data", "imagenet").warmup == 500
    assert args_of(wise_ft, "--data", "imagenet", "--shots", 4).warmup == 0
    assert args_of(lipsum_ft, *flags, "--shots", 4, "--warmup", 0.2).warmup == 0.2
    for shots, share, want in ((1, 0.5, 1), (3, 0.5, 3), (8, 0.5, 4), (3, 0.1, 2), (0, 0.5, 10)):
        args = args_of(lipsum_ft, *flags, "--shots", shots, "--holdout", share)
        data = common.load_data(args)
        assert np.bincount(data.val.labels).tolist() == [want] * 3, shots
        assert np.bincount(data.train.labels).tolist() == [shots or 20 - want] * 3
        assert not set(data.val.images.tolist()) & set(data.train.images.tolist())


def test_names_of_other_tools_are_understood():
    args = args_of(wise_ft, "--data", "imagenet", "--model", "ViT-B/16")
    assert args.model == "ViT-B-16-quickgelu"
    for theirs, ours in (("amp_bf16", "bf16"), ("amp", "fp16"), ("fp32", "fp32")):
        assert args_of(wise_ft, "--precision", theirs).precision == ours


def test_the_value_that_an_error_names_does_fit(monkeypatch):
    args = SimpleNamespace(finetuned="none", batch_size=10, accum=4, steps=40, epochs=None,
                           warmup=500.0)
    for world, fitting in ((1, 8), (2, 8), (3, 12)):
        monkeypatch.setattr(common, "WORLD", world)
        args.batch_size = 10
        words = f"multiple of the {world} ranks x 4 --accum parts; {fitting} is"
        with pytest.raises(common.Fail, match=words):
            common.check_steps(args, 100)
        args.batch_size = fitting
        words = "--warmup 500: .* of 40 steps; --warmup 4 is a tenth"
        with pytest.raises(common.Fail, match=words):
            common.check_steps(args, 100)
    for steps, warmup in ((40, 4.0), (40, 39.0), (40, 0.99), (1, 0.1), (5, 0.0)):
        args.steps, args.warmup = steps, warmup
        common.check_steps(args, 100)
    for warmup in (40.0, 41.0):
        args.steps, args.warmup = 40, warmup
        with pytest.raises(common.Fail, match="would not end"):
            common.check_steps(args, 100)


@pytest.mark.parametrize("method, own", [(wise_ft, "--alphas"), (lipsum_ft, "--texts"),
                                         (vrf, "--k-rule"), (drm, "--tau")])
def test_help_lists_own_flags_first_with_the_recipe_s_values(method, own):
    def shown(*flags):
        text = printed(f"{method.__name__}.py", *flags, "--help")
        options = text[text.index("\nflags of this method"):]
        assert options.index(f"\n  {own} ") < options.index("flags of all methods")
        assert options.index("flags of all methods") < options.index("\n  --data ")
        found = {}
        for entry in re.split(r"\n  (?=--)", options)[1:]:
            default = re.search(r"\(default: (.*?)\)(\s|$)", " ".join(entry.split()))
            found[entry.split()[0].rstrip(",")] = default[1]
        return found
    imagenet, shapes = shown("--data", "imagenet"), shown()
    for flag, key in (("--lr", "lr"), ("--batch-size", "batch_size"), ("--augment", "augment"),
                      ("--wd", "wd"), ("--warmup", "warmup"), ("--holdout", "holdout")):
        assert imagenet[flag] == str(method.RECIPES["imagenet"][key]), flag
    assert imagenet["--holdout"] == "0.02" and shapes["--holdout"] == "0.1"
    assert imagenet["--batch-size"] != shapes["--batch-size"] == "64"
    assert shapes["--model"] == "shapes-clip" and imagenet["--model"] == "ViT-B-16-quickgelu"


# ------------------------------------ Files ------------------------------------


def test_log_goes_on_where_the_checkpoint_does(tmp_path):
    lines = [json.dumps({"step": i}) for i in range(5)]
    cut = '\n{"step": 5, "lo'  # a line cut off by a kill
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + cut)
    with common.open_log(tmp_path / "log.jsonl", 3) as log:
        # A kill before the next write must not take the lines of the steps before.
        assert (tmp_path / "log.jsonl").read_text().splitlines() == lines[:3]
        log.write("next\n")
    assert (tmp_path / "log.jsonl").read_text().splitlines() == [*lines[:3], "next"]


def full_disk(path):
    """A function that writes half a file and then finds the disk full."""
    def write(*_, **__):
        path.with_name(path.name + ".tmp").write_bytes(b"half")
        raise OSError(28, "No space left on device")
    return write


def test_images_per_second_are_of_training_alone(tmp_path):
    args = SimpleNamespace(batch_size=100, save_every=10)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    batch = common.Batch(None, None, torch.arange(100), 0)
    with common.TrainingLog(tmp_path, 0, 1, None, args) as log:
        time.sleep(0.1)
        log.add(0, {"loss": torch.tensor(1.0)}, optimizer, [batch])
        log.pause()
        time.sleep(0.9)  # held-out images
        log.held_out(1, 50.0)
        log.read()
    assert 250 < log.rate <= 1000  # 100 images in 0.1 s, not in 1 s


def test_failed_write_keeps_the_last_good_file(tmp_path, monkeypatch):
    path = tmp_path / "head.safetensors"
    common.save_tensors(path, {"a": torch.ones(3)}, {"step": 1})
    monkeypatch.setattr(common, "save_file", full_disk(path))
    with pytest.raises(common.Fail, match="No space left"):
        common.save_tensors(path, {"a": torch.zeros(3)}, {"step": 2})
    tensors, about = common.load_tensors(path)
    assert tensors["a"].sum() == 3 and about == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_failed_checkpoint_keeps_the_last_good_one(tmp_path, monkeypatch):
    def parts():
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return model, torch.optim.AdamW(model.parameters()), scaler
    model, *others = parts()
    checkpoint = common.Checkpoint(tmp_path, model, *others, [9, 4, 7])
    assert checkpoint.load() == (0, {})  # nothing there yet
    checkpoint.save(3, {"accuracy": 50.0})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.weight.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk(checkpoint.path))
        with pytest.raises(common.Fail, match="No space left"):
            checkpoint.save(4, {})
    model.weight.data.fill_(math.nan)
    with pytest.raises(common.Fail, match="not finite"):
        checkpoint.save(5, {})
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    again, *others = parts()
    torch.nn.init.zeros_(again.weight)
    reader = common.Checkpoint(tmp_path, again, *others, [9, 4, 7])
    assert reader.load() == (3, {"accuracy": 50.0})
    assert all(torch.equal(again.state_dict()[name], before[name]) for name in before)


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, tree, tiny_vit, monkeypatch):
    """Flags, trees and checkpoints that are wrong, by the words that the message must hold."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("all my work")
    base = ["--data", "folder", "--model", tiny_vit, "--out", "new"]
    cases = [
        (["--data", "cifar11"], ["cifar11", "shapes"]),
        (["--model", "ViT-B-17"], ["ViT-B-17", "local-dir:", "did you mean ViT-B-1"]),
        (["--model", "ViT-B-32", "--pretrained", "openia"], ["openia", "laion2b_s34b_b79k"]),
        (["--model", "ViT-B-16", "--pretrained", "openai"], ["QuickGELU", "ViT-B-16-quickgelu"]),
        (["--model", "ViT-B-32-quickgelu"],
         ["ViT-B-32-quickgelu", "could not be loaded", "local-dir"]),
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
    for flags, words in cases:
        where = [] if "--data-dir" in flags else ["--data-dir", tree]
        message = complaint("lipsum_ft.py", *base, *where, *flags)
        assert all(str(w) in message for w in words), (flags, message)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "all my work"


def test_wrong_trees_are_named(tree):
    """Each change to a good tree is found and named; the change is taken back afterwards."""
    def load():
        return common.load_data(args_of(lipsum_ft, "--data", "folder", "--data-dir", tree))

    def complaint():
        with pytest.raises(common.Fail) as error:
            load()
        return str(error.value)
    load()
    (tree / "train" / "empty").mkdir()
    assert str(tree / "train" / "empty") in complaint()
    (tree / "train" / "empty").rmdir()
    (tree / "shifts" / "dark" / "unknown").mkdir()
    assert "unknown" in complaint() and "not a class" in complaint()
    (tree / "shifts" / "dark" / "unknown").rmdir()
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
    (tree / "test").rename(tree / "tset")
    assert str(tree / "test") in complaint()


def test_results_and_logs_are_plain_json(tmp_path, tiny_vit):
    printed("lipsum_ft.py", "--model", tiny_vit, "--steps", 22, "--batch-size", 4, "--limit", 60,
            "--tests", "test,neon", "--lam", 0, "--out", tmp_path / "r")
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert results["method"] == "lipsum_ft"
    assert [r["name"] for r in results["rows"]] == ["zero-shot", "fine-tuned"]
    row = results["rows"][1]
    assert row["id"] == row["tests"]["test"]["acc"] and row["ood"] == row["tests"]["neon"]["acc"]
    lines = [json.loads(x) for x in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(22))  # also those after the last 20
    assert all({"loss", "ce", "lr", "images_per_s"} <= line.keys() for line in lines)
    rates = [common.learning_rate(step, 22, 6e-4, 0.1) for step in range(22)]
    assert [x["lr"] for x in lines] == pytest.approx(rates)
