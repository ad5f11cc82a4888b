"""What a run will need and how long it will take, from config files and meta tensors: no weights, no GPU.

architecture: the run's model on meta tensors; activations: what its passes keep; memory: bytes of a rank by cause under
a DeepSpeed config; speed: seconds of a step; data: what is assumed of data sets; recipe: all of this for one recipe;
route: the stages of the surrogate's route beside the baseline's, as in the paper's Table 9; tables: as text and JSON.
"""
