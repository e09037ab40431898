"""Tasks of the Language Model Evaluation Harness (package lm-eval, extra `eval`) on our models, from local files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import nearest
from ..infer.sampling import Sampling
from .likelihood import LanguageModel


def run_tasks(
    model: LanguageModel, tasks: Sequence[str], *, include: str | Path | None = None, shots: int | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Results by task name. `include`: a folder of task files (YAML); `limit`: only the first so many documents."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("tasks need the package lm-eval: pip install 'landmark-llm[eval]'") from None
    if include is not None and not Path(include).is_dir():
        raise ValueError(f"{include} is no folder; --include names one with task files (YAML)")
    manager = TaskManager(include_path=str(include) if include else None, include_defaults=include is None)
    known = set(manager.all_tasks)
    for task in tasks:
        if task not in known:
            close = nearest(task, known) or f"; it has {', '.join(sorted(known)[:8])}"
            raise ValueError(f"no task is called {task!r} in {include or 'the harness'}{close}")
    out = simple_evaluate(
        adapter(model), tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=0,
        verbosity="ERROR",
    )  # fmt: skip
    assert out is not None
    results: dict[str, dict[str, Any]] = out["results"]
    return results


def adapter(model: LanguageModel) -> Any:
    """An `lm_eval.api.model.LM` over our three methods."""
    from lm_eval.api.model import LM

    class Adapter(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(out.logprob, out.greedy) for out in model.loglikelihood([request.args for request in requests])]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return model.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return model.generate_until([(r.args[0], as_sampling(r.args[1])) for r in requests])

    return Adapter()


def as_sampling(options: dict[str, Any]) -> Sampling:
    """The harness' generation options as ours. Raises ValueError for one that is not known."""
    options = dict(options)
    until = options.pop("until", [])
    sample, temperature = options.pop("do_sample", None), options.pop("temperature", 0.0)
    max_tokens = options.pop("max_gen_toks", options.pop("max_tokens", 256))
    known = {"top_p": options.pop("top_p", 1.0), "top_k": options.pop("top_k", 0)}
    if options:
        raise ValueError(f"the generation option {next(iter(options))!r} of a task is not understood")
    stop = (until,) if isinstance(until, str) else tuple(until)
    if sample is False:
        temperature = 0.0
    return Sampling(max_tokens=max_tokens, stop=stop, temperature=temperature, **known)
