"""Draw the pictures of `how_it_works.md` into a folder: `python docs/_site/pictures.py docs/assets`.

The numbers are those of the package, and of a small language model that has learned the license and the changelog, and
is calibrated on this repository's README.
"""

import copy
import sys
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from transformers import LlamaConfig, LlamaForCausalLM

from zssvd_lightning import compress
from zssvd_lightning.layers.storage import STORAGES
from zssvd_lightning.whitening.cholesky import safe_cholesky
from zssvd_lightning.whitening.svd import thin_svd

ROOT = Path(__file__).parents[2]
BLUE, ORANGE, GRAY = "#3b5bdb", "#e8590c", "#868e96"
LEARNED, SEEN = ("LICENSE", "CHANGELOG.md"), "README.md"
LAYER = "model.layers.1.mlp.gate_proj"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "zssvd",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def batches(*files):
    """Return windows of 64 bytes of texts, in batches of 8."""
    ids = torch.tensor(list(b"".join((ROOT / file).read_bytes() for file in files)))
    windows = ids[: len(ids) // 64 * 64].view(-1, 64)
    return [{"input_ids": rows, "labels": rows} for rows in windows.split(8)]


def trained(steps):
    """Return a language model of two blocks after so many steps."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, tie_word_embeddings=True, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    data = batches(*LEARNED)
    for step in range(steps):
        loss = model(**data[step % len(data)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def layer(axes):
    """Draw a matrix beside the two thin ones that replace it."""
    boxes = [(0, 0, 4, 4, BLUE), (6, 0, 1, 4, ORANGE), (7.4, 3, 4, 1, ORANGE)]
    for x, y, width, height, color in boxes:
        axes.add_patch(Rectangle((x, y), width, height, facecolor=color, alpha=0.25, edgecolor=color, linewidth=1.5))
    for x, y, text in (
        (2, 2, "W\n1024 x 1024\n1,048,576 numbers"),
        (5, 2, "$\\approx$"),
        (6.5, 2, "up\n1024\nx 256"),
        (9.4, 3.5, "down: 256 x 1024"),
        (9.4, 1.5, "together\n524,288 numbers:\nhalf as many"),
    ):
        axes.text(x, y, text, ha="center", va="center")
    axes.set(xlim=(-0.2, 11.6), ylim=(-0.2, 4.2), aspect="equal")
    axes.axis("off")


def cost(axes):
    """Draw what a rank costs in three storages, for a matrix of 1024 x 1024."""
    m = n = 1024
    ranks = range(n + 1)
    for name, color in (("factors", BLUE), ("pivoted", ORANGE), ("remap", GRAY)):
        share = [STORAGES[name].low_rank_cost(m, n, k, "parameters") / (m * n) for k in ranks]
        axes.plot(ranks, share, color=color, label=f'storage="{name}"')
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.text(20, 1.03, "the dense matrix")
    axes.set(xlabel="rank k", ylabel="numbers, relative to dense", ylim=(0, 1.5), xlim=(0, n))
    axes.legend(frameon=False, loc="lower right")


def spectra(axes, model):
    """Draw the error of the output of a layer after a truncation by either SVD."""
    seen = []
    hook = model.get_submodule(LAYER).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in batches(SEEN):
            model(**batch)
    hook.remove()
    W = model.get_submodule(LAYER).weight.detach().double()
    X = torch.cat([x.flatten(0, 1) for x in seen]).double()
    A = X.T @ X / len(X)
    L = safe_cholesky(A, LAYER)[0].to(A)
    whole = (W @ A * W).sum()
    for color, name, root in (
        (GRAY, "plain SVD", torch.eye(len(A), dtype=A.dtype)),
        (BLUE, "SVD in whitened coordinates", L),
    ):
        U, sigma, Vh = thin_svd(W @ root)
        errors = []
        for k in range(len(sigma) + 1):
            rest = torch.linalg.solve_triangular(root.T, ((U[:, k:] * sigma[k:]) @ Vh[k:]).T, upper=True).T
            errors.append(float((rest @ A * rest).sum() / whole))
        axes.semilogy(range(len(errors) - 1), errors[:-1], color=color, label=name)
    axes.set(xlabel="rank k", ylabel="squared error of the output")
    axes.legend(frameon=False)


def walk(axes, report):
    """Draw the running sum of the sensitivities of what the zero-sum rule drops."""
    trace = report.trace["walk"]
    at = [(index + 1) * trace["stride"] for index in range(len(trace["lowest"]))]
    axes.fill_between(at, trace["lowest"], trace["highest"], color=BLUE, alpha=0.35, step="pre", linewidth=0)
    axes.axhline(0, color="black", linewidth=0.8)
    largest = max(map(abs, trace["lowest"] + trace["highest"]))
    axes.set(
        xlabel="components dropped so far", ylabel="predicted change\nof the loss (nats)", ylim=(-largest, largest)
    )


def ranks(axes, report):
    """Draw the share of each layer that stays."""
    names = [name.removeprefix("model.layers.").replace("self_attn.", "").replace("mlp.", "") for name in report.layers]
    share = [row.kept / (row.shape[0] * row.shape[1]) for row in report.layers.values()]
    axes.barh(names, share, color=BLUE)
    axes.axvline(1 - report.asked, color=ORANGE, linestyle=":")
    axes.text(1 - report.asked + 0.01, -1.2, "the same share for all", color=ORANGE)
    axes.set(xlabel="share of the layer that stays", xlim=(0, 1.05))
    axes.invert_yaxis()


def draw(folder, steps=300):
    """Write all pictures to `folder` and return their paths."""
    model = trained(steps)
    pictures = {"layer": (layer, (7, 2.7)), "cost": (cost, (7, 3.2))}
    pictures["whitening"] = (lambda axes: spectra(axes, model), (7, 3.2))
    report = compress(
        copy.deepcopy(model), batches(SEEN), preset="zs-svd", corrections=0, prune_ratio=0.4, progress=False
    )
    pictures |= {
        "walk": (lambda axes: walk(axes, report), (7, 2.4)),
        "ranks": (lambda axes: ranks(axes, report), (7, 4)),
    }
    paths = []
    for name, (paint, size) in pictures.items():
        with mpl.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=size)
            paint(axes)
            paths.append(Path(folder) / f"{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None}, facecolor="white")
            plt.close(figure)
    return paths


if __name__ == "__main__":
    draw(sys.argv[1])
