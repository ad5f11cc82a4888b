"""Estimates the memory and the time of a run from config files and meta tensors: no weights, no GPU.

`plan.plan` does everything that `zero-ds plan` prints. From the bottom up: `architecture` builds the run's
model on meta tensors, `activations` counts the bytes that its passes keep, `flops` the FLOPs of a step, `memory` the
bytes of a rank by cause under a DeepSpeed config. `cluster` describes the machines, `data` holds the assumptions about
data sets, `speed` computes the seconds of a step. `recipe` combines all of this for one run, `route` for all stages of
the surrogate's route and of the baseline's, as in the paper's Table 9. `tables` and `json_output` show the result.
"""
