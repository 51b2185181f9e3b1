"""lipsum_ft.py against naive float64 loops, padded encoding, and what holds at theta = theta_0."""
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import common
import lipsum_ft
from tests.conftest import COLOURS, complaint, data_flags, here, rows_of, write_tree


def test_regularizer_and_energy_gap_are_the_written_out_sums():
    rng = np.random.default_rng(0)
    B, M, D, s = 5, 7, 16, 100.0
    f, f0, g = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(3, 16, D)))
    gap = r = 0.0
    for b in range(B):
        for m in range(M):
            d = s * g[m] @ (f[b] - f0[b])
            gap += d * d / (B * M)          # Eq. (6): mean over images and texts
            r += d * d / (2 * M) / B        # Eq. (7): 1/(2M) squared norm, mean over the batch
    v, v0 = (torch.tensor(s * x[:B] @ g[:M].T, dtype=torch.float32) for x in (f, f0))
    assert lipsum_ft.lipsum_regularizer(v, v0).item() == pytest.approx(r, rel=1e-5)
    assert lipsum_ft.energy_gap(v, v0).item() == pytest.approx(gap, rel=1e-5)
    by_hand = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert lipsum_ft.lipsum_regularizer(*by_hand).item() == 25 / 4
    far = torch.full((1, 80), 30.0, dtype=torch.float16)  # 80 x 30^2 is no fp16 number
    assert lipsum_ft.lipsum_regularizer(far, -far).item() == 60 ** 2 / 2


def test_random_tokens_are_framed_uniform_and_reproducible():
    def texts(seed):
        return lipsum_ft.random_tokens(4000, 8, 49406, 49407, torch.Generator().manual_seed(seed))
    t = texts(1)
    assert t.shape == (4000, 10) and (t[:, 0] == 49406).all() and (t[:, -1] == 49407).all()
    ids = t[:, 1:-1].double()
    assert ids.min() >= 0 and ids.max() < 49406 and ids.min() < 20 and ids.max() > 49385
    assert ids.mean().item() == pytest.approx(49405 / 2, rel=0.01)  # sd of the mean: 80
    assert torch.equal(t, texts(1)) and not torch.equal(t, texts(2))


def test_a_step_s_texts_depend_on_seed_and_step_alone(tiny_vit, monkeypatch):
    """Equal on all ranks and after a resume."""
    clip, seen = open_clip.create_model(tiny_vit).eval(), []
    head = torch.randn(3, 32)
    model = common.ImageClassifier(clip.visual, head)
    encode = common.encode_texts
    monkeypatch.setattr(common, "encode_texts", lambda m, t: seen.append(t) or encode(m, t))
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        loss_fn = lipsum_ft.make_loss(clip, model, open_clip.get_tokenizer(tiny_vit), 1.0, 5, 3,
                                      seed)
        torch.rand(3)
        loss_fn(model, common.Batch(x, y, None, step))
    assert torch.equal(seen[0], seen[3]) and seen[0].shape == (5, 5)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


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
    norms = []
    for part in parts.values():
        gradients = torch.autograd.grad(part, list(models[1].visual.parameters()),
                                        retain_graph=True)
        norms.append(sum(g.square().sum() for g in gradients).sqrt())
    assert norms[1] < 1e-4 * norms[0]  # 0 but for the rounding of s (v - v0)
    loss.backward()
    assert all(p.grad is None for p in [*models[0].parameters(), *clip.parameters()])
    with torch.no_grad():
        models[1].visual.proj.mul_(1 + 0.1 * torch.rand_like(models[1].visual.proj))
    total, parts = lipsum_ft.make_loss(clip, models[0], tokenizer, 2.0, 80, 8, 0)(models[1], batch)
    assert parts["lipsum"] > 1e-3
    assert total.item() == pytest.approx(parts["ce"].item() + 2 * parts["lipsum"].item())


def test_own_folder_of_jpegs_and_reload_with_open_clip(tmp_path, tiny_vit):
    tree, out = write_tree(tmp_path / "tree", train=60, test=20), tmp_path / "out"  # 300 images
    rows = rows_of(here("lipsum_ft.py", *data_flags(tree, tiny_vit), "--epochs", 4, "--lr", 1e-3,
                        "--baseline", "--out", out))
    assert list(rows) == ["zero-shot", "fine-tuned", "Lipsum-FT"]
    assert set(rows["zero-shot"]) == {"test", "dark"} and rows["zero-shot"]["dark"]["n"] == 60
    assert rows["fine-tuned"]["test"]["acc"] == 100.0 > rows["zero-shot"]["test"]["acc"]

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    head = load_file(out / "head.safetensors")
    files = sorted((tree / "test").rglob("*.jpg"))
    x = torch.stack([preprocess(Image.open(file).convert("RGB")) for file in files])
    y = torch.tensor([sorted(COLOURS).index(file.parent.name) for file in files])
    with torch.no_grad():
        features = model.eval().encode_image(x, normalize=True)
    accuracy = ((features @ head["head"].T).argmax(1) == y).double().mean().item()
    assert 100 * accuracy == rows["Lipsum-FT"]["test"]["acc"]
    # the run brings its data; WiSE-FT after Lipsum-FT is wise_ft.py's
    ends = {"zero-shot": rows["zero-shot"], "fine-tuned": rows["Lipsum-FT"]}
    again = here("lipsum_ft.py", "--finetuned", out, "--out", tmp_path / "again")
    assert rows_of(again) == ends
    between = here("wise_ft.py", "--finetuned", out, "--alphas", 0.5, "--out", tmp_path / "w")
    found = rows_of(between)
    assert found.pop("WiSE-FT 0.5") not in ends.values() and found == ends


def test_a_tokenizer_without_clips_ends_is_refused_before_the_first_step(base, tmp_path,
                                                                          monkeypatch):
    def foreign(name):  # as SigLIP's: a function of texts, without the ids of SOT and EOT
        clips = open_clip.SimpleTokenizer()
        return lambda texts, context_length=77: clips(texts, context_length)
    monkeypatch.setattr(open_clip, "get_tokenizer", foreign)
    line = complaint("lipsum_ft.py", *base, "--out", tmp_path / "run")
    assert "random texts" in line and "--model" in line and not (tmp_path / "run").exists()
