"""The selective scan (Mamba): complete sequences, one token, and speculative decoding."""

from lowline.kernels.scan.decode import (
    ScanBlock,
    selective_scan_advance,
    selective_scan_step,
    selective_scan_verify,
)
from lowline.kernels.scan.op import selective_scan

__all__ = [
    "ScanBlock",
    "selective_scan",
    "selective_scan_advance",
    "selective_scan_step",
    "selective_scan_verify",
]
