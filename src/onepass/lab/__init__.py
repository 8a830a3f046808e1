"""Attention in four steps, from the formula to flash attention: to read, to run, to measure. README.md explains them."""

from onepass.lab.steps import STEPS, attention_step, attention_step_and_memory

__all__ = ["STEPS", "attention_step", "attention_step_and_memory"]
