"""The cache in models: the model's own where nothing is dropped, and as its definition where something is."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import (
    assert_same_state,
    padded_batches,
    saved_tiny_llama,
    state_of,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_vit,
    token_batches,
)
from torch import nn
from transformers import AttentionInterface, DynamicCache, Qwen2Config, Qwen2ForCausalLM

from benchmarks import kv_cache as benchmark
from zssvd_lightning import LowRankCache
from zssvd_lightning.errors import (
    BudgetError,
    CalibrationError,
    ConfigError,
    NonFiniteError,
    RankDeficientWarning,
    SavedModelError,
    UnsupportedCacheError,
)
from zssvd_lightning.kv_cache.observation import observe
from zssvd_lightning.kv_cache.saving import FILE
from zssvd_lightning.layers.low_rank import LowRankLinear

BATCHES = token_batches(2)


def calibrated(model, ratio=0.5, batches=BATCHES):
    return LowRankCache.from_calibration(model, batches, ratio, progress=False)


def tiny_qwen(kinds):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=97,
            num_hidden_layers=len(kinds),
            layer_types=kinds,
            use_sliding_window=True,
            sliding_window=8,
            **sizes,
        )
    )


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    model = tiny_llama(hidden_act="silu").eval()
    with torch.no_grad():  # attention that is far from uniform, so that errors of keys show
        for block in model.model.layers:
            for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.o_proj):
                part.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def cache(llama):
    return calibrated(llama)


@torch.no_grad()
def logits_in_parts(model, cache, ids, ends=(7, 8, 15, 24)):
    found, begin = [], 0
    for end in ends:
        found.append(model(input_ids=ids[:, begin:end], past_key_values=cache).logits)
        begin = end
    return torch.cat(found, 1)


@torch.no_grad()
def by_definition(model, bases, ids, ends=(7, 8, 15, 24)):
    """Logits of the model's own cache, in which earlier keys and values are projected between calls."""
    dense, found, begin = DynamicCache(config=model.config), [], 0
    for end in ends:
        for number, layer in enumerate(dense.layers if begin else ()):
            for name, part in zip(("keys", "values"), bases[number], strict=True):
                held = getattr(layer, name)
                projected = torch.empty_like(held)
                downs, ups = part.down.split(part.ranks), part.up.split(part.ranks)
                for h, (down, up) in enumerate(zip(downs, ups, strict=True)):
                    projected[:, h] = (held[:, h] - part.mean[h]) @ down.T @ up + part.mean[h]
                setattr(layer, name, projected)
        found.append(model(input_ids=ids[:, begin:end], past_key_values=dense).logits)
        begin = end
    return torch.cat(found, 1)


def test_calibration_reads_the_model_as_it_is(llama):
    before = state_of(llama.train())
    interface = AttentionInterface.get_interface
    batch = padded_batches(1)[0]
    moments = observe(llama, [batch], progress=False)
    assert_same_state(before, state_of(llama))
    assert AttentionInterface.get_interface is interface
    assert not nn.modules.module._global_forward_pre_hooks
    llama.eval()
    own, mask = DynamicCache(config=llama.config), batch["attention_mask"].bool()
    with torch.no_grad():
        llama(**batch, past_key_values=own)
        llama.set_attn_implementation("eager")
        probabilities = llama(**batch, output_attentions=True).attentions
        llama.set_attn_implementation("sdpa")
    for number, layer in enumerate(own.layers):
        for sums, held in ((moments[number].keys, layer.keys), (moments[number].values, layer.values)):
            rows, p = held.transpose(1, 2)[mask].double(), probabilities[number].double()  # (N, H, d), (B, 4, T, T)
            weights = p * (1 - p) if held is layer.keys else p
            received = (weights * mask[:, None, :, None]).unflatten(1, (2, 2)).sum((2, 3)).transpose(1, 2)[mask]
            expected = (received[..., None] * rows).sum(0) / received.sum(0)[:, None]
            torch.testing.assert_close(sums.mean(), expected, atol=1e-5, rtol=1e-5)
            assert sums.count == mask.sum()
        W = llama.model.layers[number].self_attn.o_proj.weight.detach().double()  # (m, 4 heads of 8)
        for head in range(2):
            own_columns = W[:, 16 * head : 16 * head + 16].unflatten(1, (2, 8))
            expected = torch.einsum("mgd,mge->de", own_columns, own_columns)
            torch.testing.assert_close(moments[number].output[head], expected, rtol=1e-4, atol=1e-4)
        assert moments[number].queries.count == 2 * mask.sum()
        assert moments[number].scaling == 8**-0.5


def test_hooks_of_others_run_once_for_each_batch(llama):
    layer, seen = llama.model.layers[1].self_attn.o_proj, []
    expected = observe(llama, BATCHES, progress=False)
    handles = [
        layer.register_forward_hook(lambda module, args, output: seen.append("after")),
        layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True),
        nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen.append("global") if module is layer else None
        ),
    ]
    before = state_of(llama)
    try:
        found = observe(llama, BATCHES, progress=False)
        assert seen == ["before", "global", "after"] * len(BATCHES)
        assert len(nn.modules.module._global_forward_hooks) == 1
        assert_same_state(before, state_of(llama))
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(found[1].output, expected[1].output)


def test_hooks_that_compute_the_weight_run_also_where_it_is_read():
    model = tiny_llama().eval()
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(model.model.layers[0].self_attn.o_proj)
    with torch.no_grad():
        layer.weight_g.mul_(3)  # the weight follows in the next forward pass
    found = observe(model, BATCHES, progress=False)[0].output
    W = layer.weight.detach().double()
    expected = torch.stack([torch.einsum("mgd,mge->de", *(own,) * 2) for own in W.view(len(W), 2, 2, 8).unbind(1)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_everything_kept_is_the_model_s_own_cache(llama):
    whole = calibrated(llama, ratio=1.0)
    ids = BATCHES[0]["input_ids"]
    own = logits_in_parts(llama, DynamicCache(config=llama.config), ids)
    assert torch.equal(logits_in_parts(llama, whole, ids), own)
    assert whole.bytes_per_token() == (2 * 2 * 2 * 8 * 2,) * 2


def test_cache_does_what_its_definition_says(llama, cache):
    ids = BATCHES[0]["input_ids"]
    expected = by_definition(llama, cache.bases, ids)
    own = logits_in_parts(llama, DynamicCache(config=llama.config), ids)
    found = logits_in_parts(llama, cache.new(), ids)
    # what is decoded once in the definition is encoded again there, which changes nothing: it is a projection
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert (found - own).abs().max() > 0.05
    assert torch.equal(found[:, :7], own[:, :7])  # the tokens of a call are read as they are


def test_error_falls_as_more_is_kept(llama):
    ids = BATCHES[0]["input_ids"]
    own = logits_in_parts(llama, DynamicCache(config=llama.config), ids)
    caches = [calibrated(llama, ratio) for ratio in (0.25, 0.5, 0.75, 1.0)]
    errors = [(logits_in_parts(llama, cache, ids) - own).square().mean().item() for cache in caches]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_bytes_are_those_that_are_held(llama, cache):
    held = cache.new()
    logits_in_parts(llama, held, BATCHES[0]["input_ids"])
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers)
    tokens = BATCHES[0]["input_ids"].numel()
    assert held.get_seq_length() == 24
    assert cache.bytes_per_token(torch.float32).low_rank == size / tokens
    low_rank, dense = cache.bytes_per_token()
    assert low_rank == dense / 2
    assert "0.500 of the bytes per token" in repr(cache)


def test_rows_are_reordered_repeated_selected_and_cropped(llama, cache):
    ids = BATCHES[0]["input_ids"]

    def filled(rows):
        one = cache.new()
        with torch.no_grad():
            llama(input_ids=rows, past_key_values=one)
        return one

    def assert_same(one, other):
        for a, b in zip(one.layers, other.layers, strict=True):
            torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-4)

    order = torch.tensor([2, 0, 0, 3])
    for change, rows in (
        (lambda one: one.reorder_cache(order), ids[order]),
        (lambda one: one.batch_repeat_interleave(2), ids.repeat_interleave(2, 0)),
        (lambda one: one.batch_select_indices(order[:2]), ids[order[:2]]),
        (lambda one: one.crop(-5), ids[:, :-5]),
    ):
        one = filled(ids)
        change(one)
        assert_same(one, filled(rows))
    one = filled(ids)
    one.reset()
    assert one.get_seq_length() == 0
    assert_same(filled(ids), filled(ids))


def test_generation_in_a_padded_batch_is_that_of_each_row(llama, cache):
    rows = [BATCHES[1]["input_ids"][0, :5], BATCHES[1]["input_ids"][1, :9]]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = torch.stack([torch.cat([row.new_zeros(9 - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(9) >= 9 - len(row) for row in rows]).long()
    together = llama.generate(input_ids=ids, attention_mask=mask, past_key_values=cache.new(), **settings)
    for row, found in zip(rows, together, strict=True):
        alone = llama.generate(
            input_ids=row[None], attention_mask=torch.ones_like(row)[None], past_key_values=cache.new(), **settings
        )
        assert alone[0, len(row) :].tolist() == found[9:].tolist()


def test_beam_search_reads_what_greedy_scoring_reads(llama, cache):
    ids = BATCHES[1]["input_ids"][:2, :6]
    found = llama.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache.new(),
        num_beams=3,
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ends = (6, *range(7, 12))
    scores = logits_in_parts(llama, cache.new(), found.sequences, ends).log_softmax(-1)[:, 5:-1]
    total = scores.gather(2, found.sequences[:, 6:, None]).sum((1, 2))
    torch.testing.assert_close(found.sequences_scores, total, atol=1e-3, rtol=1e-3)


def test_layers_of_a_sliding_window_stay(caplog):
    model = tiny_qwen(["sliding_attention", "full_attention"]).eval()
    cache = calibrated(model)
    assert cache.left == [0]
    assert list(cache.ranks()) == [1]
    assert "layers [0] as in the model's own cache" in repr(cache)
    whole = calibrated(model, ratio=1.0)
    ids = BATCHES[0]["input_ids"]
    own = logits_in_parts(model, DynamicCache(config=model.config), ids)
    assert torch.equal(logits_in_parts(model, whole, ids), own)
    with pytest.raises(UnsupportedCacheError, match="no layer of Qwen2ForCausalLM caches all tokens"):
        calibrated(tiny_qwen(["sliding_attention"] * 2))


def test_other_attention_and_other_layers():
    model = tiny_gpt2().eval()  # Conv1D, with learned positions
    moments = observe(model, BATCHES, progress=False)
    W = model.transformer.h[1].attn.c_proj.weight.detach().double().unflatten(0, (4, 8))  # (H, d, m)
    torch.testing.assert_close(moments[1].output, W @ W.mT, rtol=1e-4, atol=1e-5)
    assert calibrated(model).bytes_per_token().low_rank == 2 * 2 * 32 * 2 / 2
    eager = tiny_llama(attn_implementation="eager")
    eager.config._attn_implementation = "eager"
    part = eager.model.layers[0].self_attn.o_proj
    eager.model.layers[0].self_attn.o_proj = low = LowRankLinear.like(part, rank=5)
    low.to_empty(device="cpu")
    nn.init.normal_(low.up.weight)
    nn.init.normal_(low.down.weight)
    found = observe(eager, BATCHES, progress=False)[0].output
    W = (low.up.weight @ low.down.weight).detach().double().T.unflatten(0, (2, 2, 8))
    torch.testing.assert_close(found, (W @ W.mT).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (tiny_t5, "is an encoder-decoder"),
        (tiny_vit, "takes no past_key_values"),
        (tiny_bert, "BertForMaskedLM takes no past_key_values"),
        (lambda: nn.Linear(2, 2), "holds no model of transformers"),
    ],
)
def test_models_without_such_a_cache_are_refused(build, said):
    with pytest.raises(UnsupportedCacheError, match=said):
        calibrated(build())


@pytest.mark.parametrize(
    ("batches", "ratio", "error", "said"),
    [
        ([], 0.5, CalibrationError, "no calibration batch"),
        ([BATCHES[0]["input_ids"]], 0.5, CalibrationError, "batch 1 is a Tensor"),
        (BATCHES, 0.0, ConfigError, "ratio is 0.0"),
        (BATCHES, 1.5, ConfigError, "ratio is 1.5"),
        (BATCHES, "0.5", ConfigError, "ratio"),
        (BATCHES, 0.05, BudgetError, "least ratio is 0.125"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(llama, batches, ratio, error, said):
    before = state_of(llama)
    interface = AttentionInterface.get_interface
    with pytest.raises(error, match=said):
        calibrated(llama, ratio, batches)
    assert_same_state(before, state_of(llama))
    assert AttentionInterface.get_interface is interface
    assert not nn.modules.module._global_forward_pre_hooks


def test_fewer_tokens_than_directions(llama):
    with pytest.warns(RankDeficientWarning, match="8 directions, but there are 5 calibration tokens"):
        calibrated(llama, batches=[{"input_ids": BATCHES[0]["input_ids"][:1, :5]}])


def test_keys_that_are_not_finite():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="keys of attention layer 1"):
        calibrated(model)


def test_saved_bases_are_the_same(llama, cache, tmp_path):
    assert cache.save(tmp_path).name == FILE
    loaded = LowRankCache.load(tmp_path, llama)
    assert loaded.ranks() == cache.ranks()
    ids = BATCHES[0]["input_ids"]
    assert torch.equal(logits_in_parts(llama, loaded, ids), logits_in_parts(llama, cache.new(), ids))


def test_bases_of_another_model_are_refused(cache, tmp_path):
    with pytest.raises(SavedModelError, match=f"has no {FILE}"):
        LowRankCache.load(tmp_path, tiny_llama())
    cache.save(tmp_path)
    with pytest.raises(SavedModelError, match="model of type 'llama', but the model is 'gpt2'"):
        LowRankCache.load(tmp_path, tiny_gpt2())
    with pytest.raises(SavedModelError, match="for the layers 0, 1, but the model caches all tokens in 1: 0"):
        LowRankCache.load(tmp_path, tiny_llama(num_hidden_layers=1))
    wider = tiny_llama(num_key_value_heads=4)
    with pytest.raises(UnsupportedCacheError, match=re.escape("(4, 8), but the bases are for (2, 8)")):
        wider(input_ids=BATCHES[0]["input_ids"], past_key_values=LowRankCache.load(tmp_path, wider))


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors.pop("1.keys.up"),
        lambda tensors: tensors["1.keys.up"].resize_(3, 8),
        lambda tensors: tensors["0.values.mean"].fill_(float("nan")),
        lambda tensors: tensors["0.values.ranks"].fill_(100),
        lambda tensors: tensors.update({"0.values.ranks": torch.ones(2)}),
    ],
)
def test_damaged_bases_are_refused(llama, cache, tmp_path, damage):
    file = cache.save(tmp_path)
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata={"version": "1", "model_type": "llama"})
    with pytest.raises(SavedModelError, match="do not fit together"):
        LowRankCache.load(tmp_path, llama)


def test_files_that_are_no_bases_are_refused(llama, cache, tmp_path):
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(SavedModelError, match="cannot be read"):
        LowRankCache.load(tmp_path, llama)
    save_file({"a": torch.ones(1)}, tmp_path / FILE)
    with pytest.raises(SavedModelError, match="version None"):
        LowRankCache.load(tmp_path, llama)
    save_file({"a.keys.up": torch.ones(1)}, tmp_path / FILE, metadata={"version": "1", "model_type": "llama"})
    with pytest.raises(SavedModelError, match="for the layers a"):
        LowRankCache.load(tmp_path, llama)


def test_model_within_peft():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    found = observe(wrapped, BATCHES, progress=False)[0].output
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(found, observe(merged, BATCHES, progress=False)[0].output, rtol=1e-3, atol=1e-4)


def test_benchmark(tmp_path, capsys):
    folder = saved_tiny_llama(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("The sea is wide, and the ship is small. " * 8)
    text = str(tmp_path / "text.txt")
    sizes = ["--length", "32", "--prefill", "16", "--step", "7", "--samples", "2"]
    out = ["--ratios", "1.0,0.5", "--json", str(tmp_path / "found.json")]
    benchmark.main(["--model", str(folder), "--calibrate", text, "--text", text, *sizes, *out])
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    own, whole, half, eight, four = rows
    assert own["perplexity"] == whole["perplexity"] != half["perplexity"]
    assert [row["bytes per token"] for row in (own, whole, half)] == [128, 128, 64]
    assert [row["bytes per token"] for row in (eight, four)] == [64 + 32, 32 + 32]
    assert eight["perplexity"] == pytest.approx(own["perplexity"], rel=1e-2)
    assert capsys.readouterr().out.count("bytes per token") == len(rows)


def test_rounding_is_to_the_nearest_level():
    X = torch.tensor([[0.0, 0.9, 2.1, 3.0], [5.0, 5.0, 5.0, 5.0]])
    torch.testing.assert_close(benchmark.rounded(X, 2), torch.tensor([[0.0, 1.0, 2.0, 3.0], [5.0] * 4]))


def test_page_runs(tmp_path, monkeypatch, llama):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "kv_cache.md").read_text()
    inputs = {"input_ids": BATCHES[0]["input_ids"][:, :8], "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    names = {"model": llama, "batches": BATCHES, "inputs": inputs}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["size"].low_rank < names["size"].dense
    assert (tmp_path / "mine" / FILE).is_file()
