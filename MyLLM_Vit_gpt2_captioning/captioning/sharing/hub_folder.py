"""The folder that is shared: a checkpoint, the source code it needs, an example that captions with it, a model card.

captioner.safetensors, config.json, tokenizer.json    the checkpoint
example.py, requirements.txt                          captions a photo with nothing but this folder
transformers_captioner.py, *_config.json              the captioner as a model of transformers
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
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace

from captioning.command_line.recipes import as_toml
from captioning.common.files import CONFIG_FILE, RECIPE_FILE, TOKENIZER_FILE, WEIGHTS_FILE, write_atomically
from captioning.decoding.search import Options
from captioning.model import plain_vit
from captioning.model.hugging_face import tokenizer_config
from captioning.model.tokenizer import CaptionTokenizer
from captioning.sharing import model_card

SCRIPT = Path(__file__).resolve().parents[2] / "MyLLM_Vit_gpt2_captioning.py"
SOURCE, SAMPLES = "source", "samples"
OWN_FOLDERS = (f"{SOURCE}/", f"{SAMPLES}/")  # in a repository, only uploads write there
CHECKPOINT_FILES = (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE)
FOR_TRANSFORMERS = "transformers_captioner"  # the module beside this one that transformers loads
FOR_TRANSFORMERS_FILE = f"{SCRIPT.parent.name}/captioning/sharing/{FOR_TRANSFORMERS}.py"
PROJECT_FILES = ("LICENSE", "requirements.txt", FOR_TRANSFORMERS_FILE)  # shared with the source code
NOT_IN_RECIPE = {"resume", "push_every_epoch"}  # constants that only concern one run
MODEL_TYPE = "myllm-vit-gpt2-captioner"  # in config.json, for transformers
PACKAGE_OF = {"PIL": "pillow"}  # modules whose package has another name

EXAMPLE = '''"""Caption photos with the model in this folder, with the source in this folder.

    pip install -r requirements.txt
    python example.py photo.jpg
    python example.py photo.jpg --prompt "a man"    the caption's first words, or a question if the model answers them
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import load_file

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER / "source" / "MyLLM_Vit_gpt2_captioning"))

from captioning.common.printable import printable
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
    print(f"{photo}: {printable(caption)}")
'''


# --- source -----------------------------------------------------------------------------------------------------------


def source_files(script=SCRIPT):
    """The script, all files of the project that it imports directly or indirectly, and PROJECT_FILES
    -> {path relative to the project's root: bytes}.

    Imports inside functions count as well. Tools and tests are not among the files.
    """
    script = Path(script).resolve()
    root = script.parents[1]
    files, queue = {}, [script]
    while queue:
        path = queue.pop()
        name = path.relative_to(root).as_posix()
        if name not in files:
            files[name] = path.read_bytes()
            queue += [file for module in imports(files[name]) for file in _own_files(module, script)]
    for name in PROJECT_FILES:
        if (root / name).is_file():
            files[name] = (root / name).read_bytes()
    return files


@cache
def imports(source, in_functions=True):
    """Source code -> frozenset of the dotted names of the modules it imports; `from a import b` gives a and a.b."""
    names, queue = set(), [ast.parse(source)]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif in_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            queue += ast.iter_child_nodes(node)
    return frozenset(names)


def _own_files(module, script):
    """The project's files that importing `module` runs: its own, and __init__.py of its packages; [] for a library."""
    parts = module.split(".")
    for base in (script.parent, script.parents[1]):  # the search path of the script
        path = base.joinpath(*parts)
        packages = [base.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts))]
        files = [file for file in (path.with_suffix(".py"), path / "__init__.py", *packages) if file.is_file()]
        if files:
            return files
    return []


def requirements(source, model_config, script=SCRIPT):
    """The sorted lines of the project's requirements.txt that loading and captioning need.

    These are the libraries that are imported together with the script, not those imported inside functions, and timm
    unless the encoder is the plain ViT. `source`: the result of `source_files`.
    """
    script, root = Path(script).resolve(), Path(script).resolve().parents[1]
    visited, libraries, queue = set(), set(), [script.relative_to(root).as_posix()]
    while queue:
        name = queue.pop()
        if name in visited:
            continue
        visited.add(name)
        for module in imports(source[name], in_functions=False):
            own = [file.relative_to(root).as_posix() for file in _own_files(module, script)]
            queue += own
            package = module.partition(".")[0]
            if not own and package not in sys.stdlib_module_names and not _own_files(package, script):
                libraries.add(PACKAGE_OF.get(package, package))
    encoder, options = model_config.get("encoder", ""), model_config.get("encoder_options")
    if not plain_vit.options_of(encoder, options):
        libraries.add("timm")
    lines = source.get("requirements.txt", b"").decode().splitlines()
    ranges = {re.match(r"[\w.-]*", line)[0].lower(): line.partition("#")[0].strip() for line in lines}
    return sorted(ranges.get(name.lower(), name) for name in libraries)


# --- files ------------------------------------------------------------------------------------------------------------


def copy_checkpoint(target, folder, link=False):
    """Copy the checkpoint's files from `folder` to `target`.

    With `link` they are hard links where the file system has them: a file that is replaced later, by `os.replace`,
    stays the same under its second name. Raises FileNotFoundError for a missing file.
    """
    for name in CHECKPOINT_FILES:
        source, copy = Path(folder) / name, Path(target) / name
        if not source.is_file():
            raise FileNotFoundError(f"{source}: not found; the checkpoint is incomplete")
        try:
            if not link:
                raise OSError
            os.link(source, copy)
        except OSError:
            shutil.copyfile(source, copy)


def write_folder(target, facts, source):
    """Add everything else to the checkpoint in `target`.

    `facts`: the result of `model_card.read_facts`; `source`: that of `source_files`. config.json is rewritten without
    the paths of the machine it comes from.
    """
    target = Path(target)
    facts.config = without_paths(facts.config)
    model = facts.config["model_config"]
    files = {f"{SOURCE}/{name}": content for name, content in source.items()}
    files["example.py"] = EXAMPLE.encode()
    files["requirements.txt"] = "\n".join([*requirements(source, model), ""]).encode()
    files[f"{FOR_TRANSFORMERS}.py"] = source[FOR_TRANSFORMERS_FILE]
    files |= {name: as_json(content) for name, content in configs_for_transformers(target, facts.config).items()}
    if "train_config" in facts.config:
        sections = {}
        for name in ("model_config", "train_config"):
            constants = {key: value for key, value in facts.config[name].items() if key not in NOT_IN_RECIPE}
            sections[name] = SimpleNamespace(**constants)
        files[RECIPE_FILE] = as_toml(**sections).encode()
    if facts.metrics_csv:
        files["metrics.csv"] = facts.metrics_csv.encode()
    for sample in facts.samples:
        if sample.image:
            files[sample.file] = sample.image
    files["README.md"] = model_card.write_card(facts, parameters=count_parameters(target / WEIGHTS_FILE)).encode()
    for name, content in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target / name, lambda path, content=content: path.write_bytes(content))


def as_json(content):
    """A JSON value -> the bytes of its file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def configs_for_transformers(folder, config):
    """The content of config.json and of three more files, with which transformers loads the checkpoint in `folder` as
    `transformers_captioner.py` says -> {name: dict}. `config`: the content of the checkpoint's config.json."""
    tokenizer = CaptionTokenizer(folder)
    classes = {
        "AutoConfig": "CaptionerConfig",
        "AutoModelForImageTextToText": "Captioner",
        "AutoProcessor": "CaptionProcessor",
    }
    auto_map = {auto: f"{FOR_TRANSFORMERS}.{name}" for auto, name in classes.items()}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    seq_len = config["model_config"]["seq_len"]
    return {
        CONFIG_FILE: config | dict(model_type=MODEL_TYPE, architectures=["Captioner"], auto_map=auto_map),
        "generation_config.json": special | {"max_new_tokens": Options.max_tokens},
        "tokenizer_config.json": tokenizer_config(tokenizer, seq_len) | {"padding_side": "left"},
        "processor_config.json": {
            "processor_class": "CaptionProcessor",
            "auto_map": {"AutoProcessor": auto_map["AutoProcessor"]},
            "preprocessing": config["preprocessing"],
        },
    }


def count_parameters(weights_file):
    """The number of parameters in a safetensors file, of which only the header is read."""
    from math import prod

    from safetensors import safe_open

    with safe_open(weights_file, "pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def without_paths(value):
    """A copy of a JSON value in which every string that is an absolute path is reduced to its last part."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(item) for item in value]
    for kind in (PurePosixPath, PureWindowsPath):
        if isinstance(value, str) and kind(value).is_absolute():
            return kind(value).name
    return value
