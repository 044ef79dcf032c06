"""The notebook: a lesson that runs, kept without outputs."""

import json
import re

import pytest

from conftest import REPO_ROOT

NOTEBOOK = REPO_ROOT / "MyLLM_Vit_gpt2_captioning" / "walkthrough.ipynb"


def test_it_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 10
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_it_runs_from_the_photo_to_the_attention_map():
    reason = "pip install -r requirements-extra.txt"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    before = sorted(NOTEBOOK.parent.iterdir())
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()
    assert sorted(NOTEBOOK.parent.iterdir()) == before
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    text = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "(1, 37, 128)" in text  # image tokens
    assert "above a large blue cross is a large red square\n" in text  # the caption, which is true
    by_hand, by_model = re.search(r"by hand ([\d.]+), model\(images, input_ids, labels\) ([\d.]+)", text).groups()
    assert float(by_hand) == pytest.approx(float(by_model), abs=1e-3)
    before, after = re.search(r"loss before ([\d.]+); .* after one step ([\d.]+)", text).groups()
    assert float(after) < float(before)
    assert "image/png" in code[-1].outputs[-1].data
    assert not any(output.get("name") == "stderr" for cell in code for output in cell.outputs)
