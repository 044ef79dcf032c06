"""Compare runs: one page and a table of what differed between them and what came of it.

    python MyLLM_Vit_gpt2_captioning/compare_runs.py captioner/*
    python MyLLM_Vit_gpt2_captioning/compare_runs.py captioner another_folder --output compared.html

Reads the files that every run writes (recipe.toml, metrics.csv, timings.csv, samples.md), also those of earlier runs
that were moved aside, while a run trains too. Prints the runs with their best epochs, the constants that differ, and
for several seeds of one setting mean and 95% interval. The page adds the curves of all runs over each other, against
epochs, captions seen and hours, and the captions that the runs wrote for the same photos.
"""

import os
import sys
from pathlib import Path

from captioning.command_line.arguments import ToolParser
from captioning.common.files import make_folder
from captioning.training.compared_runs import PAGE, read_runs, write_comparison
from MyLLM_Vit_gpt2_captioning import OUTPUT_DIR


def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument(
        "runs", nargs="*", default=[OUTPUT_DIR], metavar="FOLDER", help="of a run, or of several (default: captioner)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"the page (default: {PAGE} in the folder that holds the runs)"
    )
    args = parser.parse_args(argv)
    runs, left_out = read_runs(args.runs)
    for line in left_out:
        print(f"left out: {line}")
    if not runs:
        sys.exit("error: there is no run to compare; give the folders of runs, such as captioner")
    page = args.output or Path(os.path.commonpath([run.folder.resolve().parent for run in runs])) / PAGE
    try:
        make_folder(page.parent, "--output")
        print(write_comparison(runs, page))
    except OSError as error:
        sys.exit(f"error: {error}")
    print(f"\nthe page: {page}")


if __name__ == "__main__":
    main()
