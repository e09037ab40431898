"""One engine for every decoder: continuous batching, chunked prompts, paged and slotted state, prefix reuse.

    engine = Engine(model, tokenizer, memory=2 << 30, max_batch=64)      # memory: bytes for the state of all sequences

    handle = engine.submit(Request(prompt=[1, 2, 3], sampling=Sampling(temperature=0), n=2, logprobs="model", top=5))
    for event in handle: ...               # Event(index, token, text, logprob, finish, top), answers interleaved
    async for event in handle: ...         # the same in an event loop, with the engine's thread running
    handle.result()                        # [Answer(tokens, text, logprobs, finish)] * n, when all are finished
    handle.cancel()                        # from any thread; its blocks are free before the next step
    handle.cached, handle.prompt_logprobs, handle.error

    engine.generate([request, ...])        # submit all, wait for all: [[Answer] * n, ...]
    with engine: ...                       # start() a thread that makes the steps; stop() ends it
    engine.step()                          # or make them oneself; iterating a handle does, where no thread does
    engine.longest, engine.stats()         # tokens that a text may have; Stats: counters and the present load

`submit` raises ValueError for what cannot be served; a request that fails later raises EngineError where it is awaited.
A request's tokens depend on its prompt, its sampling and its seed only, whatever else is in the batch, whether its
beginning was remembered, and however often it had to give way; in bfloat16 up to rounding, which differs with the shape
of a call, so that a draw that is close may fall otherwise under other load. A `Request` may carry a `guide`
(constrained output): a factory of objects that say which tokens may come next.

`Engine(..., drafter=...)` speculates, the same tokens in fewer calls of the model: "lookup" (where texts repeat
themselves), "own" (the model's modules for further tokens), or a smaller decoder with the same vocabulary; as far as it
is worth its cost, so in small batches. `Engine(..., adapters=attach(model, {"poet": ...}))` serves adapters of one
model side by side: `Request(adapter="poet")` (transforms/lora.py).

These promises are tested in float32. In bfloat16 up to 16 tokens of a call come to what they come to alone, to the bit,
where a sublayer is one call of a kernel (landmark.nn.step); prompts that are read in other pieces may round apart, and
now and then that moves a choice.
"""

from ..generate import Answer, Event
from ..sampling import Sampling
from .engine import Engine
from .handle import EngineError, Handle
from .request import Guide, Request
from .stats import Stats

__all__ = ["Answer", "Engine", "EngineError", "Event", "Guide", "Handle", "Request", "Sampling", "Stats"]
