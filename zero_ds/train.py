"""Entry point of `deepspeed --module zero_ds.train RECIPE [key=value ...]`: one rank of a training run."""

from zero_ds.cli.main import train_module

if __name__ != "__main__":
    raise ImportError("zero_ds.train is run, not imported; the function is zero_ds.train after `import zero_ds`.")

train_module()
