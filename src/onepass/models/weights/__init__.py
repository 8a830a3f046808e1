"""Trained models as single safetensors files: weights, configuration and vocabulary together.

``shakes.safetensors`` beside this file is the model behind ``onepass generate``.
"""

from pathlib import Path

from onepass.models.weights.store import StoredModel, WeightsError, load_model, save_model

__all__ = ["SHAKES", "StoredModel", "WeightsError", "load_model", "save_model"]

SHAKES = Path(__file__).parent / "shakes.safetensors"
