"""The data of a run: built-in datasets, which are rendered on first use, downloads, and a user's own folder."""

import shapes
import sources

# What fills the folder of each name.
BUILT_IN = {"shapes": shapes.write_dataset, "vqa_shapes": shapes.write_questions}


def load_data(train_cfg, data_folder, download=False):
    """The captions that the run trains on, rendered or downloaded first if need be -> DataFrame of usable rows.

    `data_folder`: where built-in datasets have their folders. Raises FileNotFoundError with the command that fetches a
    public dataset that is not there.
    """
    data_dir = train_cfg.data_dir
    built_in = next((name for name in BUILT_IN if data_dir.resolve() == (data_folder / name).resolve()), None)
    if built_in:
        BUILT_IN[built_in](data_dir, train_cfg.shapes_scenes)
    elif download:
        import downloads  # here, so that nothing else waits for it

        downloads.fetch_dataset(train_cfg.dataset, data_dir)
    return sources.load_usable(data_dir, train_cfg.captions_file, train_cfg.image_dir, train_cfg.dataset)
