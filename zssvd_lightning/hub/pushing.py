"""Upload of compressed models to the hub."""

from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from torch import nn
from transformers import PreTrainedTokenizerBase

from zssvd_lightning.compression.report import Report
from zssvd_lightning.hub.model_card import write_card
from zssvd_lightning.hub.saving import SHARD, save_pretrained
from zssvd_lightning.serialization.specs import specs_of


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    report: Report | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload compressed model",
    max_shard_size: str | int = SHARD,
    self_contained: bool = False,
) -> str:
    """Save a model as `save_pretrained` does, and upload the folder to a repository on the hub.

    The repository is created if there is none. `push_to_hub` of the model itself also works, but writes no card and no
    report.

    Args:
        model: a transformers model.
        repo_id: repository, such as `me/my-model`; without an owner, it is one of the account of the token. The model
            card loads the model by the full name that the hub answers.
        tokenizer: tokenizer to upload with the model.
        report: report of the compression, for the model card and `report.json`.
        private: whether a new repository is private; the default of the account when None.
        token: access token; that of `hf auth login` when None.
        commit_message: message of the commit.
        max_shard_size: maximum size of each weight file, such as `5GB`.
        self_contained: as in `save_pretrained`.

    Returns:
        The address of the repository.

    Raises:
        SavedModelError: the model cannot be saved; see `save_pretrained`. Nothing is uploaded.
        HfHubHTTPError: the hub refuses the upload.

    Example:
        >>> push_to_hub(model, "me/my-model", tokenizer, report=report)  # doctest: +SKIP
    """
    api = HfApi(token=token)
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        save_pretrained(
            model,
            folder,
            tokenizer,
            report=report,
            max_shard_size=max_shard_size,
            self_contained=self_contained,
            name=repo_id,
        )
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if url.repo_id != repo_id:
            write_card(folder, url.repo_id, specs_of(model), report)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=commit_message)
    return str(url)
