"""The results of `halfstep evaluate` in evaluation/evaluation.json, with one table per protocol.

Results from different protocols (extractor, reference, counts, seeds) are not comparable, so they never share a table.

The file is rewritten after every cell, so an interrupted evaluation shows all results so far. evaluation.md, .csv and
.svg present the same results. The folders cells/ and figures/ next to it are the store (`measure/store.py`).
"""

from typing import Any, Literal

from halfstep.runs.record import Record

EVALUATION_FORMAT = 1
"""The version of evaluation.json. Readers reject any other version."""


class Figure(Record):
    """The value of one metric over all sets of seeds."""

    mean: float
    spread: float | None = None
    """The standard deviation over the sets of seeds (with n - 1), or None if there is only one set."""
    values: list[float]
    """One value per set of seeds measured so far, in the order of `Protocol.seeds`."""


class MetricInfo(Record):
    """How a metric is presented: the heading of its column and its meaning in one sentence."""

    label: str
    better: Literal["lower", "higher"]
    meaning: str


class Series(Record):
    """One line of the plot: models with the same sampler and different numbers of steps."""

    name: str
    """`student`, `teacher-ddim`, `teacher-ancestral`, `teacher-heun`, ...; `samples` for a folder of images."""
    label: str
    role: Literal["student", "teacher", "other"]
    """`teacher`: the undistilled model with the given sampler; `other`: any other model, or a folder."""
    sampler: str | None = None
    """The name of the sampler, or None for a folder of images."""
    gamma: float | None = None
    """The gamma of ancestral sampling: 0 selects the lower bound of the variance, and 1 the upper bound."""


class Protocol(Record):
    """How the metrics of one table were measured."""

    kind: Literal["sets", "same_noise"]
    """`sets` compares the features of samples with those of real data. `same_noise` compares each sample with the
    teacher's sample from the same noise."""
    extractor: str
    """`pixels`, `classifier-1-<data>`, `resnet20-cifar10-<weights>`, ... Features from extractors with the same name
    are comparable."""
    extractor_facts: dict[str, Any]
    """The feature dimension and, if known, the sha256 of the extractor's weights and the extractor's accuracy."""
    resize: str
    """How samples are resized for the extractor."""
    reference: str
    """The real data, or the teacher with its sampler and number of steps."""
    reference_split: str | None
    reference_fingerprint: str
    """The sha256 of the reference's content."""
    num_reference: int
    reference_rows: str
    """`all`, or a description of how the rows were chosen."""
    num_samples: int
    """The number of samples in a set of seeds."""
    seeds: list[str]
    """The sets of seeds, each as `first-last`."""
    images: str
    """Whether images are `rounded to uint8` or compared `as they are`."""
    guidance_scale: float | None = None
    """The guidance scale, or None if each model is sampled with its own."""
    precision: str = "float32"
    """The precision of the networks during sampling."""


class Row(Record):
    """The results of one series at one number of steps, under one protocol."""

    series: str
    """The name of the series (`Series.name`)."""
    num_steps: int | None
    """The number of steps, or None for a folder of images."""
    num_evals: int | None
    """The number of network calls per sample."""
    stage: str | None
    """The name of the stage's folder, or None outside a run."""
    gamma: float | None = None
    """The gamma of ancestral sampling in this row if gamma was tuned. `Series.gamma` is None in that case."""
    seconds_per_1000: float | None
    """The wall time for 1,000 samples, averaged over the sets of seeds."""
    figures: dict[str, Figure]
    """The results, keyed by metric name. A metric that could not be measured is missing; a notice gives the reason."""


class Halves(Record):
    """The distances between two disjoint halves of the real data, as the noise floor of the metrics."""

    num_each: int
    """The number of samples in each half. If it is smaller than a row's number of samples, the Frechet distance of the
    halves is biased further upwards."""
    figures: dict[str, float]


class EvaluationTable(Record):
    """All rows of one protocol."""

    protocol: Protocol
    rows: list[Row]
    """The rows of the students, followed by the teacher's series. The rows of each series are sorted from most steps to
    fewest."""
    halves: Halves | None = None
    """The distances between halves of the real data, or None for `same_noise` or if the reference is too small."""


class EvaluationResult(Record):
    """The content of evaluation.json."""

    format: int = EVALUATION_FORMAT
    run: str | None = None
    """The `run` in the measured run's recipe.json, or None for any other subject."""
    subject: str
    """The subject of the evaluation, as the user typed it."""
    kind: Literal["run", "stage", "pipeline", "images"]
    complete: bool
    """Whether every requested cell was measured. False while the evaluation is running, or if it was interrupted."""
    metrics: dict[str, MetricInfo]
    """All metrics that a row may contain, in the order in which they are shown."""
    series: list[Series]
    tables: list[EvaluationTable]
    """The tables of `sets` in the order of the requested extractors, followed by the table of `same_noise`."""
    notices: list[str]
    """One-sentence notices, for example about skipped damaged stages or small-sample bias."""
    environment: dict[str, Any]
    """The versions, commit, machine and command line."""
    seconds: float
    """The total wall time spent on sampling and measuring, over all calls."""
