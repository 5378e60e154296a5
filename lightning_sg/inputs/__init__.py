"""Synthetic inputs: activations predicted from the batch, so that no stage waits for the stages before it."""

from lightning_sg.inputs.base import Activations, InputPredictor
from lightning_sg.inputs.boundaries import InputBoundaries
from lightning_sg.inputs.mlp import MLPInputPredictor
from lightning_sg.inputs.settings import SyntheticInputs
from lightning_sg.inputs.trainer import InputTrainer

__all__ = [
    "Activations",
    "InputBoundaries",
    "InputPredictor",
    "InputTrainer",
    "MLPInputPredictor",
    "SyntheticInputs",
]
