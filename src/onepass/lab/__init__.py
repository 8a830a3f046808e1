"""Attention in four steps, from the formula to flash: to read, run and measure. README.md explains it."""

from onepass.lab.steps import STEPS, attention_step, attention_step_and_memory

__all__ = ["STEPS", "attention_step", "attention_step_and_memory"]
