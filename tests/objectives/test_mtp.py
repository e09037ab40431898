"""Multi-token prediction: against transformers' module, explicit sums, and no document's targets in another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

import landmark
from landmark.data.batches import IGNORE, Batch
from landmark.models.decoder import Decoder
from landmark.nn.mtp import IndependentDrafts, SequentialDrafts
from landmark.objectives.lm import CausalLM
from landmark.objectives.mtp import MultiToken, targets_ahead
from landmark.weights.files import read_tensors, write_tensors

from ..models.families import close, perturb, reference
from ..models.test_deepseek import SHAPE

CONFIG = {**SHAPE, "n_group": 4, "topk_group": 2, "num_mtp_layers": 2}


def small(kind: str = "sequential", depth: int = 2) -> Decoder:
    torch.manual_seed(0)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    base: Any = landmark.build({"architectures": ["LlamaForCausalLM"], **{name: SHAPE[name] for name in sizes}})
    layer, norm = base.cfg.layers[0], base.cfg.norm
    drafts = (
        SequentialDrafts.Config(depth=depth, layer=layer, norm=norm)
        if kind == "sequential"
        else IndependentDrafts.Config(depth=depth, layer=layer, norm=norm)
    )
    model = replace(base.cfg, drafts=drafts).build()
    perturb(model)
    return model


def batch(tokens: torch.Tensor, segments: torch.Tensor) -> Batch:
    targets = torch.full_like(tokens, IGNORE)
    same = segments[:, 1:] == segments[:, :-1]
    targets[:, :-1] = tokens[:, 1:].masked_fill(~same, IGNORE)
    positions = torch.zeros_like(tokens)
    for row in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            positions[row, t] = positions[row, t - 1] + 1 if segments[row, t] == segments[row, t - 1] else 0
    return Batch(tokens, targets, positions, segments)


def test_parity_with_published_files(tmp_path: Path) -> None:
    """The files of a published model have further layers after the last one; transformers' module is the oracle."""
    config = DeepseekV3Config(**CONFIG)
    theirs: Any = reference(config, DeepseekV3ForCausalLM, tmp_path)
    without = landmark.load(tmp_path)
    assert isinstance(without, Decoder) and without.drafts is None
    steps, tensors = [], read_tensors(tmp_path)
    for k in range(2):
        step = MtpLayer(config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, config.num_hidden_layers - 1).eval()
        with torch.no_grad():  # transformers leaves experts as they were in memory
            for p in step.parameters():
                p.fill_(1.0 if p.dim() < 2 else 0.0)
        perturb(step, seed=k)
        steps.append(step)
        donor = DeepseekV3ForCausalLM._from_config(config)
        donor.model.layers[-1] = step.mtp_block
        donor.save_pretrained(tmp_path / "donor")
        at = f"model.layers.{config.num_hidden_layers + k}."
        for name, tensor in read_tensors(tmp_path / "donor").items():
            last = f"model.layers.{config.num_hidden_layers - 1}."
            if name.startswith(last):
                tensors[at + name.removeprefix(last)] = tensor.clone()
        own = {"enorm": step.enorm, "hnorm": step.hnorm, "eh_proj": step.eh_proj, "shared_head.norm": step.post_norm}
        tensors |= {f"{at}{name}.weight": m.weight.detach().clone() for name, m in own.items() if m is not None}
        tensors[f"{at}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{at}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    (tmp_path / "model.safetensors").unlink()
    write_tensors(tmp_path, {name: tensor.contiguous() for name, tensor in tensors.items()}, shard_bytes=10**9)
    model = landmark.load(tmp_path)
    assert isinstance(model, Decoder) and model.drafts is not None
    tokens = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden, drafted = model.hidden_and_drafts(tokens, model.context(tokens))
        close(model.logits(hidden), theirs(tokens, use_cache=False).logits)
        want = theirs.model(tokens, use_cache=False).last_hidden_state
        mask = torch.full((11, 11), float("-inf")).triu(1)[None, None]
        places = torch.arange(11)[None]
        for k, step in enumerate(steps):
            ahead = theirs.model.embed_tokens(tokens.roll(-k - 1, 1))
            turned = theirs.model.rotary_emb(ahead, places)
            want = step(ahead, want, turned, mask, places, None)
            close(model.logits(drafted[k]), theirs.lm_head(want))
    landmark.save(model, tmp_path / "back")
    back = read_tensors(tmp_path / "back")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)


@pytest.mark.parametrize("kind", ["sequential", "independent"])
def test_the_loss_is_the_sum_of_each_token_s(kind: str) -> None:
    model = small(kind).double()
    tokens = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    given = batch(tokens, torch.ones_like(tokens))
    loss = MultiToken(weight=0.5).loss(model, given)
    hidden, drafted = model.hidden_and_drafts(tokens, model.context(tokens))
    want = F.cross_entropy(model.logits(hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss.metrics["nll"][0], want.detach())
    for k, made in enumerate(drafted, 1):
        logits, goals = model.logits(made)[:, : -1 - k], tokens[:, 1 + k :]
        ahead = F.cross_entropy(logits.flatten(0, 1), goals.flatten(), reduction="sum")
        torch.testing.assert_close(loss.metrics[f"draft_{k}"][0], ahead.detach())
        want = want + ahead * 0.25
    torch.testing.assert_close(loss.sum, want)


@pytest.mark.parametrize("kind", ["sequential", "independent"])
def test_packed_documents_are_alone(kind: str) -> None:
    model = small(kind).double().eval()
    tokens = torch.randint(0, 97, (1, 15), generator=torch.Generator().manual_seed(2))
    segments = torch.tensor([[1] * 9 + [2] * 6])
    whole = MultiToken().loss(model, batch(tokens, segments))
    parts = [tokens[:, :9], tokens[:, 9:]]
    alone = [MultiToken().loss(model, batch(part, torch.ones_like(part))) for part in parts]
    torch.testing.assert_close(whole.sum, alone[0].sum + alone[1].sum)
    assert whole.count == alone[0].count + alone[1].count == 13
    for name in ("draft_1", "draft_2"):
        assert whole.metrics[name][1] == sum(loss.metrics[name][1] for loss in alone)


def test_targets_further_on() -> None:
    tokens = torch.arange(8)[None]
    given = batch(tokens, torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2]]))
    bounds = small().context(tokens, segments=given.segments).bounds
    x = IGNORE
    assert given.targets.tolist() == [[1, 2, 3, 4, x, 6, 7, x]]
    assert targets_ahead(given.targets, bounds, 1).tolist() == [[2, 3, 4, x, x, 7, x, x]]
    assert targets_ahead(given.targets, bounds, 2).tolist() == [[3, 4, x, x, x, x, x, x]]


def test_every_parameter_learns_and_is_saved(tmp_path: Path) -> None:
    model = small()
    tokens = torch.randint(0, 97, (2, 12))
    MultiToken().loss(model, batch(tokens, torch.ones_like(tokens))).sum.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    landmark.save(model, tmp_path)
    back = landmark.load(tmp_path)
    assert isinstance(back, Decoder) and back.drafts is not None
    with torch.no_grad():
        assert torch.equal(back(tokens), model.eval()(tokens))


def test_a_model_without_drafts() -> None:
    tokens = torch.randint(0, 97, (1, 5))
    plain = replace(small().cfg, drafts=None).build()
    assert CausalLM().loss(plain, batch(tokens, torch.ones_like(tokens))).count == 4
    with pytest.raises(ValueError, match="give its config drafts"):
        MultiToken().loss(plain, batch(tokens, torch.ones_like(tokens)))
