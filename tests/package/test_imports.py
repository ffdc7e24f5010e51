"""What an import loads, and that transformers reads compressed folders whatever is imported first."""

import json
import subprocess
import sys

import pytest
import torch
from support import fresh
from support.models import tiny_llama

import zssvd_lightning
from zssvd_lightning import save_pretrained
from zssvd_lightning._validation import needs_extra
from zssvd_lightning.errors import MissingExtraError

HEAVY = ("datasets", "pandas", "pyarrow", "peft", "scipy", "matplotlib", "typer")


def in_fresh_python(code: str) -> str:
    """What a script prints where nothing but torch, which all packages begin with, has been imported."""
    return fresh.run(code, loaded=("torch",)).stdout


def test_the_package_itself_loads_nothing_heavy():
    code = "import sys, zssvd_lightning; print([m for m in sys.argv[1:] if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, "torch", "transformers", "lightning", *HEAVY],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]"


def test_the_callback_loads_nothing_that_lightning_and_transformers_do_not():
    code = (
        "import json, sys, lightning, transformers.models.auto, transformers.modeling_utils\n"
        "before = set(sys.modules)\n"
        "from zssvd_lightning import ZSSVDCallback, compress\n"
        "print(json.dumps([m for m in set(sys.modules) - before if '.' not in m]))"
    )
    assert not set(json.loads(in_fresh_python(code))) & set(HEAVY)


def test_every_public_name_can_be_loaded():
    for name in zssvd_lightning.__all__:
        assert getattr(zssvd_lightning, name) is not None
    assert set(dir(zssvd_lightning)) == set(zssvd_lightning.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        zssvd_lightning.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        "import zssvd_lightning; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import zssvd_lightning",
        "from transformers import AutoConfig; import zssvd_lightning; from transformers import AutoModelForCausalLM",
        "from zssvd_lightning import ZSSVDCallback; from transformers import AutoModelForCausalLM",
    ],
)
def test_transformers_reads_a_compressed_folder_in_any_order_of_imports(tmp_path, imports):
    torch.manual_seed(0)
    model = tiny_llama()
    ids = torch.arange(24).view(1, -1)
    batch = {"input_ids": ids, "labels": ids}
    zssvd_lightning.compress(model, [batch], zssvd_lightning.CompressionConfig(0.3, corrections=0), progress=False)
    save_pretrained(model, tmp_path / "out")
    code = (
        f"{imports}\nimport torch\nmodel = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print(model(input_ids=torch.arange(24).view(1, -1)).logits.double().sum().item())"
    )
    assert float(in_fresh_python(code)) == pytest.approx(model(**batch).logits.double().sum().item(), rel=1e-4)


def test_a_missing_extra_is_named():
    wanted = r"pictures need .* pip install 'zssvd-lightning\[report\]'"
    with pytest.raises(MissingExtraError, match=wanted), needs_extra("report", "pictures"):
        raise ModuleNotFoundError("No module named 'matplotlib'")
