"""Run the benchmarks one after the other and write their output to benchmarks/RESULTS.md.

python benchmarks/run_all.py                     all of these; half an hour on two otherwise idle cores
python benchmarks/run_all.py generate startup    only these; the other sections stay as they are
python benchmarks/check_gpu.py --results         what needs a GPU; eight minutes
"""

import argparse
import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "RESULTS.md"
ONE_CORE = {"OMP_NUM_THREADS": "1"}
# Name: (title of the section, arguments of its script, environment variables)
SECTIONS = {
    "train": ("Training", [], {}),
    "generate": ("Writing captions", [], {}),
    "token_cache": ("Training from the token cache", [], {}),
    "data": ("Reading photos", [], ONE_CORE),
    "shards": ("Tar shards", [], ONE_CORE),
    "startup": ("The first caption from a new process", [], {}),
}
ONE_GPU = "One GPU"  # the section that `check_gpu.py --results` writes
HEADER = "# What the benchmarks measured\n\nWritten by `make bench`; a section is as old as its date.\n"


def read_results():
    """-> {title: text of the section} of RESULTS.md; empty where there is none."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else ""
    parts = re.split(r"^## (.*)\n", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def write_sections(sections):
    """Write {title: text} to RESULTS.md in the order of SECTIONS, and "not measured" where a text is missing."""
    missing = {title: "not measured" for title, _, _ in SECTIONS.values()}
    missing[ONE_GPU] = "not measured; `python benchmarks/check_gpu.py --results` measures it, in eight minutes"
    body = "".join(f"\n## {title}\n\n{sections.get(title, text).strip()}\n" for title, text in missing.items())
    RESULTS.write_text(HEADER + body, encoding="utf-8")


def write_section(title, text):
    """Write one section; the others stay as they are."""
    write_sections(read_results() | {title: text})


def run(name):
    """Run the script of a section in its own process -> its output after the date. Raises CalledProcessError."""
    _, arguments, environment = SECTIONS[name]
    command = [sys.executable, str(FOLDER / f"bench_{name}.py"), *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    return f"{datetime.date.today()}. {done.stdout.strip()}\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SECTIONS))
    args = parser.parse_args(argv)
    unknown = set(args.names) - SECTIONS.keys()
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    for name in args.names or SECTIONS:
        print(f"{name} ...", flush=True)
        write_section(SECTIONS[name][0], run(name))  # after each one, so that a later failure loses nothing
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
