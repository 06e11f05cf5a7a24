"""Records real runs of the real engine for the first paint: `python -m kvlens.ui.record`.

Each run becomes one file in `assets/runs`. The page paints the first of them before anything is computed.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from kvlens.engine.model import load_model
from kvlens.ui import controls, library, runner
from kvlens.ui.address import make_sampling
from kvlens.ui.recording import to_bytes
from kvlens.ui.session import Session, Ticket


def record(model, prompts: list[str], lanes: dict, sampling, probed_layer: int = 0):
    """The recording of the last prompt, after the turns before it."""
    from kvlens.ui.heat import View

    session = Session(view=View(layer=probed_layer))
    try:
        for prompt in prompts:
            for _ in runner.run(session, Ticket(prompt, lanes, sampling), model):
                pass
    finally:
        session.free()
    if session.recording is None:
        raise SystemExit("the engine gave no run; see the sentence above")
    return session.recording


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="file name without ending; the number in front gives the order in the menu")
    parser.add_argument("prompt", nargs="+", help="one prompt a turn; the last one is recorded")
    parser.add_argument("--model", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--lane-a", default="dense", help="method, or method:setting=value,setting=value")
    parser.add_argument("--lane-b", default="kivi", help="likewise")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--system-prompt", default="")
    parser.add_argument("--layer", type=int, default=0, help="the layer under the microscope")
    parser.add_argument("--folder", type=Path, default=library.RUNS_FOLDER)
    options = parser.parse_args()
    lanes = {"a": parse_lane(options.lane_a), "b": parse_lane(options.lane_b)}
    sampling = make_sampling(
        {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "system_prompt")}
    )
    model = load_model(options.model, device=options.device)
    recording = record(model, options.prompt, lanes, sampling, options.layer)
    options.folder.mkdir(parents=True, exist_ok=True)
    target = options.folder / f"{options.name}{library.SUFFIX}"
    target.write_bytes(to_bytes(recording))
    print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB, {library.label(recording)}")
    for lane in recording.log.lanes:
        print(f"  {lane.title}: {asdict(lane.memory[-1])}")


def parse_lane(written: str) -> controls.LaneChoice:
    """`kivi:key_bits=4,group_size=64` as a lane's choice."""
    name, _, settings = written.partition(":")
    pairs = dict(pair.split("=", 1) for pair in settings.split(",") if pair)
    return controls.make_choice(name, pairs)


if __name__ == "__main__":
    main()
