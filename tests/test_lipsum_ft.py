"""lipsum_ft.py against naive float64 loops, padded encoding, and what holds at theta = theta_0."""
import json
import os
import signal
import subprocess
import time

import numpy as np
import open_clip
import pytest
import torch
from conftest import COLOURS, command, complaint, printed, run, write_tree
from PIL import Image

import common
import lipsum_ft


def test_regularizer_and_energy_gap_are_the_written_out_sums():
    rng = np.random.default_rng(0)
    B, M, D, s = 5, 7, 16, 100.0
    f, f0, g = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(3, 16, D)))
    gap = r = 0.0
    for b in range(B):
        for m in range(M):
            d = sum(s * g[m][k] * f[b][k] for k in range(D)) - sum(s * g[m][k] * f0[b][k]
                                                                   for k in range(D))
            gap += d * d / (B * M)          # Eq. (6): mean over images and texts
            r += d * d / (2 * M) / B        # Eq. (7): 1/(2M) squared norm, mean over the batch
    v, v0 = (torch.tensor(s * x[:B] @ g[:M].T, dtype=torch.float32) for x in (f, f0))
    assert lipsum_ft.lipsum_regularizer(v, v0).item() == pytest.approx(r, rel=1e-5)
    assert lipsum_ft.energy_gap(v, v0).item() == pytest.approx(gap, rel=1e-5)
    # 25/4
    assert lipsum_ft.lipsum_regularizer(torch.tensor([[3.0, 0.0]]),
                                        torch.tensor([[0.0, 4.0]])).item() == 6.25


def test_random_tokens_are_framed_uniform_and_reproducible():
    t = lipsum_ft.random_tokens(4000, 8, 49406, 49407, torch.Generator().manual_seed(1))
    assert t.shape == (4000, 10) and (t[:, 0] == 49406).all() and (t[:, -1] == 49407).all()
    ids = t[:, 1:-1].double()
    assert ids.min() >= 0 and ids.max() < 49406 and ids.min() < 20 and ids.max() > 49385
    assert ids.mean().item() == pytest.approx(49405 / 2, rel=0.01)  # sd of the mean: 80
    assert torch.equal(t, lipsum_ft.random_tokens(4000, 8, 49406, 49407,
                                                  torch.Generator().manual_seed(1)))
    assert not torch.equal(t, lipsum_ft.random_tokens(4000, 8, 49406, 49407,
                                                      torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("custom", [False, True])
def test_encode_texts_equals_padded_encoding(tiny_vit, custom):
    clip = open_clip.create_model(tiny_vit, force_custom_text=custom).eval()
    if custom:  # random weights of its own: only the comparison below counts
        assert hasattr(clip, "text")
    t = lipsum_ft.random_tokens(6, 8, 49406, 49407, torch.Generator().manual_seed(0))
    padded = torch.zeros(6, 77, dtype=torch.long)
    padded[:, :10] = t
    with torch.no_grad():
        want, got = clip.encode_text(padded, normalize=True), common.encode_texts(clip, t)
    assert (want - got).abs().max() <= 1e-5
    assert (want[0] - want[1]).abs().max() > 1e-3  # the texts do differ
    with pytest.raises(ValueError, match="context length"):
        common.encode_texts(clip, torch.zeros(1, 78, dtype=torch.long))


def test_at_theta_0_the_regularizer_and_its_gradient_vanish(tiny_vit):
    clip = open_clip.create_model(tiny_vit).eval()
    tokenizer = open_clip.get_tokenizer(tiny_vit)
    head = common.zero_shot_head(clip, tokenizer, ["a", "b", "c"], ["a photo of a {}"])
    models = [common.ImageClassifier(open_clip.create_model(tiny_vit).eval().visual, head, 100.0)
              for _ in range(2)]
    batch = common.Batch(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]),
                         torch.tensor([3, 0, 5, 1]), 3)
    loss, parts = lipsum_ft.make_loss(clip, models[0], tokenizer, 1.0, 80, 8, 0)(models[1], batch)
    assert parts["lipsum"].item() < 1e-9 and loss.item() == pytest.approx(parts["ce"].item())
    norms = [sum(g.square().sum() for g in torch.autograd.grad(part,
                                                               list(models[1].visual.parameters()),
                                                               retain_graph=True)).sqrt()
                                                               for part in parts.values()]
    assert norms[1] < 1e-4 * norms[0]  # 0 but for the rounding of s (v - v0)
    loss.backward()
    assert all(p.grad is None for p in [*models[0].parameters(), *clip.parameters()])
    with torch.no_grad():
        models[1].visual.proj.mul_(1 + 0.1 * torch.rand_like(models[1].visual.proj))
    total, parts = lipsum_ft.make_loss(clip, models[0], tokenizer, 2.0, 80, 8, 0)(models[1], batch)
    assert parts["lipsum"] > 1e-3
    assert total.item() == pytest.approx(parts["ce"].item() + 2 * parts["lipsum"].item())
    features_0 = torch.zeros(6, 32)  # of the whole training set: image 3 is the batch's first
    features_0[batch.index] = models[0](batch.images)[1].detach()
    known = lipsum_ft.make_loss(clip, models[0], tokenizer, 2.0, 80, 8, 0, features_0)
    assert known(models[1], batch)[0].item() == pytest.approx(total.item(), rel=1e-5)


def test_killed_run_resumes_bit_for_bit(tmp_path, tiny_vit):
    flags = ["--model", tiny_vit, "--steps", "30", "--batch-size", "8", "--limit", "200",
             "--no-baseline", "--save-every", "0", "--augment", "crop-flip", "--accum", "2",
             "--workers", "0"]
    run("lipsum_ft.py", *flags, "--out", tmp_path / "whole")  # all with one thread
    process = subprocess.Popen(command("lipsum_ft.py", *flags, "--out", tmp_path / "killed"),
                               stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / "killed" / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "results.json").exists()
    run("lipsum_ft.py", "--resume", tmp_path / "killed")
    for name in ("open_clip_model.safetensors", "head.safetensors"):
        want, got = (common.load_tensors(tmp_path / d / name)[0] for d in ("whole", "killed"))
        assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want), name
    steps = [line.split(",")[0] for line in log.read_text().splitlines()]
    assert steps == [f'{{"step": {i}' for i in range(30)]
    message = complaint("lipsum_ft.py", "--resume", tmp_path / "killed", "--lr", "1")
    assert "--lr" in message and "started with" in message


def here(script, *flags):
    """results.json of a method run in this process."""
    printed(script, *flags, "--workers", 0)
    out = flags[flags.index("--out") + 1]
    return json.loads((out / "results.json").read_text())


def test_own_folder_of_jpegs_and_reload_with_open_clip(tmp_path, tiny_vit):
    tree = write_tree(tmp_path / "tree", train=60, test=20)  # 300 images
    results = here("lipsum_ft.py", "--data", "folder", "--data-dir", tree, "--model", tiny_vit,
                   "--epochs", 4, "--lr", 1e-3, "--baseline", "--alpha", 0.5,
                   "--out", tmp_path / "out")
    rows = {r["name"]: r for r in results["rows"]}
    assert list(rows) == ["zero-shot", "fine-tuned", "Lipsum-FT", "Lipsum-FT + WiSE 0.5"]
    assert set(rows["zero-shot"]["tests"]) == {"test", "dark"}
    assert rows["zero-shot"]["tests"]["dark"]["n"] == 60
    assert rows["fine-tuned"]["id"] == 100.0 > rows["zero-shot"]["id"]

    out = tmp_path / "out"
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    head, about = common.load_tensors(out / "head.safetensors")
    assert about["classnames"] == ["blue square", "green square", "red square"]
    files = sorted((tree / "test").rglob("*.jpg"))
    x = torch.stack([preprocess(Image.open(file).convert("RGB")) for file in files])
    y = torch.tensor([sorted(COLOURS).index(file.parent.name) for file in files])
    with torch.no_grad():
        features = model.eval().encode_image(x, normalize=True)
    accuracy = ((features @ head["head"].T).argmax(1) == y).double().mean().item()
    assert 100 * accuracy == rows["Lipsum-FT"]["id"]
    # the run brings its data
    again = here("lipsum_ft.py", "--finetuned", out, "--out", tmp_path / "again")
    assert again["rows"][1]["tests"] == rows["Lipsum-FT"]["tests"]
    here("wise_ft.py", "--finetuned", out, "--alphas", 1, "--out", tmp_path / "w")
    mixed = here("lipsum_ft.py", "--finetuned", tmp_path / "w", "--alpha", 0.5,
                 "--out", tmp_path / "m")
    assert [r["name"] for r in mixed["rows"]] == ["zero-shot", "fine-tuned",
                                                  "fine-tuned + WiSE 0.5"]
    assert again["rows"][1]["name"] == "Lipsum-FT"
    argv = ["--finetuned", str(out), "--out", str(tmp_path / "third")]
    args = common.parse(common.parser(""), "lipsum_ft", lipsum_ft.RECIPES, argv=argv)
    theta_0, theta_1 = common.load_finetuned(common.start(args))
    with torch.no_grad():
        assert (theta_1(x)[1] - features).abs().max() <= 1e-5
        assert (theta_0(x)[1] - features).abs().max() > 1e-3
