"""The run folder as a schema: the contract between engine, report and export. No torch here.

RUN/
  recipe.json                 {"run": digest of recipe and data, "recipe": ..., "plan": [`PlannedStage`, ...],
                              "environment": ...}
  heartbeat.json              `Heartbeat`: whether a process is at work on the run, or how the last one ended
  log.jsonl                   one row a log interval, flat keys (`LogRow`)
  tracking-id                 the run's name at Weights & Biases and Trackio, where they are told of it
  stages/00-denoise/ 01-halve-0128/ ...
      model.safetensors
      manifest.json           `Manifest`; its presence says that the stage is complete
      metrics.json            `Metrics`
      samples/steps-0008.npz  arr_0: the first samples at 8 steps, the same seeds in every stage; .png beside it;
                              steps-0032-heun.npz by another sampler than the model's own
      checkpoint-00000400/    state of an unfinished stage; manifest.json with a sha256 of each file
      non-finite.json         of a stage that diverged: what is known of the batch
  report/index.html           and nearest.npz, the training samples nearest to some samples
  evaluation/evaluation.json  `EvaluationResult`, and the cells that it is made of (`evaluation.py`)

recipe.json, manifests, metrics.json, evaluation.json, cell.json and figures are sealed (`files.write_sealed`): what is
verified includes what says how to read it. Manifests and metrics.json name their stage and run, which every reader
compares with the folder in which they lie. heartbeat.json and log.jsonl decide nothing but what is shown.
"""

from halfstep.runs.best import Best, teacher_best
from halfstep.runs.evaluation import EvaluationResult
from halfstep.runs.heartbeat import Heartbeat
from halfstep.runs.log import RunLog, finite, is_finite, read_log
from halfstep.runs.schema import Manifest, Metrics, Outcome, Pipeline, PlannedStage, Result, RunFolder, StageFolder
from halfstep.runs.status import RunStatus, StageStatus, read_status
