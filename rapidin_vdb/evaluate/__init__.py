"""The paper's experiments, beside other methods, on models and data of one's own."""

from rapidin_vdb.evaluate.backdoor import run_backdoor
from rapidin_vdb.evaluate.error_tracing import run_error_tracing
from rapidin_vdb.evaluate.report import write_report

__all__ = ["run_backdoor", "run_error_tracing", "write_report"]
