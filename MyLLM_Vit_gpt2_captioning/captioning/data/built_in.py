"""The dataset of a run: a built-in one, which is rendered on first use, a download, or a user's own folder."""

from captioning.common.locks import after_other_writers
from captioning.data import shapes, sources

# Name of a built-in dataset -> the function that renders it into its folder.
BUILT_IN = {"shapes": shapes.write_dataset, "vqa_shapes": shapes.write_questions}


def default_recipe(recipe, given, data_dir, data_folder, download):
    """The recipe of a run -> (recipe, notice to print or ""): the one it names; else that of the built-in dataset whose
    folder is given as data_dir, that of Shapes when there is no dataset at all, else None.

    `given`: the train constants from the command line; `data_dir`: the default one; `data_folder`: where the built-in
    datasets have their folders.
    """
    if recipe:
        return recipe, ""
    if "data_dir" in given:
        return _built_in_name(given["data_dir"], data_folder), ""
    if "captions_file" in given or download or sources.find_captions(data_dir, given.get("image_dir")) is not None:
        return None, ""
    notice = (
        f"no dataset in {data_dir}: training on the built-in Shapes instead. To train on Flickr30k, "
        "add --download, or put results.csv and flickr30k_images/ there; data/README.md says where to get them."
    )
    return "shapes", notice


def _built_in_name(folder, data_folder):
    """The name of the built-in dataset that has this folder, or None."""
    return next((name for name in BUILT_IN if folder.resolve() == (data_folder / name).resolve()), None)


def data_paths(recipe, chosen, defaults, data_folder):
    """Paths that follow from the dataset where they are not chosen -> dict of train constants.

    `chosen`: the train constants from the command line and the `recipe`; `defaults`: the train_config; `data_folder`:
    where the built-in datasets have their folders.
    """
    paths = {}
    if recipe in BUILT_IN and "data_dir" not in chosen:
        paths["data_dir"] = data_folder / recipe
    default_image_dir_fits = not paths and "data_dir" not in chosen and defaults.image_dir.is_dir()
    if not default_image_dir_fits and "image_dir" not in chosen:
        paths["image_dir"] = None  # looked for beside the captions
    return paths


def cleaning_of(model_cfg, train_cfg):
    """How the captions of a run are cleaned, as arguments of `sources.load`."""
    return dict(unescape=train_cfg.unescape_captions, case=model_cfg.caption_case)


def load_data(train_cfg, data_folder, download=False, model_cfg=None):
    """The captions that the run trains on, rendered or downloaded first if need be -> DataFrame of usable rows.

    `data_folder`: where the built-in datasets have their folders; `model_cfg` says in which case captions are,
    lower by default. Raises FileNotFoundError with the command that fetches the public dataset when there is none.
    """
    data_dir = train_cfg.data_dir
    built_in = _built_in_name(data_dir, data_folder)
    if built_in or download:
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        lock = data_dir.parent / f".{data_dir.name}.lock"
        with after_other_writers(lock):  # the others wait, and then find the dataset
            if built_in:
                BUILT_IN[built_in](data_dir, train_cfg.shapes_scenes)
            else:
                from captioning.data import downloads  # here, so that nothing else waits for it

                downloads.fetch_dataset(train_cfg.dataset, data_dir)
    paths = data_dir, train_cfg.captions_file, train_cfg.image_dir
    cleaning = cleaning_of(model_cfg, train_cfg) if model_cfg else dict(unescape=train_cfg.unescape_captions)
    return sources.load_usable(*paths, train_cfg.dataset, exclude=train_cfg.exclude, **cleaning)
