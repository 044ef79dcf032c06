"""Sharing on the Hugging Face Hub, against a stand-in for it: what is in the folder, uploads, downloads, what goes
wrong, uploads in the background of a run; and that the token is nowhere."""

import csv
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.utils import _http
from PIL import Image

import caption_image
import export_to_hub
from captioning.command_line.recipes import read_recipe
from captioning.common.files import write_atomically
from captioning.common.hub_errors import explain
from captioning.common.printable import printable
from captioning.model import checkpoint
from captioning.sharing import hub_folder, model_card, upload
from conftest import REDUCED_ENCODERS, REPO_ROOT, randomize
from helpers.calibrated import calibrated_copy
from helpers.hub_stand_in import HubStandIn, Repo
from helpers.runs import TINY

SHAPES = REPO_ROOT / "examples" / "shapes"
SCENES = [str(SHAPES / f"scene_{i}.png") for i in range(2)]
DRY_RUN = ["anna/shapes", "--dry-run", "shared", "--checkpoint", str(SHAPES)]
TOKEN = "hf_ThisIsSecret1234567890"


def caption(capsys, *argv):
    """What caption_image prints, without the names of the images."""
    capsys.readouterr()
    caption_image.main([*SCENES, *argv])
    return [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The stand-in, in the place of the Hub; the user is logged in by HF_TOKEN, and nothing is in the cache."""
    with HubStandIn(TOKEN) as stand_in:
        for name, value in dict(
            ENDPOINT=stand_in.url, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True,
            HUGGINGFACE_CO_URL_TEMPLATE=stand_in.url + "/{repo_id}/resolve/{revision}/{filename}",
            HF_HUB_CACHE=str(tmp_path / "hf_cache"), HF_TOKEN_PATH=str(tmp_path / "no_login"),
        ).items():  # fmt: skip
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between its own tries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield stand_in
        _http.close_session()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The Shapes checkpoint as it would be shared."""
    place = tmp_path_factory.mktemp("exported") / "shared"
    options = ["--checkpoint", str(SHAPES), "--license", "apache-2.0", "--samples", *SCENES]
    export_to_hub.main(["anna/shapes", "--dry-run", str(place), *options])
    return place


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_exported_folder_captions_by_itself(exported, tmp_path, capsys):
    """From another directory, without PYTHONPATH, and without every library that its requirements.txt leaves out."""
    needed = {re.match(r"[\w.-]+", line)[0] for line in (exported / "requirements.txt").read_text().splitlines()}
    assert needed == {"filelock", "numpy", "pillow", "safetensors", "tokenizers", "torch", "tqdm"}
    left_out = (
        "albumentations cv2 datasets huggingface_hub matplotlib pandas pooch requests scipy sklearn timm transformers"
    )
    code = f"""import runpy, sys
sys.path.remove("")
sys.modules.update(dict.fromkeys({left_out.split()}))
sys.argv = {["example.py", *SCENES]}
runpy.run_path({str(exported / "example.py")!r}, run_name="__main__")"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    environment |= dict(PYTHONPATH="", PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    expected = caption(capsys, "--checkpoint", str(SHAPES))
    assert [line.partition(": ")[2] for line in done.stdout.splitlines()] == expected
    assert len(set(expected)) == 2
    assert caption(capsys, "--checkpoint", str(exported)) == expected


def test_the_exported_folder_is_whole_and_says_nothing_of_this_machine(exported):
    files = {path.relative_to(exported).as_posix(): path for path in exported.rglob("*") if path.is_file()}
    assert {name for name in files if not name.startswith("source/")} == {
        "README.md", "captioner.safetensors", "config.json", "example.py", "generation_config.json",
        "processor_config.json", "recipe.toml", "requirements.txt", "samples/sample_1.png", "samples/sample_2.png",
        "tokenizer.json", "tokenizer_config.json", "transformers_captioner.py",
    }  # fmt: skip
    for name in ("captioner.safetensors", "tokenizer.json"):
        assert files[name].read_bytes() == (SHAPES / name).read_bytes()
    for path in files.values():
        assert str(REPO_ROOT).encode() not in path.read_bytes()
        assert str(Path.home()).encode() + b"/" not in path.read_bytes()
    assert np.array_equal(Image.open(files["samples/sample_2.png"]), Image.open(SCENES[1]).convert("RGB"))


def test_all_that_the_shipped_source_imports_is_shipped(exported):
    source = exported / "source"

    def modules(folder):
        return {path.relative_to(folder).with_suffix("").as_posix().replace("/", ".") for path in folder.rglob("*.py")}

    own, shipped = (modules(root / "MyLLM_Vit_gpt2_captioning") for root in (REPO_ROOT, source))
    for path in source.rglob("*.py"):
        for module in hub_folder.imports(path.read_bytes()):
            assert module not in own or module in shipped, f"{path.name} imports {module}"
            if module in ("MyLLM.ch3", "MyLLM.ch4", "MyLLM.MyLLM_nominal"):
                assert (source / f"{module.replace('.', '/')}.py").is_file()
        original = REPO_ROOT / path.relative_to(source)
        assert path.read_bytes() == original.read_bytes()
    assert "captioning.model.encoders" in shipped and "captioning.model.__init__" in shipped
    left_out = {"caption_image", "export_to_hub", "prepare_data"}
    assert not shipped & (left_out | {"captioning.data.dataset_check", "captioning.data.photo_store"})
    assert "Apache License" in (source / "LICENSE").read_text()


def test_source_is_found_by_following_imports(tmp_path):
    """Also inside functions and through packages; what nobody imports stays, and so does what only looks like it."""
    project = {
        "LICENSE": "free", "requirements.txt": "Pillow>=10  # photos\nnumpy>=1\ntimm>=1\nheavy>=2\nunused\n",
        "app/script.py": "import os, one\nfrom pack.deep import thing\nimport numpy.linalg\n",
        "app/one.py": "def f():\n    import lazy\n    import heavy\nif True:\n    from PIL import Image\n",
        "app/lazy.py": "from pack import other\ntext = 'import stranger'\n", "app/stranger.py": "",
        "app/tool.py": "import script",
        "pack/__init__.py": "", "pack/deep/__init__.py": "import one\n", "pack/deep/thing.py": "", "pack/other.py": "",
    }  # fmt: skip
    for name, text in project.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    script = tmp_path / "app" / "script.py"
    found = hub_folder.source_files(script)
    assert found.keys() == project.keys() - {"app/stranger.py", "app/tool.py"}
    plain = dict(encoder="vit_tiny_patch16_224", encoder_options={})
    assert hub_folder.requirements(found, plain, script) == ["Pillow>=10", "numpy>=1"]
    assert hub_folder.requirements(found, dict(encoder="resnet50"), script) == ["Pillow>=10", "numpy>=1", "timm>=1"]


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_save_pretrained_and_back(script, tiny_model, bpe, tmp_path, with_tokenizer):
    tiny_model.config.start_from = str(tmp_path)  # a private folder
    tiny_model.save_pretrained(tmp_path / "new" / "folder", bpe if with_tokenizer else None)
    names = {"captioner.safetensors", "config.json"} | ({"tokenizer.json"} if with_tokenizer else set())
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == names
    assert str(tmp_path) not in (tmp_path / "new" / "folder" / "config.json").read_text()
    again = script.VisionGPT2Model.from_pretrained(tmp_path / "new" / "folder")
    assert again.preprocessing == tiny_model.preprocessing | {
        key: list(tiny_model.preprocessing[key]) for key in ("mean", "std")
    }
    own = tiny_model.state_dict()
    assert own.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in again.state_dict().items())


def run_example(folder, images, monkeypatch, capsys):
    """The captions that its example.py prints, in this process."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["example.py", *images])
    capsys.readouterr()
    runpy.run_path(str(folder / "example.py"), run_name="__main__")
    return [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("encoder", ["resnet10t", "vit_base_patch16_clip_quickgelu_224"])
def test_the_example_knows_every_encoder(encoder, script, tiny_config, bpe, tmp_path, monkeypatch, capsys):
    tiny_config.encoder, tiny_config.encoder_options = encoder, REDUCED_ENCODERS[encoder]
    torch.manual_seed(0)
    model = script.VisionGPT2Model(tiny_config).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "own", bpe)
    export_to_hub.main(["anna/tiny", "--checkpoint", str(tmp_path / "own"), "--dry-run", str(tmp_path / "shared")])
    expected = script.caption_images(model, bpe, SCENES)
    assert [line.split() for line in run_example(tmp_path / "shared", SCENES, monkeypatch, capsys)] == [
        printable(caption).split() for caption in expected
    ]
    assert "timm>=" in (tmp_path / "shared" / "requirements.txt").read_text()


def test_a_hugging_face_captioner_is_shared_as_one_of_ours(script, tiny_config, bpe, tmp_path, monkeypatch, capsys):
    tiny_config.coupling = "final"
    model = script.VisionGPT2Model(tiny_config).eval()
    randomize(model)
    theirs = tmp_path / "theirs"
    model.export_to_transformers(theirs, bpe)
    export_to_hub.main(["anna/tiny", "--checkpoint", str(theirs), "--dry-run", str(tmp_path / "shared")])
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "The weights are those of `theirs` under other names" in card
    assert "Data set: not stated." in card
    assert str(tmp_path) not in card
    stored = checkpoint.load_weights(tmp_path / "shared" / "captioner.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    expected = script.caption_images(*script.load_captioner(theirs), SCENES)
    found = run_example(tmp_path / "shared", SCENES, monkeypatch, capsys)
    assert [line.split() for line in found] == [printable(caption).split() for caption in expected]


def test_a_dry_run_overwrites_nothing(exported, capsys):
    before = (exported / "README.md").read_bytes()
    with pytest.raises(SystemExit, match="exists already: give another folder"):
        export_to_hub.main(["anna/shapes", "--checkpoint", str(SHAPES), "--dry_run", str(exported)])
    assert (exported / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no repository is named: give user/repo, or set HF_REPO_ID"),
        (["shapes"], "'shapes' is no name of a repository on the Hub; expected \"user/repo\""),
        (["a/b/c"], "'a/b/c' is no name of a repository"),
        (["../up/load"], "is no name of a repository"),
        (["anna/shapes", "--license", "my own: licence"], "'my own: licence': expected the Hub's name of one"),
        (["anna/shapes", "--dry-run", "shared", "--checkpoint", "/nowhere"], "/nowhere: no such folder"),
        ([*DRY_RUN, "--scores", "nothing.json"], "nothing.json"),
        ([*DRY_RUN, "--samples", "no.png"], "no.png: no such image"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_named(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        export_to_hub.main(argv)
    assert stop.value.code.startswith("error: ")
    assert message in stop.value.code
    assert "\n" not in stop.value.code


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_of_shapes(exported):
    card = (exported / "README.md").read_text()
    front = front_matter(card)
    assert (front["license"], front["pipeline_tag"]) == ("apache-2.0", "image-text-to-text")
    assert (front["datasets"], front["metrics"]) == (["shapes"], ["perplexity"])
    stored = json.loads((SHAPES / "config.json").read_text())
    assert f"| perplexity per token | {stored['best_perplexity']:.4f} | all captions of the validation split |" in card
    parameters = sum(tensor.numel() for tensor in checkpoint.load_weights(SHAPES / "captioner.safetensors").values())
    assert f"{parameters:,} parameters" in card
    assert '<img src="samples/sample_1.png" width="160"> | a small blue triangle above a small white circle |' in card
    for heading in ("Use it", "Training", "Measured", "Samples", "Limits", "Licence"):
        assert f"\n## {heading}\n" in card
    assert "There are no scores of a test split." in card
    assert "CIDEr" not in card


def test_the_recipe_in_the_folder_gives_the_run_again(script, exported):
    said = read_recipe(exported / "recipe.toml", "", model_config=script.model_config, train_config=script.train_config)
    stored = json.loads((SHAPES / "config.json").read_text())
    for section in ("model_config", "train_config"):
        assert json.loads(json.dumps(said[section], default=str)) == stored[section]


def make_run(folder, best=2.5, **train):
    """The files of a run beside the Shapes weights: metrics of two epochs, samples, scores of the test split."""
    folder.mkdir()
    for name in ("captioner.safetensors", "tokenizer.json"):
        shutil.copyfile(SHAPES / name, folder / name)
    config = json.loads((SHAPES / "config.json").read_text())
    config |= {"best_epoch": 1, "best_perplexity": best, "train_config": config["train_config"] | train}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.csv").write_text(
        "epoch,stage,valid_loss,valid_perplexity,CIDEr,BLEU-4\n1,all,2,7.5,0.25,0.125\n2,all,1,2.5,0.75,\n"
    )
    (folder / "samples.md").write_text(
        "# The same images\n\n## dog.jpg\n\n- true: a dog\n- true: the dog\n\n| epoch | caption |\n| ---: | --- |\n"
        "| 1 | an early cat |\n| 2 | a <b>dog</b> \\| <script> |\n"
    )
    scores = folder / "evaluation_test" / "scores.json"
    scores.parent.mkdir()
    scores.write_text(json.dumps({"CIDEr": 0.5, "METEOR": "needs Java", "shuffled": {"CIDEr": 0.0625}}))
    return folder, scores


def card_of(folder, **options):
    facts = model_card.read_facts(folder, "anna/dogs", **options)
    return model_card.write_card(facts, parameters=1000), facts


def test_the_card_says_what_was_measured(tmp_path):
    folder, _ = make_run(tmp_path / "run", data_dir="data/flickr8k", image_dir="data/flickr8k/Images", score_images=200)
    os.utime(folder / "captioner.safetensors", (1, 1))
    card, facts = card_of(folder)
    front = front_matter(card)
    assert (front["license"], front["license_name"], front["datasets"]) == ("other", "not-stated", ["flickr8k"])
    assert front["metrics"] == ["perplexity", "cider"]
    assert "| perplexity per token | 2.5000 |" in card
    assert "| CIDEr-D | 0.7500 | greedy captions of at most 200 validation images |" in card
    assert "| CIDEr | 0.5000 | 0.0625 |" in card
    assert "| METEOR | needs Java |" in card
    assert "BLEU-4" not in card  # it was not measured in the epoch that was kept
    assert "7.5" not in card
    assert r"| dog.jpg | a \<b\>dog\</b\> \| \<script\> | a dog |" in card
    assert "an early cat" not in card
    assert "The licence of the weights has not been stated" in card
    assert facts.metrics_csv == (folder / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("data_dir", "found"),
    [
        ("data/flickr8k", ["flickr8k"]), ("Flickr30k_256", ["flickr30k"]), ("data/coco2017", ["coco"]),
        ("data/vqa_shapes", ["shapes"]), ("data/cocoa", []), ("my/bodyshapes", []), ("data", []), ("shapeshift/x", []),
    ],
)  # fmt: skip
def test_data_sets_are_known_by_the_names_of_folders(data_dir, found, tmp_path):
    folder, _ = make_run(tmp_path / "run", data_dir=data_dir, image_dir=f"{data_dir}/photos")
    card, _ = card_of(folder)
    assert front_matter(card).get("datasets", []) == found
    assert ("Data set, by the name of its folder: " if found else "Data set: not stated.") in card


def test_what_belongs_to_other_weights_is_not_in_the_card(tmp_path, capsys):
    folder, scores = make_run(tmp_path / "run", best=9.0)
    os.utime(scores, (1, 1))
    card, facts = card_of(folder)
    assert "| perplexity per token | 9.0000 |" in card
    assert "CIDEr" not in card
    assert "dog" not in card.replace("anna/dogs", "").replace("# dogs", "")
    assert facts.metrics_csv == ""
    said = capsys.readouterr().out
    assert "metrics.csv: has no row for these weights" in said
    assert "scores.json: older than the weights, so it is not in the model card" in said
    card, _ = card_of(folder, scores_files=[scores], datasets=["my/dogs"], license="mit")
    assert "| CIDEr | 0.5000 | 0.0625 |" in card
    assert (front_matter(card)["datasets"], front_matter(card)["license"]) == (["my/dogs"], "mit")


def test_paths_of_the_machine_are_not_shared(tmp_path):
    folder, _ = make_run(tmp_path / "run", data_dir="/home/anna/secret/photos", captions_file=r"C:\anna\secret\all.csv")
    place = tmp_path / "shared"
    export_to_hub.main(["anna/dogs", "--checkpoint", str(folder), "--dry-run", str(place)])
    written = json.loads((place / "config.json").read_text())["train_config"]
    assert (written["data_dir"], written["captions_file"]) == ("photos", "all.csv")
    assert not [path for path in place.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
    assert (place / "metrics.csv").is_file()


def test_pictures_in_the_card_keep_nothing_but_their_pixels():
    photo = Image.new("RGB", (2000, 1000), (200, 30, 30))
    exif = photo.getexif()
    exif[0x010F] = "a camera with a name"
    file = io.BytesIO()
    photo.save(file, "JPEG", exif=exif, comment=b"written by hand")
    opened = Image.open(file)
    assert opened.getexif()
    sample = model_card.photo_sample(opened, "private_name.jpg", "red", 3)
    stored = Image.open(io.BytesIO(sample.image))
    assert (sample.file, stored.size, dict(stored.getexif())) == ("samples/sample_3.jpg", (512, 256), {})
    assert b"a camera" not in sample.image
    assert b"by hand" not in sample.image


# --- up and down ------------------------------------------------------------------------------------------------------


def test_up_and_down_from_the_shell_and_the_token_is_nowhere(server, tmp_path, capfd, exported):
    """Uploaded and downloaded by the tools as a user runs them, the captioner says the same."""
    environment = dict(
        os.environ, HF_ENDPOINT=server.url, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_XET="1",
        HF_HUB_OFFLINE="0", HF_REPO_ID="anna/shapes",
    )  # fmt: skip
    said = []

    def run(tool, *argv):
        command = [sys.executable, REPO_ROOT / "MyLLM_Vit_gpt2_captioning" / tool, *argv]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        said.extend((done.stdout, done.stderr))
        assert done.returncode == 0, done.stderr
        return done.stdout

    output = run("export_to_hub.py", "--checkpoint", SHAPES, "--private", "--license", "apache-2.0")
    assert output == f"shared: {server.url}/anna/shapes\n"
    repo = server.repos["anna/shapes"]
    assert repo.private
    assert repo.commits == ["initial commit", "Upload captioner: epoch 10, validation perplexity 1.136"]
    found = run("caption_image.py", *SCENES, "--checkpoint", "anna/shapes").splitlines()
    assert [line.partition(": ")[2] for line in found] == caption(capfd, "--checkpoint", str(SHAPES))
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert repo.files.keys() == {name for name in files if not name.startswith("samples/")} | {".gitattributes"}
    for name, content in repo.files.items():
        if (exported / name).is_file() and name != "README.md":
            assert content == (exported / name).read_bytes()
        assert TOKEN.encode() not in content
    assert not any(TOKEN in text for text in [*said, *server.requests, *repo.commits, *capfd.readouterr()])
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_from_pretrained_reads_what_was_shared(script, server, tiny_model, bpe, tmp_path):
    tiny_model.save_pretrained(tmp_path / "tiny", bpe)
    address = upload.share(tmp_path / "tiny", "anna/tiny")
    assert address == f"{server.url}/anna/tiny"
    assert server.repos["anna/tiny"].private
    model = script.VisionGPT2Model.from_pretrained("anna/tiny")
    again, tokenizer = script.load_captioner("anna/tiny")
    images = [np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8) for i in range(4)]
    captions = [script.caption_images(m, bpe, images, max_tokens=10) for m in (tiny_model, model)]
    captions.append(script.caption_images(again, tokenizer, images, max_tokens=10))
    assert captions[0] == captions[1] == captions[2]
    assert len(set(captions[0])) > 1


def test_a_new_upload_replaces_the_old_one(server, exported):
    """And its source, but not what the user put there."""
    upload.upload(exported, "anna/shapes")
    repo = server.repos["anna/shapes"]
    assert not repo.private
    repo.files |= {"source/old.py": b"", "samples/sample_9.png": b"", "notes.md": b"mine", "README.md": b"old"}
    upload.upload(exported, "anna/shapes", message="again")
    assert not {"source/old.py", "samples/sample_9.png"} & repo.files.keys()
    assert repo.files["notes.md"] == b"mine"
    assert repo.files["README.md"] == (exported / "README.md").read_bytes()
    assert repo.commits == ["initial commit", "Upload captioner", "again"]


def test_what_is_private_does_not_go_to_a_public_repository(server):
    server.repos["anna/open"] = Repo(private=False)
    with pytest.raises(SystemExit, match="anna/open: this repository exists already and everybody can read it"):
        export_to_hub.main(["anna/open", "--checkpoint", str(SHAPES), "--private"])
    assert server.repos["anna/open"].files.keys() == {".gitattributes"}


# --- what goes wrong --------------------------------------------------------------------------------------------------


def wrong_token(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired_987654321")


def offline(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def nobody_there(server, monkeypatch):
    server.__exit__()


def cut_off(server, monkeypatch):
    server.cut = "POST .*/commit/|GET .*/resolve/"


def out_of_order(server, monkeypatch):
    server.answer[".*"] = 503


def asked_too_often(server, monkeypatch):
    server.answer["POST .*/commit/|.*/revision/"] = 429


def nothing(server, monkeypatch):
    pass


UP = [
    (wrong_token, "anna/new", "the Hub refuses the token (401): it is wrong or has expired; set HF_TOKEN"),
    (nothing, "forbidden/new", "the Hub does not let this token write there (403)"),
    (offline, "anna/new", "the Hub is not asked, because HF_HUB_OFFLINE is set; unset it"),
    (nobody_there, "anna/new", "the Hub cannot be reached, or the connection was cut; check the network"),
    (cut_off, "anna/new", "the Hub cannot be reached, or the connection was cut; check the network"),
    (out_of_order, "anna/new", "the Hub is out of order (503); try again later"),
    (asked_too_often, "anna/new", "the Hub was asked too often (429); try again in some minutes"),
]
DOWN = [
    (wrong_token, "anna/shapes", "the Hub refuses the token (401)"),
    (nothing, "anna/missing", "the Hub has no such repository, or only for those who may see it (404); check the name"),
    (nothing, "a/b/c", 'that is no name of a repository; expected "user/repo"'),
    (offline, "anna/shapes", "the Hub is not asked, because HF_HUB_OFFLINE is set; unset it, or give a folder"),
    (nobody_there, "anna/shapes", "the Hub cannot be reached, or the connection was cut; check the network"),
    (cut_off, "anna/shapes", "the Hub cannot be reached, or the connection was cut; check the network"),
    (out_of_order, "anna/shapes", "the Hub is out of order (503); try again later"),
    (asked_too_often, "anna/shapes", "the Hub was asked too often (429)"),
]


def one_line(stop, capfd):
    """The error of a tool, one line; the token is not in anything it said."""
    text = stop.value.code
    assert text.startswith("error: ")
    assert "\n" not in text
    for said in (text, *capfd.readouterr()):
        assert "hf_" not in said.replace("hf_auth", "")
        assert "Traceback" not in said
    return text


@pytest.mark.parametrize(("trouble", "repo", "message"), UP)
def test_uploads_that_fail_say_why(trouble, repo, message, server, monkeypatch, capfd):
    trouble(server, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        export_to_hub.main([repo, "--checkpoint", str(SHAPES)])
    assert f"{repo}: not uploaded: {message}" in one_line(stop, capfd)
    assert all(len(repo.commits) == 1 for repo in server.repos.values())


@pytest.mark.parametrize(("trouble", "repo", "message"), DOWN)
def test_downloads_that_fail_say_why(trouble, repo, message, server, monkeypatch, capfd):
    server.repos["anna/shapes"] = Repo(files={path.name: path.read_bytes() for path in SHAPES.glob("*.*s*")})
    trouble(server, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        caption_image.main([SCENES[0], "--checkpoint", repo])
    expected = f"{repo}: not a checkpoint folder, and not available from the Hugging Face hub: {message}"
    assert expected in one_line(stop, capfd)


def test_without_a_token_nothing_is_tried(server, monkeypatch, capfd):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit) as stop:
        export_to_hub.main(["anna/shapes", "--checkpoint", str(SHAPES)])
    assert "there is no Hugging Face token; set HF_TOKEN" in stop.value.code
    assert server.requests == []


def test_a_stored_login_serves_as_well(server, monkeypatch, tmp_path, exported):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "no_login").write_text(TOKEN)
    upload.check_token()
    upload.upload(exported, "anna/shapes")
    assert len(server.repos["anna/shapes"].commits) == 2


def test_errors_never_hold_the_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert explain(RuntimeError(f"bad header Bearer {TOKEN}\nmore")) == "RuntimeError: bad header Bearer (token)"
    assert explain(KeyError()) == "KeyError"


# --- in the background of a run ---------------------------------------------------------------------------------------


def at_epoch(folder, epoch):
    """The checkpoint of another epoch takes the place of the one that is there."""
    config = json.loads((folder / "config.json").read_text()) | {"best_epoch": epoch}
    write_atomically(folder / "config.json", lambda path: path.write_text(json.dumps(config)))


def test_only_the_newest_checkpoint_waits(server, tmp_path, capsys):
    folder, _ = make_run(tmp_path / "run")
    arrived, go_on = threading.Event(), threading.Event()

    def hold(asked):
        arrived.set()
        assert go_on.wait(30)

    server.before = hold
    uploads = upload.BackgroundUploads("anna/dogs", folder)
    for epoch in range(4):
        at_epoch(folder, epoch)
        uploads.push()
        assert arrived.wait(30)  # the first is on its way when the others come
    waiting = [path for path in folder.iterdir() if path.name.startswith(upload.STAGING)]
    assert len(waiting) == 2
    go_on.set()
    uploads.finish()
    repo = server.repos["anna/dogs"]
    assert [message[:25] for message in repo.commits] == [
        "initial commit",
        *(f"Upload captioner: epoch {n}" for n in (1, 4)),
    ]
    assert json.loads(repo.files["config.json"])["best_epoch"] == 3
    assert repo.files["captioner.safetensors"] == (SHAPES / "captioner.safetensors").read_bytes()
    assert not list(folder.glob(f"{upload.STAGING}*"))
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"uploaded to {server.url}/anna/dogs: epoch 4")


def test_an_upload_is_tried_again(server, tmp_path, capsys):
    folder, _ = make_run(tmp_path / "run")
    tries = []

    def broken_twice(asked):
        if "/commit/" in asked:
            tries.append(asked)
            server.cut = "" if len(tries) == 3 else "POST .*/commit/"

    server.before = broken_twice
    uploads = upload.BackgroundUploads("anna/dogs", folder, waits=(0.001, 0.001, 0.001))
    uploads.push()
    uploads.finish()
    assert (len(tries), len(server.repos["anna/dogs"].commits)) == (3, 2)
    said = capsys.readouterr().out
    assert said.count("the connection was cut; check the network and try again; next try in 0.001 seconds") == 2
    assert "uploaded to" in said


@pytest.mark.parametrize(("status", "tries"), [(503, 3), (403, 1)])
def test_uploads_that_fail_for_good_are_reported_and_the_run_goes_on(server, tmp_path, capsys, status, tries):
    folder, _ = make_run(tmp_path / "run")
    server.answer["POST .*/commit/"] = status
    uploads = upload.BackgroundUploads("anna/dogs", folder, waits=(0.001, 0.001))
    uploads.push()
    uploads.finish()
    assert sum("/commit/" in asked for asked in server.requests) == tries
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert f"({status})" in warning
    server.answer.clear()
    at_epoch(folder, 1)
    uploads.push()  # the next epoch has its own chance
    uploads.finish()
    assert len(server.repos["anna/dogs"].commits) == 2
    assert not list(folder.glob(f"{upload.STAGING}*"))


def test_a_newer_checkpoint_ends_the_tries_of_an_older_one(server, tmp_path):
    folder, _ = make_run(tmp_path / "run")
    refused = threading.Event()

    def once(asked):
        if "/commit/" in asked:
            server.answer = {} if refused.is_set() else {"POST .*/commit/": 503}
            refused.set()

    server.before = once
    uploads = upload.BackgroundUploads("anna/dogs", folder, waits=(600,))
    uploads.push()
    assert refused.wait(30)
    at_epoch(folder, 4)
    uploads.push()
    uploads.finish()
    assert [message[:25] for message in server.repos["anna/dogs"].commits[1:]] == ["Upload captioner: epoch 5"]


def test_what_a_killed_run_left_is_cleared_away(server, tmp_path):
    folder, _ = make_run(tmp_path / "run")
    (folder / f"{upload.STAGING}abc").mkdir()
    (folder / f"{upload.STAGING}abc" / "captioner.safetensors").write_bytes(b"old")
    upload.BackgroundUploads("anna/dogs", folder)
    assert not list(folder.glob(f"{upload.STAGING}*"))


def trainer_of(script, monkeypatch, tiny_config, tiny_train_config, dls, repo_id="anna/tiny"):
    monkeypatch.setattr(script, "HF_REPO_ID", repo_id)
    tiny_train_config.push_every_epoch = True
    return script.Trainer(tiny_config, tiny_train_config, dls)


def test_a_run_uploads_its_best_epoch(script, server, monkeypatch, tiny_config, tiny_train_config, dls, capsys):
    tiny_train_config.epochs = 2
    trainer = trainer_of(script, monkeypatch, tiny_config, tiny_train_config, dls)
    best = trainer.run_training()
    repo, folder = server.repos["anna/tiny"], tiny_train_config.model_path
    assert repo.private
    for name in ("captioner.safetensors", "tokenizer.json"):
        assert repo.files[name] == (folder / name).read_bytes()
    shared = json.loads(repo.files["config.json"])
    assert shared == shared | json.loads((folder / "config.json").read_text())
    assert repo.commits[-1].startswith(f"Upload captioner: epoch {best['best_epoch'] + 1}, validation perplexity")
    card = repo.files["README.md"].decode()
    (row,) = [
        row for row in csv.DictReader(io.StringIO(repo.files["metrics.csv"].decode()))
        if int(row["epoch"]) == best["best_epoch"] + 1
    ]  # fmt: skip
    assert f"| perplexity per token | {float(row['valid_perplexity']):.4f} |" in card
    assert f"| CIDEr-D | {float(row['CIDEr']):.4f} | greedy captions of at most 200 validation images |" in card
    assert "| 1008.jpg | " in card  # the first photo of the validation split
    assert not [name for name in repo.files if name.endswith((".jpg", ".pt"))]
    assert "push_every_epoch" not in repo.files["recipe.toml"].decode()
    assert trainer.state.resumed is None
    tiny_train_config.resume, tiny_train_config.push_every_epoch = "auto", False
    assert script.Trainer(tiny_config, tiny_train_config, dls).state.resumed  # with or without uploads: the same run


def test_a_run_survives_a_hub_that_is_away(script, server, monkeypatch, tiny_config, tiny_train_config, dls, capsys):
    monkeypatch.setattr(upload.BackgroundUploads.__init__, "__defaults__", ((0.001,),))
    server.answer[".*"] = 503
    trainer = trainer_of(script, monkeypatch, tiny_config, tiny_train_config, dls)
    assert trainer.run_training()["best_epoch"] == 0
    assert "WARNING" in capsys.readouterr().out
    assert (tiny_train_config.model_path / "captioner.safetensors").is_file()


def test_a_run_that_could_never_upload_does_not_start(script, server, monkeypatch, tiny_config, tiny_train_config, dls):
    with pytest.raises(ValueError, match='push_every_epoch needs a name: set HF_REPO_ID="user/repo"'):
        trainer_of(script, monkeypatch, tiny_config, tiny_train_config, dls, repo_id="")
    with pytest.raises(ValueError, match="is no name of a repository"):
        trainer_of(script, monkeypatch, tiny_config, tiny_train_config, dls, repo_id="tiny")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="there is no Hugging Face token"):
        trainer_of(script, monkeypatch, tiny_config, tiny_train_config, dls)


# --- the offer at the end ---------------------------------------------------------------------------------------------


class Terminal:
    """A user who answers on a terminal; `asked` are the questions."""

    def __init__(self, monkeypatch, answer, terminal=True):
        self.asked = []
        monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"isatty": lambda _: terminal})())

        def ask(question):
            self.asked.append(question)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr("builtins.input", ask)


@pytest.mark.parametrize(
    ("repo_id", "answer", "shared"),
    [
        ("anna/shapes", "", False), ("anna/shapes", "n", False), ("anna/shapes", "what", False),
        ("anna/shapes", "Y", True), ("anna/shapes", EOFError(), False), ("anna/shapes", KeyboardInterrupt(), False),
        ("", "", False), ("", "no", False), ("", " anna/shapes ", True), ("", EOFError(), False),
    ],
)  # fmt: skip
def test_the_offer_is_made_once_and_enter_means_no(repo_id, answer, shared, server, monkeypatch, capsys):
    terminal = Terminal(monkeypatch, answer)
    upload.offer_upload(repo_id, SHAPES)
    (question,) = terminal.asked
    assert ("[y/N]" in question) == bool(repo_id)
    assert server.repos.keys() == ({"anna/shapes"} if shared else set())
    assert (f"shared: {server.url}/anna/shapes" in capsys.readouterr().out) == shared
    if shared:
        assert server.repos["anna/shapes"].private


@pytest.mark.parametrize(("repo_id", "answer"), [("", "tiny"), ("forbidden/tiny", "y")])
def test_an_offer_that_fails_says_so_and_the_run_is_over(repo_id, answer, server, monkeypatch, capsys):
    Terminal(monkeypatch, answer)
    upload.offer_upload(repo_id, SHAPES)
    said = capsys.readouterr().out
    assert said.startswith("not shared: ")
    assert f"export_to_hub.py user/repo --checkpoint {SHAPES}" in said


def test_nobody_is_asked_who_cannot_answer_or_has_shared(server, monkeypatch, tmp_path):
    terminal = Terminal(monkeypatch, "y", terminal=False)
    upload.offer_upload("anna/shapes", SHAPES)
    folder, _ = make_run(tmp_path / "run")
    Terminal(monkeypatch, "y")
    upload.offer_upload("anna/shapes", folder, shared=True)
    monkeypatch.setattr(sys, "stdin", None)
    upload.offer_upload("anna/shapes", SHAPES)
    assert terminal.asked == []
    assert server.requests == []


def test_what_was_shared_is_shared_with_its_confidence(server, monkeypatch, tmp_path, capsys):
    """A run calibrates its captioner when the last upload of an epoch is over."""
    Terminal(monkeypatch, "y", terminal=False)
    folder = calibrated_copy(SHAPES, tmp_path / "run")
    upload.offer_upload("anna/shapes", folder, shared=True)
    assert f"shared with its confidence: {server.url}/anna/shapes" in capsys.readouterr().out
    assert "confidence" in json.loads(server.repos["anna/shapes"].files["config.json"])
    upload.offer_upload("forbidden/shapes", folder, shared=True)
    assert capsys.readouterr().out.startswith("shared without its confidence: ")


def test_a_whole_run_ends_with_the_offer(script, server, flickr, tmp_path, monkeypatch):
    """When everything is written: what is shared is the run's own checkpoint."""
    terminal = Terminal(monkeypatch, "anna/first")
    script.main(["--data_dir", str(flickr), "--model_path", str(tmp_path / "run"), *TINY, "--epochs", "1"])
    assert len(terminal.asked) == 1
    weights = (tmp_path / "run" / "captioner.safetensors").read_bytes()
    assert server.repos["anna/first"].files["captioner.safetensors"] == weights
