"""evaluation/evaluation.json: the results of `halfstep evaluate`, one table per protocol.

Results of different protocols (extractor, reference, counts, seeds) are not comparable, so they never share a table.

It is rewritten after every cell, so an interrupted evaluation shows what exists. evaluation.md, .csv and .svg present
the same results to readers; cells/ and figures/ next to it are the store (`measure/store.py`).
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

EVALUATION_FORMAT = 1
"""Version of evaluation.json; readers reject any other."""


class Record(BaseModel):
    """Data of a JSON file; unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(Record):
    """The value of one metric over all sets of seeds."""

    mean: float
    spread: float | None = None
    """Standard deviation over the sets of seeds (n - 1); None for one set."""
    values: list[float]
    """One value per set of seeds measured so far, in the order of `Protocol.seeds`."""


class MetricInfo(Record):
    """How a metric is presented: the heading of its column and its meaning in one sentence."""

    label: str
    better: Literal["lower", "higher"]
    meaning: str


class Series(Record):
    """One line of the curve: models with a sampler, at several numbers of steps."""

    name: str
    """`student`, `teacher-ddim`, `teacher-ancestral`, `teacher-heun`, ...; `samples` for a folder of images."""
    label: str
    role: Literal["student", "teacher", "other"]
    """`teacher`: the undistilled model with the given sampler; `other`: a single model from elsewhere, or a folder."""
    sampler: str | None = None
    """None for a folder of images."""
    gamma: float | None = None
    """Gamma of ancestral sampling: 0 is the lower bound of the variance, 1 the upper."""


class Protocol(Record):
    """How the metrics of one table were measured."""

    kind: Literal["sets", "same_noise"]
    """`sets`: samples against real data, in features. `same_noise`: each against the teacher's from the same noise."""
    extractor: str
    """`pixels`, `classifier-1-<data>`, `resnet20-cifar10-<weights>`, ...: equal names mean comparable features."""
    extractor_facts: dict[str, Any]
    """Dimension of the features, sha256 of the weights and accuracy, if known."""
    resize: str
    """How samples are resized for the extractor."""
    reference: str
    """Real data, or the teacher with its sampler and steps."""
    reference_split: str | None
    reference_fingerprint: str
    """sha256 of the reference's content."""
    num_reference: int
    reference_rows: str
    """`all`, or how they were chosen."""
    num_samples: int
    """Samples in a set of seeds."""
    seeds: list[str]
    """The sets of seeds, each as `first-last`."""
    images: str
    """`rounded to uint8` or `as they are`."""
    guidance_scale: float | None = None
    """None uses each model's own scale."""
    precision: str = "float32"
    """Precision of the networks while sampling."""


class Row(Record):
    """One series at one number of steps, in one protocol."""

    series: str
    """`Series.name`."""
    num_steps: int | None
    """None for a folder of images."""
    num_evals: int | None
    """Network calls per sample."""
    stage: str | None
    """Name of the stage's folder; None outside a run."""
    gamma: float | None = None
    """Gamma of ancestral sampling in this row if it was tuned; `Series.gamma` is None then."""
    seconds_per_1000: float | None
    """Wall time for 1,000 samples, averaged over the sets of seeds."""
    figures: dict[str, Figure]
    """Results by metric name. A metric that could not be measured is absent, and a notice says why."""


class Halves(Record):
    """One half of the real data against the other. Smaller distances than these mean nothing."""

    num_each: int
    """Samples in each of two disjoint halves: fewer than in a row, which biases its Frechet distance further up."""
    figures: dict[str, float]


class EvaluationTable(Record):
    """All rows of one protocol."""

    protocol: Protocol
    rows: list[Row]
    """Students first, then the teacher's series; each from most steps to fewest."""
    halves: Halves | None = None
    """None for `same_noise`, or if the reference is too small."""


class EvaluationResult(Record):
    """evaluation.json."""

    format: int = EVALUATION_FORMAT
    run: str | None = None
    """`run` of the recipe.json of the run that was measured; None for any other subject."""
    subject: str
    """As the user typed it."""
    kind: Literal["run", "stage", "pipeline", "images"]
    complete: bool
    """Whether every requested cell was measured; False while it runs, or if it was interrupted."""
    metrics: dict[str, MetricInfo]
    """All metrics that a row may contain, in the order in which they are shown."""
    series: list[Series]
    tables: list[EvaluationTable]
    """Tables of `sets` first, in the order of the requested extractors, then `same_noise`."""
    notices: list[str]
    """Notices, one sentence each: skipped damaged stages, small-sample bias, ..."""
    environment: dict[str, Any]
    """Versions, commit, machine, command line."""
    seconds: float
    """Wall time of sampling and measuring, over all calls."""
