"""Small trainings: averaged weights, a limit on updates, text of one's own."""

from __future__ import annotations

import torch

from landmark.papers.experiments.gpt1 import kinds
from landmark.papers.learn import learn, only
from landmark.papers.small import decoder
from landmark.papers.text import ByteText
from landmark.train.schedule import Constant

TEXT = torch.arange(4096).mul(7).remainder(200).to(torch.uint8)


def trained(steps: int, average: float = 0.0) -> list[torch.Tensor]:
    model = decoder(dim=32, layers=1)
    batches = ByteText(2, 16, text=TEXT)
    learn(model, batches, steps=steps, lr=1e-2, schedule=Constant(), average=average)
    return [p.detach() for p in model.parameters()]


def test_weights_are_averaged_over_the_last_share() -> None:
    runs = [trained(steps) for steps in (3, 4)]
    for mean, *weights in zip(trained(4, average=0.5), *runs, strict=True):
        torch.testing.assert_close(mean, torch.stack(weights).mean(0))


def test_only_so_many_updates() -> None:
    with only(2):
        short = trained(500)
    for ours, theirs in zip(short, trained(2), strict=True):
        assert torch.equal(ours, theirs)


def test_text_of_ones_own() -> None:
    batch = next(ByteText(4, 16, text=TEXT))
    assert ((batch.targets - batch.tokens).remainder(200) == 7).all()


def test_what_characters_are_part_of() -> None:
    source = 'def f():\n    """Says\n    hello."""\n    return "x" + y  # why\n'
    found = kinds(source)
    assert found is not None
    for kind, part in ((3, '"""Says\n    hello."""'), (2, '"x"'), (1, "# why"), (0, "return")):
        at = source.index(part)
        assert set(found[at : at + len(part)]) == {kind}
    assert kinds("x = (") is None
