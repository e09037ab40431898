"""Speculative decoding (Leviathan et al. 2023): a cheap drafter proposes, the model reads all proposals in one call,
and what it keeps is distributed exactly as if it had drawn token by token.

    for event in speculate(model, [prompt], Sampling(temperature=0.7), drafter=ModelDrafter(small)): ...
    for event in speculate(model, [prompt], greedy, drafter=Lookup()): ...

A proposal x is kept with probability min(1, p(x) / q(x)); the first that is not is replaced by a draw from the positive
part of p - q, made to sum to 1; if all are kept, one more token is drawn from p (algorithm 1). With acceptance rate a
and g proposals a call gives (1 - a^(g + 1)) / (1 - a) tokens on average (eq. 1).
"""

from .drafters import Drafter, Lookup, ModelDrafter, OwnDrafts, Proposal
from .loop import Figures, speculate
from .reader import Reader
from .verify import expected_tokens, verify

__all__ = [
    "Drafter", "Figures", "Lookup", "ModelDrafter", "OwnDrafts", "Proposal", "Reader", "expected_tokens", "speculate",
    "verify",
]  # fmt: skip
