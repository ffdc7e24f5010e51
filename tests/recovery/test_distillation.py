"""Divergences against sums written out, dense copies, and predictions saved on disk."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from support.models import CausalLM, padded_batches, sequence_pairs, tiny_llama, tiny_t5, token_batches
from torch import nn
from torch.nn.functional import kl_div

from zssvd_lightning import CompressionConfig, compress
from zssvd_lightning.errors import LogitsError, OutputError, TeacherError
from zssvd_lightning.model.dense_copy import copied, free_bytes, refuse_too_large
from zssvd_lightning.model.logits import logits_of, model_with_logits
from zssvd_lightning.recovery.divergence import divergence, divergence_from_top
from zssvd_lightning.recovery.teachers import Call, DenseTeacher, SavedPredictions, save_predictions


def random_logits(seed, rows=7, tokens=11):
    return 3 * torch.randn(rows, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_the_sum_written_out(temperature):
    student, teacher = random_logits(0), random_logits(1)
    p, q = (torch.softmax(logits / temperature, -1) for logits in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(divergence(student, teacher, temperature), expected, rtol=1e-9, atol=0)
    assert divergence(teacher, teacher, temperature).abs() < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_its_gradient_is_that_of_finite_differences_and_of_autograd(temperature):
    student, teacher = random_logits(0, rows=300, tokens=5).requires_grad_(), random_logits(1, rows=300, tokens=5)
    few = student[:7].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: divergence(logits, teacher[:7], temperature), (few,))
    divergence(student, teacher, temperature).mul(3).backward()
    found, student.grad = student.grad, None
    p, q = ((logits / temperature).log_softmax(-1) for logits in (teacher, student))
    (3 * temperature**2 * kl_div(q, p, reduction="batchmean", log_target=True)).backward()
    torch.testing.assert_close(found, student.grad)


def test_small_gradients_survive_float16_and_its_loss_scale():
    g = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2048, 500, generator=g) for _ in range(2))
    exact = student.clone().requires_grad_()
    divergence(exact, teacher, 1.0).backward()
    half = student.half().requires_grad_()
    divergence(half, teacher.half(), 1.0).mul(65536.0).backward()
    assert torch.isfinite(half.grad).all()
    torch.testing.assert_close(half.grad.float() / 65536, exact.grad, rtol=2e-2, atol=2e-7)


def test_logits_that_exclude_a_token_are_compared():
    student, teacher = random_logits(0), random_logits(1)
    student[:, 3] = teacher[:, 3] = -torch.inf
    others = [column for column in range(11) if column != 3]
    expected = divergence(student[:, others], teacher[:, others], 1.0)
    torch.testing.assert_close(divergence(student, teacher, 1.0), expected)
    with pytest.raises(TeacherError, match="all padding"):
        divergence(student[:0], teacher[:0], 1.0)


def test_of_all_tokens_it_is_the_whole_divergence_and_of_some_a_lower_bound():
    student, teacher = random_logits(0), random_logits(1)
    whole = divergence(student, teacher, 1.0)
    found = []
    for top in (11, 8, 4, 1):
        kept = teacher.log_softmax(-1).topk(top)
        found.append(divergence_from_top(student, kept.indices, kept.values, 1.0).double())
    torch.testing.assert_close(found[0], whole, rtol=1e-3, atol=1e-4)
    assert found[0] > found[1] > found[2] > found[3] > 0  # merging outcomes can only lose information
    kept = teacher.log_softmax(-1).topk(3)
    p, q = (logits.softmax(-1).gather(-1, kept.indices) for logits in (teacher, student))
    written_out = (p * (p / q).log()).sum(-1) + (1 - p.sum(-1)) * ((1 - p.sum(-1)) / (1 - q.sum(-1))).log()
    torch.testing.assert_close(
        divergence_from_top(student, kept.indices, kept.values, 1.0).double(), written_out.mean(), rtol=1e-4, atol=0
    )


def test_padding_does_not_count():
    model, batch = tiny_llama().eval(), padded_batches(1)[0]
    teacher = DenseTeacher(tiny_llama().eval())
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits
    mask = batch["attention_mask"].bool()
    expected = divergence(logits[mask], teacher.model(**inputs).logits[mask], 1.0)
    torch.testing.assert_close(teacher.divergence(Call((), batch, logits), mask, 1.0), expected)
    assert not torch.allclose(teacher.divergence(Call((), batch, logits), None, 1.0), expected)


def test_saved_predictions_are_found_in_any_order_and_give_nearly_the_same(tmp_path):
    dense, student, batches = tiny_llama(), tiny_llama().eval(), padded_batches(3)
    dense.train()
    save_predictions(dense, batches, tmp_path / "top", top=90, progress=False)
    assert dense.training
    saved, teacher = SavedPredictions(tmp_path / "top"), DenseTeacher(dense.eval())
    rows = [2, 0, 3]
    shuffled = {key: value[rows] for key, value in batches[1].items()}
    call = Call((), shuffled, 5 * student(**shuffled).logits)
    mask = shuffled["attention_mask"].bool()
    torch.testing.assert_close(
        saved.divergence(call, mask, 1.0), teacher.divergence(call, mask, 1.0), rtol=5e-2, atol=1e-4
    )


def test_saved_predictions_are_found_however_rows_are_padded(tmp_path):
    dense, batch = tiny_llama(), padded_batches(1)[0]
    save_predictions(dense, [batch], tmp_path / "top", top=90, progress=False)
    longest = int(batch["attention_mask"].sum(1).max())
    shorter = {key: value[:, :longest] for key, value in batch.items()}
    wider = {key: torch.nn.functional.pad(value, (0, 5)) for key, value in batch.items()}
    student, saved = tiny_llama().eval(), SavedPredictions(tmp_path / "top")
    found = [
        saved.divergence(Call((), b, student(**b).logits), b["attention_mask"].bool(), 1.0) for b in (shorter, wider)
    ]
    torch.testing.assert_close(found[0], found[1])
    other = {**batch, "position_ids": torch.arange(24).expand(4, 24)}
    with pytest.raises(TeacherError, match="no prediction"):
        saved.divergence(Call((), other, student(**other).logits), None, 1.0)


def test_predictions_of_another_vocabulary_or_of_a_decoder_are_refused(tmp_path):
    save_predictions(tiny_llama(), token_batches(1), tmp_path / "top", top=5, progress=False)
    SavedPredictions(tmp_path / "top").refuse_other(tiny_llama())
    with pytest.raises(TeacherError, match="over 97 tokens, but LlamaForCausalLM has 50"):
        SavedPredictions(tmp_path / "top").refuse_other(tiny_llama(vocab_size=50))
    with pytest.raises(TeacherError, match="decoder"):
        save_predictions(tiny_t5(), sequence_pairs(1), tmp_path / "t5", progress=False)


def test_predictions_that_are_not_there_are_an_error(tmp_path):
    save_predictions(tiny_llama(), token_batches(2), tmp_path / "top", top=5, progress=False)
    other = token_batches(1, seed=9)[0]
    with pytest.raises(TeacherError, match=r"no prediction for row 0 .*24 tokens"):
        SavedPredictions(tmp_path / "top").divergence(Call((), other, tiny_llama()(**other).logits), None, 1.0)
    with pytest.raises(TeacherError, match="no predictions"):
        SavedPredictions(tmp_path / "elsewhere")
    next((tmp_path / "top").glob("*.safetensors")).write_bytes(b"broken")
    with pytest.raises(TeacherError, match="no predictions"):
        SavedPredictions(tmp_path / "top")
    with pytest.raises(TeacherError, match="no batches"):
        save_predictions(tiny_llama(), [], tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(OutputError):
        save_predictions(tiny_llama(), token_batches(1), tmp_path / "mine", progress=False)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_predictions_span_several_files(tmp_path):
    batches = token_batches(20, size=4)
    save_predictions(tiny_llama(), batches, tmp_path / "top", top=3, progress=False)
    assert len(list((tmp_path / "top").glob("*.safetensors"))) == math.ceil(80 / 64)
    SavedPredictions(tmp_path / "top").divergence(Call((), batches[19], tiny_llama()(**batches[19]).logits), None, 1.0)


def test_a_copy_gives_the_same_and_shares_nothing():
    model = tiny_llama(tie_word_embeddings=True).train()
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    new = copied(model, torch.float32, torch.clone)
    batch = token_batches(1)[0]
    assert torch.equal(new(**batch).logits, model.eval()(**batch).logits)
    assert len(calls) == 1
    assert new.lm_head.weight is new.model.embed_tokens.weight
    assert not {p.data_ptr() for p in new.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert not any(p.requires_grad for p in new.parameters())
    assert type(new) is type(model)
    assert copied(model, torch.bfloat16, torch.Tensor.bfloat16).dtype == torch.bfloat16


def test_low_rank_layers_are_dense_in_a_copy():
    model = tiny_llama()
    dense = {name: tuple(p.shape) for name, p in model.named_parameters()}
    compress(model, token_batches(), CompressionConfig(prune_ratio=0.3, corrections=0), progress=False)
    assert {name: tuple(p.shape) for name, p in copied(model, torch.float32, torch.clone).named_parameters()} == dense


def test_what_refers_to_other_modules_refers_to_their_copies():
    model = tiny_llama()
    model.model.layers[0].__dict__["peer"] = model.model.layers[1]
    model.twice = model.model.layers[1].mlp.up_proj
    model.last = model.model.embed_tokens.weight * 2
    new = copied(model, torch.float32, torch.clone)
    assert new.model.layers[0].peer is new.model.layers[1]
    assert new.twice is new.model.layers[1].mlp.up_proj
    compress(model, token_batches(), CompressionConfig(prune_ratio=0.5, corrections=0), progress=False)
    model.twice = model.model.layers[1].mlp.up_proj
    new = copied(model, torch.float32, torch.clone)
    assert new.twice is new.model.layers[1].mlp.up_proj


def test_compiled_blocks_are_copied_uncompiled():
    model = tiny_llama()
    batch, expected = token_batches(1)[0], model.eval()(**token_batches(1)[0]).logits
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    new = copied(model, torch.float32, torch.clone)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    torch.testing.assert_close(new(**batch).logits, expected)


def test_memory_in_use_is_not_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 60)
    assert free_bytes(torch.device("cuda")) == 15


def test_a_copy_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr("zssvd_lightning.model.dense_copy.free_bytes", lambda device: 1000)
    with pytest.raises(TeacherError, match=r"takes 0.00 GB, and 0.00 GB are free on cpu; write its predictions"):
        refuse_too_large(tiny_llama(), torch.bfloat16)
    size = sum(p.numel() for p in tiny_llama().parameters())
    monkeypatch.setattr("zssvd_lightning.model.dense_copy.free_bytes", lambda device: size)
    refuse_too_large(tiny_llama(), torch.bfloat16, processes=2)


def test_the_model_with_logits_is_the_only_one():
    module = CausalLM()
    assert model_with_logits(module) is module.model
    module.other = copy.deepcopy(module.model)
    with pytest.raises(LogitsError, match="holds 2 of transformers; override ZSSVDCallback"):
        model_with_logits(module)
    with pytest.raises(LogitsError, match="holds 0"):
        model_with_logits(nn.Linear(2, 2))
    with pytest.raises(LogitsError, match="Tensor without any"):
        logits_of(torch.ones(2))
    assert torch.equal(logits_of({"logits": torch.ones(2)}), torch.ones(2))
    assert torch.equal(logits_of(SimpleNamespace(logits=torch.ones(2))), torch.ones(2))
