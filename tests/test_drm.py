"""drm.py against naive float64 loops, plain fine-tuning, and every way in which a description file can be wrong."""
import json
import math
import shutil

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

import common
import drm
from conftest import complaint, run, write_tree


def softmax(z):
    e = [math.exp(x - max(z)) for x in z]
    return [x / sum(e) for x in e]


def test_targets_loss_and_mixture_against_loops():
    rng = np.random.default_rng(0)
    N, C, D, s, lam, beta = 6, 4, 8, 11.0, 0.3, 0.7
    f0, w = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rng.normal(size=(N, D)), rng.normal(size=(C, D))))
    A = [[sum(f0[n][k] * w[c][k] for k in range(D)) for c in range(C)] for n in range(N)]
    plain = [softmax([s * a for a in row]) for row in A]
    low, high = ([f(A[n][c] for n in range(N)) for c in range(C)] for f in (min, max))
    mean_range = sum(high[c] - low[c] for c in range(C)) / C
    scaled = [softmax([s * (A[n][c] - low[c]) / (high[c] - low[c]) * mean_range for c in range(C)]) for n in range(N)]
    for affinity, want in (("softmax", plain), ("minmax", scaled)):
        p_c = drm.core_targets(torch.tensor(f0), torch.tensor(w), s, affinity)
        assert np.abs(p_c.numpy() - want).max() <= 1e-12 and (p_c.sum(1) - 1).abs().max() <= 1e-12
        span = tuple(torch.tensor(x) for x in (low, high))  # of all training images, for some of them
        some = drm.core_targets(torch.tensor(f0[:2]), torch.tensor(w), s, affinity, span)
        assert np.abs(some.numpy() - want[:2]).max() <= 1e-12

    df, cd, y = rng.normal(size=(N, C)), rng.normal(size=(N, C)), rng.integers(C, size=N)
    risk = kl = 0.0
    for n in range(N):
        p_df, p_cd = softmax(df[n]), softmax(cd[n])
        risk -= math.log(p_df[y[n]]) / N
        kl += sum(plain[n][c] * (math.log(plain[n][c]) - math.log(p_cd[c])) for c in range(C)) / N
    t = [torch.tensor(np.array(x)) for x in (df, cd, y, plain)]
    assert drm.worst_case_risk(t[1], t[3]).item() == pytest.approx(kl, rel=1e-10) and kl > 0
    assert drm.drm_loss(*t, lam).item() == pytest.approx(risk + lam * kl, rel=1e-10)
    assert drm.drm_loss(*t, 0).item() == pytest.approx(risk, rel=1e-10)
    assert drm.worst_case_risk(torch.log(t[3]) + 5, t[3]).item() == pytest.approx(0, abs=1e-12)
    assert drm.worst_case_risk(t[1], torch.eye(C).double()[:1].expand(N, C)).isfinite()  # p_c with zeros
    p = drm.mixture(t[0], t[1], beta)
    for n in range(N):
        a, b = softmax(df[n]), softmax(cd[n])
        assert p[n].tolist() == pytest.approx([beta * a[c] + (1 - beta) * b[c] for c in range(C)], abs=1e-12)
    assert (p.sum(1) - 1).abs().max() <= 1e-12


def test_minmax_span_and_rows_of_certain_heads():
    f0, w = F.normalize(torch.randn(70_000, 3), dim=1), F.normalize(torch.randn(4, 3), dim=1)  # more than one part
    f0[:65_536] = f0[0]  # the extremes are in the second
    index = torch.arange(0, 70_000, 9_999)
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return torch.cat([0.3 * w[:1].new_tensor([[1., 2, 3, 4]]).expand(len(x), 4)] * 2, 1), None
    batch = common.Batch(torch.zeros(len(index), 3), torch.zeros(len(index)).long(), index, 0)
    _, parts = drm.make_loss(f0, w, 9.0, "minmax", 1.0)(Fixed(), batch)
    want = drm.worst_case_risk(Fixed()(batch.images)[0][:, 4:], drm.core_targets(f0, w, 9.0, "minmax")[index])
    assert parts["kl"].item() == pytest.approx(want.item(), rel=1e-5)
    sure = drm.two_head_rows({"m": lambda x: (torch.tensor([[500.0, 0, 500, 0]]), None)}, 0.5)(None, lambda z: z)
    assert sure["m mixture"].isfinite().all()  # a probability that underflows costs much, not infinitely much


def test_text_head_equals_open_clips_builder(tiny_vit):
    clip, tokenizer = open_clip.create_model(tiny_vit).eval(), open_clip.get_tokenizer(tiny_vit)
    names, templates = ["cat", "dog"], ["a photo of a {}.", "a drawing of a {}.", "a {}."]
    tokens, owner = drm.tokenize([[t.format(n) for t in templates] for n in names], tokenizer, clip.context_length, "")
    with torch.no_grad():
        got = drm.text_head(clip, tokens, owner, 2)
    assert (got - common.zero_shot_head(clip, tokenizer, names, templates)).abs().max() <= 1e-6


def test_descriptions_join_by_name_index_or_position():
    names = ["ant", "bee", "cow"]
    join = lambda raw, names=names: drm.descriptions(raw, names, "f.json")
    assert join([("cow", "C"), ("ant", "A"), ("bee", ["B1", "B2"])]) == [["A"], ["B1", "B2"], ["C"]]
    assert join([("2", "C"), ("0", "A"), ("1", "B")]) == [["A"], ["B"], ["C"]]
    numbers = sorted(map(str, range(12)))  # classes whose names are numbers, in the order of folders: 0, 1, 10, 11, 2
    assert join([(str(i), f"text of {i}") for i in range(12)], numbers) == [[f"text of {n}"] for n in numbers]
    twice = [f"n{i}" for i in range(18)] + ["missile", "missile"]
    raw = [(n, f"text {i}") for i, n in enumerate(twice)]
    assert join(raw, twice) == [[f"text {i}"] for i in range(20)]
    raw[18] = ("projectile", "text 18")  # as in the released ImageNet file
    assert join(raw, twice)[18:] == [["text 18"], ["text 19"]]
    for bad, words in (([("ant", "A")], "1 descriptions for 3"), ([("ant", "A"), ("bee", "B"), ("cat", "C")], "'cow'"),
                       ([("ant", "A"), ("bee", 7), ("cow", "C")], "'bee'"), ([("ant", "A"), ("bee", " "), ("cow", "C")], "'bee'"),
                       ([("ant", "A"), ("bee", []), ("cow", "C")], "'bee'"), (["A", "B", "C"], "JSON object"), ("A", "JSON object")):
        with pytest.raises(common.Fail, match=words):
            join(bad)
    with pytest.raises(common.Fail, match="position"):
        join(list(reversed(raw)), twice)


def log_of(path):
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def test_lambda_0_is_plain_fine_tuning_step_for_step(tmp_path, tiny_vit):
    flags = ["--model", tiny_vit, "--steps", 12, "--batch-size", 16, "--lr", 1e-3, "--tests", "test", "--lam", 0]
    drm_rows = run("drm.py", *flags, "--out", tmp_path / "drm")["rows"]
    plain_rows = run("lipsum_ft.py", *flags, "--freeze", "head", "--out", tmp_path / "plain")["rows"]
    a, b = log_of(tmp_path / "drm"), log_of(tmp_path / "plain")
    assert len(a) == 12 and [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], abs=1e-5)
    assert a[0]["loss"] != pytest.approx(a[11]["loss"], abs=1e-3)
    nll = [{r["name"]: r["tests"]["test"]["nll"] for r in rows} for rows in (drm_rows, plain_rows)]
    assert nll[0]["ERM df"] == pytest.approx(nll[1]["fine-tuned"], abs=1e-5)


def without_cd_head(path):
    """A copy of the run path/d as another method would have left it."""
    shutil.copytree(path / "d", path / "other")
    tensors, about = common.load_tensors(path / "other" / "head.safetensors")
    common.save_tensors(path / "other" / "head.safetensors", {k: v for k, v in tensors.items() if k != "head_cd"}, about)
    return path / "other"


@pytest.mark.parametrize("tune", [False, True])
def test_own_folder_with_descriptions(tmp_path, tiny_vit, tune):
    tree = write_tree(tmp_path / "tree")
    (tree / "templates.txt").write_text("art of the {} in my garden\n")  # not the prompts of DRM's heads
    (tree / "descriptions.json").write_text(json.dumps({"red square": "a red patch", "green square": ["a green patch", "grass"],
                                                        "blue square": "a blue patch"}))
    flags = ["--model", tiny_vit, "--steps", 20, "--batch-size", 16, "--lr", 1e-3, "--lam", 1]
    flags += ["--tune-text"] if tune else ["--baseline", "--alpha", 0.5]
    results = run("drm.py", "--data", "folder", "--data-dir", tree, *flags, "--out", "d", cwd=tmp_path)
    rows = {r["name"]: r for r in results["rows"]}
    models = ["zero-shot", "DRM"] if tune else ["zero-shot", "ERM", "DRM", "DRM + WiSE 0.5"]
    assert list(rows) == [f"{m} {h}" for m in models for h in ("df", "cd", "mixture")]
    kl = [x["kl"] for x in log_of(tmp_path / "d")]
    assert abs(kl[0]) < 1e-3 and max(kl) > 5 * abs(kl[0])  # p_c is the own prediction at first, but for the crop
    assert "not a run of drm.py" in complaint("drm.py", "--finetuned", without_cd_head(tmp_path), "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    again = run("drm.py", "--finetuned", "d", "--out", "again", cwd=tmp_path)
    assert {r["name"]: r["tests"] for r in again["rows"]}["DRM mixture"] == rows["DRM mixture"]["tests"]
    saved = open_clip.create_model(f"local-dir:{tmp_path / 'd'}").eval().state_dict()
    start = open_clip.create_model(tiny_vit).state_dict()
    text = [k for k in saved if not k.startswith("visual.") and k != "logit_scale"]
    assert any(not torch.equal(saved[k], start[k]) for k in text) == tune
    if tune:  # the saved heads are those of the saved text tower
        clip, tokenizer = open_clip.create_model(f"local-dir:{tmp_path / 'd'}").eval(), open_clip.get_tokenizer(tiny_vit)
        head = common.load_tensors(tmp_path / "d" / "head.safetensors")[0]
        W = common.zero_shot_head(clip, tokenizer, ["blue square", "green square", "red square"], ["a photo of a {}."])
        assert (W - head["head"]).abs().max() <= 1e-5
    else:  # any run is a starting point for WiSE-FT
        wise = run("wise_ft.py", "--finetuned", "d", "--alphas", 1, "--out", "w", cwd=tmp_path)
        assert wise["rows"][-1]["tests"]["test"]["acc"] == rows["DRM df"]["tests"]["test"]["acc"]
        assert wise["rows"][0]["tests"]["test"]["nll"] == pytest.approx(rows["zero-shot df"]["tests"]["test"]["nll"])


def test_bad_description_files_are_one_line(tmp_path, tree, tiny_vit, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ["--data", "folder", "--data-dir", tree, "--model", tiny_vit, "--out", "new"]
    assert "--descriptions FILE.json" in complaint("drm.py", *base)
    good = {"red square": "a", "green square": "b", "blue square": "c"}
    for content, words in (("{", "not valid JSON"), ("[1, 2]", "JSON object"), (json.dumps({"red square": "a"}), "1 descriptions"),
                           (json.dumps({**good, "red square": 3}), "'red square'"),
                           (json.dumps({"red": "a", "green square": "b", "blue square": "c"}), "'red square'"),
                           (json.dumps({**good, "red square": "very " * 100}), "77 tokens")):
        (tmp_path / "d.json").write_text(content)
        message = complaint("drm.py", *base, "--descriptions", "d.json")
        assert words in message, message
    assert "not found" in complaint("drm.py", *base, "--descriptions", "nowhere.json")
    assert "--prompt" in complaint("drm.py", *base, "--prompt", "a photo")
    assert not (tmp_path / "new").exists()


def test_print_prompt_names_the_classes_in_the_accepted_format(tree, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["drm.py", "--data", "folder", "--data-dir", str(tree), "--print-prompt"])
    drm.main()
    text = capsys.readouterr().out
    names = json.loads(text[text.index("["):])
    assert names == ["blue square", "green square", "red square"] and "JSON object" in text
    assert drm.descriptions([(n, "x") for n in names], names, "") == [["x"]] * 3
