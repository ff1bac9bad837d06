"""The paper's experiments on real records, from the base model to the tables in docs/experiments.

scripts/bench experiments --data shared/data --dir out [--profile full]

`--data` names a folder with records (`instruct/alpaca.jsonl.gz` and others), `webquestions.jsonl`, `tinystories.jsonl`
and the paper's pairs (`rapidin/howdy_test_data_100.jsonl`). Whatever is in `--dir` already is not made again. The page
goes to docs/experiments if it is of both experiments with the full profile, else to `report` in `--dir`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from common import HERE, machine

from rapidin_vdb.evaluate import run_backdoor, run_error_tracing, write_report

PAGES = HERE.parent / "docs" / "experiments"
BASE = (
    "alpaca_cleaned", "alpaca_gpt4", "alpaca_libre", "dolly", "lima", "self_instruct", "gpteacher_roleplay",
    "rasbt", "t0",
)  # fmt: skip
TRACED = ("alpaca", *BASE)
PRETRAINING = ("--window", "128", "--batch", "16", "--tokens", "7000000", "--learning-rate", "1.5e-3", "--bfloat16")


def records(data: Path, name: str) -> Path:
    """Return the file of some records, compressed or not."""
    (found,) = sorted((data / "instruct").glob(f"{name}.jsonl*"))
    return found


def place_of_page(folder: Path, *, profile: str, only: str | None) -> Path:
    """Return where the page goes: the published one is of both experiments, in full."""
    return PAGES if profile == "full" and only is None else folder / "report"


def main() -> None:
    """Run what was not run yet, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--profile", default="full", choices=("quick", "full", "gpu"))
    parser.add_argument("--only", choices=("backdoor", "error-tracing"))
    parser.add_argument("--without-influence-functions", default="", choices=("", "backdoor", "error-tracing"))
    parser.add_argument("--embedding-model")
    parser.add_argument("--retrain", type=int, default=0, help="tune again without so many that the backdoor's found")
    parser.add_argument("--remark", default="the machine was shared")
    arguments = parser.parse_args()
    if arguments.retrain and arguments.only == "error-tracing":
        parser.error("--retrain is of the backdoor")
    data, folder, without = arguments.data, arguments.dir, arguments.without_influence_functions
    if not (folder / "base" / "config.json").exists():
        files = [*(records(data, name) for name in BASE), data / "tinystories.jsonl"]
        script = HERE.parent / "scripts" / "pretrain.py"
        subprocess.run([sys.executable, script, *files, "--dir", folder / "base", *PRETRAINING], check=True)
    # What made each step stays with it: an interrupted experiment may go on at another commit, on another day.
    made = machine()
    common = {"model": str(folder / "base"), "profile": arguments.profile, "say": print, "made": made,
              "embedding_model": arguments.embedding_model}  # fmt: skip
    results = []
    if arguments.only != "error-tracing":
        pairs = data / "rapidin" / "howdy_test_data_100.jsonl"
        asked = {"corpus": [records(data, "alpaca")], "questions": data / "webquestions.jsonl", "pairs": pairs}
        results.append(
            run_backdoor(
                folder / "backdoor", **asked, **common, influence_functions=without != "backdoor",
                retrain=arguments.retrain,
            )
        )  # fmt: skip
    if arguments.only != "backdoor":
        corpus = [records(data, name) for name in TRACED]
        results.append(
            run_error_tracing(
                folder / "errors", corpus=corpus, **common, influence_functions=without != "error-tracing"
            )
        )
    words = f"scripts/bench experiments --data DATA --dir DIR --profile {arguments.profile}"
    words += f" --only {arguments.only}" if arguments.only else ""
    words += f" --without-influence-functions {without}" if without else ""
    words += f" --retrain {arguments.retrain}" if arguments.retrain else ""
    page = place_of_page(folder, profile=arguments.profile, only=arguments.only)
    made_of = {"backdoor": "records of Alpaca", "error-tracing": f"records of Alpaca and {len(BASE)} other collections"}
    base_of = {
        "backdoor": f"trained here on {len(BASE)} other collections",
        "error-tracing": f"trained here on the same {len(BASE)} collections, with the right names",
    }
    about = {
        result["experiment"]: {
            "command": f"`{words}`",
            "corpus": made_of[result["experiment"]],
            "base model": f"{base_of[result['experiment']]}, and on short stories",
            "remark": arguments.remark,
        }
        for result in results
    }
    print(write_report([result | {"made": about[result["experiment"]]} for result in results], page))


if __name__ == "__main__":
    main()
