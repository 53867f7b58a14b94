"""What tests and benchmarks share: the table of cases, comparison with references, timing."""

from .cases import Case, Inputs, Operator
from .compare import assert_close, compare
from .operators import OPERATORS, SERVED
from .timing import Timing, interleaved

__all__ = ["OPERATORS", "SERVED", "Case", "Inputs", "Operator", "Timing", "assert_close", "compare", "interleaved"]
