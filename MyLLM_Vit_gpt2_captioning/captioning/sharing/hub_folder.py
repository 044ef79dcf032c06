"""The folder that is shared: a checkpoint, the source it needs, an example that captions with it, and a model card.

captioner.safetensors, config.json, tokenizer.json    the checkpoint
example.py, requirements.txt                          captions a photo with nothing but this folder
source/                                               the project's files that the script imports, and its licence
recipe.toml, metrics.csv                              how it was trained, where that is known
samples/, README.md                                   the model card
"""

import ast
import json
import os
import re
import shutil
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace

from captioning.command_line.recipes import as_toml
from captioning.common.files import CONFIG_FILE, RECIPE_FILE, TOKENIZER_FILE, WEIGHTS_FILE, write_atomically
from captioning.model import plain_vit
from captioning.sharing import model_card

SCRIPT = Path(__file__).resolve().parents[2] / "MyLLM_Vit_gpt2_captioning.py"
SOURCE, SAMPLES = "source", "samples"
OWN_FOLDERS = (f"{SOURCE}/", f"{SAMPLES}/")  # in a repository nobody else writes there
CHECKPOINT_FILES = (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE)
BESIDE_SOURCE = ("LICENSE", "requirements.txt")  # of the project
NOT_OF_A_RECIPE = {"resume", "push_every_epoch"}  # what only that one run could do
PACKAGE_OF = {"PIL": "pillow"}  # modules that are called otherwise than their packages

EXAMPLE = '''"""Caption photos with the model in this folder, with the source in this folder.

    pip install -r requirements.txt
    python example.py photo.jpg
    python example.py photo.jpg --prompt "a man"    how the caption begins, or the question to a model that answers
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import load_file

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER / "source" / "MyLLM_Vit_gpt2_captioning"))

from captioning.model.tokenizer import CaptionTokenizer
from MyLLM_Vit_gpt2_captioning import VisionGPT2Model, caption_images

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photos", nargs="+", metavar="PHOTO")
parser.add_argument("--prompt", default="")
args = parser.parse_args()

config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
constants = config["model_config"] | {"preprocessing": config["preprocessing"], "start_from": ""}
model = VisionGPT2Model(SimpleNamespace(**constants), encoder_weights="stored")
model.load_state_dict(load_file(FOLDER / "captioner.safetensors"))
tokenizer = CaptionTokenizer(FOLDER)
captions = caption_images(model.eval(), tokenizer, args.photos, prompt=args.prompt)
for photo, caption in zip(args.photos, captions):
    print(f"{photo}: {caption}")
'''


# --- source -----------------------------------------------------------------------------------------------------------


def source_files(script=SCRIPT):
    """The script and every file of the project that it imports, directly or through another one, and what belongs to
    them -> {path seen from the project's root: bytes}.

    Imports inside functions count, too: whatever the shipped source may import is shipped. Tools and tests are not.
    """
    script = Path(script).resolve()
    root = script.parents[1]
    found, waiting = {}, [script]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(root).as_posix()
        if name not in found:
            found[name] = path.read_bytes()
            waiting += [file for module in imports(found[name]) for file in _own_files(module, script)]
    for name in BESIDE_SOURCE:
        if (root / name).is_file():
            found[name] = (root / name).read_bytes()
    return found


def imports(source, in_functions=True):
    """Source text -> names of the modules it imports, dotted; `from a import b` gives a and a.b."""
    names, waiting = set(), [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif in_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return names


def _own_files(module, script):
    """Files of the project that importing `module` runs: its own, and __init__.py of the packages around it."""
    parts = module.split(".")
    for base in (script.parent, script.parents[1]):  # the search path of the script
        path = base.joinpath(*parts)
        around = [base.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts))]
        files = [file for file in (path.with_suffix(".py"), path / "__init__.py", *around) if file.is_file()]
        if files:
            return files
    return []


def requirements(source, model_config, script=SCRIPT):
    """Lines of the project's requirements.txt that loading and captioning need: libraries that are imported with the
    script, not inside functions; and timm where the encoder is not the plain ViT."""
    script, root = Path(script).resolve(), Path(script).resolve().parents[1]
    seen, libraries, waiting = set(), set(), [script.relative_to(root).as_posix()]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for module in imports(source[name], in_functions=False):
            own = [file.relative_to(root).as_posix() for file in _own_files(module, script)]
            waiting += own
            top = module.partition(".")[0]
            if not own and top not in sys.stdlib_module_names and not _own_files(top, script):
                libraries.add(PACKAGE_OF.get(top, top))
    encoder, options = model_config.get("encoder", ""), model_config.get("encoder_options")
    if not plain_vit.options_of(encoder, options):
        libraries.add("timm")
    lines = source.get("requirements.txt", b"").decode().splitlines()
    ranges = {re.match(r"[\w.-]*", line)[0].lower(): line.partition("#")[0].strip() for line in lines}
    return sorted(ranges.get(name.lower(), name) for name in libraries)


# --- files ------------------------------------------------------------------------------------------------------------


def place_checkpoint(target, folder, link=False):
    """Copy the checkpoint's files from `folder` to `target`; with `link` as second names of the same files, where the
    file system has such: a file that is replaced later stays what it was.

    Raises FileNotFoundError for a missing one.
    """
    for name in CHECKPOINT_FILES:
        source, copy = Path(folder) / name, Path(target) / name
        if not source.is_file():
            raise FileNotFoundError(f"{source}: not found; the checkpoint is not whole")
        try:
            if not link:
                raise OSError
            os.link(source, copy)
        except OSError:
            shutil.copyfile(source, copy)


def write_folder(target, facts, source):
    """Add everything else to the checkpoint in `target`. `facts`: of `model_card.read_facts`; `source`: `source_files`.

    config.json is written anew, without paths of the machine it comes from.
    """
    target = Path(target)
    facts.config = without_paths(facts.config)
    model = facts.config["model_config"]
    files = {f"{SOURCE}/{name}": content for name, content in source.items()}
    files["example.py"] = EXAMPLE.encode()
    files["requirements.txt"] = "\n".join([*requirements(source, model), ""]).encode()
    files[CONFIG_FILE] = (json.dumps(facts.config, indent=2, ensure_ascii=False) + "\n").encode()
    if "train_config" in facts.config:
        sections = {name: facts.config[name] for name in ("model_config", "train_config")}
        kept = {
            name: SimpleNamespace(**{key: value for key, value in values.items() if key not in NOT_OF_A_RECIPE})
            for name, values in sections.items()
        }
        files[RECIPE_FILE] = as_toml(**kept).encode()
    if facts.metrics_csv:
        files["metrics.csv"] = facts.metrics_csv.encode()
    for sample in facts.samples:
        if sample.picture:
            files[sample.file] = sample.picture
    files["README.md"] = model_card.write_card(facts, parameters=count_parameters(target / WEIGHTS_FILE)).encode()
    for name, content in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target / name, lambda path, content=content: path.write_bytes(content))


def count_parameters(weights_file):
    """Numbers in a safetensors file, of which only the head is read."""
    from math import prod

    from safetensors import safe_open

    with safe_open(weights_file, "pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def without_paths(value):
    """A copy in which each text that is an absolute path is only its last part: no folder of a machine is shared."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    for kind in (PurePosixPath, PureWindowsPath):
        if isinstance(value, str) and kind(value).is_absolute():
            return kind(value).name
    return value
