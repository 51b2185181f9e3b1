"""What enters is checked once, for all methods: weights, runs that find other things, texts.

Each test is a kind of mistake from public reports that was silent, or told of something else.
"""
import json
import shutil
from types import SimpleNamespace

import open_clip
import pytest
import torch
from safetensors.torch import load_file

import common
from tests.conftest import TEXT, complaint, printed, save_clip, save_tensors, write_tree

SCRIPTS = ["wise_ft.py", "lipsum_ft.py", "vrf.py", "drm.py"]
NAMES = ["blue square", "green square", "red square"]
VISION = dict(image_size=32, patch_size=8, width=64, head_width=32, layers=1)
CONFIG = dict(embed_dim=32, vision_cfg=VISION, text_cfg={**TEXT, "layers": 1})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tree with descriptions, a CLIP, flags for both, and the CLIP's state dict."""
    tmp = tmp_path_factory.mktemp("doors")
    tree = write_tree(tmp / "tree", train=15, test=3)
    told = {name: f"a plate of {name[:-7]}" for name in NAMES}
    (tree / "descriptions.json").write_text(json.dumps(told))
    model = save_clip(tmp / "clip", CONFIG)
    state = load_file(tmp / "clip" / "open_clip_model.safetensors")
    base = ["--data", "folder", "--data-dir", tree, "--model", model, "--workers", 0]
    return SimpleNamespace(tree=tree, model=model, state=state, base=base)


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
        rows = []
        for file in ("wise.pt", "ours.pt"):
            out = tmp_path / file[:4]
            printed(script, *world.base, "--finetuned", tmp_path / file, "--out", out)
            results = json.loads((out / "results.json").read_text())
            rows.append([row["tests"] for row in results["rows"]])
        assert rows[0] == rows[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_belongs_to_weights_is_compared(world, tmp_path, script):
    for part, change in (("preprocess_cfg", {"mean": [0.5, 0.5, 0.5]}),
                         ("preprocess_cfg", {"interpolation": "bilinear"}),
                         ("preprocess_cfg", {"resize_mode": "squash"}),
                         ("model_cfg", {"quick_gelu": True})):
        folder = tmp_path / "folder"
        shutil.copytree(world.model[10:], folder)
        config = json.loads((folder / "open_clip_config.json").read_text())
        config[part] |= change
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        assert next(iter(change)) in refused(script, world, folder, tmp_path / "new")
        shutil.rmtree(folder)
    line = complaint(script, *world.base, "--pretrained", "openai", "--out", tmp_path / "new")
    assert "--pretrained openai" in line


def test_weights_of_another_activation_are_an_error(monkeypatch):
    """open_clip warns; accuracy is lost silently."""
    def downloaded(*_, **__):
        raise FileNotFoundError("asked for the weights")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: "weights.pt")
    monkeypatch.setattr(open_clip.factory, "load_checkpoint", downloaded)
    for name, words in (("ViT-B-32", "QuickGELU mismatch"), ("ViT-B-32-quickgelu", "asked for")):
        with pytest.raises(common.Fail, match=words):
            common.load_clip(SimpleNamespace(model=name, pretrained=""))


def test_a_file_that_is_called_like_a_tag_is_not_taken_for_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").touch()
    asked = []

    def create(name, pretrained, **how):
        asked.append((pretrained, how["require_pretrained"]))
        raise RuntimeError("enough")
    monkeypatch.setattr(open_clip, "create_model", create)
    for args in (SimpleNamespace(model="ViT-B-32-quickgelu", pretrained=""),
                 SimpleNamespace(model="local-dir:clip", pretrained="")):
        with pytest.raises(common.Fail, match="enough"):
            common.load_clip(args)
    assert asked == [("openai", True), (None, True)]


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
    config = {**CONFIG, "vision_cfg": {**VISION, "output_tokens": True}}
    tokens = save_clip(tmp_path / "tokens", config)
    save_tensors(tmp_path / "tokens" / "open_clip_model.safetensors", world.state)
    rows = []
    for model, out in ((world.model, "a"), (tokens, "b")):
        printed("wise_ft.py", *world.base[:4], "--model", model, "--steps", 3, "--workers", 0,
                "--out", tmp_path / out)
        results = json.loads((tmp_path / out / "results.json").read_text())
        rows.append([row["tests"] for row in results["rows"]])
        text = printed("wise_ft.py", "--finetuned", tmp_path / out, "--predict",
                       world.tree / "test", "--workers", 0)
        assert len(text.splitlines()) == 10
    assert rows[0] == rows[1]


# ------------------------------------ Resumed runs ------------------------------------


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run whose training is over, on a tree of its own."""
    tmp = tmp_path_factory.mktemp("finished")
    tree = shutil.copytree(world.tree, tmp / "tree")
    (tree / "templates.txt").write_text("a photo of a {}.\n")
    printed("lipsum_ft.py", "--data", "folder", "--data-dir", tree, "--model", world.model,
            "--steps", 2, "--workers", 0, "--no-baseline", "--out", tmp / "run")
    return tmp


def rename(tree, old, new):
    for split in ("train", "test", "shifts/dark"):
        (tree / split / old).rename(tree / split / new)


def swap(tree):
    rename(tree, "red_square", "x")
    rename(tree, "blue_square", "red_square")
    rename(tree, "x", "blue_square")


CHANGES = {
    "class names": lambda tree: rename(tree, "red_square", "zebra"),
    "train images": lambda tree: (tree / "train/red_square/001.jpg").rename(
        tree / "train/red_square/999.jpg"),
    "texts": lambda tree: (tree / "templates.txt").write_text("art of a {}.\n"),
    "val images": lambda tree: (tree / "train/red_square/003.jpg").unlink(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_resumed_run_must_find_what_it_found(finished, tmp_path, what):
    """A renamed class once gave 0.00 in the place of 100.00."""
    shutil.copytree(finished, tmp_path / "moved")
    run, tree = tmp_path / "moved" / "run", tmp_path / "moved" / "tree"
    flags = ["lipsum_ft.py", "--resume", run, "--data-dir", tree]  # moved data go on
    printed(*flags, "--precision", "auto")
    CHANGES[what](tree)
    line = complaint(*flags)
    assert what in line and "not as the run found them" in line


def test_a_resumed_run_computes_as_it_did(finished, tmp_path):
    """Also where `auto` is another precision on another machine."""
    resume = ["--resume", finished / "run"]
    assert "--precision" in complaint("lipsum_ft.py", *resume, "--precision", "bf16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "tower_precision", lambda args: torch.bfloat16)
        assert "found them: precision" in complaint("lipsum_ft.py", *resume)


def test_other_held_out_images_than_those_of_the_run_are_said(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "moved")
    run, tree = tmp_path / "moved" / "run", tmp_path / "moved" / "tree"
    flags = ["wise_ft.py", "--finetuned", run, "--data-dir", tree, "--alphas", 1, "--workers", 0]
    assert "warning" not in printed(*flags, "--out", tmp_path / "a")
    for image in list((tree / "train" / "red_square").iterdir())[:5]:
        image.unlink()
    text = printed(*flags, "--out", tmp_path / "b")
    assert "found them: train images, val images; it may" in text
    for flag, value in (("--holdout", 0.5), ("--limit", 9), ("--model", "ViT-B-32"),
                        ("--data", "shapes"), ("--seed", 5)):
        assert flag in complaint(*flags, flag, value, "--out", tmp_path / "c")


def test_the_weights_that_a_run_starts_from_are_found_again(finished, world, tmp_path):
    """A local-dir model that is made anew has the same name, and gave another theta_0."""
    weights = world.model.removeprefix("local-dir:") + "/open_clip_model.safetensors"
    resume = ["lipsum_ft.py", "--resume", finished / "run"]
    again = ["wise_ft.py", "--finetuned", finished / "run", "--alphas", 1, "--workers", 0]
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
    line = complaint(script, "--predict", world.tree, "--finetuned", tmp_path, "--lr", 1)
    assert "--lr" in line and "nothing is trained" in line
    line = complaint(script, *world.base, "--finetuned", tmp_path / "x.pt", "--steps", 5, "--wd", 0)
    assert "--steps, --wd: would do nothing" in line
    line = complaint(script, "--pretrained", "laion2b", "--out", tmp_path / "new")
    assert "--pretrained laion2b" in line and "shapes-clip" in line


@pytest.mark.parametrize("fault", ["torn", "key", "missing"])
def test_a_broken_local_dir_is_one_line(world, tmp_path, fault):
    folder = shutil.copytree(world.model.removeprefix("local-dir:"), tmp_path / "m")
    weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    told = json.loads(config.read_text())
    if fault == "torn":
        weights.write_bytes(weights.read_bytes()[:99])
    elif fault == "key":
        told["model_cfg"]["vision_cfg"]["colour"] = 1
    else:
        state = {name: x for name, x in world.state.items() if name != "ln_final.bias"}
        save_tensors(weights, state)
    config.write_text(json.dumps(told))
    line = complaint("wise_ft.py", *world.base[:4], "--model", f"local-dir:{folder}", "--out",
                     tmp_path / "new")
    assert "--model local-dir:" in line and "--pretrained" not in line
    assert fault != "missing" or "ln_final.bias" in line


def test_args_that_were_edited_are_one_line(finished, tmp_path):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    args = json.loads((run / "args.json").read_text())
    for text, words in (("[]", "args.json"), ('{"method": "lips', "args.json"),
                        (json.dumps({**args, "lr": "fast"}), "--lr"),
                        (json.dumps({**args, "batch_size": -4}), "--batch-size"),
                        (json.dumps({**args, "method": "vrf"}), "method")):
        (run / "args.json").write_text(text)
        for flags in (["--resume", run], ["--finetuned", run, "--out", tmp_path / "new"]):
            if flags[0] == "--resume" or text[-1:] != "}":
                assert words in complaint("lipsum_ft.py", *flags), text


# ------------------------------------ Texts, workers ------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_texts_that_would_be_cut_are_refused(world, tmp_path, script):
    """Two names that are equal up to the context's end gave one row of the head."""
    tree = shutil.copytree(world.tree, tmp_path / "tree")
    long = "a very long name that goes on " * 12
    (tree / "classnames.txt").write_text(f"red_square\t{long}red\nblue_square\t{long}blue\n")
    told = {f"{long}red": "a", f"{long}blue": "b", "green square": "c"}
    (tree / "descriptions.json").write_text(json.dumps(told))
    line = complaint(script, "--data", "folder", "--data-dir", tree, "--model", world.model,
                     "--steps", 1, "--out", tmp_path / "new")
    assert "longer than the 77 tokens" in line and "a very long name" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_that_are_one_text_to_the_tokenizer_are_refused(world, tmp_path, script):
    """The second of them was never predicted."""
    tree = shutil.copytree(world.tree, tmp_path / "tree")
    (tree / "classnames.txt").write_text("red_square\tsame\nblue_square\tSAME\n")
    told = {"same": "a", "SAME": "b", "green square": "c"}
    (tree / "descriptions.json").write_text(json.dumps(told))
    line = complaint(script, "--data", "folder", "--data-dir", tree, "--model", world.model,
                     "--steps", 1, "--out", tmp_path / "new")
    assert "one text to the tokenizer" in line and "SAME" in line


def test_workers_are_those_cores_that_the_process_may_use(monkeypatch, world):
    """taskset, Slurm and containers leave a process fewer than the machine has."""
    monkeypatch.setattr(common.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5})
    images = common.ImageSet("t", ["a.jpg"], [0])
    assert common.image_loader(images, [[0]], -1).num_workers == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert common.image_loader(images, [[0]], -1).num_workers == 1
    assert common.image_loader(images, [[0]], 3).num_workers == 3
    in_memory = common.ImageSet("t", torch.zeros(1, 8, 8, 3).byte().numpy(), [0])
    assert common.image_loader(in_memory, [[0]], -1).num_workers == 0
