"""What a reader relies on: the import rule, a true file tree, commands that exist."""

import ast
import re
import subprocess

import pytest

from conftest import REPO_ROOT

FOLDER = REPO_ROOT / "MyLLM_Vit_gpt2_captioning"
SCRIPT = "MyLLM_Vit_gpt2_captioning"
MODULES = {path.stem: path for path in FOLDER.glob("*.py")}


def imports(path):
    """Top-level names that the file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_imports_never_go_upward():
    """Tools import the script, the script imports leaves; leaves import neither, and MyLLM nothing of the captioner."""
    own = {name: imports(path) & set(MODULES) for name, path in MODULES.items()}
    tools = {name for name, used in own.items() if SCRIPT in used}
    assert tools >= {"caption_image", "convert_captioner", "prepare_data"}
    assert not own[SCRIPT] & tools
    for name, used in own.items():
        assert not used & tools, f"{name} imports a tool"
    for path in (REPO_ROOT / "MyLLM").glob("*.py"):
        assert not imports(path) & set(MODULES), path


def test_no_file_shadows_a_library():
    """The script's folder is the first on the search path."""
    installed = {"datasets", "evaluate", "tokenizers", "tokenizer", "transformers", "types", "random"}
    assert not installed & set(MODULES)
    assert not (FOLDER / "__init__.py").exists()


def test_the_script_stays_readable():
    assert len((FOLDER / f"{SCRIPT}.py").read_text(encoding="utf-8").splitlines()) <= 1000


def test_the_file_tree_in_the_readme_is_true():
    """Every tracked file stands in the tree (or lies in a folder listed as a whole), and everything in it exists."""
    readme = (REPO_ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## Files\n+```\n(.*?)```", readme, re.DOTALL).group(1)
    listed, folders = set(), [(-1, "")]
    for line in tree.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        while folders[-1][0] >= indent:
            folders.pop()
        path = folders[-1][1] + name
        listed.add(path)
        if name.endswith("/"):
            folders.append((indent, path))
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


def test_commands_in_the_readmes_name_real_files_and_options(script):
    keys = {key for section in (script.model_config, script.train_config) for key in vars(section)}
    for readme in (REPO_ROOT / "README.md", FOLDER / "README.md", REPO_ROOT / "data" / "README.md"):
        text = readme.read_text(encoding="utf-8")
        for path in re.findall(r"python (\S+\.py)", text):
            assert (REPO_ROOT / path).is_file(), f"{readme}: {path}"
        for command in re.findall(rf"{SCRIPT}\.py((?: .*| \\\n.*)+)", text):
            for key in re.findall(r"--(\w+)", command):
                assert key in keys | {"help", "recipe", "download"}, f"{readme}: --{key}"


@pytest.mark.parametrize(
    "tool", ["caption_image", "convert_captioner", "evaluate_captions", "export_to_hub", "prepare_data", "web_demo"]
)
def test_the_options_of_tools_in_the_readmes_exist(tool, capsys):
    """Each tool answers --help, and what the READMEs give it is in there."""
    import importlib

    with pytest.raises(SystemExit):
        importlib.import_module(tool).main(["--help"])
    shown = capsys.readouterr().out
    for readme in (REPO_ROOT / "README.md", FOLDER / "README.md", REPO_ROOT / "data" / "README.md"):
        for command in re.findall(rf"{tool}\.py((?: .*| \\\n.*)+)", readme.read_text(encoding="utf-8")):
            for option in re.findall(r"--\w+", command):
                assert option in shown, f"{readme}: {tool} {option}"
