"""The activations on the device, in fp32, as reference.py defines them."""

import triton
import triton.language as tl


@triton.jit
def value_and_slope(x, ACTIVATION: tl.constexpr):
    """f(x) and f'(x)."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        bounded = tl.minimum(tl.maximum(x, -20.0), 20.0)  # x * x must not overflow where share * (1 - share) is 0
        slope = share + x * share * (1.0 - share) * (1.5957691216057308 * (1.0 + 0.134145 * bounded * bounded))
    else:
        share = tl.sigmoid(x)
        slope = share * (1.0 + x * (1.0 - share))
    return x * share, slope


@triton.jit
def tile(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Rows, columns and mask of this program's tile; programs beside each other do columns of the same rows."""
    column_blocks = tl.cdiv(columns, BLOCK_COLS)
    program = tl.program_id(0)
    row = (program // column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = (program % column_blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    return row, col, (row < rows) & (col < columns)
