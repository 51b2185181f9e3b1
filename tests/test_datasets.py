"""The data sets as miniature trees in their published layout: labels, metrics, complaints."""
import csv
import hashlib
import json
import math
import os
import pickle
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import TEXT, complaint, save_clip
from PIL import Image
from torchvision.datasets import CIFAR10

import common
import lipsum_ft

# WordNet id -> class of ImageNet, from its published list
GOLDFISH, STINGRAY, ANALOG, DIGITAL, BANANA, TISSUE = ("n01443537", "n01498041", "n02708093",
                                                       "n03196217", "n07753592",
                                                       "n15075141")
CLASS = {GOLDFISH: 1, STINGRAY: 6, ANALOG: 409, DIGITAL: 530, BANANA: 954, TISSUE: 999}
R_KINDS = ["art", "cartoon", "deviantart", "embroidery", "graffiti", "graphic", "misc", "origami",
           "painting",
           "sculpture", "sketch", "sticker", "tattoo", "toy", "videogame"]
SHIFTS = ["v2", "r", "a", "sketch", "objectnet"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random ResNet CLIP whose text tower encodes the 80,000 prompts of ImageNet in seconds."""
    return save_clip(tmp_path_factory.mktemp("tiny") / "m", dict(
        embed_dim=16, vision_cfg=dict(image_size=32, layers=[1, 1, 1, 1], width=8, patch_size=None),
        text_cfg={**TEXT, "context_length": 12, "width": 16, "heads": 1, "layers": 1}))


def image(path, colour=(90, 120, 200), size=(40, 36), border=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), (255, 0, 0), np.uint8)
    pixels[border:size[1] - border, border:size[0] - border] = colour
    Image.fromarray(pixels).save(path)


def table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows(rows)


def load(data, root, **flags):
    return common.load_data(Namespace(**{**dict(data=data, data_dir=root, tests="all", holdout=0.0,
                                                shots=0, limit=0),
                                         **flags}))


def labels(dataset):
    """{file or folder/file: label}"""
    assert dataset.images.dtype.kind == "S"
    paths = [dataset.describe(i) for i in range(len(dataset))]
    assert all(os.path.isfile(path) for path in paths)
    return {"/".join(p.split("/")[-2:]): y for p, y in zip(paths, dataset.labels.tolist())}


def skipped(capsys, data, root, name):
    """The one line that a load prints about a test set that it goes on without."""
    capsys.readouterr()
    assert name not in load(data, root).tests
    lines = [line for line in capsys.readouterr().out.splitlines()
             if line.startswith(f"test set {name} is skipped: ")]
    assert len(lines) == 1
    return lines[0]


def train_on(monkeypatch, tmp_path, *flags):
    """Run lipsum_ft.py for two steps in this process; returns its results.json."""
    common_flags = ["--steps", 2, "--batch-size", 4, "--workers", 0, "--device", "cpu", "--out",
                    tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["lipsum_ft.py", *map(str, [*flags, *common_flags])])
    lipsum_ft.main()
    return json.loads((tmp_path / "run/results.json").read_text())


# ---- metrics ----

def test_macro_f1_by_hand_with_an_absent_class():
    y, predicted = torch.tensor([0, 0, 0, 1, 1, 4]), torch.tensor([0, 0, 1, 1, 3, 0])
    # class 0: TP 2, FP 1, FN 1 -> 4/6; 1: TP 1, FP 1, FN 1 -> 1/2; 4: TP 0 -> 0
    # 3 is predicted but absent: not counted
    assert common.macro_f1(predicted, y) == pytest.approx((4 / 6 + 1 / 2 + 0) / 3)
    assert common.macro_f1(y, y) == 1


def test_worst_group_by_hand_with_an_empty_group_and_images_of_none():
    correct = torch.tensor([1, 1, 0, 1, 0, 0, 0]).bool()
    # groups 1 and 2 have no image, the last image has no group
    groups = torch.tensor([0, 0, 0, 3, 3, 3, -1])
    assert common.worst_group_accuracy(correct, groups) == pytest.approx(1 / 3)
    assert common.worst_group_accuracy(correct[:3], groups[:3]) == pytest.approx(2 / 3)
    assert math.isnan(common.worst_group_accuracy(correct[6:], groups[6:]))


# ---- ImageNet ----

@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for wnid in CLASS:
        for i in range(3):
            image(root / f"imagenet/train/{wnid}/{wnid}_{i}.JPEG")
        image(root / f"imagenet/val/{wnid}/ILSVRC2012_val_0000000{CLASS[wnid]}.JPEG")
        image(root / f"sketch/{wnid}/sketch_1.JPEG")
    for i in [*range(10), 10, 11, 954]:
        image(root / f"imagenetv2-matched-frequency-format-val/{i}/image.jpeg")
    for kind in R_KINDS:
        image(root / f"imagenet-r/{GOLDFISH}/{kind}_0.jpg")
    image(root / f"imagenet-r/{BANANA}/toy_3.jpg")
    (root / "imagenet-r/README.txt").write_text("a file beside the class folders, as published")
    image(root / f"imagenet-a/{STINGRAY}/0.001_fish _ goldfish_0.9.jpg")
    image(root / f"imagenet-a/{TISSUE}/0.002_x_0.8.jpg")
    for name, n in {"alarm_clock": 2, "banana": 1, "air_freshener": 3}.items():
        for i in range(n):
            image(root / f"objectnet-1.0/images/{name}/{i}.png", border=2)
    mappings = root / "objectnet-1.0/mappings"
    mappings.mkdir()
    for file, content in {
            "folder_to_objectnet_label": {"alarm_clock": "Alarm clock", "banana": "Banana",
                                          "air_freshener": "Air freshener"},
            "objectnet_to_imagenet_1k": {"Banana": "banana",
                                         "Alarm clock": "analog clock; digital clock"},
            "pytorch_to_imagenet_2012_id": {"409": 2, "530": 0, "954": 1}}.items():
        (mappings / f"{file}.json").write_text(json.dumps(content))
    (mappings / "imagenet_to_label_2012_v2").write_text("digital clock\nbanana\nanalog clock\n")
    return root


def test_imagenet_labels(imagenet, capsys):
    data = load("imagenet", imagenet)
    assert list(data.tests) == ["imagenet", *SHIFTS]
    assert len(data.classnames) == 1000 and len(data.templates) == 80
    assert [data.classnames[i] for i in CLASS.values()] == ["goldfish", "stingray", "analog clock",
                                                            "digital clock",
                                                           "banana", "toilet paper"]
    for dataset in (data.train, data.tests["imagenet"], data.tests["sketch"]):
        assert {file.split("/")[0]: y for file, y in labels(dataset).items()} == CLASS
        assert dataset.classes is None
    assert labels(data.tests["v2"]) == {f"{i}/image.jpeg": i for i in [*range(10), 10, 11, 954]}
    assert labels(data.tests["r"]) == {**{f"{GOLDFISH}/{k}_0.jpg": 0 for k in R_KINDS},
                                       f"{BANANA}/toy_3.jpg": 1}
    assert list(labels(data.tests["a"]).values()) == [0, 1]
    assert labels(data.tests["objectnet"]) == {"alarm_clock/0.png": 0, "alarm_clock/1.png": 0,
                                               "banana/0.png": 1}
    assert "3 of 6 images are of the 2 classes" in capsys.readouterr().out


def test_imagenet_label_spaces(imagenet):
    tests = load("imagenet", imagenet).tests
    z = torch.arange(2000.).view(2, 1000)
    z[0, DIGITAL_ID := 530] = 5000
    assert torch.equal(tests["r"].project(z), z[:, [1, 954]])
    assert torch.equal(tests["a"].project(z), z[:, [6, 999]])
    assert torch.equal(tests["v2"].project(z), z)
    want = torch.tensor([[5000., 954], [1000 + DIGITAL_ID, 1954]])  # the larger of ids 409 and 530
    assert torch.equal(tests["objectnet"].project(z), want)


def test_objectnet_border_is_cut(imagenet):
    dataset = load("imagenet", imagenet).tests["objectnet"]
    dataset.transform = np.asarray
    pixels = dataset[0][0]
    assert pixels.shape == (32, 36, 3) and (pixels == (90, 120, 200)).all()


def test_imagenet_from_start_to_results(imagenet, tiny, tmp_path, monkeypatch):
    results = train_on(monkeypatch, tmp_path, "--data", "imagenet", "--data-dir", imagenet,
                       "--model", tiny, "--limit", 12)
    for row in results["rows"]:
        tests = row["tests"]
        assert list(tests) == ["imagenet", *SHIFTS]
        assert [tests[t]["n"] for t in tests] == [6, 12, 12, 2, 6, 3]
        assert row["ood"] == pytest.approx(np.mean([tests[t]["acc"] for t in SHIFTS]))


def test_a_missing_shift_is_one_line_and_a_missing_train_set_an_error(imagenet, tmp_path, capsys):
    shutil.copytree(imagenet, tmp_path / "d")
    shutil.rmtree(tmp_path / "d/imagenet-r")
    assert skipped(capsys, "imagenet", tmp_path / "d", "r") == (
        f"test set r is skipped: {tmp_path / 'd/imagenet-r'}: not found; "
        "expected below --data-dir: imagenet-r/WNID/*.jpg")
    bad = lambda *flags: complaint("lipsum_ft.py", "--data", "imagenet", "--data-dir",
                                   tmp_path / "d", *flags)
    for name in ("r", "R", "v2,x", ""):
        wrong = name.split(",")[-1]
        assert bad("--tests", name) == (f"error: --tests {wrong}: no such test set on disk; "
                                        "imagenet has imagenet, v2, "
                                        "a, sketch, objectnet")
    shutil.rmtree(tmp_path / "d/imagenet/train")
    assert bad() == (f"error: {tmp_path / 'd/imagenet/train'}: not found; "
                     "expected below --data-dir: "
                     "imagenet/train/WNID/*.JPEG and imagenet/val/WNID/*.JPEG")


def test_only_the_shifts_that_tests_names_are_read(imagenet, tmp_path, capsys):
    root = tmp_path / "d"
    shutil.copytree(imagenet, root)
    (root / "imagenet-a/no_class").mkdir()
    (root / "objectnet-1.0/mappings/imagenet_to_label_2012_v2").unlink()
    shutil.rmtree(root / "sketch")
    assert list(load("imagenet", root, tests="r,v2").tests) == ["imagenet", "v2", "r"]
    assert list(load("imagenet", root, tests="imagenet").tests) == ["imagenet"]
    assert "skipped" not in capsys.readouterr().out  # nobody asked for the others
    assert list(load("imagenet", root).tests) == ["imagenet", "v2", "r"]
    assert capsys.readouterr().out.count("is skipped: ") == 3
    words = "^--tests a: .*no_class: not a class of a, .*; expected below --data-dir: imagenet-a/"
    with pytest.raises(common.Fail, match=words):
        load("imagenet", root, tests="a")


@pytest.mark.parametrize("move, into, words, shift", [
    ("imagenet", "imagenet/imagenet", "is nested twice; move what is in it up", None),
    (f"imagenet/val/{TISSUE}", "imagenet/val/n00000001",
     "n00000001: not a class of imagenet, whose folders are n0", None),
    (f"imagenet/train/{TISSUE}/{TISSUE}_0.JPEG", "imagenet/val/ILSVRC2012_val_00000001.JPEG",
     "imagenet/val: its images are not in class folders; "
     "valprep.sh of soumith/imagenetloader.torch",
     None),
    ("imagenet-r", "imagenet-r/imagenet-r", "holds folders, not images: the tree is nested twice",
     "r"),
    ("objectnet-1.0", "objectnet-1.0/objectnet-1.0",
     "objectnet-1.0/objectnet-1.0: the tree is nested twice", "objectnet"),
    ("objectnet-1.0/images", "objectnet-1.0/objectnet-1.0/images", "is nested twice", "objectnet"),
    (f"imagenet-a/{TISSUE}", "imagenet-a/toilet_tissue", "toilet_tissue: not a class of a", "a"),
    ("imagenetv2-matched-frequency-format-val/9", "imagenetv2-matched-frequency-format-val/1000",
     "1000: not a class of v2", "v2"),
    (f"sketch/{TISSUE}/sketch_1.JPEG", "sketch/note.txt", "no image in that class folder",
     "sketch"),
    (f"sketch/{TISSUE}/sketch_1.JPEG", f"sketch/{TISSUE}/._sketch_1.JPEG",
     "no image in that class folder", "sketch"),
    ("objectnet-1.0/mappings/imagenet_to_label_2012_v2", "other.txt",
     "imagenet_to_label_2012_v2: not found; expected below --data-dir: "
     "objectnet-1.0/images/FOLDER/*.png and the four",
     "objectnet"),
    ("objectnet-1.0/mappings/folder_to_objectnet_label.json", "other.json",
     "is not one of ObjectNet's mappings",
     "objectnet"),
])
def test_wrong_imagenet_trees(imagenet, tmp_path, capsys, move, into, words, shift):
    root = tmp_path / "d"
    shutil.copytree(imagenet, root)
    (root / move).rename(tmp_path / "moved")
    (root / into).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "moved").rename(root / into)
    bad = lambda *flags: complaint("lipsum_ft.py", "--data", "imagenet", "--data-dir", root, *flags)
    line = bad("--tests", shift) if shift else bad()
    assert words in line and "; expected below --data-dir: " in line
    if shift:
        assert line.startswith(f"error: --tests {shift}: ")
        assert skipped(capsys, "imagenet", root, shift).split(": ", 1)[1] == line.split(": ", 2)[2]


@pytest.mark.parametrize("file, content", [("objectnet_to_imagenet_1k.json",
                                            {"Banana": "plantain"}),
                                           ("objectnet_to_imagenet_1k.json", {"Bnana": "banana"}),
                                           ("pytorch_to_imagenet_2012_id.json", {"954": 3})])
def test_objectnet_mappings_must_fit_together(imagenet, tmp_path, capsys, file, content):
    shutil.copytree(imagenet, tmp_path / "d")
    (tmp_path / "d/objectnet-1.0/mappings" / file).write_text(json.dumps(content))
    assert "objectnet-1.0: not as published (" in skipped(capsys, "imagenet", tmp_path / "d",
                                                          "objectnet")


def test_hidden_files_and_folders_are_no_images(imagenet, tmp_path):
    root = tmp_path / "d"
    shutil.copytree(imagenet, root)
    want = labels(load("imagenet", root).train)
    for name in (f"{BANANA}/._{BANANA}_0.JPEG", f"{BANANA}/.ipynb_checkpoints/x-checkpoint.JPEG",
                 ".cache/x.JPEG"):
        image(root / "imagenet/train" / name)
    assert labels(load("imagenet", root).train) == want


def test_file_paths_keep_any_name_and_become_images(tmp_path):
    names = [str(tmp_path / name) for name in ("a.png", "ein Löwe.png",
                                               os.fsdecode(b"caf\xe9.png"))]
    for name in names:
        Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "x.png")
        shutil.copy(tmp_path / "x.png", name)
    paths = common.file_paths(names)
    assert paths.dtype.kind == "S"
    assert paths.dtype.itemsize == max(len(os.fsencode(name)) for name in names)
    dataset = common.ImageSet("x", paths, [0, 1, 2]).subset([2, 1])
    dataset.transform = np.asarray
    assert [dataset.describe(i) for i in range(2)] == names[:0:-1]
    assert all((dataset[i][0] == (1, 2, 3)).all() for i in range(2))
    assert common.file_paths([]).dtype.kind == "S" and common.ImageSet("x", paths[:0], []).describe


def test_limit_takes_the_classes_in_turn():
    dataset = common.ImageSet("x", np.zeros((60, 2, 2, 3), np.uint8), [0] * 50 + [1] * 7 + [2] * 3,
                              groups=range(60))
    chosen = common.spread(dataset, 20)
    assert torch.bincount(chosen.labels).tolist() == [10, 7, 3]
    assert torch.equal(chosen.groups, common.spread(dataset, 20).groups)
    assert len(chosen.groups) == 20
    assert len(common.spread(dataset, 1000)) == 60


# ---- DomainNet ----

@pytest.fixture
def domainnet(tmp_path):
    root = tmp_path / "data/domainnet"
    for domain in ("real", "painting", "clipart", "infograph", "sketch"):
        for split, n in (("train", 3), ("test", 2)):
            lines = []
            for label, folder in enumerate(["The_Eiffel_Tower", "aircraft_carrier"]):
                for i in range(n):
                    lines.append(f"{domain}/{folder}/{domain}_{label:03d}_{split}{i}.jpg {label}")
                    image(root / lines[-1].split()[0])
            (root / f"{domain}_{split}.txt").write_text("\n".join(lines) + "\n")
    return root.parent


def test_domainnet(domainnet, tiny, tmp_path, monkeypatch):
    data = load("domainnet", domainnet)
    assert data.classnames == ["The_Eiffel_Tower", "aircraft_carrier"] and len(data.templates) == 80
    assert list(data.tests) == ["real", "painting", "clipart", "infograph", "sketch"]
    assert labels(data.tests["clipart"]) == {
        "The_Eiffel_Tower/clipart_000_test0.jpg": 0, "The_Eiffel_Tower/clipart_000_test1.jpg": 0,
        "aircraft_carrier/clipart_001_test0.jpg": 1, "aircraft_carrier/clipart_001_test1.jpg": 1}
    assert len(data.train) == 6 and data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    results = train_on(monkeypatch, tmp_path, "--data", "domainnet", "--data-dir", domainnet,
                       "--model", tiny)
    assert set(results["measure"].values()) == {"acc"}
    assert results["rows"][-1]["tests"]["sketch"]["n"] == 4


def test_domainnet_lists_with_leading_folders(domainnet):
    want = load("domainnet", domainnet)
    for split in ("real_train", "clipart_test"):
        listing = domainnet / f"domainnet/{split}.txt"
        lines = listing.read_text().splitlines()
        listing.write_text("".join(f"data/domainnet/{line}\n" for line in lines))
    got = load("domainnet", domainnet)
    assert got.classnames == want.classnames and labels(got.train) == labels(want.train)
    assert labels(got.tests["clipart"]) == labels(want.tests["clipart"])


def test_wrong_domainnet_trees(domainnet, tiny, capsys):
    bad = lambda *flags: complaint("lipsum_ft.py", "--data", "domainnet", "--data-dir", domainnet,
                                   *flags)
    clipart = lambda: skipped(capsys, "domainnet", domainnet, "clipart")
    root = domainnet / "domainnet"
    listing = root / "clipart_test.txt"
    good = listing.read_text()
    listing.write_text(good + "clipart/bee/clipart_002_1.jpg 1\n")
    assert "in real_train.txt label 1 is aircraft_carrier" in clipart()
    listing.write_text(good.replace("/", "\\"))
    assert "is not DOMAIN/CLASS/FILE LABEL" in clipart()
    assert bad("--tests", "clipart").startswith("error: --tests clipart: ")
    listing.unlink()
    assert ("clipart_test.txt: not found; expected below --data-dir: domainnet/clipart_test.txt "
            "and the images that it lists, domainnet/clipart/CLASS/*.jpg") in clipart()
    listing.write_text(good)
    broken = root / "real/aircraft_carrier/real_001_train1.jpg"
    broken.write_bytes(broken.read_bytes()[:-200])
    line = bad("--model", tiny, "--epochs", 1, "--batch-size", 3, "--workers", 1, "--device", "cpu",
               "--out", domainnet / "run")
    assert f"{broken}: cannot be read as an image" in line and "truncated" in line.lower()
    train = (root / "real_train.txt").read_text()
    (root / "real_train.txt").write_text(train + "real/bee/real_002_1.jpg 3\n")
    assert "real_train.txt: its 3 labels are not 0 to 2" in bad()
    (root / "real_train.txt").write_text(train + "real/bee/real_002_1.jpg 1\n")
    assert "in real_train.txt label 1 is aircraft_carrier" in bad()
    (root / "real_train.txt").write_text(train)
    (root / "real").rename(root / "real.zip.d")
    assert ("real/The_Eiffel_Tower/real_000_train0.jpg: not found; expected below --data-dir: "
            "domainnet/real_{train,test}.txt and the images that it lists") in bad()


# ---- CIFAR-10 ----

STL_NAMES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


CIFAR_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
               "truck"]


def publish(monkeypatch, folder):
    """Make the miniature batches in `folder` the ones whose MD5 torchvision knows."""
    md5 = lambda file: hashlib.md5((folder / file).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", md5(f"data_batch_{i}")]
                                                for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5("test_batch")]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5("batches.meta")})


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    root, rng = tmp_path / "data", np.random.default_rng(0)
    for folder in ("cifar-10-batches-py", "CIFAR-10.1/datasets", "cifar-10.2", "stl10_binary"):
        (root / folder).mkdir(parents=True)
    for i, file in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4",
                              "data_batch_5", "test_batch"]):
        pixels = rng.integers(256, size=(4, 3072), dtype=np.uint8)
        pixels[0] = np.repeat([10, 20, 30], 1024)  # red, green and blue plane
        pixels[0, 1] = 99                          # red of row 0, column 1
        batch = {"data": pixels, "labels": [i, 6, 9, 0], "batch_label": f"{file}",
                 "filenames": ["a.png"] * 4}
        (root / "cifar-10-batches-py" / file).write_bytes(pickle.dumps(batch, protocol=2))
    meta = pickle.dumps({"label_names": CIFAR_NAMES}, protocol=2)
    (root / "cifar-10-batches-py/batches.meta").write_bytes(meta)
    publish(monkeypatch, root / "cifar-10-batches-py")
    np.save(root / "CIFAR-10.1/datasets/cifar10.1_v6_data.npy",
            rng.integers(256, size=(3, 32, 32, 3), dtype=np.uint8))
    np.save(root / "CIFAR-10.1/datasets/cifar10.1_v6_labels.npy", np.array([3, 0, 9], np.int32))
    v2 = {"images": rng.integers(256, size=(2, 32, 32, 3), dtype=np.uint8),
          "labels": np.array([7, 6])}
    np.savez(root / "cifar-10.2/cifar102_test.npz", **v2, label_names=np.array(CIFAR_NAMES, object),
             ti_indices=np.arange(2), keywords=np.array(["jennet", "frog"], object))
    stl = rng.integers(256, size=(10, 3, 96, 96), dtype=np.uint8)
    stl[0] = 0
    stl[0, 0, 5, 7] = 200  # a channel is stored by columns: red of column 5, row 7
    stl.tofile(root / "stl10_binary/test_X.bin")
    np.arange(1, 11, dtype=np.uint8).tofile(root / "stl10_binary/test_y.bin")
    (root / "stl10_binary/class_names.txt").write_text("\n".join(STL_NAMES) + "\n")
    return root, v2


def test_cifar10(cifar, tiny, tmp_path, monkeypatch):
    root, v2 = cifar
    data = load("cifar10", root)
    assert list(data.tests) == ["cifar10", "cifar10.1", "cifar10.2", "stl10"]
    assert data.classnames == CIFAR_NAMES
    assert data.train.images.shape == (20, 32, 32, 3)
    assert data.train.labels.tolist()[::4] == [0, 1, 2, 3, 4]
    assert data.train.images[0, 0, 0].tolist() == [10, 20, 30]
    assert data.train.images[0, 0, 1].tolist() == [99, 20, 30]
    assert data.tests["cifar10.1"].labels.tolist() == [3, 0, 9]
    assert (data.tests["cifar10.2"].images == v2["images"]).all()
    assert data.tests["cifar10.2"].labels.tolist() == [7, 6]
    stl = data.tests["stl10"]
    # label space without frog: airplane automobile bird cat deer dog horse ship truck
    # STL's order differs, monkey is out
    assert stl.labels.tolist() == [0, 2, 1, 3, 4, 5, 6, 7, 8] and stl.images.shape == (9, 96, 96, 3)
    assert stl.images[0, 7, 5].tolist() == [200, 0, 0] and stl.images[0].sum() == 200
    assert stl.project(torch.arange(10.)[None]).tolist() == [[0, 1, 2, 3, 4, 5, 7, 8, 9]]
    results = train_on(monkeypatch, tmp_path, "--data", "cifar10", "--data-dir", root, "--model",
                       tiny)
    assert results["rows"][0]["tests"]["stl10"]["n"] == 9


def test_cifar10_shifts_in_their_other_places(cifar):
    root, v2 = cifar
    for file in (root / "CIFAR-10.1/datasets").iterdir():
        file.rename(root / "CIFAR-10.1" / file.name)
    (root / "CIFAR-10.1/datasets").rmdir()
    (root / "cifar-10.2").rename(root / "CIFAR-10.2")
    tests = load("cifar10", root).tests
    assert tests["cifar10.1"].labels.tolist() == [3, 0, 9]
    assert (tests["cifar10.2"].images == v2["images"]).all()


class Evil:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_crafted_pickles_are_refused_and_do_not_run(cifar, tmp_path, monkeypatch, capsys):
    root, v2 = cifar
    witness, bad = tmp_path / "witness", lambda: complaint("lipsum_ft.py", "--data", "cifar10",
                                                           "--data-dir", root)
    evil = Evil((open, (str(witness), "w")))
    np.savez(root / "cifar-10.2/cifar102_test.npz", images=v2["images"],
             labels=np.array([evil, evil], object))
    assert "cifar-10.2: not as published (ValueError('Object arrays" in skipped(capsys, "cifar10",
                                                                                root, "cifar10.2")
    np.save(root / "CIFAR-10.1/datasets/cifar10.1_v6_labels.npy", np.array([evil], object))
    assert "datasets: not as published (ValueError('Object arrays" in skipped(capsys, "cifar10",
                                                                              root, "cifar10.1")
    assert not witness.exists()
    for file in ("data_batch_3", "test_batch", "batches.meta"):
        batch = root / "cifar-10-batches-py" / file
        good = batch.read_bytes()
        batch.write_bytes(pickle.dumps(evil, protocol=2))
        assert f"{batch}: refused, it is not the published file (MD5 " in bad()
        assert not witness.exists()
        batch.write_bytes(good)
    load("cifar10", root)  # as a control, the same pickle runs under an MD5 that fits it
    (root / "cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps(evil, protocol=2))
    publish(monkeypatch, root / "cifar-10-batches-py")
    bad()
    assert witness.exists()


def test_cifar10_pickles_without_the_published_md5_do_not_run(tmp_path):
    """With the real MD5s of torchvision, which no miniature file has."""
    folder, witness = tmp_path / "cifar-10-batches-py", tmp_path / "witness"
    folder.mkdir()
    for file, _ in [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], ""]]:
        (folder / file).write_bytes(pickle.dumps(Evil((open, (str(witness), "w"))), protocol=2))
    line = complaint("lipsum_ft.py", "--data", "cifar10", "--data-dir", tmp_path)
    assert (f"{folder / 'data_batch_1'}: refused, it is not the published file "
            "(MD5 c99cafc152244af753f735de768cd75f)") in line
    assert not witness.exists()


def test_wrong_cifar_trees(cifar, capsys):
    root, v2 = cifar
    bad = lambda: complaint("lipsum_ft.py", "--data", "cifar10", "--data-dir", root)
    wrong = lambda name: skipped(capsys, "cifar10", root, name)
    v1 = root / "CIFAR-10.1/datasets"
    np.save(v1 / "cifar10.1_v6_labels.npy", np.array([3, 0, 10]))
    assert ("datasets: not as published (ValueError('not N images of 32 x 32 x 3 bytes "
            "and N labels of 0 to 9'") in wrong("cifar10.1")
    np.save(v1 / "cifar10.1_v6_labels.npy", np.array([3, 0]))
    assert "N labels of 0 to 9" in wrong("cifar10.1")
    (v1 / "cifar10.1_v6_labels.npy").unlink()
    assert ("cifar10.1_v6_labels.npy: not found; expected below --data-dir: "
            "CIFAR-10.1/datasets/cifar10.1_v6_") in wrong("cifar10.1")
    npz = root / "cifar-10.2/cifar102_test.npz"
    np.savez(npz, images=v2["images"].astype(float), labels=v2["labels"])
    assert "images of 32 x 32 x 3 bytes" in wrong("cifar10.2")
    np.savez(npz, images=v2["images"])
    assert "cifar-10.2: not as published (KeyError(" in wrong("cifar10.2")
    npz.write_bytes(npz.read_bytes()[:-40])
    assert "cifar-10.2: not as published (BadZipFile(" in wrong("cifar10.2")
    npz.unlink()
    assert ("cifar102_test.npz: not found; expected below --data-dir: "
            "cifar-10.2/cifar102_test.npz") in wrong("cifar10.2")
    (root / "stl10_binary/test_y.bin").write_bytes(b"\1\2\3")
    assert "276,480 bytes are not the 3 images of test_y.bin" in wrong("stl10")
    for numbers in (range(10), range(2, 12)):  # they count from 1
        (root / "stl10_binary/test_y.bin").write_bytes(bytes(numbers))
        assert "stl10_binary: not as published (IndexError(" in wrong("stl10")
    assert list(load("cifar10", root).tests) == ["cifar10"]
    (root / "cifar-10-batches-py/cifar-10-batches-py").mkdir()
    for p in (root / "cifar-10-batches-py").glob("*_*"):
        p.rename(root / "cifar-10-batches-py/cifar-10-batches-py" / p.name)
    assert "nested twice" in bad()
    shutil.rmtree(root / "cifar-10-batches-py")
    assert ("data_batch_1: not found; expected below --data-dir: "
            "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}") in bad()


# ---- WILDS ----

@pytest.fixture
def iwildcam(tmp_path):
    root = tmp_path / "data/iwildcam_v2.0"
    rows = [("train", 0), ("train", 1), ("train", 2), ("val", 2), ("id_val", 1), ("id_test", 0),
            ("id_test", 2), ("test", 1)]
    table(root / "metadata.csv", ["", "split", "location_remapped", "filename", "y"],
          *([i, s, 5, f"im-{i}.jpg", y] for i, (s, y) in enumerate(rows)))
    for i in range(len(rows)):
        image(root / f"train/im-{i}.jpg")
    table(root / "categories.csv", ["y", "category_id", "name"], [0, 0, "empty"],
          [1, 2, "Tayassu pecari"], [2, 3, "puma"],
          [99999, 301, "rollulus rouloul"])
    return root.parent


def test_iwildcam(iwildcam, tiny, tmp_path, monkeypatch, capsys):
    data = load("iwildcam", iwildcam)
    said = capsys.readouterr().out
    assert "class names are Latin: labels.csv of the WiSE-FT code is not in" in said
    assert data.classnames == ["empty", "tayassu pecari", "puma"]
    assert list(data.tests) == ["id_test", "test"]
    assert labels(data.train) == {"train/im-0.jpg": 0, "train/im-1.jpg": 1, "train/im-2.jpg": 2}
    assert labels(data.val) == {"train/im-4.jpg": 1}
    assert labels(data.tests["test"]) == {"train/im-7.jpg": 1}
    # both id_test images are called class 0
    half, zero = torch.full((2,), 0.5).double(), torch.zeros(2).long()
    scores = common.metrics(common.Scores(half, zero, half), data.tests["id_test"])
    assert scores["acc"] == 50 and scores["macro_f1"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    results = train_on(monkeypatch, tmp_path, "--data", "iwildcam", "--data-dir", iwildcam,
                       "--model", tiny)
    row = results["rows"][-1]
    assert results["measure"] == {"id_test": "macro_f1", "test": "macro_f1"}
    assert row["id"] == row["tests"]["id_test"]["macro_f1"]
    assert row["ood"] == row["tests"]["test"]["macro_f1"]
    table(iwildcam / "iwildcam_v2.0/labels.csv", ["y", "category_id", "name", "english"],
          [0, 0, "empty", "empty"],
          [1, 2, "tayassu pecari", "White-lipped peccary"], [2, 3, "puma", "cougar"])
    capsys.readouterr()
    assert load("iwildcam", iwildcam).classnames == ["empty", "white-lipped peccary", "cougar"]
    assert not capsys.readouterr().out


def test_wrong_iwildcam_trees(iwildcam, capsys):
    root, bad = iwildcam / "iwildcam_v2.0", lambda: complaint("lipsum_ft.py", "--data", "iwildcam",
                                                              "--data-dir", iwildcam)
    good = (root / "metadata.csv").read_text()
    (root / "metadata.csv").write_text(good.replace("filename", "file"))
    assert "metadata.csv: no column 'filename'; it has , split, location_remapped, file, y" in bad()
    (root / "metadata.csv").write_text(good.replace("7,test,5,im-7.jpg,1", "7,test"))
    assert "metadata.csv: line 9 has fewer values" in bad()
    (root / "metadata.csv").write_text(good.replace("im-7.jpg,1", "im-7.jpg,3"))
    assert "categories.csv: must name the classes 0, 1, ... of metadata.csv" in bad()
    (root / "metadata.csv").write_text(good.replace("im-7.jpg,1", "im-7.jpg,puma"))
    assert "categories.csv: must name the classes 0, 1, ... of metadata.csv" in bad()
    (root / "metadata.csv").write_text(good.replace(",test,", ",seq,"))
    assert "metadata.csv: lists no image for test; expected" in skipped(capsys, "iwildcam",
                                                                        iwildcam, "test")
    (root / "metadata.csv").write_text(good.replace("id_val", "seq"))
    assert "metadata.csv: lists no image for val" in bad()
    (root / "metadata.csv").write_text(good)
    (root / "categories.csv").unlink()
    assert ("categories.csv: not found; expected below --data-dir: "
            "iwildcam_v2.0/{metadata.csv,categories.csv}") in bad()
    root.rename(iwildcam / "x")
    root.mkdir()
    (iwildcam / "x").rename(root / "iwildcam_v2.0")
    assert "is nested twice" in bad()


@pytest.fixture
def fmow(tmp_path):
    root = tmp_path / "data/fmow_v1.1"
    rows = [("train", "zoo", "IND", "2012-12-31T23:59:59Z"),
            ("train", "airport_hangar", "FRA", "2005-01-01T00:00:00Z"),
            ("train", "zoo", "IND", "2013-01-01T00:00:00Z"),
            ("seq", "zoo", "IND", "2012-01-01T00:00:00Z"),
            ("val", "zoo", "USA", "2012-06-01T00:00:00Z"),
            ("val", "zoo", "USA", "2014-06-01T00:00:00Z"),
            ("test", "zoo", "FRA", "2012-06-01T00:00:00Z"),
            ("test", "zoo", "FRA", "2015-12-31T23:59:59Z"),
            ("test", "zoo", "IND", "2016-01-01T00:00:00Z"),
            ("test", "airport_hangar", "IND", "2017-03-01T00:00:00Z"),
            ("test", "zoo", "FRA", "2016-05-01T00:00:00Z"),
            ("test", "zoo", "XKX", "2016-05-01T00:00:00Z")]
    table(root / "rgb_metadata.csv", ["", "split", "img_path", "category", "country_code",
                                      "timestamp"],
          *([i, s, "", *rest] for i, (s, *rest) in enumerate(rows)))
    table(root / "country_code_mapping.csv", ["name", "alpha-2", "alpha-3", "region"],
          ["India", "IN", "IND", "Asia"],
          ["France", "FR", "FRA", "Europe"], ["USA", "US", "USA", "Americas"],
          ["Antarctica", "AQ", "ATA", ""])
    for i in range(len(rows)):
        image(root / f"images/rgb_img_{i}.png")
    return root.parent


def test_fmow(fmow, tiny, tmp_path, monkeypatch):
    data = load("fmow", fmow)
    assert data.classnames == ["airport_hangar", "zoo"] and list(data.tests) == ["id_test", "test"]
    assert labels(data.train) == {"images/rgb_img_0.png": 1, "images/rgb_img_1.png": 0}
    assert labels(data.val) == {"images/rgb_img_4.png": 1}
    assert labels(data.tests["id_test"]) == {"images/rgb_img_6.png": 1}
    test = data.tests["test"]
    want = ((8, 1), (9, 0), (10, 1), (11, 1))
    assert labels(test) == {f"images/rgb_img_{i}.png": y for i, y in want}
    # all four called zoo: Asia has 1 of 2 right, Europe 1 of 1; that of no region counts in acc
    half, one = torch.full((4,), 0.5).double(), torch.ones(4).long()
    scores = common.metrics(common.Scores(half, one, half), test)
    assert test.groups.tolist() == [0, 0, 1, -1] and scores["acc"] == 75
    assert scores["worst_region"] == 50
    results = train_on(monkeypatch, tmp_path, "--data", "fmow", "--data-dir", fmow, "--model", tiny)
    row = results["rows"][-1]
    assert row["id"] == row["tests"]["id_test"]["acc"]
    assert row["ood"] == row["tests"]["test"]["worst_region"]


def test_wrong_fmow_trees(fmow):
    root, bad = fmow / "fmow_v1.1", lambda: complaint("lipsum_ft.py", "--data", "fmow",
                                                      "--data-dir", fmow)
    mapping = (root / "country_code_mapping.csv").read_text()
    (root / "country_code_mapping.csv").write_text(mapping.replace("alpha-3", "code"))
    words = "country_code_mapping.csv: no column 'alpha-3'; it has name, alpha-2, code, region"
    assert words in bad()
    (root / "country_code_mapping.csv").write_text(mapping)
    (root / "images").rename(root / "pictures")
    assert ("rgb_img_0.png: not found; expected below --data-dir: "
            "fmow_v1.1/{rgb_metadata.csv,country_code_mapping.csv} and "
            "fmow_v1.1/images/rgb_img_*.png") in bad()
    (root / "pictures").rename(root / "images.d")
    (root / "images").mkdir()
    (root / "images.d").rename(root / "images/images")
    assert "images/images: the tree is nested twice; move what is in it up to" in bad()
