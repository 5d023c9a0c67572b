"""The schema of a run folder: the contract between the engine, the report and the export.

This package does not import torch.

RUN/
  recipe.json                 {"run": digest of recipe and data, "recipe": ..., "plan": [`PlannedStage`, ...],
                              "environment": ...}
  heartbeat.json              `Heartbeat`: whether a process is working on the run, or how the last process ended
  log.jsonl                   one row per log interval, with flat keys
  tracking-id                 the run's id at Weights & Biases and Trackio, if they are used
  stages/00-denoise/ 01-halve-0128/ ...
      model.safetensors
      manifest.json           `Manifest`; its presence marks the stage as complete
      metrics.json            `Metrics`
      samples/steps-0008.npz  arr_0: the first samples with 8 steps, from the same seeds in every stage; also as .png;
                              steps-0032-heun.npz if the sampler is not the model's own
      checkpoint-00000400/    state of an unfinished stage; manifest.json contains the sha256 of each file
      non-finite.json         statistics of the batch, if the stage diverged
  report/index.html           and nearest.npz, the training samples nearest to some generated samples
  evaluation/evaluation.json  `EvaluationResult`, and the cells that it was computed from (`evaluation.py`)

recipe.json, manifests, metrics.json, evaluation.json, cell.json and figures are sealed (`files.write_sealed`), so
readers verify their content. Manifests and metrics.json record their stage and run, which readers compare with the
containing folder. heartbeat.json and log.jsonl only affect the display of progress.
"""

from halfstep.runs.best import Best, teacher_best, too_few
from halfstep.runs.evaluation import EvaluationResult
from halfstep.runs.folder import RunFolder, StageFolder
from halfstep.runs.heartbeat import Heartbeat
from halfstep.runs.log import RunLog, finite, is_finite, read_log
from halfstep.runs.schema import Manifest, Metrics, Outcome, Pipeline, PlannedStage, Result
from halfstep.runs.status import RunStatus, StageStatus, read_status
