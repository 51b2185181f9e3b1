"""The data sets as miniature trees in their published layout: labels, metrics, mistakes."""
import hashlib
import os
import pickle
import shutil
from argparse import Namespace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

import common
from tests.conftest import complaint, printed

# WordNet id -> class of ImageNet, from its published list
GOLDFISH, STINGRAY, BANANA, TISSUE = "n01443537", "n01498041", "n07753592", "n15075141"
CLASS = {GOLDFISH: 1, STINGRAY: 6, "n02708093": 409, "n03196217": 530, BANANA: 954, TISSUE: 999}
NAMES = ["goldfish", "stingray", "analog clock", "digital clock", "banana", "toilet paper"]
V2, MAPS = "imagenetv2-matched-frequency-format-val", "objectnet-1.0/mappings"
CIFAR = "cifar-10-batches-py"
PICKLES = [*[f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta"]
CIFAR_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
NPY, NPZ = "CIFAR-10.1/datasets/cifar10.1_v6_labels.npy", "cifar-10.2/cifar102_test.npz"
STL, TOWER = "stl10_binary/test_y.bin", ["The_Eiffel_Tower", "aircraft_carrier"]
CSV, NO_MODEL = "iwildcam_v2.0/metadata.csv", ["--model", "local-dir:none"]
LIST, REAL = "domainnet/clipart_test.txt", "domainnet/real/aircraft_carrier/real_001_test1.jpg"
TEXTS = {
    "imagenet-r/README.txt": "a file beside the class folders, as published",
    f"{MAPS}/folder_to_objectnet_label.json":
        '{"alarm_clock": "Alarm clock", "banana": "Banana", "air_freshener": "Air freshener"}',
    f"{MAPS}/objectnet_to_imagenet_1k.json":
        '{"Banana": "banana", "Alarm clock": "analog clock; digital clock"}',
    f"{MAPS}/pytorch_to_imagenet_2012_id.json": '{"409": 2, "530": 0, "954": 1}',
    f"{MAPS}/imagenet_to_label_2012_v2": "digital clock\nbanana\nanalog clock\n",
    "stl10_binary/class_names.txt":
        "airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n",
    "iwildcam_v2.0/categories.csv":
        "y,category_id,name\n0,0,empty\n1,2,Tayassu pecari\n2,3,puma\n99999,301,rollulus rouloul\n",
    CSV: """,split,location_remapped,filename,y
0,train,5,im-0.jpg,0\n1,train,5,im-1.jpg,1\n2,train,5,im-2.jpg,2\n3,val,5,im-3.jpg,2
4,id_val,5,im-4.jpg,1\n5,id_test,5,im-5.jpg,0\n6,id_test,5,im-6.jpg,2\n7,test,5,im-7.jpg,1
""", "fmow_v1.1/country_code_mapping.csv": """name,alpha-2,alpha-3,region
India,IN,IND,Asia\nFrance,FR,FRA,Europe\nUSA,US,USA,Americas\nAntarctica,AQ,ATA,
""", "fmow_v1.1/rgb_metadata.csv": """,split,img_path,category,country_code,timestamp
0,train,,zoo,IND,2012-12-31T23:59:59Z\n1,train,,airport_hangar,FRA,2005-01-01T00:00:00Z
2,train,,zoo,IND,2013-01-01T00:00:00Z\n3,seq,,zoo,IND,2012-01-01T00:00:00Z
4,val,,zoo,USA,2012-06-01T00:00:00Z\n5,val,,zoo,USA,2014-06-01T00:00:00Z
6,test,,zoo,FRA,2012-06-01T00:00:00Z\n7,test,,zoo,FRA,2015-12-31T23:59:59Z
8,test,,zoo,IND,2016-01-01T00:00:00Z\n9,test,,airport_hangar,IND,2017-03-01T00:00:00Z
10,test,,zoo,FRA,2016-05-01T00:00:00Z\n11,test,,zoo,XKX,2016-05-01T00:00:00Z
"""}


def images(root, *names, border=0):
    """Images of 40 x 36 pixels, blue within a red border."""
    pixels = np.full((36, 40, 3), (255, 0, 0), np.uint8)
    pixels[border:36 - border, border:40 - border] = 90, 120, 200
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name, "png")  # PIL goes by the content, not the name


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Every data set as it is published, of a few images."""
    root = tmp_path_factory.mktemp("published")
    for wnid, label in CLASS.items():
        images(root, *[f"imagenet/train/{wnid}/{wnid}_{i}.JPEG" for i in range(3)],
               f"imagenet/val/{wnid}/ILSVRC2012_val_{label:08}.JPEG",
               f"imagenet-sketch/{wnid}/sketch_1.JPEG")
    images(root, *[f"{V2}/{i}/image.jpeg" for i in (0, 1, 2, 9, 10, 11, 954)],
           f"imagenet-r/{GOLDFISH}/art_0.jpg", f"imagenet-r/{BANANA}/toy_3.jpg",
           f"imagenet-a/{STINGRAY}/0.001_fish _ goldfish_0.9.jpg", f"imagenet-a/{TISSUE}/0.jpg",
           *[f"iwildcam_v2.0/train/im-{i}.jpg" for i in range(8)],
           *[f"fmow_v1.1/images/rgb_img_{i}.png" for i in range(12)])
    images(root / "objectnet-1.0/images", "alarm_clock/0.png", "banana/0.png",
           "air_freshener/0.png", border=2)
    for domain in ("real", "painting", "clipart", "infograph", "sketch"):
        for split, n in (("train", 3), ("test", 2)):
            lines = [f"{domain}/{name}/{domain}_{label:03}_{split}{i}.jpg {label}"
                     for label, name in enumerate(TOWER) for i in range(n)]
            images(root / "domainnet", *[line.split()[0] for line in lines])
            (root / f"domainnet/{domain}_{split}.txt").write_text("\n".join(lines) + "\n")
    for folder in (MAPS, CIFAR, "CIFAR-10.1/datasets", "cifar-10.2", "stl10_binary"):
        (root / folder).mkdir(parents=True)
    pixels = np.zeros((4, 3072), np.uint8)
    pixels[0, [0, 1024, 2048, 1]] = 10, 20, 30, 99  # planes of red, green and blue; rows in each
    batches = [{"data": pixels, "labels": [i, 6, 9, 0]} for i in range(6)]
    for file, batch in zip(PICKLES, [*batches, {"label_names": CIFAR_NAMES}]):
        (root / CIFAR / file).write_bytes(pickle.dumps(batch, protocol=2))
    np.save(root / NPY.replace("labels", "data"), np.zeros((3, 32, 32, 3), np.uint8))
    np.save(root / NPY, np.array([3, 0, 9], np.int32))
    np.savez(root / NPZ, images=np.full((2, 32, 32, 3), 7, np.uint8), labels=np.array([7, 6]),
             label_names=np.array(CIFAR_NAMES, object))  # a pickle, which nothing reads
    pixels = np.zeros((10, 3, 96, 96), np.uint8)
    pixels[0, 0, 5, 7] = 200  # a channel is stored by columns: red of column 5, row 7
    pixels.tofile(root / STL.replace("test_y", "test_X"))
    (root / STL).write_bytes(bytes(range(1, 11)))
    for file, text in TEXTS.items():
        (root / file).write_text(text)
    return root


@pytest.fixture
def root(published, tmp_path, monkeypatch):
    """A copy to change, whose pickles are the ones that torchvision knows by their MD5."""
    md5 = [hashlib.md5((published / CIFAR / file).read_bytes()).hexdigest() for file in PICKLES]
    monkeypatch.setattr(CIFAR10, "train_list", list(zip(PICKLES, md5))[:5])
    monkeypatch.setattr(CIFAR10, "test_list", [[PICKLES[5], md5[5]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5[6]})
    return shutil.copytree(published, tmp_path / "data")


@pytest.fixture
def mine(tmp_path):
    images(tmp_path / "mine", *[f"{split}/{name}/1.png" for name in ("cat", "polar_bear")
                                for split in ("train", "test", "shifts/night")])
    return tmp_path / "mine"


def load(data, root, **flags):
    about = dict(data=data, data_dir=root, tests="all", holdout=0.0, shots=0, limit=0, seed=0)
    return common.load_data(Namespace(**about | flags))


def labels(images):
    """{folder/file: label} of files, all of which must be there."""
    paths = list(map(os.fsdecode, images.images))
    assert all(map(os.path.isfile, paths))
    return {"/".join(p.split("/")[-2:]): y for p, y in zip(paths, images.labels.tolist())}


def refused(data, root, *words, flags=()):
    """A run on a wrong tree ends in one line that holds all words."""
    line = complaint("lipsum_ft.py", "--data", data, "--data-dir", root, *NO_MODEL, *flags)
    assert all(str(word) in line for word in words), line


def test_macro_f1_and_worst_group_by_hand():
    y, predicted = torch.tensor([0, 0, 0, 1, 1, 4]), torch.tensor([0, 0, 1, 1, 3, 0])
    # class 0: TP 2, FP 1, FN 1 -> 4/6; 1: TP 1, FP 1, FN 1 -> 1/2; 4: TP 0 -> 0; 3 is absent
    assert common.macro_f1(predicted, y) == pytest.approx((4 / 6 + 1 / 2 + 0) / 3)
    assert common.macro_f1(y, y) == 1
    # groups 1 and 2 have no image, the last image has no group
    correct, groups = torch.tensor([1, 1, 0, 1, 0, 0, 0]) > 0, torch.tensor([0, 0, 0, 3, 3, 3, -1])
    assert common.worst_group_accuracy(correct, groups) == pytest.approx(1 / 3)
    assert common.worst_group_accuracy(correct[:3], groups[:3]) == pytest.approx(2 / 3)


def test_limit_keeps_n_images_from_everywhere_always_the_same(published):
    n = np.arange(60)
    whole = common.ImageSet("x", np.uint8(n)[:, None, None, None], n, groups=n)
    chosen = common.limited(whole, 20)
    assert len(chosen) == len(set(chosen.labels.tolist())) == 20 and chosen.labels.max() >= 40
    assert chosen.images.ravel().tolist() == chosen.labels.tolist() == chosen.groups.tolist()
    assert torch.equal(chosen.labels, common.limited(whole, 20).labels)
    data = load("imagenet", published, holdout=0.4, limit=2)
    assert {len(split) for split in (data.train, data.val, *data.tests.values())} == {2}


# ---- Folders of one's own ----

def test_folder(mine, capsys):
    names = ["a.gif", "b.jfif", "c.avif", "d.JPEG", "ein Löwe.webp", os.fsdecode(b"caf\xe9.png")]
    images(mine, "val/polar_bear/7.png", *[f"train/polar_bear/{name}" for name in names])
    data = load("folder", mine)
    assert data.classnames == ["cat", "polar bear"] and data.aliases == ["cat", "polar_bear"]
    assert data.templates == ["a photo of a {}."]
    assert capsys.readouterr().out == "val: 1 classes have no folder, such as ['cat']\n"
    want = {"cat/1.png": 0, "polar_bear/1.png": 1}
    assert labels(data.tests["test"]) == labels(data.tests["night"]) == want
    want |= {f"polar_bear/{name}": 1 for name in names}
    assert list(labels(data.train).items()) == sorted(want.items())  # on every file system
    assert labels(data.val) == {"polar_bear/7.png": 1}
    listed = common.ImageSet("x", [os.fsdecode(path) for path in data.train.images], range(8))
    listed.transform = np.asarray
    assert all((listed[i][0] == (90, 120, 200)).all() for i in range(8))


def test_what_is_not_read(mine, capsys):
    for left in ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", ".hidden"):  # by systems
        images(mine, *[f"{place}/{left}/x.png" for place in (".", "train", "train/cat", "shifts")])
    images(mine, "train/cat/._1.png", "valid/cat/1.png", "shift/day/cat/1.png")
    images(mine / "test", "cat/notes.txt", "polar_bear/Thumbs.db", "polar_bear/scan.pdf", "x.png")
    data, lines = load("folder", mine), capsys.readouterr().out.splitlines()
    assert len(labels(data.train)) == 2 and list(data.tests) == ["test", "night"]
    assert sum("not read: shift, valid;" in line for line in lines) == 1
    assert sum("/test: 4 files" in line and "test/x.png" in line for line in lines) == 1
    assert len(lines) == 2


def test_a_name_is_the_same_in_both_forms_of_unicode(mine):
    one, two = "\u00e9cole", "e\u0301cole"  # in a sorted list after z, and after e
    images(mine, f"train/{two}/1.png", f"test/{one}/1.png", f"shifts/night/{two}/1.png")
    (mine / "classnames.txt").write_text(f"{two}\tschool house\n", encoding="utf-8")
    data = load("folder", mine)
    assert data.classnames == ["cat", "polar bear", "school house"] and data.aliases[2] == one
    assert all(sorted(s.labels.tolist()) == [0, 1, 2] for s in (data.train, *data.tests.values()))
    images(mine, *[f"train/{name}/1.png" for name in ("a", "n\u00e9e", "ne\u0301e")])
    refused("folder", mine, "'n\u00e9e'")


def test_wrong_folders(mine):
    bad = lambda *words, **how: refused("folder", mine, *words, **how)
    bad("--tests dusk", "night", flags=["--tests", "dusk"])
    (mine / "train/cat/link").symlink_to(mine / "test/cat")
    bad("train/cat/link")
    (mine / "train/cat/link").unlink()
    for name, word in (("train/cat/deep/2.png", "train/cat/deep"), ("train/empty/2.txt", "empty: "),
                       ("shifts/night/dog/2.png", "dog: "), ("train/polar bear/2.png", "'polar b")):
        images(mine, name)
        bad(word)
        shutil.rmtree((mine / name).parent)
    for name in ("shifts/day", "val", "test/dog"):  # a disk that is not there
        (mine / name).symlink_to("nothing")
        bad(f"{name}: a link")
        (mine / name).unlink()
    for text in ("cat\ta\tb\n", "cat\ta\ncat\tb\n"):
        (mine / "classnames.txt").write_text(text)
        bad("classnames.txt: 'cat")
    (mine / "classnames.txt").unlink()
    for name in ("OOD", "test", "Nll", "val"):  # columns of the table, other splits
        (mine / "shifts/night").rename(mine / "shifts" / name)
        bad(f"shifts/{name}: ")
        (mine / "shifts" / name).rename(mine / "shifts/night")
    load("folder", mine)  # all changes are taken back
    for split in ("train", "test"):  # one level too deep
        os.renames(mine / split / "cat", mine / split / "animals/cat")
    bad("test/animals/cat")
    shutil.rmtree(mine / "train")
    images(mine, "train/1.png")  # not in a class folder
    bad("mine/train: ")
    shutil.rmtree(mine / "test")
    bad("mine: ", "test/CLASS")


# ---- The papers' data sets ----

def test_imagenet_labels_and_label_spaces(published):
    data = load("imagenet", published)
    tests = data.tests
    assert list(tests) == ["imagenet", "v2", "r", "a", "sketch", "objectnet"]
    assert len(data.classnames) == 1000 and len(data.templates) == 80
    assert [data.classnames[i] for i in CLASS.values()] == NAMES
    for split in (data.train, tests["imagenet"], tests["sketch"]):
        assert {file.split("/")[0]: y for file, y in labels(split).items()} == CLASS
    assert labels(tests["v2"]) == {f"{i}/image.jpeg": i for i in (0, 1, 2, 9, 10, 11, 954)}
    assert labels(tests["r"]) == {f"{GOLDFISH}/art_0.jpg": 0, f"{BANANA}/toy_3.jpg": 1}
    assert list(labels(tests["a"]).values()) == [0, 1]
    assert labels(tests["objectnet"]) == {"alarm_clock/0.png": 0, "banana/0.png": 1}
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


def test_shifts_that_are_not_there_are_one_line_or_a_mistake(root, capsys):
    shutil.rmtree(root / "imagenet-r")
    shutil.rmtree(root / "imagenet-sketch")
    assert list(load("imagenet", root).tests) == ["imagenet", "v2", "a", "objectnet"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(lines) == 1 and lines[0].endswith(
        f": r ({root / 'imagenet-r'}), sketch ({root / 'imagenet-sketch'})")
    assert list(load("imagenet", root, tests="a,v2").tests) == ["imagenet", "v2", "a"]
    for name in ("R", "v2,x", ""):
        refused("imagenet", root, f"--tests {name}: ", "v2", flags=["--tests", name])
    refused("imagenet", root, f"{root}/imagenet-r: ", flags=["--tests", "v2,r"])
    (root / "imagenet-a/no_class").mkdir()
    refused("imagenet", root, f"{root}/imagenet-a/no_class: ")  # it is there, and not as published
    assert list(load("imagenet", root, tests="imagenet").tests) == ["imagenet"]  # reads no other
    assert "skipped" not in capsys.readouterr().out


def test_domainnet(published):
    data = load("domainnet", published)
    assert data.classnames == TOWER and len(data.templates) == 80
    assert list(data.tests) == ["real", "painting", "clipart", "infograph", "sketch"]
    assert labels(data.tests["clipart"]) == {
        f"{name}/clipart_{y:03}_test{i}.jpg": y for y, name in enumerate(TOWER) for i in (0, 1)}
    assert len(labels(data.train)) == 6 and data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_cifar10(root):
    data = load("cifar10", root)
    assert data.classnames == CIFAR_NAMES and data.train.images.shape == (20, 32, 32, 3)
    assert data.train.labels.tolist()[::4] == [0, 1, 2, 3, 4]
    assert data.train.images[0, 0, :2].tolist() == [[10, 20, 30], [99, 0, 0]]
    assert {name: split.labels.tolist() for name, split in data.tests.items()} == {
        "cifar10": [5, 6, 9, 0], "cifar10.1": [3, 0, 9], "cifar10.2": [7, 6],
        "stl10": [0, 2, 1, 3, 4, 5, 6, 7, 8]}  # of CIFAR-10's names without frog; monkey is out
    stl = data.tests["stl10"]
    assert stl.project(torch.arange(10.)[None]).tolist() == [[0, 1, 2, 3, 4, 5, 7, 8, 9]]
    assert stl.images[0, 7, 5].tolist() == [200, 0, 0] and stl.images.sum() == 200
    assert stl.images.shape == (9, 96, 96, 3) and (data.tests["cifar10.2"].images == 7).all()


def test_crafted_pickles_are_refused_and_do_not_run(root, tmp_path, monkeypatch):
    witness, bad = tmp_path / "witness", lambda word: refused("cifar10", root, word)
    evil = type("Evil", (), {"__reduce__": lambda _: (open, (str(witness), "w"))})()
    np.savez(root / NPZ, images=np.zeros((2, 32, 32, 3), np.uint8), labels=np.array([evil, evil]))
    bad(NPZ)
    np.save(root / NPY, np.array([evil]))
    bad("CIFAR-10.1")
    for file in ("data_batch_3", "test_batch", "batches.meta"):
        good = (root / CIFAR / file).read_bytes()
        (root / CIFAR / file).write_bytes(pickle.dumps(evil, protocol=2))
        bad(CIFAR)
        (root / CIFAR / file).write_bytes(good)
    monkeypatch.undo()  # torchvision's own MD5s, which no miniature file has
    (root / CIFAR / "data_batch_1").write_bytes(pickle.dumps(evil, protocol=2))
    bad(CIFAR)
    assert not witness.exists()
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    bad("not as published")  # as a control: it runs if no MD5 is in its way
    assert witness.exists()


def test_iwildcam(root, capsys):
    data = load("iwildcam", root)
    assert "Latin" in capsys.readouterr().out
    assert data.classnames == data.aliases == ["empty", "tayassu pecari", "puma"]
    assert labels(data.train) == {"train/im-0.jpg": 0, "train/im-1.jpg": 1, "train/im-2.jpg": 2}
    assert labels(data.val) == {"train/im-4.jpg": 1}
    assert {name: list(labels(split)) for name, split in data.tests.items()} == {
        "id_test": ["train/im-5.jpg", "train/im-6.jpg"], "test": ["train/im-7.jpg"]}
    # columns: confidence, predicted class, nll; both id_test images are called class 0
    found = common.metrics(torch.tensor([[0.5, 0, 0.5]] * 2).double(), data.tests["id_test"])
    assert found["acc"] == 50 and found["macro_f1"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    # labels.csv of the WiSE-FT code: there too 99999 is no class
    (root / "iwildcam_v2.0/labels.csv").write_text(
        "y,category_id,name,english\n0,0,empty,empty\n1,2,tayassu pecari,White-lipped peccary\n"
        "2,3,puma,Günther's cougar\n99999,243,didelphis sp,opossum\n", encoding="utf-8")
    data = load("iwildcam", root)
    assert data.classnames == ["empty", "white-lipped peccary", "günther's cougar"]
    assert data.aliases == ["empty", "tayassu pecari", "puma"] and not capsys.readouterr().out


def test_fmow(published):
    data = load("fmow", published)
    assert data.classnames == ["airport_hangar", "zoo"] and list(data.tests) == ["id_test", "test"]
    assert labels(data.train) == {"images/rgb_img_0.png": 1, "images/rgb_img_1.png": 0}
    assert labels(data.val) == {"images/rgb_img_4.png": 1}
    assert labels(data.tests["id_test"]) == {"images/rgb_img_6.png": 1}
    test, want = data.tests["test"], {8: 1, 9: 0, 10: 1, 11: 1}
    assert labels(test) == {f"images/rgb_img_{i}.png": y for i, y in want.items()}
    # all four called zoo: Asia has 1 of 2 right, Europe 1 of 1; that of no region counts in acc
    assert test.groups.tolist() == [0, 0, 1, -1]
    zoo = torch.tensor([[0.5, 1, 0.5]] * 4, dtype=torch.double)
    found = common.metrics(zoo, test)
    assert found["acc"] == 75 and found["worst_region"] == 50
    assert common.metrics(zoo[:1], data.tests["id_test"])["worst_region"] == 100


@pytest.mark.parametrize("data, metrics, sizes", [
    ("imagenet", ["acc"] * 6, [6, 6, 2, 2, 6, 2]), ("domainnet", ["acc"] * 5, [4] * 5),
    ("cifar10", ["acc"] * 4, [4, 3, 2, 6]), ("iwildcam", ["macro_f1"] * 2, [2, 1]),
    ("fmow", ["acc", "worst_region"], [1, 4])])
def test_from_start_to_results(root, tiny_vit, tmp_path, monkeypatch, data, metrics, sizes):
    monkeypatch.setattr(open_clip, "OPENAI_IMAGENET_TEMPLATES", ["a {}."])  # 80 take a minute
    printed("lipsum_ft.py", "--data", data, "--data-dir", root, "--model", tiny_vit, "--steps", 2,
            "--batch-size", 4, "--workers", 0, "--limit", 6, "--out", tmp_path / "run")
    results = common.read_json(tmp_path / "run/results.json")
    assert list(results["measure"].values()) == metrics and len(results["rows"]) == 2
    for row in results["rows"]:
        assert [test["n"] for test in row["tests"].values()] == sizes
        score, *shifts = [row["tests"][test][m] for test, m in results["measure"].items()]
        assert row["id"] == score and row["ood"] == pytest.approx(np.mean(shifts))


@pytest.mark.parametrize("data, path, change, words", [
    ("imagenet", f"imagenet-sketch/{TISSUE}/sketch_1.JPEG", None, f"imagenet-sketch/{TISSUE}"),
    ("imagenet", "imagenet/train", None, ""),
    ("imagenet", f"{MAPS}/imagenet_to_label_2012_v2", None, ""),
    ("imagenet", f"{MAPS}/objectnet_to_imagenet_1k.json", ('"banana', '"fig'), "objectnet-1.0"),
    ("imagenet", f"{MAPS}/pytorch_to_imagenet_2012_id.json", (": 1", ": 3"), "objectnet-1.0"),
    ("domainnet", "domainnet/real_train.txt", (" 1", " 2"), "data:"),  # no class has label 1
    ("domainnet", LIST, ("aircraft_carrier", "bee"), f"{LIST} bee aircraft_carrier"),
    ("domainnet", LIST, ("test1.jpg 1", "test1.jpg 2"), "clipart label"),  # 2 is no class
    ("domainnet", LIST, ("/", ""), ""), ("domainnet", REAL, None, ""), ("domainnet", REAL, b"", ""),
    ("cifar10", CIFAR, None, ""), ("cifar10", NPY, None, ""), ("cifar10", NPZ, b"PK\3\4", ""),
    ("cifar10", NPY, ("(3,)", "(2,)"), "10.1"), ("cifar10", NPY, ("\t", "\n"), "10.1"),  # 9 -> 10
    *[("cifar10", STL, bytes(numbers), "stl10_binary")  # of ten images, from 1
      for numbers in (range(1, 4), range(10), range(2, 12))],
    ("iwildcam", "iwildcam_v2.0/categories.csv", ("1,2,", "7,2,"), "data:"),  # no class 1
    ("iwildcam", CSV, ("filename", "file"), f"{CSV} filename"),
    ("iwildcam", CSV, (",test,", ",seq,"), CSV), ("iwildcam", CSV, ("id_val", "seq"), CSV),
    ("iwildcam", CSV, (",im-7.jpg,1", ""), "data:"), ("iwildcam", CSV, ("jpg,1", "jpg,x"), "'x'"),
    ("iwildcam", CSV, ("7.jpg,1", "7.jpg,3"), "label 3"),  # 3 is no class
    ("fmow", "fmow_v1.1/images", None, "images/rgb_img_6.png")])
def test_wrong_trees_are_one_line(root, tiny_vit, tmp_path, data, path, change, words):
    """change: the file's bytes, or what in them is replaced; None: it is gone."""
    file = root / path
    if isinstance(change, tuple):
        change = file.read_bytes().replace(*map(str.encode, change))
    if change is None:
        file.rename(tmp_path / "away")
    else:
        file.write_bytes(change)
    refused(data, root, *(words or path).split(), flags=[
        "--model", tiny_vit, "--out", tmp_path / "run", "--workers", int(change == b"")])
