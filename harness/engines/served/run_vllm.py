"""vLLM behind the questions of `server`: runs in vLLM's own interpreter, imports nothing of this project.

Times are vLLM's own (`RequestStateStats` of every request): the first token by its first-token latency, which starts
at the arrival, later ones by the clock of its engine core.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from server import Event, serve

LEAVES_OUT = ("torchvision", "torchaudio", "torchcodec")  # media, which text models do without


class VLLM:
    """One vLLM engine with one model, stepped in this process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        _require_fitting_media_libraries()
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        if current_platform.device_type != settings["device_type"]:
            raise ValueError(
                f"this vLLM computes on {current_platform.device_type}, the run asks for {settings['device_type']}; "
                "choose the hardware that it was built for, or an interpreter with the other build"
            )
        before = _resident_bytes()
        arguments = EngineArgs(
            **settings["arguments"],
            enable_prefix_caching=False,  # requests repeat in measurements; none may be answered from another's cache
            skip_tokenizer_init=True,
            disable_log_stats=False,  # without them no request carries its times
            max_logprobs=1,
            seed=0,
        )
        self.engine = LLMEngine.from_engine_args(arguments)
        self.requests = 0  # made so far; names must not repeat
        self.preemptions = 0
        self.facts = self._facts(_resident_bytes() - before)

    def score(self, rows: Sequence[list[int]]) -> list[list[float]]:
        """See Backend: the log-probabilities that vLLM gives for a prompt, and one token that nobody asked for."""
        losses: dict[str, list[float]] = {}
        names = [self._add(row, 1, prompt_logprobs=0) for row in rows]
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    ids = output.prompt_token_ids
                    losses[_own(output.request_id)] = [
                        -output.prompt_logprobs[place][ids[place]].logprob for place in range(1, len(ids))
                    ]
        return [losses[name] for name in names]

    def run(
        self, prompts: Sequence[list[int]], new_tokens: Sequence[int], arrivals: Sequence[float]
    ) -> Iterator[list[Event]]:
        """See Backend."""
        self.preemptions = 0
        waiting = sorted(range(len(prompts)), key=lambda row: arrivals[row])[::-1]
        started = time.time()  # vLLM counts from arrivals on this clock
        running: dict[str, int] = {}
        had = [0] * len(prompts)
        try:
            while waiting or running:
                while waiting and started + arrivals[waiting[-1]] <= time.time():
                    row = waiting.pop()
                    arrival = started + arrivals[row]
                    running[self._add(prompts[row], new_tokens[row], arrival=arrival)] = row
                if not running:
                    time.sleep(max(0.0, started + arrivals[waiting[-1]] - time.time()))
                    continue
                events: list[Event] = []
                for output in self.engine.step():
                    name = _own(output.request_id)
                    row, metrics = running[name], output.metrics
                    seconds = metrics.first_token_latency + metrics.last_token_ts - metrics.first_token_ts
                    for token in output.outputs[0].token_ids[had[row] :]:
                        had[row] += 1
                        events.append((row, token, seconds))
                    if output.finished:
                        self.preemptions += metrics.num_preemptions if hasattr(metrics, "num_preemptions") else 0
                        del running[name]
                yield events
        finally:
            if running:
                self.engine.abort_request(list(running))
                while self.engine.has_unfinished_requests():
                    self.engine.step()

    def _add(self, prompt: list[int], new_tokens: int, arrival: float | None = None, **parameters: Any) -> str:
        from vllm import SamplingParams

        name = str(self.requests)
        self.requests += 1
        parameters = SamplingParams(
            temperature=0, max_tokens=new_tokens, min_tokens=0, ignore_eos=True, detokenize=False, **parameters
        )
        self.engine.add_request(name, {"prompt_token_ids": prompt}, parameters, arrival_time=arrival)
        return name

    def _facts(self, grown: int) -> dict[str, Any]:
        """What the harness puts into a row. The model is out of reach where tensor parallelism put it elsewhere."""
        import vllm

        config = self.engine.vllm_config
        runner = _model_runner(self.engine)
        cached = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _cache_tensors(runner)}
        blocks, size = config.cache_config.num_gpu_blocks, config.cache_config.block_size
        return {
            "version": vllm.__version__,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "context_tokens": config.model_config.max_model_len,
            "kernels": _kernels(runner),
            "attention": _attention(runner),
            "reserved_cache_bytes": sum(cached.values()) or None,
            "reserved_cache_tokens": blocks * size,
            # what vLLM itself counts on a GPU; elsewhere how far this process has grown
            "model_memory_bytes": getattr(runner, "model_memory_usage", None),
            "grown_bytes": grown,
        }


def _own(name: str) -> str:
    """The name that a request was given; vLLM may put a suffix behind it."""
    return name.partition("-")[0]


def _model_runner(engine: Any) -> Any:
    worker = getattr(engine.model_executor, "driver_worker", None)
    return getattr(getattr(worker, "worker", worker), "model_runner", None)


def _cache_tensors(runner: Any) -> Iterator[Any]:
    """Every tensor of the key-value cache; some backends keep one a layer, some a pair."""
    for layer in getattr(runner, "kv_caches", None) or []:
        yield from layer if isinstance(layer, list | tuple) else [layer]


def _kernels(runner: Any) -> str:
    """What multiplies the linears, the most common first: "CPUWNA16LinearKernel", or "dense matmul"."""
    if runner is None:
        return "kernel chosen by vLLM in its workers"
    found: Counter[str] = Counter()
    for module in runner.get_model().modules():
        method = getattr(module, "quant_method", None)
        if method is None or "Linear" not in type(method).__name__:
            continue
        scheme = getattr(module, "scheme", None)
        parts = (getattr(scheme or method, name, None) for name in ("kernel", "fp8_linear", "quant_method"))
        kernel = next((part for part in parts if part is not None), scheme or method)
        found[type(kernel).__name__] += 1
    names = [name for name, _ in found.most_common()]
    return " and ".join("dense matmul" if name == "UnquantizedLinearMethod" else name for name in names)


def _attention(runner: Any) -> str:
    if runner is None:
        return ""
    backends = (getattr(module, "attn_backend", None) for module in runner.get_model().modules())
    return next((backend.get_name() for backend in backends if backend is not None), "")


def _require_fitting_media_libraries() -> None:
    """transformers imports them wherever they lie, and a build for another torch ends the start with a riddle."""
    for name in LEAVES_OUT:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            __import__(name)
        except Exception as error:  # whatever a library that does not fit raises
            raise RuntimeError(
                f"{name} does not fit the torch beside it ({str(error).splitlines()[0]}); text models do without: "
                f"{sys.executable} -m pip uninstall -y {' '.join(LEAVES_OUT)}"
            ) from error


def _resident_bytes() -> int:
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return 0


if __name__ == "__main__":
    serve(VLLM)
