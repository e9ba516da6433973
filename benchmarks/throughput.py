"""How many rows a second go from Parquet to updated weights, beside what one would use instead?

In:  nothing; a click log with a known truth is generated in a temporary folder: 26 features of 100,000 ids each, Zipf.
Out: one table a network and batch size: rows a second, held-out AUC and log loss after all that was learned, ratios to ours.

All learn the same files: read them, turn ids into table rows, shuffle, batches, steps, updated weights. Ours verifies checksums
and hashes ids, which the others take as they are. Embeddings of 16, a network of 400-400, a wide weight an id. Ours in fp32 and
in bf16; the same network over `nn.Embedding` in a plain loop, with sparse gradients (Adagrad) in both arithmetics and with
dense ones (Adam); DeepCTR-Torch and FuxiCTR, whose DCNv2 has full matrices where ours has a rank of 32, and no linear part in
FuxiCTR's DCNv2 and DLRM. Last, ours on Vowpal Wabbit's own kind of model, a weight an id with per-coordinate steps
(`model.kind = "linear"`). That reads the same rows from a text file, written before the clock starts, with its own parser and
driver.

    pip install --no-deps -r requirements/peers.txt
    python benchmarks/throughput.py                      # about 12 minutes on two cores
    python benchmarks/throughput.py --quick              # DeepFM at 4096, and the linear model; about 2 minutes
    python benchmarks/throughput.py --models dlrm --batches 512,32768 --compile

Each contender learns twice before the clock starts; the seconds of the first time, in which --compile compiles, are printed.
Then it learns so many files a repetition as it can in about --seconds, as long as there are new ones for all of them, and all
take turns. Figures are medians of --repetitions. A peer that is not installed is named as absent. On a machine with a GPU
everything runs there, and the device is waited for before the clock is read.
"""

import argparse
import gc
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from peers.ctr_libraries import DeepCtr, FuxiCtr
from peers.torch_loops import PlainLoop, read_columns
from rich.console import Console
from rich.table import Table
from sklearn.metrics import log_loss, roc_auc_score

from data_schemas.dataset import Categorical, DatasetSpec, LabelColumn, TimeColumn
from data_schemas.examples import F32
from models.ctr import Architecture
from models.memory import Memory
from pipeline.config import load_config
from pipeline.data.encode import EncodedWindow, encode
from pipeline.data.lake import ClickLog, RowRange
from pipeline.data.loader import columns_to_read, to_examples
from pipeline.evaluation.score import probabilities
from pipeline.model_state import architecture, default_device, restore_or_create
from pipeline.training.batch_size import FixedBatch
from pipeline.training.learn import learn
from pipeline.training.room import keep_freed_memory

FEATURES, IDS, DIM, HIDDEN = 26, 100_000, 16, (400, 400)
ZIPF_EXPONENT = 1.05
FILE_ROWS, NUM_FILES = 8_192, 96
"""The last file is held out; nobody learns a file twice: from the second time on, networks of this size learn ids by heart."""
WARM_UP_LAPS = 2
FIRST_HOUR = 20_000 * 24
MODELS = ("deepfm", "dcnv2", "dlrm")
BATCHES = (512, 4096, 32_768)
LINEAR = "ours, linear"
OURS_BF16, OURS_FP32, LOOP, LOOP_BF16 = "ours, bf16", "ours, fp32", "loop, sparse, fp32", "loop, sparse, bf16"
DENSE_LOOP, DEEPCTR, FUXICTR, VW = "loop, dense Adam, fp32", "DeepCTR-Torch", "FuxiCTR", "Vowpal Wabbit"
WANTED = ((OURS_BF16, LOOP, 2.0), (OURS_FP32, LOOP, 1.4), (OURS_BF16, DEEPCTR, 4.0), (OURS_BF16, FUXICTR, 4.0))
"""The last two at equal batch, in what `training.precision = "auto"` chooses where bf16 is faster; fp32 stands beside it."""
WANTED_OF_VW = 1.0


class Contender(Protocol):
    """What takes turns."""

    def learn(self, files: Sequence[Path]) -> None:
        """From Parquet to updated weights."""

    def predict(self, file: Path) -> F32:
        """Probabilities of its rows."""


def main() -> None:
    options = _command_line()
    keep_freed_memory()  # as an update does; the others have it too
    if options.threads:
        torch.set_num_threads(options.threads)
    device = default_device()
    print(f"{torch.get_num_threads()} threads for tensors, device {device}, torch {torch.__version__}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, spec, files = write_click_log(folder, DIM)
        for kind in options.models:
            for batch in options.batches:
                made = _contenders(kind, batch, log, spec, device, compiled=options.compile)
                _show(f"{kind}, batches of {batch:,}", _measured(made, files, batch, options, device), WANTED)
        if options.vw:
            _against_vowpal_wabbit(folder, options, device)


def _command_line() -> argparse.Namespace:
    def names(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--models", type=names, default=MODELS, help="of " + ",".join(MODELS))
    cli.add_argument(
        "--batches", type=lambda text: tuple(map(int, text.split(","))), default=BATCHES, help="rows, 512 to 32768"
    )
    cli.add_argument("--repetitions", type=int, default=5)
    cli.add_argument("--seconds", type=float, default=1.0, help="of a repetition of one contender, about")
    cli.add_argument("--threads", type=int, default=0, help="for tensors; 0 for torch's own choice")
    cli.add_argument("--compile", action="store_true", help="ours through torch.compile")
    cli.add_argument("--no-vw", dest="vw", action="store_false", help="leave Vowpal Wabbit out")
    cli.add_argument("--quick", action="store_true", help="DeepFM at batches of 4096, and the linear model")
    options = cli.parse_args()
    if options.quick:
        options.models, options.batches = ("deepfm",), (4096,)
    return options


def _spec(dim: int) -> DatasetSpec:
    columns = [Categorical(name=f"f{n:02}", type="integer", capacity=IDS, embedding_dim=dim) for n in range(FEATURES)]
    return DatasetSpec(
        name="throughput",
        time=TimeColumn(column="at"),
        label=LabelColumn(column="label"),
        user="f00",
        item="f01",
        event_key=("*",),
        categorical=tuple(columns),
    )


def write_click_log(folder: Path, dim: int) -> tuple[ClickLog, DatasetSpec, list[Path]]:
    """A click log of `NUM_FILES` hours, a file each; the truth is a weight an id, and a pair of features that interact."""
    spec, rng = _spec(dim), np.random.default_rng(0)
    log = ClickLog.open_or_create(folder / f"log{dim}", spec)
    weight_FI = rng.normal(0, 0.35, (FEATURES, IDS))
    cumulative = np.cumsum(np.arange(1, IDS + 1) ** -ZIPF_EXPONENT)
    files = log.write()
    for number in range(NUM_FILES):
        ids_FR = np.searchsorted(cumulative, rng.random((FEATURES, FILE_ROWS)) * cumulative[-1]).clip(max=IDS - 1)
        logit_R = np.take_along_axis(weight_FI, ids_FR, axis=1).sum(axis=0) - 1.5
        logit_R += np.where((ids_FR[0] + ids_FR[1]) % 2, 0.7, -0.7)
        micros_R = (FIRST_HOUR + number) * 3_600_000_000 + np.arange(FILE_ROWS)
        columns = {feature.name: pa.array(ids_R) for feature, ids_R in zip(spec.categorical, ids_FR, strict=True)}
        columns |= {
            "event_time": pa.array(micros_R).cast(pa.timestamp("us", tz="UTC")),
            "label": pa.array((rng.random(FILE_ROWS) < 1 / (1 + np.exp(-logit_R))).astype(np.int8)),
            "event_key": pa.array(np.arange(FILE_ROWS) + number * FILE_ROWS),
        }
        files.add(FIRST_HOUR + number, pa.table(columns, schema=log.schema))
    log.append(files.close(), "generated", rows_read=NUM_FILES * FILE_ROWS)
    return log, spec, sorted((log.root / file.path for file in log.files()), key=lambda path: str(path))


class Ours:
    """As an update reads, encodes and learns; no evaluation, checkpoint or publishing, which the others have none of."""

    def __init__(
        self, log: ClickLog, spec: DatasetSpec, kind: str, batch: int, *, hidden: Sequence[int], settings: Sequence[str]
    ) -> None:
        """Args other than the log: the network, the batch, and more settings."""
        fixed = [
            f"model.kind={kind}",
            f"model.hidden={list(hidden)}",
            f"training.batch_size={batch}",
            "training.weight_ema=0.0",
        ]
        fixed += ["training.sparse_step_rows=0", f"model.interaction_dim={spec.categorical[0].embedding_dim or DIM}"]
        with tempfile.TemporaryDirectory() as empty:
            config = load_config(None, [f"state_dir={empty}", *fixed, *settings])
            self.learner = restore_or_create(config, spec).learner
        self._log, self.spec, self._passes = log, spec, 0
        self._files = {log.root / file.path: file for file in log.files()}
        self._policy = FixedBatch(batch_size=batch, learning_rate=config.training.dense_learning_rate)
        self.title = f"micro-batches of {self.learner.micro_batch_size:,} in {self.learner.precision}"
        self.architecture: Architecture = architecture(config.model)

    def learn(self, files: Sequence[Path]) -> None:
        """One pass, in an order of its own."""
        self._passes += 1
        learn(self.learner, self._window(files), seed=[self._passes], policy=self._policy)

    def predict(self, file: Path) -> F32:
        """As an evaluation does."""
        weights = self.learner.dense_weights(averaged=False)
        return probabilities(self.learner.model, weights, self._window([file]), device=self.learner.device)

    def _window(self, files: Sequence[Path]) -> EncodedWindow:
        chosen = [self._files[path] for path in files]
        ranges = [RowRange.whole(file) for file in chosen]
        examples = to_examples(self._log.read(ranges, columns_to_read(self.spec)), self.spec)
        return encode(examples, self.spec, Memory(self.spec), None, hour=0)


Makers = dict[str, Callable[[], Contender]]


def _contenders(kind: str, batch: int, log: ClickLog, spec: DatasetSpec, device: torch.device, *, compiled: bool) -> Makers:
    fixed = [f"training.compile_dense_network={str(compiled).lower()}", f"training.threads={torch.get_num_threads()}"]

    def ours(precision: str) -> Ours:
        return Ours(log, spec, kind, batch, hidden=HIDDEN, settings=[f"training.precision={precision}", *fixed])

    shape = ours("fp32").architecture

    def loop(*, sparse: bool, bf16: bool) -> Contender:
        return PlainLoop(spec, shape, batch_size=batch, sparse=sparse, bf16=bf16, device=device)

    makers: Makers = {
        OURS_BF16: lambda: ours("bf16"),
        OURS_FP32: lambda: ours("fp32"),
        LOOP: lambda: loop(sparse=True, bf16=False),
        LOOP_BF16: lambda: loop(sparse=True, bf16=True),
        DENSE_LOOP: lambda: loop(sparse=False, bf16=False),
    }
    for name, package, make in ((DEEPCTR, "deepctr_torch", DeepCtr), (FUXICTR, "fuxictr", FuxiCtr)):
        if importlib.util.find_spec(package) is None:
            print(f"{name} is absent: pip install --no-deps -r requirements/peers.txt", file=sys.stderr)
            continue
        makers[name] = lambda make=make: make(spec, shape, batch_size=batch, device=device)  # type: ignore[misc]
    return makers


@dataclass(kw_only=True)
class Laps:
    """What one contender did."""

    contender: Contender
    files_a_lap: int = 1
    warm_up_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    rows: int = 0
    """Learned altogether."""
    auc: float = 0.0
    log_loss: float = 0.0

    @property
    def rows_per_second(self) -> float:
        """Median over repetitions."""
        return self.files_a_lap * FILE_ROWS / statistics.median(self.seconds)


def _measured(
    makers: Makers, files: Sequence[Path], batch: int, options: argparse.Namespace, device: torch.device
) -> dict[str, Laps]:
    """All contenders in turns."""
    laps: dict[str, Laps] = {}
    least = -(-batch // FILE_ROWS)
    most_times = ((NUM_FILES - 1) // least - WARM_UP_LAPS) // options.repetitions
    if most_times < 1:
        raise SystemExit(
            f"{WARM_UP_LAPS + options.repetitions} laps of {least} files or more, for batches of {batch:,}, need more than "
            f"{NUM_FILES - 1}; use fewer --repetitions or smaller --batches"
        )
    for name, make in makers.items():
        try:
            laps[name] = Laps(contender=make(), files_a_lap=least)
        except ImportError as error:
            print(f"{name} is absent: {error}", file=sys.stderr)
            continue
        laps[name].warm_up_seconds, *_, seconds = [_lap(laps[name], files, device) for _ in range(WARM_UP_LAPS)]
        laps[name].files_a_lap = least * min(max(int(options.seconds / seconds), 1), most_times)
    for _ in range(options.repetitions):
        for lap in laps.values():
            lap.seconds.append(_lap(lap, files, device))
    _, labels_R = read_columns(files[-1:], ["f00"])
    for lap in laps.values():
        predicted_R = lap.contender.predict(files[-1])
        lap.auc = float(roc_auc_score(labels_R, predicted_R))
        lap.log_loss = float(log_loss(labels_R, predicted_R.astype(np.float64)))
    for name in [name for name in laps if not isinstance(laps[name].contender, Ours)]:
        laps[name].contender = None  # type: ignore[assignment]
    gc.collect()
    return laps


def _lap(lap: Laps, files: Sequence[Path], device: torch.device) -> float:
    """Seconds of the next files."""
    start = lap.rows // FILE_ROWS
    assert start + lap.files_a_lap < len(files)
    chosen = files[start : start + lap.files_a_lap]
    if isinstance(lap.contender, VowpalWabbitText):
        lap.contender.prepare(chosen)
    wait_for(device)
    started = time.perf_counter()
    lap.contender.learn(chosen)
    wait_for(device)
    lap.rows += lap.files_a_lap * FILE_ROWS
    return time.perf_counter() - started


def wait_for(device: torch.device) -> None:
    """Until it has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _show(title: str, laps: dict[str, Laps], wanted: Sequence[tuple[str, str, float]]) -> None:
    table = Table(title=title)
    first = next(iter(laps))
    for name in ("", "rows/s", f"x {first}", "AUC", "log loss", "after rows", "first lap, s"):
        table.add_column(name, justify="right" if name else "left")
    for name, lap in laps.items():
        ratio = lap.rows_per_second / laps[first].rows_per_second
        scores = (f"{lap.auc:.4f}", f"{lap.log_loss:.4f}", f"{lap.rows:,}", f"{lap.warm_up_seconds:.1f}")
        table.add_row(name, f"{lap.rows_per_second:,.0f}", f"{ratio:.2f}", *scores)
    Console(width=120).print(table)
    for lap in laps.values():
        if isinstance(lap.contender, Ours):
            print(f"ours: {lap.contender.title}")
    for own, other, factor in wanted:
        if own in laps and other in laps:
            ratio = laps[own].rows_per_second / laps[other].rows_per_second
            print(f"{own}: {ratio:.2f} of {other}, wanted {factor}: {'reached' if ratio >= factor else 'missed'}", flush=True)


def _against_vowpal_wabbit(folder: Path, options: argparse.Namespace, device: torch.device) -> None:
    if importlib.util.find_spec("vowpalwabbit") is None:
        print(f"{VW} is absent: pip install --no-deps -r requirements/peers.txt", file=sys.stderr)
        return
    log, spec, files = write_click_log(folder, 0)
    makers: Makers = {
        LINEAR: lambda: Ours(log, spec, "linear", 4096, hidden=HIDDEN, settings=[]),
        VW: lambda: VowpalWabbitText(folder, files, [feature.name for feature in spec.categorical]),
    }
    wanted = ((LINEAR, VW, WANTED_OF_VW),)
    _show(f"{VW}'s kind of model, ours in batches of 4,096", _measured(makers, files, 4096, options, device), wanted)


class VowpalWabbitText:
    """Logistic, adaptive; a text file a Parquet file, read and learned by its own parser and driver, a thread each."""

    def __init__(self, folder: Path, files: Sequence[Path], names: Sequence[str]) -> None:
        """Writes the text of all files."""
        self._weights = folder / "weights.vw"
        self._texts: dict[Path, list[str]] = {}
        for file in files:
            ids_RF, labels_R = read_columns([file], names)
            rows = zip(labels_R.tolist(), ids_RF.tolist(), strict=True)
            self._texts[file] = [f"{1 if label else -1} " + _vw_text(ids) + "\n" for label, ids in rows]
        self._arguments = "--loss_function logistic --link logistic -b 22 --quiet"
        self._text = folder / "lap.txt"
        self._workspace: Any = None

    def prepare(self, files: Sequence[Path]) -> None:
        """The text of the next lap, and the workspace that goes on from the weights of the last: not timed."""
        import pylibvw

        if self._workspace is not None:
            self._workspace.save(str(self._weights))
        with self._text.open("w") as text:
            text.writelines(line for file in files for line in self._texts[file])
        known = ["-i", str(self._weights)] if self._workspace is not None else []
        self._workspace = pylibvw.vw([*self._arguments.split(), "--no_stdin", "-d", str(self._text), *known])

    def learn(self, files: Sequence[Path]) -> None:
        """The text of a lap."""
        self._workspace.run_parser()

    def predict(self, file: Path) -> F32:
        """Line by line, from the weights that it saved."""
        from vowpalwabbit import Workspace

        self._workspace.save(str(self._weights))
        workspace = Workspace(f"-i {self._weights} -t --quiet")
        return np.array([workspace.predict(line.partition(" ")[2].strip()) for line in self._texts[file]], np.float32)


def _vw_text(ids: Sequence[int]) -> str:
    return "| " + " ".join(f"{place}_{id_}" for place, id_ in enumerate(ids))


if __name__ == "__main__":
    main()
