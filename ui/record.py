"""Records real runs of the real engine: `python -m kvlens.ui.record`.

Each run becomes one file in `assets/runs`; the page paints the first of them before anything is computed.
Without arguments the standard set is recorded with the embedded model; with a name and prompts, one run.
"""

import argparse
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvlens.engine.model import LoadedModel, load_model
from kvlens.ui import controls, library, runner
from kvlens.ui.address import make_sampling
from kvlens.ui.heat import View
from kvlens.ui.recording import Recording, to_bytes
from kvlens.ui.session import Session, Ticket
from kvlens.ui.tabs.examples import read_examples

STORIES = ("Tell me a story about a dog.", "Tell me a story about a bird.")


@dataclass(frozen=True)
class Plan:
    """A run to record: one prompt a turn, of which the last is recorded. The number in front orders the menu."""

    name: str
    prompts: Sequence[str]
    lane_a: str = "dense"
    lane_b: str = "kivi"
    max_new_tokens: int = 200
    temperature: float = 0.0
    system_prompt: str = ""
    layer: int | None = None


def chapters() -> tuple[str, ...]:
    """The longest example, and the questions that go on from it."""
    example = max(read_examples(), key=lambda one: len(one.prompt))
    return (example.prompt, *(one.prompt for one in example.then))


STANDARD = (
    Plan("1-two-stories", STORIES),
    Plan("2-facts-out-of-two-chapters", chapters(), max_new_tokens=60),
    Plan(
        "3-two-bits-against-four",
        STORIES[:1],
        lane_a="kivi:residual_length=32",
        lane_b="kivi:residual_length=32,key_bits=4,value_bits=4",
    ),
    Plan("4-sparse-codes-against-two-bits", STORIES, "kivi", "csr"),
)


def parse_lane(written: str) -> controls.LaneChoice:
    """`kivi:key_bits=4,group_size=64` as a lane's choice."""
    name, _, settings = written.partition(":")
    return controls.make_choice(name, dict(pair.split("=", 1) for pair in settings.split(",") if pair))


def record(model: LoadedModel, plan: Plan) -> Recording:
    """The recording of the plan's last prompt, after the turns before it."""
    session = Session(view=View(layer=plan.layer))
    lanes = {"a": parse_lane(plan.lane_a), "b": parse_lane(plan.lane_b)}
    names = ("max_new_tokens", "temperature", "system_prompt")
    sampling = make_sampling({name: getattr(plan, name) for name in names})
    try:
        for prompt in plan.prompts:
            deque(runner.run(session, Ticket(prompt, lanes, sampling), model), maxlen=0)
    except runner.Fruitless as end:
        raise SystemExit(f"{plan.name}: the engine gave no run: {end}") from end
    finally:
        session.free()
    return session.recording


def save(recording: Recording, name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}{library.SUFFIX}"
    target.write_bytes(to_bytes(recording))
    print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB, {library.label(recording)}")
    for lane in recording.log.lanes:
        live_bytes = sum(lane.memory[-1].parts.values())
        print(f"  {lane.title}: {live_bytes:,} bytes, {lane.tokens_per_second or 0:.0f} tokens/s: {lane.text[:90]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="file name without ending; without it, the standard set")
    parser.add_argument("prompt", nargs="*", help="one prompt a turn; the last one is recorded")
    parser.add_argument("--model", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--lane-a", default="dense", help="method, or method:setting=value,setting=value")
    parser.add_argument("--lane-b", default="kivi", help="likewise")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--system-prompt", default="")
    parser.add_argument(
        "--layer", type=int, default=None, help="the layer under the microscope; the middle one if not set"
    )
    parser.add_argument("--folder", type=Path, default=library.RUNS_FOLDER)
    options = parser.parse_args()
    plans: Sequence[Plan] = STANDARD
    if options.name:
        if not options.prompt:
            parser.error("a run of your own needs a prompt")
        own = {name: value for name, value in vars(options).items() if name in Plan.__dataclass_fields__}
        plans = [Plan(**own, prompts=options.prompt)]
    model = load_model(options.model, device=options.device)
    record(model, Plan("warm-up", ("Hello.",), plans[0].lane_a, plans[0].lane_b, max_new_tokens=16))
    for plan in plans:
        save(record(model, plan), plan.name, options.folder)


if __name__ == "__main__":
    main()
