"""What enters is checked once, for all methods: weights, runs that find other things, texts.

Each test is a kind of mistake from public reports that was silent, or told of something else.
"""
import json
import shutil
from types import SimpleNamespace
from unittest import mock

import open_clip
import pytest
import torch
from safetensors.torch import load_file

import common
from tests.conftest import (
    CONFIG,
    SCRIPTS,
    VIT,
    complaint,
    data_flags,
    here,
    printed,
    save_clip,
    save_tensors,
    write_tree,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tree, a CLIP in a folder, flags for both, and the CLIP's state dict."""
    tmp = tmp_path_factory.mktemp("doors")
    tree = write_tree(tmp / "tree", train=15, test=3)
    base, folder = data_flags(tree, save_clip(tmp / "clip", CONFIG)), tmp / "clip"
    state = load_file(folder / "open_clip_model.safetensors")
    return SimpleNamespace(tree=tree, base=base, folder=folder, state=state)


def refused(script, world, path, out):
    line = complaint(script, *world.base, "--finetuned", path, "--out", out)
    assert str(path) in line and len(line.replace(str(path), "")) < 300, line
    assert not out.exists()
    return line


# ------------------------------------ Weights ------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_weights_are_taken_whole_or_not_at_all(world, tmp_path, script):
    """A tower with another text tower's head had 12.5 in the place of 97.9."""
    state, new = world.state, tmp_path / "new"
    visual = {name: x for name, x in state.items() if name.startswith("visual.")}
    for file, weights, names in [
            ("text.pt", {name if name in visual or name == "logit_scale" else f"text.{name}": x
                         for name, x in state.items()}, ["positional_embedding", "text."]),
            ("image.pt", visual, ["positional_embedding"]),
            ("adapter.pt", {**state, "visual.adapter.weight": torch.ones(3)}, ["adapter"]),
            ("size.pt", {**state, "visual.positional_embedding": torch.ones(50, 64)},
             ["visual.positional_embedding"]),
            ("nan.pt", {**state, "visual.proj": state["visual.proj"] * torch.nan},
             ["visual.proj", "not finite"]),
            ("inf.pt", {**state, "text_projection": state["text_projection"] * torch.inf},
             ["text_projection", "not finite"]),
            ("empty.pt", {}, [])]:
        torch.save(weights, tmp_path / file)
        line = refused(script, world, tmp_path / file, new)
        assert all(name in line for name in names), line
    if script != "drm.py":
        head = {"classification_head.weight": torch.randn(3, 32)}
        wise = {f"image_encoder.model.{name}": x for name, x in state.items()}
        for more, name in (({"image_encoder.adapter.weight": torch.ones(2)}, "adapter"),
                           ({"classification_head.weight": torch.randn(4, 32)}, "head"),
                           ({"image_encoder.model.visual.proj": torch.ones(2, 2)}, "visual.proj")):
            torch.save({**wise, **head, **more}, tmp_path / "wise.pt")
            assert name in refused(script, world, tmp_path / "wise.pt", new)
        torch.save({**wise, **head}, tmp_path / "wise.pt")  # a head without a bias
        torch.save({"head": head["classification_head.weight"], **visual}, tmp_path / "ours.pt")
        wise, ours = [here(script, *world.base, "--finetuned", tmp_path / f"{name}.pt", "--out",
                           tmp_path / name)["rows"] for name in ("wise", "ours")]
        assert wise == ours


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_belongs_to_weights_is_compared(world, tmp_path, script):
    shutil.copytree(world.folder, tmp_path / "folder")
    file = tmp_path / "folder" / "open_clip_config.json"
    good = file.read_text()
    for part, key, value in (("preprocess_cfg", "mean", [0.5, 0.5, 0.5]),
                             ("preprocess_cfg", "interpolation", "bilinear"),
                             ("preprocess_cfg", "resize_mode", "squash"),
                             ("model_cfg", "quick_gelu", True)):
        config = json.loads(good)
        config[part][key] = value
        file.write_text(json.dumps(config))
        assert key in refused(script, world, file.parent, tmp_path / "new")
    line = complaint(script, *world.base, "--pretrained", "openai", "--out", tmp_path / "new")
    assert "--pretrained openai" in line


def test_weights_of_another_activation_are_an_error(monkeypatch):
    """open_clip warns; accuracy is lost silently."""
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: "weights.pt")
    monkeypatch.setattr(open_clip.factory, "load_checkpoint",
                        mock.Mock(side_effect=FileNotFoundError("asked for the weights")))
    for name, words in (("ViT-B-32", "QuickGELU mismatch"), ("ViT-B-32-quickgelu", "asked for")):
        with pytest.raises(common.Fail, match=words):
            common.load_clip(SimpleNamespace(model=name, pretrained=""))


def test_a_file_that_is_called_like_a_tag_is_not_taken_for_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").touch()
    create = mock.Mock(side_effect=RuntimeError("enough"))
    monkeypatch.setattr(open_clip, "create_model", create)
    for model, tag in (("ViT-B-32-quickgelu", "openai"), ("local-dir:clip", None)):
        with pytest.raises(common.Fail, match="enough"):
            common.load_clip(SimpleNamespace(model=model, pretrained=""))
        create.assert_called_with(model, tag, device=common.DEVICE, require_pretrained=True)


def test_a_weights_file_of_a_named_model_comes_through_the_same_door(tmp_path):
    name = "ViT-S-32-alt"
    clip = open_clip.create_model(name)
    torch.save({"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}},
               tmp_path / "good.pt")
    torch.save({"visual.proj": torch.ones(1)}, tmp_path / "part.pt")
    args = SimpleNamespace(model=name, pretrained=str(tmp_path / "good.pt"))
    loaded = common.load_clip(args)[0].state_dict()
    assert all(torch.equal(x, loaded[k]) for k, x in clip.state_dict().items())
    args.pretrained = str(tmp_path / "part.pt")
    with pytest.raises(common.Fail, match="part.pt: Missing"):
        common.load_clip(args)


def test_an_image_tower_that_returns_its_tokens_too_gives_the_same_rows(world, tmp_path):
    """As CoCa's."""
    tokens = save_clip(tmp_path / "t", {**CONFIG, "vision_cfg": {**VIT, "output_tokens": True}})
    save_tensors(tmp_path / "t" / "open_clip_model.safetensors", world.state)
    rows = []
    for more, out in (([], tmp_path / "a"), (["--model", tokens], tmp_path / "b")):
        rows.append(here("wise_ft.py", *world.base, *more, "--steps", 3, "--out", out)["rows"])
        text = printed("wise_ft.py", "--finetuned", out, "--predict", world.tree / "test")
        assert len(text.splitlines()) == 10
    assert rows[0] == rows[1]


# ------------------------------------ Resumed runs ------------------------------------


@pytest.fixture(scope="module")
def once(world, tmp_path_factory):
    """A run whose training is over, on a tree of its own."""
    tmp = tmp_path_factory.mktemp("finished")
    tree = shutil.copytree(world.tree, tmp / "tree")
    (tree / "templates.txt").write_text("a photo of a {}.\n")
    printed("lipsum_ft.py", *world.base, "--data-dir", tree, "--steps", 2, "--no-baseline", "--out",
            tmp / "run")
    return tmp


@pytest.fixture
def finished(once, tmp_path):
    """A copy of it to change: (its tree, its run)."""
    shutil.copytree(once, tmp_path / "moved")
    return tmp_path / "moved" / "tree", tmp_path / "moved" / "run"


def rename(tree, old, new):
    for split in ("train", "test", "shifts/dark"):
        (tree / split / old).rename(tree / split / new)


CHANGES = {
    "class names": lambda tree: rename(tree, "red_square", "zebra"),
    "train images": lambda tree: (tree / "train/red_square/001.jpg").rename(
        tree / "train/red_square/999.jpg"),
    "texts": lambda tree: (tree / "templates.txt").write_text("art of a {}.\n"),
    "val images": lambda tree: (tree / "train/red_square/003.jpg").unlink(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_resumed_run_must_find_what_it_found(finished, what):
    """A renamed class once gave 0.00 in the place of 100.00."""
    tree, run = finished
    flags = ["lipsum_ft.py", "--resume", run, "--data-dir", tree]  # moved data go on
    printed(*flags, "--precision", "auto")
    CHANGES[what](tree)
    line = complaint(*flags)
    assert what in line and "not as the run found them" in line


def test_a_resumed_run_computes_as_it_did(once, monkeypatch):
    """Also where `auto` is another precision on another machine."""
    resume = ["--resume", once / "run"]
    assert "--precision" in complaint("lipsum_ft.py", *resume, "--precision", "bf16")
    monkeypatch.setattr(common, "tower_precision", lambda args: torch.bfloat16)
    assert "found them: precision" in complaint("lipsum_ft.py", *resume)


def test_other_held_out_images_than_those_of_the_run_are_said(finished, tmp_path):
    tree, run = finished
    flags = ["wise_ft.py", "--finetuned", run, "--data-dir", tree, "--alphas", 1]
    assert "warning" not in printed(*flags, "--out", tmp_path / "a")
    for image in list((tree / "train" / "red_square").iterdir())[:5]:
        image.unlink()
    text = printed(*flags, "--out", tmp_path / "b")
    assert "found them: train images, val images; it may" in text
    for flag, value in (("--holdout", 0.5), ("--limit", 9), ("--model", "ViT-B-32"),
                        ("--data", "shapes"), ("--seed", 5)):
        assert flag in complaint(*flags, flag, value, "--out", tmp_path / "c")


def test_the_weights_that_a_run_starts_from_are_found_again(once, world, tmp_path):
    """A local-dir model that is made anew has the same name, and gave another theta_0."""
    weights = world.folder / "open_clip_model.safetensors"
    resume = ["lipsum_ft.py", "--resume", once / "run"]
    again = ["wise_ft.py", "--finetuned", once / "run", "--alphas", 1]
    try:
        save_tensors(weights, {**world.state, "ln_final.bias": world.state["ln_final.bias"] + 1})
        assert "found them: starting weights" in complaint(*resume)
        assert "found them: starting weights" in printed(*again, "--out", tmp_path / "a")
    finally:
        save_tensors(weights, world.state)
    printed(*resume)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_torn_log_does_not_end_a_resumed_run(world, tmp_path, script):
    """A full disk cuts the log below what the checkpoint has; the figure read half a line."""
    out = tmp_path / "run"
    printed(script, *world.base, "--steps", 4, "--batch-size", 12, "--out", out)
    [log] = [p for p in out.rglob("log.jsonl") if "erm" not in p.parts]
    log.write_bytes(log.read_bytes()[:len(log.read_bytes()) // 3])
    assert not log.read_bytes().endswith(b"\n")
    printed(script, "--resume", out)
    assert all("step" in json.loads(line) for line in log.read_text().splitlines())


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_would_do_nothing_are_refused(world, tmp_path, script):
    for flags, words in (
            (["--predict", world.tree, "--finetuned", tmp_path, "--lr", 1], "--lr: would do"),
            ([*world.base, "--finetuned", "x.pt", "--steps", 5, "--wd", 0], "--steps, --wd: would"),
            (["--pretrained", "laion2b"], "--pretrained laion2b: --model shapes-clip")):
        assert words in complaint(script, *flags)


@pytest.mark.parametrize("fault", ["torn", "key", "missing"])
def test_a_broken_local_dir_is_one_line(world, tmp_path, fault):
    folder = shutil.copytree(world.folder, tmp_path / "m")
    weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    if fault == "torn":
        weights.write_bytes(weights.read_bytes()[:99])
    elif fault == "key":
        config.write_text(config.read_text().replace('"layers"', '"colour": 1, "layers"'))
    else:
        save_tensors(weights, {k: x for k, x in world.state.items() if k != "ln_final.bias"})
    line = complaint("wise_ft.py", *world.base, "--model", f"local-dir:{folder}", "--out",
                     tmp_path / "new")
    assert "--model local-dir:" in line and "--pretrained" not in line
    assert fault != "missing" or "ln_final.bias" in line


def test_args_that_were_edited_are_one_line(finished, tmp_path):
    _, run = finished
    args = json.loads((run / "args.json").read_text())
    for text, words in (("[]", "args.json"), ("{}", "args.json"), ('{"method": "lips', "args.json"),
                        (json.dumps({**args, "lr": "fast"}), "--lr"),
                        (json.dumps({**args, "batch_size": -4}), "--batch-size"),
                        (json.dumps({**args, "method": "vrf"}), "method")):
        (run / "args.json").write_text(text)
        for flags in (["--resume", run], ["--finetuned", run, "--out", tmp_path / "new"]):
            if flags[0] == "--resume" or text[-1:] != "}":
                assert words in complaint("lipsum_ft.py", *flags), text


# ------------------------------------ Texts, workers ------------------------------------


LONG = "a very long name that goes on " * 12


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("red, blue, words", [
    (f"{LONG}red", f"{LONG}blue", ["longer than the 77 tokens", "a very long name"]),
    ("same", "SAME", ["one text to the tokenizer", "SAME"])])
def test_names_that_are_one_text_to_the_text_tower_are_refused(world, tmp_path, script, red, blue,
                                                               words):
    """Two that are equal up to the context's end, or in lower case: one of them was never
    predicted."""
    tree = shutil.copytree(world.tree, tmp_path / "tree")
    (tree / "classnames.txt").write_text(f"red_square\t{red}\nblue_square\t{blue}\n")
    told = {red: "a", blue: "b", "green square": "c"}
    (tree / "descriptions.json").write_text(json.dumps(told))
    line = complaint(script, *world.base, "--data-dir", tree, "--steps", 1, "--out",
                     tmp_path / "new")
    assert all(word in line for word in words) and not (tmp_path / "new").exists()


def test_workers_are_those_cores_that_the_process_may_use(monkeypatch):
    """taskset, Slurm and containers leave a process fewer than the machine has."""
    monkeypatch.setattr(common.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5})
    images = common.ImageSet("t", ["a.jpg"], [0])
    assert common.image_loader(images, [[0]], -1).num_workers == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert common.image_loader(images, [[0]], -1).num_workers == 1
    assert common.image_loader(images, [[0]], 3).num_workers == 3
    in_memory = common.ImageSet("t", torch.zeros(1, 8, 8, 3).byte().numpy(), [0])
    assert common.image_loader(in_memory, [[0]], -1).num_workers == 0
