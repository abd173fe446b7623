"""Evaluate a medical language model: what it knows, whether its answers win, and how it fails.

    python eval.py complete MODEL "text"                    a model continues a text; without the extra `eval`
    python eval.py convert SOURCE SRC                       a published question set as JSONL
    python eval.py knowledge MODEL ... --tasks medizin_de   accuracy on multiple-choice questions, with intervals
    python eval.py generate MODEL --prompts P.jsonl --out A.jsonl      answers to instructions
    python eval.py judge A.jsonl B.jsonl --url URL --judge NAME        whose answers are better, by a model as judge
    python eval.py failures A.jsonl --ref B.jsonl           mixed languages, verbosity
    python eval.py report RUN ... A.jsonl --out report      one page of the runs, with pictures

See `eval.py COMMAND --help`. knowledge, generate, judge and failures write a folder with their configuration and
raw samples, and resume where they were interrupted.
"""

import argparse
import importlib
import sys

from nanomed import run_script

COMMANDS = {
    name: f"nanomed.evaluation.{name}" for name in ("complete", "convert", "knowledge", "generate", "judge", "failures", "report")
}

EXTRA = ("lm_eval", "datasets", "transformers", "openai")  # packages of the extra `eval`; a command's --help needs none


def main() -> None:
    """Run one command; bad input ends it with one line and exit status 1."""
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    name = parser.parse_args(sys.argv[1:2]).command
    module = importlib.import_module(COMMANDS[name])  # only this one: torch alone takes seconds to import
    command = argparse.ArgumentParser(
        prog=f"eval.py {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(command)
    args = command.parse_args(sys.argv[2:])
    try:
        module.run(args)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        sys.exit(f"error: {name} needs the package {error.name.partition('.')[0]}; pip install -e '.[eval]'")


if __name__ == "__main__":
    run_script(main)
