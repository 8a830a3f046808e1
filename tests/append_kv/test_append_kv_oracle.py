"""Every case of inputs.py on every backend: the caches hold what the reference writes, to the last bit."""

from onepass.ops.append_kv.inputs import CASES  # noqa: F401
from onepass.testing.conformance import test_within_budget  # noqa: F401
