"""The data of a run: built-in datasets, which are rendered on first use, downloads, and a user's own folder."""

from filelock import FileLock

from captioning.data import shapes, sources

# What fills the folder of each name.
BUILT_IN = {"shapes": shapes.write_dataset, "vqa_shapes": shapes.write_questions}


def default_recipe(given, data_dir, data_folder, download):
    """The recipe of a run that names none -> that of the built-in dataset in the folder it was given, or Shapes' where
    there is no dataset at all, or None. `given`: its train constants; `data_dir`: where the dataset else is."""
    if "data_dir" in given:
        return _built_in(given["data_dir"], data_folder)
    if "captions_file" in given or download or sources.find_captions(data_dir) is not None:
        return None
    print(
        f"no dataset in {data_dir}: training on the built-in Shapes instead. To train on Flickr30k, "
        "add --download, or put results.csv and flickr30k_images/ there; data/README.md says where to get them."
    )
    return "shapes"


def _built_in(folder, data_folder):
    return next((name for name in BUILT_IN if folder.resolve() == (data_folder / name).resolve()), None)


def data_paths(recipe, chosen, defaults, data_folder):
    """Where the data of a run is, as far as nobody said -> dict of train constants.

    `chosen`: the train constants that were given or are in the `recipe`; `defaults`: the train_config.
    """
    paths = {}
    if recipe in BUILT_IN and "data_dir" not in chosen:
        paths["data_dir"] = data_folder / recipe
    elsewhere = paths or "data_dir" in chosen or not defaults.image_dir.is_dir()
    if elsewhere and "image_dir" not in chosen:
        paths["image_dir"] = None  # looked for beside the captions
    return paths


def load_data(train_cfg, data_folder, download=False):
    """The captions that the run trains on, rendered or downloaded first if need be -> DataFrame of usable rows.

    `data_folder`: where built-in datasets have their folders. Raises FileNotFoundError with the command that fetches a
    public dataset that is not there.
    """
    data_dir = train_cfg.data_dir
    built_in = _built_in(data_dir, data_folder)
    if built_in or download:
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir.parent / f".{data_dir.name}.lock"):  # other processes wait, and find it done
            if built_in:
                BUILT_IN[built_in](data_dir, train_cfg.shapes_scenes)
            else:
                from captioning.data import downloads  # here, so that nothing else waits for it

                downloads.fetch_dataset(train_cfg.dataset, data_dir)
    return sources.load_usable(data_dir, train_cfg.captions_file, train_cfg.image_dir, train_cfg.dataset)
