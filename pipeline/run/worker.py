"""What a worker does: a plain class that `cluster.RayPool` wraps in an actor and `pool.LocalPool` calls directly.

A worker belongs to no model and no run: each call says what to read and what to do. It keeps at most one evaluation
model, because loading one costs more than measuring a few windows with it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.device import fix_arithmetic, name_of, spoils_the_process
from pipeline.errors import WeightsError
from pipeline.measure.calibration import Calibrator, sums_payload
from pipeline.measure.harness import harness
from pipeline.measure.perplexity import Evaluator, ModelKey
from pipeline.measure.tune_state import TuneState, added, to_payload
from pipeline.measure.tuner import Tuned, TuneKey, Tuner
from pipeline.model.digests import Seen, ranges_of, require_same
from pipeline.model.matrix_info import MatrixInfo
from pipeline.model.moments import Moments
from pipeline.model.parts import Part, Payload, read_matrix, to_part
from pipeline.model.plan import LayerTask
from pipeline.model.store import Store
from pipeline.run.heap import peak_rss, return_freed_blocks
from pipeline.run.host_tasks import HostTasks
from pipeline.run.made import LayerParts, errors_of, measured, row_of
from swsc_core import Encoded, encode
from swsc_core.checks import WeightError
from swsc_core.curve import reach, share_left
from swsc_core.spec import Spec, SwscSpec


class Worker(HostTasks):
    """Compresses layers, copies tensors and measures windows on one device."""

    def __init__(self, threads: int, device: str) -> None:
        """`threads` are fixed: LAPACK's last bit depends on their number. Raises ClusterError: a GPU that rounds to TF32."""
        torch.set_num_threads(threads)
        fix_arithmetic(device)
        self.kernels = torch.backends.cpu.get_cpu_capability() if device == "cpu" else name_of(device)
        self.device = device
        self._evaluator: Evaluator | None = None
        self._calibrator: Calibrator | None = None
        self._tuner: Tuner | None = None
        self._answerer: Any = None  # its module needs lm-eval, which need not be there
        self._wholes: dict[tuple[Store, MatrixInfo], torch.Tensor] = {}
        self._digests: Seen = {}  # of what was read for the matrices at hand

    def compress(
        self, source: Store, task: LayerTask, form: str, seed: int, storage_dtype: str | None, moments: Moments | None
    ) -> tuple[dict[str, Any], Payload]:
        """Compress the matrices of one layer; returns measurements and the payload of the layer's file.

        `moments` are needed where a spec asks for the metric of the activations.

        Raises:
            WeightsError: a weight holds NaN or Inf.
        """
        made, rows = LayerParts(form), []
        for info, specs in task.items:
            started = time.perf_counter()
            weight = self._read(source, info)
            read_seconds = time.perf_counter() - started
            encoded, row = self._encode(weight, source, info, specs, seed, storage_dtype, read_seconds, moments)
            made.add(info, encoded)
            rows.append(row)
        return measured(rows, self.kernels), Payload(self._finished(made, source, task), tuple(rows))

    def compress_units(
        self, source: Store, info: MatrixInfo, units: Sequence[tuple[tuple[Spec, ...], int, str | None, Moments | None]]
    ) -> tuple[Any, ...]:
        """Compress one tensor, read once, in several ways: specs, seed, storage dtype and moments of each.

        Returns measurements, then one payload for each way.
        """
        started = time.perf_counter()
        weight = self._read_alone(source, info)
        read_seconds = time.perf_counter() - started
        payloads = [self._unit(weight, source, info, read_seconds, *unit) for unit in units]
        return ({"rows": [payload.rows[0] for payload in payloads], "peak_rss": peak_rss()}, *payloads)

    def _unit(
        self, weight: torch.Tensor, source: Store, info: MatrixInfo, read_seconds: float,
        specs: tuple[Spec, ...], seed: int, storage_dtype: str | None, moments: Moments | None,
    ) -> Payload:  # fmt: skip
        """One way of `compress_units`; a failure becomes a row with an `error`, so that the other ways go on; but for one of the GPU."""
        try:
            encoded, row = self._encode(weight, source, info, specs, seed, storage_dtype, read_seconds, moments)
        except Exception as error:
            if spoils_the_process(error):
                raise
            return Payload((), ({"name": info.name, "error": f"{info.name}: {error}"},))
        return Payload(tuple(to_part(part, tensor) for part, tensor in encoded.tensors.items()), (row,))

    def _read(self, source: Store, info: MatrixInfo) -> torch.Tensor:
        if info.rows is None:
            return read_matrix(source, info, self._digests).to(self.device)
        return info.rows.take(self._whole(source, info.fused)).to(self.device)

    def _read_alone(self, source: Store, info: MatrixInfo) -> torch.Tensor:
        """The same, when no other matrix of its layer is asked for next."""
        self._digests.clear()
        weight = self._read(source, info)
        self._wholes.clear()
        return weight

    def _whole(self, source: Store, fused: MatrixInfo) -> torch.Tensor:
        """A fused matrix, on the CPU; kept until its layer is done, so that it is read once.

        That of an expert is kept until another one is asked for: a layer's experts are too large to be held together.
        """
        if (source, fused) not in self._wholes:
            self._wholes = {key: whole for key, whole in self._wholes.items() if key[1].expert is None}
            self._wholes[source, fused] = read_matrix(source, fused, self._digests)
        return self._wholes[source, fused]

    def _finished(self, made: LayerParts, source: Store, task: LayerTask) -> tuple[Part, ...]:
        for fused in task.fused:
            made.add_remaining_rows(fused, partial(self._whole, source))
        self._wholes.clear()
        self._digests.clear()
        return made.parts

    def _encode(
        self, weight: torch.Tensor, source: Store, info: MatrixInfo, specs: tuple[Spec, ...], seed: int,
        storage_dtype: str | None, read_seconds: float, moments: Moments | None = None,
    ) -> tuple[Encoded, dict[str, Any]]:  # fmt: skip
        started = time.perf_counter()
        # Slabs of segments leave holes in the heap. K-Means over whole channels leaves none, and would pay a third of its time.
        if any(isinstance(spec, SwscSpec) and spec.segment_size for spec in specs):
            return_freed_blocks(info.count)
        dtype = getattr(torch, storage_dtype) if storage_dtype else None
        try:
            metric = moments.metric(info.name, self.device)[0] if moments else None
            encoded = encode(weight, specs, name=info.name, seed=seed, storage_dtype=dtype, metric=metric)
        except WeightError as error:
            raise WeightsError(f"{source.root}/{info.file}: {error}") from None
        row = row_of(info, specs, encoded, read_seconds, time.perf_counter() - started)
        row["source_sha256"] = {where: self._digests[where] for where in ranges_of(info)}
        if moments:
            row |= {"calibration_tokens": moments.tokens(info.name), "moments_sha256": moments.sha256(info.name)}
        return encoded, row

    def calibrate(
        self, key: ModelKey, layers: Sequence[Sequence[str]], windows: np.ndarray, first: int, seed: int
    ) -> tuple[Any, ...]:
        """Sums of second moments over some windows, for the matrices of some layers: one payload a layer.

        X.weighted, X.plain and X.rows are sums over tokens, float32; `fold_moments` adds those of all windows up.
        """
        calibrator = self._loaded(key)
        sums = calibrator.gather([name for names in layers for name in names], windows, first, seed)
        about = {"peak_rss": peak_rss(), "source_sha256": calibrator.read}
        return (about, *(sums_payload({name: sums[name] for name in names}) for names in layers))

    def write_text(
        self, key: ModelKey, count: int, length: int, first: int, seed: int, opening: np.ndarray
    ) -> np.ndarray:
        """Windows that the model `key` writes itself after `opening`, int64 [count, length]."""
        return self._loaded(key).write(count, length, first, seed, opening)

    def _loaded(self, key: ModelKey) -> Calibrator:
        if self._calibrator is None or self._calibrator.key != key:
            self._forget_models()
            self._calibrator = Calibrator(key, self.device)
        return self._calibrator

    def reach(self, source: Store, info: MatrixInfo, moments: Moments) -> float:
        """What a matrix would lose, in nats a token, if each weight kept nothing but its row's scale."""
        metric, unit = moments.metric(info.name, self.device)
        return unit * reach(self._read_alone(source, info), metric)

    def shares(
        self, source: Store, info: MatrixInfo, moments: Moments, specs: Sequence[dict[str, Any]], seed: int
    ) -> list[tuple[dict[str, Any], float]]:
        """What each spec leaves of a matrix' reach, measured on some of its rows."""
        weight, (metric, _) = self._read_alone(source, info), moments.metric(info.name, self.device)
        kinds = [SwscSpec(**values) for values in specs]
        return [(asdict(spec), share_left(weight, spec, metric, seed, info.name)) for spec in kinds]

    def divergence(self, key: TuneKey, step: int, windows: np.ndarray, *state: Payload) -> dict[str, float]:
        """Sum over the tokens of `windows` of how far the compressed model is from the original, in nats.

        `state`: what tuning has come to after `step` steps; none before the first.
        """
        tuner = self._tuner_of(key)
        tuner.become(step, *state)
        return {"divergence": tuner.divergence(windows), "tokens": windows.size}

    def tune_gradients(
        self, key: TuneKey, step: int, windows: np.ndarray, *state: Payload
    ) -> tuple[dict[str, float], Payload]:
        """The same, and its gradient by all stored values."""
        tuner = self._tuner_of(key)
        tuner.become(step, *state)
        divergence, gradients = tuner.gradients(windows)
        return {"divergence": divergence, "tokens": windows.size}, to_payload(gradients, "gradients")

    def tune_step(self, key: TuneKey, step: int, rate: float, *payloads: Payload) -> tuple[dict[str, float], Payload]:
        """The state after `step` steps, from the one before (none at the first) and the gradients of the step's windows."""
        state, gradients = payloads[: step > 1], payloads[step > 1 :]
        before = TuneState.of(state[0], self.device) if state else self._tuner_of(key).start()
        return {}, before.stepped(added(gradients, self.device), step, rate).payload()

    def apply_tuning(
        self, source: Store, task: LayerTask, form: str, tuned: Tuned, rows: Mapping[str, dict[str, Any]]
    ) -> tuple[dict[str, Any], Payload]:
        """A layer of the compressed model that was tuned, with tuned values; `rows` are those of its report."""
        made, changed = LayerParts(form), []
        infos = [info for info, _ in task.items]
        ready = tuned.encoded((info.name, self._read(source, info)) for info in infos)
        for info, encoded in zip(infos, ready, strict=True):
            require_same(info.name, rows[info.name].get("source_sha256", {}), self._digests)
            made.add(info, encoded)
            own = {"entry": encoded.entry, "tuned_sha256": tuned.sha256}
            changed.append({**rows[info.name], **errors_of(info, encoded), **own})
        return measured(changed, self.kernels), Payload(self._finished(made, source, task), tuple(changed))

    def _tuner_of(self, key: TuneKey) -> Tuner:
        if self._tuner is None or self._tuner.key != key:
            self._forget_models()
            self._tuner = Tuner(key, self.device)
        return self._tuner

    def _forget_models(self) -> None:
        """One model at a time: the old one goes before the new one comes."""
        self._evaluator = self._calibrator = self._tuner = self._answerer = None

    def measure(
        self, key: ModelKey, variant: str, names: Sequence[str], windows: np.ndarray, *payloads: Payload
    ) -> dict[str, Any]:
        """Mean loss of each window, int64 [windows, seqlen], under the model `key` with `payloads` swapped in.

        Returns {"losses": [...], "dtype": of the arithmetic}.
        """
        if self._evaluator is None or self._evaluator.key != key:
            self._forget_models()
            self._evaluator = Evaluator(key, self.device)
        try:
            self._evaluator.become(variant, dict(zip(names, payloads, strict=True)))
            return {"losses": self._evaluator.losses(windows), "dtype": self._evaluator.dtype}
        except BaseException:
            self._evaluator = None  # half swapped, it would contaminate whatever is measured next
            raise

    def answer(self, key: ModelKey, kind: str, batches: Sequence[Sequence[Any]], seed: int | None) -> dict[str, Any]:
        """What the model `key` answers to batches of lm-eval's requests (measure/tasks.py), batch by batch.

        Returns {"answers": [[...], ...], "dtype": of the arithmetic}.
        """
        if self._answerer is None or self._answerer.key != key:
            self._forget_models()
            self._answerer = harness().Answerer(key, self.device)
        return {"answers": self._answerer.answers(kind, batches, seed), "dtype": self._answerer.dtype}
