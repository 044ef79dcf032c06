"""What a reader relies on: the import rule, a true file tree, commands that exist."""

import ast
import inspect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from captioning.model.tokenizer import CaptionTokenizer
from conftest import REPO_ROOT

FOLDER = REPO_ROOT / "MyLLM_Vit_gpt2_captioning"
SCRIPT = "MyLLM_Vit_gpt2_captioning"
# The rooms of the package in their order: a room imports only itself and the rooms in front of it.
ROOMS = (
    "common", "images", "pages", "model", "data", "command_line", "decoding", "scoring", "training", "sharing",
    "serving",
)  # fmt: skip
MODULES = {
    path.relative_to(FOLDER).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in FOLDER.rglob("*.py")
}
ROOM_OF = {name: name.split(".")[1] for name in MODULES if name.count(".") >= 1}
BESIDE_THE_ROOMS = set(MODULES) - set(ROOM_OF) - {"captioning"}  # the script and the tools


def imports(path):
    """The project's modules that a file imports, anywhere in it; with `from a import b` that is a.b where it is one."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            dotted = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= dotted & set(MODULES) or {node.module}
    return names & set(MODULES)


IMPORTS = {name: imports(path) for name, path in MODULES.items()}
TOOLS = {name for name, used in IMPORTS.items() if SCRIPT in used}

README = REPO_ROOT / "README.md"
DOCS = sorted((REPO_ROOT / "docs").glob("*.md"))
PAGES = [
    README, FOLDER / "README.md", REPO_ROOT / "data" / "README.md", *DOCS, REPO_ROOT / "recipes" / "RESULTS.md",
    REPO_ROOT / "benchmarks" / "RESULTS.md",
]  # fmt: skip


def test_the_rooms_are_those_of_the_table():
    assert {path.name for path in (FOLDER / "captioning").iterdir() if path.is_dir()} - {"__pycache__"} == set(ROOMS)
    for path in (FOLDER / "captioning").rglob("__init__.py"):
        [docstring] = ast.parse(path.read_text(encoding="utf-8")).body
        assert ast.get_docstring(ast.Module([docstring], [])), f"{path}: a docstring and nothing else"


def test_imports_never_go_upward():
    """Tools import the script, never each other; the script imports rooms; a room imports rooms in front of it."""
    assert {"caption_image", "convert_captioner", "prepare_data"} <= TOOLS
    assert {SCRIPT} | TOOLS == BESIDE_THE_ROOMS, "beside the script lie only tools"
    for tool in TOOLS:
        assert not IMPORTS[tool] & TOOLS, f"{tool} imports a tool"
    assert not IMPORTS[SCRIPT] & TOOLS
    for name, room in ROOM_OF.items():
        assert not IMPORTS[name] & BESIDE_THE_ROOMS, f"{name} imports what lies above the rooms"
        for used in IMPORTS[name]:
            assert ROOMS.index(ROOM_OF[used]) <= ROOMS.index(room), f"{name} imports {used}, which lies above it"
    for path in (REPO_ROOT / "MyLLM").glob("*.py"):
        assert not imports(path), path


def test_no_room_is_handed_the_trainer():
    """Objects do not run upward either: a room gets what it needs."""
    for name, path in MODULES.items():
        if name in ROOM_OF:
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            names = {node.id for node in nodes if isinstance(node, ast.Name)}
            names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
            assert "Trainer" not in names and not (name.startswith("captioning.training") and "trainer" in names), name


def test_no_two_files_import_each_other():
    """Not through others either; an import inside a function counts, too."""
    waiting = dict(IMPORTS)
    while free := {name for name, used in waiting.items() if not used & waiting.keys() - {name}}:
        waiting = {name: used for name, used in waiting.items() if name not in free}
    assert not waiting, f"a circle among {sorted(waiting)}"


def test_no_test_module_imports_another():
    """What several of them share is a fixture in conftest.py, or lies in helpers/."""
    files = [*(REPO_ROOT / "tests").rglob("*.py")]
    tests = [path.stem for path in files if path.stem.startswith("test_")]
    assert len(tests) == len(set(tests)), "two test modules of one name"
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & set(tests), f"{path}, line {node.lineno}: imports a test module"


def test_temporary_files_lie_in_the_folder_of_pytest(tmp_path_factory):
    """Of this process and of those that it starts; pytest removes the folder."""
    code = "import tempfile; print(tempfile.gettempdir())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for place in (tempfile.gettempdir(), child.stdout.strip()):
        assert Path(place).is_relative_to(tmp_path_factory.getbasetemp())


def test_no_file_shadows_a_library():
    """The script's folder is the first on the search path."""
    installed = {"datasets", "evaluate", "tokenizers", "tokenizer", "transformers", "types", "random"}
    assert not installed & {path.stem for path in FOLDER.iterdir()}
    assert not installed & set(ROOMS)
    assert not (FOLDER / "__init__.py").exists()


PROMISED = {
    "_shift_labels": "token_ids",
    "_pad_token_batch": "tokenizer token_id_batch",
    "_load_flickr_dataframe": "data_dir image_dir",
    "build_transforms": "img_size norm_mean norm_std",
    "Dataset": "df tfms",
    "collate_fn": "batch",
    "GPT2CrossAttention": "config",
    "GPT2CrossAttention.forward": "self q k v",
    "GPT2Block": "config",
    "GPT2Block.forward": "self hidden_states encoder_states",
    "VisionGPT2Model": "config",
    "VisionGPT2Model._pos_embed": "self patch_tokens",
    "VisionGPT2Model._encode_images": "self images",
    "VisionGPT2Model._build_text_embeddings": "self input_ids",
    "VisionGPT2Model.pretrained_layers_trainable": "self trainable",
    "VisionGPT2Model.unfreeze_gpt_layers": "self",
    "VisionGPT2Model._load_hf_gpt2_weights": "self sd_hf",
    "VisionGPT2Model.from_pretrained": "source",
    "VisionGPT2Model.forward": "self image input_ids labels",
    "VisionGPT2Model.generate": "self image sequence max_tokens temperature deterministic",
    "Trainer": "model_config train_config dls",
    "Trainer.save_model": "self",
    "Trainer.load_best_model": "self path",
    "Trainer.train_one_epoch": "self epoch",
    "Trainer.valid_one_epoch": "self epoch",
    "Trainer.clean": "self",
    "Trainer.run_training": "self",
    "Trainer.generate_caption": "self image max_tokens temperature deterministic",
}


@pytest.mark.parametrize("name", PROMISED)
def test_promised_names_are_written_in_the_script(script, name):
    """Not imported into it from a room; their first parameters are these, and what follows them is optional."""
    promised = script
    for part in name.split("."):
        promised = getattr(promised, part)
    assert promised.__module__ == SCRIPT
    parameters = list(inspect.signature(promised).parameters.values())
    first = PROMISED[name].split()
    assert [parameter.name for parameter in parameters[: len(first)]] == first
    for parameter in parameters[len(first) :]:
        assert parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD, parameter


def test_promised_constants(script):
    assert script.REPO_ROOT == REPO_ROOT
    assert os.environ.get("HF_GPT2_REPO", "openai-community/gpt2") == script.HF_GPT2_REPO
    assert isinstance(script.tokenizer, CaptionTokenizer)
    model = "embed_dim num_heads depth seq_len vocab_size emb_dropout attention_dropout mlp_dropout residual_dropout"
    train = "epochs freeze_epochs_gpt freeze_epochs_all lr device batch_size model_path"
    assert set(model.split()) <= vars(script.model_config).keys()
    assert set(train.split()) <= vars(script.train_config).keys()


def test_the_vits_parts_are_reachable_under_their_names(tiny_model):
    vit = tiny_model.encoder.vit
    for name in ("patch_embed", "cls_token", "pos_embed", "blocks"):
        assert getattr(tiny_model, name) is getattr(vit, name)
    with pytest.raises(AttributeError, match="no attribute 'patch_embeds'"):
        tiny_model.patch_embeds  # noqa: B018


def test_the_script_stays_readable():
    assert len((FOLDER / f"{SCRIPT}.py").read_text(encoding="utf-8").splitlines()) <= 1000


def tree_of(readme):
    """The paths in the fenced block of the page's section "Files", in their order; folders end with a slash."""
    tree = readme.read_text(encoding="utf-8").split("\n## Files\n")[1].split("```")[1]
    listed, folders = [], [(-1, "")]
    for line in tree.strip("\n").splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        while folders[-1][0] >= indent:
            folders.pop()
        listed.append(folders[-1][1] + name)
        if name.endswith("/"):
            folders.append((indent, listed[-1]))
    return listed


def test_the_file_tree_in_the_readme_is_true():
    """Every tracked file stands in the tree (or lies in a folder listed as a whole), and everything in it exists."""
    listed = set(tree_of(README))
    made_by_running = {"captioner/"}
    for path in listed - made_by_running:
        assert (REPO_ROOT / path).exists(), f"{path} is in the README's tree, but not there"
    git = subprocess.run(["git", "ls-files"], cwd=REPO_ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout")
    whole = {folder for folder in listed if folder.endswith("/") and not any(
        other != folder and other.startswith(folder) for other in listed)}  # fmt: skip
    for path in git.stdout.split():
        if not path.startswith("."):
            assert path in listed or any(path.startswith(folder) for folder in whole), f"{path} is not in the tree"


def test_the_files_of_the_package_in_its_readme_are_true():
    """A line a room, in the order of the rooms, and a line a file; a room's line stands for its __init__.py, too."""
    listed = tree_of(FOLDER / "README.md")
    assert len(listed) == len(set(listed))
    for path in listed:
        assert (FOLDER / path).exists(), f"{path} is in the tree of {SCRIPT}/README.md, but not there"
    files = {path.relative_to(FOLDER).as_posix() for path in (FOLDER / "captioning").rglob("*.py")}
    files = {path.removesuffix("__init__.py") for path in files}  # captioning/data/__init__.py -> captioning/data/
    assert not files - set(listed), "not in the tree of MyLLM_Vit_gpt2_captioning/README.md"
    assert [path for path in listed if path.count("/") == 2 and path.endswith("/")] == [
        f"captioning/{room}/" for room in ROOMS
    ]


def test_the_readme_is_a_front_door():
    """It stays short, and leads to every page of docs/."""
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    for page in DOCS:
        assert page.name == page.name.lower()
        assert f"](docs/{page.name})" in text, f"the README has no line for {page.name}"


def prose(page):
    """The page's text without code, in which brackets are no links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)


def anchors(page):
    """The anchors of the page's headings, as GitHub and GitLab make them."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE):
        name = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        found.append(f"{name}-{n}" if (n := found.count(name)) else name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPO_ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        leads_to = (page.parent / path).resolve() if path else page
        assert leads_to.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(leads_to), f"{page}: {target}"


def test_commands_in_the_pages_name_real_files_and_options(script):
    keys = {key for section in (script.model_config, script.train_config) for key in vars(section)}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"python (\S+\.py)", text):
            is_copied = Path(path).name == "example_onnx.py"  # into the folder that export_onnx.py writes
            assert is_copied or (REPO_ROOT / path).is_file(), f"{page}: {path}"
        for command in re.findall(rf"{SCRIPT}\.py((?: .*| \\\n.*)+)", text):
            for key in re.findall(r"--(\w+)", command):
                assert key in keys | {"help", "recipe", "download", "sweep"}, f"{page}: --{key}"


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_the_options_of_tools_in_the_pages_exist(tool, capsys):
    """Each tool answers --help, and what the pages give it is in there."""
    import importlib

    with pytest.raises(SystemExit):
        importlib.import_module(tool).main(["--help"])
    shown = capsys.readouterr().out
    for page in PAGES:
        for command in re.findall(rf"{tool}\.py((?: .*| \\\n.*)+)", page.read_text(encoding="utf-8")):
            for option in re.findall(r"--\w+", command):
                assert re.search(rf"{option}\b", shown), f"{page}: {tool} {option}"


def test_options_named_in_the_text_exist(script):
    """Those that a sentence or a table names, outside of whole commands."""
    known = {f"--{key}" for section in (script.model_config, script.train_config) for key in vars(section)}
    for folder in (FOLDER, REPO_ROOT / "MyLLM", REPO_ROOT / "benchmarks", REPO_ROOT / "tests"):
        for path in folder.rglob("*.py"):
            known |= set(re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8")))
    known |= {"--help", "--recipe", "--download", "--standalone", "--nproc-per-node", "--max-restarts"}
    known |= {"--logdir", "--sort", "--directory"}  # of other programs
    for page in PAGES:
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8")):
            assert option in known, f"{page}: {option}"


def test_python_in_the_pages_imports_what_exists():
    import importlib

    for page in PAGES:
        for snippet in re.findall(r"^```python\n([^`]*)^```$", page.read_text(encoding="utf-8"), re.MULTILINE):
            for node in ast.walk(ast.parse(snippet)):
                if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in MODULES:
                    module = importlib.import_module(node.module)
                    for alias in node.names:
                        assert hasattr(module, alias.name), f"{page}: {node.module} has no {alias.name}"
