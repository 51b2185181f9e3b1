"""The data sets as miniature trees in their published layout: labels, metrics, mistakes."""
import csv
import hashlib
import json
import os
import pickle
import shutil
import unicodedata
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

import common
from tests.conftest import TEXT, complaint, printed, save_clip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random CLIP whose text tower encodes the 80,000 prompts of ImageNet in seconds."""
    return save_clip(tmp_path_factory.mktemp("tiny") / "m", dict(
        embed_dim=16, vision_cfg=dict(image_size=32, layers=[1, 1, 1, 1], width=8, patch_size=None),
        text_cfg={**TEXT, "context_length": 21, "width": 16, "heads": 1, "layers": 1}))


def image(path, border=0):
    """An image of 40 x 36 pixels, blue within a red border."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((36, 40, 3), (255, 0, 0), np.uint8)
    pixels[border:36 - border, border:40 - border] = 90, 120, 200
    Image.fromarray(pixels).save(path, "png")  # whatever its name: PIL goes by the content


def table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(rows)


def load(data, root, **flags):
    return common.load_data(Namespace(**{**dict(data=data, data_dir=root, tests="all", holdout=0.0,
                                                shots=0, limit=0, seed=0), **flags}))


def labels(images):
    """{folder/file: label} of files, all of which must be there."""
    paths = list(map(os.fsdecode, images.images))
    assert all(map(os.path.isfile, paths))
    return {"/".join(p.split("/")[-2:]): y for p, y in zip(paths, images.labels.tolist())}


def refused(data, root, *words, flags=()):
    """A run on a wrong tree ends in one line that holds all words."""
    line = complaint("lipsum_ft.py", "--data", data, "--data-dir", root, *flags)
    assert all(str(word) in line for word in words), line


def train_on(data, root, model, out, *flags):
    """results.json of two steps on a data set."""
    printed("lipsum_ft.py", "--data", data, "--data-dir", root, "--model", model, "--steps", 2,
            "--batch-size", 4, "--workers", 0, "--out", out, *flags)
    return json.loads((out / "results.json").read_text())


# ---- Metrics, --limit ----

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


def test_limit_keeps_n_images_from_everywhere_always_the_same():
    numbers = np.arange(60)
    images = common.ImageSet("x", np.zeros((60, 2, 2, 3), np.uint8) + numbers[:, None, None, None],
                             numbers, groups=numbers)
    chosen = common.limited(images, 20)
    assert len(chosen) == len(set(chosen.labels.tolist())) == 20 and chosen.labels.max() >= 40
    assert chosen.images[:, 0, 0, 0].tolist() == chosen.labels.tolist() == chosen.groups.tolist()
    assert torch.equal(chosen.labels, common.limited(images, 20).labels)
    assert sorted(common.limited(images, 1000).labels.tolist()) == numbers.tolist()


# ---- Folders of one's own ----

@pytest.fixture
def mine(tmp_path):
    for split in ("train", "test", "shifts/night"):
        for name in ("cat", "polar_bear"):
            image(tmp_path / f"mine/{split}/{name}/1.png")
    return tmp_path / "mine"


def test_folder(mine, capsys):
    image(mine / "val/polar_bear/7.png")
    data = load("folder", mine)
    assert data.classnames == ["cat", "polar bear"] and data.aliases == ["cat", "polar_bear"]
    assert data.templates == ["a photo of a {}."] and list(data.tests) == ["test", "night"]
    assert labels(data.train) == labels(data.tests["night"]) == {"cat/1.png": 0,
                                                                 "polar_bear/1.png": 1}
    assert labels(data.val) == {"polar_bear/7.png": 1} and not capsys.readouterr().out
    assert list(load("folder", mine, tests="test").tests) == ["test"]
    limited = load("folder", mine, limit=1)
    assert [len(s) for s in (limited.train, limited.val, *limited.tests.values())] == [1] * 4


def test_what_systems_leave_is_no_image_and_no_class(mine, capsys):
    want = labels(load("folder", mine).train)
    left = ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", ".hidden")
    for folder in ("", "train/", "train/cat/", "shifts/"):
        for name in left:
            image(mine / folder / name / "x.png")
    image(mine / "train/cat/._1.png")  # macOS: beside 1.png
    data = load("folder", mine)
    assert labels(data.train) == want and list(data.tests) == ["test", "night"]
    assert "not read" not in capsys.readouterr().out


def test_files_that_are_no_images_are_counted_in_one_line(mine, capsys):
    for name in ("cat/notes.txt", "polar_bear/Thumbs.db", "polar_bear/scan.pdf"):
        (mine / "train" / name).write_bytes(b"")
    load("folder", mine)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "3 files" in lines[0] and "cat/notes.txt" in lines[0]


def test_images_by_their_names_of_any_bytes(mine):
    names = ["a.gif", "b.jfif", "c.avif", "d.JPEG", "ein Löwe.webp", os.fsdecode(b"caf\xe9.png")]
    for name in names:
        image(mine / "train/polar_bear" / name)
    train = load("folder", mine).train
    assert labels(train) == {"cat/1.png": 0, **{f"polar_bear/{n}": 1 for n in [*names, "1.png"]}}
    train.transform = np.asarray
    assert all((train[i][0] == (90, 120, 200)).all() for i in range(len(train)))


def test_folders_that_are_not_read_are_named(mine, capsys):
    image(mine / "valid/cat/1.png")
    image(mine / "shift/day/cat/1.png")
    load("folder", mine)
    assert "not read: shift, valid;" in capsys.readouterr().out


def test_a_name_is_the_same_in_both_forms_of_unicode(mine):
    one, two = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for split, form in (("train", two), ("test", one), ("shifts/night", two)):
        image(mine / split / form / "1.png")
    (mine / "classnames.txt").write_text(f"{one}\tcoffee house\n", encoding="utf-8")
    data = load("folder", mine)
    assert data.classnames == ["coffee house", "cat", "polar bear"] and data.aliases[0] == one
    for images in (data.train, *data.tests.values()):
        assert sorted(images.labels.tolist()) == [0, 1, 2]


def test_two_classes_of_one_name_are_refused(mine):
    image(mine / "train/polar bear/1.png")
    refused("folder", mine, "'polar bear'")
    shutil.rmtree(mine / "train/polar bear")
    for form in ("NFC", "NFD"):
        image(mine / "train" / unicodedata.normalize(form, "née") / "1.png")
    refused("folder", mine, unicodedata.normalize("NFC", "'née'"))


@pytest.mark.parametrize("name", ["OOD", "test", "nll", "ECE ood"])
def test_a_shift_with_the_name_of_a_column_is_refused(mine, name):
    (mine / "shifts/night").rename(mine / "shifts" / name)
    refused("folder", mine, f"shifts/{name}")


def test_wrong_folders(mine):
    bad = lambda *words, **how: refused("folder", mine, *words, **how)
    bad("--tests dusk", "night", flags=["--tests", "dusk"])
    image(mine / "train/cat/deep/2.png")
    bad("train/cat/deep")
    shutil.rmtree(mine / "train/cat/deep")
    (mine / "train/cat/link").symlink_to(mine / "test/cat")
    bad("train/cat/link")
    (mine / "train/cat/link").unlink()
    image(mine / "shifts/night/dog/1.png")
    bad("shifts/night/dog")
    shutil.rmtree(mine / "shifts/night/dog")
    (mine / "train/empty").mkdir()
    (mine / "train/empty/notes.txt").write_text("no image")
    bad("train/empty")
    shutil.rmtree(mine / "train/empty")
    load("folder", mine)  # all changes are taken back
    for split in ("train", "test"):  # one level too deep
        (mine / split).rename(mine / "animals")
        (mine / split).mkdir()
        (mine / "animals").rename(mine / split / "animals")
    bad("/animals/cat")
    shutil.rmtree(mine / "train/animals")
    bad("/train")
    shutil.rmtree(mine / "test")
    bad(mine.name, "test/CLASS")


# ---- ImageNet ----

# WordNet id -> class of ImageNet, from its published list
GOLDFISH, STINGRAY, BANANA, TISSUE = "n01443537", "n01498041", "n07753592", "n15075141"
CLASS = {GOLDFISH: 1, STINGRAY: 6, "n02708093": 409, "n03196217": 530, BANANA: 954, TISSUE: 999}
NAMES = ["goldfish", "stingray", "analog clock", "digital clock", "banana", "toilet paper"]
SHIFTS = ["v2", "r", "a", "sketch", "objectnet"]
V2 = "imagenetv2-matched-frequency-format-val"


@pytest.fixture
def imagenet(tmp_path):
    root = tmp_path / "data"
    for wnid, label in CLASS.items():
        for i in range(3):
            image(root / f"imagenet/train/{wnid}/{wnid}_{i}.JPEG")
        image(root / f"imagenet/val/{wnid}/ILSVRC2012_val_{label:08}.JPEG")
        image(root / f"imagenet-sketch/{wnid}/sketch_1.JPEG")
    for i in (0, 1, 2, 9, 10, 11, 954):
        image(root / f"{V2}/{i}/image.jpeg")
    for name in (f"{GOLDFISH}/art_0.jpg", f"{GOLDFISH}/toy_1.jpg", f"{BANANA}/toy_3.jpg"):
        image(root / "imagenet-r" / name)
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


def test_imagenet_labels_and_label_spaces(imagenet):
    data = load("imagenet", imagenet)
    tests = data.tests
    assert list(tests) == ["imagenet", *SHIFTS]
    assert len(data.classnames) == 1000 and len(data.templates) == 80
    assert [data.classnames[i] for i in CLASS.values()] == NAMES
    for images in (data.train, tests["imagenet"], tests["sketch"]):
        assert {file.split("/")[0]: y for file, y in labels(images).items()} == CLASS
    assert labels(tests["v2"]) == {f"{i}/image.jpeg": i for i in (0, 1, 2, 9, 10, 11, 954)}
    assert labels(tests["r"]) == {f"{GOLDFISH}/art_0.jpg": 0, f"{GOLDFISH}/toy_1.jpg": 0,
                                  f"{BANANA}/toy_3.jpg": 1}
    assert list(labels(tests["a"]).values()) == [0, 1]
    assert labels(tests["objectnet"]) == {"alarm_clock/0.png": 0, "alarm_clock/1.png": 0,
                                          "banana/0.png": 1}
    z = torch.arange(2000.).view(2, 1000)
    z[0, 530] = 5000
    for name, want in (("imagenet", z), ("v2", z), ("sketch", z), ("r", z[:, [1, 954]]),
                       ("a", z[:, [6, 999]]),  # an alarm clock: the larger of ids 409 and 530
                       ("objectnet", torch.tensor([[5000., 954], [1530, 1954]]))):
        assert torch.equal(tests[name].project(z), want), name
    for name, shape in (("objectnet", (32, 36, 3)), ("imagenet", (36, 40, 3))):
        tests[name].transform = np.asarray
        pixels = tests[name][0][0]  # without ObjectNet's red border
        assert pixels.shape == shape and (pixels == (90, 120, 200)).all()


def test_imagenet_from_start_to_results(imagenet, tiny, tmp_path):
    results = train_on("imagenet", imagenet, tiny, tmp_path / "run", "--limit", 6)
    for row in results["rows"]:
        tests = row["tests"]
        assert {t: tests[t]["n"] for t in tests} == dict(zip(["imagenet", *SHIFTS],
                                                             [6, 6, 3, 2, 6, 3]))
        assert row["ood"] == pytest.approx(np.mean([tests[t]["acc"] for t in SHIFTS]))


def test_shifts_that_are_not_there_are_one_line_or_a_mistake(imagenet, capsys):
    shutil.rmtree(imagenet / "imagenet-r")
    shutil.rmtree(imagenet / "imagenet-sketch")
    assert list(load("imagenet", imagenet).tests) == ["imagenet", "v2", "a", "objectnet"]
    lines = [x for x in capsys.readouterr().out.splitlines() if "skipped" in x]
    assert len(lines) == 1 and lines[0].endswith(
        f": r ({imagenet / 'imagenet-r'}), sketch ({imagenet / 'imagenet-sketch'})")
    for name in ("R", "v2,x", ""):
        refused("imagenet", imagenet, f"--tests {name}: ", "v2", flags=["--tests", name])
    refused("imagenet", imagenet, "imagenet-r", flags=["--tests", "v2,r"])
    (imagenet / "imagenet-a/no_class").mkdir()  # what --tests does not name is not read
    assert list(load("imagenet", imagenet, tests="objectnet,v2").tests) == ["imagenet", "v2",
                                                                            "objectnet"]
    assert list(load("imagenet", imagenet, tests="imagenet").tests) == ["imagenet"]
    assert "skipped" not in capsys.readouterr().out


MAPPINGS = "objectnet-1.0/mappings"


@pytest.mark.parametrize("move, into, word", [
    ("imagenet/train", "train", "imagenet/train"),
    ("imagenet/val", "val", "imagenet/val"),
    (f"imagenet/val/{TISSUE}", "imagenet/val/n00000001", "imagenet/val/n00000001"),
    ("imagenet-r", "imagenet-r/imagenet-r", "imagenet-r/imagenet-r"),
    (f"imagenet-a/{TISSUE}", "imagenet-a/toilet_tissue", "imagenet-a/toilet_tissue"),
    (f"{V2}/9", f"{V2}/1000", f"{V2}/1000"),
    (f"{V2}/9", f"{V2}/09", f"{V2}/09"),
    (f"imagenet-sketch/{TISSUE}/sketch_1.JPEG", "other.JPEG", f"imagenet-sketch/{TISSUE}"),
    (f"{MAPPINGS}/imagenet_to_label_2012_v2", "other", f"{MAPPINGS}/imagenet_to_label_2012_v2"),
    ("objectnet-1.0/images", "objectnet-1.0/pictures", "objectnet-1.0/images"),
])
def test_wrong_imagenet_trees(imagenet, tmp_path, move, into, word):
    (imagenet / move).rename(tmp_path / "moved")
    (imagenet / into).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "moved").rename(imagenet / into)
    refused("imagenet", imagenet, word)


def test_a_val_without_class_folders_is_refused(imagenet):
    shutil.rmtree(imagenet / "imagenet/val")
    image(imagenet / "imagenet/val/ILSVRC2012_val_00000001.JPEG")
    refused("imagenet", imagenet, "imagenet/val")


@pytest.mark.parametrize("file, content", [
    ("objectnet_to_imagenet_1k.json", '{"Banana": "plantain"}'),
    ("objectnet_to_imagenet_1k.json", '{"Bnana": "banana"}'),
    ("pytorch_to_imagenet_2012_id.json", '{"954": 3}'),
    ("folder_to_objectnet_label.json", "{")])
def test_objectnets_mappings_must_fit_together(imagenet, file, content):
    (imagenet / MAPPINGS / file).write_text(content)
    refused("imagenet", imagenet, "objectnet-1.0")


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


def test_domainnet(domainnet, tiny, tmp_path):
    data = load("domainnet", domainnet)
    assert data.classnames == ["The_Eiffel_Tower", "aircraft_carrier"] and len(data.templates) == 80
    assert list(data.tests) == ["real", "painting", "clipart", "infograph", "sketch"]
    assert labels(data.tests["clipart"]) == {
        "The_Eiffel_Tower/clipart_000_test0.jpg": 0, "The_Eiffel_Tower/clipart_000_test1.jpg": 0,
        "aircraft_carrier/clipart_001_test0.jpg": 1, "aircraft_carrier/clipart_001_test1.jpg": 1}
    assert len(data.train) == 6 and data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    results = train_on("domainnet", domainnet, tiny, tmp_path / "run")
    assert set(results["measure"].values()) == {"acc"}
    assert results["rows"][-1]["tests"]["sketch"]["n"] == 4


def test_wrong_domainnet_trees(domainnet, tiny, tmp_path):
    bad = lambda *words, **how: refused("domainnet", domainnet, *words, **how)
    for name in ("real_train", "clipart_test"):
        listing = domainnet / f"domainnet/{name}.txt"
        good = listing.read_text()
        line = "clipart/bee/clipart_002_1.jpg 1"  # 1 is aircraft_carrier
        listing.write_text(good + line + "\n")
        bad(line)
        listing.write_text(good.replace("/", "\\"))
        bad("not as published")
        listing.write_text(good)
    train = domainnet / "domainnet/real_train.txt"
    good = train.read_text()
    train.write_text(good + "real/bee/real_003_1.jpg 3\n")  # no class has label 2
    bad("not as published")
    train.write_text(good)
    run = ["--model", tiny, "--steps", 1, "--workers", 1, "--out", tmp_path / "run"]
    broken = domainnet / "domainnet/real/aircraft_carrier/real_001_test1.jpg"
    broken.write_bytes(broken.read_bytes()[:60])
    bad(f"{broken}: ", flags=run)  # found by a worker process
    broken.unlink()
    bad(f"{broken}: ", flags=[*run, "--out", tmp_path / "other"])
    train.unlink()
    bad("domainnet/real_train.txt")


# ---- CIFAR-10 ----

CIFAR_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
STL_NAMES = "airplane bird car cat deer dog horse monkey ship truck".split()
FOLDER, BATCHES = "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)]


def publish(monkeypatch, folder):
    """Make the miniature batches in `folder` the ones whose MD5 torchvision knows."""
    md5 = lambda file: hashlib.md5((folder / file).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[file, md5(file)] for file in BATCHES])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5("test_batch")]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5("batches.meta")})


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    root, rng = tmp_path / "data", np.random.default_rng(0)
    for folder in (FOLDER, "CIFAR-10.1/datasets", "cifar-10.2", "stl10_binary"):
        (root / folder).mkdir(parents=True)
    for i, file in enumerate([*BATCHES, "test_batch"]):
        pixels = rng.integers(256, size=(4, 3072), dtype=np.uint8)
        pixels[0] = np.repeat([10, 20, 30], 1024)  # red, green and blue plane
        pixels[0, 1] = 99                          # red of row 0, column 1
        batch = {"data": pixels, "labels": [i, 6, 9, 0]}
        (root / FOLDER / file).write_bytes(pickle.dumps(batch, protocol=2))
    meta = pickle.dumps({"label_names": CIFAR_NAMES}, protocol=2)
    (root / FOLDER / "batches.meta").write_bytes(meta)
    publish(monkeypatch, root / FOLDER)
    np.save(root / "CIFAR-10.1/datasets/cifar10.1_v6_data.npy",
            rng.integers(256, size=(3, 32, 32, 3), dtype=np.uint8))
    np.save(root / "CIFAR-10.1/datasets/cifar10.1_v6_labels.npy", np.array([3, 0, 9], np.int32))
    v2 = rng.integers(256, size=(2, 32, 32, 3), dtype=np.uint8)
    np.savez(root / "cifar-10.2/cifar102_test.npz", images=v2, labels=np.array([7, 6]),
             label_names=np.array(CIFAR_NAMES, object))  # a pickle that nothing reads
    stl = rng.integers(256, size=(10, 3, 96, 96), dtype=np.uint8)
    stl[0] = 0
    stl[0, 0, 5, 7] = 200  # a channel is stored by columns: red of column 5, row 7
    stl.tofile(root / "stl10_binary/test_X.bin")
    np.arange(1, 11, dtype=np.uint8).tofile(root / "stl10_binary/test_y.bin")
    (root / "stl10_binary/class_names.txt").write_text("\n".join(STL_NAMES) + "\n")
    return root, v2


def test_cifar10(cifar, tiny, tmp_path):
    root, v2 = cifar
    data = load("cifar10", root)
    assert list(data.tests) == ["cifar10", "cifar10.1", "cifar10.2", "stl10"]
    assert data.classnames == CIFAR_NAMES
    assert data.train.images.shape == (20, 32, 32, 3)
    assert data.train.labels.tolist()[::4] == [0, 1, 2, 3, 4]
    assert data.train.images[0, 0, :2].tolist() == [[10, 20, 30], [99, 20, 30]]
    assert data.tests["cifar10"].labels.tolist() == [5, 6, 9, 0]
    assert data.tests["cifar10.1"].labels.tolist() == [3, 0, 9]
    assert (data.tests["cifar10.2"].images == v2).all()
    assert data.tests["cifar10.2"].labels.tolist() == [7, 6]
    stl = data.tests["stl10"]
    # label space without frog: airplane automobile bird cat deer dog horse ship truck
    # STL's order differs, monkey is out
    assert stl.labels.tolist() == [0, 2, 1, 3, 4, 5, 6, 7, 8] and stl.images.shape == (9, 96, 96, 3)
    assert stl.images[0, 7, 5].tolist() == [200, 0, 0] and stl.images[0].sum() == 200
    assert stl.project(torch.arange(10.)[None]).tolist() == [[0, 1, 2, 3, 4, 5, 7, 8, 9]]
    results = train_on("cifar10", root, tiny, tmp_path / "run")
    assert results["rows"][0]["tests"]["stl10"]["n"] == 9


class Evil:
    """Unpickled it makes a file."""
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return open, (str(self.witness), "w")


def test_crafted_pickles_are_refused_and_do_not_run(cifar, tmp_path, monkeypatch):
    root, v2 = cifar
    evil, bad = Evil(tmp_path / "witness"), lambda *words: refused("cifar10", root, *words)
    npz, npy = root / "cifar-10.2/cifar102_test.npz", root / "CIFAR-10.1/datasets"
    np.savez(npz, images=v2, labels=np.array([evil, evil], object))
    bad("cifar102_test.npz")
    npz.unlink()
    np.save(npy / "cifar10.1_v6_labels.npy", np.array([evil], object))
    bad("CIFAR-10.1")
    shutil.rmtree(npy)
    for file in ("data_batch_3", "test_batch", "batches.meta"):
        good = (root / FOLDER / file).read_bytes()
        (root / FOLDER / file).write_bytes(pickle.dumps(evil, protocol=2))
        bad(FOLDER)
        (root / FOLDER / file).write_bytes(good)
    assert not evil.witness.exists()
    load("cifar10", root)  # as a control, the same pickle runs under an MD5 that fits it
    (root / FOLDER / "data_batch_3").write_bytes(pickle.dumps(evil, protocol=2))
    publish(monkeypatch, root / FOLDER)
    bad("not as published")
    assert evil.witness.exists()


def test_cifar10_pickles_without_the_published_md5_do_not_run(tmp_path):
    """With the real MD5s of torchvision, which no miniature file has."""
    evil = Evil(tmp_path / "witness")
    (tmp_path / FOLDER).mkdir()
    for file in (*BATCHES, "test_batch", "batches.meta"):
        (tmp_path / FOLDER / file).write_bytes(pickle.dumps(evil, protocol=2))
    refused("cifar10", tmp_path, FOLDER)
    assert not evil.witness.exists()


def test_wrong_cifar_trees(cifar):
    root, v2 = cifar
    bad = lambda *words: refused("cifar10", root, *words)
    npz, v1 = root / "cifar-10.2/cifar102_test.npz", root / "CIFAR-10.1/datasets"
    np.savez(npz, images=v2)
    bad("cifar102_test.npz", "labels")
    npz.write_bytes(npz.read_bytes()[:-40])
    bad("cifar102_test.npz")
    npz.unlink()
    (v1 / "cifar10.1_v6_labels.npy").unlink()
    bad("cifar10.1_v6_labels.npy")
    shutil.rmtree(v1)
    for numbers in (range(1, 4), range(10), range(2, 12)):  # as many as images, from 1
        (root / "stl10_binary/test_y.bin").write_bytes(bytes(numbers))
        bad("stl10_binary")
    shutil.rmtree(root / "stl10_binary")
    assert list(load("cifar10", root).tests) == ["cifar10"]
    shutil.rmtree(root / FOLDER)
    bad(FOLDER)


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
          [1, 2, "Tayassu pecari"], [2, 3, "puma"], [99999, 301, "rollulus rouloul"])
    return root.parent


def test_iwildcam(iwildcam, tiny, tmp_path, capsys):
    data = load("iwildcam", iwildcam)
    said = capsys.readouterr().out
    assert "Latin" in said and "labels.csv" in said
    assert data.classnames == data.aliases == ["empty", "tayassu pecari", "puma"]
    assert list(data.tests) == ["id_test", "test"]
    assert labels(data.train) == {"train/im-0.jpg": 0, "train/im-1.jpg": 1, "train/im-2.jpg": 2}
    assert labels(data.val) == {"train/im-4.jpg": 1}
    assert labels(data.tests["test"]) == {"train/im-7.jpg": 1}
    # columns: confidence, predicted class, nll; both id_test images are called class 0
    scores = torch.tensor([[0.5, 0, 0.5]] * 2, dtype=torch.double)
    found = common.metrics(scores, data.tests["id_test"])
    assert found["acc"] == 50 and found["macro_f1"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    results = train_on("iwildcam", iwildcam, tiny, tmp_path / "run")
    row = results["rows"][-1]
    assert results["measure"] == {"id_test": "macro_f1", "test": "macro_f1"}
    assert row["id"] == row["tests"]["id_test"]["macro_f1"]
    assert row["ood"] == row["tests"]["test"]["macro_f1"]


def test_iwildcams_english_names(iwildcam, capsys):
    """labels.csv as the WiSE-FT code has it, with y = 99999 for what is no class."""
    table(iwildcam / "iwildcam_v2.0/labels.csv", ["y", "category_id", "name", "english"],
          [0, 0, "empty", "empty"], [1, 2, "tayassu pecari", "White-lipped peccary"],
          [2, 3, "puma", "Günther's cougar"], [99999, 243, "didelphis sp", "opossum"])
    data = load("iwildcam", iwildcam)
    assert data.classnames == ["empty", "white-lipped peccary", "günther's cougar"]
    assert data.aliases == ["empty", "tayassu pecari", "puma"]
    assert not capsys.readouterr().out


def test_wrong_iwildcam_trees(iwildcam):
    metadata = iwildcam / "iwildcam_v2.0/metadata.csv"
    good = metadata.read_text()
    for old, new, *words in (("filename", "file", metadata, "filename"), (",test,", ",seq,", "test"),
                             ("id_val", "seq", metadata, "val"),
                             ("im-7.jpg,1", "im-7.jpg,puma", "puma"),
                             ("7,test,5,im-7.jpg,1", "7,test", "not as published")):
        metadata.write_text(good.replace(old, new))
        refused("iwildcam", iwildcam, *words)
    metadata.write_text(good)
    categories = iwildcam / "iwildcam_v2.0/categories.csv"
    categories.write_text(categories.read_text().replace("1,2,", "7,2,"))  # no class 1
    refused("iwildcam", iwildcam, "not as published")
    categories.unlink()
    refused("iwildcam", iwildcam, "categories.csv")


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
          ["India", "IN", "IND", "Asia"], ["France", "FR", "FRA", "Europe"],
          ["USA", "US", "USA", "Americas"], ["Antarctica", "AQ", "ATA", ""])
    for i in range(len(rows)):
        image(root / f"images/rgb_img_{i}.png")
    return root.parent


def test_fmow(fmow, tiny, tmp_path):
    data = load("fmow", fmow)
    assert data.classnames == ["airport_hangar", "zoo"] and list(data.tests) == ["id_test", "test"]
    assert labels(data.train) == {"images/rgb_img_0.png": 1, "images/rgb_img_1.png": 0}
    assert labels(data.val) == {"images/rgb_img_4.png": 1}
    assert labels(data.tests["id_test"]) == {"images/rgb_img_6.png": 1}
    test = data.tests["test"]
    want = ((8, 1), (9, 0), (10, 1), (11, 1))
    assert labels(test) == {f"images/rgb_img_{i}.png": y for i, y in want}
    # all four called zoo: Asia has 1 of 2 right, Europe 1 of 1; that of no region counts in acc
    assert test.groups.tolist() == [0, 0, 1, -1]
    found = common.metrics(torch.tensor([[0.5, 1, 0.5]] * 4, dtype=torch.double), test)
    assert found["acc"] == 75 and found["worst_region"] == 50
    results = train_on("fmow", fmow, tiny, tmp_path / "run")
    row = results["rows"][-1]
    assert results["measure"] == {"id_test": "acc", "test": "worst_region"}
    assert row["id"] == row["tests"]["id_test"]["acc"] == row["tests"]["id_test"]["worst_region"]
    assert row["ood"] == row["tests"]["test"]["worst_region"]


def test_wrong_fmow_trees(fmow, tiny, tmp_path):
    root = fmow / "fmow_v1.1"
    for file, column in (("country_code_mapping.csv", "alpha-3"), ("rgb_metadata.csv", "category")):
        good = (root / file).read_text()
        (root / file).write_text(good.replace(column, "code"))
        refused("fmow", fmow, root / file, column)
        (root / file).write_text(good)
    (root / "images").rename(root / "pictures")
    refused("fmow", fmow, "images/rgb_img_6.png", flags=["--model", tiny, "--steps", 2, "--out",
                                                         tmp_path / "run"])


# ---- Labels ----

def test_a_label_that_is_no_class_is_refused(domainnet, iwildcam, cifar, tiny, tmp_path):
    """The three trees lie in one folder."""
    def bad(data, *words):
        refused(data, tmp_path / "data", *words, flags=["--model", tiny, "--steps", 2, "--workers",
                                                        0, "--out", tmp_path / f"run-{data}"])
    with open(domainnet / "domainnet/clipart_test.txt", "a") as f:
        f.write("real/aircraft_carrier/../real/bee/x.jpg 2\n")
    bad("domainnet", "clipart")
    metadata = iwildcam / "iwildcam_v2.0/metadata.csv"
    metadata.write_text(metadata.read_text().replace("im-7.jpg,1", "im-7.jpg,3"))
    bad("iwildcam", "test")
    np.save(cifar[0] / "CIFAR-10.1/datasets/cifar10.1_v6_labels.npy", np.array([3, 0, 10]))
    bad("cifar10", "10.1")
    np.save(cifar[0] / "CIFAR-10.1/datasets/cifar10.1_v6_labels.npy", np.array([3, 0]))
    bad("cifar10", "10.1")  # two labels for three images
