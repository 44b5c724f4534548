"""What someone who has just found the project runs: the README's first example, and the notebook."""

import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT, saved, small_llama
from nbclient import NotebookClient
from tiny_tokenizers import byte_tokenizer


NEVER_IMPORTS_VLLM = "import sys\nassert 'vllm' not in sys.modules\n"  # which a machine without one has not
THEIR_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # no test reaches the hub


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> str:
    """Folder of a model that has a chat template, and has learned nothing."""
    tokenizer = byte_tokenizer("<|im_end|>", "qwen2_5", ["<|im_start|>"])
    model = small_llama(tokenizer, num_positions=512)
    return saved(model, tokenizer, tmp_path_factory.mktemp("models") / "chat")


def test_readmes_first_example_runs_as_it_stands_and_its_result_can_be_tried(chat_model, tmp_path):
    """With a tiny model, which has to answer itself: a server's start is the notebook's test."""
    script, trial = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert THEIR_MODEL in script and THEIR_MODEL in trial
    script = script.replace("num_iterations=2", "num_iterations=2, use_vllm=False")
    (tmp_path / "script.py").write_text((script + NEVER_IMPORTS_VLLM + trial).replace(THEIR_MODEL, chat_model))
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tried = [line for line in done.stdout.splitlines() if line.startswith((f"{chat_model}: ", "out: "))]
    assert len(tried) == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r'pipeline\("text-generation", model="out"', card)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_notebook_runs_in_a_real_kernel_with_a_real_server_and_shows_table_and_report(chat_model, tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    (cell,) = [cell for cell in notebook.cells if THEIR_MODEL in cell.source]
    cell.source = cell.source.replace(THEIR_MODEL, chat_model)
    notebook.cells.append(nbformat.v4.new_code_cell(NEVER_IMPORTS_VLLM))
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(out.text for cell in notebook.cells for out in cell.get("outputs", ()) if "text" in out)
    assert "from a vLLM server that this run starts" in printed
    assert re.search(r"^iteration 1 .*\d", printed, re.MULTILINE)
    table, report = (cell.outputs[-1]["data"]["text/html"] for cell in notebook.cells[-4:-1:2])
    assert table.count("<tr>") == 6 and '<iframe srcdoc="' in report and "iteration" in report
